"""A Sessions: many sessions of one network, of which those that have a frame now are stepped together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import _kernel
from cellstack.arguments import as_floats, as_states
from cellstack.network import Network
from cellstack.nodes import Recurrent
from cellstack.nodes.base import MOST, Array, CellState
from cellstack.nodes.recurrent import Cell
from cellstack.spec import STATES, ShapeError, check_step
from cellstack.streaming.framewise import Run, answers_framewise, check_widths, frame_rules, framewise

Slots = NDArray[np.int64]


class Sessions:
    """Sessions that come and go, each with a state of its own; one step serves any of them, batched.

    The kernel reads and writes the states of the sessions that are stepped, where they lie; all others aren't touched.
    A step gives each session the bits that a stream of its own would give it. Opening, closing and stepping are safe
    from any thread: steps of different sessions run side by side, a session that is being stepped is refused.

    Args:
        network: a network of one input and one output whose nodes answer frame by frame and keep nothing but the states
            of cells: see `Stream`; causal convolutions keep frames, and aren't served.
        capacity: how many sessions may be open at a time. Their states are held from the start, a few KB each.
        threads: how many the kernel may use for a step.

    Raises:
        ValueError: a network that can't be served, which the message names; a number that isn't 1 to 2^31 - 1.
        MemoryError: states that memory can't hold.

    >>> from cellstack import Cell, CellSpec
    >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
    >>> pool = Network([Recurrent((cell,))]).pool(capacity=100)
    >>> anna, bert, carl = (pool.open() for _ in range(3))
    >>> pool.step([carl, anna], [[1, 2], [3, 4]]).shape
    (2, 3)
    >>> pool.close(bert)
    >>> len(pool)
    2
    """

    def __init__(self, network: Network, capacity: int, threads: int = 1) -> None:
        for name, value in (("capacity", capacity), ("threads", threads)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= MOST:
                raise ValueError(f"Sessions: expected {name} to be an integer from 1 to {MOST}, got {value!r}")
        if len(network.inputs) != 1 or len(network.outputs) != 1:
            raise ValueError("Sessions: expected a network of one input and one output")
        answers_framewise("Sessions", network)
        self.network, self.capacity, self.threads = network, int(capacity), int(threads)
        self._states = [
            [np.zeros((self.capacity, size), network.dtype) for size in cell.spec.state_sizes.values()]
            for cell in network.cells
        ]
        left = iter(self._states)
        places = {name: place for place, name in enumerate((*network.inputs, *network.names))}
        self._parts: list[tuple[Run, tuple[int, ...]]] = []
        rules = frame_rules(network)
        for name, node, sources, rule in zip(network.names, network.nodes, network.wires, rules, strict=True):
            if isinstance(node, Recurrent):
                part = self._recurrent(node, left)
            else:
                part = framewise(name, node, rule, masked=False)
                if part is None:
                    raise ValueError(
                        f"Sessions: expected nodes that keep nothing but the states of cells, got {name}: "
                        f"{node.summary}"
                    )
            self._parts.append((part, tuple(places[source] for source in sources)))
        self._late = any(network.graph.late)  # widths that only a call brings
        self._output = places[network.outputs[0]]
        self._lock = threading.Lock()
        # A session's number is its slot, and how often the slot was given away before: a number that was closed stays
        # unknown.
        self._rounds = np.zeros(self.capacity, np.int64)
        self._open = np.zeros(self.capacity, bool)
        self._busy = np.zeros(self.capacity, bool)
        self._free = list(range(self.capacity - 1, -1, -1))

    def _recurrent(self, node: Recurrent, states: Iterator[list[Array]]) -> Run:
        parts = []
        for cells, added in node.parts:
            held = [next(states) for _ in cells]
            ends = [(*arrays, None)[:2] for arrays in held]
            parts.append(([cell.packed for cell in cells], ends, cells[-1].spec.output_size, added))

        def run(slots: Any, x: Array) -> Array:
            for packed, ends, width, added in parts:
                x = np.ascontiguousarray(x)
                y = np.empty((len(x), width), x.dtype)
                layers = [
                    _kernel.Layer(weights, *end, *end, y=y if n == len(packed) else None)
                    for n, (weights, end) in enumerate(zip(packed, ends, strict=True), start=1)
                ]
                frames = _kernel.Sequences(len(x), 1, x, x.shape[1], x.shape[1], places=slots)
                _kernel.forward(frames, layers, self.threads)
                x = np.add(x, y, out=y) if added else y
            return x

        return run

    def open(self, state: Any = None) -> int:
        """Open a session.

        Args:
            state: what it starts from: one state a cell, each array `[1, H]`; None = the cells' own initial state.

        Returns:
            The session's number, never given twice.

        Raises:
            RuntimeError: as many sessions are open as the pool has room for.
            ShapeError: a state that doesn't fit.
        """
        given = as_states("Sessions", state, self.network.cells, 1)
        with self._lock:
            if not self._free:
                raise RuntimeError(
                    f"Sessions: expected at most {self.capacity} open sessions, got another: close() one"
                )
            slot = self._free.pop()
            for cell, arrays, values in zip(self.network.cells, self._states, given, strict=True):
                for array, value in zip(arrays, self._start(cell, values), strict=True):
                    array[slot] = value
            self._open[slot] = True
            return slot + self.capacity * int(self._rounds[slot])

    @staticmethod
    def _start(cell: Cell, given: CellState | None) -> list[Any]:
        if given is not None:
            return [array[0] for array in given]
        return [cell.arrays.get(f"initial_{name}", 0.0) for name in cell.spec.state_sizes]

    def _slots(self, sessions: Any) -> Slots:
        """Return the slots of open sessions that nobody steps. The lock must be held."""
        numbers = np.asarray(sessions)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(
                f"Sessions: expected sessions as a list of the numbers that open() gave, got {sessions!r:.100}"
            )
        numbers = numbers.astype(np.int64)
        slots = numbers % self.capacity
        known = self._open[slots] & (self._rounds[slots] == numbers // self.capacity)
        if not known.all():
            raise KeyError(f"Sessions: expected open sessions, got {int(numbers[~known][0])}, which isn't one")
        if self._busy[slots].any():
            busy = int(numbers[self._busy[slots]][0])
            raise RuntimeError(f"Sessions: expected sessions that no other thread steps, got {busy}, which one does")
        if len(np.unique(slots)) != len(slots):
            raise ValueError("Sessions: expected each session once in a step, got one twice: step it twice")
        return slots

    @contextmanager
    def _held(self, sessions: Any) -> Iterator[Slots]:
        """Give the slots of sessions that nobody else touches meanwhile."""
        with self._lock:
            slots = self._slots(sessions)
            self._busy[slots] = True
        try:
            yield slots
        finally:
            with self._lock:
                self._busy[slots] = False

    def step(self, sessions: Any, x: Any) -> Array:
        """Take one frame of each of some sessions and return what the network returns after it.

        Args:
            sessions: n numbers that `open` gave, in any order, each once.
            x: `[n, I]`, a frame a session, cast as in `Network.run`; ids are `[n]`.

        Returns:
            `[n, W]`, the caller's own.

        Raises:
            KeyError: a number that is no open session's.
            RuntimeError: a session that another thread is stepping.
            ShapeError: another number of frames, or a wrong width.
            TypeError: numbers that aren't integers, values that aren't real numbers.
            ValueError: a session twice.
        """
        network, name = self.network, self.network.inputs[0]
        if name in network.graph.ids:
            x = network.as_inputs("Sessions", x)[name]
            if x.ndim != 1:
                raise ShapeError(f"Sessions: expected {name} [n], ids, got {x.shape}")
        else:
            x = np.require(as_floats("Sessions", name, x, network.dtype), requirements=("C", "A"))
            check_step("Sessions", x.shape, network.input_size, name)
        if self._late:
            check_widths(network, {name: x})
        with self._held(sessions) as slots:
            if len(x) != len(slots):
                raise ShapeError(f"Sessions: expected a frame for each of {len(slots)} sessions, got {x.shape}")
            values = [x]
            with np.errstate(all="ignore"):
                for part, sources in self._parts:
                    values.append(part(slots, *(values[source] for source in sources)))
        y = np.ascontiguousarray(values[self._output])
        return y.copy() if np.may_share_memory(y, x) else y

    def state(self, session: int) -> tuple[CellState, ...]:
        """Return a session's state: one a cell, each array `[1, H]`, copies; a `Stream` or `open` takes it.

        Args:
            session: a number that `open` gave.

        Raises:
            KeyError, RuntimeError, TypeError: see `step`.
        """
        with self._held([session]) as slots:
            return tuple(
                STATES[cell.spec.kind](*(array[slots] for array in arrays))
                for cell, arrays in zip(self.network.cells, self._states, strict=True)
            )

    def close(self, session: int) -> None:
        """Forget a session; its room is another's.

        Args:
            session: a number that `open` gave.

        Raises:
            KeyError, RuntimeError, TypeError: see `step`.
        """
        with self._lock:
            slot = int(self._slots([session])[0])
            self._open[slot] = False
            self._rounds[slot] += 1
            self._free.append(slot)

    def __len__(self) -> int:
        return int(self._open.sum())

    def __repr__(self) -> str:
        return f"Sessions({len(self)} of {self.capacity} sessions open) of {self.network!r}"
