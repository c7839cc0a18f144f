"""The values between nodes, and their states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.base import HiddenState, MatrixState, State
from cellstack.cells.mlstm import MemorySizes

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


class MatrixMemory(NamedTuple):
    """What a network's state has for an `MLSTM`: the shapes of `MatrixState`, without the batch.

    Attributes:
        sizes: those of the memory.
        dtype: the network's dtype.
    """

    sizes: MemorySizes
    dtype: np.dtype[Any] = np.dtype(np.float32)
    state_type = MatrixState

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the state, by name."""
        return self.sizes.state_shapes

    def as_state(self, where: str, arrays: Sequence[Array]) -> MatrixState:
        """Return a state from its arrays, which have the right shapes; `ValueError` unless all numbers are finite."""
        for name, array in zip(self.state_shapes, arrays, strict=True):
            if not np.isfinite(array).all():
                raise ValueError(f"{where}: expected finite numbers in {name}, got NaN or infinity; zeros are empty")
        return MatrixState(*arrays)

    def zeros(self, batch: int) -> MatrixState:
        """Return the initial state of some rows: zeros, which take no memory until they are written to."""
        return MatrixState(*(self._aligned((batch, *shape)) for shape in self.state_shapes.values()))

    def _aligned(self, shape: tuple[int, ...]) -> Array:
        """Return zeros that start at a cache line: else every vector of a step would be in two of them."""
        size = math.prod(shape) * self.dtype.itemsize
        memory = np.zeros(size + LINE, np.uint8)
        first = -memory.ctypes.data % LINE
        return memory[first : first + size].view(self.dtype).reshape(shape)
