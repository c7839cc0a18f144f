"""ONNX files: parses and checks the protobuf, resolves names, computes constants on demand.

Nothing in a file is trusted: sizes of tensors are checked against the bytes present, nodes must come in order (which
rules out cycles), external tensors must be in the file's own folder, and the constants to compute are bounded by the
size of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.formats.build import TooMuchError
from cellstack.formats.files import parse, short
from cellstack.formats.onnx.fold import OPEN, Broadcast, Budget, fold
from cellstack.formats.onnx.functions import inline
from cellstack.formats.onnx.messages import DOMAINS as DOMAINS
from cellstack.formats.onnx.messages import graphs_of
from cellstack.formats.onnx.messages import label as label
from cellstack.formats.onnx.tensors import MOST_AXES
from cellstack.formats.onnx.tensors import Tensors as Tensors

KEY = "cellstack"  # metadata key that cellstack's own files use
MOST_COUNTING = 16  # nested lists of lengths
FIRST_OPSET = 7  # earlier opsets broadcast and define recurrent operators differently
# Raised for invalid nodes, such as attributes of unexpected types.
ODD = (ValueError, TypeError, LookupError, ArithmeticError)
NEEDS_ONNX = "ONNX files need the package onnx: pip install 'cellstack[onnx]'"

Constant = Array | Broadcast
Attributes = dict[str, Any]


def onnx_package() -> Any:
    """Return the onnx package; raises `ModuleNotFoundError` with the install command."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDS_ONNX, name=error.name) from None
    return onnx


class Graph(NamedTuple):
    """The outermost graph of a file: the fields of a GraphProto, as tuples of the file's messages.

    Passes share these messages, and never change one: they return a graph with new ones.
    """

    name: str
    node: tuple[Any, ...]
    initializer: tuple[Any, ...]
    input: tuple[Any, ...]
    output: tuple[Any, ...]
    sparse_initializer: tuple[Any, ...]

    @classmethod
    def of(cls, graph: Any) -> Graph:
        """Return a GraphProto as a graph."""
        fields = (graph.node, graph.initializer, graph.input, graph.output, graph.sparse_initializer)
        return cls(graph.name, *map(tuple, fields))


@dataclass(frozen=True, eq=False)
class Model:
    """An ONNX file, parsed, or what a pass made of it.

    Args:
        path: its path.
        graph: its outermost graph.
        opset: version of the default operator set.
        imports: all operator sets.
        producer: the program that wrote it, and its version.
        note: the metadata of cellstack's own files, as JSON; None in other files.
        tensors: reads its tensors.
        budget: the limit on computed constants.
        rolled: recurrent operators that replace a graph's unrolled steps, by the names of their Y.
        unrolled: unrolled loops that stay unrolled, by the name of their cell: the number of steps, and why.
        lost: why an unrolled loop couldn't be read as one operator.
        given: inputs and tensors that were given a value when the file was loaded: as lists, None for long ones.
        unused: tensors of the file that nothing uses.
        branches: the places of the branches that were chosen by the lengths of an example.
    """

    path: str
    graph: Graph
    opset: int
    imports: tuple[Any, ...]
    producer: str
    note: str | None
    tensors: Tensors
    budget: Budget
    rolled: Mapping[str, Any] = field(default_factory=dict)
    unrolled: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()

    def changed(self, nodes: Iterable[Any], tensors: Iterable[Any] = (), **others: Any) -> Model:
        """Return the model with other nodes, additional tensors, and other fields by name."""
        graph = self.graph._replace(node=tuple(nodes), initializer=(*self.graph.initializer, *tensors))
        return replace(self, graph=graph, **others)

    def scope(self) -> Scope:
        """Return a new scope of the graph, which a pass may add names to."""
        return Scope(self, self.graph)

    @property
    def source(self) -> dict[str, Any]:
        """The origin of the network, for its metadata."""
        origin = {"producer": self.producer, "opset": self.opset}
        return {"format": "onnx", **{key: value for key, value in origin.items() if value}}

    @cached_property
    def said(self) -> dict[str, Any]:
        """What cellstack wrote about a network: its metadata, and its states' inputs and outputs; {} in other files."""
        text = self.note
        if text is None:
            return {}
        note = parse(f"{self.path}: the metadata {KEY}", text)
        metadata, states = (note.get("metadata"), note.get("states")) if isinstance(note, dict) else (None, None)
        pairs = states if isinstance(states, list) else [None]
        named = all(isinstance(p, list) and len(p) == 2 and all(isinstance(n, str) for n in p) for p in pairs)
        if not isinstance(metadata, dict) or not named:
            raise FormatError(f"{self.path}: expected metadata and states as the metadata {KEY}, found {short(text)}")
        zeros = note.get("zero_output_for_mask")
        return {"metadata": metadata, "states": states, "zeros": zeros if isinstance(zeros, list) else []}

    def attributes(self, node: Any) -> Attributes:
        """Return a node's attributes by name, as Python values; tensors as arrays, graphs unchanged."""
        return {entry.name: self._attribute(node, entry) for entry in node.attribute}

    def _attribute(self, node: Any, entry: Any) -> Any:
        simple = {1: "f", 2: "i", 5: "g"}
        if entry.type in simple:
            return getattr(entry, simple[entry.type])
        if entry.type == 3:
            return entry.s.decode("utf-8", "replace")
        if entry.type == 4:
            return self.tensors.array(entry.t)
        if entry.type in (6, 7):
            return list(entry.floats if entry.type == 6 else entry.ints)
        if entry.type == 8:
            return [text.decode("utf-8", "replace") for text in entry.strings]
        if entry.type == 10:
            return list(entry.graphs)
        raise FormatError(
            f"{self.path}: node {short(label(node))}: attribute {short(entry.name)} has the unsupported "
            f"type {entry.type}"
        )


@dataclass
class Scope:
    """A graph of a file with the names in its scope: its own and those of the enclosing graphs.

    Args:
        model: the file.
        graph: a `Graph`, or the GraphProto of an inner one.
        parent: the enclosing graph.
        place: the path of enclosing nodes, for messages.
    """

    model: Model
    graph: Any
    parent: Scope | None = None
    place: str = ""
    initializers: dict[str, Any] = field(default_factory=dict)
    producers: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    known: dict[str, Constant | None] = field(default_factory=dict)
    alike: dict[Any, tuple[str, bool]] = field(default_factory=dict)  # each matrix's first name, and if transposed
    first_alike: dict[tuple[str, bool], tuple[str, bool]] = field(default_factory=dict)  # the same by name
    unbound: dict[str, dict[str, int]] = field(default_factory=dict)  # by a Split's first output: each output's step
    counting: int = 0  # depth of nested lists of lengths
    rows: dict[str, int] = field(default_factory=dict)  # length of constants that are one row; else 0
    lengths: dict[str, list[int | None]] | None = None  # of the axes of values, once a product of joined values is read

    def __post_init__(self) -> None:
        where = f"{self.model.path}: graph {short(self.place or self.graph.name)}"
        names = [entry.name for entry in (*self.graph.initializer, *self.graph.input, *self.graph.output)]
        if not all(isinstance(name, str) for name in names):
            raise FormatError(f"{where}: names must be UTF-8")
        for tensor in self.graph.initializer:
            if tensor.name in self.initializers:
                raise FormatError(f"{where}: tensor {short(tensor.name)} occurs twice")
            self.initializers[tensor.name] = tensor
        self.inputs = tuple(value.name for value in self.graph.input)
        if len(set(self.inputs)) != len(self.inputs):
            raise FormatError(f"{where}: the names of inputs must differ, found {short(list(self.inputs))}")
        computed = {*self.initializers, *self.inputs, *(tensor.values.name for tensor in self.graph.sparse_initializer)}
        for node in self.graph.node:
            if len({entry.name for entry in node.attribute}) != len(node.attribute):
                raise FormatError(f"{where}: node {short(label(node))}: an attribute occurs twice")
            words = (node.name, node.op_type, node.domain, *node.input, *node.output, *(e.name for e in node.attribute))
            if not all(isinstance(word, str) for word in words):  # protobuf returns bytes that aren't UTF-8
                raise FormatError(f"{where}: node {short(label(node))}: names must be UTF-8")
            for name in node.input:
                if name and name not in computed and not self._outside(name):
                    raise FormatError(
                        f"{where}: node {short(label(node))}: input {short(name)} isn't computed before the node"
                    )
            for name in node.output:
                if name in computed:
                    raise FormatError(f"{where}: node {short(label(node))}: {short(name)} is computed more than once")
                if name:
                    computed.add(name)
                    self.producers[name] = node
        for value in self.graph.output:
            if value.name not in computed and not self._outside(value.name):
                raise FormatError(f"{where}: no node computes the output {short(value.name)}")

    @property
    def given(self) -> list[str]:
        """The inputs without a default value."""
        return [name for name in self.inputs if name not in self.initializers]

    def _outside(self, name: str) -> bool:
        scope = self.parent
        while scope is not None:
            if scope._own(name):
                return True
            scope = scope.parent
        return False

    def _own(self, name: str) -> bool:
        return name in self.initializers or name in self.producers or name in self.inputs

    def constant(self, name: str) -> Constant | None:
        """Return the value of a name that doesn't depend on any input; None where it does.

        An input with a default in the file is taken to have that value.
        """
        if not self._own(name):
            return None if self.parent is None or not name else self.parent.constant(name)
        waiting = [name]
        while waiting:
            top = waiting[-1]
            if top in self.known:
                waiting.pop()
                continue
            node = self.producers.get(top)
            if top in self.initializers:
                self.known[top] = self.model.tensors.array(self.initializers[top])
            elif node is None:
                self.known[top] = None if self._own(top) else self.constant(top)
            else:
                needed = [n for n in node.input if n and n not in self.known]
                if needed and (node.op_type in OPEN or not self._blocked(node)):
                    waiting.append(needed[0])
                    continue
                self._compute(node, [self.known.get(n) if n else None for n in node.input])
        return self.known[name]

    def _blocked(self, node: Any) -> bool:
        """Whether some input is known not to be constant: the others then needn't be computed."""
        return any(name in self.known and self.known[name] is None for name in node.input)

    def _compute(self, node: Any, values: list[Constant | None]) -> None:
        outputs: list[Constant | None] = [None] * len(node.output)
        if node.domain in DOMAINS:
            where = f"{self.model.path}: node {short(label(node))}"
            attributes = {} if any(e.type in (5, 10) for e in node.attribute) else self.model.attributes(node)
            present = [bool(name) for name in node.input]
            try:
                folded = fold(node.op_type, attributes, values, present, len(node.output), self.model)
            except TooMuchError as error:
                raise FormatError(f"{where}: {error}") from None
            except ODD as error:
                raise FormatError(f"{where}: {node.op_type}: {str(error)[:200]}") from None
            if folded is not None:
                outputs = folded
                if node.op_type == "Expand" and isinstance(outputs[0], Broadcast) and self.counting < MOST_COUNTING:
                    self.counting += 1  # the list may contain an Expand whose own lengths are counted
                    outputs = [self._ranked(outputs[0], self._count(node.input[1]))]
                    self.counting -= 1
        for name, value in zip(node.output, outputs, strict=True):
            self.known[name] = value

    def _ranked(self, value: Broadcast, axes: int | None) -> Broadcast:
        if axes is None or axes < value.array.ndim or axes > MOST_AXES:
            return value
        return Broadcast(value.array.reshape([1] * (axes - value.array.ndim) + list(value.array.shape)), True)

    def _count(self, name: str) -> int | None:
        """Return the length of a list of lengths whose entries are unknown; None where its length is unknown too.

        It follows the ways in which exporters build such lists.
        """
        total, waiting, steps = 0, [name], 0
        while waiting and steps < 256:
            steps += 1
            name = waiting.pop()
            constant, node = self.constant(name), self.producers.get(name)
            if isinstance(constant, np.ndarray) and constant.ndim == 1:
                total += len(constant)
            elif node is None:
                return None
            elif node.op_type == "Concat":
                waiting += list(node.input)
            elif node.op_type in ("Cast", "Identity") or self._flat(node):
                waiting.append(node.input[0])
            elif node.op_type == "Where" and len(node.input) == 3:
                waiting.append(node.input[2])
            elif node.op_type == "Unsqueeze" or self._one_length(node):
                total += 1  # a number as a list, or one length of a shape
            else:
                return None
        return None if waiting else total

    def _one_length(self, node: Any) -> bool:
        """Whether a node is a Shape that returns one length."""
        attributes = {entry.name: entry.i for entry in node.attribute} if node.op_type == "Shape" else {}
        return attributes.get("end", 0) - attributes.get("start", 0) == 1

    def _flat(self, node: Any) -> bool:
        """Whether a node is a Reshape to one axis."""
        shape = self.constant(node.input[1]) if node.op_type == "Reshape" and len(node.input) == 2 else None
        return isinstance(shape, np.ndarray) and shape.tolist() == [-1]

    def inner(self) -> Iterator[tuple[Any, Scope | None]]:
        """Yield every node, followed by a scope for each graph inside it."""
        for node in self.graph.node:
            yield node, None
            for entry in node.attribute:
                for graph in [entry.g] if entry.type == 5 else entry.graphs:
                    place = f"{self.place}/{label(node)}" if self.place else label(node)
                    yield node, Scope(self.model, graph, self, f"{place}/{entry.name}")


def live_nodes(scope: Scope) -> set[int]:
    """Return the ids of the nodes that lead to an output."""
    live: set[int] = set()
    waiting = [value.name for value in scope.graph.output]
    while waiting:
        node = scope.producers.get(waiting.pop())
        if node is not None and id(node) not in live:
            live.add(id(node))
            waiting += [name for name in node.input if name]
            for graph in graphs_of(node):
                waiting += [name for inner in graph.node for name in inner.input if name]
                waiting += [value.name for value in graph.output]
    return live


def uses(scope: Scope, live: set[int]) -> dict[str, int]:
    """Return how often each value is used, by nodes that lead to an output and by the outputs."""
    counts: dict[str, int] = {}
    names = [name for node in scope.graph.node if id(node) in live for name in node.input]
    for name in [*names, *(value.name for value in scope.graph.output)]:
        counts[name] = counts.get(name, 0) + 1
    return counts


def declared(value: Any) -> list[int | None] | None:
    """Return the lengths that a file declares of an input, None for an open length; None where it declares no axes."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in kind.shape.dim]


def read(path: str) -> Model:
    """Return the ONNX file at `path`, parsed; its tensors are read on demand.

    Raises:
        FormatError: not an ONNX file, or of an unsupported version.
        OSError: the file can't be read.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    with open(path, "rb") as file:
        return parsed(path, file.read())[0]


def parsed(path: str, data: bytes) -> tuple[Model, Any]:
    """Return the content of an ONNX file, and its ModelProto, with which the first shares messages.

    Args:
        path: the path of the file; its folder has the external tensors.
        data: the content.

    Raises:
        FormatError, ModuleNotFoundError: see `read`.
    """
    onnx = onnx_package()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError; this package doesn't depend on protobuf
        raise FormatError(f"{path}: not an ONNX file: {str(error)[:200]}") from None
    if not proto.HasField("graph") or not 1 <= proto.ir_version <= 1 << 16:
        raise FormatError(f"{path}: the ONNX file has no graph")
    versions = [entry.version for entry in proto.opset_import if entry.domain in DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not FIRST_OPSET <= versions[0] <= newest:
        raise FormatError(f"{path}: expected one opset from {FIRST_OPSET} to {newest}, found {short(versions)}")
    graph = Graph.of(proto.graph)
    graph = graph._replace(node=inline(path, graph.node, list(proto.functions), versions[0], len(data)))
    size = len(data) + sum(entry.stat().st_size for entry in _companions(path, graph))
    producer = f"{proto.producer_name} {proto.producer_version}".strip()
    note = next((entry.value for entry in proto.metadata_props if entry.key == KEY), None)
    imports = tuple(proto.opset_import)
    return Model(path, graph, versions[0], imports, producer, note, Tensors(path), Budget(size)), proto


def _companions(path: str, graph: Graph) -> Iterator[os.DirEntry[str]]:
    """Yield the files with external tensors of the outermost graph; only those in the file's own folder count."""
    names = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == 1
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if names:
        with os.scandir(os.path.dirname(path) or ".") as entries:
            yield from (entry for entry in entries if entry.name in names and entry.is_file())
