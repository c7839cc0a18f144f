"""The part of an engine that runs an `MLSTM`: a matrix memory per row, which the kernel updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.nodes.base import Array, Flow
from cellstack.nodes.mlstm import MLSTM
from cellstack.spec import MatrixState
from cellstack.streaming.parts import ALL

if TYPE_CHECKING:
    from cellstack.streaming.parts import Rows


class Memories:
    """The memories of an `MLSTM`, one per row.

    After a snapshot of all rows, the next run writes to a second state instead of changing the first: a step takes
    longer to copy a memory than to update it.

    Args:
        node: the node.
        rows: the number of rows.
        threads: the number of threads that the kernel may use.
        dtype: the dtype of the states.
    """

    kinds = (MatrixState,)

    def __init__(self, node: MLSTM, rows: int, threads: int, dtype: np.dtype[Any]) -> None:
        self.node, self.threads = node, threads
        self.memory = node.memory_in(dtype)
        self.state = self.memory.zeros(rows)
        self._spare: MatrixState | None = None
        self._keeps = False  # whether a snapshot must not change

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Stateful`."""
        flow = Flow(x if x.ndim == 3 else x[:, None])
        after, places = self.state, None if rows is ALL else np.ascontiguousarray(rows, np.int64)
        if rows is ALL and self._keeps:
            after = self._spare or self.memory.zeros(len(x))
            self._spare, self._keeps = self.state, False
        y = self.node.call(flow, self.state, after, self.threads, places)
        self.state = after
        return y if x.ndim == 3 else y[:, 0]

    def initial(self) -> list[dict[str, Any]]:
        """See `Stateful`."""
        return [{name: np.zeros(shape, self.memory.dtype) for name, shape in self.memory.state_shapes.items()}]

    def read(self, rows: Rows) -> list[MatrixState]:
        """See `Stateful`."""
        return [MatrixState(*(array.copy() if rows is ALL else array[rows] for array in self.state))]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        for old, array in zip(self.state, entries[0], strict=True):
            old[rows] = array

    def snapshot(self, rows: Rows) -> MatrixState:
        """See `Stateful`."""
        if rows is ALL:
            self._keeps = True
            return self.state
        return self.read(rows)[0]

    def restore(self, rows: Rows, entries: MatrixState) -> None:
        """See `Stateful`."""
        if rows is not ALL:
            self.write(rows, [entries])
        elif entries is not self.state:
            self._spare, self.state = self.state, entries
        self._keeps = False
