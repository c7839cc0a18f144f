"""A network in the form that the page reads: the description of the native format, with the arrays as text."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.network.description import described
from cellstack.views.recorded import form_of

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.base import Array


class Named(NamedTuple):
    """The names of a trained network's inputs and outputs; empty where it has none."""

    task: str | None = None
    channels: tuple[str, ...] = ()
    """The input's features."""
    outputs: tuple[str, ...] = ()
    """The output's features: the classes, the targets, the quantiles of each target, or the characters."""
    targets: tuple[str, ...] = ()
    """The columns that a regression or a forecast predicts."""
    quantiles: tuple[float, ...] = ()


def named(network: Network) -> Named:
    """Return the names in a network's metadata, as training writes them."""
    metadata, task, channels = network.metadata, network.task, network.channels
    if task == "classify":
        return Named(task, channels, tuple(map(str, network.labels)))
    if task == "regress":
        label = (metadata.get("table") or {}).get("label")
        targets = tuple(map(str, label)) if isinstance(label, list) else (str(label),) if label else ()
        return Named(task, channels, targets, targets)
    if task == "forecast":
        recipe = metadata.get("recipe") or {}
        targets, quantiles = tuple(recipe.get("targets", ())), tuple(recipe.get("quantiles", ()))
        outputs = tuple(f"{target}, quantile {level:g}" for target in targets for level in quantiles)
        return Named(task, channels, outputs, targets, quantiles)
    characters = metadata.get("characters")
    if task == "text" or isinstance(characters, (str, list)):
        bytes_ = [chr(byte) if 32 <= byte < 127 else f"{byte:02x}" for byte in range(256)]
        alphabet = tuple(map(str, characters if isinstance(characters, (str, list)) else bytes_))
        return Named("text", alphabet, alphabet)
    return Named(None, channels)


def payload_of(network: Network, pack: Callable[[Array], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a network as JSON-compatible values, which the page engine's `readNetwork` reads.

    Args:
        network: any network; the engine reports nodes that it doesn't support.
        pack: encodes an array; None = `packed`.

    Returns:
        `description`, as in docs/format.md; `arrays`, by the names of its tensors, as from `packed`; and `cells`, as
        from `cells_of`.

    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(1, 1, kind="rnn", use_bias=False), np.ones((1, 1)), np.zeros((1, 1)))
    >>> payload = payload_of(Network([Recurrent((cell,))]))
    >>> payload["description"]["nodes"][0]["wires"]
    ['x']
    >>> payload["arrays"]["layer_0/0/kernel"]
    {'dtype': 'float64', 'shape': [1, 1], 'data': 'AAAAAAAA8D8='}
    """
    description, arrays = described(network)
    pack = pack or packed
    packs = {name: pack(np.asarray(array)) for name, array in arrays.items()}
    return {"description": description, "arrays": packs, "cells": cells_of(network)}


def cells_of(network: Network) -> dict[str, Any]:
    """Return the `forms` of a network's cells, each once, as from `form_of`; and the number of each cell's, by node."""
    forms: list[dict[str, Any]] = []
    numbers: dict[str, list[int]] = {}
    for name, node in zip(network.names, network.nodes, strict=True):
        for cell in node.cells_in(network.dtype):
            form = form_of(cell.spec)
            if form not in forms:
                forms.append(form)
            numbers.setdefault(name, []).append(forms.index(form))
    return {"forms": forms, "numbers": numbers}


def packed(array: Array) -> dict[str, Any]:
    """Return an array as `dtype` (`"float32"` or `"float64"`), `shape`, and `data`: its bytes in C order as base64.

    Args:
        array: float32 or float64; the bytes are little-endian, as in browsers.
    """
    numbers = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    data = base64.b64encode(numbers.tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}
