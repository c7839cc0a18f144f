"""What an engine runs: each part answers a frame or a chunk, and keeps what it must, for rows that go on by themselves.

A call names the rows that it steps by their places: `ALL` of them, or some, each once. Values are a frame a row,
`[B, W]`, or a chunk, `[B, T, W]`, B being as many as the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.nodes.base import Array
from cellstack.nodes.recurrent import Cell
from cellstack.spec import STATES

if TYPE_CHECKING:
    from cellstack.nodes import Dense
    from cellstack.nodes.base import CellState, FrameRule
    from cellstack.nodes.patches import CellPatches

Rows = Any  # what indexes an axis of rows: ALL, or an array of their places
Run = Callable[..., Array]  # of the rows and of what comes in

ALL = slice(None)
BLOCK = 64  # steps of which it is worked out at a time what patches change in them


class Frames(NamedTuple):
    """What a node keeps beside states of cells: its last frames, the oldest first.

    Of a causal convolution they are `[B, L, C]`; of a causal pool `[B, L, W + 1]`, the last number being 1 where there
    was a frame, 0 before the first.
    """

    x: Array


class Keeps(Protocol):
    """A part that keeps something from frame to frame."""

    @property
    def kinds(self) -> Sequence[type[Any]]:
        """What `read` returns and `write` takes, an entry each."""
        ...

    def run(self, rows: Rows, x: Array) -> Array:
        """Return what the part makes of the next frames of some rows, whose state moves on."""
        ...

    def starts(self) -> list[dict[str, Any]]:
        """Return what each entry is before the first frame, an array for every row, by the names of its fields."""
        ...

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """Return copies of what is kept of some rows."""
        ...

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """Let some rows go on from other entries, whose fields are arrays of as many rows, or of one for all."""
        ...

    def keep(self, rows: Rows) -> Any:
        """Return what `undo` takes to bring some rows back to how they are now."""
        ...

    def undo(self, rows: Rows, entries: Any) -> None:
        """Bring some rows back to what `keep` returned."""
        ...


class Memory:
    """A node that keeps frames, by its own rule.

    Args:
        rule: with a memory.
        rows: how many there are.
        dtype: of the numbers.
        sessions: each row is written to before it is first read.
    """

    kinds = (Frames,)

    def __init__(self, rule: FrameRule, rows: int, dtype: np.dtype[Any], sessions: bool = False) -> None:
        assert rule.memory is not None
        assert rule.advance is not None
        self.advance, self.start = rule.advance, rule.start
        self.frames = _rows_of(np.full(rule.memory, rule.start, dtype), rows, sessions)

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Keeps`."""
        step, whole = x.ndim == 2, rows is ALL
        y, after = self.advance(self.frames if whole else self.frames[rows], x[:, None] if step else x)
        if whole:  # what was is left as it is, for `undo`
            self.frames = after if step else after.copy()
        else:
            self.frames[rows] = after
        return y[:, 0] if step else y

    def starts(self) -> list[dict[str, Any]]:
        """See `Keeps`."""
        return [{"x": np.full(self.frames.shape[1:], self.start, self.frames.dtype)}]

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Keeps`."""
        return [Frames(np.array(self.frames[rows]))]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Keeps`."""
        self.frames[rows] = entries[0].x

    def keep(self, rows: Rows) -> Array:
        """See `Keeps`."""
        return self.frames if rows is ALL else self.frames[rows]

    def undo(self, rows: Rows, entries: Array) -> None:
        """See `Keeps`."""
        if rows is ALL:
            self.frames = entries
        else:
            self.frames[rows] = entries


class Cells:
    """Cells, with the dense layers that stand among them, as one call of the kernel: what both ways to keep rows share.

    Args:
        layers: bottom first.
        weights: what the cells' matrices are held in: see `Stream`.
    """

    def __init__(self, layers: Sequence[Cell | Dense], weights: str | None) -> None:
        self.packed = [layer.packed_in(weights) if isinstance(layer, Cell) else layer.packed for layer in layers]
        self.places = {place: layer for place, layer in enumerate(layers) if isinstance(layer, Cell)}
        self.kinds = [STATES[cell.spec.kind] for cell in self.places.values()]

    def starts(self) -> list[dict[str, Any]]:
        """See `Keeps`."""
        return [cell.initial for cell in self.places.values()]


class OwnCells(Cells):
    """Cells all of whose rows are stepped together: the kernel keeps the states, in its own layout.

    Args:
        layers, weights: see `Cells`.
        rows: how many there are.
        threads: see `Stream`.
    """

    def __init__(self, layers: Sequence[Cell | Dense], weights: str | None, rows: int, threads: int) -> None:
        super().__init__(layers, weights)
        self.kernel = native.stream(self.packed, rows, threads)

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Keeps`."""
        y = (self.kernel.step if x.ndim == 2 else self.kernel.run)(np.ascontiguousarray(x))
        assert y is not None, "what goes from node to node is as the kernel takes it"
        return y

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Keeps`."""
        states = self.kernel.get_state()
        return [
            kind(*(array[rows] for array in states[place])) for kind, place in zip(self.kinds, self.places, strict=True)
        ]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Keeps`."""
        for place, state, new in zip(self.places, self.read(ALL), entries, strict=True):
            for old, array in zip(state, new, strict=True):
                old[rows] = array
            self.kernel.set_state(place, *state)

    def keep(self, rows: Rows) -> None:
        """See `Keeps`."""
        self.kernel.keep()

    def undo(self, rows: Rows, entries: None) -> None:
        """See `Keeps`."""
        self.kernel.undo()


class SharedCells(Cells):
    """Cells of whose rows a call steps some: the kernel reads and writes the states where they lie.

    Args:
        layers, weights: see `Cells`.
        rows: how many there are.
        threads: how many the kernel may use.
        dtype: of the states.
        patches: what is changed in each layer as it runs; empty = in none.
        sessions: each row is a batch of its own, of whose rows it is the first, and is written to before it is read.
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
        self.threads, self.sessions = threads, sessions
        self.patches = {place: own for place, own in enumerate(patches) if own is not None}
        for own in self.patches.values():
            own.check("rows", 1 if sessions else rows)
        if self.patches:
            self.taken = np.zeros(rows, np.int64)  # steps since the state was set
            self.block: tuple[int, dict[int, dict[str, Any]]] = (0, {})
            rooms = ((place, own.held(rows, dtype)) for place, own in self.patches.items())
            self.held = {place: room for place, room in rooms if room is not None}
        self.states = [
            kind(*(_rows_of(start, rows, sessions) for start in cell.initial.values()))
            for kind, cell in zip(self.kinds, self.places.values(), strict=True)
        ]
        ends: dict[int, Any] = dict(zip(self.places, ((*state, None)[:2] for state in self.states), strict=True))
        self.ends = [ends.get(place, (None, None)) for place in range(len(layers))]
        self.below = [self._layer(place) for place in range(len(layers) - 1)]
        top = layers[-1]
        self.width = top.spec.output_size if isinstance(top, Cell) else top.kernel.shape[1]

    def run(self, rows: Rows, x: Array) -> Array:
        """See `Keeps`."""
        x = np.ascontiguousarray(x)
        steps, width = x.shape[1] if x.ndim == 3 else 1, x.shape[-1]
        y = np.empty((*x.shape[:-1], self.width), x.dtype)
        frames = native.Sequences(len(x), steps, x, steps * width, width, places=None if rows is ALL else rows)
        if not self.patches:
            native.forward(frames, [*self.below, self._layer(-1, y=y)], self.threads)
            return y
        held = {place: np.ascontiguousarray(array[rows]) for place, array in self.held.items()}
        changes = self._changes(rows, len(x), steps, held, x.dtype)
        top = len(self.packed) - 1
        layers = [self._layer(place, **changes.get(place, {})) for place in range(top)]
        native.forward(frames, [*layers, self._layer(top, y=y, **changes.get(top, {}))], self.threads)
        for place, array in held.items():
            self.held[place][rows] = array
        self.taken[rows] += steps
        return y

    def _layer(self, place: int, **more: Any) -> Any:
        return native.Layer(self.packed[place], *self.ends[place], *self.ends[place], **more)

    def _changes(
        self, rows: Rows, count: int, steps: int, held: dict[int, Array], dtype: np.dtype[Any]
    ) -> dict[int, dict[str, Any]]:
        """Return what patches change in the next steps of some rows, by layer."""
        taken = self.taken[rows]
        places = np.zeros(count, np.int64) if self.sessions else np.arange(len(self.taken))[rows]
        if rows is ALL and steps == 1 and (taken == taken[0]).all():
            return self._of_block(int(taken[0]), places, held, dtype)
        first = np.where(taken == 0, 0, -1) if steps else np.full(count, -1)
        numbers = taken[:, None] + np.arange(steps)
        return {
            place: patches.act(places, numbers, first, held.get(place), dtype)
            for place, patches in self.patches.items()
        }

    def _of_block(
        self, step: int, places: NDArray[np.int64], held: dict[int, Array], dtype: np.dtype[Any]
    ) -> dict[int, dict[str, Any]]:
        """Return what patches change in a step of all rows, out of a block of steps that is worked out once."""
        begun, block = self.block
        if not begun <= step < begun + BLOCK or not block:
            first = np.full(len(places), 0 if step == 0 else -1)
            numbers = np.broadcast_to(step + np.arange(BLOCK), (len(places), BLOCK))
            block = {
                place: patches.act(places, numbers, first, held.get(place), dtype)
                for place, patches in self.patches.items()
            }
            begun, self.block = step, (step, block)
        at = step - begun
        return {
            place: made
            and made
            | {"patch_lines": np.ascontiguousarray(made["patch_lines"][:, at : at + 1]), "patch_held": held.get(place)}
            for place, made in block.items()
        }

    def read(self, rows: Rows) -> list[CellState | Frames]:
        """See `Keeps`."""
        return [type(state)(*(_own(array, rows) for array in state)) for state in self.states]

    def write(self, rows: Rows, entries: Sequence[Any]) -> None:
        """See `Keeps`."""
        for state, new in zip(self.states, entries, strict=True):
            for old, array in zip(state, new, strict=True):
                old[rows] = array
        if self.patches:
            self.taken[rows] = 0

    def keep(self, rows: Rows) -> Any:
        """See `Keeps`."""
        return self.read(rows), self.counts(rows)

    def undo(self, rows: Rows, entries: Any) -> None:
        """See `Keeps`."""
        states, counts = entries
        self.write(rows, states)
        self.count_on(rows, counts)

    def counts(self, rows: Rows) -> Any:
        """Return what `count_on` takes to go on from where some rows are: the steps taken, and gates to be frozen."""
        if not self.patches:
            return None
        return _own(self.taken, rows), {place: _own(array, rows) for place, array in self.held.items()}

    def count_on(self, rows: Rows, counts: Any) -> None:
        """Let some rows go on as `counts` said."""
        if counts is None:
            return
        self.taken[rows], held = counts
        for place, array in held.items():
            self.held[place][rows] = array


def _rows_of(start: Array, rows: int, sessions: bool) -> Array:
    """Return what is kept of `rows` rows, each `start`; zeros for sessions, which take no memory until written to."""
    return np.zeros((rows, *start.shape), start.dtype) if sessions else np.repeat(start[None], rows, axis=0)


def _own(array: Array, rows: Rows) -> Array:
    """Return a copy of some rows."""
    return array.copy() if rows is ALL else array[rows]
