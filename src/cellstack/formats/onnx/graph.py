"""Whole ONNX graphs as Networks: axes are put in order, operators become nodes, and what can't be is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cellstack.formats.onnx.axes import INTEGERS, Axes
from cellstack.formats.onnx.cells import Names, clean, is_recurrent
from cellstack.formats.onnx.directions import both_ways
from cellstack.formats.onnx.file import DOMAINS, Model, Scope, declared, label, live_nodes, short, uses
from cellstack.formats.onnx.fold import Spread, check_inputs, fold
from cellstack.formats.onnx.values import Final, Flowing, Initial, Lengths, States, Symbols, Unknown
from cellstack.formats.onnx.written_out.scans import is_scan
from cellstack.network import Network
from cellstack.nodes import Activation, GlobalPool, Merge, Node, Permute, Reshape, Select
from cellstack.spec import FormatError

Handler = Callable[["Reader", Any, dict[str, Any], list[Any]], list[Any]]
MOVES = {
    "Cast", "Concat", "Dropout", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
SHAPES = {"Cast", "Concat", "Gather", "Identity", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"}


class Refused(ValueError):  # noqa: N818
    """An operator that a Network can't run as it stands; the message says why."""


class Reader:
    """Reads one graph, whose inputs' axes are known.

    Args:
        scope: the outermost graph.
        handlers: what reads each operator.
        axes: what each axis of each value is.
        live: ids of the nodes that lead to an output.
        starts: inputs that hold states to start from.
        lengths: inputs that hold the rows' lengths.
    """

    def __init__(
        self,
        scope: Scope,
        handlers: dict[str, Handler],
        axes: Axes,
        live: set[int],
        starts: set[str],
        lengths: set[str],
    ) -> None:
        self.scope, self.model, self.handlers, self.axes = scope, scope.model, handlers, axes
        self.lengths, self.inputs = lengths, {}
        self.budget, self.pinned = self.model.budget.again(), False  # pinned: to the lengths that the file names
        self.values: dict[str, Any] = {name: Lengths(name) for name in lengths}
        self.names = Names()
        self.nodes: list[tuple[str, Node, tuple[str, ...]]] = []
        self.places: dict[str, int] = {}
        self.bound: dict[str, list[str]] = {}  # the names in the file of what each wire carries
        self.problems: list[tuple[str, str]] = []
        self.operators: list[tuple[Any, str, bool]] = []  # cells, wire, and whether it carries every step
        self.cells_of: list[tuple[str, int]] = []  # of each of these the node that has its cells, and the first of them
        self.starts: dict[Initial, Final] = {}  # which state each of those is that the inputs hold
        self.start_axes: dict[str, tuple[str, ...]] = {}
        self.live = live
        self.uses = uses(scope, self.live)
        shapes = {value.name: declared(value) for value in scope.graph.input}
        self.ids = {v.name for v in scope.graph.input if v.type.tensor_type.elem_type in INTEGERS}
        for name in sorted(starts):
            self.values[name] = self._start(name, axes.states[name], shapes[name] or [])
        for name, labels in axes.inputs.items():
            if labels is None:
                self.problems.append(("input", f"{short(name)}: {axes.why_not(name)}"))
                self.values[name] = Unknown("", True)
                continue
            wire = self.names.fresh(clean(name))
            known = dict(zip(labels, shapes[name] or [None] * len(labels), strict=True))
            self.inputs[wire] = (name, tuple(labels), known)
            batch = known.get("B") if "B" in labels else 1
            self.values[name] = Flowing(wire, tuple(labels), known.get("F"), known.get("T"), batch)
            self.bound[wire] = [name]
        self._check_batch()

    def _start(self, name: str, labels: str | None, shape: list[int | None]) -> States | Unknown:
        """Return what an input holds as states, by the axes along which it holds several."""
        if labels is None:
            self.problems.append(("input", f"{short(name)}: expected states [.., B, H], {self.axes.why_not(name)}"))
            return Unknown("", True)
        counts = [n for n, role in zip(shape, labels, strict=True) if role == "S"]
        ways = sum(1 + (self.model.attributes(n).get("direction") == "bidirectional") for n in self.scope.graph.node)
        sizes = [ways if n is None else n for n in counts]
        self.budget.take(*sizes)
        refs = np.empty(sizes, object)
        for place, at in enumerate(np.ndindex(*sizes)):
            refs[at] = Initial(name, place)
        self.start_axes[name] = tuple(labels)
        return States(tuple(labels), refs, None not in counts)

    def _check_batch(self) -> None:
        """List inputs without a batch where another has one of any size."""
        batched = [name for name, labels, known in self.inputs.values() if "B" in labels and known["B"] != 1]
        for name, labels, _ in self.inputs.values():
            if batched and "B" not in labels:
                found = f"as {short(batched[0])} has one, found {' '.join(labels)}"
                self.problems.append(("input", f"{short(name)}: expected an axis of the batch, {found}"))

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
        if isinstance(value, States):
            value = self.settled(value)
        if isinstance(value, Unknown):
            raise Refused(value.why)
        if not isinstance(value, Flowing):
            found = "none" if value is None else "a constant" if isinstance(value, (np.ndarray, Spread)) else "another"
            raise Refused(f"expected {what} to be data that flows, found {found}")
        if any(value.pad):
            raise Refused("expected padding before a convolution alone")
        return value

    def is_ids(self, flow: Flowing) -> bool:
        """Return whether a value is the integers that an input holds."""
        return flow.wire in self.inputs and self.inputs[flow.wire][0] in self.ids

    def settled(self, ends: States) -> Flowing:
        """Return states as a wire carries them: one, or the two directions of an operator side by side."""
        refs = list(ends.refs.reshape(-1))
        if ends.initial:
            raise Refused(f"takes the input {short(refs[0].name)}, which holds states to start from")
        if not refs:
            raise Refused("expected states, found none")
        if any(ref.part != "h" for ref in refs):
            raise Refused("a Network's nodes can't take an LSTM's c, which is a state")
        if len(refs) > 2:
            raise Refused(f"expected the states of one operator, found {len(refs)}")
        cells, wire, sequences = self.operators[refs[0].operator]
        if len(refs) == 1:
            wire, width = self._end(refs[0])
        elif not sequences and refs == [Final(refs[0].operator, way, "h") for way in range(len(cells))]:
            width = sum(cell.spec.output_size for cell in cells)
        else:
            parts = [self._end(ref) for ref in refs]
            wire, width = self.add(f"{wire}.states", Merge("concat"), *(part for part, _ in parts)), 2 * parts[0][1]
            if parts[0][1] != parts[1][1]:
                raise Refused("expected states of one width")
        sizes = iter(ends.refs.shape)
        axes = tuple(axis if axis != "S" else "D" if next(sizes) == 2 else "1" for axis in ends.axes)
        return Flowing(wire, axes, width)

    def _end(self, ref: Final) -> tuple[str, int]:
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
        if is_recurrent(node):
            handler = self.handlers.get(node.op_type)
        try:
            check_inputs(node.op_type, [bool(name) for name in node.input])
            if not any(told) and all(isinstance(v, (np.ndarray, Spread, Symbols, Unknown, type(None))) for v in values):
                return self._symbols(node, self.model.attributes(node), values)
            if handler is None and node.op_type not in SHAPES | MOVES:
                domain = f" of {node.domain}" if node.domain not in DOMAINS else ""
                raise Refused(f"an operator{domain} that a Network hasn't")
            if any(told):
                return [Unknown("", True)] * len(node.output)
            attributes = self.model.attributes(node)
            if handler is None:
                raise Refused("an operator that a Network hasn't")
            made = handler(self, node, attributes, values)
            return [*made, *[Unknown("an output that a Network hasn't", False)] * (len(node.output) - len(made))]
        except FormatError as error:
            self._refuse(node, str(error).removeprefix(f"{self.model.path}: "))
        except ValueError as error:
            self._refuse(node, f"{short(label(node))}: {self.axes.problems.get(id(node), str(error)[:300])}")
        except (TypeError, LookupError, ArithmeticError) as error:
            self._refuse(node, f"{short(label(node))}: {type(error).__name__}: {str(error)[:200]}")
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

    def _refuse(self, node: Any, text: str) -> None:
        self.problems.append((node.op_type, text))

    def outputs(self) -> tuple[list[str], dict[str, Any]]:
        """Return the wires that are the Network's outputs, and what is to be said of all ends of the graph."""
        wires: list[str] = []
        said: dict[str, Any] = {"outputs": {}}
        values = {value.name: self.value(value.name) for value in self.scope.graph.output}
        after = {name: value for name, value in values.items() if isinstance(value, States) and not value.initial}
        data = values.keys() - after.keys()
        taken = {source for _, _, sources in self.nodes for source in sources}
        taken |= {value.wire for value in values.values() if isinstance(value, Flowing)}
        for number, (_, wire, _) in enumerate(self.operators):
            if wire not in taken:  # its h after the last step is all that is wanted of it: an answer, not a state alone
                data.update([name for name, value in after.items() if _is_h(value, number)][:1])
        if self.model.said:
            data |= values.keys() - {end for _, end in self.model.said["states"]}
        for name, value in values.items():
            if name not in data or (isinstance(value, Unknown) and value.told):
                continue
            try:
                flow = self.flowing(value)
            except Refused as error:
                self._refuse_output(name, str(error))
                continue
            wire, axes = flow.wire, "".join(axis for axis in flow.axes if axis != "1")
            if axes in ("BFT", "FT"):  # as the file has it
                wire = self.add(f"{name}.turned", Permute((2, 1)), wire)
            elif flow.axes in (("B", "1", "F"), ("B", "F", "1")):
                wire = self.add(f"{name}.shaped", Reshape((1, -1) if flow.axes[1] == "1" else (-1, 1)), wire)
            if wire in wires or wire in self.inputs:
                wire = self.add(name, Activation("linear"), wire)
            wires.append(wire)
            said["outputs"][name] = "".join(flow.axes)
        if self.problems:
            return wires, said
        return wires, said | self._said_of_states(wires, {n: value for n, value in after.items() if n not in data})

    def _refuse_output(self, name: str, text: str) -> None:
        self.problems.append(("output", f"{short(name)}: {text}"))

    def _said_of_states(self, wires: list[str], after: dict[str, States]) -> dict[str, Any]:
        """Take out nodes that lead to nothing; return which states the inputs and outputs hold, and their axes.

        A state goes by the place of its node among those that have cells, of its cell among theirs, and "h" or "c".
        """
        ends = {name: [*value.refs.reshape(-1)] for name, value in after.items()}
        self.nodes, moved = both_ways(self.nodes, wires)
        self.cells_of = [moved.get(name, (name, first)) for name, first in self.cells_of]
        self._drop([*wires, *(self.cells_of[ref.operator][0] for refs in ends.values() for ref in refs)])
        numbers: dict[str, int] = {}
        for name, node, _ in self.nodes:
            if node.cells:
                numbers[name] = len(numbers)

        def named(ref: Final | None) -> list[Any] | None:
            node, first = ("", 0) if ref is None else self.cells_of[ref.operator]
            return None if ref is None or node not in numbers else [numbers[node], first + ref.way, ref.part]

        states = {name: [named(ref) for ref in refs] for name, refs in ends.items()}
        starts = {}
        for name in self.start_axes:
            found = {initial.place: named(ref) for initial, ref in self.starts.items() if initial.name == name}
            starts[name] = [found.get(place) for place in range(max(found, default=-1) + 1)]
        axes = {name: "".join(labels) for name, labels in self.start_axes.items()}
        axes |= {name: "".join(value.axes) for name, value in after.items()}
        return {"states": states} | ({"starts": starts} if starts else {}) | ({"state_axes": axes} if axes else {})

    def _drop(self, wanted: list[str]) -> None:
        """Take out nodes that lead to no output, such as a direction of which only the other's last h is taken."""
        sources = {name: taken for name, _, taken in self.nodes}
        used = set()
        while wanted:
            name = wanted.pop()
            if name not in used:
                used.add(name)
                wanted += sources.get(name, ())
        self.nodes = [node for node in self.nodes if node[0] in used]


def _is_h(ends: States, operator: int) -> bool:
    """Whether states are all h, some of them an operator's."""
    refs = ends.refs.reshape(-1)
    return all(ref.part == "h" for ref in refs) and any(ref.operator == operator for ref in refs)


def _settled(array: Any) -> Any:
    """Return lengths as integers where all of them are known."""
    if all(isinstance(entry, (int, np.integer)) for entry in array.reshape(-1)):
        return array.astype(np.int64)
    return Symbols(array)


# ── the graph as a whole ────────────────────────────────────────────────────────────────────────────────────────────


def _roles(scope: Scope) -> tuple[set[str], set[str]]:
    """Return the inputs that hold states to start from, and those that hold the rows' lengths."""
    starts: set[str] = set()
    lengths: set[str] = set()
    given = {name for name in scope.inputs if name not in scope.initializers}
    for node in scope.graph.node:
        if is_scan(node):
            starts.update(_behind(scope, given, node.input[:-1]))
        elif is_recurrent(node):
            starts.update(_behind(scope, given, node.input[5:7]))
            lengths.update(_behind(scope, given, node.input[4:5]))
    return starts, lengths - starts


def _behind(scope: Scope, given: set[str], names: Sequence[str]) -> Iterator[str]:
    """Give the inputs that values are made of by moves alone."""
    waiting, seen = [name for name in names if name], set[str]()
    while waiting:
        name = waiting.pop()
        node = None if name in given else scope.producers.get(name)
        if name in given:
            yield name
        elif node is not None and node.input and node.op_type in MOVES and name not in seen:
            waiting += node.input if node.op_type == "Concat" else node.input[:1]
        seen.add(name)


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
    live = live_nodes(scope)
    reader = Reader(scope, handlers, Axes(scope, live, starts, lengths), live, starts, lengths)
    reader.read()
    wires, said = reader.outputs()
    if reader.problems or not reader.inputs:
        listed = "; ".join(f"{operator} {text}" for operator, text in reader.problems)
        raise FormatError(f"{model.path}: expected operators that a Network can run, found: {listed or 'no input'}")
    return _network(model, reader, wires, said, unused)


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
