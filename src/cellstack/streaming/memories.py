"""The part of an engine that runs memories of mLSTMs: a matrix memory per row, which the kernel updates in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native
from cellstack.cells.base import MatrixState
from cellstack.nodes.base import Array, Flow
from cellstack.nodes.mlstm import MLSTM
from cellstack.streaming.parts import ALL, InPlace, PatchedSteps

if TYPE_CHECKING:
    from cellstack.nodes import Dense
    from cellstack.nodes.patches import CellPatches
    from cellstack.streaming.parts import Rows


class Memories(InPlace):
    """Memories, with the dense layers around them: a step is one call of the kernel.

    After a snapshot of all rows, the next run writes to a second set of states instead of changing the first: a step
    takes longer to copy a memory than to update it.

    Args:
        layers: the nodes, bottom first.
        weights: the number format of the matrices: see `Stream`.
        rows: the number of rows.
        threads: the number of threads that the kernel may use.
        dtype: the dtype of the states.
        patches: the patches of each layer; empty: none. With patches, memories run in NumPy.
        sessions: whether each row is a session, row 0 for patches.
    """

    def __init__(
        self,
        layers: Sequence[Dense | MLSTM],
        weights: str | None,
        rows: int,
        threads: int,
        dtype: np.dtype[Any],
        patches: Sequence[CellPatches | None] = (),
        sessions: bool = True,
    ) -> None:
        self.patches = PatchedSteps(patches, rows, dtype, sessions)
        self.layers, self.weights, self.rows, self.threads = layers, weights, rows, threads
        self.cells = [layer.memory_in(dtype) for layer in layers if isinstance(layer, MLSTM)]
        self.kinds = [cell.state_type for cell in self.cells]
        stages = [layer.memory if isinstance(layer, MLSTM) else layer.packed_in(weights) for layer in layers]
        self.kernel = native.memory_steps(stages, rows, dtype == np.float64, threads)
        self._sets: dict[int, list[MatrixState]] = {}
        self._now = 0  # the number of the current set
        self._keeps = False  # whether a snapshot must not change
        self._create(0)

    def _create(self, number: int) -> None:
        self._sets[number] = states = [cell.zeros(self.rows) for cell in self.cells]
        self.kernel.set_states(number, [array for state in states for array in state])

    def single_step(self, lock: native.CallLock) -> Callable[[Any], Array | None]:
        """Return a function of one step of all rows, for a stream with this part alone; see `Engine.single_step`.

        Chunks and states don't go through the kernel's object, so the stream's lock keeps them apart from steps.
        Only engines of several parts take snapshots of all rows, so the states of a part alone are always set 0.
        """
        step = self.kernel.step

        def run(x: Any) -> Array | None:
            with lock.attempt() as locked:
                return step(x) if locked else None

        return run

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Stateful`."""
        after, places = self._now, None if rows is ALL else np.ascontiguousarray(rows, np.int64)
        if rows is ALL and self._keeps:
            after = 1 - self._now
            if after not in self._sets:
                self._create(after)
        if self.patches:
            chunk = x if x.ndim == 3 else x[:, None]
            with self.patches.of(rows, len(chunk), chunk.shape[1], x.dtype) as changes:
                y = self._sequence(chunk, places, after, changes)
            y = y if x.ndim == 3 else y[:, 0]
        elif x.ndim == 2:
            y = self.kernel.step(np.ascontiguousarray(x), places, self._now, after)
            assert y is not None, "values between nodes always have the form that the kernel needs"
        else:
            y = self._sequence(x, places, after, {})
        self._now, self._keeps = after, False
        return y

    def _sequence(self, x: Array, places: Any, after: int, changes: Mapping[int, dict[str, Any]]) -> Array:
        states = zip(self.states, self._sets[after], strict=True)
        for place, layer in enumerate(self.layers):
            if isinstance(layer, MLSTM) and place in changes:
                rows, (before, ends) = ALL if places is None else places, next(states)
                changed = self.patches.patches[place].changing(changes[place], None)
                x, new = layer.patched_call(Flow(x), type(before)(*(array[rows] for array in before)), changed)
                for end, array in zip(ends, new, strict=True):
                    end[rows] = array
            elif isinstance(layer, MLSTM):
                x = self._one_by_one(layer, x, *next(states), places)
            else:  # without the activations in NumPy, which the engine applies
                x = native.on_rows(layer.layers_in(self.weights)[1].run, x, self.threads)
        return x

    def _one_by_one(self, layer: MLSTM, x: Array, before: MatrixState, after: MatrixState, places: Any) -> Array:
        """Run a memory in pieces that are so short that the kernel runs them step by step, with the bits of steps."""
        most = max(native.SHORT_CHUNK - 1, 1)
        pieces = []
        for start in range(0, max(x.shape[1], 1), most):
            pieces.append(layer.call(Flow(x[:, start : start + most]), before, after, self.threads, places))
            before = after
        return np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Stateful`."""
        super().write(rows, entries)
        self.patches.begin(rows)

    @property
    def states(self) -> list[MatrixState]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The current set."""
        return self._sets[self._now]

    def initial(self) -> list[dict[str, Any]]:
        """See `Stateful`."""
        return [cell.initial for cell in self.cells]

    def snapshot(self, rows: Rows) -> Any:
        """See `Stateful`."""
        counts = self.patches.counts(rows)
        if rows is ALL:
            self._keeps = True
            return self._now, counts
        return self.read(rows), counts

    def restore(self, rows: Rows, entries: Any) -> None:
        """See `Stateful`."""
        before, counts = entries
        if rows is not ALL:
            self.write(rows, before)
        else:
            self._now = before
        self.patches.set_counts(rows, counts)
        self._keeps = False
