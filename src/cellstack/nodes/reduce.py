"""`Reduce`: a reduction along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.along import Along, check_axis
from cellstack.nodes.base import Array, CellState, Flow, NodeRun, Shape, StateGradients, StepRule, shown
from cellstack.nodes.checks import check_choice, check_flag

MODES = ("sum", "mean", "max", "min")


def reduced(mode: str, x: Array, axis: int, used: NDArray[np.bool_] | None = None) -> Array:
    """Return the sum, mean, maximum or minimum of `x` along an axis, over the used entries; 0 where none is used.

    Sums are computed in float64.

    Args:
        mode: one of `MODES`.
        x: any shape.
        axis: the axis, 0 or above.
        used: bool, broadcastable to the shape of `x`; None: all entries.
    """
    if mode in ("sum", "mean"):
        y = np.ascontiguousarray(x if used is None else np.where(used, x, 0.0)).astype(np.float64).sum(axis=axis)
        if mode == "mean":
            y /= max(x.shape[axis], 1) if used is None else np.maximum(np.broadcast_to(used, x.shape).sum(axis=axis), 1)
        return y.astype(x.dtype)
    nothing = -np.inf if mode == "max" else np.inf
    least = (np.max if mode == "max" else np.min)(
        x if used is None else np.where(used, x, nothing), axis, initial=nothing
    )
    some = x.shape[axis] > 0 if used is None else np.broadcast_to(used, x.shape).any(axis=axis)
    return np.where(some, least, 0.0).astype(x.dtype)


def reduction_gradient(mode: str, x: Array, used: Array | None, y: Array, dy: Array, axis: int) -> Array:
    """Return the gradient of a reduction's input; y and dy keep the axis, with length 1."""
    there = np.ones(x.shape, bool) if used is None else np.broadcast_to(used, x.shape)
    if mode in ("sum", "mean"):
        count = np.maximum(there.sum(axis=axis, keepdims=True), 1) if mode == "mean" else 1
        return np.where(there, dy / count, 0)
    same = there & (x == y)
    first = same & (np.cumsum(same, axis=axis) == 1)
    return np.where(first, dy, 0)


@dataclass(frozen=True, eq=False)
class Reduce(Along):
    """The sum, mean, maximum or minimum along one axis.

    Over time, masked steps are ignored, and a row without used steps gives zeros.

    Args:
        mode: `"sum"`, `"mean"`, `"max"` or `"min"`.
        axis: 1 is time, -1 the features; 0, the batch, isn't allowed.
        keepdims: keep the axis, with length 1.

    Raises:
        ValueError: an unknown mode, or an invalid axis.
        TypeError: a flag that isn't a bool.

    >>> Reduce("sum", 1).apply(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    array([[4., 6.]])
    """

    mode: str = "sum"
    axis: int = -1
    keepdims: bool = False
    file_type = "reduce"

    def __post_init__(self) -> None:
        check_choice("Reduce", "mode", self.mode, MODES)
        object.__setattr__(self, "axis", check_axis("Reduce", self.axis))
        check_flag("Reduce", "keepdims", self.keepdims)
        timed = self.axis == 1 or self.axis < -1  # whether the axis may be time
        object.__setattr__(self, "heeds_mask", timed)
        object.__setattr__(self, "mixes_steps", timed)
        object.__setattr__(self, "axes", (None, None) if self.keepdims else (2, 1))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        at = self.placed(owner, shape)
        if len(shape) == 1 and not self.keepdims:
            raise ShapeError(f"{owner}: Reduce of a vector requires keepdims=True, got {shown(shape)}")
        return (*shape[: at - 1], *([1] if self.keepdims else []), *shape[at:])

    def apply(self, x: Array, mask: NDArray[np.bool_] | None = None) -> Array:
        """Reduce an axis of `x [B, …]`; `mask [B, T]` matters only if that axis is time."""
        place = self.place(x.ndim - 1)
        used = None if mask is None or place != 1 else mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
        y = reduced(self.mode, x, place, used)
        return np.expand_dims(y, place) if self.keepdims else y

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        reset = flow.reset if self.keeps_steps(flow.x.ndim - 1) else None
        return Flow(self.apply(flow.x, flow.mask), self.mask_of(flows), reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        (flow,) = run.inputs
        place = self.place(flow.x.ndim - 1)
        used = None
        if flow.mask is not None and place == 1:
            used = flow.mask.reshape(*flow.mask.shape, *(1,) * (flow.x.ndim - 2))
        y, dy = (a if self.keepdims else np.expand_dims(a, place) for a in (run.y, dy))
        return [reduction_gradient(self.mode, flow.x, used, y, dy, place)]

    def keeps_steps(self, axes: int) -> bool:
        return self.place(axes) > 1 and (self.keepdims or axes > 2)

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.place(len(shapes[0])) != len(shapes[0]):
            return StepRule(f"the {self.mode} over time needs the whole sequence, which a stream doesn't have")
        if not self.keepdims:
            return StepRule("it combines all steps into one vector (keepdims=True avoids this)")
        return StepRule(step=replace(self, axis=-1).apply)

    @property
    def summary(self) -> str:
        return f"{self.mode} over axis {self.axis}{', keepdims' if self.keepdims else ''}"
