"""What convolution and pooling over a grid share: windows over time and the axes of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import Array, Node, Shape, StepRule, check_axes
from cellstack.nodes.checks import check_integer
from cellstack.nodes.windows import checked_padding, why_not_by_steps, windows

Lengths = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


def lengths_of(owner: str, name: str, value: Any, count: int, usual: int = 1, least: int = 1) -> Lengths:
    """Return `count` integers, one per axis; `usual` for each if `value` is None. `ValueError` for other values."""
    if value is None:
        return (usual,) * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise ValueError(f"{owner}: expected {name} to be {count} integers, time first, got {value!r:.80}")
    return tuple(check_integer(owner, name, entry, least) for entry in value)


def pads_of(owner: str, value: Any, count: int) -> Pads:
    """Return the padding before and after each axis; zeros if `value` is None. `ValueError` for other values."""
    if value is None:
        return ((0, 0),) * count
    pairs = isinstance(value, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in value)
    if not pairs or isinstance(value, str) or len(value) != count:
        raise ValueError(f"{owner}: expected padding to be {count} pairs of integers, time first, got {value!r:.80}")
    return tuple((check_integer(owner, "padding", a, 0), check_integer(owner, "padding", b, 0)) for a, b in value)


class Grid(Node):
    """Base class of nodes over windows of time and of a grid. Time is the first axis of every setting.

    Attributes:
        grid: the lengths of the grid's axes.
        channels: the number of channels of the input.
        filters: the number of channels of the output.
        sizes: the number of entries of a window along each axis.
        strides: the distance between windows.
        padding: the number of entries before and after each axis.
        dilation: the distance between the entries of a window.
        spread: the distance between the entries of the input, after zeros are inserted between them.
    """

    grid: Lengths
    strides: Lengths
    padding: Pads
    dilation: Lengths
    spread: Lengths
    channels: int
    filters: int
    sizes: Lengths

    def _prepare(self, owner: str) -> None:
        """Set the attributes that follow from the settings, after these are checked."""
        if any(length < 1 for length in self.grid_out):
            raise ShapeError(f"{owner}: a window of {self.spans[1:]} doesn't fit into the padded grid {self.grid}")
        object.__setattr__(self, "input_size", prod(self.grid) * self.channels)
        by_step = (self.spans[0], self.strides[0], self.spread[0], self.padding[0]) == (1, 1, 1, (0, 0))
        object.__setattr__(self, "mixes_steps", not by_step)
        object.__setattr__(self, "axes", (None, None) if by_step else (2, 2))

    def _count(self, axis: int, length: int) -> int:
        """Return the number of windows along an axis, time being 0, of an input of this length."""
        spread = max(0, (length - 1) * self.spread[axis] + 1)
        return windows(spread + sum(self.padding[axis]), self.spans[axis], self.strides[axis])

    @property
    def grid_out(self) -> Lengths:
        """The lengths of the output's grid."""
        return tuple(self._count(axis, length) for axis, length in enumerate(self.grid, 1))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        super().check(owner, *shapes)
        (shape,) = shapes
        check_axes(owner, self, shape)
        width = prod(self.grid_out) * self.filters
        if len(shape) == 1:
            return (width,)
        return (None if shape[0] is None else self._count(0, shape[0]), width)

    def _padded(self, x: Array, value: float, time: bool = True) -> Array:
        """Return `x [B, T, W]` as a grid `[B, T, …, C]`, spread and padded."""
        x = x.reshape(*x.shape[:2], *self.grid, self.channels)
        padding = self.padding if time else ((0, 0), *self.padding[1:])
        if not any(map(any, padding)) and set(self.spread) == {1}:
            return np.ascontiguousarray(x)
        inner = [max(0, (n - 1) * s + 1) for n, s in zip(x.shape[1:-1], self.spread, strict=True)]
        shape = [n + sum(pair) for n, pair in zip(inner, padding, strict=True)]
        wide = np.full((len(x), *shape, self.channels), value, x.dtype)
        wide[self._places(inner, padding)] = x
        return wide

    def _places(self, inner: Sequence[int], padding: Pads) -> tuple[slice, ...]:
        """Return the slices of the padded input `[B, T, …]` that hold the input.

        Args:
            inner: the lengths of its axes from time on, spread but without padding.
            padding: the padding of these axes.
        """
        ends = zip(inner, padding, self.spread, strict=True)
        return (slice(None), *(slice(before, before + n, step) for n, (before, _), step in ends))

    def _windows(self, wide: Array) -> Array:
        """Return the windows of a padded input, `[B, T', …, C, K…]`, as a view."""
        n = len(self.spans)
        count = [windows(length, span, 1) for length, span in zip(wide.shape[1:-1], self.spans, strict=True)]
        if 0 in count or not len(wide):
            counts = [-(-c // s) for c, s in zip(count, self.strides, strict=True)]
            return np.zeros((len(wide), *counts, self.channels, *self.sizes), wide.dtype)
        view = sliding_window_view(wide, self.spans, axis=tuple(range(1, n + 1)))  # pyright: ignore[reportCallIssue, reportArgumentType]
        steps = [slice(None, None, stride) for stride in self.strides]
        within = [slice(None, None, step) for step in self.dilation]
        return view[(slice(None), *steps, slice(None), *within)]

    @property
    def spans(self) -> Lengths:
        """The lengths of a window, with dilation."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.sizes, self.dilation, strict=True))

    def _taps(self, counts: Sequence[int]) -> list[tuple[Lengths, tuple[slice, ...]]]:
        """Return each entry of a window as its index, and the slices of the padded input that it takes in all windows.

        Args:
            counts: the number of windows along each axis.
        """
        found = []
        for tap in product(*map(range, self.sizes)):
            ends = zip(tap, self.dilation, self.strides, counts, strict=True)
            taken = [slice(k * d, k * d + (n - 1) * s + 1 if n else k * d, s) for k, d, s, n in ends]
            found.append((tap, (slice(None), *taken)))
        return found

    def apply(self, x: Array) -> Array:
        """Return `[B, T', W']` for `x [B, T, W]`, or a vector per row for a vector."""
        if x.ndim == 2:
            return self.apply(x[:, None])[:, 0]
        y = self.over(self._padded(x, self.nothing))
        return y.reshape(*y.shape[:2], prod(y.shape[2:]))

    nothing: ClassVar[float] = 0.0

    def over(self, wide: Array) -> Array:
        """Return the output `[B, T', …, F]` for a padded input."""
        raise NotImplementedError

    def keeps_steps(self, axes: int) -> bool:
        return not self.mixes_steps

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.spread[0] > 1:
            return StepRule(f"it returns {self.spread[0]} steps for every step")
        padding = checked_padding(type(self).__name__, self.padding[0], self.spans[0], self.strides[0])
        why_not = why_not_by_steps(padding, self.spans[0], self.strides[0])
        if why_not is not None:
            return StepRule(why_not)
        if not self.mixes_steps:
            return StepRule(step=self.apply)
        assert self.input_size is not None

        def advance(memory: Array, x: Array) -> tuple[Array, Array]:
            seen = np.concatenate([memory, x], axis=1)
            y = self.over(self._padded(seen, self.nothing, time=False))
            return y.reshape(*y.shape[:2], prod(y.shape[2:])), seen[:, x.shape[1] :]

        return StepRule(memory=(self.spans[0] - 1, self.input_size), start=self.nothing, advance=advance)

    @property
    def _words(self) -> list[str]:
        """The settings that differ from the usual ones."""
        named = {name: getattr(self, name) for name in ("strides", "dilation", "spread")}
        words = [f"{name} {sizes_text(values)}" for name, values in named.items() if set(values) != {1}]
        padded = "" if not any(map(any, self.padding)) else ", ".join(f"{a}+{b}" for a, b in self.padding)
        return [*words, *([f"padding {padded}"] if padded else [])]


def sizes_text(values: Sequence[int]) -> str:
    """Return sizes as text, such as `3x4`."""
    return "x".join(map(str, values))
