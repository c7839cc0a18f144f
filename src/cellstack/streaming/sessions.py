"""A Sessions: many sessions of one network, of which those that have a frame now are stepped together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.streaming.engine import Engine

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.base import CellState
    from cellstack.streaming.parts import Frames

Slots = NDArray[np.int64]


class Sessions:
    """Sessions that come and go, each with a state of its own; one step serves any of them, batched.

    The kernel reads and writes the states of the sessions that are stepped, where they lie; all others aren't touched.
    A step gives each session the bits that a stream of its own would give it. Opening, closing and stepping are safe
    from any thread: steps of different sessions run side by side, a session that is being stepped is refused.

    Args:
        network: one that streams: see `Stream`.
        capacity: how many sessions may be open at a time. The memory of a state, a few KB, is taken at
            its first use.
        threads: how many the kernel may use for a step.
        weights: what the matrices of cells are held in, `"float32"`, `"bfloat16"` or `"int8"`: see `Stream`; None: as
            the network has them.

    Raises:
        ValueError: a network that can't be streamed, which the message names; a number that isn't 1 to 2^31 - 1;
            unknown weights.
        TypeError: fewer bits for a float64 network.
        MemoryError: more states than the machine can reserve memory for.

    >>> from cellstack import Cell, CellSpec, Network, Recurrent
    >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
    >>> pool = Network([Recurrent((cell,))]).pool(capacity=100)
    >>> anna, bert, carl = (pool.open() for _ in range(3))
    >>> pool.step([carl, anna], [[1, 2], [3, 4]]).shape
    (2, 3)
    >>> pool.close(bert)
    >>> len(pool)
    2
    """

    def __init__(self, network: Network, capacity: int, threads: int = 1, weights: str | None = None) -> None:
        self._engine = engine = Engine("Sessions", network, ("capacity", capacity), threads, weights, shared=True)
        self.network, self.capacity, self.threads, self.weights = network, engine.rows, engine.threads, engine.held
        # A session's number is its slot, and how often the slot was given away before: a number that was closed stays
        # unknown. The count includes the open session: zeros are memory that isn't taken before it is written to.
        self._rounds = np.zeros(self.capacity, np.int64)
        self._open = np.zeros(self.capacity, bool)
        self._turns = native.Turns(self.capacity)  # of slots that are opened, stepped, read or closed

    def open(self, state: Any = None) -> int:
        """Open a session.

        Args:
            state: what it starts from, as `state` and `Stream.state` give it, of one row; None = the cells' own initial
                state.

        Returns:
            The session's number, never given twice.

        Raises:
            RuntimeError: as many sessions are open as the pool has room for.
            ShapeError: a state that doesn't fit.
        """
        new, slot = self._engine.as_state(state, 1), None
        try:
            with self._turns.free(self._open) as slot:
                if slot is None:
                    raise RuntimeError(
                        f"Sessions: expected at most {self.capacity} open sessions, got another: close() one"
                    )
                self._engine.write(new, np.array([slot]))
                self._rounds[slot] += 1
                self._open[slot] = True
                return slot + self.capacity * (int(self._rounds[slot]) - 1)
        except BaseException:  # such as the KeyboardInterrupt of a signal's handler: nobody would know the number
            if slot is not None:
                self._open[slot] = False
            raise

    def _slots(self, sessions: Any) -> tuple[Slots, Slots]:
        """Return the numbers of sessions and their slots."""
        numbers = np.asarray(sessions)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(
                f"Sessions: expected sessions as a list of the numbers that open() gave, got {sessions!r:.100}"
            )
        numbers = numbers.astype(np.int64)
        return numbers, numbers % self.capacity

    def _check(self, numbers: Slots, slots: Slots, taken: tuple[int, bool] | None) -> None:
        """Raise unless these are open sessions, each once, whose slots this call has taken."""
        known = self._open[slots] & (self._rounds[slots] == numbers // self.capacity + 1)
        if not known.all():
            raise KeyError(f"Sessions: expected open sessions, got {int(numbers[~known][0])}, which isn't one")
        if taken is not None:
            place, twice = taken
            if twice:
                raise ValueError(f"Sessions: expected each session once in a step, got {numbers[place]} twice")
            raise RuntimeError(
                f"Sessions: expected sessions that no other thread steps, got {numbers[place]}, which one does"
            )

    def step(self, sessions: Any, x: Any) -> Any:
        """Take one frame of each of some sessions and return what the network returns after it.

        Args:
            sessions: n numbers that `open` gave, in any order, each once.
            x: `[n, I]`, a frame a session, cast as in `Network.run`; ids are `[n]`. Where there are several inputs, a
                dict by name, or a tuple in order.

        Returns:
            `[n, W]`, the caller's own; a tuple of these where there are several outputs.

        Raises:
            KeyError: a number that is no open session's.
            RuntimeError: a session that another thread is stepping.
            ShapeError: another number of frames, or a wrong width.
            TypeError: numbers that aren't integers, values that aren't real numbers.
            ValueError: a session twice, ids beyond a table, or a frame that the network masks.
        """
        numbers, slots = self._slots(sessions)
        given = self._engine.given(x, "B", len(numbers))
        with self._turns.turn(slots) as taken:
            self._check(numbers, slots, taken)
            return self._engine.run(given, slots)

    def state(self, session: int) -> tuple[CellState | Frames, ...]:
        """Return a session's state, copies, which a `Stream` or `open` takes.

        Args:
            session: a number that `open` gave.

        Returns:
            One state a cell, each array `[1, H]`, then the `Frames` of each node that keeps some.

        Raises:
            KeyError, RuntimeError, TypeError: see `step`.
        """
        numbers, slots = self._slots([session])
        with self._turns.turn(slots) as taken:
            self._check(numbers, slots, taken)
            return self._engine.read(slots)

    def close(self, session: int) -> None:
        """Forget a session; its room is another's.

        Args:
            session: a number that `open` gave.

        Raises:
            KeyError, RuntimeError, TypeError: see `step`.
        """
        numbers, slots = self._slots([session])
        with self._turns.turn(slots) as taken:
            self._check(numbers, slots, taken)
            self._open[slots] = False

    def __len__(self) -> int:
        return int(self._open.sum())

    def __repr__(self) -> str:
        weights = f", weights={self.weights!r}" if self._engine.narrowed else ""
        return f"Sessions({len(self)} of {self.capacity} sessions open{weights}) of {self.network!r}"
