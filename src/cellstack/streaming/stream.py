"""`Stream`: a Network that runs step by step, with its own state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native
from cellstack.network.arguments import OwnState
from cellstack.nodes.checks import check_integer
from cellstack.streaming.engine import Engine
from cellstack.streaming.history import History
from cellstack.streaming.parts import ALL

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace
    from cellstack.network import Network
    from cellstack.nodes.base import Array, CellState
    from cellstack.streaming.parts import Frames


class Stream:
    """Run a network step by step, or in chunks of steps of any length with the same bits.

    The state is stored in the kernel; the weights are shared with the network and never changed. Only one thread at a
    time can use a stream (a call during another call is a `RuntimeError`); different streams are independent.

    Args:
        network: a network whose nodes can all run step by step (forward cells, causal convolutions and pools,
            `GlobalPool("last")`, and nodes that treat each step separately), and whose inputs are all sequences or ids.
        batch: the number B of sequences that run in parallel.
        threads: the largest number of threads per call. They share the rows, or, for a chunk in a stack, the layers. A
            call of less than some 50 µs uses one thread. The bits don't depend on it.
        weights: the number format of the matrices: None: the network's own; `"float32"`; `"bfloat16"`: rounded
            to 8 bits of precision, as are x and h in products; `"int8"`: integers from -127 to 127 with a scale per
            column, and x and h quantised likewise. At batch 1 the time of a step is the time to read its weights.

    Raises:
        ValueError: a node that needs the whole sequence, or an input without a time axis; a batch outside 1 to
            2^31 - 1; unknown weights.
        TypeError: bfloat16 or int8 for a float64 network.
        MemoryError: not enough memory for the state.

    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
    >>> net = Network([Recurrent((cell,), return_sequences=False)])
    >>> x = np.arange(10.0).reshape(1, 5, 2)
    >>> stream = net.stream()
    >>> for t in range(5):
    ...     y = stream.step(x[:, t])
    >>> bool((y == net(x)).all())
    True
    """

    def __init__(self, network: Network, batch: int = 1, threads: int = 1, weights: str | None = None) -> None:
        self._engine = engine = Engine("Stream", network, ("batch", batch), threads, weights, shared=False)
        self.network, self.batch, self.threads, self.weights = (
            network,
            engine.rows,
            engine.threads,
            engine.weights_format,
        )
        self._lock = native.CallLock()
        self._single_step = engine.single_step(self._lock)
        self._step_shape = engine.step_shape
        self._dtype = network.dtype
        self._history: History | None = None

    def step(self, x: Any) -> Any:
        """Run one step and return the network's output after it.

        Args:
            x: `[B, I]`, array-like of real numbers, cast as in `Network.run`; ids are `[B]`. Several inputs are a dict
                by name, or a tuple in order.

        Returns:
            `[B, W]`, owned by the caller; a tuple of these if there are several outputs.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
            ValueError: ids out of range, or a step that the network masks.
        """
        if (
            self._single_step is not None
        ):  # the least overhead; it returns None if the input needs checks or a conversion
            y = self._single_step(x)
            if y is not None:
                return y
        elif type(x) is np.ndarray and x.dtype is self._dtype and x.shape == self._step_shape and x.flags.carray:
            return self._run((x,))
        return self._run(self._engine.checked_inputs(x, "B", self.batch))

    def run(self, x: Any) -> Any:
        """Run a chunk of steps and return the network's output after each, with the same bits as `step`.

        Args:
            x: `[B, T, I]`, as for `step`, ids `[B, T]`; T may be 0.

        Returns:
            `[B, T, W]`, also if the network itself doesn't return sequences; a tuple if there are several outputs.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
            ValueError: ids out of range, or a step that the network masks.
        """
        return self._run(self._engine.checked_inputs(x, "B, T", self.batch), chunk=True)

    def _run(self, given: tuple[Array, ...], chunk: bool = False) -> Any:
        with self._lock.attempt() as locked:
            self._check_turn(locked)
            if self._history is None:
                return self._engine.run(given)
            before = self._engine.read() if self._history.wants_state else None
            try:
                y = self._engine.run(given)
                self._history.add(before, given, chunk)
            except BaseException:  # the state may have changed without the step being recorded
                self._history.forget()
                raise
            return y

    @staticmethod
    def _check_turn(locked: bool) -> None:
        """Raise `RuntimeError` during another call, when some parts may be a step ahead of others."""
        if not locked:
            raise RuntimeError(
                "Stream: only one thread at a time can use a stream, and another call is running: "
                "fork() makes a stream for each thread"
            )

    @property
    def state(self) -> tuple[CellState | Frames, ...]:
        """The current state: a state per cell, each array `[B, H]`, then the `Frames` of each node with a memory.

        Reading returns copies; setting checks and copies.
        """
        with self._lock.attempt() as locked:
            self._check_turn(locked)
            return self._engine.read()

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            raise TypeError("Stream: expected state to be a tuple of states, got None: use reset()")
        self.reset(state=state)

    def reset(self, rows: Any = None, state: Any = None) -> None:
        """Set the state of some or all rows to the initial state or to a given state.

        Args:
            rows: an index of the batch axis: an integer, integers, a slice, a mask `[B]`; None: all rows.
            state: a state per cell, each array `[rows, H]`, then the `Frames` of each node with a memory; None: the
                initial state, which is learned or zeros.

        Raises:
            ShapeError: a state that doesn't match the rows.
            IndexError: a row out of range, or an invalid index.
        """
        places = np.arange(self.batch)
        try:
            if isinstance(rows, (bool, np.bool_)):
                raise TypeError("a mask needs one flag per row")
            chosen = places if rows is None else places[rows].reshape(-1)
        except (IndexError, TypeError, ValueError) as error:
            raise IndexError(
                f"Stream: expected rows to index an axis of B={self.batch}, got {rows!r:.80}: {error}"
            ) from None
        new = self._engine.as_state(state, len(chosen))
        with self._lock.attempt() as locked:
            self._check_turn(locked)
            self._engine.write(new, ALL if rows is None else chosen)
            if self._history is not None:
                self._history.forget()

    def remember(self, steps: int) -> None:
        """Start recording what `trace` needs: the inputs of the last steps, and the state before them.

        Each step then also copies its input, and the state is copied once every `steps` steps.

        Args:
            steps: the number of steps that `trace` can return; up to twice as many are stored.

        Raises:
            ValueError: not an integer from 1 to 2^31 - 1. Or the network can't be run from an intermediate state: it
                has patches or a node with a memory, or the stream has other weights than the network.
        """
        steps = check_integer("Stream", "steps", steps)
        if self._engine.narrowed:
            own = self.network.weights
            raise ValueError(f"Stream: expected weights={own!r} to trace, got {self.weights!r}")
        if self.network.patches:
            raise ValueError(
                f"Stream: remember() doesn't support patches, got {self.network.patches[0]}: trace the network itself "
                "over a sequence"
            )
        if nodes := self._engine.with_memory():
            raise ValueError(f"Stream: remember() doesn't support nodes with a memory, got {', '.join(nodes)}")
        with self._lock.attempt() as locked:
            self._check_turn(locked)
            self._history, self._single_step = History(steps), None

    def trace(self, steps: int | None = None) -> NetworkTrace:
        """Return a trace of the last steps: see `Network.trace`.

        The steps are run again from the state before them, with the same bits. Setting or resetting the state drops the
        recorded steps.

        Args:
            steps: the largest number of steps; None: the number passed to `remember`.

        Returns:
            The trace.

        Raises:
            RuntimeError: `remember` wasn't called, or no step was taken since.

        >>> from cellstack import CellSpec, Network
        >>> from cellstack.nodes import Cell, Recurrent
        >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
        >>> stream = Network([Recurrent((cell,))]).stream()
        >>> stream.remember(100)
        >>> y = [stream.step(x) for x in np.arange(10.0).reshape(5, 1, 2)]
        >>> t = stream.trace(2)
        >>> t["layer_0"].f.shape, bool((t.y[:, 1] == y[4]).all())
        ((1, 2, 3), True)
        """
        if self._history is None:
            raise RuntimeError("Stream: trace() needs a call of remember(steps) before the steps")
        most = self._history.most if steps is None else check_integer("Stream", "steps", steps)
        with self._lock.attempt() as locked:
            self._check_turn(locked)
            kept = self._history.recorded()
        if kept is None:
            raise RuntimeError("Stream: no step was taken since remember() or since the state was set")
        state, arrays = kept
        whole = self.network.trace(dict(zip(self.network.inputs, arrays, strict=True)), OwnState(state))
        first = max(0, len(whole.steps) - min(most, self._history.most))
        return whole.select(steps=slice(first, None))

    def fork(self) -> Stream:
        """Return a new stream with a copy of this one's state."""
        other = Stream(self.network, self.batch, self.threads, self._engine.weights)
        other._engine.write(self.state)  # unchecked: patches and NaN may lead to numbers that a caller can't set
        other._engine.copy_counts(self._engine)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "Stream: can't be copied or pickled: fork() returns a new stream with the same state; to store a stream, "
            "pickle its network and its state, and set the state of a new one"
        )

    def __repr__(self) -> str:
        threads = "" if self.threads == 1 else f", threads={self.threads}"
        weights = f", weights={self.weights!r}" if self._engine.narrowed else ""
        return f"Stream(batch={self.batch}{threads}{weights}) of {self.network!r}"
