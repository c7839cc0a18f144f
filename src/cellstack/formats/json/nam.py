"""neural-amp-modeler's `.nam` files: an architecture, its settings, and its weights as one list.

Ref: https://github.com/sdatkinson/neural-amp-modeler, nam/models/recurrent.py and linear.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import Builder
from cellstack.formats.files import short
from cellstack.formats.json.values import array_of, value_of
from cellstack.network import Network
from cellstack.nodes import Conv1D, Dense, Recurrent
from cellstack.nodes.cell_arrays import Cell

LSTM_SETTINGS = ("input_size", "hidden_size", "num_layers")
LINEAR_SETTINGS = ("receptive_field", "bias")


class _Numbers:
    """The weights in a file's JSON object, read one array after the other."""

    def __init__(self, path: str, found: Mapping[str, Any]) -> None:
        self.path, self.at = path, 0
        self.numbers = array_of(f"{path}: weights", found.get("weights"), None).astype(np.float32)

    def take(self, *shape: int) -> Array:
        """Return the next weights, in a shape."""
        count = int(np.prod(shape))
        part = self.numbers[self.at : self.at + count]
        if len(part) < count:
            raise FormatError(f"{self.path}: expected at least {self.at + count} weights, found {self.at + len(part)}")
        self.at += count
        return part.reshape(shape)

    def check_taken(self) -> None:
        """Raise `FormatError` if weights are left."""
        if self.at != len(self.numbers):
            raise FormatError(f"{self.path}: expected {self.at} weights, found {len(self.numbers)}")


def _settings(path: str, found: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    config = value_of(f"{path}: config", found, "config", dict)
    others = config.keys() - set(names)
    if others or not config.keys() >= {names[0]}:
        raise FormatError(f"{path}: config: expected {', '.join(names)}, found {short(sorted(config), 200)}")
    for name in names:
        value = config.get(name, False if name == "bias" else 1)
        whole = isinstance(value, bool) if name == "bias" else type(value) is int and 1 <= value < 1 << 24
        if not whole:
            kind = "true or false" if name == "bias" else "a positive integer"
            raise FormatError(f"{path}: config: expected {name} to be {kind}, found {short(value)}")
    return dict(config)


def _lstm(path: str, found: Mapping[str, Any], build: Builder) -> str:
    """Build a stack of LSTMs with learned initial states, and a Dense.

    An LSTM's matrix has a row for each unit of each gate; the input's columns come first. There is one bias.
    """
    settings = _settings(path, found, LSTM_SETTINGS)
    width, units = settings.get("input_size", 1), settings.get("hidden_size", 1)
    numbers = _Numbers(path, found)
    wire = build.input("x", (None, width))
    for layer in range(settings.get("num_layers", 1)):
        rows, bias = numbers.take(4 * units, width + units), numbers.take(4 * units)
        h, c = numbers.take(units), numbers.take(units)
        learned = bool(h.any() or c.any())
        arrays = {"kernel": rows[:, :width].T, "recurrent_kernel": rows[:, width:].T, "bias": bias}
        arrays |= {"initial_h": h, "initial_c": c} if learned else {}
        cell = Cell(CellSpec(width, units, learn_initial_state=learned), **arrays)
        wire, width = build.add(f"lstm_{layer}", Recurrent((cell,)), wire), units
    kernel, bias = numbers.take(1, units).T, numbers.take(1)
    numbers.check_taken()
    return build.add("head", Dense(kernel, bias), wire)


def _linear(path: str, found: Mapping[str, Any], build: Builder) -> str:
    """Build one FIR filter over the last samples."""
    settings = _settings(path, found, LINEAR_SETTINGS)
    numbers = _Numbers(path, found)
    taps = numbers.take(settings["receptive_field"], 1, 1)
    bias = numbers.take(1) if settings.get("bias", False) else None
    numbers.check_taken()
    return build.add("filter", Conv1D(taps, bias, padding="causal"), build.input("x", (None, 1)))


ARCHITECTURES = {"LSTM": _lstm, "Linear": _linear}


def network_of(path: str, found: Mapping[str, Any]) -> Network:
    """Return the network of a file's JSON object, `[B, T, I]` to `[B, T, 1]`, one sample per step.

    Raises:
        FormatError: another architecture, or weights that don't fit it.
    """
    architecture = found.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise FormatError(f"{path}: expected the architecture {known}, found {short(architecture)}")
    build = Builder()
    build.output(ARCHITECTURES[architecture](path, found, build))
    said = {key: value for key, value in found.items() if key != "weights"}
    return build.network({"source": {"format": "nam"}, "nam": said})
