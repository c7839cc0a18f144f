"""The size of a network before it is trained: its layers as text, and their number of weights. Needs no torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from cellstack.train.cell_names import title_of, weights_of
from cellstack.train.checks import UsageError
from cellstack.train.options import TAPS, Architecture

COPIES = 4  # values per weight in training, at least: the weight, its gradient, and Adam's two moments


class Size(NamedTuple):
    """The recurrent layers as text, such as `LSTM 12 -> 48 -> 48`; their number of weights; their output's width."""

    layers: str
    weights: int
    width: int


def size_of(architecture: Architecture, width: int) -> Size:
    """Return the size of the layers on an input of `width`."""
    ways, filters, weights, before = 1 + architecture.bidirectional, architecture.filters, 0, ""
    if filters:
        weights, before = (TAPS * width + 3) * filters, f"convolution {width} -> {filters}, "
        width = filters
    said = " -> ".join(map(str, (width, *architecture.units)))
    for units in architecture.units:
        weights += ways * weights_of(architecture.cell, architecture.heads, width, units)
        width = ways * units
    title = title_of(architecture.cell, architecture.heads)
    return Size(f"{before}{'bidirectional ' * (ways > 1)}{title} {said}", weights, width)


def check_memory(architecture: Architecture, width: int, outputs: int) -> None:
    """Raise `UsageError` if a model can't fit into this machine's memory, before it is made."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    _, numbers, width = size_of(architecture, width)
    takes = 4 * COPIES * (numbers + (width + 1) * outputs)
    if takes > have:
        units = ",".join(map(str, architecture.units))
        raise UsageError(
            f"units {units} don't fit into memory: their {numbers:,} weights need {takes / 1e9:,.1f} GB in training, "
            f"and this machine has {have / 1e9:,.1f} GB"
        )
