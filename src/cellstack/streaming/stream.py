"""A Stream: a Network run frame by frame, with a state that is the stream's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native
from cellstack.nodes.base import check_integer
from cellstack.streaming.engine import Engine
from cellstack.streaming.history import History
from cellstack.streaming.parts import ALL

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace
    from cellstack.network import Network
    from cellstack.nodes.base import Array, CellState
    from cellstack.streaming.parts import Frames


class Stream:
    """Frames in, what the network returns after each frame out; any chunking gives the same bits.

    The state lies in the kernel; the weights are the network's, shared and never written. A stream belongs to one
    thread at a time, and a call while another one runs is a `RuntimeError`; different streams don't touch.

    Args:
        network: whose nodes all answer after every frame: cells that run forwards, causal convolutions and pools,
            `GlobalPool("last")`, and what works step by step; and whose inputs are all sequences or ids.
        batch: how many sequences are stepped side by side, B.
        threads: the most that share a call, each with some of the rows, or, where a chunk goes through a stack, some of
            the layers. A call of less than some 50 µs keeps to one. The bits are the same.
        weights: what the matrices of cells are held in: None, as the network has them; `"float32"`; `"bfloat16"`,
            rounded to 8 bits of precision, as are x and h where they meet them; `"int8"`, in 127 steps to either side,
            a scale a column, and x and h in as many steps of their own. A step at batch 1 is as fast as its weights can
            be read.

    Raises:
        ValueError: a node that needs the whole sequence before it can answer, or an input without time; a batch that
            isn't 1 to 2^31 - 1; unknown weights.
        TypeError: fewer bits for a float64 network.
        MemoryError: a state that memory can't hold.

    >>> from cellstack import Cell, CellSpec, Network, Recurrent
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
        self.network, self.batch, self.threads, self.weights = network, engine.rows, engine.threads, engine.held
        self._turns = native.Turns(1)
        self._alone = engine.alone()
        self._frame = engine.frame
        self._dtype = network.dtype
        self._history: History | None = None

    def step(self, x: Any) -> Any:
        """Take one frame and return what the network returns after it.

        Args:
            x: `[B, I]`, array-like of real numbers, cast as in `Network.run`; ids are `[B]`. Where there are several
                inputs, a dict by name, or a tuple in order.

        Returns:
            `[B, W]`, the caller's own; a tuple of these where there are several outputs.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
            ValueError: ids beyond a table, or a frame that the network masks.
        """
        if self._alone is not None:  # the shortest way from Python to the kernel, which takes what is as it should be
            y = self._alone(x)
            if y is not None:
                return y
        elif type(x) is np.ndarray and x.dtype is self._dtype and x.shape == self._frame and x.flags.carray:
            return self._run((x,))
        return self._run(self._engine.given(x, "B", self.batch))

    def run(self, x: Any) -> Any:
        """Take any number of frames and return what the network returns after each: the bits are those of `step`.

        Args:
            x: `[B, T, I]`, as for `step`, ids `[B, T]`; T may be 0.

        Returns:
            `[B, T, W]`, whether or not the network itself returns sequences; a tuple where there are several outputs.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
            ValueError: ids beyond a table, or a frame that the network masks.
        """
        return self._run(self._engine.given(x, "B, T", self.batch), chunk=True)

    def _run(self, given: tuple[Array, ...], chunk: bool = False) -> Any:
        with self._turns.turn() as taken:
            self._check_turn(taken)
            if self._history is None:
                return self._engine.run(given)
            before = self._engine.read() if self._history.wants_state else None
            try:
                y = self._engine.run(given)
                self._history.add(before, given, chunk)
            except BaseException:  # the state may have moved on without the frame: what was is of no use any more
                self._history.forget()
                raise
            return y

    @staticmethod
    def _check_turn(taken: Any) -> None:
        """Raise `RuntimeError` where another call runs: it would find some parts a step ahead of others."""
        if taken is not None:
            raise RuntimeError("Stream: expected one thread at a time, got a call while another one runs: fork()")

    @property
    def state(self) -> tuple[CellState | Frames, ...]:
        """The state now: one state a cell, each array `[B, H]`, then the `Frames` of each node that keeps some.

        These are copies. Setting the state checks and copies likewise.
        """
        with self._turns.turn() as taken:
            self._check_turn(taken)
            return self._engine.read()

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            raise TypeError("Stream: expected state to be a tuple of states, got None: reset() starts anew")
        self.reset(state=state)

    def reset(self, rows: Any = None, state: Any = None) -> None:
        """Set the state of some rows, or of all, to the cells' own initial state or to a state given.

        Args:
            rows: what indexes an axis of B: a number, numbers, a slice, a mask `[B]`; None = all rows.
            state: one state a cell, each array `[rows, H]`, then the frames of each node that keeps some; None = what
                the stream began with: the cells' learned initial state, or zeros.

        Raises:
            ShapeError: a state that doesn't fit the rows.
            IndexError: a row that isn't there, or what indexes no rows.
        """
        places = np.arange(self.batch)
        try:
            if isinstance(rows, (bool, np.bool_)):
                raise TypeError("a flag for all rows is one a row, or none")
            chosen = places if rows is None else places[rows].reshape(-1)
        except (IndexError, TypeError, ValueError) as error:
            raise IndexError(
                f"Stream: expected rows to index an axis of B={self.batch}, got {rows!r:.80}: {error}"
            ) from None
        new = self._engine.as_state(state, len(chosen))
        with self._turns.turn() as taken:
            self._check_turn(taken)
            self._engine.write(new, ALL if rows is None else chosen)
            if self._history is not None:
                self._history.forget()

    def remember(self, steps: int) -> None:
        """Keep from now on what `trace` needs: the frames of the last steps, and a state from before them.

        A step costs a copy of its frame more, and every so many steps one of the state.

        Args:
            steps: how many `trace` shall be able to show; up to twice as many are kept.

        Raises:
            ValueError: not an integer from 1 to 2^31 - 1; weights of fewer bits, a node that keeps frames of its own,
                or patches, as a trace is run by the network itself, from a step in between.
        """
        steps = check_integer("Stream", "steps", steps)
        if self._engine.narrowed:
            own = self.network.weights
            raise ValueError(f"Stream: expected weights={own!r} to trace, got {self.weights!r}")
        if self.network.patches:
            raise ValueError(
                f"Stream: expected a network without patches to remember, got {self.network.patches[0]}: trace the "
                "network itself over a sequence"
            )
        if keeps := self._engine.keeps_frames():
            raise ValueError(f"Stream: expected cells alone to keep a state, to trace them, got {', '.join(keeps)}")
        with self._turns.turn() as taken:
            self._check_turn(taken)
            self._history, self._alone = History(steps), None

    def trace(self, steps: int | None = None) -> NetworkTrace:
        """Return what every node and cell did in the last steps: see `Network.trace`.

        The steps are run again from a state before them, and have the bits that they had. A state that is set or reset
        begins anew.

        Args:
            steps: how many, at most; None = as many as `remember` was told.

        Raises:
            RuntimeError: `remember` wasn't called, or no step was taken since.

        >>> from cellstack import Cell, CellSpec, Network, Recurrent
        >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
        >>> stream = Network([Recurrent((cell,))]).stream()
        >>> stream.remember(100)
        >>> y = [stream.step(frame) for frame in np.arange(10.0).reshape(5, 1, 2)]
        >>> t = stream.trace(2)
        >>> t["layer_0"].f.shape, bool((t.y[:, 1] == y[4]).all())
        ((1, 2, 3), True)
        """
        if self._history is None:
            raise RuntimeError("Stream: expected remember(steps) before trace(), which says how many to keep")
        most = self._history.most if steps is None else check_integer("Stream", "steps", steps)
        with self._turns.turn() as taken:
            self._check_turn(taken)
            kept = self._history.kept()
        if kept is None:
            raise RuntimeError("Stream: expected a step since remember() and since the state was set, got none")
        state, arrays = kept
        whole = self.network.trace(dict(zip(self.network.inputs, arrays, strict=True)), state)
        first = max(0, len(whole.steps) - min(most, self._history.most))
        return whole.select(steps=slice(first, None))

    def fork(self) -> Stream:
        """Return a new stream that starts from a copy of this one's state."""
        other = Stream(self.network, self.batch, self.threads, self._engine.weights)
        other.state = self.state
        other._engine.count_on(self._engine)
        return other

    def __repr__(self) -> str:
        threads = "" if self.threads == 1 else f", threads={self.threads}"
        weights = f", weights={self.weights!r}" if self._engine.narrowed else ""
        return f"Stream(batch={self.batch}{threads}{weights}) of {self.network!r}"
