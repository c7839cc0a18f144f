"""A trace: what went into every node of a network, what came out, and what each cell did, at every step of one run."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cellstack import reference
from cellstack.formats import safetensors as native_format
from cellstack.formats.files import check_replaceable
from cellstack.inspect import diagnostics
from cellstack.nodes.base import Array, Flow
from cellstack.nodes.recurrent import Record, Recording
from cellstack.spec import GATES, STATES, TRACES, FormatError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.inspect.diagnostics import Report, Shares
    from cellstack.network import Network
    from cellstack.nodes.base import CellState, Node
    from cellstack.nodes.recurrent import Cell

KEY, VERSION = "cellstack_trace", 1
IN_MEMORY = 1 << 30  # bytes of gates and states; what is beyond lies in a file that memory maps

Index = slice | Sequence[int] | int | None


class CellTrace(Mapping[str, Array]):
    """What one cell did at every step: its gates, its cell and its output, `[B, T, H]` each, as attributes and by name.

    `i f g o c h` of an LSTM, `z r g h` of a GRU, `g h` of a SimpleRNN: gates after their activations; h may be
    projected. Steps lie in the order of time, whichever way the cell ran. At a step that the mask leaves out, gates are
    zero, and c and h are carried.

    Attributes:
        cell: the `Cell`, its description and arrays.
        fields: the arrays in a `Trace`, `GRUTrace` or `RNNTrace`.
        units: the numbers of the units that are here, of all that the cell has.
        mask: `[B, T]`, which steps were used; None = all.
        record: what the cell took and did in the whole run; None in a trace of some steps or units.
    """

    def __init__(
        self,
        cell: Cell,
        fields: Any,
        units: Array,
        mask: Array | None,
        sums: dict[str, Array] | None = None,
        record: Record | None = None,
    ) -> None:
        self.cell, self.fields, self.units, self.mask = cell, fields, units, mask
        self.record, self._sums = record, sums

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or "fields" not in self.__dict__:
            raise AttributeError(name)
        if name in self.fields._fields:
            return getattr(self.fields, name)
        raise AttributeError(f"a trace of this cell has {', '.join(self.fields._fields)}, not {name!r}")

    def __getitem__(self, name: str) -> Array:
        if name not in self.fields._fields:
            raise KeyError(f"expected one of {', '.join(self.fields._fields)}, got {name!r}")
        return getattr(self.fields, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields._fields)

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def pre(self) -> dict[str, Array]:
        """What the gates are activations of, by gate, `[B, T, H]` each: sums over x and h, with all that is added.

        They are computed by the equations in float64, and zero at steps that the mask leaves out. A coupled forget gate
        has none. A trace of some steps or units has them where they were asked for, `trace(…, pre=True)`.

        Raises:
            ValueError: they weren't kept.
        """
        if self._sums is None:
            if self.record is None:
                raise ValueError("expected pre-activations that were asked for: trace(…, pre=True)")
            self._sums = _pre_activations(self.cell, self.record)
        return self._sums

    def _map(self, take: Callable[[Array, bool], Array]) -> CellTrace:
        """Return the trace of what `take` makes of each array, told whether its last axis is the cell's units."""
        wide = self.cell.spec.output_size == self.cell.spec.units
        fields = {name: take(getattr(self.fields, name), wide or name != "h") for name in self.fields._fields}
        sums = None if self._sums is None else {gate: take(array, True) for gate, array in self._sums.items()}
        mask = None if self.mask is None else take(self.mask, False)
        return CellTrace(self.cell, type(self.fields)(**fields), take(self.units, True), mask, sums)

    def gate_shares(self) -> dict[str, Shares]:
        """Return in what share of the steps each gate is nearly shut and open: see `diagnostics.gate_shares`."""
        return diagnostics.gate_shares(self)

    def half_lives(self) -> Array:
        """Return in how many steps each unit forgets half of what it holds: see `diagnostics.half_lives`."""
        return diagnostics.half_lives(self)

    def contributions(self, step: int = -1) -> Array:
        """Return what each past step still contributes to c at a step: see `diagnostics.contributions`."""
        return diagnostics.contributions(self, step)

    def lyapunov_exponent(self, steps: int = diagnostics.LONGEST) -> float:
        """Return how fast states that differ a little part along the run: see `diagnostics.lyapunov_exponent`."""
        return diagnostics.lyapunov_exponent(self, steps)

    def __repr__(self) -> str:
        return f"{self.cell.summary}: {', '.join(self.fields._fields)} {list(self.fields.h.shape)}"


class NodeTrace:
    """What went into one node and what came out; the fields of its cell too, `t["layer_0"].f`, where it has one.

    Attributes:
        node: the node.
        x: what went in, `[B, T, W]` or as it was; a tuple where it took several values.
        y: what came out.
        cells: the trace of each of its cells, bottom first, forwards before backwards.
    """

    def __init__(self, node: Node, x: Any, y: Array, cells: tuple[CellTrace, ...]) -> None:
        self.node, self.x, self.y, self.cells = node, x, y, cells

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "cells" not in self.__dict__:
            raise AttributeError(name)
        if len(self.cells) == 1 and hasattr(self.cells[0], name):
            return getattr(self.cells[0], name)
        if len(self.cells) > 1:
            raise AttributeError(f"this node has {len(self.cells)} cells: take one of them, .cells[0].{name}")
        has = [*self.cells[0], "pre"] if self.cells else []
        raise AttributeError(f"a trace of this node has {', '.join(['x', 'y', *has])}, not {name!r}")

    def __repr__(self) -> str:
        lines = [f"{type(self.node).__name__}: {_shape(self.x)} -> {_shape(self.y)}"]
        return "\n".join([*lines, *(f"  {cell!r}" for cell in self.cells)])


class NetworkTrace(Mapping[str, NodeTrace]):
    """What a network did in one run: a mapping from the names of its nodes to their `NodeTrace`.

    Attributes:
        network: the network.
        y: what it returned; a tuple where there are several outputs.
        state: the state after the run, one a cell.

    >>> from cellstack import Cell, CellSpec, Network, Recurrent
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
        self,
        network: Network,
        y: Any,
        state: tuple[CellState, ...],
        parts: Callable[[], tuple[Array, dict[str, NodeTrace]]],
    ) -> None:
        self.network, self.y, self.state = network, y, state
        self._make = parts

    @cached_property
    def _parts(self) -> tuple[Array, dict[str, NodeTrace]]:
        """The steps and the nodes, put together when they are looked at first: a call of few steps costs no more."""
        return self._make()

    @property
    def steps(self) -> Array:
        """The numbers of the steps that are here, of all that were run."""
        return self._parts[0]

    @property
    def _nodes(self) -> dict[str, NodeTrace]:
        return self._parts[1]

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
            rows: which rows, of every array.
            steps: which steps, of what has as many as were run: behind a node that makes fewer, all stay.
            units: which units, of what cells did; what went into nodes and came out stays whole.

        Raises:
            IndexError: a row, a step or a unit that isn't there.
        """
        graph, count = self.network.graph, len(self.steps)

        def of_value(array: Array, name: str) -> Array:
            here = graph.timed(name) and array.shape[1] == count
            return _cut(array, rows, steps if here else None, None)

        def of_cell(array: Array, wide: bool) -> Array:
            if array.ndim == 1:
                return array[_index(units)]
            here = array.shape[1] == count
            return _cut(array, rows, steps if here else None, units if wide else None)

        nodes = {}
        for name, node in self._nodes.items():
            sources = self.network.wires[self.network.names.index(name)]
            xs = tuple(of_value(array, source) for array, source in zip(_tuple(node.x), sources, strict=True))
            cells = tuple(cell._map(of_cell) for cell in node.cells)
            nodes[name] = NodeTrace(node.node, _alone(xs), of_value(node.y, name), cells)
        ys = tuple(of_value(array, name) for array, name in zip(_tuple(self.y), self.network.outputs, strict=True))
        state = tuple(type(one)(*(array[_index(rows)] for array in one)) for one in self.state)
        return NetworkTrace(self.network, _alone(ys), state, lambda: (self.steps[_index(steps)], nodes))

    def report(self) -> Report:
        """Return what stands out: dead, stuck and saturated units, how long they remember, whether the state is stable.

        Raises:
            ValueError: a trace of some steps or units, or one without a cell, a row or a step.
        """
        return diagnostics.report(self)

    def plot(
        self, nodes: str | Iterable[str] | None = None, fields: Iterable[str] | None = None, row: int = 0
    ) -> Figure:
        """Return a matplotlib figure of one row: a map of units over steps for each gate and state of each cell.

        Args:
            nodes: the names of the nodes; None = all that have cells.
            fields: which of the cells' fields; None = all.
            row: which row.

        Raises:
            ImportError: matplotlib isn't installed.
            ValueError: no cell that has such a field.
            IndexError: a row that isn't there.
        """
        from cellstack.inspect.plot import plot

        return plot(self, nodes, fields, row)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace, with its network, to a safetensors file, whole or not at all; `load` reads it.

        Args:
            path: where to; a file that is there is replaced in one step.

        Raises:
            OSError: the file can't be written.
        """
        target, _ = check_replaceable(path)
        tensors: dict[str, Array] = {"steps": self.steps}
        for number, array in enumerate(_tuple(self.y)):
            tensors[f"y/{number}"] = array
        for number, state in enumerate(self.state):
            tensors |= {f"state/{number}/{name}": array for name, array in zip(state._fields, state, strict=True)}
        for name, node in self._nodes.items():
            for number, array in enumerate(_tuple(node.x)):
                tensors[f"nodes/{name}/x/{number}"] = array
            tensors[f"nodes/{name}/y"] = node.y
            for number, cell in enumerate(node.cells):
                where = f"nodes/{name}/cells/{number}"
                tensors |= {f"{where}/{field}": array for field, array in cell.items()}
                tensors[f"{where}/units"] = cell.units
                if cell.mask is not None:
                    tensors[f"{where}/mask"] = cell.mask
                if cell.record is not None:
                    tensors |= _record_arrays(f"{where}/run", cell.record)
                tensors |= {f"{where}/pre/{gate}": array for gate, array in (cell._sums or {}).items()}
        with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as folder:
            own = os.path.join(folder, "network.safetensors")
            native_format.save(self.network, own)
            with open(own, "rb") as file:
                tensors["network"] = np.frombuffer(file.read(), np.uint8)
            draft = os.path.join(folder, "trace.safetensors")
            reverse = {
                f"nodes/{name}/cells/{number}": cell.record.reverse
                for name, node in self._nodes.items()
                for number, cell in enumerate(node.cells)
                if cell.record is not None
            }
            said = json.dumps({"version": VERSION, "nodes": list(self._nodes), "reverse": reverse})
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, draft, {KEY: said})
            os.replace(draft, target)

    def __repr__(self) -> str:
        rows, steps = len(_tuple(self.y)[0]), len(self.steps)
        head = f"Trace of {rows} row{'s' * (rows != 1)}, {steps} step{'s' * (steps != 1)}"
        lines = []
        for name, node in self._nodes.items():
            fields = " | ".join(" ".join(cell) for cell in node.cells)
            lines.append((name, type(node.node).__name__, f"{_shape(node.x)} -> {_shape(node.y)}", fields))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([head, *(f"  {line.rstrip()}" for line in table)])


def trace(
    network: Network,
    x: Any,
    state: Any = None,
    mask: Any = None,
    lengths: Any = None,
    reset: Any = None,
    threads: int | None = None,
    *,
    nodes: str | Iterable[str] | None = None,
    units: Index = None,
    steps: Index = None,
    pre: bool = False,
    in_memory: int = IN_MEMORY,
) -> NetworkTrace:
    """Run a network and return what every node and cell did: see `Network.trace`."""
    names, cells = network.names, None
    if nodes is not None:
        names = (nodes,) if isinstance(nodes, str) else tuple(nodes)
        for name in names:
            if name not in network.names:
                raise ValueError(f"Network: expected nodes out of {', '.join(network.names)}, got {name!r}")
        numbers = _numbers(network)
        cells = {number for name in names for number in numbers[name]}
    recording = Recording(cells, _Arrays(in_memory).empty)
    y, after = network.run(x, state, mask, lengths, reset, threads, record=recording)
    found = NetworkTrace(network, y, after, lambda: _parts(network, names, recording, pre))
    if units is None and steps is None:
        return found
    part = found.select(None, steps, units)
    for node in part.values():  # a copy of what is wanted, so that the rest is given back
        node.cells = tuple(cell._map(lambda array, _: array.copy()) for cell in node.cells)
        node.x = _alone(tuple(array.copy() for array in _tuple(node.x)))
        node.y = node.y.copy()
    part.y = y
    return part


def load(path: str | PathLike[str]) -> NetworkTrace:
    """Read a trace that `NetworkTrace.save` wrote.

    Args:
        path: the file.

    Raises:
        FormatError: it isn't a trace, or it is damaged.
        OSError: it can't be read.
    """
    path = fspath(path)
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(said, dict) or said.get("version") != VERSION:
                raise FormatError(f"{path}: expected a trace of version {VERSION}, which NetworkTrace.save writes")
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        with tempfile.TemporaryDirectory() as folder:
            own = os.path.join(folder, "network.safetensors")
            with open(own, "wb") as copy:
                copy.write(tensors.pop("network").tobytes())
            network = native_format.load(own)
        nodes = {name: _loaded(network, name, tensors, said["reverse"]) for name in said["nodes"]}
        ys = tuple(tensors[f"y/{number}"] for number in range(len(network.outputs)))
        state = tuple(
            STATES[cell.spec.kind](*(tensors[f"state/{number}/{name}"] for name in cell.spec.state_sizes))
            for number, cell in enumerate(network.cells)
        )
        return NetworkTrace(network, _alone(ys), state, lambda: (tensors["steps"], nodes))
    except SafetensorError as error:
        raise FormatError(f"{path}: expected a safetensors file, found {str(error)[:200]!r}") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: expected a trace, found one that is damaged: {error!r:.200}") from None


def _record_arrays(where: str, record: Record) -> dict[str, Array]:
    """Return what a record has beside the cell's own fields, by the names that a file has for them."""
    arrays = {f"{where}/x": record.x}
    arrays |= {f"{where}/{name}": flags for name in ("mask", "reset") if (flags := getattr(record, name)) is not None}
    if record.before is not None:
        arrays |= {f"{where}/before/{name}": a for name, a in zip(record.before._fields, record.before, strict=True)}
    return arrays


def _loaded(network: Network, name: str, tensors: dict[str, Array], reverse: dict[str, bool]) -> NodeTrace:
    number = network.names.index(name)
    node, where = network.nodes[number], f"nodes/{name}"
    cells = []
    for place, cell in enumerate(node.cells):
        own = f"{where}/cells/{place}"
        kind = TRACES[cell.spec.kind]
        fields = kind(*(tensors[f"{own}/{field}"] for field in kind._fields))
        sums = {gate: tensors[f"{own}/pre/{gate}"] for gate in cell.spec.gates if f"{own}/pre/{gate}" in tensors}
        mask, record, state = tensors.get(f"{own}/mask"), None, STATES[cell.spec.kind]
        if f"{own}/run/x" in tensors:
            run = f"{own}/run"
            before = (
                state(*(tensors[f"{run}/before/{n}"] for n in state._fields)) if f"{run}/before/h" in tensors else None
            )
            gates = np.stack([getattr(fields, gate) for gate in GATES[cell.spec.kind]], axis=2)
            c = getattr(fields, "c", None)
            flags = tensors.get(f"{run}/mask"), tensors.get(f"{run}/reset")
            record = Record(gates, c, fields.h, tensors[f"{run}/x"], before, *flags, reverse[own])
        cells.append(CellTrace(cell, fields, tensors[f"{own}/units"], mask, sums or None, record))
    xs = tuple(tensors[f"{where}/x/{place}"] for place in range(len(network.wires[number])))
    return NodeTrace(node, _alone(xs), tensors[f"{where}/y"], tuple(cells))


def _numbers(network: Network) -> dict[str, range]:
    """Return which cells are each node's, in the order of the state."""
    numbers, first = {}, 0
    for name, node in zip(network.names, network.nodes, strict=True):
        numbers[name] = range(first, first + len(node.cells))
        first += len(node.cells)
    return numbers


def _parts(
    network: Network, names: Sequence[str], recording: Recording, pre: bool
) -> tuple[Array, dict[str, NodeTrace]]:
    """Return the numbers of the steps, and the traces of some nodes, out of what a run recorded."""
    numbers = _numbers(network)
    _complete(network, recording, numbers)
    kept: dict[str, NodeTrace] = {}
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        if name not in names:
            continue
        cells = []
        for number, cell in zip(numbers[name], node.cells, strict=True):
            record = recording[number]
            assert record is not None, "cells of the nodes asked for are kept"
            planes = [record.gates[:, :, plane] for plane in range(len(GATES[cell.spec.kind]))]
            fields = TRACES[cell.spec.kind](*planes, *([] if record.c is None else [record.c]), record.h)
            sums = _pre_activations(cell, record) if pre else None
            cells.append(CellTrace(cell, fields, np.arange(cell.spec.units), record.mask, sums, record))
        values = tuple(recording.flows[source].x for source in sources)
        kept[name] = NodeTrace(node, _alone(values), recording.flows[name].x, tuple(cells))
    timed = [recording.flows[name].x for name in network.inputs if network.graph.timed(name)]
    return np.arange(timed[0].shape[1] if timed else 1), kept


class _Arrays:
    """Makes arrays in memory, and beyond a bound in files without a name that memory maps."""

    def __init__(self, in_memory: int) -> None:
        self.left = in_memory

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        self.left -= size
        if self.left >= 0 or not size:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:
            return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def _complete(network: Network, recording: Recording, numbers: Mapping[str, range]) -> None:
    """Add what nodes gave that ran in one call with those behind them, each in the order of its own steps."""
    for stage in network._stages:
        backwards = getattr(stage.node, "go_backwards", False)
        for place, number in enumerate(stage.nodes):
            name = network.names[number]
            records = [recording[cell] for cell in numbers[name]]
            if backwards and place:  # it takes the sequence as the node before it gave it: turned round
                for cell, record in zip(numbers[name], records, strict=True):
                    recording[cell] = None if record is None else _turned(record)
            if number == stage.nodes[-1] or not records:
                continue
            above = recording[numbers[network.names[stage.nodes[place + 1]]][0]]
            top = records[-1].h if records[-1] is not None else above.x if above is not None else None
            if top is None:
                continue
            recording.flows[name] = Flow(top[:, ::-1] if backwards else top)


def _turned(record: Record) -> Record:
    """Return the record of a cell that ran backwards as that of one that runs forwards over the sequence in reverse."""
    turned = {
        name: None if (array := getattr(record, name)) is None else array[:, ::-1]
        for name in ("gates", "c", "h", "x", "mask", "reset")
    }
    return record._replace(**turned, reverse=False)


def _pre_activations(cell: Cell, record: Record) -> dict[str, Array]:
    spec, (batch, steps, width) = cell.spec, record.x.shape
    order = slice(None, None, -1) if record.reverse else slice(None)
    states = [record.h, *([] if record.c is None else [record.c])]
    initial = [cell.arrays.get(f"initial_{name}", np.zeros(size)) for name, size in spec.state_sizes.items()]
    before = []
    for place, (array, fresh) in enumerate(zip(states, initial, strict=True)):
        start = fresh if record.before is None else record.before[place]
        begun = np.broadcast_to(start, (batch, array.shape[2]))[:, None]
        previous = np.concatenate([begun, array[:, order][:, :-1]], axis=1) if steps else array
        if record.reset is not None:
            previous = np.where(record.reset[:, order, None], fresh, previous)
        before.append(previous[:, order].reshape(batch * steps, array.shape[2]))
    with np.errstate(all="ignore"):
        sums = reference.pre_activations(spec, cell.arrays, record.x.reshape(batch * steps, width), before)
    made = {gate: array.reshape(batch, steps, spec.units).astype(cell.dtype) for gate, array in sums.items()}
    if record.mask is not None:
        made = {gate: np.where(record.mask[:, :, None], array, 0) for gate, array in made.items()}
    return made


def _tuple(value: Any) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def _alone(values: tuple[Array, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _index(index: Index) -> Any:
    """Return an index of an axis that keeps it."""
    if index is None:
        return slice(None)
    return [index] if isinstance(index, (int, np.integer)) else index


def _cut(array: Array, rows: Index, steps: Index, units: Index) -> Array:
    array = array[_index(rows)]
    if steps is not None:
        array = array[:, _index(steps)]
    return array if units is None else array[..., _index(units)]


def _shape(value: Any) -> str:
    return ", ".join(str(list(one.shape)) for one in _tuple(value))
