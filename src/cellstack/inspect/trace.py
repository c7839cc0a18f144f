"""A trace: the inputs and outputs of every node of a network, and the gates of each cell, at every step of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.inspect import diagnostics
from cellstack.inspect.pre_activations import pre_activations
from cellstack.inspect.values import Index, alone, as_tuple, places_of, shape_text
from cellstack.nodes.base import Array, Flow
from cellstack.nodes.recording import MemoryRecord, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.inspect.diagnostics import Report, Shares
    from cellstack.inspect.differences import TraceDifference
    from cellstack.network import Network
    from cellstack.nodes.base import CellState, Node
    from cellstack.nodes.cell_arrays import Cell


class TraceContents(NamedTuple):
    """The contents of a trace."""

    steps: Array
    """The numbers of the steps."""
    aligned: frozenset[str]
    """The names of the inputs and nodes whose value has a step for each of them, in order."""
    nodes: dict[str, NodeTrace]
    masks: dict[str, NDArray[np.bool_]]
    """The masks, by the names of the inputs and nodes that have one, with the same selection."""
    whole: bool = True
    """Whether the trace covers all rows, steps and units of the run."""


class CellTrace(Mapping[str, Array]):
    """One cell at every step: its gates, cell state and output, `[B, T, H]` each, as attributes and by name.

    `i f g o c h` for an LSTM, `z r g h` for a GRU, `g h` for a SimpleRNN: gates after their activations; h may be
    projected. Steps are in the order of time, regardless of the cell's direction. At masked steps, gates are zero, and
    c and h are carried over. The arrays of an mLSTM have an axis of heads: see `MemoryTrace`.

    Attributes:
        cell: the `Cell`, its description and arrays.
        units: the indices of the units in the trace.
        mask: `[B, T]`, True at used steps; None = all.
        record: the cell's inputs and results in the whole run; None in a trace of some steps or units.
    """

    def __init__(
        self,
        cell: Cell,
        fields: Any,
        units: Array,
        mask: Array | None,
        sums: dict[str, Array] | None = None,
        record: Record | MemoryRecord | None = None,
    ) -> None:
        self.cell, self.units, self.mask, self.record = cell, units, mask, record
        self._fields, self._sums = fields, sums

    @property
    def fields(self) -> Any:
        """The arrays in a `Trace`, `GRUTrace` or another named tuple of its kind."""
        if callable(self._fields):
            self._fields = self._fields()
        return self._fields

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or "cell" not in self.__dict__:
            raise AttributeError(name)
        if name in self._names:
            return getattr(self.fields, name)
        raise AttributeError(f"a trace of this cell has {', '.join(self._names)}, not {name!r}")

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(f"expected one of {', '.join(self._names)}, got {name!r}")
        return getattr(self.fields, name)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.cell.spec.of_kind.trace._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def flat(self, name: str) -> Array:
        """Return a field as `[B, T, W]`: of an mLSTM, heads one after the other."""
        array = self[name]
        return array.reshape(*array.shape[:2], math.prod(array.shape[2:]))

    @property
    def pre(self) -> dict[str, Array]:
        """The pre-activations, by gate, `[B, T, H]` each: the full sums over x and h.

        Computed in float64, and zero at masked steps. A coupled forget gate has none. A trace of some steps
        or units has them if they were requested, `trace(…, pre=True)`.

        Raises:
            ValueError: they weren't kept; a cell with peepholes and patches, whose c before zoneout is unknown.
        """
        if self._sums is None:
            if self.record is None:
                raise ValueError("this trace has no pre-activations: request them with trace(…, pre=True)")
            self._sums = self._pre_activations(self.record)
        return self._sums

    def _pre_activations(self, record: Any) -> dict[str, Array]:
        return pre_activations(self.cell, record)

    def _map(self, take: Callable[[Array], Array]) -> CellTrace:
        """Return the trace with `take` applied to each array, without the run's record."""
        fields = type(self.fields)(*map(take, self.fields))
        sums = None if self._sums is None else {gate: take(array) for gate, array in self._sums.items()}
        return type(self)(self.cell, fields, self.units, None if self.mask is None else take(self.mask), sums)

    def _select(self, rows: Any, steps: Any, units: Index) -> CellTrace:
        at = places_of("units", units, len(self.units))
        wide = self.cell.spec.output_size == self.cell.spec.units
        part = self._map(lambda array: array[rows][:, steps])
        fields = {name: array[..., at] if wide or name != "h" else array for name, array in part.items()}
        sums = None if part._sums is None else {gate: array[..., at] for gate, array in part._sums.items()}
        return CellTrace(self.cell, type(self.fields)(**fields), self.units[at], part.mask, sums)

    def gate_shares(self) -> dict[str, Shares]:
        """Return the share of steps at which each gate is nearly closed, nearly open: see `diagnostics.gate_shares`."""
        return diagnostics.gate_shares(self)

    def half_lives(self) -> Array:
        """Return the number of steps in which each unit forgets half of its state: see `diagnostics.half_lives`."""
        return diagnostics.half_lives(self)

    def contributions(self, step: int = -1) -> Array:
        """Return each past step's contribution to c at a step: see `diagnostics.contributions`."""
        return diagnostics.contributions(self, step)

    def lyapunov_exponent(self, steps: int = diagnostics.LONGEST) -> float:
        """Return the rate at which nearly equal states diverge along the run: see `diagnostics.lyapunov_exponent`."""
        return diagnostics.lyapunov_exponent(self, steps)

    def __repr__(self) -> str:
        return f"{self.cell.summary}: {', '.join(self)} {list(self.fields.h.shape)}"


class NodeTrace:
    """The input and output of one node, and the fields of its cell, `t["layer_0"].f`, if it has one.

    Attributes:
        node: the node.
        x: the input, `[B, T, W]` or in its own shape; a tuple of several inputs.
        y: the output.
        cells: the trace of each of its cells, bottom first, forward before backward.
    """

    def __init__(self, node: Node, x: Any, y: Array, cells: tuple[CellTrace, ...]) -> None:
        self.node, self.x, self.y, self.cells = node, x, y, cells

    @property
    def records(self) -> list[Any]:
        """What the run recorded of each of its cells; None in a trace of some rows or steps."""
        return [cell.record for cell in self.cells]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "cells" not in self.__dict__:
            raise AttributeError(name)
        if len(self.cells) == 1 and hasattr(self.cells[0], name):
            return getattr(self.cells[0], name)
        if len(self.cells) > 1:
            raise AttributeError(f"this node has {len(self.cells)} cells: select one of them, .cells[0].{name}")
        has = [*self.cells[0], "pre"] if self.cells else []
        raise AttributeError(f"a trace of this node has {', '.join(['x', 'y', *has])}, not {name!r}")

    def __getitem__(self, name: str) -> Array:
        if len(self.cells) == 1:
            return self.cells[0][name]
        raise KeyError(f"this node has {len(self.cells)} cells: select one of them, .cells[0][{name!r}]")

    def __repr__(self) -> str:
        lines = [f"{type(self.node).__name__}: {shape_text(self.x)} -> {shape_text(self.y)}"]
        return "\n".join([*lines, *(f"  {cell!r}" for cell in self.cells)])


class NetworkTrace(Mapping[str, NodeTrace]):
    """The trace of one run of a network: a mapping from the names of its nodes to their `NodeTrace`.

    Attributes:
        network: the network.
        y: the network's output; a tuple of several outputs.
        state: the state after the run, one per cell.

    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8)), np.ones((2, 8)))
    >>> t = Network([Recurrent((cell,))]).trace(np.ones((1, 3, 1)))
    >>> t["layer_0"].f.shape
    (1, 3, 2)
    >>> bool((t["layer_0"].h == t.y).all())
    True
    >>> t
    Trace of 1 row, 3 steps
      layer_0  Recurrent  [1, 3, 1] -> [1, 3, 2]  i f g o c h
    """

    def __init__(
        self, network: Network, y: Any, state: tuple[CellState, ...], parts: TraceContents | Callable[[], TraceContents]
    ) -> None:
        self.network, self.y, self.state = network, y, state
        self._made = parts

    @property
    def _parts(self) -> TraceContents:
        """The contents of the trace, built at the first access, which keeps short runs fast."""
        contents = self._made
        if not isinstance(contents, TraceContents):
            contents = self._made = contents()
        return contents

    def __reduce__(self) -> tuple[Any, ...]:
        return NetworkTrace, (self.network, self.y, self.state, self._parts)

    @property
    def steps(self) -> Array:
        """The indices of the traced steps."""
        return self._parts.steps

    @property
    def _nodes(self) -> dict[str, NodeTrace]:
        return self._parts.nodes

    def __getitem__(self, name: str) -> NodeTrace:
        if name in self._nodes:
            return self._nodes[name]
        what = "isn't kept" if name in self.network.names else "isn't in the network"
        raise KeyError(f"expected one of {', '.join(self._nodes)}, got {name!r}, which {what}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def select(self, rows: Index = None, steps: Index = None, units: Index = None) -> NetworkTrace:
        """Return the trace of some rows, steps and units; slices copy nothing.

        Args:
            rows: the rows, of every array: a slice, a number, numbers, or flags.
            steps: the steps, of all arrays aligned with the input's steps: not after a node that changes the steps.
            units: the units, of the cells' arrays; those of mLSTMs, and inputs and outputs of nodes stay whole.

        Raises:
            IndexError: a row, a step or a unit that doesn't exist.
        """
        numbers, aligned, traced, masks, whole = self._parts
        some = places_of("rows", rows, len(as_tuple(self.y)[0]))
        at = places_of("steps", steps, len(numbers))

        def of_value(array: Array, name: str) -> Array:
            return array[some][:, at] if name in aligned else array[some]

        nodes = {}
        for name, node in traced.items():
            sources = self.network.wires[self.network.names.index(name)]
            xs = tuple(of_value(array, source) for array, source in zip(as_tuple(node.x), sources, strict=True))
            cells = tuple(
                cell._select(some, at if sources[0] in aligned else slice(None), units) for cell in node.cells
            )
            nodes[name] = NodeTrace(node.node, alone(xs), of_value(node.y, name), cells)
        ys = tuple(of_value(array, name) for array, name in zip(as_tuple(self.y), self.network.outputs, strict=True))
        state = tuple(type(one)(*(array[some] for array in one)) for one in self.state)
        masks = {name: of_value(mask, name) for name, mask in masks.items()}
        whole = whole and rows is None and steps is None and units is None
        return NetworkTrace(self.network, alone(ys), state, TraceContents(numbers[at], aligned, nodes, masks, whole))

    def _copied(self) -> NetworkTrace:
        """Return the trace with copied arrays, so that the memory of the full run can be freed."""
        numbers, aligned, traced, masks, whole = self._parts
        nodes = {}
        for name, node in traced.items():
            x = alone(tuple(array.copy() for array in as_tuple(node.x)))
            nodes[name] = NodeTrace(node.node, x, node.y.copy(), tuple(cell._map(np.copy) for cell in node.cells))
        y = alone(tuple(array.copy() for array in as_tuple(self.y)))
        masks = {name: mask.copy() for name, mask in masks.items()}
        return NetworkTrace(self.network, y, self.state, TraceContents(numbers, aligned, nodes, masks, whole))

    def gradient(self, unit: int, step: int = -1, output: str | None = None) -> dict[str, Array]:
        """Return the gradient of one number of every row with respect to each input and each node's output.

        For an input, it shows which steps the number depends on: `np.linalg.norm(g["x"], axis=-1)` is the connectivity,
        by step.

        Args:
            unit: the index of the number in the step, or in the returned vector.
            step: the step of the output; -1 = the last.
            output: the name of the node that returns it; None = the first output.

        Returns:
            An array by the name of each input and node, with the shape of its value; zeros where the number doesn't
            depend on it. Ids have none.

        Raises:
            ValueError: a trace of some nodes, rows, steps or units; a network with patches; a node without a gradient,
                which the message names.
            IndexError: a step or a unit that doesn't exist.
            TypeError: a step or a unit that isn't a whole number.

        Ref: backpropagation through time: Werbos 1990, "Backpropagation Through Time: What It Does and How to Do It";
        as a visualisation of an output's dependencies: Madsen 2019, "Visualizing memorization in RNNs".

        >>> from cellstack import CellSpec, Network
        >>> from cellstack.nodes import Cell, Recurrent
        >>> cell = Cell(CellSpec(1, 1, "linear", kind="rnn", use_bias=False), np.array([[2.0]]), np.array([[0.5]]))
        >>> t = Network([Recurrent((cell,))]).trace(np.ones((1, 3, 1)))
        >>> t.gradient(0)["x"].ravel()
        array([0.5, 1. , 2. ])
        """
        from cellstack.inspect.gradients import gradient

        network = self.network
        output = network.outputs[0] if output is None else output
        if output not in network.names:
            raise ValueError(f"gradient: expected an output out of {', '.join(network.names)}, got {output!r:.80}")
        if network.patches:
            raise ValueError("gradient: networks with patches have no gradient")
        _, _, nodes, masks, whole = self._parts
        records = {name: node.records for name, node in nodes.items()}
        if not whole or len(nodes) < len(network.names):
            raise ValueError("gradient: expected a trace of all nodes, rows, steps and units")
        values = {name: node.y for name, node in nodes.items()}
        for name, sources in zip(network.names, network.wires, strict=True):
            values |= dict(zip(sources, as_tuple(nodes[name].x), strict=True))
        flows = {name: Flow(x, masks.get(name)) for name, x in values.items()}
        return gradient(network, flows, records, output, step, unit)

    def diff(self, other: NetworkTrace) -> TraceDifference:
        """Return the differences between another trace and this one: where they start, and how large they are.

        Args:
            other: a trace of the same network, with or without patches, and of the same rows, steps and units.

        Raises:
            KeyError: a node that the other trace lacks.
            ShapeError: other rows, steps or units.
            ValueError: other cells.
        """
        from cellstack.inspect.differences import TraceDifference

        return TraceDifference(self, other)

    def report(self) -> Report:
        """Return findings: dead, stuck and saturated units, how long they remember, whether the state is stable.

        Raises:
            ValueError: a trace of some steps or units, or one without a cell, a row or a step.
        """
        return diagnostics.report(self)

    def plot(
        self, nodes: str | Iterable[str] | None = None, fields: Iterable[str] | None = None, row: int = 0
    ) -> Figure:
        """Return a matplotlib figure of one row: a map of units over steps for each gate and state of each cell.

        Args:
            nodes: the names of the nodes; None = all with cells.
            fields: the fields of the cells; None = all.
            row: the row.

        Raises:
            ImportError: matplotlib isn't installed.
            ValueError: no cell with such a field; no step, or no unit.
            IndexError: a row that doesn't exist.
        """
        from cellstack.inspect.plot import plot

        return plot(self, nodes, fields, row)

    def save_html(
        self,
        path: str | PathLike[str],
        labels: Any = None,
        *,
        audio: tuple[Any, float] | None = None,
        title: str | None = None,
        rows: Index = None,
        names: Mapping[str, Sequence[str]] | None = None,
        truth: Sequence[Any] | None = None,
        rescale: tuple[Any, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        """Write an interactive page of the trace: one HTML file that works offline.

        The page contains the network, and runs it again when the reader changes something. Up to half a million numbers
        of the trace keep their precision, up to four million are stored as float32, more as float16.

        Args:
            path: the path of the file; an existing file is replaced atomically.
            labels: the label of each step: characters (as a string) or words, dates, or numbers, such as times; a list
                of lists, one per row, where rows have different labels.
            audio: `(samples [N], rate in Hz)`, the signal that the steps were computed from, aligned evenly with them;
                it is shown above the map, with its spectrum.
            title: the heading of the page.
            rows: the rows, as a slice, a number or numbers; None = all.
            names: the names of features, by the name of an input or a node: `{"x": columns, "head": classes}`. Networks
                trained by cellstack already have those of their channels, classes and targets.
            truth: the true class or value of each row, or a list with one for each step; shown next to the prediction.
            ids: the name of each row, such as a customer's.
            rescale: `(scale, offset)`, which broadcast to the output: `output·scale + offset` is the prediction in its
                original units.

        Raises:
            ValueError: more numbers than a page supports; labels, names, true values or a wave that don't fit.
            IndexError: a row that doesn't exist.
            TypeError: a title that isn't a string.
            OSError: the file can't be written.
        """
        from cellstack.inspect.html import save_html  # a page is made of a trace, not a trace of it

        save_html(self, path, labels, audio, title, rows, names=names, truth=truth, rescale=rescale, ids=ids)

    def widget(
        self,
        labels: Any = None,
        *,
        audio: tuple[Any, float] | None = None,
        title: str | None = None,
        rows: Index = None,
        names: Mapping[str, Sequence[str]] | None = None,
        truth: Sequence[Any] | None = None,
        rescale: tuple[Any, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> Any:
        """Return the page of the trace as a widget for Jupyter, VS Code or marimo; arguments as in `save_html`.

        A trace at the end of a notebook cell is shown the same way.

        Raises:
            ImportError: anywidget isn't installed.
            ValueError, IndexError: see `save_html`.
        """
        from cellstack.inspect.widget import widget  # as a page

        return widget(self, labels, audio, title, rows, names=names, truth=truth, rescale=rescale, ids=ids)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        from cellstack.inspect.widget import mimebundle  # as a page

        return mimebundle(self, **options)

    def __repr__(self) -> str:
        rows, steps = len(as_tuple(self.y)[0]), len(self.steps)
        head = f"Trace of {rows} row{'s' * (rows != 1)}, {steps} step{'s' * (steps != 1)}"
        lines = []
        for name, node in self._nodes.items():
            fields = " | ".join(" ".join(cell) for cell in node.cells)
            lines.append((name, type(node.node).__name__, f"{shape_text(node.x)} -> {shape_text(node.y)}", fields))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([head, *(f"  {line.rstrip()}" for line in table)])
