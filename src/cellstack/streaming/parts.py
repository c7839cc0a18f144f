"""The parts of an engine: each part runs one step or a chunk of steps, and stores its state for every row.

A call selects the rows that it steps by index: `ALL` of them, or some, each once. Values are one step per row,
`[B, W]`, or a chunk, `[B, T, W]`, where B is the number of selected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.cells.spec import STATES
from cellstack.nodes.base import Array
from cellstack.nodes.cell_arrays import Cell

if TYPE_CHECKING:
    from cellstack.nodes import Dense
    from cellstack.nodes.base import CellState, StepRule
    from cellstack.nodes.patches import CellPatches

Rows = Any  # an index of rows: ALL, or an array of indices
Run = Callable[..., Array]  # takes the rows and the inputs

ALL = slice(None)
BLOCK = 64  # steps for which the patches are prepared at a time


class Frames(NamedTuple):
    """The last input steps that a node other than a cell needs for its next outputs, the oldest first.

    For a causal convolution `[B, L, C]`; for a causal pool `[B, L, W + 1]`, where the last number is 1 for a step and 0
    before the first step.
    """

    x: Array


class Stateful(Protocol):
    """A part with a state."""

    @property
    def kinds(self) -> Sequence[type[Any]]:
        """The types of the entries that `read` returns and `write` takes."""
        ...

    def run(self, rows: Rows, x: Array) -> Array:
        """Run the next steps of some rows, update their state and return the output."""
        ...

    def initial(self) -> list[dict[str, Any]]:
        """Return the initial value of each entry: arrays for one row, by the names of its fields."""
        ...

    def read(self, rows: Rows) -> Sequence[CellState | Frames]:
        """Return copies of the state of some rows."""
        ...

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """Set the state of some rows to entries whose fields are arrays of as many rows, or of one row for all."""
        ...

    def snapshot(self, rows: Rows) -> Any:
        """Return a snapshot of some rows for `restore`."""
        ...

    def restore(self, rows: Rows, entries: Any) -> None:
        """Restore some rows from a snapshot."""
        ...


class Memory:
    """A node with a memory of its last input steps.

    Args:
        rule: the node's rule, which has a memory.
        rows: the number of rows.
        dtype: the dtype of the memory.
        sessions: whether each row is written to before it is first read.
    """

    kinds = (Frames,)

    def __init__(self, rule: StepRule, rows: int, dtype: np.dtype[Any], sessions: bool = False) -> None:
        assert rule.memory is not None
        assert rule.advance is not None
        self.advance, self.start = rule.advance, rule.start
        self.memory = _rows_of(np.full(rule.memory, rule.start, dtype), rows, sessions)

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Stateful`."""
        step, whole = x.ndim == 2, rows is ALL
        y, after = self.advance(self.memory if whole else self.memory[rows], x[:, None] if step else x)
        if whole:  # replace the array instead of changing it: `restore` may need the old one
            self.memory = after if step else after.copy()
        else:
            self.memory[rows] = after
        return y[:, 0] if step else y

    def initial(self) -> list[dict[str, Any]]:
        """See `Stateful`."""
        return [{"x": np.full(self.memory.shape[1:], self.start, self.memory.dtype)}]

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Stateful`."""
        return [Frames(np.array(self.memory[rows]))]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        self.memory[rows] = entries[0].x

    def snapshot(self, rows: Rows) -> Array:
        """See `Stateful`."""
        return self.memory if rows is ALL else self.memory[rows]

    def restore(self, rows: Rows, entries: Array) -> None:
        """See `Stateful`."""
        if rows is ALL:
            self.memory = entries
        else:
            self.memory[rows] = entries


class PatchedSteps:
    """The patches of a part's layers, and how many steps each row has taken since its state was set.

    Args:
        patches: those of each layer; empty: none.
        rows: the number of rows.
        dtype: the dtype of the states.
        sessions: whether each row is a session: row 0 for patches.
    """

    def __init__(self, patches: Sequence[CellPatches | None], rows: int, dtype: np.dtype[Any], sessions: bool) -> None:
        self.sessions = sessions
        self.patches = {place: of_cell for place, of_cell in enumerate(patches) if of_cell is not None}
        for of_cell in self.patches.values():
            of_cell.check("rows", 1 if sessions else rows)
        self.taken = np.zeros(rows if self.patches else 0, np.int64)
        self.block: tuple[int, dict[int, dict[str, Any]]] = (0, {})
        arrays = ((place, of_cell.last_gates(rows, dtype)) for place, of_cell in self.patches.items())
        self.last_gates = {place: array for place, array in arrays if array is not None}

    def __bool__(self) -> bool:
        return bool(self.patches)

    @contextmanager
    def of(self, rows: Rows, count: int, steps: int, dtype: np.dtype[Any]) -> Iterator[dict[int, dict[str, Any]]]:
        """Yield the kernel's arguments for the next steps of some rows by layer; they count as taken afterwards.

        Args:
            rows: the rows.
            count: how many they are.
            steps: the number of steps.
            dtype: the dtype of the values.
        """
        last_gates = {place: np.ascontiguousarray(array[rows]) for place, array in self.last_gates.items()}
        yield self._changes(rows, count, steps, last_gates, dtype)
        for place, array in last_gates.items():
            self.last_gates[place][rows] = array
        self.taken[rows] += steps

    def _changes(
        self, rows: Rows, count: int, steps: int, last_gates: dict[int, Array], dtype: np.dtype[Any]
    ) -> dict[int, dict[str, Any]]:
        """Return the kernel's arguments for the patches in the next steps of some rows, by layer."""
        taken = self.taken[rows]
        places = np.zeros(count, np.int64) if self.sessions else np.arange(len(self.taken))[rows]
        if rows is ALL and steps == 1 and (taken == taken[0]).all():
            return self._of_block(int(taken[0]), places, last_gates, dtype)
        first = np.where(taken == 0, 0, -1) if steps else np.full(count, -1)
        numbers = taken[:, None] + np.arange(steps)
        return {
            place: patches.of_steps(places, numbers, first, last_gates.get(place), dtype)
            for place, patches in self.patches.items()
        }

    def _of_block(
        self, step: int, places: NDArray[np.int64], last_gates: dict[int, Array], dtype: np.dtype[Any]
    ) -> dict[int, dict[str, Any]]:
        """Return the kernel's arguments for the patches in a step of all rows, prepared for a block of steps."""
        begun, block = self.block
        if not begun <= step < begun + BLOCK or not block:
            first = np.full(len(places), 0 if step == 0 else -1)
            numbers = np.broadcast_to(step + np.arange(BLOCK), (len(places), BLOCK))
            block = {
                place: patches.of_steps(places, numbers, first, last_gates.get(place), dtype)
                for place, patches in self.patches.items()
            }
            begun, self.block = step, (step, block)
        at = step - begun
        return {
            place: arguments
            and arguments
            | {
                "patch_lines": np.ascontiguousarray(arguments["patch_lines"][:, at : at + 1]),
                "patch_held": last_gates.get(place),
            }
            for place, arguments in block.items()
        }

    def begin(self, rows: Rows) -> None:
        """Count the steps of some rows from 0."""
        if self.patches:
            self.taken[rows] = 0

    def counts(self, rows: Rows) -> Any:
        """Return, for `set_counts`, the number of steps taken by some rows and their gates to be frozen."""
        if not self.patches:
            return None
        return _own(self.taken, rows), {place: _own(array, rows) for place, array in self.last_gates.items()}

    def set_counts(self, rows: Rows, counts: Any) -> None:
        """Set the counts of some rows to a result of `counts`."""
        if counts is None:
            return
        self.taken[rows], last_gates = counts
        for place, array in last_gates.items():
            self.last_gates[place][rows] = array


class Cells:
    """Cells, with the dense layers between them, as one call of the kernel: base class of both ways to store states.

    Args:
        layers: bottom first.
        weights: the number format of the matrices: see `Stream`.
    """

    def __init__(self, layers: Sequence[Cell | Dense], weights: str | None) -> None:
        self.packed = [layer.packed_in(weights) for layer in layers]
        self.places = {place: layer for place, layer in enumerate(layers) if isinstance(layer, Cell)}
        self.kinds = [STATES[cell.spec.kind] for cell in self.places.values()]

    def initial(self) -> list[dict[str, Any]]:
        """See `Stateful`."""
        return [cell.initial for cell in self.places.values()]


class InPlace:
    """Base class of parts whose states, `states`, are arrays of all rows that the kernel updates in place."""

    states: Sequence[Any]

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Stateful`."""
        return [type(state)(*(_own(array, rows) for array in state)) for state in self.states]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        for state, new in zip(self.states, entries, strict=True):
            for old, array in zip(state, new, strict=True):
                old[rows] = array


class OwnCells(Cells):
    """Cells whose rows are always stepped together: the kernel stores the states, in its own layout.

    Args:
        layers, weights: see `Cells`.
        rows: the number of rows.
        threads: see `Stream`.
    """

    def __init__(self, layers: Sequence[Cell | Dense], weights: str | None, rows: int, threads: int) -> None:
        super().__init__(layers, weights)
        self.kernel = native.stream(self.packed, rows, threads)

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Stateful`."""
        y = (self.kernel.step if x.ndim == 2 else self.kernel.run)(np.ascontiguousarray(x))
        assert y is not None, "values between nodes always have the form that the kernel needs"
        return y

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Stateful`."""
        states = self.kernel.get_state()
        return [
            kind(*(array[rows] for array in states[place])) for kind, place in zip(self.kinds, self.places, strict=True)
        ]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        for place, state, new in zip(self.places, self.read(ALL), entries, strict=True):
            for old, array in zip(state, new, strict=True):
                old[rows] = array
            self.kernel.set_state(place, state)

    def snapshot(self, rows: Rows) -> None:
        """See `Stateful`."""
        self.kernel.keep()

    def restore(self, rows: Rows, entries: None) -> None:
        """See `Stateful`."""
        self.kernel.undo()


class SharedCells(InPlace, Cells):
    """Cells of which a call may step only some rows: the kernel reads and writes the states in place.

    Args:
        layers, weights: see `Cells`.
        rows: the number of rows.
        threads: the number of threads that the kernel may use.
        dtype: the dtype of the states.
        patches: the patches of each layer; empty: none.
        sessions: whether each row is a session: row 0 for patches, and written to before it is first read.
    """

    def __init__(
        self,
        layers: Sequence[Cell | Dense],
        weights: str | None,
        rows: int,
        threads: int,
        dtype: np.dtype[Any],
        patches: Sequence[CellPatches | None] = (),
        sessions: bool = True,
    ) -> None:
        super().__init__(layers, weights)
        self.threads, self.patches = threads, PatchedSteps(patches, rows, dtype, sessions)
        self.states = [
            kind(*(_rows_of(start, rows, sessions) for start in cell.initial.values()))
            for kind, cell in zip(self.kinds, self.places.values(), strict=True)
        ]
        ends: dict[int, Any] = dict(zip(self.places, self.states, strict=True))
        self.ends = [ends.get(place) for place in range(len(layers))]
        self.below = [self._layer(place) for place in range(len(layers) - 1)]
        top = layers[-1]
        self.width = top.spec.output_size if isinstance(top, Cell) else top.units

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Stateful`."""
        x = np.ascontiguousarray(x)
        steps, width = x.shape[1] if x.ndim == 3 else 1, x.shape[-1]
        y = np.empty((*x.shape[:-1], self.width), x.dtype)
        sequences = native.Sequences(len(x), steps, x, steps * width, width, places=None if rows is ALL else rows)
        if not self.patches:
            native.forward(sequences, [*self.below, self._layer(-1, y=y)], self.threads)
            return y
        with self.patches.of(rows, len(x), steps, x.dtype) as changes:
            top = len(self.packed) - 1
            layers = [self._layer(place, **changes.get(place, {})) for place in range(top)]
            native.forward(sequences, [*layers, self._layer(top, y=y, **changes.get(top, {}))], self.threads)
        return y

    def session_step(self, table: native.SessionTable) -> Callable[[Any, Any], Array | None]:
        """Return the kernel's step function for the sessions of a table: of their numbers and x `[n, I]`."""
        return native.session_steps(table, [*self.below, self._layer(-1)], self.threads).step

    def _layer(self, place: int, **more: Any) -> Any:
        return native.Layer(self.packed[place], self.ends[place], self.ends[place], **more)

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        super().write(rows, entries)
        self.patches.begin(rows)

    def snapshot(self, rows: Rows) -> Any:
        """See `Stateful`."""
        return self.read(rows), self.patches.counts(rows)

    def restore(self, rows: Rows, entries: Any) -> None:
        """See `Stateful`."""
        states, counts = entries
        self.write(rows, states)
        self.patches.set_counts(rows, counts)


def _rows_of(start: Array, rows: int, sessions: bool) -> Array:
    """Return what is kept of `rows` rows, each `start`; zeros for sessions, which take no memory until written to."""
    return np.zeros((rows, *start.shape), start.dtype) if sessions else np.repeat(start[None], rows, axis=0)


def _own(array: Array, rows: Rows) -> Array:
    """Return a copy of some rows."""
    return array.copy() if rows is ALL else array[rows]
