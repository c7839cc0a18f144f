"""Builds operations that take several nodes: indexing, operations on any axis and on values with more than two axes.

Axes are counted as in the file, 0 being the batch. Lengths come from the inputs' shapes in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack import nodes
from cellstack.formats.build import Builder
from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short
from cellstack.nodes.base import Array, Node, Shape

MOST_COPIES = 256  # of one value in a concatenation
PIECE = 32  # the number of values that a piece of a split counts as, for the limit


class Value(NamedTuple):
    """A tensor: its wire; its mask; `flag`, if it is itself a mask; `state`, if it is a cell's state.

    Masks are compared by their definition: `("ne", wire, number)` keeps values that differ from a number, `("any", …)`
    steps where this holds for any feature, `("or", …)` steps that any of several masks keeps. `("time", n)` is a
    concatenation over time of masks that `Followed` numbers, `("wide", …)` a mask with a value per feature; `("all",)`
    and `("none",)` keep everything and nothing.
    """

    wire: str
    mask: Any = None
    flag: Any = None
    state: str = ""  # the wire of a cell's final state, if the value is one: a cell that starts from it uses that wire

    @property
    def start(self) -> str:
        """The wire to use for an initial state."""
        return self.state or self.wire


Pending = Callable[[], Value]  # makes a tensor's nodes on first use; raises if the tensor isn't supported


class Followed:
    """Numbers the masks of sequences that are concatenated over time."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def mask(self, masks: Sequence[Any]) -> Any:
        """Return the mask of several sequences that are concatenated over time."""
        key = tuple(("all",) if mask is None else mask for mask in masks)
        return ("time", self._numbers.setdefault(key, len(self._numbers)))


class LayerBuilder:
    """Adds the nodes of one layer or operation.

    Args:
        builder: the network's builder.
        layer: the layer, for messages.
        name: the name of its nodes.
        dtype: the dtype of arrays that are created.
        followed: the masks of concatenated sequences.
    """

    def __init__(self, builder: Builder, layer: Layer, name: str, dtype: np.dtype[Any], followed: Followed) -> None:
        self.builder, self.layer, self.name, self.dtype, self.followed = builder, layer, name, dtype, followed

    def add(self, node: Node, *values: Value) -> Value:
        """Add a node; the returned value has no mask."""
        return Value(self.builder.add(self.name, node, *(value.wire for value in values)))

    def shape(self, value: Value) -> Shape:
        """Return the lengths of a value's axes after the batch; raise `FormatError` if they are unknown."""
        shape = self.builder.shapes[value.wire]
        if shape is None:
            raise self.layer.refuse("takes a value whose shape the file doesn't specify")
        return shape

    def length(self, value: Value, place: int) -> int:
        """Return the length of an axis; from then on the network depends on it."""
        self.shape(value)
        found = self.builder.length(value.wire, place)
        if found is None:
            raise self.layer.refuse(f"needs the length of axis {place}, which the file doesn't specify")
        return found

    def width(self, value: Value) -> int:
        """Return the length of the last axis, the features of a sequence."""
        shape = self.shape(value)
        return self.length(value, 1) if len(shape) == 1 else shape[-1] or self.length(value, len(shape))

    def place(self, axis: Any, axes: int) -> int:
        """Return an axis counted from the front, given the number of axes after the batch; it can't be the batch."""
        if isinstance(axis, (list, tuple)) and len(axis) == 1:
            axis = axis[0]
        if type(axis) is not int or not -axes <= axis <= axes or axis == 0:
            raise self.layer.refuse(f"expected one of the {axes} axes after the batch, found {short(axis)}")
        return axis if axis > 0 else axes + 1 + axis

    def bare(self, value: Value) -> Value:
        """Return a value without its mask, as Keras's operations return it."""
        if value.mask is None:
            return value
        axes = len(self.shape(value))
        return Value(self.builder.add(f"{self.name}.all_steps", nodes.Permute(tuple(range(1, axes + 1))), value.wire))

    # ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def reshape(self, value: Value, shape: Sequence[int | None]) -> Value:
        """Return a value in another shape; one of its lengths may be None, to be inferred."""
        if list(shape).count(None) > 1:
            raise self.layer.refuse(f"needs axis lengths that the file doesn't specify, {short(list(shape))}")
        if not shape or 0 in shape:
            raise self.layer.refuse(f"expected at least one feature per row, found the shape {short(list(shape))}")
        if tuple(shape) == self.builder.shapes[value.wire]:
            return value
        return self.add(nodes.Reshape(tuple(-1 if axis is None else axis for axis in shape)), value)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value with its axes, counted from 1, in another order."""
        return self.add(nodes.Permute(tuple(order)), value)

    def expand(self, value: Value, axis: Any) -> Value:
        """Return a value with an additional axis of length 1."""
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
        return self.add(nodes.Select(taken.start, taken.stop, taken.step or 1, place), value)

    def at(self, value: Value, place: int, index: int) -> Value:
        """Return one index of an axis, and remove the axis."""
        axes, length = len(self.shape(value)), self.shape(value)[place - 1]
        if length is not None and not -length <= index < length:
            raise self.layer.refuse(f"index {index} is out of range for axis {place} of length {length}")
        if axes == 2 and place == 1 and index == -1:
            return self.add(nodes.GlobalPool("last"), self.bare(value))
        one = self.select(value, place, slice(index, index + 1 or None))
        return self.squeeze(one, place)

    def repeat(self, value: Value, place: int, times: int) -> Value:
        """Return a value tiled along one of its axes."""
        shape = self.shape(value)
        if times == 1:
            return value
        if len(shape) == 2 and place == 1 and shape[0] == 1:
            return self.add(nodes.Repeat(times), self.squeeze(value, 1))
        if not 1 < times <= MOST_COPIES:
            raise self.layer.refuse(f"expected 1 to {MOST_COPIES} copies, found {short(times)}")
        return self.add(nodes.Merge("concat", place), *[value] * times)

    def last(self, value: Value, place: int, work: Callable[[Value], Value]) -> Value:
        """Apply an operation on the last axis to another axis."""
        axes = len(self.shape(value))
        order = [*(axis for axis in range(1, axes + 1) if axis != place), place]
        back = [order.index(axis) + 1 for axis in range(1, axes + 1)]
        return self.permute(work(self.permute(value, order)), back)

    def flat(self, value: Value, work: Callable[[Value], Value]) -> Value:
        """Apply an operation on features to a value with any number of axes; nodes accept at most two."""
        shape = self.shape(value)
        if len(shape) <= 2:
            return work(value)
        done = work(self.reshape(value, (None, self.width(value))))
        return self.reshape(done, (*shape[:-1], self.width(done)))

    # ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def constant(self, value: Value, number: Any) -> Array:
        """Return a number, or one number per feature, as an array with the width of a value."""
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
        """Return the number of pieces of a split; raise `TooMuchError` if a file asks for too many."""
        self.builder.make(count * PIECE)
        return count

    def number(self, number: Any) -> float:
        """Return a numeric setting as a float."""
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not np.isfinite(number):
            raise self.layer.refuse(f"expected a number, found {short(number)}")
        return float(number)

    def negative(self, number: Any) -> Any:
        """Return a number, or a list of them, with the other sign."""
        return [self.negative(one) for one in number] if isinstance(number, list) else -self.number(number)

    def scale(self, value: Value, factor: Any, shift: Any = 0.0) -> Value:
        """Return `value·factor + shift`."""
        return self.flat(
            value, lambda one: self.add(nodes.Scale(self.constant(one, factor), self.constant(one, shift)), one)
        )

    def divide(self, value: Value, number: Any) -> Value:
        """Return `value / number`."""

        def work(one: Value) -> Value:
            by = self.constant(one, number)
            return self.add(nodes.Standardise(np.zeros_like(by), by), one)

        return self.flat(value, work)

    def activate(self, value: Value, activation: str) -> Value:
        """Apply an activation to a value, elementwise or over the last axis."""
        return self.flat(value, lambda one: self.add(nodes.Activation(activation), one))

    def merge(self, mode: str, *values: Value, axis: int = -1) -> Value:
        """Return several values merged; a single one is returned unchanged."""
        return values[0] if len(values) == 1 else self.add(nodes.Merge(mode, axis), *values)

    def reduce(self, mode: str, value: Value, axis: Any, keepdims: bool) -> Value:
        """Return the mean, max, min or sum over one axis."""
        axes = len(self.shape(value))
        place = self.place(axis, axes)
        if axes == 2 and place == 1 and not keepdims and mode in ("mean", "max"):
            return self.add(nodes.GlobalPool(mode), value)
        return self.add(nodes.Reduce(mode, -1 if place == axes else place, keepdims), value)

    def clip(self, value: Value, low: Any, high: Any) -> Value:
        """Clip a value; a bound is a number, a list of one per feature, or None for no bound."""
        if isinstance(low, list) or isinstance(high, list):
            for mode, bound in (("max", low), ("min", high)):
                value = value if bound is None else self.merge(mode, value, self.scale(value, 0.0, bound))
            return value
        low, high = (None if bound is None else self.number(bound) for bound in (low, high))
        return self.flat(value, lambda one: self.add(nodes.Clip(low, high), one))
