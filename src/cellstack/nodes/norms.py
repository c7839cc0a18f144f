"""Nodes that normalise: `LayerNorm`, `RMSNorm`, and `GroupNorm` over groups of features, per step or over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import Array, CellState, Flow, Node, NodeRun, Shape, StateGradients, StepRule, Stepwise
from cellstack.nodes.checks import check_flag, check_integer, check_number, frozen_copy, one_dtype

Steps = NDArray[np.bool_] | None


class _Norm(Node):
    """What all norms share; `centred`: whether the mean is subtracted first."""

    arrays: ClassVar = {"gain": ("input_size",), "bias": ("input_size",)}
    multiplied = ("gain",)
    keeps_width = True
    groups: int
    over_time: bool
    centred: ClassVar[bool]
    gain: Array | None
    bias: Array | None
    epsilon: float

    def __post_init__(self) -> None:
        owner, width = type(self).__name__, ("W",)
        for name in ("gain", "bias"):
            if getattr(self, name) is not None:
                array = frozen_copy(owner, name, getattr(self, name), width)
                width = array.shape
                object.__setattr__(self, name, array)
        object.__setattr__(self, "epsilon", check_number(owner, "epsilon", self.epsilon, above=0.0))
        if width != ("W",):
            object.__setattr__(self, "dtype", one_dtype(owner, {"gain": self.gain, "bias": self.bias}))
            object.__setattr__(self, "input_size", width[0])

    @cached_property
    def _kernel(self) -> native.Norm:
        """The kernel's object, for a norm of each step."""
        return native.Norm(self.groups, self.centred, self.epsilon, self.gain, self.bias)

    def apply(self, x: Array) -> Array:
        """Return `x [..., W]` normalised over its last axis."""
        return native.on_rows(self._kernel.run, x)

    def _grouped(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        """See `Node.gradients`; for a norm of each step."""
        x = run.inputs[0].x
        y = self._grouped(np.ascontiguousarray(x))
        if self.centred:
            y = y - np.add.reduce(y, axis=-1, keepdims=True) / y.dtype.type(y.shape[-1])
        squares = np.add.reduce(y * y, axis=-1, keepdims=True)
        deviation = np.sqrt(squares / x.dtype.type(y.shape[-1]) + x.dtype.type(self.epsilon))
        unit, du = y / deviation, self._grouped(dy if self.gain is None else dy * self.gain)
        dx = du - unit * (du * unit).mean(axis=-1, keepdims=True)
        if self.centred:
            dx -= du.mean(axis=-1, keepdims=True)
        return [(dx / deviation).reshape(x.shape)]

    def engine(self, dtype: np.dtype[Any]) -> str:
        return (
            super().engine(dtype) if self.over_time else f"fused kernel ({native.isa()}, {dtype}): each step by itself"
        )


@dataclass(frozen=True, eq=False)
class _StepNorm(_Norm, Stepwise):
    """A norm of each step's features."""

    gain: Array | None = None
    bias: Array | None = None
    epsilon: float = 1e-3
    groups = 1
    over_time = False

    about = "over the features, epsilon {0.epsilon:g}"


@dataclass(frozen=True, eq=False)
class LayerNorm(_StepNorm):
    """`(x - mean) / sqrt(variance + epsilon)·gain + bias`, with the mean and variance of each step's features.

    Args:
        gain: `[W]`, or None for ones.
        bias: `[W]` of the same dtype, or None for zeros.
        epsilon: above 0.

    Raises:
        ShapeError: the shapes aren't both `[W]`.
        TypeError: a dtype other than float32 and float64, or different dtypes.
        ValueError: an epsilon that isn't above 0.

    >>> LayerNorm().apply(np.array([[1.0, 3.0]])).round(2)
    array([[-1.,  1.]])

    Ref: Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 3 and 4.
    """

    file_type = "layer_norm"
    centred = True


@dataclass(frozen=True, eq=False)
class RMSNorm(_StepNorm):
    """`x / sqrt(mean of x² + epsilon)·gain + bias`, with the mean over each step's features.

    Args:
        gain: `[W]`, or None for ones.
        bias: `[W]` of the same dtype, or None for zeros.
        epsilon: above 0.

    Raises:
        ShapeError: the shapes aren't both `[W]`.
        TypeError: a dtype other than float32 and float64, or different dtypes.
        ValueError: an epsilon that isn't above 0.

    >>> RMSNorm().apply(np.array([[1.0, 7.0]])).round(2)
    array([[0.2, 1.4]])

    Ref: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """

    epsilon: float = 1e-6
    file_type = "rms_norm"
    centred = False


@dataclass(frozen=True, eq=False)
class GroupNorm(_Norm):
    """`(x - mean) / sqrt(variance + epsilon)·gain + bias`, with the mean and variance of each group of features.

    With `over_time`, those are of all used steps: with one group per feature this is instance normalisation, with one
    group global layer normalisation. Without, those are of each step, and the node is run step by step.

    Args:
        groups: the number of equal blocks of features.
        gain: `[W]`, or None for ones.
        bias: `[W]` of the same dtype, or None for zeros.
        epsilon: above 0.
        over_time: whether the mean and the variance are over time too.

    Raises:
        ShapeError: the shapes aren't both `[W]`, or groups that don't divide W.
        TypeError: a dtype other than float32 and float64, or different dtypes; a flag that isn't a bool.
        ValueError: groups that aren't from 1 up, or an epsilon that isn't above 0.

    >>> GroupNorm(2).apply(np.array([[[1.0, 5.0], [3.0, 5.0]]])).round(2)
    array([[[-1.,  0.],
            [ 1.,  0.]]])

    Ref: Wu and He 2018, "Group Normalization", eq. 1.
    """

    groups: int
    gain: Array | None = None
    bias: Array | None = None
    epsilon: float = 1e-5
    over_time: bool = True
    file_type = "group_norm"
    centred = True

    def __post_init__(self) -> None:
        owner = "GroupNorm"
        object.__setattr__(self, "groups", check_integer(owner, "groups", self.groups))
        super().__post_init__()
        check_flag(owner, "over_time", self.over_time)
        self._divides(owner, self.input_size)
        object.__setattr__(self, "mixes_steps", self.over_time)
        object.__setattr__(self, "heeds_mask", self.over_time)
        object.__setattr__(self, "axes", (2, 2) if self.over_time else (None, None))

    def _divides(self, owner: str, width: int | None) -> None:
        if width is not None and width % self.groups:
            raise ShapeError(f"{owner}: expected groups to divide W={width}, got {self.groups}")

    def check(self, owner: str, *shapes: Shape) -> Shape:
        shape = super().check(owner, *shapes)
        self._divides(owner, shape[-1])
        return shape

    def _parts(self, x: Array, mask: Steps) -> tuple[Array, Array, Array, Array]:
        """Return which entries of `[B, T, G, W/G]` count, their number, the deviation, and the normalised values."""
        z = self._grouped(np.ascontiguousarray(x))
        used = np.ones((*z.shape[:2], 1, 1), bool) if mask is None else mask[:, :, None, None]
        there = np.broadcast_to(used, z.shape)
        count = np.maximum(there.sum(axis=(1, 3), keepdims=True), 1)
        wide = z.astype(np.float64)  # sums over time are long
        centred = wide - np.where(there, wide, 0.0).sum(axis=(1, 3), keepdims=True) / count
        variance = np.where(there, centred * centred, 0.0).sum(axis=(1, 3), keepdims=True) / count
        deviation = np.sqrt(variance + self.epsilon)
        return there, count, deviation, centred / deviation

    def apply(self, x: Array, mask: Steps = None) -> Array:
        """Return `x [..., W]` normalised; over time, `x [B, T, W]`."""
        if not self.over_time:
            return super().apply(x)
        y = self._parts(x, mask)[3].astype(x.dtype).reshape(x.shape)
        if self.gain is not None:
            y *= self.gain
        return y if self.bias is None else y + self.bias

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        reset = None if self.over_time else flow.reset
        return Flow(self.apply(flow.x, flow.mask), flow.mask, reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        if not self.over_time:
            return super().gradients(run, dy, dstates)
        (flow,) = run.inputs
        du = self._grouped(dy if self.gain is None else dy * self.gain)
        there, count, deviation, unit = self._parts(flow.x, flow.mask)
        # Masked steps are normalised too, but the mean and the variance don't depend on them.
        mean = du.sum(axis=(1, 3), keepdims=True) / count
        slope = (du * unit).sum(axis=(1, 3), keepdims=True) / count
        return [((du - np.where(there, mean + unit * slope, 0.0)) / deviation).reshape(flow.x.shape)]

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.over_time:
            return StepRule("its mean and variance over time need the whole sequence, which a stream doesn't have")
        return StepRule(step=self.apply)

    @property
    def summary(self) -> str:
        over = "time and " if self.over_time else ""
        return f"over {over}{self.groups} group{'s' if self.groups > 1 else ''} of features, epsilon {self.epsilon:g}"
