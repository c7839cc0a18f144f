"""Nodes for the input stage of signal models: gathering by index, such as for mirrored edges, and magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.along import Along, check_axis
from cellstack.nodes.base import Array, NodeRun, Shape, StateGradients, Stepwise, shown
from cellstack.nodes.checks import check_integer, check_number


@dataclass(frozen=True, eq=False)
class Take(Along):
    """Gather entries along one axis by index, in any order and with repetitions.

    This can mirror the edges of a signal, `x[2], x[1], x[0], x[1], …`: see `of_padding`.

    Args:
        indices: the indices, from 0 up.
        axis: 1 is time, -1 the features; 0, the batch, isn't allowed.

    Raises:
        ValueError: no indices, one below 0, or axis 0.

    >>> Take((1, 0, 1)).apply(np.array([[3.0, 4.0]]))
    array([[4., 3., 4.]])
    """

    indices: tuple[int, ...]
    axis: int = -1
    file_type = "take"
    shapes_only = True
    checks_late = True
    why_whole = "it selects steps of the whole sequence, which a stream doesn't have"

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Sequence) or isinstance(self.indices, str) or not self.indices:
            raise ValueError(f"Take: expected a sequence of at least one index, got {self.indices!r:.80}")
        indices = tuple(check_integer("Take", "every index", index, least=0) for index in self.indices)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "axis", check_axis("Take", self.axis))
        object.__setattr__(self, "mixes_steps", self.axis == 1 or self.axis < -1)  # the axis may be time

    @classmethod
    def of_padding(cls, mode: str, length: int, before: int, after: int, axis: int = -1) -> Take:
        """Return a node that pads an axis with its own entries.

        Args:
            mode: `"reflect"`: mirror at the first and last entries without repeating them; `"edge"`: repeat the first
                and last entries; `"wrap"`: continue with the other end.
            length: the length of the axis.
            before: the number of entries before.
            after: the number of entries after.
            axis: the axis.

        Raises:
            ValueError: an unknown mode, or an axis that is too short.

        >>> Take.of_padding("reflect", 3, 2, 1).indices
        (2, 1, 0, 1, 2, 1)
        """
        if mode not in ("reflect", "edge", "wrap"):
            raise ValueError(f"Take: expected mode to be reflect, edge or wrap, got {mode!r:.80}")
        if length < 1 or (mode != "edge" and max(before, after) > length - (mode == "reflect")):
            raise ValueError(f"Take: an axis of length {length} is too short for {mode} padding of {before}, {after}")
        places = np.pad(np.arange(length), (before, after), mode=mode)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return cls(tuple(places.tolist()), axis)

    @cached_property
    def _places(self) -> NDArray[np.intp]:
        return np.array(self.indices, np.intp)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        at = self.placed(owner, shape)
        length, most = shape[at - 1], max(self.indices)
        if length is not None and most >= length:
            raise ShapeError(f"{owner}: Take expected an axis of more than {most} entries, got {shown(shape)}")
        return (*shape[: at - 1], len(self.indices), *shape[at:])

    def apply(self, x: Array) -> Array:
        """Return the gathered entries of `x [B, …]`."""
        return x.take(self._places, axis=self.place(x.ndim - 1))

    def keeps_steps(self, axes: int) -> bool:
        return self.place(axes) != 1

    @property
    def summary(self) -> str:
        return f"{len(self.indices)} entries of axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Magnitude(Stepwise):
    """The magnitudes of complex numbers given as real parts, then imaginary parts: `[…, 2W]` to `[…, W]`::

        y[k] = sqrt(x[k]² + x[W + k]² + epsilon)

    Args:
        epsilon: 0 or above.

    Raises:
        ValueError: an invalid epsilon.

    >>> Magnitude().apply(np.array([[3.0, 1.0, 4.0, 0.0]]))
    array([[5., 1.]])
    """

    epsilon: float = 0.0
    file_type = "magnitude"
    about = "of complex numbers"

    def __post_init__(self) -> None:
        epsilon = check_number("Magnitude", "epsilon", self.epsilon)
        if epsilon < 0.0:
            raise ValueError(f"Magnitude: expected epsilon to be 0 or above, got {epsilon}")
        object.__setattr__(self, "epsilon", epsilon)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        shape = super().check(owner, *shapes)
        width = shape[-1]
        if width is not None and width % 2:
            raise ShapeError(f"{owner}: Magnitude expected an even number of features, got {shown(shape)}")
        return (*shape[:-1], None if width is None else width // 2)

    def apply(self, x: Array) -> Array:
        """Return `[…, W]` for `x […, 2W]`."""
        squares = x * x
        width = x.shape[-1] // 2
        y = squares[..., :width] + squares[..., width:]
        if self.epsilon:
            y += x.dtype.type(self.epsilon)
        return np.sqrt(y, out=y)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        share = np.divide(dy, run.y, out=np.zeros_like(run.y), where=run.y != 0)
        return [run.inputs[0].x * np.concatenate([share, share], axis=-1)]
