"""A Stream: a Network run frame by frame, with a state that is the stream's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cellstack import _kernel
from cellstack.arguments import as_floats, as_own, as_states
from cellstack.network import Network
from cellstack.nodes import Cell, Dense, Recurrent
from cellstack.nodes.base import MOST, Array, CellState, FrameRule, Node
from cellstack.nodes.recurrent import WEIGHTS
from cellstack.spec import STATES, ShapeError, check_sequence, check_step
from cellstack.streaming.framewise import (
    Run,
    answers_framewise,
    beyond,
    check_widths,
    frame_rules,
    framewise,
    stacks,
    together,
)


class Frames(NamedTuple):
    """What a node keeps beside states of cells: a causal convolution its last frames `[B, L, C]`, the oldest first."""

    x: Any


class Stream:
    """Frames in, what the network returns after each frame out; any chunking gives the same bits.

    The state lies in the kernel; the weights are the network's, shared and never written. A stream belongs to one
    thread at a time, and a call while another one runs is a `RuntimeError`; different streams don't touch.

    Args:
        network: whose nodes all answer after every frame: cells that run forwards, causal convolutions,
            `GlobalPool("last")`, and what works step by step; and whose inputs are all sequences or ids.
        batch: how many sequences are stepped side by side, B.
        threads: the most that share a call, each with some of the rows, or, where a chunk goes through a stack, some of
            the layers. A call of less than some 50 µs keeps to one. The bits are the same.
        weights: what the matrices of cells are held in: `"float32"`, as the network has them; `"bfloat16"`, rounded to
            8 bits of precision, everything else in float32; `"int8"`, in 127 steps to either side, a scale a column,
            and x and h in as many steps of their own. A step at batch 1 is as fast as its weights can be read.

    Raises:
        ValueError: a node that needs the whole sequence before it can answer, or an input without time; a batch that
            isn't 1 to 2^31 - 1; unknown weights.
        TypeError: fewer bits for a float64 network.
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

    def __init__(self, network: Network, batch: int = 1, threads: int = 1, weights: str = "float32") -> None:
        for name, value in (("batch", batch), ("threads", threads)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value <= MOST:
                raise ValueError(f"Stream: expected {name} to be an integer from 1 to {MOST}, got {value!r}")
        if weights not in WEIGHTS:
            raise ValueError(f"Stream: expected weights to be one of {', '.join(WEIGHTS)}, got {weights!r}")
        self.network = network
        self.batch, self.threads, self.weights = int(batch), int(threads), weights
        self._dtype = network.dtype
        self._layers: list[tuple[Any, int]] = []  # each cell's kernel stream, and its place in it
        self._frames: list[Array] = []  # what each node keeps that isn't a cell's state, [B, ...]
        self._starts: list[float] = []  # what its numbers are before the first frame
        self._checks: list[tuple[str, Run]] = []  # of ids that are looked up only when something has moved on already
        masked = answers_framewise("Stream", network)
        places = {name: place for place, name in enumerate(network.inputs)}
        # How each run of nodes runs, and on which of the values before it.
        self._parts: list[tuple[Run, tuple[int, ...]]] = []
        chains, rules = together(network), dict(zip(network.names, frame_rules(network), strict=True))
        for chain in chains:
            (name, node, sources), (last, _, _) = chain[0], chain[-1]
            moved = bool(self._layers or self._frames)
            nodes = [node for _, node, _ in chain]
            part = self._part(name, node, rules[name], name in masked) if len(chain) == 1 else self._stack(nodes)
            if node.takes_ids and moved:
                self._checks.append((sources[0], part))
            self._parts.append((part, tuple(places[source] for source in sources)))
            places[last] = len(places)
        self._outputs = tuple(places[name] for name in network.outputs)
        only = len(chains) == 1 and not network.graph.ids and len(network.outputs) == 1
        self._late = any(network.graph.late)  # widths that only a call brings
        self._frame = (self.batch, network.input_size) if len(network.inputs) == 1 and not self._late else None
        self._busy = Lock()
        self._alone = None  # the kernel's own step, where that is all that there is to a step
        if only and all(stacks(node) for node in network.nodes) and self._layers and not beyond(network.nodes[-1]):
            self._alone = self._layers[0][0].step

    def _part(self, name: str, node: Node, rule: FrameRule, masked: bool) -> Run:
        """Return how a node runs here, with a memory of its own where it needs one."""
        if isinstance(node, Recurrent):
            return self._recurrent(node)
        return framewise(name, node, rule, masked) or self._with_memory(rule)

    def _recurrent(self, node: Recurrent) -> Run:
        runs = [(self._stack(cells), added) for cells, added in node.parts]
        if len(runs) == 1:  # the lowest cell is never added to
            return runs[0][0]

        def run(steps: tuple[int, ...], x: Array) -> Array:
            for stack, added in runs:
                y = stack(steps, x)
                x = np.add(x, y, out=y) if added else y
            return x

        return run

    def _stack(self, layers: Sequence[Cell | Node]) -> Run:
        """Return how cells, or nodes that `stacks` says go on each other, run as one call of the kernel."""
        packed, cells = [], []
        for layer in layers:
            for part in layer.cells if isinstance(layer, Recurrent) else (layer,):
                if isinstance(part, Cell):
                    cells.append(len(packed))
                    packed.append(part.packed if self.weights == "float32" else part.pack(self.weights))
                else:
                    assert isinstance(part, Dense)
                    packed.append(part.packed)
        kernel, after = _kernel.stream(packed, self.batch, self.threads), beyond(layers[-1])
        self._layers += [(kernel, place) for place in cells]

        def run(steps: tuple[int, ...], x: Array) -> Array:
            y = (kernel.run if steps else kernel.step)(np.ascontiguousarray(x))
            assert y is not None, "what goes from node to node is as the kernel takes it"
            return after(y) if after else y

        return run

    def _with_memory(self, rule: FrameRule) -> Run:
        assert rule.memory is not None
        assert rule.advance is not None
        memory, advance = np.full((self.batch, *rule.memory), rule.start, self._dtype), rule.advance
        self._frames.append(memory)
        self._starts.append(rule.start)

        def run(steps: tuple[int, ...], x: Array) -> Array:
            y, memory[:] = advance(memory, x if steps else x[:, None])
            return y if steps else y[:, 0]

        return run

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
            return self._run((x,), ())
        return self._run(self._given(x, ()), ())

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
        given = self._given(x, None)
        return self._run(given, given[0].shape[1:2])

    def _given(self, x: Any, steps: tuple[()] | None) -> tuple[Array, ...]:
        """Return the inputs in order, contiguous: of one step where `steps` is (), else of as many as there are."""
        network = self.network
        if len(network.inputs) == 1 and network.input_size is not None and not isinstance(x, dict):
            arrays = {network.inputs[0]: as_floats("Stream", network.inputs[0], x, self._dtype)}
        else:
            arrays = network.as_inputs("Stream", x)
        for name, array in arrays.items():
            if name in network.graph.ids:
                expected = "B, T" if steps is None else "B"
                if array.ndim != (2 if steps is None else 1):
                    raise ShapeError(f"Stream: expected {name} [{expected}], ids, got {array.shape}")
            else:
                check = check_sequence if steps is None else check_step
                check("Stream", array.shape, network.shapes[name][-1], name)
            first = next(iter(arrays.values()))
            if len(array) != self.batch:
                raise ShapeError(f"Stream: expected {name} with B={self.batch}, got {array.shape}")
            if steps is None and array.shape[1] != first.shape[1]:
                raise ShapeError(f"Stream: expected {name} with T={first.shape[1]}, got {array.shape}")
        if self._late:  # what fails from here on leaves everything as it was
            check_widths(network, arrays)
        for name, check in self._checks:
            check((), arrays[name])
        return tuple(np.require(array, requirements=("C", "A")) for array in arrays.values())

    def _run(self, given: tuple[Array, ...], steps: tuple[int, ...]) -> Any:
        """Run the parts over a step (`steps` is ()) or over a chunk (`steps` is (T,))."""
        values = list(given)
        with self._held(), np.errstate(all="ignore"):
            for part, sources in self._parts:
                if len(sources) == 1:
                    values.append(part(steps, values[sources[0]]))
                else:
                    values.append(part(steps, *[values[source] for source in sources]))
        answers = [values[place] for place in self._outputs]
        return as_own(answers, given)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the stream for one call: a second thread would find some parts a step ahead of others."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("Stream: expected one thread at a time, got a call while another one runs: fork()")
        try:
            yield
        finally:
            self._busy.release()

    @property
    def state(self) -> tuple[CellState | Frames, ...]:
        """The state now: one state a cell, each array `[B, H]`, then the `Frames` of each causal convolution.

        These are copies. Setting the state checks and copies likewise.
        """
        with self._held():
            return self._now()

    def _now(self) -> tuple[CellState | Frames, ...]:
        states = {id(kernel): kernel.get_state() for kernel, _ in self._layers}
        cells = (
            STATES[cell.spec.kind](*states[id(kernel)][place])
            for cell, (kernel, place) in zip(self.network.cells, self._layers, strict=True)
        )
        return (*cells, *(Frames(frames.copy()) for frames in self._frames))

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            raise TypeError("Stream: expected state to be a tuple of states, got None: reset() starts anew")
        with self._held():
            self._set(state)

    def _set(self, state: Any) -> None:
        states, frames = self._as_state(state, self.batch)
        for (kernel, place), arrays in zip(self._layers, states, strict=True):
            assert arrays is not None
            kernel.set_state(place, *arrays)
        for own, new in zip(self._frames, frames, strict=True):
            own[:] = new

    def _as_state(self, state: Any, batch: int) -> tuple[tuple[CellState | None, ...], list[Array]]:
        """Return a state of some rows, checked: one a cell, and the frames of each node that keeps some."""
        cells, count = self.network.cells, len(self._frames)
        if state is None or not count:
            starts = zip(self._frames, self._starts, strict=True)
            new = [np.full((batch, *own.shape[1:]), start, self._dtype) for own, start in starts]
            return as_states("Stream", state, cells, batch), new
        if not isinstance(state, Sequence) or len(state) != len(cells) + count:
            got = len(state) if isinstance(state, Sequence) else type(state).__name__
            raise ShapeError(
                f"Stream: expected state to be a tuple of {len(cells)} states, one a cell, and {count} Frames, one a "
                f"causal convolution, got {got}"
            )
        frames = []
        for given, own in zip(state[len(cells) :], self._frames, strict=True):
            array = as_floats("Stream", "frames", given.x if isinstance(given, Frames) else given, self._dtype)
            if array.shape != (batch, *own.shape[1:]):
                raise ShapeError(f"Stream: expected frames {[batch, *own.shape[1:]]} of the state, got {array.shape}")
            frames.append(array)
        return as_states("Stream", tuple(state[: len(cells)]), cells, batch), frames

    def reset(self, rows: Any = None, state: Any = None) -> None:
        """Set the state of some rows, or of all, to the cells' own initial state or to a state given.

        Args:
            rows: what indexes an axis of B: a number, numbers, a slice, a mask `[B]`; None = all rows.
            state: one state a cell, each array `[rows, H]`, then the frames of each causal convolution; None = what
                the stream began with: the cells' learned initial state, or zeros.

        Raises:
            ShapeError: a state that doesn't fit the rows.
            IndexError: a row that isn't there.
        """
        chosen = np.arange(self.batch)[slice(None) if rows is None else rows].reshape(-1)
        states, frames = self._as_state(state, len(chosen))
        with self._held():
            new = self._now()
            for cell, arrays, values in zip(self.network.cells, new, states, strict=False):
                for name, array in zip(arrays._fields, arrays, strict=True):
                    array[chosen] = cell.arrays.get(f"initial_{name}", 0.0) if values is None else getattr(values, name)
            for own, arrays in zip(new[len(states) :], frames, strict=True):
                own[0][chosen] = arrays
            self._set(new)

    def fork(self) -> Stream:
        """Return a new stream that starts from a copy of this one's state."""
        other = Stream(self.network, self.batch, self.threads, self.weights)
        other.state = self.state
        return other

    def __repr__(self) -> str:
        threads = "" if self.threads == 1 else f", threads={self.threads}"
        weights = "" if self.weights == "float32" else f", weights={self.weights!r}"
        return f"Stream(batch={self.batch}{threads}{weights}) of {self.network!r}"
