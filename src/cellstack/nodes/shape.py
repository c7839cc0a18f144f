"""Nodes that change the shape of values, or repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import (
    MOST_AXES,
    Array,
    CellState,
    Flow,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
    gradient_of_moves,
    shown,
)
from cellstack.nodes.checks import check_integer

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks

WHOLE_SEQUENCE = "it changes the shape of the whole sequence, which a stream doesn't have"


class _Shaping(Node):
    """Base class of nodes that change the shape of a whole value and drop its mask and resets."""

    shapes_only = True
    why_whole = WHOLE_SEQUENCE

    def keeps_steps(self, axes: int) -> bool:
        return False

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return gradient_of_moves(self, run, dy)


@dataclass(frozen=True, eq=False)
class Flatten(_Shaping):
    """`[B, …]` to `[B, W]`: flatten all axes except the batch in C order.

    >>> Flatten().apply(np.arange(4).reshape(1, 2, 2))
    array([[0, 1, 2, 3]])
    """

    file_type = "flatten"
    about = "to one axis"
    axes = (None, 1)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        return (_product(shape),)

    def apply(self, x: Array) -> Array:
        """Return `x [B, …]` as `[B, W]`."""
        return x.reshape(len(x), prod(x.shape[1:]))

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule(WHOLE_SEQUENCE) if len(shapes[0]) > 1 else StepRule(step=lambda x: x)


def _product(shape: Shape) -> int | None:
    """Return the number of values in a row; None if it isn't known."""
    return None if None in shape else prod(axis for axis in shape if axis is not None)


@dataclass(frozen=True, eq=False)
class Reshape(_Shaping):
    """`[B, …]` to `[B, *shape]`, in C order.

    Args:
        shape: the lengths of the axes after the batch, each from 1 up; one may be -1, to be inferred.

    Raises:
        ValueError: an invalid shape.

    >>> Reshape((-1, 2)).apply(np.arange(4).reshape(1, 4))
    array([[[0, 1],
            [2, 3]]])
    """

    shape: tuple[int, ...]
    file_type = "reshape"
    checks_late = True

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, Sequence) and not isinstance(self.shape, str) else ()
        free = [axis for axis in shape if isinstance(axis, (int, np.integer)) and axis == -1]
        if not 1 <= len(shape) <= MOST_AXES or len(free) > 1:
            raise ValueError(f"Reshape: expected shape to be lengths, at most one of them -1, got {self.shape!r:.80}")
        shape = tuple(-1 if axis in free else check_integer("Reshape", "every axis", axis) for axis in shape)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axes", (None, len(shape)))
        object.__setattr__(self, "mixes_steps", len(shape) > 1)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        numbers, rest = _product(shape), prod(axis for axis in self.shape if axis != -1)
        if numbers is not None and (numbers % rest if -1 in self.shape else numbers != rest):
            raise ShapeError(f"{owner}: can't reshape {shown(shape)} to {shown(self.shape)}: the sizes don't match")
        free = None if numbers is None else numbers // rest
        return tuple(free if axis == -1 else axis for axis in self.shape)

    def apply(self, x: Array) -> Array:
        """Return `x [B, …]` as `[B, *shape]`."""
        rest = prod(axis for axis in self.shape if axis != -1)
        free = prod(x.shape[1:]) // rest  # NumPy can't infer it if the batch is empty
        return x.reshape(len(x), *(free if axis == -1 else axis for axis in self.shape))

    @property
    def summary(self) -> str:
        return f"to {shown(self.shape)}"


@dataclass(frozen=True, eq=False)
class Permute(_Shaping):
    """Permute the axes after the batch.

    Args:
        dims: for each output axis the input axis, counted from 1, as in Keras.

    Raises:
        ValueError: not a permutation.

    >>> Permute((2, 1)).apply(np.zeros((5, 7, 3))).shape
    (5, 3, 7)
    """

    dims: tuple[int, ...]
    file_type = "permute"
    mixes_steps = True

    def __post_init__(self) -> None:
        dims = tuple(self.dims) if isinstance(self.dims, Sequence) else ()
        whole = all(isinstance(axis, (int, np.integer)) and not isinstance(axis, bool) for axis in dims)
        if not 1 <= len(dims) <= MOST_AXES or not whole or sorted(dims) != list(range(1, len(dims) + 1)):
            raise ValueError(f"Permute: expected dims to be each axis once, counted from 1, got {self.dims!r:.80}")
        object.__setattr__(self, "dims", tuple(map(int, dims)))
        object.__setattr__(self, "axes", (len(dims), len(dims)))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != len(self.dims):
            raise ShapeError(f"{owner}: Permute expected {len(self.dims)} axes after the batch, got {shown(shape)}")
        return tuple(shape[axis - 1] for axis in self.dims)

    def apply(self, x: Array) -> Array:
        """Return `x [B, …]` with its axes in the order of `dims`."""
        return x.transpose(0, *self.dims)

    @property
    def summary(self) -> str:
        return f"axes {', '.join(map(str, self.dims))}"


@dataclass(frozen=True, eq=False)
class Repeat(_Shaping):
    """Repeat a vector at every step: `[B, W]` to `[B, times, W]`.

    Args:
        times: the number of steps, from 1 up.

    Raises:
        ValueError: an invalid number.

    >>> Repeat(2).apply(np.array([[1.0, 2.0]]))
    array([[[1., 2.],
            [1., 2.]]])
    """

    times: int
    file_type = "repeat"
    why_whole = "it returns {0.times} steps for every step"
    about = "{0.times} times"
    axes = (1, 2)
    shapes_only = False
    keeps_width = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", check_integer("Repeat", "times", self.times))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != 1:
            raise ShapeError(f"{owner}: Repeat expected a vector [B, W], got {shown(shape)}")
        return (self.times, shape[0])

    def apply(self, x: Array) -> Array:
        """Return `[B, times, W]` for `x [B, W]`."""
        return np.repeat(x[:, None], self.times, axis=1)


@dataclass(frozen=True, eq=False)
class RepeatLike(Node):
    """Repeat a vector at every step of a sequence: `[B, W]` and `[B, T, …]` to `[B, T, W]`.

    The values of the sequence aren't used; its mask and resets apply to the output.

    >>> x = np.array([[1.0, 2.0]])
    >>> RepeatLike().run([Flow(x), Flow(np.zeros((1, 3, 4)))], (), 1).x
    array([[[1., 2.],
            [1., 2.],
            [1., 2.]]])
    """

    file_type = "repeat_like"
    why_whole = "it repeats a vector of the whole sequence, which a stream doesn't have"
    about = "for each step of its second input"
    inputs = 2
    axes = (1, 2)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or len(shapes[0]) != 1 or len(shapes[1]) < 2:
            text = " and ".join(map(shown, shapes))
            raise ShapeError(f"{owner}: RepeatLike expected a vector [B, W] and a sequence [B, T, …], got {text}")
        return (shapes[1][0], shapes[0][0])

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        vector, like = flows
        return Flow(np.repeat(vector.x[:, None], like.x.shape[1], axis=1), like.mask, like.reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [dy.sum(axis=1), np.zeros_like(run.inputs[1].x)]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        return masks[1]
