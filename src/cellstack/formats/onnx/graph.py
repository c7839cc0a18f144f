"""Whole ONNX graphs as Networks: axes are put in order, operators become nodes, and what can't be is listed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import INPUTS, KINDS, Names, clean, is_recurrent, nodes_of, read_operator
from cellstack.formats.onnx.file import DOMAINS, Model, Scope, declared, label, live_nodes, short, uses
from cellstack.formats.onnx.fold import Spread, TooMuchError, fold, numbers
from cellstack.formats.onnx.scan import is_scan, read_scan
from cellstack.formats.onnx.values import Ends, Flowing, Lengths, Ref, StartOf, Symbols, Unknown
from cellstack.network import Network
from cellstack.nodes import Activation, GlobalPool, Merge, Node, Permute, Recurrent, Reshape, Select
from cellstack.spec import FormatError

Handler = Callable[["Reader", Any, dict[str, Any], list[Any]], list[Any]]
MOVES = {"Slice", "Gather", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Split", "Reshape", "Cast", "Expand"}
SHAPES = {"Cast", "Concat", "Gather", "Identity", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"}
WAYS = {  # in which order an input's axes may come, the likeliest first
    3: (("B", "T", "F"), ("T", "B", "F"), ("B", "F", "T")),
    2: (("B", "F"), ("B", "T"), ("T", "B")),
    "ids": (("B", "T"), ("T", "B")),
}
MOST_TRIES = 81
FLOATS = (1, 10, 11, 16)
INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)


class Refused(ValueError):  # noqa: N818
    """An operator that a Network can't run as it stands; the message says why."""


class Turned(Refused):
    """An operator whose input has its axes in an order that it can't take; those of the inputs may come in another."""


class Reader:
    """Reads one graph with the axes of its inputs in a given order.

    Args:
        scope: the outermost graph.
        handlers: what reads each operator.
        axes: of each input that data comes in by.
        starts: inputs that hold states to start from.
        lengths: inputs that hold the rows' lengths.
    """

    def __init__(
        self,
        scope: Scope,
        handlers: dict[str, Handler],
        axes: dict[str, tuple[str, ...] | None],
        starts: set[str],
        lengths: set[str],
    ) -> None:
        self.scope, self.model, self.handlers = scope, scope.model, handlers
        self.lengths, self.inputs = lengths, {}
        self.budget, self.pinned = self.model.budget.again(), False  # pinned: to the lengths that the file names
        self.values: dict[str, Any] = {}
        self.names = Names()
        self.nodes: list[tuple[str, Node, tuple[str, ...]]] = []
        self.places: dict[str, int] = {}
        self.bound: dict[str, list[str]] = {}  # the names in the file of what each wire carries
        self.problems: list[tuple[str, str]] = []
        self.turned = 0  # of these, such as are an affair of the axes' order
        self.understood = 0  # operators that could be read
        self.operators: list[tuple[Any, str, bool]] = []  # cells, wire, and whether it carries every step
        self.live = live_nodes(scope)
        self.uses = uses(scope, self.live)
        for name in starts:
            self.values[name] = StartOf(name)
        for name in lengths:
            self.values[name] = Lengths(name)
        shapes = {value.name: declared(value) for value in scope.graph.input}
        self.ids = {v.name for v in scope.graph.input if v.type.tensor_type.elem_type in INTEGERS}
        for name, labels in axes.items():
            if labels is None:
                found = "" if shapes[name] is None else f", found {len(shapes[name] or ())}"
                self.problems.append(("input", f"{short(name)}: expected numbers with 2 or 3 axes{found}"))
                self.values[name] = Unknown("", True)
                continue
            wire = self.names.fresh(clean(name))
            known = dict(zip(labels, shapes[name] or [None] * len(labels), strict=True))
            self.inputs[wire] = (name, labels, known)
            self.values[name] = Flowing(wire, labels, known.get("F"), known.get("T"), known.get("B"))
            self.bound[wire] = [name]

    # ── what handlers use ───────────────────────────────────────────────────────────────────────────────────────────

    def add(self, name: str, node: Node, *wires: str) -> str:
        """Put a node in, and return the wire that carries what it returns."""
        self.budget.take(node.parameters)  # each node has its own copy, however many share what the file holds
        wire = self.names.fresh(clean(name))
        self.places[wire] = len(self.nodes)
        self.nodes.append((wire, node, wires))
        self.bound[wire] = []
        return wire

    def last(self, wire: str) -> tuple[int, Node] | None:
        """Return the node behind a wire where one thing alone takes what it returns, so that both may become one."""
        if any(self.uses.get(name, 0) != 1 for name in self.bound[wire]):
            return None
        return (self.places[wire], self.nodes[self.places[wire]][1]) if wire in self.places else None

    def replace(self, number: int, node: Node) -> None:
        """Put another node in the place of one."""
        name, _, wires = self.nodes[number]
        self.nodes[number] = (name, node, wires)

    def value(self, name: str) -> Any:
        """Return what a name stands for; None where there is none."""
        if not name:
            return None
        if name not in self.values:
            constant = self.scope.constant(name)
            self.values[name] = Unknown(f"{short(name)} isn't known", True) if constant is None else constant
        return self.values[name]

    def flowing(self, value: Any, what: str = "its input") -> Flowing:
        """Return a value that a wire carries; `Refused` where it is something else."""
        if isinstance(value, Ends):
            value = self.settled(value)
        if isinstance(value, Unknown):
            raise Refused(value.why)
        if not isinstance(value, Flowing):
            found = "none" if value is None else "a constant" if isinstance(value, (np.ndarray, Spread)) else "another"
            raise Refused(f"expected {what} to be data that flows, found {found}")
        if any(value.pad):
            raise Refused("expected padding before a convolution alone")
        return value

    def settled(self, ends: Ends) -> Flowing:
        """Return states as a wire carries them: one, or the two directions of an operator side by side."""
        refs = list(ends.refs.reshape(-1))
        if any(ref.part != "h" for ref in refs):
            raise Refused("a Network's nodes can't take an LSTM's c, which is a state")
        if len(refs) > 2:
            raise Refused(f"expected the states of one operator, found {len(refs)}")
        cells, wire, sequences = self.operators[refs[0].operator]
        if len(refs) == 1:
            wire, width = self._end(refs[0])
        elif not sequences and refs == [Ref(refs[0].operator, way, "h") for way in range(len(cells))]:
            width = sum(cell.spec.output_size for cell in cells)
        else:
            parts = [self._end(ref) for ref in refs]
            wire, width = self.add(f"{wire}.states", Merge("concat"), *(part for part, _ in parts)), 2 * parts[0][1]
            if parts[0][1] != parts[1][1]:
                raise Refused("expected states of one width")
        sizes = iter(ends.refs.shape)
        axes = tuple(axis if axis != "S" else "D" if next(sizes) == 2 else "1" for axis in ends.axes)
        return Flowing(wire, axes, width)

    def _end(self, ref: Ref) -> tuple[str, int]:
        """Return a wire that carries an h after the last step, and its width."""
        cells, wire, sequences = self.operators[ref.operator]
        width = cells[ref.way].spec.output_size
        reverse = ref.way == 1 or self._reversed(wire)
        if len(cells) == 2:
            start = ref.way * width
            wire = self.add(f"{wire}.h", Select(start, start + width, axis=-1), wire)
        if sequences:
            if reverse:
                wire = self.add(f"{wire}.first", Select(0, 1), wire)
            wire = self.add(f"{wire}.last", GlobalPool("last"), wire)
        return wire, width

    def _reversed(self, wire: str) -> bool:
        return any(name == wire and isinstance(node, Select) for name, node, _ in self.nodes)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> None:
        """Read every node that leads to an output; what can't be is in `problems` after it."""
        for node in self.scope.graph.node:
            if id(node) in self.live and any(name and self.scope.constant(name) is None for name in node.output):
                made = self._read(node)
                for name, value in zip(node.output, made, strict=False):
                    if name:
                        self.values[name] = value
                        if isinstance(value, Flowing):
                            self.bound[value.wire].append(name)

    def _read(self, node: Any) -> list[Any]:
        values = [self.value(name) for name in node.input]
        told = [value.told for value in values if isinstance(value, Unknown)]
        handler = self.handlers.get(node.op_type) if node.domain in DOMAINS else None
        if is_recurrent(node) or is_scan(node):
            handler = scanned if is_scan(node) else recurrent
        try:
            if not any(told) and all(isinstance(v, (np.ndarray, Spread, Symbols, Unknown, type(None))) for v in values):
                return self._symbols(node, self.model.attributes(node), values)
            if handler is None and node.op_type not in SHAPES | MOVES:
                domain = f" of {node.domain}" if node.domain not in DOMAINS else ""
                raise Refused(f"an operator{domain} that a Network hasn't")
            if any(told):
                return [Unknown("", True)] * len(node.output)
            attributes = self.model.attributes(node)
            if any(isinstance(value, StartOf) for value in values) and handler not in (recurrent, scanned):
                return self._start(node, values)
            if node.op_type in ("Identity", "Cast", "Dropout") and isinstance(values[0], (Lengths, Ends)):
                return [values[0]]
            if handler is None:
                raise Refused("an operator that a Network hasn't")
            made = handler(self, node, attributes, values)
            self.understood += 1
            return [*made, *[Unknown("an output that a Network hasn't", False)] * (len(node.output) - len(made))]
        except (Refused, TooMuchError) as error:
            self.turned += isinstance(error, Turned)
            self.problems.append((node.op_type, f"{short(label(node))}: {error}"))
        except FormatError as error:
            self.problems.append((node.op_type, str(error).removeprefix(f"{self.model.path}: ")))
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            self.problems.append((node.op_type, f"{short(label(node))}: {type(error).__name__}: {str(error)[:200]}"))
        return [Unknown("", True)] * len(node.output)

    def _symbols(self, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
        """Return what a node makes of lengths that aren't known yet, and of constants."""
        constants = [self.scope.constant(name) if name else None for name in node.output]
        unknown = [Unknown(f"what {node.op_type} {short(label(node))} gives isn't known here", False)]
        if any(constant is not None for constant in constants):
            return [*constants]
        if node.op_type not in SHAPES or any(isinstance(value, (Spread, Unknown)) for value in values):
            return unknown * len(node.output)
        if node.op_type == "Cast":
            return [values[0]]
        arrays = [value.array if isinstance(value, Symbols) else value for value in values]
        try:
            made = fold(node.op_type, attributes, arrays, [bool(n) for n in node.input], len(node.output), self.model)
        except TypeError:  # sums and the like of lengths that aren't known
            made = None
        return unknown * len(node.output) if made is None else [_settled(np.asarray(array, object)) for array in made]

    def _start(self, node: Any, values: list[Any]) -> list[Any]:
        if node.op_type == "Shape":
            return [Unknown("the shape of a state", False)]
        if node.op_type not in MOVES or not isinstance(values[0], StartOf):
            raise Refused(f"takes the input {short(values[0].name)}, which holds states to start from")
        return [values[0]] * len(node.output)

    def outputs(self) -> tuple[list[str], dict[str, Any]]:
        """Return the wires that are the Network's outputs, and what is to be said of all ends of the graph."""
        wires: list[str] = []
        said: dict[str, Any] = {"outputs": {}, "states": {}}
        values = {value.name: self.value(value.name) for value in self.scope.graph.output}
        data = {name for name, value in values.items() if not isinstance(value, Ends)}
        taken = {source for _, _, sources in self.nodes for source in sources}
        taken |= {value.wire for value in values.values() if isinstance(value, Flowing)}
        for number, (_, wire, _) in enumerate(self.operators):
            if wire not in taken:  # its h after the last step is all that is wanted of it: an answer, not a state alone
                own = [name for name, value in values.items() if isinstance(value, Ends) and _is_h(value, number)]
                data.update(own[:1])
        if self.model.said:
            data |= values.keys() - {after for _, after in self.model.said["states"]}
        for name, value in values.items():
            if name not in data:
                said["states"][name] = [[ref.operator, ref.way, ref.part] for ref in value.refs.reshape(-1)]
                continue
            if isinstance(value, Unknown) and value.told:
                continue
            try:
                flow = self.flowing(value)
            except Refused as error:
                self.problems.append(("output", f"{short(name)}: {error}"))
                continue
            wire = flow.wire
            if [axis for axis in flow.axes if axis != "1"] == ["B", "F", "T"]:  # as the file has it
                wire = self.add(f"{name}.turned", Permute((2, 1)), wire)
            elif flow.axes in (("B", "1", "F"), ("B", "F", "1")):
                wire = self.add(f"{name}.shaped", Reshape((1, -1) if flow.axes[1] == "1" else (-1, 1)), wire)
            if wire in wires or wire in self.inputs:
                wire = self.add(name, Activation("linear"), wire)
            wires.append(wire)
            said["outputs"][name] = "".join(flow.axes)
        self._drop(wires, said["states"])
        return wires, said

    def _drop(self, wires: list[str], states: dict[str, list[list[Any]]]) -> None:
        """Take out nodes that lead to no output, such as a direction of which only the other's last h is taken."""
        sources = {name: taken for name, _, taken in self.nodes}
        waiting, used = list(wires), set()
        waiting += [self.operators[ref[0]][1] for refs in states.values() for ref in refs]
        while waiting:
            name = waiting.pop()
            if name not in used:
                used.add(name)
                waiting += sources.get(name, ())
        self.nodes = [node for node in self.nodes if node[0] in used]
        kept = [number for number, operator in enumerate(self.operators) if operator[1] in used]
        for refs in states.values():
            for ref in refs:
                ref[0] = kept.index(ref[0])


def _is_h(ends: Ends, operator: int) -> bool:
    """Whether states are all h, some of them an operator's."""
    refs = ends.refs.reshape(-1)
    return all(ref.part == "h" for ref in refs) and any(ref.operator == operator for ref in refs)


def _settled(array: Any) -> Any:
    """Return lengths as integers where all of them are known."""
    if all(isinstance(entry, (int, np.integer)) for entry in array.reshape(-1)):
        return array.astype(np.int64)
    return Symbols(array)


# ── the graph as a whole ────────────────────────────────────────────────────────────────────────────────────────────


def recurrent(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a recurrent operator of the outermost graph."""
    operator = read_operator(reader.scope, node)
    first = operator.cells[0].spec
    x = reader.flowing(values[0], "X")
    wanted = ("B", "T", "F") if operator.batch_first else ("T", "B", "F")
    if x.axes != wanted:
        raise Turned(f"expected X with axes {' '.join(wanted)}, found {' '.join(x.axes)}")
    starts: dict[str, Any] = dict(zip(INPUTS[5:7], values[5:7], strict=False))
    for key in operator.started:
        if not isinstance(starts[key], (StartOf, Spread)):
            raise Refused(f"expected {key} to be an input, zeros or a constant, found what the graph computes")
        if isinstance(starts[key], Spread) and starts[key].array.any():
            raise Refused(f"expected {key} to be an input, zeros or a constant, found what the graph computes")
    if operator.lengths and not isinstance(reader.value(operator.lengths), Lengths):
        raise Refused("expected sequence_lens to be an input, found what the graph computes, or a constant")
    sequences = bool(node.output[0]) and reader.uses.get(node.output[0], 0) > 0
    wire = x.wire
    for number, step in enumerate(nodes_of(operator, sequences, bool(operator.lengths))):
        wire = reader.add(label(node) if number == 0 else f"{label(node)}.in_order", step, wire)
    ways = len(operator.cells)
    reader.operators.append((operator.cells, wire, sequences))
    way = "D" if ways == 2 else "1"
    axes = ("B", "T", way, "F") if operator.batch_first else ("T", way, "B", "F")
    made: list[Any] = [Flowing(wire, axes, ways * first.units, x.steps, x.batch)]
    for part in first.state_sizes:
        refs = np.empty(ways, object)
        for n in range(ways):
            refs[n] = Ref(len(reader.operators) - 1, n, part)
        made.append(Ends(("B", "S", "F") if operator.batch_first else ("S", "B", "F"), refs))
    return made


def scanned(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Scan that is a cell, as the writer puts it."""
    *states, x = values
    starts = {}
    for part, value in zip("hc", states, strict=False):
        value = numbers(value)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value.reshape(-1, value.shape[-1])[:1]).any():
                raise Refused(f"expected the {part} to start from to be alike in every row")
            starts[part] = value.reshape(-1, value.shape[-1])[0]
        elif not isinstance(value, StartOf):
            raise Refused(f"expected the {part} to start from to be an input or a constant")
    cell, backwards = read_scan(reader.model, node, starts if any(one.any() for one in starts.values()) else {})
    flow = reader.flowing(x, "its steps")
    if flow.axes != ("T", "B", "F"):
        raise Turned(f"expected steps with axes T B F, found {' '.join(flow.axes)}")
    sequences = reader.uses.get(node.output[-1], 0) > 0
    wire = reader.add(label(node), Recurrent((cell,), sequences, backwards), flow.wire)
    if backwards and sequences:
        wire = reader.add(f"{label(node)}.in_order", Select(step=-1), wire)
    reader.operators.append(((cell,), wire, sequences))
    number = len(reader.operators) - 1
    ends = [Ends(("B", "F"), np.array(Ref(number, 0, part), object)) for part in cell.spec.state_sizes]
    return [*ends, Flowing(wire, ("T", "B", "F"), cell.spec.output_size, flow.steps, flow.batch)]


def _roles(scope: Scope) -> tuple[set[str], set[str]]:
    """Return the inputs that hold states to start from, and those that hold the rows' lengths."""
    starts: set[str] = set()
    lengths: set[str] = set()
    given = {name for name in scope.inputs if name not in scope.initializers}
    for node in scope.graph.node:
        if is_recurrent(node) or is_scan(node):
            ends = ((node.input[:-1], starts),) if is_scan(node) else ()
            for names, found in ends or ((node.input[5:7], starts), (node.input[4:5], lengths)):
                for name in names:
                    while name and name not in given and name in scope.producers:
                        behind = scope.producers[name]
                        name = behind.input[0] if behind.op_type in MOVES and behind.input else ""
                    if name in given:
                        found.add(name)
    return starts, lengths - starts


def _tries(scope: Scope, taken: set[str]) -> list[dict[str, tuple[str, ...] | None]]:
    """Return the orders in which the axes of the inputs may come, all together, the likeliest first."""
    ways: dict[str, Any] = {}
    for value in scope.graph.input:
        if value.name in taken or value.name in scope.initializers:
            continue
        kind, shape = value.type.tensor_type.elem_type, declared(value)
        axes = None if shape is None else len(shape)
        if kind in INTEGERS and axes in (None, 2):
            ways[value.name] = WAYS["ids"]
        elif kind in FLOATS and axes in (None, 2, 3):
            ways[value.name] = WAYS[axes or 3]
        else:
            ways[value.name] = (None,)
    return [dict(zip(ways, each, strict=True)) for each in islice(product(*ways.values()), MOST_TRIES)]


def load_graph(model: Model, handlers: dict[str, Handler], unused: list[str]) -> Network:
    """Return the whole of a file as a Network.

    Args:
        model: the file.
        handlers: what reads each operator.
        unused: tensors of the file that nothing takes, which the metadata names.

    Raises:
        FormatError: something that a Network can't run; all of it is named.
    """
    scope = Scope(model, model.proto.graph)
    starts, lengths = _roles(scope)
    best: Reader | None = None
    for axes in _tries(scope, starts | lengths):
        reader = Reader(scope, handlers, axes, starts, lengths)
        reader.read()
        wires, said = reader.outputs()
        if not reader.problems:
            return _network(model, reader, wires, said, unused)
        if best is None or _distance(reader) < _distance(best):
            best = reader
    raise FormatError(f"{model.path}: {_listed(best)}")


def _distance(reader: Reader) -> tuple[int, ...]:
    """Return how far a reading is from a whole one: axes that a recurrent operator can't take are the surest sign.

    Of readings alike in that, and in how many problems they have, the better is one whose axes operators could take,
    and then the one that read most.
    """
    recurrent = sum(operator in KINDS for operator, _ in reader.problems)
    return recurrent, len(reader.problems), reader.turned, -reader.understood


def _listed(reader: Reader | None) -> str:
    problems = [] if reader is None else reader.problems
    listed = "; ".join(f"{operator} {text}" for operator, text in problems)
    return f"expected operators that a Network can run, found: {listed or 'no input'}"


def _network(model: Model, reader: Reader, wires: list[str], said: dict[str, Any], unused: list[str]) -> Network:
    axes = {"inputs": {name: "".join(labels) for name, labels, _ in reader.inputs.values()}, **said}
    if reader.lengths:
        axes["lengths"] = sorted(reader.lengths)
    if unused:
        axes["unused"] = unused
    inputs = {
        wire: None if name in reader.ids else _shape(labels, known, reader.pinned)
        for wire, (name, labels, known) in reader.inputs.items()
    }
    names, nodes, sources = zip(*reader.nodes, strict=True) if reader.nodes else ((), (), ())
    try:
        return Network(
            nodes,
            names,
            {**model.said.get("metadata", {}), "source": model.source, "onnx": axes},
            inputs=inputs,
            wires=sources,
            outputs=wires,
        )
    except (ValueError, TypeError) as error:
        raise FormatError(f"{model.path}: {str(error)[:300]}") from None


def _shape(labels: tuple[str, ...], known: dict[str, int | None], pinned: bool) -> tuple[int | None, ...]:
    """Return an input's shape as a Network takes it: any number of steps, where it isn't pinned."""
    steps = (known["T"] if pinned else None,) if "T" in labels else ()
    return (*steps, known["F"]) if "F" in labels else steps
