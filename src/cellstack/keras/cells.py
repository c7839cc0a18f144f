"""Descriptions of Keras's cells for the op, and the reasons why the kernel doesn't support a Keras layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import keras

from cellstack.spec import ACTIVATIONS, CellSpec, State

KINDS: dict[type, str] = {
    keras.layers.LSTMCell: "lstm",
    keras.layers.GRUCell: "gru",
    keras.layers.SimpleRNNCell: "rnn",
}
"""Keras's cells, and their kind in our descriptions. Subclasses aren't included, as they may compute anything."""

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
def _spec(kind: str, width: int, units: int, names: tuple[str, ...], use_bias: bool, reset_after: bool) -> CellSpec:
    given: dict[str, Any] = dict(zip(("activation", "recurrent_activation"), names, strict=False))
    return CellSpec(width, units, kind=kind, use_bias=use_bias, reset_after=reset_after, **given)


def _names(cell: Any) -> tuple[str, ...]:
    functions = (
        [cell.activation]
        if type(cell) is keras.layers.SimpleRNNCell
        else [
            cell.activation,
            cell.recurrent_activation,
        ]
    )
    return tuple(activation(function) for function in functions)


def spec_of(cell: Any, width: int) -> CellSpec:
    """Return the description of a cell for inputs of `width`."""
    kind = KINDS[type(cell)]
    return _spec(kind, width, cell.units, _names(cell), cell.use_bias, getattr(cell, "reset_after", True))


def arrays(cell: Any) -> list[Any]:
    """Return the variables of a built cell in the op's order. Their layout in memory is the same as ours."""
    return [cell.kernel, cell.recurrent_kernel, *([] if cell.bias is None else [cell.bias])]


def state_sizes(cell: Any) -> int:
    """Return the number of arrays of a cell's state."""
    return len(State._fields) if type(cell) is keras.layers.LSTMCell else 1


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
        if "" in _names(cell):
            return "an activation is not one of " + ", ".join(sorted(set(_NAMES.values())))
    return ""


def why_not_training(cells: Sequence[Any]) -> str:
    """Return why the kernel doesn't support cells with active dropout; "" if it does."""
    for cell in cells:
        if cell.recurrent_dropout and type(cell) is not keras.layers.SimpleRNNCell:
            return "recurrent_dropout in training: Keras draws a mask per gate, the kernel has one for all"
        if cell.dropout and getattr(cell, "implementation", 2) == 1:
            return "dropout with implementation=1 in training: Keras draws a mask per gate, the kernel has one for all"
        if 1.0 in (cell.dropout, cell.recurrent_dropout):
            return "dropout of 1"
    return ""
