"""Descriptions of Keras's cells for the op, and the reasons why the kernel doesn't support a Keras layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import keras

from cellstack import cells
from cellstack.cells import Kind
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.spec import CellSpec

KINDS: dict[type, Kind] = {
    getattr(keras.layers, f"{kind.title}Cell"): kind for kind in cells.KINDS.values() if "keras1" in kind.names
}
"""Keras's cells, and their kind. Subclasses aren't included, as they may compute anything."""

SETTINGS = {
    kind: [name for name in kind.settings if name in inspect.signature(cell).parameters] for cell, kind in KINDS.items()
}
"""The settings in our descriptions that Keras's cells of a kind have too."""

DTYPES = ("float32", "float64")


def _known(name: str) -> Callable[..., Any] | None:
    try:
        return keras.activations.get(name)
    except ValueError:  # Keras doesn't have it
        return None


_NAMES: dict[Any, str] = {function: name for name in ACTIVATIONS if (function := _known(name)) is not None} | {
    keras.ops.tanh: "tanh",
    keras.ops.sigmoid: "sigmoid",
    keras.ops.relu: "relu",
}


def activation(function: Any) -> str:
    """Return our name of a Keras activation, "" if the kernel doesn't support it."""
    if function is None:
        return "linear"
    try:
        return _NAMES.get(function, "")
    except TypeError:  # an object that can't be hashed, such as a layer
        return ""


@lru_cache(maxsize=1024)
def _spec(kind: Kind, width: int, values: tuple[Any, ...]) -> CellSpec:
    return CellSpec(width, kind=kind.name, **dict(zip(SETTINGS[kind], values, strict=True)))


def _values(cell: Any, kind: Kind) -> tuple[Any, ...]:
    """Return the cell's `SETTINGS`; activations by our names."""
    values = ((name, getattr(cell, name)) for name in SETTINGS[kind])
    return tuple(activation(value) if name.endswith("activation") else value for name, value in values)


def spec_of(cell: Any, width: int) -> CellSpec:
    """Return the description of a cell for inputs of `width`."""
    kind = KINDS[type(cell)]
    return _spec(kind, width, _values(cell, kind))


def arrays(cell: Any) -> list[Any]:
    """Return the variables of a built cell in the op's order. Their layout in memory is the same as ours."""
    return [cell.kernel, cell.recurrent_kernel, *([] if cell.bias is None else [cell.bias])]


def state_sizes(cell: Any) -> int:
    """Return the number of arrays of a cell's state."""
    return len(KINDS[type(cell)].state._fields)


def of(layer: Any) -> Sequence[Any]:
    """Return the cells of a recurrent layer, bottom first."""
    cell = layer.cell
    return cell.cells if type(cell) is keras.layers.StackedRNNCells else [cell]


def why_not(layer: Any) -> str:
    """Return why the kernel supports no call of a layer; "" if it supports some."""
    dtype = layer.compute_dtype
    if dtype not in DTYPES or layer.variable_dtype != dtype:
        return f"{layer.dtype_policy.name} is neither float32 nor float64"
    for cell in of(layer):
        kind = type(cell)
        if kind not in KINDS:
            return f"{kind.__name__} is not Keras's LSTMCell, GRUCell or SimpleRNNCell"
        if cell.compute_dtype != dtype or cell.variable_dtype != dtype:
            return f"its cell has dtype {cell.dtype_policy.name}, the layer {dtype}"
        if cell.activity_regularizer is not None:
            return "a cell's activity_regularizer adds a term at every step"
        if "" in _values(cell, KINDS[kind]):
            return "an activation is not one of " + ", ".join(sorted(set(_NAMES.values())))
    return ""


def why_not_training(cells: Sequence[Any]) -> str:
    """Return why the kernel doesn't support cells with active dropout; "" if it does."""
    for cell in cells:
        if cell.recurrent_dropout and len(KINDS[type(cell)].gates) > 1:
            return "recurrent_dropout in training: Keras draws a mask per gate, the kernel has one for all"
        if cell.dropout and getattr(cell, "implementation", 2) == 1:
            return "dropout with implementation=1 in training: Keras draws a mask per gate, the kernel has one for all"
        if 1.0 in (cell.dropout, cell.recurrent_dropout):
            return "dropout of 1"
    return ""
