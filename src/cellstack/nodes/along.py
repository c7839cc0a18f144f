"""Nodes that operate along one axis: slices, padding, and merging of several values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import (
    MOST_AXES,
    Array,
    CellState,
    Flow,
    GradientError,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
    gradient_of_moves,
    padded,
    shown,
)
from cellstack.nodes.checks import check_choice, check_integer, check_number

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks

MODES = ("concat", "add", "mul", "ave", "max", "sub", "min")
FUNCTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "mul": np.multiply,
    "ave": np.add,
    "max": np.maximum,
    "sub": np.subtract,
    "min": np.minimum,
}
NEUTRAL = {"mul": 1.0, "max": -np.inf, "min": np.inf}  # the value of masked steps; in other modes they keep theirs


def check_axis(owner: str, axis: Any) -> int:
    """Return `axis` as an int; `ValueError` unless it is an integer other than 0, the batch."""
    whole = isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
    if not whole or axis == 0 or abs(axis) > MOST_AXES:
        raise ValueError(f"{owner}: expected axis to be an integer other than 0, got {axis!r:.80}")
    return int(axis)


class Along(Node):
    """Base class of nodes that operate along one axis.

    Attributes:
        axis: the axis; 0 is the batch, -1 the last one.
    """

    axis: int

    def place(self, axes: int) -> int:
        """Return the positive index of the axis in a value with `axes` axes after the batch; 0 if it doesn't exist."""
        place = self.axis if self.axis > 0 else axes + 1 + self.axis
        return place if 1 <= place <= axes else 0

    def placed(self, owner: str, shape: Shape) -> int:
        """Return the `place` of the axis in a value of this shape; `ShapeError` if it doesn't exist."""
        at = self.place(len(shape))
        if not at:
            expected = f"expected a value with an axis {self.axis}"
            raise ShapeError(f"{owner}: {type(self).__name__} {expected}, got {shown(shape)}")
        return at

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return gradient_of_moves(self, run, dy)

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.place(len(shapes[0])) != len(shapes[0]):
            return StepRule(self.why_whole)
        alone: Any = self  # one step has no time axis: its features are the last axis
        return StepRule(step=replace(alone, axis=-1).apply)


@dataclass(frozen=True, eq=False)
class Select(Along):
    """A slice along one axis with Python's rules: `x[:, start:stop:step]` for axis 1.

    A slice of time also slices the mask. A negative step reverses the sequence.

    Args:
        start: as in a Python slice, or None.
        stop: as in a Python slice, or None.
        step: as in a Python slice, not 0.
        axis: 1 is time, -1 the features; 0, the batch, isn't allowed.

    Raises:
        ValueError: an invalid slice, or axis 0.

    >>> Select(-1, None).apply(np.arange(6).reshape(1, 3, 2))
    array([[[4, 5]]])
    """

    start: int | None = None
    stop: int | None = None
    step: int = 1
    axis: int = 1
    file_type = "select"
    shapes_only = True
    why_whole = "it selects steps of the whole sequence, which a stream doesn't have"

    def __post_init__(self) -> None:
        for name in ("start", "stop", "step", "axis"):
            value = getattr(self, name)
            none = value is None and name in ("start", "stop")
            if not none:
                if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
                    raise ValueError(f"Select: expected {name} to be an integer, got {value!r:.80}")
                object.__setattr__(self, name, int(value))
        if self.step == 0 or self.axis == 0:
            raise ValueError(f"Select: expected step and axis other than 0, got {self.step} and {self.axis}")
        object.__setattr__(self, "mixes_steps", self.step < 0)  # reversed, the pieces between resets have no first step

    @property
    def taken(self) -> slice:
        """The slice."""
        return slice(self.start, self.stop, self.step)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        at = self.placed(owner, shape)
        length = shape[at - 1]
        left = None if length is None else len(range(*self.taken.indices(length)))
        if left == 0 and length and at == len(shape):
            raise ShapeError(f"{owner}: Select expected to take at least one of {length} features, got none")
        return (*shape[: at - 1], left, *shape[at:])

    def apply(self, x: Array) -> Array:
        """Return the slice of `x [B, …]`."""
        place = self.place(x.ndim - 1)
        y = x[(slice(None),) * place + (self.taken,)]
        # The rounding of the next node may depend on the layout.
        return np.ascontiguousarray(y) if place == x.ndim - 1 else y

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        x, reset = flow.x, flow.reset
        if reset is not None and self.place(x.ndim - 1) == 1:
            reset = self._begun(reset)
        return Flow(self.apply(x), self.mask_of(flows), reset)

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        (mask,) = masks
        return mask if mask is None or self.place(axes) != 1 else on.cut(mask, self.taken)

    def _begun(self, reset: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the resets of the selected steps: a reset at a dropped step moves to the next selected one."""
        begun = np.cumsum(reset, axis=1)[:, self.taken]
        return np.diff(begun, axis=1, prepend=0) > 0

    @property
    def summary(self) -> str:
        first, last = ("" if end is None else str(end) for end in (self.start, self.stop))
        step = "" if self.step == 1 else f":{self.step}"
        return f"{first}:{last}{step} of axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Pad(Along):
    """Pad an axis with a constant, by default time with steps of zeros.

    Padding of time drops the mask and the resets, as in a convolution.

    Args:
        before: the number of entries before.
        after: the number of entries after.
        value: their value.
        axis: 1 is time, -1 the features; 0, the batch, isn't allowed.

    Raises:
        ValueError: a number below 0, a value that isn't finite, or axis 0.

    >>> Pad(1, 0).apply(np.array([[[1.0, 2.0]]]))
    array([[[0., 0.],
            [1., 2.]]])
    """

    before: int
    after: int
    value: float = 0.0
    axis: int = 1
    file_type = "pad"
    about = "{0.before} before and {0.after} after axis {0.axis}, of {0.value:g}"
    why_whole = "it adds steps before or after the sequence, and a stream has one output per step"

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            object.__setattr__(self, name, check_integer("Pad", name, getattr(self, name), least=0))
        object.__setattr__(self, "value", check_number("Pad", "value", self.value))
        object.__setattr__(self, "axis", check_axis("Pad", self.axis))
        object.__setattr__(self, "keeps_width", self.axis == 1)
        object.__setattr__(self, "mixes_steps", self.axis == 1 or self.axis < -1)  # the axis may be time

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        at = self.placed(owner, shape)
        length = shape[at - 1]
        return (*shape[: at - 1], None if length is None else self.before + length + self.after, *shape[at:])

    def apply(self, x: Array) -> Array:
        """Return `x [B, …]` padded."""
        place = self.place(x.ndim - 1)
        return padded(x, self.before, self.after, self.value, place)

    def keeps_steps(self, axes: int) -> bool:
        return self.place(axes) != 1


@dataclass(frozen=True, eq=False)
class Merge(Along):
    """Concatenate several values, or combine them elementwise.

    Masks follow Keras 3. Concatenation along time concatenates the masks; otherwise a step is used if any of the values
    uses it, and a value without a mask uses all steps. With `"mul"`, `"max"` and `"min"`, values are ignored at steps
    that their own masks exclude.

    Args:
        mode: `"concat"`, `"add"`, `"mul"`, `"ave"` (the mean), `"max"`, `"min"`, or `"sub"` (the first minus the
            second).
        axis: the axis of a concatenation; 1 is time, -1 the features; 0, the batch, isn't allowed.

    Raises:
        ValueError: an unknown mode, or an invalid axis.
    """

    mode: str = "concat"
    axis: int = -1
    file_type = "merge"
    inputs = None
    checks_late = True

    def __post_init__(self) -> None:
        check_choice("Merge", "mode", self.mode, MODES)
        object.__setattr__(self, "heeds_mask", self.mode in NEUTRAL)
        object.__setattr__(self, "axis", check_axis("Merge", self.axis))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        if len(shapes) < 2 or (self.mode == "sub" and len(shapes) != 2):
            expected = "two values" if self.mode == "sub" else "at least two values"
            raise ShapeError(f"{owner}: Merge expected {expected} to {self.mode}, got {len(shapes)}")
        first = shapes[0]

        def text() -> str:  # only for messages: this runs in every call
            return " and ".join(map(shown, shapes))

        at = self.place(len(first))
        if len({len(shape) for shape in shapes}) > 1:
            raise ShapeError(f"{owner}: Merge expected values with the same number of axes, got {text()}")
        if not at and self.mode == "concat":
            raise ShapeError(f"{owner}: Merge expected values with an axis {self.axis}, got {text()}")
        merged = []
        for number, lengths in enumerate(zip(*shapes, strict=True), start=1):
            known = {length for length in lengths if length is not None}
            if self.mode == "concat" and number == at:
                merged.append(
                    None if None in lengths else sum(known_length for known_length in lengths if known_length)
                )
                continue
            longer = known - {1} if self.mode != "concat" else known
            if len(longer) > 1:
                raise ShapeError(f"{owner}: Merge expected values of compatible shapes to {self.mode}, got {text()}")
            unknown = None in lengths and not longer
            merged.append(None if unknown else (longer or known).pop())
        return tuple(merged)

    def merge(self, *values: Array) -> Array:
        """Return the values merged; all of the same rank."""
        if self.mode == "concat":
            return np.concatenate(values, axis=self.place(values[0].ndim - 1))
        function = FUNCTIONS[self.mode]
        y = function(values[0], values[1])
        for value in values[2:]:
            y = function(y, value)
        return y / y.dtype.type(len(values)) if self.mode == "ave" else y

    @property
    def neutral(self) -> float | None:
        """The value that replaces masked steps; None: they keep their values."""
        return NEUTRAL.get(self.mode)

    def _merge_used(self, flows: Sequence[Flow], neutral: float) -> Array:
        """Merge the values, ignoring the masked steps of each."""
        nothing = flows[0].x.dtype.type(neutral)
        used = [None if flow.mask is None else flow.mask[..., None] for flow in flows]
        y = self.merge(
            *(flow.x if one is None else np.where(one, flow.x, nothing) for flow, one in zip(flows, used, strict=True))
        )
        masks = [one for one in used if one is not None]
        if len(masks) < len(flows):
            return y
        unused = y.dtype.type(0) if self.mode == "mul" else flows[0].x
        return np.where(reduce(np.logical_or, masks), y, unused)

    def _along_time(self, axes: int) -> bool:
        return self.mode == "concat" and axes > 1 and self.place(axes) == 1

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        values = [flow.x for flow in flows]
        y = self.merge(*values) if self.neutral is None else self._merge_used(flows, self.neutral)
        resets = [flow.reset for flow in flows]
        if all(reset is None for reset in resets):
            return Flow(y, self.mask_of(flows))
        full = [
            np.zeros(x.shape[:2], bool) if reset is None else reset for reset, x in zip(resets, values, strict=True)
        ]
        along_time = self._along_time(y.ndim - 1)
        return Flow(y, self.mask_of(flows), np.concatenate(full, 1) if along_time else reduce(np.logical_or, full))

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        values = [flow.x for flow in run.inputs]
        if self.mode == "concat":
            place = self.place(run.y.ndim - 1)
            return np.split(dy, np.cumsum([value.shape[place] for value in values])[:-1], axis=place)
        if self.heeds_mask and any(flow.mask is not None for flow in run.inputs):
            raise GradientError(f"{self.mode} under a mask isn't supported")
        if self.mode in ("add", "ave"):
            gradients = [dy / (len(values) if self.mode == "ave" else 1)] * len(values)
        elif self.mode == "sub":
            gradients = [dy, -dy]
        elif self.mode == "mul":
            products = [[*values[:n], *values[n + 1 :]] for n in range(len(values))]
            gradients = [dy * np.prod(np.broadcast_arrays(*others), axis=0) for others in products]
        else:
            taken, gradients = np.zeros(run.y.shape, bool), []
            for value in values:
                chosen = (value == run.y) & ~taken  # of several that are equal, the first
                taken |= chosen
                gradients.append(np.where(chosen, dy, 0))
        return [_summed_to(one, value.shape) for one, value in zip(gradients, values, strict=True)]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        there = [mask for mask in masks if mask is not None]
        if self._along_time(axes):
            return on.join(masks) if there else None
        return on.either(there) if len(there) == len(masks) else None

    def step_rule(self, *shapes: Shape) -> StepRule:
        if self.mode != "concat" or self.place(len(shapes[0])) == len(shapes[0]):
            return StepRule(step=replace(self, axis=-1).merge)
        return StepRule("it concatenates whole sequences, which a stream doesn't have")

    @property
    def summary(self) -> str:
        return f"concat along axis {self.axis}" if self.mode == "concat" else self.mode


def _summed_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over the axes along which its value was broadcast."""
    axes = tuple(axis for axis, (long, short) in enumerate(zip(gradient.shape, shape, strict=True)) if long != short)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient
