"""The streaming engine: a network as parts that run step by step, over rows with a state each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native
from cellstack.cells.errors import ShapeError, check_sequence, check_step
from cellstack.network.arguments import as_floats, as_own, as_states
from cellstack.nodes.cell_arrays import WEIGHTS, Cell
from cellstack.nodes.checks import check_choice, check_integer
from cellstack.nodes.dense import Dense, Products
from cellstack.streaming.eligibility import (
    check_streamable,
    check_widths,
    step_function,
    step_rules,
)
from cellstack.streaming.memories import Memories
from cellstack.streaming.parts import ALL, Frames, Memory, OwnCells, SharedCells

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.network.plan import PlannedCall
    from cellstack.nodes import MLSTM
    from cellstack.nodes.base import Array, CellState
    from cellstack.nodes.patches import CellPatches
    from cellstack.streaming.parts import Rows, Run, Stateful


class Engine:
    """A network that runs step by step, with a state per row.

    Args:
        owner: the class, for error messages.
        network: a network whose nodes can all run step by step, and whose inputs are all sequences or ids.
        rows: the name of the argument for the number of rows, and its value.
        threads: the number of threads that the kernel may use for a call.
        weights: the number format of the matrices: see `Stream`.
        shared: whether a call may step only some of the rows.

    Attributes:
        step_shape: the shape of one step of all rows; a contiguous array of this shape and of the network's dtype needs
            no further check. None if a check is always needed.

    Raises:
        ValueError, TypeError, MemoryError: see `Stream`.
    """

    def __init__(
        self, owner: str, network: Network, rows: tuple[str, int], threads: int, weights: str | None, shared: bool
    ) -> None:
        self.rows = check_integer(owner, *rows)
        self.threads = check_integer(owner, "threads", threads)
        if weights is not None:
            check_choice(owner, "weights", weights, WEIGHTS)
        self.owner, self.network, self.weights, self.shared = owner, network, weights, shared
        self._parts: list[tuple[Run, tuple[int, ...]]] = []  # each part's function and the indices of its inputs
        self._stateful: list[Stateful] = []  # the parts with a state
        self._checks: list[tuple[str, Run]] = []  # of ids that are looked up after a part has changed its state
        masked = check_streamable(owner, network)
        rules = dict(zip(network.names, step_rules(network), strict=True))
        places = {name: place for place, name in enumerate(network.inputs)}
        for call in network.calls.steps:
            node, name = call.node, network.names[call.nodes[0]]
            rule = rules[name]
            if isinstance(node, Products):
                rule = rule._replace(step=partial(node.product, weights=weights, threads=self.threads))
                node.layers_in(weights)  # an unsupported format is an error now, not in a step
            on = tuple(places[source] for source in call.sources)
            if call.layers is not None:
                place = self._kernel_call(call, on)
            elif rule.memory is not None:
                place = self._add_stateful(Memory(rule, self.rows, network.dtype, self.shared), on)
            else:
                run = step_function(owner, name, node, rule, name in masked)
                if node.takes_ids and self._stateful:
                    self._checks.append((call.sources[0], run))
                place = self._add(run, on)
            for number in call.nodes:
                places[network.names[number]] = place
                for state in network.graph.states[number]:
                    places[state.value] = place  # the node's output; other states are refused
        self._outputs = tuple(places[name] for name in network.outputs)
        # Whether some widths are known only in a call, and have to be checked there.
        known = all(network.shapes[name][-1] is not None for name in network.inputs if name not in network.graph.ids)
        self._late = any(network.graph.late) and not known
        plain = len(network.inputs) == 1 and network.input_size is not None and not self._late
        self.step_shape = (self.rows, network.input_size) if plain else None
        # In a state the cells come first, in the network's order, then mLSTMs, then the frames of other nodes.
        self._stateful.sort(key=lambda part: (isinstance(part, Memory), isinstance(part, Memories)))

    def _add(self, run: Run, on: tuple[int, ...]) -> int:
        """Add a part and return the index of its output."""
        self._parts.append((run, on))
        return len(self.network.inputs) + len(self._parts) - 1

    def _add_stateful(self, part: Stateful, on: tuple[int, ...]) -> int:
        self._stateful.append(part)
        return self._add(part.run, on)

    def _kernel_call(self, call: PlannedCall, on: tuple[int, ...]) -> int:
        """Add the parts of a call of the kernel and return the index of the output."""
        assert call.layers is not None
        of_cells = iter(self.network.patches_of(call.nodes))
        part_of = self._memories if call.layers.has_memories else self._cells
        for layers, added in call.layers.groups:
            patches = [None if isinstance(layer, Dense) else next(of_cells, None) for layer in layers]
            part = part_of(layers, patches)
            place = self._add_stateful(part, on)
            on = (self._add(lambda rows, x, y: np.add(x, y, out=y), (*on, place)) if added else place,)
        finish = call.layers.finish
        return on[0] if finish is None else self._add(lambda rows, y: finish(y), on)

    def _cells(self, layers: Sequence[Cell | Dense], patches: Sequence[CellPatches | None]) -> Stateful:
        if self.shared or any(patches):
            dtype = self.network.dtype
            return SharedCells(layers, self.weights, self.rows, self.threads, dtype, patches, self.shared)
        return OwnCells(layers, self.weights, self.rows, self.threads)

    def _memories(self, layers: Sequence[Dense | MLSTM], patches: Sequence[CellPatches | None]) -> Stateful:
        return Memories(layers, self.weights, self.rows, self.threads, self.network.dtype, patches, self.shared)

    def single_step(self, lock: native.CallLock) -> Callable[[Array], Array | None] | None:
        """Return the kernel's step function if the network is a single call of the kernel, else None.

        It has the least overhead. It returns None for an input that needs a conversion, and may during another call.

        Args:
            lock: the lock of the stream's other calls.
        """
        part = self._single_part()
        if isinstance(part, Memories) and not part.patches:
            return part.single_step(lock)
        return part.kernel.step if isinstance(part, OwnCells) else None

    def session_step(self, table: native.SessionTable) -> Callable[[Any, Any], Array | None] | None:
        """Return the same for sessions: a function of their numbers and the input, which also checks the sessions."""
        part = self._single_part()
        return part.session_step(table) if isinstance(part, SharedCells) and not part.patches else None

    def _single_part(self) -> Stateful | None:
        network, (first, *others) = self.network, self._stateful or [None]
        one = len(self._parts) == 1 and len(network.inputs) == len(network.outputs) == 1 and not network.graph.ids
        return first if one and not others else None

    @property
    def weights_format(self) -> str:
        """The number format of the matrices; also `"float32"` for a float64 network, which keeps float64."""
        own = self.network.weights
        return ("float32" if own == "float64" else own) if self.weights is None else self.weights

    @property
    def narrowed(self) -> bool:
        """Whether the number format of the matrices differs from the network's own."""
        return self.weights not in (None, "float32", self.network.weights)

    def with_memory(self) -> list[str]:
        """Return the names of the nodes with a memory of input steps."""
        rules = zip(self.network.names, step_rules(self.network), strict=True)
        return [name for name, rule in rules if rule.memory is not None]

    def copy_counts(self, other: Engine) -> None:
        """Continue the step counts, which patches use, from another engine of the same network."""
        for part, its in zip(self._stateful, other._stateful, strict=True):
            if isinstance(part, (SharedCells, Memories)) and isinstance(its, (SharedCells, Memories)):
                part.patches.set_counts(ALL, its.patches.counts(ALL))

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def checked_inputs(self, x: Any, axes: str, batch: int) -> tuple[Array, ...]:
        """Return the inputs, checked and contiguous, in the network's order.

        Args:
            x: as for `Network.run`.
            axes: the axes of ids, `"B"` for a step or `"B, T"` for a chunk.
            batch: the required number of rows.

        Raises:
            ShapeError, TypeError, ValueError: see `Stream.step`.
        """
        network, owner, chunk = self.network, self.owner, axes != "B"
        if len(network.inputs) == 1 and network.input_size is not None and not isinstance(x, dict):
            arrays = {network.inputs[0]: as_floats(owner, network.inputs[0], x, network.dtype)}
        else:
            arrays = network.as_inputs(owner, x)
        for name, array in arrays.items():
            if name in network.graph.ids:
                if array.ndim != (2 if chunk else 1):
                    raise ShapeError(f"{owner}: expected {name} (ids) [{axes}], got {array.shape}")
            else:
                check = check_sequence if chunk else check_step
                check(owner, array.shape, network.shapes[name][-1], name)
            first = next(iter(arrays.values()))
            if len(array) != batch:
                why = ", one step per session" if self.shared else ""
                fix = "" if self.shared or not len(array) else f": use net.stream(batch={len(array)})"
                raise ShapeError(f"{owner}: expected {name} with B={batch}{why}, got {array.shape}{fix}")
            if chunk and array.shape[1] != first.shape[1]:
                raise ShapeError(f"{owner}: expected {name} with T={first.shape[1]}, got {array.shape}")
        if self._late:  # no state has changed yet, so errors leave the engine as it was
            check_widths(network, arrays)
        for name, check in self._checks:
            check(ALL, arrays[name])
        return tuple(np.require(array, requirements=("C", "A")) for array in arrays.values())

    def run(self, given: tuple[Array, ...], rows: Rows = ALL) -> Any:
        """Run the next steps of some rows and return the network's output.

        After an exception all states are as before; if only one part has a state, it may also have completed the steps.

        Args:
            given: see `checked_inputs`.
            rows: the rows to step, if they are shared; no other call may use them at the same time.
        """
        values = list(given)
        kept = [(part, part.snapshot(rows)) for part in self._stateful] if len(self._stateful) > 1 else ()
        try:
            with np.errstate(all="ignore"):  # NaN and inf pass through, as they do in the kernel
                for run, sources in self._parts:
                    if len(sources) == 1:
                        values.append(run(rows, values[sources[0]]))
                    else:
                        values.append(run(rows, *[values[source] for source in sources]))
        except BaseException:  # such as the KeyboardInterrupt of a signal's handler
            for part, before in kept:
                part.restore(rows, before)
            raise
        return as_own([values[place] for place in self._outputs], given)

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, rows: Rows = ALL) -> tuple[CellState | Frames, ...]:
        """Return a copy of the state of some rows: a state per cell and mLSTM, then the `Frames` of other nodes."""
        return tuple(entry for part in self._stateful for entry in part.read(rows))

    def write(self, state: Sequence[Any], rows: Rows = ALL) -> None:
        """Set the state of some rows to a result of `as_state`; after an exception the state is as before."""
        entries = iter(state)
        new = [(part, [next(entries) for _ in part.kinds]) for part in self._stateful]
        old = [(part, part.read(rows)) for part in self._stateful]
        try:
            for part, own in new:
                part.write(rows, own)
        except BaseException:
            for part, own in old:
                part.write(rows, own)
            raise

    def as_state(self, state: Any, batch: int) -> list[CellState | Frames]:
        """Check a state of some rows and return it in the form for `write`.

        Args:
            state: a state per cell and mLSTM, then the `Frames` of other nodes; None, for all or for a cell: the
                initial state.
            batch: the number of rows.

        Raises:
            ShapeError: the number or the shapes of the entries are wrong.
        """
        owner, cells = self.owner, self.network.stateful
        starts = [
            kind(**{name: np.broadcast_to(start, (batch, *start.shape)) for name, start in fields.items()})
            for part in self._stateful
            for kind, fields in zip(part.kinds, part.initial(), strict=True)
        ]
        count = len(starts) - len(cells)
        if state is None:
            return starts
        flat = sum(len(cell.state_shapes) for cell in cells)
        if count and (not isinstance(state, Sequence) or len(state) - count not in (len(cells), flat)):
            got = len(state) if isinstance(state, Sequence) else type(state).__name__
            raise ShapeError(
                f"{owner}: expected state to be a tuple of {len(cells)} states, one per cell, and {count} Frames, one "
                f"per node with a memory, got {got}"
            )
        of_cells, frames = (tuple(state[:-count]), state[-count:]) if count else (state, ())
        entries: list[Any] = list(as_states(owner, of_cells, cells, batch))
        for given, start in zip(frames, starts[len(cells) :], strict=True):
            array = as_floats(owner, "Frames", given.x if isinstance(given, Frames) else given, self.network.dtype)
            if array.shape != start[0].shape:
                expected = list(start[0].shape)
                raise ShapeError(f"{owner}: expected Frames {expected} in the state, got {array.shape}")
            entries.append(Frames(array))
        return [start if entry is None else entry for entry, start in zip(entries, starts, strict=True)]
