"""The values between nodes, and their states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.base import HiddenState, MatrixState, State
from cellstack.cells.errors import check_state_numbers
from cellstack.cells.mlstm import MemorySpec

Array = NDArray[Any]
CellState = State | HiddenState | MatrixState
Shape = tuple[int | None, ...]
"""Lengths of the axes after the batch: `(T, W)` of a sequence, `(W,)` of a vector. None: not known in advance."""

StateGradients = Sequence[Sequence["Array | None"]]
"""Per cell, the gradient of each array of its state; None: it has none."""

Types = dict[str, type | tuple[type, ...]]
"""Keys of a file with the types of their values; a tuple lists alternatives."""

LINE = 64  # bytes of a cache line


class Flow(NamedTuple):
    """A value between nodes: `x [B, T, W]` or `[B, W]`, its mask and resets, and the node's states after the run."""

    x: Array
    mask: NDArray[np.bool_] | None = None
    reset: NDArray[np.bool_] | None = None
    states: tuple[CellState, ...] = ()


class Celled:
    """What has the state of a cell, which its description declares: a `Cell`, or the cell of an `MLSTM`."""

    spec: Any
    dtype: Any
    arrays: Any
    initial: Any
    one_head: Any
    summary: Any

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the state, by name, without the batch."""
        return self.spec.state_shapes

    @property
    def state_type(self) -> type[Any]:
        """The type of its state."""
        return self.spec.of_kind.state

    def as_state(self, where: str, arrays: Sequence[Array]) -> CellState:
        """Return a state from its arrays.

        Args:
            where: the function or class and the state, for error messages.
            arrays: those of `state_shapes` in order, with these shapes after the batch.

        Raises:
            ValueError: numbers that the state of this kind can't have.
        """
        check_state_numbers(where, self.spec.of_kind, arrays)
        return self.state_type(*arrays)


@dataclass(frozen=True)
class MemoryCell(Celled):
    """The cell of an `MLSTM`, which has no arrays, in a network of this dtype."""

    spec: MemorySpec
    dtype: np.dtype[Any]

    @property
    def arrays(self) -> dict[str, Array]:
        """Its arrays by name: none."""
        return {}

    @property
    def summary(self) -> str:
        """Its description in a few words."""
        return self.spec.summary

    @property
    def one_head(self) -> MemoryCell:
        """Itself: heads are axes of its states."""
        return self

    @property
    def initial(self) -> dict[str, Array]:
        """The initial state, zeros by name."""
        return {name: np.zeros(shape, self.dtype) for name, shape in self.state_shapes.items()}

    def zeros(self, batch: int) -> MatrixState:
        """Return the initial state of some rows: zeros, which take no memory until they are written to."""
        return MatrixState(*(self._aligned((batch, *shape)) for shape in self.state_shapes.values()))

    def _aligned(self, shape: tuple[int, ...]) -> Array:
        """Return zeros that start at a cache line: else every vector of a step would be in two of them."""
        size = math.prod(shape) * self.dtype.itemsize
        memory = np.zeros(size + LINE, np.uint8)
        first = -memory.ctypes.data % LINE
        return memory[first : first + size].view(self.dtype).reshape(shape)
