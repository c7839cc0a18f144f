"""A Stream: a Network run frame by frame, with a state that is the stream's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack import _kernel
from cellstack.network import MOST, Network, as_floats, as_states
from cellstack.nodes import Activation, Array, CellState, Dense, Node, Pool, Standardise
from cellstack.recurrent import Bidirectional, Recurrent
from cellstack.spec import STATES, ShapeError, check_sequence, check_step


def _why_not(node: Node) -> str | None:
    """Return why a node can't answer after every frame; None where it can."""
    if isinstance(node, Bidirectional) or (isinstance(node, Recurrent) and node.go_backwards):
        return "it runs backwards from the end of the sequence, which a stream doesn't have"
    if isinstance(node, Pool) and node.mode != "last":
        return f"the {node.mode} over time is of the whole sequence, which a stream doesn't have"
    return None


class Stream:
    """Frames in, what the network returns after each frame out; any chunking gives the same bits.

    The state lies in the kernel; the weights are the network's, shared and never written. A stream belongs to one
    thread at a time, and a call while another one runs is a `RuntimeError`; different streams don't touch.

    Args:
        network: whose nodes all run forwards: `Standardise`, `Recurrent`, `Dense`, `Activation`, `Pool("last")`.
        batch: how many sequences are stepped side by side, B.

    Raises:
        ValueError: a node that needs the whole sequence before it can answer, or a batch that isn't 1 to 2^31 - 1.
        MemoryError: a state that memory can't hold.

    >>> from cellstack import Cell, CellSpec
    >>> cell = Cell(CellSpec(2, 3, use_bias=False), np.ones((2, 12)), np.ones((3, 12)))
    >>> net = Network([Recurrent((cell,), return_sequences=False)])
    >>> x = np.arange(10.0).reshape(1, 5, 2)
    >>> stream = net.stream()
    >>> for t in range(5):
    ...     y = stream.step(x[:, t])
    >>> bool((y == net(x)).all())
    True
    """

    def __init__(self, network: Network, batch: int = 1) -> None:
        if not isinstance(batch, (int, np.integer)) or not 1 <= batch <= MOST:
            raise ValueError(f"Stream: expected batch to be an integer from 1 to {MOST}, got {batch!r}")
        self.network = network
        self.batch = int(batch)
        self._dtype = network.dtype
        # What is run in turn: a kernel stream, its width and whether its input is added; or None and a NumPy function.
        self._parts: list[tuple[Any, Any, bool]] = []
        self._layers: list[tuple[Any, int]] = []  # each cell's kernel stream, and its place in it
        for name, node in zip(network.names, network.nodes, strict=True):
            why = _why_not(node)
            if why is not None:
                raise ValueError(f"Stream: expected nodes that can answer after every frame, got {name}: {why}")
            if isinstance(node, Recurrent):
                for cells, added in node.parts:
                    kernel = _kernel.Stream([cell.packed for cell in cells], self.batch)
                    self._parts.append((kernel, cells[-1].spec.output_size, added))
                    self._layers += [(kernel, place) for place in range(len(cells))]
            elif isinstance(node, (Standardise, Dense, Activation)):
                self._parts.append((None, node.apply, False))
        self._frame = (self.batch, network.input_size)
        self._alone = self._parts[0] if len(self._parts) == 1 and self._layers else None

    def step(self, x: Any) -> Array:
        """Take one frame and return what the network returns after it.

        Args:
            x: `[B, I]`, array-like of real numbers, cast as in `Network.run`.

        Returns:
            `[B, W]`, the caller's own.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
        """
        if not (type(x) is np.ndarray and x.dtype is self._dtype and x.shape == self._frame and x.flags.carray):
            x = as_floats("Stream", "x", x, self._dtype)
            check_step("Stream", x.shape, self.network.input_size)
            self._check_batch(x)
            x = np.require(x, requirements=("C", "A"))
        if self._alone is None:
            return self._run(x, ())
        kernel, width, _ = self._alone  # the shortest way from Python to the kernel
        y = np.empty((self.batch, width), self._dtype)
        kernel.step(x, y)
        return y

    def run(self, x: Any) -> Array:
        """Take any number of frames and return what the network returns after each: the bits are those of `step`.

        Args:
            x: `[B, T, I]`, as for `step`; T may be 0.

        Returns:
            `[B, T, W]`, whether or not the network itself returns sequences.

        Raises:
            ShapeError: a wrong rank, batch or width.
            TypeError: values that aren't real numbers.
        """
        x = as_floats("Stream", "x", x, self._dtype)
        check_sequence("Stream", x.shape, self.network.input_size)
        self._check_batch(x)
        return self._run(np.require(x, requirements=("C", "A")), (x.shape[1],))

    def _check_batch(self, x: Array) -> None:
        if len(x) != self.batch:
            raise ShapeError(f"Stream: expected x with B={self.batch}, got {x.shape}")

    def _run(self, x: Array, steps: tuple[int, ...]) -> Array:
        """Run the parts over a step (`steps` is ()) or over a chunk (`steps` is (T,))."""
        given = x
        with np.errstate(all="ignore"):
            for kernel, part, added in self._parts:
                if kernel is None:
                    x = part(x)
                else:
                    y = np.empty((self.batch, *steps, part), self._dtype)
                    (kernel.run if steps else kernel.step)(x, y)
                    x = np.add(x, y, out=y) if added else y
        return x.copy() if x is given else x

    @property
    def state(self) -> tuple[CellState, ...]:
        """The state now, one state a cell, each array `[B, H]`: copies. Setting it checks and copies likewise."""
        states = {id(kernel): kernel.get_state() for kernel, _ in self._layers}
        return tuple(
            STATES[cell.spec.kind](*states[id(kernel)][place])
            for cell, (kernel, place) in zip(self.network.cells, self._layers, strict=True)
        )

    @state.setter
    def state(self, state: Any) -> None:
        states = as_states("Stream", state, self.network.cells, self.batch)
        for (kernel, place), arrays in zip(self._layers, states, strict=True):
            if arrays is None:
                raise TypeError("Stream: expected state to be a tuple of states, got None: reset() starts anew")
            kernel.set_state(place, *arrays)

    def reset(self, rows: Any = None, state: Any = None) -> None:
        """Set the state of some rows, or of all, to the cells' own initial state or to a state given.

        Args:
            rows: what indexes an axis of B: a number, numbers, a slice, a mask `[B]`; None = all rows.
            state: one state a cell, each array `[rows, H]`; None = what the stream began with: the cells' learned
                initial state, or zeros.

        Raises:
            ShapeError: a state that doesn't fit the rows.
            IndexError: a row that isn't there.
        """
        chosen = np.arange(self.batch)[slice(None) if rows is None else rows].reshape(-1)
        cells = self.network.cells
        given = as_states("Stream", state, cells, len(chosen))
        new = self.state
        for cell, arrays, values in zip(cells, new, given, strict=True):
            for name, array in zip(arrays._fields, arrays, strict=True):
                array[chosen] = cell.arrays.get(f"initial_{name}", 0.0) if values is None else getattr(values, name)
        self.state = new

    def fork(self) -> Stream:
        """Return a new stream that starts from a copy of this one's state."""
        other = Stream(self.network, self.batch)
        other.state = self.state
        return other

    def __repr__(self) -> str:
        return f"Stream(batch={self.batch}) of {self.network!r}"
