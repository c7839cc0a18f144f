"""The words of the house: gate order, states, traces, the description of a cell, and what is checked once.

Everything else is a view of what is described here: formats read and write it, kernels run it, layers train it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

GATES = ("i", "f", "g", "o")
"""Order of the gate blocks in every array of 4H columns: input, forget, candidate, output."""

ACTIVATIONS = ("sigmoid", "tanh", "linear", "relu", "hard_sigmoid", "softsign", "softplus", "elu")
"""Activations that the kernel applies itself; the position in this tuple is the code that the kernel knows."""

DTYPES = ("float32", "float64")


class ShapeError(ValueError):
    """An argument has the wrong rank, width or batch: the message names it, what was expected and what came."""


class FormatError(ValueError):
    """A file can't be read as what it claims to be: the message names the file, the tensor, expected and found."""


class State(NamedTuple):
    """State of one LSTM layer after a step, each `[B, H]`. A stack's state is a tuple of these, one a layer."""

    h: Any
    c: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pair when stacked, `(2, B, H)`."""
        return (len(self), *self.h.shape)


class Trace(NamedTuple):
    """Gates (after their activations), cell and output of every step, each `[B, T, H]`.

    At a step that the mask leaves out, the gates are zero and `c`, `h` are carried.
    """

    i: Any
    f: Any
    g: Any
    o: Any
    c: Any
    h: Any


class Plan(tuple[str, ...]):
    """What runs each part and why: a tuple of lines that shows itself as these lines.

    >>> Plan(["layer_0: fused kernel", "layer_1: NumPy"])
    layer_0: fused kernel
    layer_1: NumPy
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(self)


@dataclass(frozen=True)
class CellSpec:
    """Description of one LSTM cell, without its arrays.

    Args:
        input_size: width I of a step's input.
        units: width H of the state.
        activation: on the candidate g and on the cell before the output gate; one of `ACTIVATIONS`.
        recurrent_activation: on the gates i, f, o; one of `ACTIVATIONS`.
        use_bias: whether a bias `[4H]` is added to the pre-activations.

    Raises:
        ShapeError: a width below 1.
        ValueError: an activation that is not in `ACTIVATIONS`.

    >>> CellSpec(input_size=3, units=4).parameters
    128
    """

    input_size: int
    units: int
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    use_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("input_size", "units"):
            if getattr(self, name) < 1:
                raise ShapeError(f"CellSpec: expected {name} >= 1, got {getattr(self, name)}")
        for name in ("activation", "recurrent_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(
                    f"CellSpec: expected {name} to be one of {', '.join(ACTIVATIONS)}, got {getattr(self, name)!r}"
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each array of the cell, by name."""
        wide = 4 * self.units
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (self.input_size, wide),
            "recurrent_kernel": (self.units, wide),
        }
        if self.use_bias:
            shapes["bias"] = (wide,)
        return shapes

    @property
    def parameters(self) -> int:
        """How many numbers the cell's arrays hold."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def check_sequence(owner: str, shape: tuple[int, ...], input_size: int | None, name: str = "x") -> None:
    """Raise `ShapeError` unless `shape` is `[B, T, I]` with a feature axis of `input_size` (any, where None)."""
    expected = "I" if input_size is None else f"I={input_size}"
    if len(shape) != 3 or (input_size is not None and shape[2] != input_size):
        raise ShapeError(
            f"{owner}: expected {name} [B, T, {expected}], got {tuple(shape)}: the last axis is the feature axis"
        )
    if shape[2] < 1:
        raise ShapeError(f"{owner}: expected {name} [B, T, {expected}] with at least one feature, got {tuple(shape)}")


def check_step(owner: str, shape: tuple[int, ...], input_size: int | None, name: str = "x") -> None:
    """Raise `ShapeError` unless `shape` is one step `[B, I]`."""
    expected = "I" if input_size is None else f"I={input_size}"
    if len(shape) != 2 or shape[1] < 1 or (input_size is not None and shape[1] != input_size):
        raise ShapeError(f"{owner}: expected {name} [B, {expected}], got {tuple(shape)}: one step has no time axis")


def check_state(owner: str, shapes: list[tuple[int, ...]], batch: int, units: int, layer: int | None = None) -> None:
    """Raise `ShapeError` unless `shapes` are those of `h` and `c`, each `[batch, units]`."""
    where = "state" if layer is None else f"state of layer {layer}"
    if len(shapes) != 2:
        raise ShapeError(f"{owner}: expected {where} to be a pair (h, c), got {len(shapes)} array(s)")
    for name, shape in zip(State._fields, shapes, strict=True):
        if tuple(shape) != (batch, units):
            raise ShapeError(f"{owner}: expected {name} of {where} [B={batch}, H={units}], got {tuple(shape)}")


def check_mask(owner: str, shape: tuple[int, ...], batch: int, steps: int) -> None:
    """Raise `ShapeError` unless `shape` is `[batch, steps]`."""
    if tuple(shape) != (batch, steps):
        raise ShapeError(f"{owner}: expected mask [B={batch}, T={steps}], got {tuple(shape)}")
