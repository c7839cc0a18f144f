"""Convolution and pooling over time and a grid of features, such as frequencies or the rows and columns of a picture.

The features of a step, `[G1·…·Gn·C]`, are a grid `[G1, …, Gn, C]` in C order, with the channels C last. The grid of a
spectrum has one axis, that of a picture two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, ClassVar

import numpy as np

from cellstack import native
from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import MOST_AXES, Array, NodeRun, Shape, StateGradients, StepRule, Types
from cellstack.nodes.checks import check_choice, check_flag, check_integer, frozen_copy, one_dtype
from cellstack.nodes.grid_base import Grid, Lengths, lengths_of, pads_of, sizes_text
from cellstack.nodes.windows import WINDOW_MODES

BLOCK = 1 << 22  # numbers in the windows that are computed together


@dataclass(frozen=True, eq=False)
class GridConv(Grid):
    """A convolution over time and a grid: `[B, T, G1·…·Gn·C]` to `[B, T', G1'·…·Gn'·F]`::

        y[t, g] = sum over k of x[t·strides + k·dilation, …]·kernel[k] + bias

    With `spread`, zeros are first inserted between the entries of the input. So a transposed convolution with stride s
    is a convolution with spread s and the reversed kernel.

    Args:
        kernel: `[K, K1, …, Kn, C/groups, F]`, float32 or float64.
        grid: the lengths `G1 … Gn` of the grid of a step.
        bias: `[F]` of the same dtype, or None.
        strides: the distance between windows, for time and each axis of the grid; None: 1.
        padding: zeros before and after time and each axis of the grid, as pairs; None: no padding.
        dilation: the distance between the entries of a window; None: 1.
        spread: the distance between the entries of the input; None: 1.
        groups: the number of equal blocks of input and output channels that are convolved separately.

    Raises:
        ShapeError: a wrong shape, or a window that is larger than the grid.
        TypeError: a wrong dtype.
        ValueError: groups that don't divide F, an invalid setting.

    >>> x = np.arange(6.0).reshape(1, 2, 3)  # two steps of three frequencies
    >>> GridConv(np.ones((1, 2, 1, 1)), (3,)).apply(x)
    array([[[1., 3.],
            [7., 9.]]])
    """

    kernel: Array
    grid: Lengths
    bias: Array | None = None
    strides: Any = None
    padding: Any = None
    dilation: Any = None
    spread: Any = None
    groups: int = 1
    file_type = "grid_conv"
    arrays: ClassVar = {"kernel": (), "bias": ()}
    multiplied = ("kernel",)

    def __post_init__(self) -> None:
        owner = "GridConv"
        number = np.ndim(self.kernel) - 3  # axes of the grid
        if not 1 <= number <= MOST_AXES:
            raise ShapeError(f"{owner}: expected kernel [K, K1, …, C/groups, F], got {np.shape(self.kernel)}")
        names = ("K", *(f"K{n}" for n in range(1, number + 1)), "C/groups", "F")
        object.__setattr__(self, "kernel", frozen_copy(owner, "kernel", self.kernel, names))
        if self.bias is not None:
            object.__setattr__(self, "bias", frozen_copy(owner, "bias", self.bias, self.kernel.shape[-1:]))
        object.__setattr__(self, "dtype", one_dtype(owner, {"kernel": self.kernel, "bias": self.bias}))
        object.__setattr__(self, "grid", lengths_of(owner, "grid", self.grid, number))
        for name in ("strides", "dilation", "spread"):
            object.__setattr__(self, name, lengths_of(owner, name, getattr(self, name), number + 1))
        object.__setattr__(self, "padding", pads_of(owner, self.padding, number + 1))
        object.__setattr__(self, "groups", check_integer(owner, "groups", self.groups))
        if self.filters % self.groups:
            raise ValueError(f"{owner}: expected groups to divide F={self.filters}, got {self.groups}")
        self._prepare(owner)

    @property
    def channels(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of channels of the input."""
        return self.kernel.shape[-2] * self.groups

    @property
    def filters(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of channels of the output."""
        return self.kernel.shape[-1]

    @property
    def sizes(self) -> Lengths:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of entries of a window along each axis."""
        return self.kernel.shape[:-2]

    @cached_property
    def _matrices(self) -> Array:
        """The kernel as a matrix `[K·…·C/groups, F/groups]` per group."""
        *_, channels, filters = self.kernel.shape
        split = self.kernel.reshape(-1, channels, self.groups, filters // self.groups).transpose(2, 0, 1, 3)
        matrices = np.ascontiguousarray(split).reshape(self.groups, -1, filters // self.groups)
        matrices.setflags(write=False)
        return matrices

    @cached_property
    def _packed(self) -> Any:
        """The convolution as a dense layer in the layout of `native`, packed at the first use."""
        return native.dense(self.kernel.reshape(-1, self.filters), self.bias)

    def over(self, wide: Array) -> Array:
        """Return `[B, T', …, F]` for a padded input: the product of each window with the kernel."""
        view, number = self._windows(wide), len(self.spans)
        batch, steps, *grid = view.shape[: number + 1]
        y = np.empty((batch, steps, *grid, self.filters), wide.dtype)
        each = max(1, BLOCK // max(1, prod(grid) * self._matrices[0].shape[0] * self.groups))  # steps in a block
        for row, at in product(range(batch), range(0, steps, each)):
            y[row, at : at + each] = self._product(view[row, at : at + each])
        return y

    def _product(self, view: Array) -> Array:
        """Return `[T', …, F]` for windows `[T', …, C, K…]`."""
        number, channels = len(self.spans), self.channels // self.groups
        ahead, behind = view.shape[:number], list(range(number + 1, 2 * number + 1))
        if self.groups == 1:
            rows = np.ascontiguousarray(view.transpose(*range(number), *behind, number))
            rows = native.plain(rows.reshape(1, prod(ahead), -1))
            y = np.empty((1, prod(ahead), self.filters), rows.dtype)
            width = rows.shape[2]
            native.forward(
                native.Sequences(1, rows.shape[1], rows, rows.size, width), [native.Layer(self._packed, y=y)], 1
            )
            return y.reshape(*ahead, self.filters)
        split = view.reshape(*ahead, self.groups, channels, *view.shape[number + 1 :])
        order = (number, 0, *range(1, number), *(axis + 1 for axis in behind), number + 1)
        rows = np.ascontiguousarray(split.transpose(order)).reshape(self.groups, ahead[0], prod(ahead[1:]), -1)
        # A separate product per step, so that its bits don't depend on the number of steps.
        y = np.matmul(rows, self._matrices[:, None]).transpose(1, 2, 0, 3).reshape(*ahead, self.filters)
        return y if self.bias is None else y + self.bias

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        x = run.inputs[0].x
        sequence = x if x.ndim == 3 else x[:, None]
        wide = self._padded(sequence, 0.0)
        counts = [sequence.shape[1] and self._count(0, sequence.shape[1]), *self.grid_out]
        dy = dy.reshape(len(x), *counts, self.groups, -1)
        dwide = np.zeros_like(wide)
        for tap, places in self._taps(counts):
            kernel = self.kernel[tap].reshape(-1, self.groups, self.filters // self.groups)  # [C/groups, groups, …]
            # Windows overlap, but one entry of the windows takes each place at most once.
            dwide[places] += np.einsum("...gf,cgf->...gc", dy, kernel).reshape(*dy.shape[:-2], -1)
        inner = [(n - 1) * s + 1 for n, s in zip((sequence.shape[1], *self.grid), self.spread, strict=True)]
        return [dwide[self._places(inner, self.padding)].reshape(x.shape)]

    def engine(self, dtype: np.dtype[Any]) -> str:
        kernel = f"fused kernel ({native.isa()}, {dtype}): a product per window"
        return kernel if self.groups == 1 else f"NumPy ({dtype}): groups"

    @classmethod
    def keys(cls) -> Types:
        return {"kernel_shape": list, "use_bias": bool, **cls.settings()}

    @classmethod
    def array_shapes(cls, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        shape = lengths_of("kernel_shape", "it", values["kernel_shape"], len(values["kernel_shape"]))
        return {"kernel": shape, **({"bias": shape[-1:]} if values["use_bias"] else {})}

    def values(self) -> dict[str, Any]:
        own = {"kernel_shape": list(self.kernel.shape), "use_bias": self.bias is not None}
        return own | {name: getattr(self, name) for name in self.settings()}

    @property
    def multiplications(self) -> int:
        return self.kernel.size * prod(self.grid_out)

    @property
    def summary(self) -> str:
        grids = f"{sizes_text((*self.grid, self.channels))} -> {sizes_text((*self.grid_out, self.filters))}"
        words = [grids, f"window {sizes_text(self.sizes)}", *self._words]
        return ", ".join([*words, *([f"groups {self.groups}"] if self.groups > 1 else [])])


@dataclass(frozen=True, eq=False)
class GridPool(Grid):
    """The mean or the maximum of each window of time and a grid, per channel: `[B, T, G1·…·C]` to `[B, T', G1'·…·C]`.

    Args:
        mode: `"mean"` or `"max"`.
        grid: the lengths of the grid of a step.
        channels: the number of channels.
        size: the lengths of a window, for time and each axis of the grid.
        strides: the distance between windows; None: `size`.
        padding: entries before and after time and each axis of the grid, as pairs; None: no padding.
        dilation: the distance between the entries of a window; None: 1.
        counts: whether a mean counts padding as zeros; otherwise padding is ignored.

    Raises:
        ShapeError: a window that is larger than the grid.
        TypeError: a flag that isn't a bool.
        ValueError: an unknown mode, an invalid setting, or a padding that isn't less than the window.

    >>> GridPool("max", (4,), 1, (1, 2)).apply(np.array([[[1.0, 3.0, 2.0, 0.0]]]))
    array([[[3., 2.]]])
    """

    mode: str
    grid: Lengths
    channels: int
    size: Lengths
    strides: Any = None
    padding: Any = None
    dilation: Any = None
    counts: bool = False
    file_type = "grid_pool"

    def __post_init__(self) -> None:
        owner = "GridPool"
        check_choice(owner, "mode", self.mode, WINDOW_MODES)
        if not isinstance(self.grid, Sequence) or isinstance(self.grid, str) or not 1 <= len(self.grid) <= MOST_AXES:
            raise ValueError(f"{owner}: expected grid to be 1 to {MOST_AXES} integers, got {self.grid!r:.80}")
        number = len(self.grid)
        object.__setattr__(self, "grid", lengths_of(owner, "grid", self.grid, number))
        object.__setattr__(self, "channels", check_integer(owner, "channels", self.channels))
        object.__setattr__(self, "size", lengths_of(owner, "size", self.size, number + 1))
        strides = self.size if self.strides is None else self.strides
        object.__setattr__(self, "strides", lengths_of(owner, "strides", strides, number + 1))
        object.__setattr__(self, "dilation", lengths_of(owner, "dilation", self.dilation, number + 1))
        object.__setattr__(self, "padding", pads_of(owner, self.padding, number + 1))
        check_flag(owner, "counts", self.counts)
        if any(max(pair) >= span for pair, span in zip(self.padding, self.spans, strict=True)):
            raise ValueError(f"{owner}: expected padding less than a window {self.spans}, got {self.padding}")
        self._prepare(owner)

    @property
    def spread(self) -> Lengths:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The input isn't spread."""
        return (1,) * len(self.size)

    @property
    def filters(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of channels of the output."""
        return self.channels

    @property
    def sizes(self) -> Lengths:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of entries of a window along each axis."""
        return self.size

    @property
    def nothing(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The value of padding."""
        return float("-inf") if self.mode == "max" else 0.0

    def _used(self, steps: int, counts: Sequence[int]) -> Array:
        """Return how many entries of each window the mean is over, `[1, T', …, 1]`."""
        if self.mode == "mean" and self.counts:
            return np.full((1,) * (len(counts) + 2), prod(self.size))
        alone = replace(self, channels=1)
        there = alone._padded(np.ones((1, steps, prod(self.grid))), 0.0)
        return sum((there[places] for _, places in self._taps(counts)), np.zeros((1, *counts, 1)))

    def over(self, wide: Array) -> Array:
        """Return `[B, T', …, C]` for a padded input."""
        counts = self._windows(wide).shape[1 : 1 + len(self.size)]
        shape = (len(wide), *counts, self.channels)
        largest = self.mode == "max"
        y = np.full(shape, self.nothing, wide.dtype if largest else np.float64)
        for _, places in self._taps(counts):
            y = np.maximum(y, wide[places]) if largest else y + wide[places]
        return y

    def apply(self, x: Array) -> Array:
        """Return `[B, T', W']` for `x [B, T, W]`, or a vector per row for a vector."""
        if x.ndim == 2:
            return self.apply(x[:, None])[:, 0]
        y = self.over(self._padded(x, self.nothing))
        used = self._used(x.shape[1], y.shape[1:-1])
        y = np.where(used > 0, y if self.mode == "max" else y / np.maximum(used, 1), 0.0)
        return y.astype(x.dtype).reshape(*y.shape[:2], prod(y.shape[2:]))

    def step_rule(self, *shapes: Shape) -> StepRule:
        rule = super().step_rule(*shapes)
        if rule.advance is None or self.mode == "max":
            return rule
        if not self.counts and any(self.padding[0]):
            return StepRule("it leaves padding out of the mean of its first windows, which a stream doesn't support")
        advance = rule.advance

        def mean(memory: Array, x: Array) -> tuple[Array, Array]:
            y, memory = advance(memory, x)
            return (y / prod(self.size)).astype(x.dtype), memory

        return rule._replace(advance=mean)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        x = run.inputs[0].x
        sequence = x if x.ndim == 3 else x[:, None]
        wide = self._padded(sequence, self.nothing)
        counts = [sequence.shape[1] and self._count(0, sequence.shape[1]), *self.grid_out]
        shape = (len(x), *counts, self.channels)
        dy, dwide = dy.reshape(shape), np.zeros_like(wide)
        if self.mode == "mean":
            share = dy / np.maximum(self._used(sequence.shape[1], counts), 1)
            for _, places in self._taps(counts):
                dwide[places] += share
        else:
            y, left = run.y.reshape(shape), np.ones(shape, bool)
            for _, places in self._taps(counts):
                first = left & (wide[places] == y)
                dwide[places] += np.where(first, dy, 0)
                left &= ~first
        return [dwide[self._places((sequence.shape[1], *self.grid), self.padding)].reshape(x.shape)]

    @property
    def summary(self) -> str:
        grids = f"{sizes_text((*self.grid, self.channels))} -> {sizes_text((*self.grid_out, self.channels))}"
        words = [self.mode, grids, f"window {sizes_text(self.size)}", *self._words]
        return ", ".join([*words, *(["padding counts"] if self.counts else [])])
