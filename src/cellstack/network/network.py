"""`Network`: nodes and the wires between them as data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cellstack import native
from cellstack.cells.plan import Plan
from cellstack.network.arguments import as_floats, as_numbers
from cellstack.network.construction import (
    checked_metadata,
    checked_names,
    initial_state_sources,
    patched,
    warn_of_last_steps,
    with_final,
)
from cellstack.network.delegated import Delegated
from cellstack.network.description import as_text, plan_lines
from cellstack.network.graph import Graph, Inputs, wired
from cellstack.network.plan import PlannedCalls
from cellstack.network.running import processors, run_network
from cellstack.nodes.base import Array, CellState, Node, Shape
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.dense import Products
from cellstack.nodes.patches import CellPatches, Patch
from cellstack.nodes.recording import Recording
from cellstack.nodes.values import Celled

TASKS = ("classify", "regress", "forecast", "text")


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Network(Delegated):
    """A network as data: nodes, their names, the wires between them, and metadata.

    Without wires the nodes run in sequence. With wires they form a graph: each node takes the named inputs or earlier
    nodes, and the network returns the values of `outputs`. Running a Network never changes it, so threads can share
    one.

    Args:
        nodes: nodes of `cellstack.nodes`, in an order in which they can run.
        names: a different name per node, without `/`; None: layer_0, layer_1 and so on.
        metadata: a dict of JSON values, such as class labels, the source of the data, or results of training.
        inputs: the names of the inputs, or a dict of names with shapes without the batch, None for any length:
            `{"x": (None, 3), "speaker": (16,)}`. The shape of an input without one is inferred from the nodes that take
            it; the default is a sequence.
        wires: for each node, a tuple of the names of its inputs; None: each node takes the output of the one before.
            The state of a node's cell after the last step is a value too, `[B, H]`: `"lstm/h"` and `"lstm/c"`, or
            `"stack/1/h"` for a node with several cells. A node with cells may take initial states after its input: one
            value per array of each cell's state, in order.
        outputs: names of nodes or of their states; None: the last node.
        patches: changes of cells during a run, in the order in which they are applied: see `edit`.

    Raises:
        ShapeError: no nodes, or nodes whose widths or ranks don't match.
        TypeError: an object that isn't a node or a patch, different dtypes, metadata that JSON can't represent.
        ValueError: invalid names; a wire from something unknown or from a later node; a node or an input that doesn't
            lead to an output; a patch of an unknown node, cell or gate.
        IndexError: a patch of units that don't exist.

    >>> from cellstack import CellSpec
    >>> from cellstack.nodes import Cell, Dense, Recurrent
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

    An encoder whose last state is the initial state of a decoder:

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
    initial_state_sources: tuple[str, ...]
    has_state_values: bool
    calls: PlannedCalls
    patches_by_node: dict[str, tuple[CellPatches | None, ...]]

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
        _warn: bool = True,  # False if the nodes come from a file, from training or from another network
    ) -> None:
        nodes, patches = tuple(nodes), tuple(patches)
        named = checked_names(nodes, names)
        if wires is None and outputs is None:
            nodes, named = with_final(nodes, named)
        names = named if names is not None else checked_names(nodes, None)
        dtypes = {name: node.dtype for name, node in zip(names, nodes, strict=True) if node.dtype is not None}
        dtype = next(iter(dtypes.values()), np.dtype(np.float32))
        for name, other in dtypes.items():
            if other != dtype:
                raise TypeError(f"Network: expected {name} in {dtype}, as the nodes before it, got {other}")
        graph = wired(nodes, names, inputs, wires, outputs)
        first = graph.inputs[0]
        values = {
            "nodes": nodes,
            "names": names,
            "metadata": checked_metadata(metadata),
            "inputs": graph.inputs,
            "wires": graph.wires,
            "outputs": graph.outputs,
            "shapes": dict(graph.shapes),  # of every input and every node's output, without the batch
            "input_size": None if first in graph.ids else graph.shapes[first][-1],
            "dtype": dtype,
            "graph": graph,
            "patches": patches,
            "patches_by_node": patched(nodes, names, patches, dtype),  # one per cell; empty without patches
            # For each cell, which values it starts from, or "".
            "initial_state_sources": initial_state_sources(nodes, names, graph),
            "has_state_values": any(graph.states),
            "calls": PlannedCalls(nodes, names, graph, (patch.node for patch in patches)),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if _warn:
            warn_of_last_steps(nodes, names, graph)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order of their states: node by node, bottom first, forward before backward."""
        return tuple(cell for node in self.nodes for cell in node.cells)

    @property
    def stateful(self) -> tuple[Celled, ...]:
        """Whatever has a state, in the order of the states: all cells, then the memories of `MLSTM` nodes."""
        memories = (cell for node in self.nodes if node.memory is not None for cell in node.cells_in(self.dtype))
        return (*self.cells, *memories)

    @property
    def needs_lengths(self) -> bool:
        """Whether each run needs `lengths` or `mask`: the module that was compiled computed them from its input."""
        return self.metadata.get("lengths") == "computed"

    @property
    def unpadded(self) -> Network:
        """The network for rows without padding: it doesn't need `lengths`."""
        if not self.needs_lengths:
            return self
        metadata = {key: value for key, value in self.metadata.items() if key != "lengths"}
        return Network(**{**self._arguments(), "metadata": metadata}, _warn=False)

    def patches_of(self, numbers: Iterable[int]) -> tuple[CellPatches | None, ...]:
        """Return the patches of each cell of some nodes; empty if the network has no patches.

        Args:
            numbers: the indices of the nodes.

        Returns:
            An entry per cell, None for a cell without patches.
        """
        of_nodes = self.patches_by_node
        return tuple(one for number in numbers for one in of_nodes[self.names[number]]) if of_nodes else ()

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments that make this network."""
        return _arguments_in(vars(self))

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older versions pickled all attributes.
        self.__init__(**(_arguments_in(state) if "shapes" in state else state), _warn=False)

    def __call__(self, x: Any, mask: Any = None, *, lengths: Any = None) -> Any:
        """Run the network from the cells' initial states and return its output: `run` without states.

        Args:
            x: `[B, T, I]`, or the inputs by name or in order, as for `run`.
            mask: `[B, T]`, as for `run`.
            lengths: `[B]`, as for `run`, instead of a mask.

        Returns:
            `[B, T, W]`, or `[B, W]` if a node removes the time axis; a tuple of these if there are several outputs.
        """
        if mask is None and lengths is None and type(x) is np.ndarray and (call := self._one_call) is not None:
            stack, work = call
            many = x.size * work >= 2 * native.THREAD_WORK
            y = stack.run(x, processors() if many else 1)
            if y is not None:
                return y
        return self.run(x, mask=mask, lengths=lengths)[0]

    @cached_property
    def _one_call(self) -> tuple[Any, float] | None:
        """The network as one call of the kernel, which has little overhead, and its multiplications per number of x.

        None if the network needs several calls.
        """
        call = self.calls.whole
        if call is None or self.needs_lengths:
            return None
        work = sum(node.multiplications for node in self.nodes) / (self.input_size or 1)
        return native.stack([layer.packed for layer in call.layers], call.timed, call.last_step), work

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
            x: `[B, T, I]`, array-like of real numbers, which are cast to the network's dtype (also float64 to float32).
                Any strides; B and T may be 0. Ids for an `Embedding` are `[B, T]` and keep their dtype. Several inputs
                are a dict by name, or a tuple in order. NaN isn't looked for: states and outputs become NaN from its
                step on, unless a mask leaves the step out; `predict` treats missing values as in training.
            state: a state per cell in the order of `cells`: `State(h, c)` for an LSTM and `HiddenState(h)` for the
                others, or a pair of arrays, each `[B, H]`; or all arrays in one flat list. With one cell the outer
                tuple may be omitted. None, for all or for one cell: the cell's initial state, which is zeros
                unless it is learned. A cell that starts from values of the network has to be None.
            mask: `[B, T]` of bool, True: the step is used; None: all steps are. The mask applies to every input with a
                time axis; a dict by name sets one per input.
            lengths: `[B]` integers from 0 to T, instead of `mask`: the first steps of each row are used.
            reset: `[B, T]` of bool, True: a new piece of the sequence begins at this step. Before it, every state is
                set to the cell's initial state, even if `state` is given. A backward node runs each piece from its end,
                the last piece from `state`. None: no resets. `lengths` and `reset` may be dicts like `mask`. Not
                supported for inputs of a node that starts from values of the network.
            threads: the number of threads that the kernel may use; None: chosen by the number of processors and the
                amount of work.
            weights: the number format of the matrices: `"float32"`, `"bfloat16"` or `"int8"`, with the same bits
                as in a `Stream`; None: the network's own. The weights are packed at the first such run.
            record: a recording to fill with the gates, c and h of each cell at every step and the values between the
                nodes. The results have the same bits. `trace` is the public interface to it.

        Returns:
            `(y, state)`: `y` is `[B, T, W]`, or `[B, W]` if a node removes the time axis; a tuple of these if there are
            several outputs. `state` is a tuple of one state per cell, after the last step (the initial one if T = 0).
            The caller owns all arrays.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: values that aren't real numbers; both mask and lengths; bfloat16 or int8 for a float64 network.
            ValueError: threads below 1 or above 2^31 - 1; unknown weights; ids out of range; resets for a node that
                combines steps; neither mask nor lengths for a network that needs them.
        """
        return run_network(self, x, state, mask, lengths, reset, threads, weights, record)

    def as_inputs(self, owner: str, x: Any) -> dict[str, Array]:
        """Return the inputs by name as arrays of real numbers, cast to the network's dtype except for ids.

        Args:
            owner: the function or class, for error messages.
            x: as for `run`.

        Raises:
            TypeError: values that aren't real numbers, or missing or unknown inputs.
        """
        names = self.inputs
        if isinstance(x, Mapping):
            if x.keys() != set(names):
                got = ", ".join(map(str, x)) or "none"
                raise TypeError(f"{owner}: expected the inputs {', '.join(names)}, got {got}")
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

    def edit(self, patches: Patch | Iterable[Patch]) -> Network:
        """Return the network with additional patches, which change gates and states during a run.

        The result is a Network with the same arrays, which can be run, traced, streamed, pooled, and saved in the
        native format (other formats don't support patches). If two patches change the same value, the later one is
        applied to the result of the earlier one.

        Args:
            patches: a `Patch`, or several in the order in which they are applied.

        Returns:
            A new network.

        Raises:
            TypeError: an object that isn't a patch.
            ValueError: an unknown node, cell or gate.
            IndexError: units out of range. A run checks the rows and steps.

        >>> from cellstack import CellSpec, Patch
        >>> from cellstack.nodes import Cell, Recurrent
        >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8)), np.ones((2, 8)))
        >>> net = Network([Recurrent((cell,))])
        >>> patched = net.edit(Patch("layer_0", gate="h", units=[1], value=0.5))
        >>> patched(np.ones((1, 3, 1)))[0, :, 1]
        array([0.5, 0.5, 0.5])
        """
        if not isinstance(patches, (Patch, Iterable)):
            raise TypeError(f"Network: expected a Patch or several, got {type(patches).__name__}")
        added = (patches,) if isinstance(patches, Patch) else tuple(patches)
        return self._with(self.nodes, self.patches + added)

    @property
    def unedited(self) -> Network:
        """The network without patches."""
        return self._with(self.nodes, ()) if self.patches else self

    @property
    def weights(self) -> str:
        """The number format of the matrices: the network's dtype, or `"bfloat16"` if any node has that."""
        layers = *self.cells, *(node for node in self.nodes if isinstance(node, Products))
        return "bfloat16" if any(layer.weights == "bfloat16" for layer in layers) else self.dtype.name

    def with_weights(self, weights: str) -> Network:
        """Return the network with its matrices stored in another number format, in memory and in files.

        Its results are bit for bit those of `run(…, weights=weights)` of this network: x and h are rounded like the
        matrices in products, sums and states are float32. The matrices are those of cells, `Dense` and `GroupedDense`;
        other weights, such as biases and convolutions, don't change. The native format stores bfloat16 matrices as
        such; other formats get the same values as float32.

        Args:
            weights: `"bfloat16"`: round each number to the nearest bfloat16 (8 bits of precision, two bytes);
                `"float32"`: convert bfloat16 to float32, without a change of the values.

        Returns:
            A new network.

        Raises:
            ValueError: an unknown format.
            TypeError: bfloat16 for a float64 network.

        >>> from cellstack import CellSpec
        >>> from cellstack.nodes import Cell, Recurrent
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
        return Network(**{**self._arguments(), "nodes": nodes, "patches": patches}, _warn=False)

    @property
    def task(self) -> str | None:
        """What `cellstack.train` trained the network for: classify, regress, forecast or text; None for others."""
        task = self.metadata.get("task")
        return task if task in TASKS else None

    @property
    def labels(self) -> tuple[Any, ...]:
        """The classes, in the order of the outputs; () unless the network was trained to classify."""
        return tuple(self.metadata.get("labels") or ()) if self.task == "classify" else ()

    def plan(self) -> Plan:
        """Return the cost of each node and which implementation runs it, one line per node, and the total cost.

        A node's inputs are listed unless its input is the node before; initial states come last. The cost of a step of
        the node's output is the number of multiplications by parameters and the bytes of parameters read, without
        activations and without products of two values.

        Returns:
            The lines.
        """
        return plan_lines(self)

    def __repr__(self) -> str:
        return as_text(self)


def _arguments_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network with these attributes."""
    names = ("nodes", "names", "metadata", "wires", "outputs", "patches")
    inputs = {name: attributes["shapes"][name] for name in attributes["inputs"]}
    return {name: attributes[name] for name in names} | {"inputs": inputs}


_signature = inspect.signature(Network.__init__)  # for users: without `_warn`
Network.__init__.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[one for name, one in _signature.parameters.items() if name != "_warn"]
)
