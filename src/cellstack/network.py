"""A Network: nodes and the wires between them, run in NumPy over the kernel. All else is a view of this data."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack import native
from cellstack.arguments import as_flags, as_floats, as_mask, as_numbers, as_own, as_states
from cellstack.graph import Graph, Inputs, check_name, wired
from cellstack.nodes.base import Array, CellState, Flow, Node, Shape, check_choice, check_integer
from cellstack.nodes.dense import Dense
from cellstack.nodes.patches import CellPatches, Patch
from cellstack.nodes.recurrent import WEIGHTS, Bidirectional, Cell, Recording, Recurrent, ends_both_ways
from cellstack.nodes.time import GlobalPool
from cellstack.spec import Plan, ShapeError, check_sequence

if TYPE_CHECKING:
    from pathlib import Path

    from cellstack.inspect.trace import NetworkTrace
    from cellstack.streaming.sessions import Sessions
    from cellstack.streaming.stream import Stream


def _warn_of_last_steps(nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph) -> None:
    """Warn of a pool that takes the last step of a bidirectional layer, where its final states may be meant."""
    by_name = dict(zip(names, nodes, strict=True))
    sources = dict(zip(names, graph.wires, strict=True))

    def before(name: str) -> Iterator[Node]:
        while sources[name] and (name := sources[name][0]) in by_name:
            yield by_name[name]

    for name, node in by_name.items():
        if isinstance(node, GlobalPool) and node.mode == "last" and ends_both_ways(before(name)):
            warnings.warn(
                f'Network: {name}: GlobalPool("last") after a Bidirectional is the last step, not both final states: '
                "at that step the backward direction has read one step only. For both final states leave the pool out, "
                "and give the two parts of the Bidirectional return_sequences=False",
                stacklevel=3,
            )


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Stage(NamedTuple):
    """What a run does at a time: a node, or cells of several nodes that follow each other, in one call of the kernel.

    Attributes:
        nodes: the numbers of its nodes, in their order.
        node: what is run.
        sources: what it takes.
    """

    nodes: tuple[int, ...]
    node: Node
    sources: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Network:
    """A network as data: nodes, the wires between them, their names, and whatever else should travel with them.

    Without wires the nodes run one after the other. With them they are a graph: each node takes what its wires name,
    inputs or earlier nodes, and what the `outputs` return is the answer. A Network is never written to while it runs:
    threads may share one.

    Args:
        nodes: those of `cellstack.nodes`, in an order in which they can run.
        names: one a node, all different, without `/`; None gives layer_0, layer_1 and so on.
        metadata: anything that JSON can hold: class labels, where the data came from, what a training measured.
        inputs: names of the inputs; or names with shapes, the axes after the batch, None where any length will do:
            `{"x": (None, 3), "speaker": (16,)}`. Without a shape an input has the axes that the nodes which take it
            say, a sequence's where none says.
        wires: for each node, a tuple of the names of what it takes; None = each takes what the one before returns.
            The state that a node's cell has after the last step is a value too, `[B, H]`: `"lstm/h"` and `"lstm/c"`,
            or `"stack/1/h"` of a node with several cells. And a node with cells may take, after its input, values
            that they start from, one an array of each cell's state, in their order.
        outputs: names of nodes, or of their states; None = the last node.
        patches: what is changed in cells as they run, in the order in which it acts: see `edit`.

    Raises:
        ShapeError: no node, or nodes that don't meet in width or rank.
        TypeError: not a node, dtypes that differ, metadata that JSON can't hold; not a patch.
        ValueError: names that don't fit; a wire to nothing or from a later node; a node or an input that leads nowhere;
            a patch of what isn't there.
        IndexError: a patch of units that aren't there.

    >>> from cellstack import Cell, CellSpec, Dense, Recurrent
    >>> rng = np.random.default_rng(0)
    >>> cell = Cell(CellSpec(3, 4), *(rng.normal(size=shape) for shape in CellSpec(3, 4).shapes.values()))
    >>> net = Network([Recurrent((cell,), return_sequences=False), Dense(rng.normal(size=(4, 2)))])
    >>> net(np.zeros((5, 7, 3))).shape
    (5, 2)
    >>> net
    Network of float64: [B, T, 3] -> [B, 2], 136 numbers
      layer_0  Recurrent  LSTM 3 -> 4  [B, 4]  128
      layer_1  Dense      linear       [B, 2]    8

    Two inputs, and a node that takes both:

    >>> from cellstack.nodes import Merge
    >>> net = Network(
    ...     [Recurrent((cell,), return_sequences=False), Merge("concat"), Dense(rng.normal(size=(6, 2)))],
    ...     ["lstm", "both", "head"],
    ...     inputs={"x": (None, 3), "speaker": (2,)},
    ...     wires=[("x",), ("lstm", "speaker"), ("both",)],
    ... )
    >>> net({"x": np.zeros((5, 7, 3)), "speaker": np.ones((5, 2))}).shape
    (5, 2)
    >>> net
    Network of float64: x [B, T, 3], speaker [B, 2] -> [B, 2], 140 numbers
      lstm                    Recurrent  LSTM 3 -> 4           [B, 4]  128
      both  of lstm, speaker  Merge      concat along axis -1  [B, 6]    0
      head                    Dense      linear                [B, 2]   12

    An encoder whose last state a decoder starts from:

    >>> net = Network(
    ...     [Recurrent((cell,), return_sequences=False), Recurrent((cell,))],
    ...     ["encoder", "decoder"],
    ...     inputs=("x", "y"),
    ...     wires=[("x",), ("y", "encoder/h", "encoder/c")],
    ... )
    >>> net({"x": np.zeros((5, 7, 3)), "y": np.zeros((5, 2, 3))}).shape
    (5, 2, 4)
    >>> net
    Network of float64: x [B, T, 3], y [B, T, 3] -> [B, T, 4], 256 numbers
      encoder                              Recurrent  LSTM 3 -> 4  [B, 4]     128
      decoder  of y, encoder/h, encoder/c  Recurrent  LSTM 3 -> 4  [B, T, 4]  128
    """

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    metadata: dict[str, Any]
    inputs: tuple[str, ...]
    wires: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    shapes: dict[str, Shape]
    input_size: int | None
    dtype: np.dtype[Any]
    graph: Graph
    patches: tuple[Patch, ...]
    started: tuple[str, ...]
    _hands_on: bool
    _stages: tuple[Stage, ...]
    _patched: tuple[CellPatches | None, ...]

    def __init__(
        self,
        nodes: Sequence[Node],
        names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        inputs: Inputs | None = None,
        wires: Sequence[Sequence[str]] | None = None,
        outputs: Sequence[str] | None = None,
        patches: Iterable[Patch] = (),
    ) -> None:
        nodes, patches = tuple(nodes), tuple(patches)
        names = _checked_names(nodes, names)
        dtypes = {name: node.dtype for name, node in zip(names, nodes, strict=True) if node.dtype is not None}
        dtype = next(iter(dtypes.values()), np.dtype(np.float32))
        for name, found in dtypes.items():
            if found != dtype:
                raise TypeError(f"Network: expected {name} in {dtype}, as the node before it, got {found}")
        graph = wired(nodes, names, inputs, wires, outputs)
        first = graph.inputs[0]
        values = {
            "nodes": nodes,
            "names": names,
            "metadata": _checked_metadata(metadata),
            "inputs": graph.inputs,
            "wires": graph.wires,
            "outputs": graph.outputs,
            "shapes": dict(graph.shapes),  # of each input and of what each node returns, without the batch
            "input_size": None if first in graph.ids else graph.shapes[first][-1],
            "dtype": dtype,
            "graph": graph,
            "patches": patches,
            "_patched": _patched(nodes, names, patches),  # one a cell, in their order; empty: none
            "started": _started(nodes, names, graph),  # a cell's: which values it starts from, or ""
            "_hands_on": any(graph.states),
            "_stages": _stages(nodes, names, graph, {patch.node for patch in patches}),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("cellstack."):  # files say what they mean
            _warn_of_last_steps(nodes, names, graph)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order of the state: node by node, bottom first, forward before backward."""
        return tuple(cell for node in self.nodes for cell in node.cells)

    def patches_of(self, name: str) -> tuple[CellPatches | None, ...]:
        """Return what is changed in each cell of a node; nothing where the network has no patches.

        Args:
            name: the node's.
        """
        place = self.names.index(name)
        first = sum(len(node.cells) for node in self.nodes[:place])
        return self._patched[first : first + len(self.nodes[place].cells)]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_whole"}  # made again where it is needed

    def __call__(self, x: Any, mask: Any = None, *, lengths: Any = None) -> Any:
        """Return what the network makes of `x`: `run` from the cells' own initial state, without the state after.

        Args:
            x: `[B, T, I]`, or the inputs by name or in order, as for `run`.
            mask: `[B, T]`, as for `run`.
            lengths: `[B]`, as for `run`, in place of a mask.

        Returns:
            `[B, T, W]`, or `[B, W]` where a node drops time; a tuple of these where there are several outputs.
        """
        if mask is None and lengths is None and type(x) is np.ndarray and (whole := self._whole) is not None:
            stack, work = whole
            many = x.size * work >= 2 * native.THREAD_WORK
            y = stack.run(x, processors() if many else 1)
            if y is not None:
                return y
        return self.run(x, mask=mask, lengths=lengths)[0]

    @cached_property
    def _whole(self) -> tuple[Any, float] | None:
        """The network as one call of the kernel, and its multiplications for each number of x.

        That call costs little beside the steps. None where there are other nodes than cells that go forwards and dense
        ones, or other wires than from each to the next.
        """
        before = (*self.inputs, *self.names)
        chain = len(self.inputs) == 1 and self.wires == tuple((name,) for name in before[:-1])
        if not chain or self.outputs != (self.names[-1],) or self.patches:
            return None
        weights: list[Any] = []
        timed, last = 0, False
        for node in self.nodes:
            if type(node) is Recurrent and not (last or node.go_backwards) and len(node.parts) == 1:
                weights += [cell.packed for cell in node.cells]
                last = not node.return_sequences
            elif type(node) is Dense and node.beyond is None:
                weights.append(node.packed)
            else:
                return None
            timed = timed if last and isinstance(node, Dense) else len(weights)
        work = sum(node.multiplications for node in self.nodes) / (self.input_size or 1)
        return native.stack(weights, timed, last), work

    def run(
        self,
        x: Any,
        state: Any = None,
        mask: Any = None,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
        *,
        weights: str | None = None,
        record: Recording | None = None,
    ) -> tuple[Any, tuple[CellState, ...]]:
        """Run the network over a batch of sequences.

        Args:
            x: `[B, T, I]`, array-like of real numbers; anything but the network's own dtype is cast to it, float64 to
                a float32 network included. Any strides; B and T may be 0. Ids for an `Embedding` are `[B, T]` and
                keep their dtype. Where there are several inputs, a dict by name, or a tuple in order.
            state: one state a cell in the order of `cells`, `State(h, c)` for an LSTM and `HiddenState(h)` for the
                others, each array `[B, H]`, or a pair of arrays; alone where there is one cell; None, for all or for
                a cell = the cells' own initial state, which is zeros where it isn't learned. Of a cell that starts
                from values of the network there is none to be given.
            mask: `[B, T]` of bool, True = use the step; None = all of them. It goes with every input that has a time
                axis; a dict by name gives each its own.
            lengths: `[B]` integers from 0 to T, instead of `mask`: the first steps of each row are used.
            reset: `[B, T]` of bool, True = a new piece begins with this step: before it, every state becomes the
                cells' own initial state, even where `state` is given. Where a node goes backwards, each piece is run
                from its own end, and the last one from `state`. None = one piece. `lengths` and `reset` may be dicts
                as `mask` may. A node that starts from values of the network takes none.
            threads: how many the kernel may use; None = as many as this process has processors and work for.
            weights: what the cells' matrices are held in for it: `"float32"`, `"bfloat16"` or `"int8"`, with the bits
                that a `Stream` gives with them; None = as the network has them. They are packed at the first such run.
            record: what is kept beside the answers: what the gates, c and h of each cell were at every step, and what
                flowed between the nodes. The bits of all else are the same. See `trace`, which makes sense of it.

        Returns:
            `(y, state)`: `y` is `[B, T, W]`, or `[B, W]` where a node drops time; a tuple of these where there are
            several outputs. `state` is one state a cell, after the last step (with T = 0, that at the start). All
            of it belongs to the caller.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: values that aren't real numbers; mask and lengths at once; fewer bits for a float64 network.
            ValueError: fewer than one thread, or more than 2^31 - 1; unknown weights; ids beyond a table; resets for a
                node that can't keep pieces apart.
        """
        if weights is not None:
            check_choice("Network", "weights", weights, WEIGHTS)
        values = self._flows(x, mask, lengths, reset)
        given = [flow.x for flow in values.values()]
        if record is not None:  # what is given may be written to afterwards
            values = {name: Flow(flow.x.copy(), flow.mask, flow.reset) for name, flow in values.items()}
            record.flows.update(values)
        batch, cells = len(given[0]), self.cells
        states = as_states("Network", state, cells, batch, self.started)
        threads = processors() if threads is None else check_integer("Network", "threads", threads)
        after: tuple[CellState, ...] = ()
        with np.errstate(all="ignore"):  # NaN and inf pass through, as they do in the kernel
            for numbers, node, sources in self._stages:
                name = self.names[numbers[-1]]
                flows = [values[source] for source in sources]
                if self.graph.late[numbers[0]]:
                    node.check(name, *(flow.x.shape[1:] for flow in flows))
                if reset is not None and node.mixes_steps and any(flow.reset is not None for flow in flows):
                    raise ValueError(
                        f"Network: expected no reset, as {name} ({type(node).__name__}) takes steps together, "
                        "of one piece and of the next"
                    )
                if reset is not None and flows[0].reset is not None and node.apart(flows)[1]:
                    raise ValueError(
                        f"Network: expected no reset of {sources[0]}, as {name} starts from "
                        f"{', '.join(sources[1:])}: a new piece would have no start"
                    )
                own = states[len(after) : len(after) + len(node.cells)]
                if isinstance(node, (Recurrent, Bidirectional)):
                    patches = self._patched[len(after) : len(after) + len(node.cells)]
                    x, used, begun, ends = node.run(flows, own, threads, record, patches, weights)
                else:
                    x, used, begun, ends = node.run(flows, own, threads)
                values[name] = Flow(x, used, begun)
                if record is not None:
                    record.flows[name] = values[name]
                after += ends
                if self._hands_on:
                    values |= self._states_of(numbers, ends, record)
                for number in numbers:
                    for value in self.graph.done[number]:
                        values.pop(value, None)  # between nodes that are one stage there is none
        if self._hands_on:  # the states are the caller's, and the answers too
            given += [array for one in after for array in one]
        return as_own([values[name].x for name in self.outputs], given), after

    def _states_of(
        self, numbers: tuple[int, ...], ends: tuple[CellState, ...], record: Recording | None
    ) -> dict[str, Flow]:
        """Return the states that some nodes hand on, by the values' names, out of those of all their cells."""
        found, first = {}, 0
        for number in numbers:
            for value, cell, part in self.graph.states[number]:
                array = getattr(ends[first + cell], part)
                found[value] = Flow(array if record is None else array.copy())  # the caller may write to the state
            first += len(self.nodes[number].cells)
        if record is not None:
            record.flows.update(found)
        return found

    def _flows(self, x: Any, mask: Any, lengths: Any, reset: Any) -> dict[str, Flow]:
        """Return what flows in, by the inputs' names, checked."""
        arrays = self.as_inputs("Network", x)
        for name in arrays:
            self._check_input(name, arrays)
        if mask is None and lengths is None and reset is None:
            return {name: Flow(array) for name, array in arrays.items()}
        timed = [name for name in arrays if self.graph.timed(name)]
        flags = {"mask": mask, "lengths": lengths, "reset": reset}
        for what, value in flags.items():
            for name in value if isinstance(value, Mapping) else ():
                if name not in timed:
                    raise ValueError(f"Network: expected {what} by the inputs {', '.join(timed)}, got one for {name!r}")
            if value is not None and not timed:
                raise ValueError(f"Network: expected no {what}, as no input has a time axis")
        flows = {}
        for name, array in arrays.items():
            if name not in timed:
                flows[name] = Flow(array)
                continue
            own = {what: value.get(name) if isinstance(value, Mapping) else value for what, value in flags.items()}
            batch, steps = array.shape[:2]
            used = as_mask("Network", own["mask"], own["lengths"], batch, steps)
            flows[name] = Flow(array, used, as_flags("Network", "reset", own["reset"], batch, steps, "a piece begins"))
        return flows

    def as_inputs(self, owner: str, x: Any) -> dict[str, Array]:
        """Return the inputs by name as arrays of real numbers: of the network's dtype, but for ids.

        Args:
            owner: whose argument it is, for the message.
            x: as for `run`.

        Raises:
            TypeError: values that aren't real numbers, or not one for each input.
        """
        names = self.inputs
        if isinstance(x, Mapping):
            if x.keys() != set(names):
                raise TypeError(f"{owner}: expected the inputs {', '.join(names)}, got {', '.join(map(str, x))}")
            values = [x[name] for name in names]
        elif len(names) == 1:
            values = [x]
        elif isinstance(x, (tuple, list)) and len(x) == len(names):
            values = list(x)
        else:
            got = f"{len(x)} values" if isinstance(x, (tuple, list)) else type(x).__name__
            raise TypeError(f"{owner}: expected the inputs {', '.join(names)}, by name or in order, got {got}")
        ids = self.graph.ids
        return {
            name: as_numbers(owner, name, value) if name in ids else as_floats(owner, name, value, self.dtype)
            for name, value in zip(names, values, strict=True)
        }

    def _check_input(self, name: str, arrays: dict[str, Array]) -> None:
        """Raise `ShapeError` unless an input has its shape, and as many rows as the first."""
        array, shape = arrays[name], self.shapes[name]
        if len(shape) == 2 and shape[0] is None and name not in self.graph.ids:
            check_sequence("Network", array.shape, shape[1], name)
        else:
            fits = array.ndim == len(shape) + 1 and all(
                want in (None, got) for want, got in zip(shape, array.shape[1:], strict=True)
            )
            if not fits:
                mend = ": add a batch axis: x[None]" if array.ndim == len(shape) else ""
                raise ShapeError(f"Network: expected {name} {self.graph.shown(name)}, got {array.shape}{mend}")
        first = next(iter(arrays.values()))
        if len(array) != len(first):
            raise ShapeError(
                f"Network: expected {name} with B={len(first)}, as {self.inputs[0]} has, got {array.shape}"
            )

    def trace(
        self,
        x: Any,
        state: Any = None,
        mask: Any = None,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
        *,
        nodes: str | Iterable[str] | None = None,
        units: Any = None,
        steps: Any = None,
        pre: bool = False,
        in_memory: int = 1 << 30,
    ) -> NetworkTrace:
        """Run the network as `run` does, and return what every node and cell did at every step beside the answers.

        The bits of y and of the state are those of `run`.

        Args:
            x, state, mask, lengths, reset, threads: see `run`.
            nodes: the names of the nodes that are kept; None = all.
            units: which units of the cells, a slice or numbers; None = all.
            steps: which steps, a slice or numbers, of what has as many as were run; None = all.
            pre: keep what the gates are activations of as well; of a whole trace it can be had afterwards.
            in_memory: how many bytes of gates and states lie in memory; what is beyond, in a file that is mapped into
                it and goes with the trace.

        Returns:
            A mapping from the nodes' names to what went in, what came out and what their cells did, `t["layer_0"].f`,
            each `[B, T, H]`; with `y` and `state`.

        Raises:
            ShapeError, TypeError, ValueError: see `run`; a node that isn't there.
            IndexError: a unit or a step that isn't there.
        """
        run = {"mask": mask, "lengths": lengths, "reset": reset, "threads": threads}
        return _trace()(self, x, state, run, nodes, units, steps, pre, in_memory)

    def edit(self, patches: Patch | Iterable[Patch]) -> Network:
        """Return the network with patches, after those that it has: gates and states that are changed as it runs.

        It is a Network again, of the same arrays: run, traced, streamed, pooled, and saved in the native format, which
        alone can hold patches. Of two patches to one number, the later one acts on what the earlier one left.

        Args:
            patches: a `Patch`, or some in the order in which they act.

        Raises:
            TypeError: what isn't a patch.
            ValueError: a node, a cell or a gate that isn't there.
            IndexError: units that aren't there. Rows and steps are checked by the run.

        >>> from cellstack import Cell, CellSpec, Patch, Recurrent
        >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8)), np.ones((2, 8)))
        >>> net = Network([Recurrent((cell,))])
        >>> held = net.edit(Patch("layer_0", gate="h", units=[1], value=0.5))
        >>> held(np.ones((1, 3, 1)))[0, :, 1]
        array([0.5, 0.5, 0.5])
        """
        if not isinstance(patches, (Patch, Iterable)):
            raise TypeError(f"Network: expected patches to be a Patch or some, got {type(patches).__name__}")
        own = (patches,) if isinstance(patches, Patch) else tuple(patches)
        return self._with(self.nodes, self.patches + own)

    @property
    def unedited(self) -> Network:
        """The network without patches."""
        return self._with(self.nodes, ()) if self.patches else self

    @property
    def weights(self) -> str:
        """What the cells' matrices are held in: the network's dtype, or `"bfloat16"` where those of some cells are."""
        return "bfloat16" if any(cell.weights == "bfloat16" for cell in self.cells) else self.dtype.name

    def with_weights(self, weights: str) -> Network:
        """Return the network with the matrices of its cells as data of fewer bits, in memory and in its file.

        It answers what `run(…, weights=weights)` of this one answers, bit for bit: x and h are rounded as the matrices
        are where they meet them, sums and states are float32. All else, dense layers among it, stays as it is. The
        native format keeps such matrices as they are; other formats, and C, are given the same numbers as float32.

        Args:
            weights: `"bfloat16"`: each number rounded to the nearest one of 8 bits of precision, two bytes each;
                `"float32"`: the numbers that there are in four bytes each.

        Raises:
            ValueError: another word.
            TypeError: fewer bits for a float64 network.

        >>> from cellstack import Cell, CellSpec, Recurrent
        >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.full((1, 8), 0.1, "f4"), np.ones((2, 8), "f4"))
        >>> net = Network([Recurrent((cell,))])
        >>> small = net.with_weights("bfloat16")
        >>> small
        Network of float32: [B, T, 1] -> [B, T, 2], 24 numbers
          layer_0  Recurrent  LSTM 1 -> 2 (no bias, matrices in bfloat16)  [B, T, 2]  24
        >>> x = np.ones((1, 3, 1))
        >>> bool((small(x) == net.run(x, weights="bfloat16")[0]).all())
        True
        """
        return self._with(tuple(node.with_weights(weights) for node in self.nodes), self.patches)

    def _with(self, nodes: tuple[Node, ...], patches: tuple[Patch, ...]) -> Network:
        inputs = {name: self.shapes[name] for name in self.inputs}
        return Network(
            nodes,
            self.names,
            self.metadata,
            inputs=inputs,
            wires=self.wires,
            outputs=self.outputs,
            patches=patches,
        )

    def stream(self, batch: int = 1, threads: int = 1, weights: str | None = None) -> Stream:
        """Return a `Stream` that runs this network frame by frame.

        Args:
            batch: how many sequences are stepped side by side.
            threads: how many may share a call that is long enough for it.
            weights: what the cells' matrices are held in, `"float32"`, `"bfloat16"` or `"int8"`: see `Stream`; None =
                as the network has them.

        Returns:
            A stream of its own state, the cells' own initial state at first; any number of them share the network.

        Raises:
            ValueError: a node needs the whole sequence, which the message names; unknown weights.
            TypeError: fewer bits for a float64 network.

        >>> from cellstack import Cell, CellSpec, Recurrent
        >>> cell = Cell(CellSpec(3, 4, use_bias=False), np.ones((3, 16)), np.ones((4, 16)))
        >>> Network([Recurrent((cell,))]).stream().step([[1, 2, 3]]).shape
        (1, 4)
        """
        from cellstack.streaming.stream import Stream  # a stream is built on the network, not under it

        return Stream(self, batch, threads, weights)

    def pool(self, capacity: int, threads: int = 1, weights: str | None = None) -> Sessions:
        """Return a `Sessions` of sessions that come and go, stepped together.

        Args:
            capacity: how many sessions may be open at a time.
            threads: how many the kernel may use for a step.
            weights: what the cells' matrices are held in, as for `stream`.

        Returns:
            A pool without sessions; any number of pools and streams share the network.

        Raises:
            ValueError: a node that can't be streamed, which the message names; a number out of range; unknown weights.
            TypeError: fewer bits for a float64 network.
        """
        from cellstack.streaming.sessions import Sessions  # as a stream

        return Sessions(self, capacity, threads, weights)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the network to a file, whole or not at all; the suffix picks the format.

        Args:
            path: where to; `.safetensors` is the native format. A file that is there is replaced in one step.

        Raises:
            ValueError: no format has this suffix.
            OSError: the file can't be written.
        """
        from cellstack import formats  # formats are built on the network, not under it

        formats.save(self, path)

    def export_c(self, directory: str | PathLike[str], name: str = "model") -> tuple[Path, Path]:
        """Write the network as C that needs nothing else: `name.h` and `name.c`, with init, reset and step.

        Args:
            directory: where to; it is made where it isn't there.
            name: what the files are called, and what every name in them begins with.

        Returns:
            The paths of the header and of the source.

        Raises:
            ValueError: a node that can't be streamed or written as C, by name; a name that isn't one in C.
            OSError: the files can't be written.
        """
        from cellstack.formats import c  # formats are built on the network, not under it

        return c.export(self, directory, name)

    def plan(self) -> Plan:
        """Return what each node costs, what runs it, and why, one line a node, and what they cost in all.

        What a node takes is said where it isn't what the node before returns; states that it starts from come last.
        Counted are multiplications by the network's own numbers, and the bytes of these numbers that are read, for a
        step of what the node returns; activations, and products of values with each other, come on top.
        """
        rows = []
        begun = {number: self.names[stage.nodes[0]] for stage in self._stages for number in stage.nodes[1:]}
        for number, (name, origin, node) in enumerate(zip(self.names, self._origins(), self.nodes, strict=True)):
            engine = f"in the call of {begun[number]}" if number in begun else node.engine(self.dtype)
            patches = sum(patch.node == name for patch in self.patches)
            engine += f", {patches} patch{'es' * (patches > 1)}" if patches else ""
            rows.append((name, origin, node.summary, _cost(*self._cost(node)), engine))
        costs = [self._cost(node) for node in self.nodes]
        total = _cost(*(sum(numbers) for numbers in zip(*costs, strict=True)))
        return Plan([*_table(rows), f"in all, a step: {total}"])

    def _cost(self, node: Node) -> tuple[int, int]:
        """Return how often a step multiplies by a node's numbers, and how many bytes of them it reads."""
        return node.multiplications, node.bytes_read

    def _origins(self) -> list[str]:
        """Return, for each node, where its values come from; nothing where it is the node before it."""
        before = ((self.inputs[0],), *((name,) for name in self.names[:-1]))
        return [
            "" if sources == usual else f"of {', '.join(sources)}"
            for sources, usual in zip(self.wires, before, strict=True)
        ]

    def __repr__(self) -> str:
        numbers = [f"{node.parameters:,}" for node in self.nodes]
        width = max(map(len, numbers))
        rows = [
            (name, origin, type(node).__name__, node.summary, self.graph.shown(name), number.rjust(width))
            for name, origin, node, number in zip(self.names, self._origins(), self.nodes, numbers, strict=True)
        ]
        total = sum(node.parameters for node in self.nodes)
        comes, goes = (self._ends(names) for names in (self.inputs, self.outputs))
        head = f"Network of {self.dtype}: {comes} -> {goes}, {total:,} numbers"
        patches = [f"  {patch!r}" for patch in self.patches]
        return "\n".join([head, *("  " + line for line in _table(rows)), *patches])

    def _ends(self, names: tuple[str, ...]) -> str:
        """Return the shapes of the inputs or the outputs, with their names where there are several."""
        shapes = [self.graph.shown(name) for name in names]
        named = len(names) > 1
        return ", ".join(f"{name} {shape}" if named else shape for name, shape in zip(names, shapes, strict=True))


@cache
def _trace() -> Callable[..., NetworkTrace]:
    """Return what traces: built on the network, not under it, and looked up once, as that is dearer than a step."""
    from cellstack.inspect.trace import trace

    return trace


def _patched(
    nodes: tuple[Node, ...], names: tuple[str, ...], patches: tuple[Patch, ...]
) -> tuple[CellPatches | None, ...]:
    """Return the patches by cell, in the order of the cells; nothing where there are none."""
    for patch in patches:
        if not isinstance(patch, Patch):
            raise TypeError(f"Network: expected patches to be Patch, got {type(patch).__name__}")
        if patch.node not in names:
            raise ValueError(f"Network: expected patches of {', '.join(names)}, got one of {patch.node!r:.80}")
        count = len(nodes[names.index(patch.node)].cells)
        if not count:
            raise ValueError(f"Network: expected patches of nodes with cells, got one of {patch.node!r}")
        if patch.cell is None and count > 1:
            raise ValueError(f"Network: expected cell=0 to {count - 1} in a patch of {patch.node!r}, got {patch}")
        if patch.cell is not None and patch.cell >= count:
            raise ValueError(f"Network: expected cell=0 to {count - 1} in a patch of {patch.node!r}, got {patch}")
    found = []
    for name, node in zip(names, nodes, strict=True):
        for place, cell in enumerate(node.cells):
            own = [patch for patch in patches if patch.node == name and (patch.cell or 0) == place]
            for patch in own:
                patch.check(cell.spec)
            found.append(CellPatches(cell.spec, own) if own else None)
    return tuple(found) if patches else ()


def _started(nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph) -> tuple[str, ...]:
    """Return, for each cell, which node starts it from which values, in words; "" where it starts by itself."""
    found: list[str] = []
    for node, name, sources in zip(nodes, names, graph.wires, strict=True):
        starts = node.apart(sources)[1]
        found += [f"{name} starts from {', '.join(starts)}" if starts else ""] * len(node.cells)
    return tuple(found)


def _stages(nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph, patched: set[str]) -> tuple[Stage, ...]:
    """Return the nodes in the order in which they run, those together that one call of the kernel can run.

    A stack of cells in one call shares its layers out to threads, and keeps no sequence between them. The bits are the
    same.
    """
    stages: list[Stage] = []
    uses = Counter((*graph.outputs, *(source for sources in graph.wires for source in sources)))
    for number, (node, sources) in enumerate(zip(nodes, graph.wires, strict=True)):
        below = stages[-1] if stages else None
        alone = below is not None and len(below.sources) == 1  # without states to start from
        if below is not None and alone and sources == (names[below.nodes[-1]],) and uses[sources[0]] == 1:
            joined = _joined(below.node, node)
            # Above a node that goes backwards steps are counted as they come out of it, not as they went in.
            if joined is not None and not (joined.go_backwards and names[number] in patched):
                stages[-1] = Stage((*below.nodes, number), joined, below.sources)
                continue
        stages.append(Stage((number,), node, sources))
    return tuple(stages)


def _joined(below: Node, above: Node) -> Recurrent | None:
    """Return two stacks of cells as one; None where they aren't."""
    if not isinstance(below, Recurrent) or not isinstance(above, Recurrent) or not below.return_sequences:
        return None
    if below.residual or above.residual or below.zero_output_for_mask or above.go_backwards:
        return None  # what goes backwards turns its sequence round first: below, then, the whole stack goes backwards
    cells = (*below.cells, *above.cells)
    return Recurrent(cells, above.return_sequences, below.go_backwards, above.zero_output_for_mask)


def _checked_names(nodes: tuple[Node, ...], names: Sequence[str] | None) -> tuple[str, ...]:
    if not nodes:
        raise ShapeError("Network: expected at least one node, got none")
    for number, node in enumerate(nodes):
        if not isinstance(node, Node):
            raise TypeError(f"Network: expected node {number} to be a node, got {type(node).__name__}")
    if names is None:
        return tuple(f"layer_{number}" for number in range(len(nodes)))
    names = tuple(names)
    if len(names) != len(nodes) or len(set(names)) != len(names):
        raise ValueError(f"Network: expected {len(nodes)} different names, one a node, got {list(names)}")
    for name in names:
        check_name("name", name)
    return names


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a private copy of `metadata`, in the form in which a file would give it back."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError("Network: expected metadata to be a dict with text as keys")
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"Network: expected metadata that JSON can hold, without NaN: {error}") from error


def _cost(multiplications: int, read: int) -> str:
    """Return in words what a step costs; nothing where there are no numbers."""
    return f"{multiplications:,} multiplications, {read:,} bytes" if read else ""


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines whose columns stand below each other, without columns that are empty throughout."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip() for row in rows
    ]
