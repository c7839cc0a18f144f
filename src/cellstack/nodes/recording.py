"""What a run records of the cells and of the values between the nodes; the gradients of a recorded cell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.cells.base import HiddenState, MatrixState, State
from cellstack.cells.spec import CellSpec
from cellstack.nodes.values import Array, CellState, Flow

if TYPE_CHECKING:
    from cellstack.nodes.cell_arrays import Cell
    from cellstack.nodes.patches import CellPatches


class Record(NamedTuple):
    """The input, gates and states of a cell at every step of a call, in the order of time for either direction."""

    gates: Array
    """`[B, T, planes, H]`, after their activations, in the order of `spec.GATES`: see `CellSpec.planes`."""
    states: State | HiddenState
    """`[B, T, P]` or `[B, T, H]` each; h is that before a residual is added and before masked steps are set to zero."""
    x: Array
    """`[B, T, I]`."""
    before: CellState | None
    """The state before the first processed step; None: the cell's initial state."""
    mask: NDArray[np.bool_] | None
    """`[B, T]`, or None."""
    reset: NDArray[np.bool_] | None
    """`[B, T]`: True where the state was set to the initial state before this step was processed; or None."""
    reverse: bool
    """Whether it ran from the last step to the first."""
    patches: CellPatches | None = None
    """The patches that were applied to the cell."""


class MemoryRecord(NamedTuple):
    """What the gates and states of an `MLSTM` in a run depend on: see `Record`."""

    x: Array
    before: MatrixState | None
    mask: NDArray[np.bool_] | None
    reset: NDArray[np.bool_] | None
    reverse: bool = False
    patches: CellPatches | None = None


class Recording(list[Record | None]):
    """A recording of a run: the `Record` of each cell, in the order of `Network.cells`.

    Args:
        cells: the indices of the cells to record; the entries of the others are None. None: all cells.
        empty: the function that allocates an array, given a shape and a dtype.

    Attributes:
        flows: the values between the nodes, by the names of the inputs and nodes.
        memories: what the runs of nodes with a memory depended on, by their names.
    """

    def __init__(
        self,
        cells: Collection[int] | None = None,
        empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty,
    ) -> None:
        super().__init__()
        self._cells, self._empty = cells, empty
        self.flows: dict[str, Flow] = {}
        self.memories: dict[str, MemoryRecord] = {}

    def arrays(self, number: int, spec: CellSpec, batch: int, steps: int, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Allocate the arrays for a cell's results at every step, by their names in `native.Layer`.

        Args:
            number: the index of the cell, counted from the first one without an entry here.
            spec, batch, steps, dtype: the cell, and the sizes of the call.
        """
        place, cells = len(self) + number, self._cells
        kept = ("gates", "states", "y")
        if cells is not None and place not in cells:
            if place + 1 not in cells:
                return {}
            kept = ("y",)
        return native.results(spec, batch, steps, lambda shape: self._empty(shape, dtype), kept)


def cell_gradients(
    cell: Cell, record: Record, dy: Array | None, ends: Sequence[Array | None]
) -> tuple[Array, list[Array]]:
    """Return the gradients of a cell's input, and of its initial state, where one was given."""
    own = {name: native.plain(array) for name, array in cell.arrays.items()}
    weights = native.weights(cell.spec, own, copy=False)
    x = native.plain(record.x)
    batch, steps, _ = x.shape
    before = [native.plain(array) for array in record.before or ()]
    made = native.results(cell.spec, batch, steps, lambda shape: np.empty(shape, x.dtype))
    layer = native.Layer(weights, before, **made)
    sequences = native.sequences(x, record.mask, record.reset, record.reverse)
    native.forward(sequences, [layer], 1)
    dx = np.zeros_like(x)
    dbefore = [np.zeros_like(array) for array in before]
    dy, *dafter = (None if array is None else native.plain(array) for array in (dy, *ends))
    native.backward(sequences, [layer], [native.Gradients(dy, dafter, dx=dx, dbefore=dbefore)], 1)
    return dx, dbefore
