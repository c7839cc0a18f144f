"""Nodes over windows of steps or whole sequences: convolution, mostly in the kernel, and pooling, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cellstack import native
from cellstack.cells.errors import ShapeError
from cellstack.nodes.activations import activation_function, activation_gradient, check_activation, in_kernel
from cellstack.nodes.base import (
    Array,
    CellState,
    Flow,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
    Types,
    gradient_of_moves,
    padded,
)
from cellstack.nodes.checks import check_choice, check_integer, frozen_copy, one_dtype
from cellstack.nodes.reduce import reduced, reduction_gradient
from cellstack.nodes.windows import WINDOW_MODES, checked_padding, pads, steps_out, why_not_by_steps, windows

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks

POOL_MODES = ("mean", "max", "last")
FINAL = "final"  # the mode of a pool that a network merges into the recurrent node before it


@dataclass(frozen=True, eq=False)
class Conv1D(Node):
    """A convolution over time, `[B, T, C]` to `[B, T', F]`: each window of K steps times the kernel::

        y[t] = activation(sum over k of x[t·strides + k·dilation]·kernel[k] + bias)

    Args:
        kernel: `[K, C/groups, F]`, float32 or float64.
        bias: `[F]` of the same dtype, or None.
        strides: steps from window to window.
        padding: `"valid"`: none; `"same"`: zeros on both sides, so that T' = ceil(T / strides), with an odd one at the
            end; `"causal"`: zeros before, so that a window ends with its own step; or a pair, the number of zeros
            before and after.
        dilation: steps from one k to the next.
        groups: the number of equal blocks of input and output channels that are convolved separately.
        activation: see `Activation`.
        keeps_mask: whether a step of the output is used if the last step of its window is; otherwise all steps are
            used, as in Keras. The windows contain masked steps either way.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a wrong dtype.
        ValueError: groups that don't divide F, an unknown padding or activation, a number that isn't from 1 up;
            `keeps_mask` without causal windows.

    >>> Conv1D(np.ones((2, 1, 1)), padding="causal").apply(np.array([[[1.0], [2.0], [3.0]]])).ravel()
    array([1., 3., 5.])
    """

    kernel: Array
    bias: Array | None = None
    strides: int = 1
    padding: str | tuple[int, int] = "valid"
    dilation: int = 1
    groups: int = 1
    activation: str = "linear"
    keeps_mask: bool = False
    file_type = "conv1d"
    arrays: ClassVar = {"kernel": ("taps", "input_size", "units"), "bias": ("units",)}
    added = ("keeps_mask",)
    multiplied = ("kernel",)
    axes = (2, 2)

    def __post_init__(self) -> None:
        owner = "Conv1D"
        object.__setattr__(self, "kernel", frozen_copy(owner, "kernel", self.kernel, ("K", "C/groups", "F")))
        if self.bias is not None:
            object.__setattr__(self, "bias", frozen_copy(owner, "bias", self.bias, self.kernel.shape[2:]))
        object.__setattr__(self, "dtype", one_dtype(owner, {"kernel": self.kernel, "bias": self.bias}))
        for name in ("strides", "dilation", "groups"):
            object.__setattr__(self, name, check_integer(owner, name, getattr(self, name)))
        object.__setattr__(self, "padding", checked_padding(owner, self.padding, self.span, self.strides))
        if self.keeps_mask and pads(self.padding, self.span, self.span, 1) != (self.span - 1, 0):
            raise ValueError(f"{owner}: expected causal windows with keeps_mask, got {self.padding}")
        object.__setattr__(self, "activation", check_activation(owner, self.activation))
        if self.kernel.shape[2] % self.groups:
            raise ValueError(f"{owner}: expected groups to divide F={self.kernel.shape[2]}, got {self.groups}")
        object.__setattr__(self, "input_size", self.kernel.shape[1] * self.groups)
        mixes = self.span > 1 or self.strides > 1 or isinstance(self.padding, tuple)
        object.__setattr__(self, "mixes_steps", mixes)

    @property
    def span(self) -> int:
        """Length of a window in steps, with dilation."""
        return (self.kernel.shape[0] - 1) * self.dilation + 1

    @property
    def by_steps(self) -> bool:
        """Whether there is one output per step that depends only on past steps, so that a stream can run it."""
        return why_not_by_steps(self.padding, self.span, self.strides) is None

    @cached_property
    def _matrices(self) -> Array:
        """The kernel as a matrix `[K·C/groups, F/groups]` per group."""
        taps, channels, filters = self.kernel.shape
        split = self.kernel.reshape(taps, channels, self.groups, filters // self.groups).transpose(2, 0, 1, 3)
        matrices = np.ascontiguousarray(split).reshape(self.groups, taps * channels, filters // self.groups)
        matrices.setflags(write=False)
        return matrices

    @cached_property
    def _numpy_activation(self) -> Callable[[Array], Array] | None:
        """The activation as a NumPy function if the kernel doesn't implement it, else None."""
        return None if in_kernel(self.activation) else activation_function(self.activation)

    @cached_property
    def _packed(self) -> Any:
        """The convolution as a dense layer `[K·C, F]` in the layout of `native`, packed at the first use."""
        within = in_kernel(self.activation) or native.LINEAR
        return native.dense(self.kernel.reshape(-1, self.kernel.shape[2]), self.bias, within)

    @cached_property
    def _each_channel(self) -> Any:
        """The convolution of each channel by itself, with one filter, by the kernel; None if it is another one."""
        taps, channels, filters = self.kernel.shape
        if channels > 1 or filters > self.groups or self.strides > 1:
            return None
        within = in_kernel(self.activation) or native.LINEAR
        return native.Convolution(taps, filters, self.dilation, self.kernel, self.bias, *within)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, *shapes)
        return steps_out(steps, self.padding, self.span, self.strides), self.kernel.shape[2]

    def apply(self, x: Array) -> Array:
        """Return `[B, T', F]` for `x [B, T, C]`."""
        batch, steps, channels = x.shape
        before, after = pads(self.padding, steps, self.span, self.strides)
        if before or after:
            wide = np.zeros((batch, before + steps + after, channels), x.dtype)
            wide[:, before : before + steps] = x
            x = wide
        return self.convolve(x)

    def convolve(self, x: Array) -> Array:
        """Return `[B, T', F]` for a padded `x [B, T, C]`."""
        batch, steps, _ = x.shape
        count, (taps, channels, filters) = windows(steps, self.span, self.strides), self.kernel.shape
        if not count or not batch:
            return np.zeros((batch, count, filters), x.dtype)
        if self.dilation == self.groups == 1:  # each window is K·C contiguous numbers: a dense layer over them
            x = native.plain(x)
            y = np.empty((batch, count, filters), x.dtype)
            rows = native.Sequences(batch, count, x, steps * channels, self.strides * channels)
            native.forward(rows, [native.Layer(self._packed, y=y)], 1)
            return y if self._numpy_activation is None else self._numpy_activation(y)
        if self._each_channel is not None:
            y = native.on_rows(self._each_channel.run, x)
            return y if self._numpy_activation is None else self._numpy_activation(y)
        view = sliding_window_view(x, self.span, axis=1)[:, :: self.strides, :, :: self.dilation]  # [B, T', C, K]
        view = view.reshape(batch, count, self.groups, channels, taps)
        if self.by_steps:  # a separate product per window, so that its bits don't depend on the number of windows
            rows = np.ascontiguousarray(view.transpose(0, 1, 2, 4, 3)).reshape(batch, count, self.groups, 1, -1)
            y = np.matmul(rows, self._matrices).reshape(batch, count, filters)
        else:  # a separate product per row, so that its bits don't depend on the other rows
            rows = np.ascontiguousarray(view.transpose(0, 2, 1, 4, 3)).reshape(batch, self.groups, count, -1)
            y = np.matmul(rows, self._matrices).transpose(0, 2, 1, 3).reshape(batch, count, filters)
        return self._finished(y)

    def _finished(self, y: Array) -> Array:
        """Return the output for the products `y`, which it may overwrite."""
        if self.bias is not None:
            y += self.bias
        return y if self.activation == "linear" else activation_function(self.activation)(y)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        x, (taps, channels, filters) = run.inputs[0].x, self.kernel.shape
        before, after = pads(self.padding, x.shape[1], self.span, self.strides)
        wide = padded(x, before, after, 0.0)
        count, each = run.y.shape[1], filters // self.groups
        starts = np.arange(count) * self.strides
        whole = (
            self
            if self.activation == "linear"
            else Conv1D(self.kernel, self.bias, self.strides, self.padding, self.dilation, self.groups)
        )
        dz = dy if self.activation == "linear" else activation_gradient(self.activation, whole.apply(x), dy)
        dwide = np.zeros_like(wide)
        for tap in range(taps):
            for group in range(self.groups):
                kernel = self.kernel[tap][:, group * each : (group + 1) * each]
                part = dz[:, :, group * each : (group + 1) * each] @ kernel.T
                # Windows overlap, but not within one tap: its steps are distinct.
                dwide[:, starts + tap * self.dilation, group * channels : (group + 1) * channels] += part
        return [dwide[:, before : before + x.shape[1]]]

    def engine(self, dtype: np.dtype[Any]) -> str:
        after = f", {self.activation} in NumPy" if self._numpy_activation else ""
        if self.dilation == self.groups == 1:
            return f"fused kernel ({native.isa()}, {dtype}): a product per window{after}"
        if self._each_channel is not None:
            return f"fused kernel ({native.isa()}, {dtype}): each feature by itself{after}"
        return f"NumPy ({dtype}): dilation or groups"

    def keeps_steps(self, axes: int) -> bool:
        return not self.mixes_steps

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        mask = masks[0] if self.keeps_mask else None
        return mask if mask is None or self.strides == 1 else on.cut(mask, slice(None, None, self.strides))

    def step_rule(self, *shapes: Shape) -> StepRule:
        why_not = why_not_by_steps(self.padding, self.span, self.strides)
        if why_not is not None:
            return StepRule(why_not)
        if self.span == 1:
            return StepRule(step=lambda x: self.convolve(x[:, None])[:, 0] if x.ndim == 2 else self.convolve(x))
        assert self.input_size is not None

        def advance(memory: Array, x: Array) -> tuple[Array, Array]:
            seen = np.concatenate([memory, x], axis=1)
            return self.convolve(seen), seen[:, x.shape[1] :]

        return StepRule(memory=(self.span - 1, self.input_size), advance=advance)

    @classmethod
    def array_shapes(cls, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        groups, channels = values["groups"], values["input_size"]
        if groups < 1 or channels % groups:
            raise ValueError(f"expected groups to divide input_size {channels}, found {groups!r:.80}")
        return super().array_shapes({**values, "input_size": channels // groups})

    def values(self) -> dict[str, Any]:
        return {**super().values(), "input_size": self.input_size}

    @property
    def summary(self) -> str:
        taps, channels, filters = self.kernel.shape
        words = [f"{channels * self.groups} -> {filters}, {taps} taps", str(self.padding)]
        words += [
            f"{name} {getattr(self, name)}" for name in ("strides", "dilation", "groups") if getattr(self, name) > 1
        ]
        return ", ".join([*words, *([] if self.activation == "linear" else [self.activation])])


@dataclass(frozen=True, eq=False)
class Pool1D(Node):
    """The mean or the maximum of each window of steps, `[B, T, W]` to `[B, T', W]`.

    Args:
        mode: `"mean"` or `"max"`.
        size: steps in a window.
        strides: steps from window to window; None: `size`.
        padding: as for `Conv1D`; padding steps are ignored, and a window of padding only gives zeros.

    Raises:
        ValueError: an unknown mode or padding, a number that isn't from 1 up.

    >>> Pool1D("max", 2).apply(np.array([[[1.0], [4.0], [3.0], [2.0]]])).ravel()
    array([4., 3.])
    >>> Pool1D("mean", 2, 1, "causal").apply(np.array([[[1.0], [4.0], [3.0]]])).ravel()
    array([1. , 2.5, 3.5])
    """

    mode: str
    size: int
    strides: int | None = None
    padding: str | tuple[int, int] = "valid"
    file_type = "pool1d"
    about = "{0.mode} of {0.size} steps every {0.strides}, {0.padding}"
    axes = (2, 2)
    keeps_width = True
    mixes_steps = True

    def __post_init__(self) -> None:
        check_choice("Pool1D", "mode", self.mode, WINDOW_MODES)
        object.__setattr__(self, "size", check_integer("Pool1D", "size", self.size))
        strides = self.size if self.strides is None else self.strides
        object.__setattr__(self, "strides", check_integer("Pool1D", "strides", strides))
        padding = checked_padding("Pool1D", self.padding, self.size, self.strides or 1)
        object.__setattr__(self, "padding", padding)

    @classmethod
    def settings(cls) -> Types:
        return {**super().settings(), "strides": int}  # a file has their number

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, width = super().check(owner, *shapes)
        return steps_out(steps, self.padding, self.size, self.strides or 1), width

    def apply(self, x: Array) -> Array:
        """Return `[B, T', W]` for `x [B, T, W]`."""
        assert self.strides is not None
        batch, steps, width = x.shape
        before, after = pads(self.padding, steps, self.size, self.strides)
        count = windows(before + steps + after, self.size, self.strides)
        if not count or not batch:
            return np.zeros((batch, count, width), x.dtype)
        x = padded(x, before, after, 0.0 if self.mode == "mean" else -np.inf)
        first = np.arange(count) * self.strides - before
        counts = np.minimum(first + self.size, steps) - np.maximum(first, 0)
        return self._pool(x, np.maximum(counts, 0)[None, :, None])

    def _pool(self, x: Array, counts: Array) -> Array:
        """Pool a padded `x [B, T, W]`; `counts [B or 1, T', 1]` are the numbers of steps in each window."""
        view = sliding_window_view(x, self.size, axis=1)[:, :: self.strides]  # [B, T', W, size]
        if self.mode == "max":
            return np.where(counts > 0, view.max(axis=-1), x.dtype.type(0))
        if why_not_by_steps(self.padding, self.size, self.strides or 1):
            total = view.sum(axis=-1, dtype=np.float64)
        else:  # in a fixed order of summation, so that the bits don't depend on the number of windows
            total = reduce(np.add, (view[..., k].astype(np.float64) for k in range(self.size)))
        return (total / np.maximum(counts, 1)).astype(x.dtype)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        x, strides = run.inputs[0].x, self.strides or 1
        steps = x.shape[1]
        before, _ = pads(self.padding, steps, self.size, strides)
        first = np.arange(run.y.shape[1]) * strides - before
        counts = np.maximum(np.minimum(first + self.size, steps) - np.maximum(first, 0), 1)
        dx = np.zeros_like(x)
        taken = np.zeros(run.y.shape, bool)  # of several maxima, the first
        for tap in range(self.size):
            inside = (first + tap >= 0) & (first + tap < steps)
            at = (first + tap)[inside]
            if self.mode == "mean":
                dx[:, at] += dy[:, inside] / counts[inside, None]
            else:
                is_maximum = (x[:, at] == run.y[:, inside]) & ~taken[:, inside]
                taken[:, inside] |= is_maximum
                dx[:, at] += np.where(is_maximum, dy[:, inside], 0)
        return [dx]

    def keeps_steps(self, axes: int) -> bool:
        return False

    def step_rule(self, *shapes: Shape) -> StepRule:
        """See `Node.step_rule`; each step in the memory has an extra number: 1, or 0 before the first step."""
        width = shapes[0][-1]
        if why_not_by_steps(self.padding, self.size, self.strides or 1):
            return StepRule(
                f"the {self.mode} of {self.size} steps needs padding='causal' and strides=1 for an output per step"
            )
        if self.size == 1:
            return StepRule(step=lambda x: x)
        if width is None:
            return StepRule("it has a memory of past steps, whose width isn't known")

        def advance(memory: Array, x: Array) -> tuple[Array, Array]:
            if not x.shape[1]:
                return x, memory
            there = np.ones((*x.shape[:2], 1), x.dtype)
            seen = np.concatenate([memory, np.concatenate([x, there], axis=2)], axis=1)
            steps, used = seen[:, :, :-1], seen[:, :, -1:]
            counts = sliding_window_view(used, self.size, axis=1).sum(axis=-1)  # [B, T, 1]
            if self.mode == "max":
                steps = np.where(used > 0, steps, -np.inf).astype(x.dtype)
            return self._pool(steps, counts), seen[:, x.shape[1] :]

        return StepRule(memory=(self.size - 1, width + 1), advance=advance)


@dataclass(frozen=True, eq=False)
class GlobalPool(Node):
    """`[B, T, W]` to `[B, W]`: the mean, the maximum or the last of the steps that the mask uses.

    A row without such a step gives zeros. `"last"` after a `Bidirectional` isn't its final states: at the last step the
    backward direction has read that step only.

    Args:
        mode: `"mean"`, `"max"` or `"last"`; `"final"` for the final states of the recurrent node directly before it in
            a chain. A `Network` doesn't keep it as a node, but gives that node `return_sequences=False`.

    Raises:
        ValueError: an unknown mode.
    """

    mode: str = "mean"
    file_type = "pool"
    about = "{0.mode} over time"
    axes = (2, 1)
    keeps_width = True
    heeds_mask = True

    def __post_init__(self) -> None:
        check_choice("GlobalPool", "mode", self.mode, (*POOL_MODES, FINAL))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        if self.mode == FINAL:
            raise ShapeError(
                f'{owner}: GlobalPool("final") must directly follow a Recurrent or Bidirectional in a chain; '
                "in a graph, give that node return_sequences=False instead"
            )
        return super().check(owner, *shapes)[1:]

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        x, mask = flow.x, flow.mask
        if self.mode != "last":
            return Flow(reduced(self.mode, x, 1, None if mask is None else mask[:, :, None]))
        if x.shape[1] == 0:
            return Flow(np.zeros((x.shape[0], x.shape[2]), x.dtype))
        if mask is None:
            return Flow(x[:, -1].copy())
        last = x.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)  # [B]
        some = np.any(mask, axis=1, keepdims=True)
        return Flow(np.where(some, x[np.arange(len(x)), last], x.dtype.type(0)))

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        (flow,) = run.inputs
        if self.mode == "last":
            return gradient_of_moves(self, run, dy)
        used = None if flow.mask is None else flow.mask[:, :, None]
        return [reduction_gradient(self.mode, flow.x, used, run.y[:, None], dy[:, None], 1)]

    def keeps_steps(self, axes: int) -> bool:
        return False

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.mode == "last":
            return StepRule(step=lambda x: x)
        return StepRule(f"the {self.mode} over time needs the whole sequence, which a stream doesn't have")
