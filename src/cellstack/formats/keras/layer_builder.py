"""What takes more than one node: entries of an axis, work on another axis than the last, on more axes than nodes take.

Axes are counted as a file counts them, 0 being the batch;
lengths come from the shapes that the inputs have in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.build import Builder
from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short
from cellstack.nodes import (
    Activation,
    Clip,
    GlobalPool,
    Merge,
    Permute,
    Reduce,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.nodes.base import Array, Node, Shape

MOST_COPIES = 256  # of one value, side by side
PIECE = 32  # how many numbers a piece of a split is counted as


class Value(NamedTuple):
    """A tensor: what returns it; its mask; where it is itself a mask, which one; where it is a state, which.

    Masks are compared by how they come about: `("ne", wire, number)` says where a value differs from a number,
    `("any", …)` that one of its features does, `("or", …)` that one of several masks keeps a step, `("time", n)` that
    some of them follow each other, which ones the graph knows; `("wide", …)` is a mask as wide as the features,
    `("all",)` and `("none",)` keep all and nothing.
    """

    wire: str
    mask: Any = None
    flag: Any = None
    state: str = ""  # the wire of a cell's state after the last step, where it is one: cells start from that

    @property
    def start(self) -> str:
        """The wire from which a cell starts that starts from this."""
        return self.state or self.wire


Pending = Callable[[], Value]  # a tensor whose nodes are put in once something takes it, or that can't be taken


class Followed:
    """Masks of sequences that follow each other in time: a number stands for each, however they nest."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def mask(self, masks: Sequence[Any]) -> Any:
        """Return the mask of several sequences one after the other."""
        key = tuple(("all",) if mask is None else mask for mask in masks)
        return ("time", self._numbers.setdefault(key, len(self._numbers)))


class LayerBuilder:
    """Puts in the nodes of one layer or operation.

    Args:
        builder: where to.
        layer: whose nodes they are, for messages.
        name: what they are called.
        dtype: of arrays that are made.
        followed: the masks of sequences that follow each other.
    """

    def __init__(self, builder: Builder, layer: Layer, name: str, dtype: np.dtype[Any], followed: Followed) -> None:
        self.builder, self.layer, self.name, self.dtype, self.followed = builder, layer, name, dtype, followed

    def add(self, node: Node, *values: Value) -> Value:
        """Put a node in; no mask is said to go on."""
        return Value(self.builder.add(self.name, node, *(value.wire for value in values)))

    def shape(self, value: Value) -> Shape:
        """Return the lengths of a value's axes after the batch; a `FormatError` where they aren't known."""
        shape = self.builder.shapes[value.wire]
        if shape is None:
            raise self.layer.refuse("takes a value of a shape that the file doesn't say")
        return shape

    def length(self, value: Value, place: int) -> int:
        """Return the length of an axis, which the network then depends on."""
        self.shape(value)
        found = self.builder.length(value.wire, place)
        if found is None:
            raise self.layer.refuse(f"needs the length of axis {place}, which the file leaves open")
        return found

    def width(self, value: Value) -> int:
        """Return the length of the last axis, the features of a sequence."""
        shape = self.shape(value)
        return self.length(value, 1) if len(shape) == 1 else shape[-1] or self.length(value, len(shape))

    def place(self, axis: Any, axes: int) -> int:
        """Return an axis counted from the front, of so many after the batch; not the batch itself."""
        if isinstance(axis, (list, tuple)) and len(axis) == 1:
            axis = axis[0]
        if type(axis) is not int or not -axes <= axis <= axes or axis == 0:
            raise self.layer.refuse(f"expected one axis after the batch, of {axes}, found {short(axis)}")
        return axis if axis > 0 else axes + 1 + axis

    def bare(self, value: Value) -> Value:
        """Return a value without its mask, as Keras's operations return it."""
        if value.mask is None:
            return value
        axes = len(self.shape(value))
        return Value(self.builder.add(f"{self.name}.all_steps", Permute(tuple(range(1, axes + 1))), value.wire))

    # ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def reshape(self, value: Value, shape: Sequence[int | None]) -> Value:
        """Return a value in another shape; one of its lengths may be None, whatever is left."""
        if list(shape).count(None) > 1:
            raise self.layer.refuse(f"needs lengths that the file leaves open, {short(list(shape))}")
        if not shape or 0 in shape:
            raise self.layer.refuse(f"expected a number of features a row, found the shape {short(list(shape))}")
        if tuple(shape) == self.builder.shapes[value.wire]:
            return value
        return self.add(Reshape(tuple(-1 if axis is None else axis for axis in shape)), value)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value with its axes, counted from 1, in another order."""
        return self.add(Permute(tuple(order)), value)

    def expand(self, value: Value, axis: Any) -> Value:
        """Return a value with an axis of length 1 more."""
        shape = self.shape(value)
        place = self.place(axis, len(shape) + 1)
        return self.reshape(value, (*shape[: place - 1], 1, *shape[place - 1 :]))

    def squeeze(self, value: Value, axis: Any) -> Value:
        """Return a value without an axis of length 1."""
        shape = self.shape(value)
        place = self.place(axis, len(shape))
        if shape[place - 1] != 1:
            raise self.layer.refuse(f"expected axis {place} of length 1, found {shape[place - 1]}")
        return self.reshape(value, (*shape[: place - 1], *shape[place:]))

    def select(self, value: Value, place: int, taken: slice) -> Value:
        """Return a slice of an axis."""
        return self.add(Select(taken.start, taken.stop, taken.step or 1, place), value)

    def at(self, value: Value, place: int, index: int) -> Value:
        """Return one entry of an axis, which ends with it."""
        axes, length = len(self.shape(value)), self.shape(value)[place - 1]
        if length is not None and not -length <= index < length:
            raise self.layer.refuse(f"expected an entry of axis {place} of {length}, found {index}")
        if axes == 2 and place == 1 and index == -1:
            return self.add(GlobalPool("last"), self.bare(value))
        one = self.select(value, place, slice(index, index + 1 or None))
        return self.squeeze(one, place)

    def repeat(self, value: Value, place: int, times: int) -> Value:
        """Return a value so many times along one of its axes, end to end."""
        shape = self.shape(value)
        if times == 1:
            return value
        if len(shape) == 2 and place == 1 and shape[0] == 1:
            return self.add(Repeat(times), self.squeeze(value, 1))
        if not 1 < times <= MOST_COPIES:
            raise self.layer.refuse(f"expected at most {MOST_COPIES} copies, found {short(times)}")
        return self.add(Merge("concat", place), *[value] * times)

    def last(self, value: Value, place: int, work: Callable[[Value], Value]) -> Value:
        """Return what some work on the last axis does to another one."""
        axes = len(self.shape(value))
        order = [*(axis for axis in range(1, axes + 1) if axis != place), place]
        back = [order.index(axis) + 1 for axis in range(1, axes + 1)]
        return self.permute(work(self.permute(value, order)), back)

    def flat(self, value: Value, work: Callable[[Value], Value]) -> Value:
        """Return what some work on features does to a value of any number of axes: nodes take two of them."""
        shape = self.shape(value)
        if len(shape) <= 2:
            return work(value)
        done = work(self.reshape(value, (None, self.width(value))))
        return self.reshape(done, (*shape[:-1], self.width(done)))

    # ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def constant(self, value: Value, number: Any) -> Array:
        """Return a number, or one a feature, as an array as wide as a value."""
        width = self.width(value)
        try:
            array = np.asarray(number if isinstance(number, (int, float, list)) else "", np.float64)
        except (ValueError, TypeError):  # texts, or lists of unequal lengths
            array = np.full(0, np.nan)
        fits = array.size == 1 or (array.size == width == array.shape[-1])
        if not fits or not np.isfinite(array).all():
            raise self.layer.refuse(f"expected a number, or one for each of {width} features, found {short(number)}")
        return np.full(self.builder.make(width), array.reshape(-1), self.dtype)

    def pieces(self, count: int) -> int:
        """Return into how many pieces an axis is cut, as long as a file says; `TooMuchError` where they are many."""
        self.builder.make(count * PIECE)
        return count

    def number(self, number: Any) -> float:
        """Return a number of a setting."""
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not np.isfinite(number):
            raise self.layer.refuse(f"expected a number, found {short(number)}")
        return float(number)

    def negative(self, number: Any) -> Any:
        """Return a number, or a list of them, with the other sign."""
        return [self.negative(one) for one in number] if isinstance(number, list) else -self.number(number)

    def scale(self, value: Value, factor: Any, shift: Any = 0.0) -> Value:
        """Return `value·factor + shift`."""
        return self.flat(value, lambda one: self.add(Scale(self.constant(one, factor), self.constant(one, shift)), one))

    def divide(self, value: Value, number: Any) -> Value:
        """Return `value / number`."""

        def work(one: Value) -> Value:
            by = self.constant(one, number)
            return self.add(Standardise(np.zeros_like(by), by), one)

        return self.flat(value, work)

    def activate(self, value: Value, activation: str) -> Value:
        """Return an activation of a value, number by number or over the last axis."""
        return self.flat(value, lambda one: self.add(Activation(activation), one))

    def merge(self, mode: str, *values: Value, axis: int = -1) -> Value:
        """Return several values merged; one stays as it is."""
        return values[0] if len(values) == 1 else self.add(Merge(mode, axis), *values)

    def reduce(self, mode: str, value: Value, axis: Any, keepdims: bool) -> Value:
        """Return the mean, max, min or sum over one axis."""
        axes = len(self.shape(value))
        place = self.place(axis, axes)
        if axes == 2 and place == 1 and not keepdims and mode in ("mean", "max"):
            return self.add(GlobalPool(mode), value)
        return self.add(Reduce(mode, -1 if place == axes else place, keepdims), value)

    def clip(self, value: Value, low: Any, high: Any) -> Value:
        """Return a value within bounds, None for one without end; numbers, or lists of one a feature."""
        if isinstance(low, list) or isinstance(high, list):
            for mode, bound in (("max", low), ("min", high)):
                value = value if bound is None else self.merge(mode, value, self.scale(value, 0.0, bound))
            return value
        low, high = (None if bound is None else self.number(bound) for bound in (low, high))
        return self.flat(value, lambda one: self.add(Clip(low, high), one))
