"""`Sessions`: a pool of sessions of one network; the sessions with a new step are stepped together."""

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


class Sessions:
    """A pool of sessions that are opened and closed at any time, each with its own state; any of them step in a batch.

    The kernel updates the states of the stepped sessions in place and doesn't access the others. Each session gets the
    same bits as from a separate stream. All methods are thread-safe: steps of different sessions run concurrently; a
    session that another thread is stepping is refused.

    Args:
        network: a network that can be streamed: see `Stream`.
        capacity: the largest number of open sessions. A session's state, a few KB, is allocated when it is first used.
        threads: the number of threads that the kernel may use for a step.
        weights: the number format of the matrices, `"float32"`, `"bfloat16"` or `"int8"`: see `Stream`; None:
            the network's own.

    Raises:
        ValueError: a network that can't be streamed (the message names the node); a number outside 1 to 2^31 - 1;
            unknown weights.
        TypeError: bfloat16 or int8 for a float64 network.
        MemoryError: more states than the machine can reserve memory for.

    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
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
        self.network, self.capacity, self.threads, self.weights = (
            network,
            engine.rows,
            engine.threads,
            engine.weights_format,
        )
        self._table = native.SessionTable(self.capacity)
        self._step = engine.session_step(self._table)

    def open(self, state: Any = None) -> int:
        """Open a session.

        Args:
            state: its initial state, one row, as returned by `state` or `Stream.state`; None: the cells' initial state.

        Returns:
            The session's number, which is never reused.

        Raises:
            RuntimeError: `capacity` sessions are open.
            ShapeError: a state of the wrong shape.
        """
        new, number = self._engine.as_state(state, 1), None
        try:
            with self._table.opening() as number:
                if number is None:
                    raise RuntimeError(f"Sessions: all {self.capacity} sessions are open: close() one first")
                self._engine.write(new, np.array([number % self.capacity]))
            return number
        except BaseException:  # such as KeyboardInterrupt from a signal handler: the caller doesn't get the number
            if number is not None:
                self._table.close(number)
            raise

    def _numbers(self, sessions: Any) -> NDArray[np.int64]:
        numbers = np.asarray(sessions)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(
                f"Sessions: expected sessions as a list of numbers that open() returned, got {sessions!r:.100}"
            )
        return np.require(numbers, np.int64, ("C", "A"))

    def step(self, sessions: Any, x: Any) -> Any:
        """Run one step of each of some sessions and return the network's outputs.

        Args:
            sessions: n numbers that `open` returned, in any order, each once.
            x: `[n, I]`, one step per session, cast as in `Network.run`; ids are `[n]`. Several inputs are a dict by
                name, or a tuple in order.

        Returns:
            `[n, W]`, owned by the caller; a tuple of these if there are several outputs.

        Raises:
            KeyError: a session that isn't open.
            RuntimeError: a session that another thread is stepping.
            ShapeError: a wrong number of steps, or a wrong width.
            TypeError: session numbers that aren't integers, values that aren't real numbers.
            ValueError: the same session twice, ids out of range, or a step that the network masks.
        """
        numbers = np.asarray(sessions)
        if self._step is not None:  # the least overhead; it returns None if the input needs checks or a conversion
            y = self._step(numbers, x)
            if y is not None:
                return y
        numbers = self._numbers(sessions)
        given = self._engine.checked_inputs(x, "B", len(numbers))
        with self._table.locked(numbers) as slots:
            return self._engine.run(given, slots)

    def state(self, session: Any) -> tuple[CellState | Frames, ...]:
        """Return a copy of a session's state, for `open` or a `Stream`; or those of several sessions.

        Args:
            session: a number that `open` returned, or n different ones.

        Returns:
            A state per cell, each array `[1, H]`, then the `Frames` of each node with a memory; for several sessions
            each array has n rows.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: see `step`.
        """
        with self._table.locked(self._numbers([session] if np.ndim(session) == 0 else session)) as slots:
            return self._engine.read(slots)

    def close(self, session: int) -> None:
        """Close a session and free its slot.

        Args:
            session: a number that `open` returned.

        Raises:
            KeyError, RuntimeError, TypeError: see `step`.
        """
        numbers = self._numbers([session])
        with self._table.locked(numbers):
            self._table.close(int(numbers[0]))

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "Sessions: can't be copied or pickled: pickle the network and the state(session) of each session, and "
            "pass each state to open() of a new pool"
        )

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        weights = f", weights={self.weights!r}" if self._engine.narrowed else ""
        return f"Sessions({len(self)} of {self.capacity} sessions open{weights}) of {self.network!r}"
