"""Resolves at load time what a graph leaves open until it runs: inputs with a given value, and branches of `If`.

A file may hold several models and choose by an input, or by the lengths of its inputs. Where the input has a value, and
the lengths are known, the branch that would run replaces the `If`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.formats.files import short
from cellstack.formats.onnx.axes import Axes, Shaped
from cellstack.formats.onnx.axis_rules import RULES
from cellstack.formats.onnx.file import ODD, Graph, Model, Scope, declared, live_nodes, onnx_package
from cellstack.formats.onnx.fold import Broadcast, fold
from cellstack.formats.onnx.messages import DOMAINS, graphs_of, label, line_of, renamed
from cellstack.formats.onnx.values import Dim

MOST_BRANCHES = 1000  # maximum number of resolved branches
MOST_LISTED = 64  # maximum length of a list of lengths
OF_LENGTHS = {
    "Add", "And", "Cast", "Concat", "Div", "Equal", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less",
    "LessOrEqual", "Mul", "Not", "Or", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
}  # fmt: skip
KINDS = {  # TensorProto's names of the types of values that can be passed
    1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 2: "uint8", 3: "int8", 12: "uint32",
    13: "uint64", 5: "int16", 4: "uint16",
}  # fmt: skip


def fix_inputs(model: Model, constants: Mapping[str, Any]) -> Model:
    """Return a model in which inputs, or tensors, have the given values, array-like, by name.

    Raises:
        FormatError: no input or tensor of this name, or a value of another type or shape.
    """
    if not constants:
        return model
    graph, listed = model.graph, dict[str, Any]()
    inputs = {value.name: value for value in graph.input}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    fixed = dict[str, Any]()
    for name, value in constants.items():
        if name not in inputs and name not in tensors:
            names = ", ".join(map(short, (*inputs, *tensors)))
            raise FormatError(f"{model.path}: constants: no input {name!r:.80}; the inputs are {names[:300]}")
        kind = inputs[name].type.tensor_type.elem_type if name in inputs else tensors[name].data_type
        shape = declared(inputs[name]) if name in inputs else list(tensors[name].dims)
        array = _as_kind(model, name, value, kind)
        fits = shape is None or (
            array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
        )
        if not fits:
            lengths = [("any" if axis is None else axis) for axis in shape or ()]
            raise FormatError(f"{model.path}: input {short(name)}: expected a value {lengths}, got {list(array.shape)}")
        model.budget.take(array.size)
        fixed[name] = onnx_package().numpy_helper.from_array(np.asarray(array, order="C"), name)
        listed[name] = array.tolist() if array.size <= MOST_LISTED and np.isfinite(array).all() else None
    initializers = [fixed.get(tensor.name, tensor) for tensor in graph.initializer]
    graph = graph._replace(
        initializer=(*initializers, *(one for name, one in fixed.items() if name not in tensors)),
        input=tuple(value for value in graph.input if value.name not in fixed),
    )
    return replace(model, graph=graph, given=listed)


def _as_kind(model: Model, name: str, value: Any, kind: int) -> Array:
    where = f"{model.path}: input {short(name)}"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        raise FormatError(f"{where}: expected a number or an array, got {type(value).__name__}") from None
    dtype = np.dtype(KINDS.get(kind, "float32"))
    whole = array.dtype.kind in "iub" or (array.dtype.kind == "f" and bool((array == np.round(array)).all()))
    if array.dtype.kind not in "iufb" or (dtype.kind in "iub" and not whole):
        raise FormatError(f"{where}: expected a value of type {dtype}, got {array.dtype} {value!r:.60}")
    return array.astype(dtype)


class KnownLengths:
    """The lengths that follow from the shapes of weights, and of inputs of these sizes, by the rules of axes.

    The onnx package's own inference isn't used for this, as it ends the process for invalid files.
    """

    def __init__(self, scope: Scope, sizes: Mapping[str, Sequence[int | None]]) -> None:
        self.scope, self.values = scope, dict[str, Array | None]()
        axes = Axes(scope, RULES, {id(node) for node in scope.graph.node}, set(), set(), sizes=sizes)
        self.shapes = {name: value.lengths for name, value in axes.values.items() if isinstance(value, Shaped)}

    def value(self, name: str, depth: int = 0) -> Array | None:
        """Return the value of a name: integers and flags computed from lengths and constants; None if unknown."""
        if name in self.values or depth > 200:
            return self.values.get(name)
        constant = self.scope.constant(name) if name else None
        node = self.scope.producers.get(name)
        result: Array | None = None
        if isinstance(constant, np.ndarray):
            result = constant
        elif constant is None and node is not None and node.op_type in OF_LENGTHS and node.domain in DOMAINS:
            result = self._made(node, depth)
        self.values[name] = result
        return result

    def lengths_of(self, name: str) -> Array | None:
        """Return the lengths of a value's axes, as objects: an unknown one is a `Dim`; None if its rank is unknown."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        lengths = np.empty(len(shape), object)
        lengths[:] = [Dim((f"{name} {n}",)) if axis is None else axis for n, axis in enumerate(shape)]
        return lengths

    def _made(self, node: Any, depth: int) -> Array | None:
        if node.op_type == "Shape":
            lengths, attributes = self.lengths_of(node.input[0]), self.scope.model.attributes(node)
            return None if lengths is None else lengths[attributes.get("start", 0) : attributes.get("end")]
        values = [self.value(name, depth + 1) for name in node.input]
        if any(value is None for value in values):
            return None
        moves = node.op_type in ("Concat", "Gather", "Identity", "Reshape", "Size", "Slice", "Squeeze", "Unsqueeze")
        if not moves:
            arrays = [_numbers(value) for value in values]
            if any(array is None for array in arrays):
                return None
            values = arrays
        if node.op_type == "Size":
            return np.array(np.asarray(values[0]).size, np.int64)
        present = [bool(name) for name in node.input]
        try:
            outputs = fold(node.op_type, self.scope.model.attributes(node), values, present, 1, self.scope.model)
        except ODD:
            return None
        return None if not outputs or isinstance(outputs[0], Broadcast) else np.asarray(outputs[0])


def _numbers(value: Any) -> Array | None:
    """Return an array of objects as integers; None where some aren't known."""
    if value.dtype != object:
        return value
    if any(isinstance(entry, Dim) for entry in value.reshape(-1)):
        return None
    return value.astype(np.int64)


def specialize(model: Model, sizes: Mapping[str, Sequence[int | None]], noted: bool = False) -> Model:
    """Return a model in which each `If` whose condition is known is replaced by its branch.

    Args:
        model: the file.
        sizes: lengths of inputs that the file leaves open, by name.
        noted: whether to record the lines of code with the branches, because the lengths are those of an example.

    Raises:
        FormatError: too many branches.
    """
    taken = 0
    while any(node.op_type == "If" for node in model.graph.node):
        lengths, branches, before = KnownLengths(model.scope(), sizes), _Branches(model.graph), taken
        nodes: list[Any] = []
        places: list[str] = []
        for node in model.graph.node:
            branch = _branch(lengths, node)
            places += [line_of(node) or short(label(node))] if branch is not None and noted else []
            taken += branch is not None
            nodes += [node] if branch is None else branches.put(node, branch)
        if taken == before:
            break
        if taken > MOST_BRANCHES:
            raise FormatError(f"{model.path}: more than {MOST_BRANCHES} branches of If aren't supported")
        chosen = tuple(dict.fromkeys((*model.branches, *places)))
        model = model.changed(nodes, branches.tensors, branches=chosen)
    return model


class _Branches:
    """Inserts branches into the enclosing graph; names already in use there get the name of the `If` as a prefix.

    Args:
        graph: the outermost graph.

    Attributes:
        tensors: the tensors of the branches, to be added to those of the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.tensors: list[Any] = []
        self.taken = {entry.name for entry in (*graph.initializer, *graph.input)}
        self.taken.update(name for node in graph.node for name in node.output)

    def put(self, choice: Any, branch: Any) -> list[Any]:
        """Return the nodes that replace an `If` which takes this branch."""
        inner_names = [tensor.name for tensor in branch.initializer]
        inner_names += [name for node in branch.node for name in node.output if name]
        ends = [(inner.name, outer) for inner, outer in zip(branch.output, choice.output, strict=False) if outer]
        names: dict[str, str] = {}
        for inner, outer in ends:
            if inner in inner_names:
                names.setdefault(inner, outer)
        for name in inner_names:
            if name not in names:
                names[name] = fresh = name if name not in self.taken else f"{label(choice)}/{name}"
                self.taken.add(fresh)
        for tensor in branch.initializer:
            moved = copy.deepcopy(tensor)
            moved.name = names[tensor.name]
            self.tensors.append(moved)
        nodes = [renamed(node, lambda name: names.get(name, name)) for node in branch.node]
        for inner, outer in ends:
            if names.get(inner) != outer:  # a value of the enclosing graph, or one that is returned twice
                nodes.append(type(choice)(op_type="Identity", input=[names.get(inner, inner)], output=[outer]))
        return nodes


def _branch(lengths: KnownLengths, node: Any) -> Any | None:
    """Return the branch that an `If` takes; None where unknown, or for another node."""
    if node.op_type != "If" or node.domain not in DOMAINS or len(node.input) != 1:
        return None
    condition = lengths.value(node.input[0])
    known = None if condition is None else _numbers(condition)
    if known is None or known.size != 1:
        return None
    attribute = "then_branch" if bool(known.reshape(-1)[0]) else "else_branch"
    branch = next((entry.g for entry in node.attribute if entry.name == attribute and entry.type == 5), None)
    return None if branch is None or branch.sparse_initializer else branch


def drop_neutral(model: Model) -> Model:
    """Return a model without sums with 0 and products with 1, which exporters write to keep an input in a graph."""
    scope = model.scope()
    nodes: list[Any] = []
    for node in scope.graph.node:
        same = _kept(scope, node)
        nodes.append(
            node if same is None else type(node)(op_type="Identity", name=node.name, input=[same], output=node.output)
        )
    return model.changed(nodes)


def _kept(scope: Scope, node: Any) -> str | None:
    """Return the input that equals the output of a sum with 0 or a product with 1; None for another node."""
    neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(node.op_type)
    if neutral is None or node.domain not in DOMAINS or len(node.input) != 2:
        return None
    for place in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
        constant, other = scope.constant(node.input[place]), node.input[1 - place]
        zero_or_one = isinstance(constant, np.ndarray) and constant.ndim == 0 and bool(constant == neutral)
        if zero_or_one and scope.constant(other) is None:
            return other
    return None


def needs(scope: Scope, name: str) -> list[str]:
    """Return the inputs of the graph that a value depends on."""
    seen, waiting = set[str](), [name]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        node = scope.producers.get(name)
        waiting += [] if node is None else list(_taken(node))
    return sorted(seen.intersection(scope.given))


def _taken(node: Any) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for graph in graphs_of(node):
        for inner in graph.node:
            yield from _taken(inner)


def check_specialized(model: Model, traced: bool = False) -> Model:
    """Return the model; `FormatError` if an `If` that leads to an output remains: it says what would resolve it.

    Args:
        model: the file.
        traced: whether it was exported with an example, so that branches on lengths are resolved already.
    """
    if not any(node.op_type == "If" for node in model.graph.node):
        return model
    scope = model.scope()
    live = live_nodes(scope)
    left = [node for node in scope.graph.node if node.op_type == "If" and node.domain in DOMAINS and id(node) in live]
    inputs = {value.name: value for value in scope.graph.input}
    deciding = [name for node in left for name in needs(scope, node.input[0])]
    numbers = [name for name in dict.fromkeys(deciding) if declared(inputs[name]) == []]
    if numbers:
        kinds = [f"{short(name)} ({KINDS.get(inputs[name].type.tensor_type.elem_type, '?')})" for name in numbers]
        example = ", ".join(f"{name!r}: ..." for name in numbers)
        text = f"the file's branches depend on {', '.join(kinds)}: pass the values"
        raise FormatError(f"{model.path}: {text}: cs.load(path, constants={{{example}}})")
    if left:
        names = ", ".join(short(name) for name in dict.fromkeys(deciding)) or "unknown values"
        line = line_of(left[0])
        where = f"{model.path}: If {short(label(left[0]))}" + (f" ({line})" if line else "")
        if traced:
            raise FormatError(f"{where}: a branch depends on the values of {names}")
        text = f"{where}: its branch must be known when the file is loaded, but depends on the lengths of {names}"
        example = next((name for name in scope.inputs if len(declared(inputs[name]) or ()) in (2, 3)), "input")
        raise FormatError(f"{text}: pass the size of a frame, as in cs.load(path, frames={{{example!r}: 512}})")
    return model
