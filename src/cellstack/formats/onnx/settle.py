"""Resolves at load time what a graph leaves open until it runs: inputs with a given value, and branches of `If`.

A file may hold several models and choose by an input, or by the lengths of its inputs. Where the input has a value, and
the lengths are known, the branch that would run replaces the `If`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import DOMAINS, Model, Scope, declared, label, live_nodes, onnx_package, short
from cellstack.formats.onnx.fold import Broadcast, fold
from cellstack.formats.onnx.values import Dim
from cellstack.layout import Array
from cellstack.spec import FormatError

MOST_BRANCHES = 1000  # maximum number of resolved branches
MOST_LISTED = 64  # maximum length of a list of lengths
OF_LENGTHS = {
    "And", "Cast", "Concat", "Equal", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Mul",
    "Not", "Or", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze",
}  # fmt: skip
KINDS = {  # TensorProto's names of the types of values that can be passed
    1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 2: "uint8", 3: "int8", 12: "uint32",
    13: "uint64", 5: "int16", 4: "uint16",
}  # fmt: skip


def fix(model: Model, constants: Mapping[str, Any]) -> None:
    """Set the values of inputs of a graph, or of its tensors.

    Args:
        model: the file, which is changed.
        constants: array-like values by name.

    Raises:
        FormatError: no input or tensor of this name, or a value of another type or shape.
    """
    onnx, graph = onnx_package(), model.proto.graph
    inputs = {value.name: value for value in graph.input}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
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
            wanted = [("any" if axis is None else axis) for axis in shape or ()]
            raise FormatError(f"{model.path}: input {short(name)}: expected a value {wanted}, got {list(array.shape)}")
        model.budget.take(array.size)
        made = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        if name in tensors:
            tensors[name].CopyFrom(made)
        else:
            graph.initializer.append(made)
        if name in inputs:
            graph.input.remove(inputs[name])
        model.given[name] = array.tolist() if array.size <= MOST_LISTED and np.isfinite(array).all() else None


def _as_kind(model: Model, name: str, value: Any, kind: int) -> Array:
    where = f"{model.path}: input {short(name)}"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        raise FormatError(f"{where}: expected a number or an array, got {type(value).__name__}") from None
    wanted = np.dtype(KINDS.get(kind, "float32"))
    whole = array.dtype.kind in "iub" or (array.dtype.kind == "f" and bool((array == np.round(array)).all()))
    if array.dtype.kind not in "iufb" or (wanted.kind in "iub" and not whole):
        raise FormatError(f"{where}: expected a value of type {wanted}, got {array.dtype} {value!r:.60}")
    return array.astype(wanted)


class _Lengths:
    """The known lengths in a graph, from the onnx package's shape inference.

    Args:
        model: the file.
        sizes: lengths of inputs that the file leaves open, by name.
    """

    def __init__(self, model: Model, sizes: Mapping[str, list[int | None]]) -> None:
        onnx = onnx_package()
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        for value in proto.graph.input:
            for axis, length in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
                if length is not None:
                    axis.dim_value = length
        del proto.graph.value_info[:]  # an exporter's notes cover all branches, or are wrong
        self.scope = Scope(model, model.proto.graph)
        self._with_lists(proto.graph)
        try:
            found = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception:  # inference failed: nothing is known, and operators that need it are reported
            found = proto
        self.shapes = {
            value.name: declared(value)
            for value in (*found.graph.input, *found.graph.value_info, *found.graph.output)
            if value.type.HasField("tensor_type")
        }
        self.values: dict[str, Array | None] = {}

    def _with_lists(self, graph: Any) -> None:
        """Add lists of lengths and pads that a graph computes from constants, which the package doesn't infer."""
        onnx, kept = onnx_package(), []
        for node in graph.node:
            constants = [self.scope.constant(name) if name else None for name in node.output]
            if all(isinstance(each, np.ndarray) and each.size <= MOST_LISTED for each in constants):
                for name, each in zip(node.output, constants, strict=True):
                    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(each, order="C"), name))
            else:
                kept.append(type(node).FromString(node.SerializeToString()))
        del graph.node[:]
        graph.node.extend(kept)

    def value(self, name: str, depth: int = 0) -> Array | None:
        """Return the value of a name: integers and flags computed from lengths and constants; None if unknown."""
        if name in self.values or depth > 200:
            return self.values.get(name)
        constant = self.scope.constant(name) if name else None
        node = self.scope.producers.get(name)
        found: Array | None = None
        if isinstance(constant, np.ndarray):
            found = constant
        elif constant is None and node is not None and node.op_type in OF_LENGTHS and node.domain in DOMAINS:
            found = self._made(node, depth)
        self.values[name] = found
        return found

    def _made(self, node: Any, depth: int) -> Array | None:
        if node.op_type == "Shape":
            shape = self.shapes.get(node.input[0])
            if shape is None:
                return None
            lengths = np.empty(len(shape), object)
            lengths[:] = [Dim((f"{node.input[0]} {n}",)) if axis is None else axis for n, axis in enumerate(shape)]
            attributes = self.scope.model.attributes(node)
            return lengths[attributes.get("start", 0) : attributes.get("end")]
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
        given = [bool(name) for name in node.input]
        try:
            made = fold(node.op_type, self.scope.model.attributes(node), values, given, 1, self.scope.model)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            return None
        return None if not made or isinstance(made[0], Broadcast) else np.asarray(made[0])


def _numbers(value: Any) -> Array | None:
    """Return an array of objects as integers; None where some aren't known."""
    if value.dtype != object:
        return value
    if any(isinstance(entry, Dim) for entry in value.reshape(-1)):
        return None
    return value.astype(np.int64)


def settle(model: Model, sizes: Mapping[str, list[int | None]]) -> None:
    """Replace each `If` whose condition is known by its branch.

    Args:
        model: the file, which is changed.
        sizes: lengths of inputs that the file leaves open, by name.

    Raises:
        FormatError: too many branches.
    """
    graph, taken = model.proto.graph, 0
    while any(node.op_type == "If" for node in graph.node):
        lengths = _Lengths(model, sizes)
        nodes: list[Any] = []
        branches, done = _Branches(graph), 0
        for node in graph.node:
            branch = _branch(lengths, node)
            if branch is None:
                nodes.append(node)
                continue
            done += 1
            nodes += branches.put(node, branch)
        taken += done
        if not done:
            return
        if taken > MOST_BRANCHES:
            raise FormatError(f"{model.path}: more than {MOST_BRANCHES} branches of If aren't supported")
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        graph.initializer.extend(branches.tensors)


class _Branches:
    """Inserts branches into the enclosing graph; names already in use there get the name of the `If` as a prefix.

    Args:
        graph: the outermost graph.

    Attributes:
        tensors: the tensors of the branches, to be added to those of the graph.
    """

    def __init__(self, graph: Any) -> None:
        self.tensors: list[Any] = []
        self.taken = {entry.name for entry in (*graph.initializer, *graph.input)}
        self.taken.update(name for node in graph.node for name in node.output)

    def put(self, choice: Any, branch: Any) -> list[Any]:
        """Return the nodes that replace an `If` which takes this branch."""
        own = [tensor.name for tensor in branch.initializer]
        own += [name for node in branch.node for name in node.output if name]
        names: dict[str, str] = {}
        for inner, outer in zip((value.name for value in branch.output), choice.output, strict=False):
            if inner in own and inner not in names and outer:
                names[inner] = outer
        for name in own:
            if name not in names:
                names[name] = fresh = name if name not in self.taken else f"{label(choice)}/{name}"
                self.taken.add(fresh)
        for tensor in branch.initializer:
            made = type(tensor)()
            made.CopyFrom(tensor)
            made.name = names[tensor.name]
            self.tensors.append(made)
        nodes = []
        for node in branch.node:
            made = type(node)()
            made.CopyFrom(node)
            _rename(made, names)
            nodes.append(made)
        for inner, outer in zip((value.name for value in branch.output), choice.output, strict=False):
            if outer and names.get(inner) != outer:  # a value of the enclosing graph, or one that is returned twice
                nodes.append(type(choice)(op_type="Identity", input=[names.get(inner, inner)], output=[outer]))
        return nodes


def _rename(node: Any, names: dict[str, str]) -> None:
    """Rename a node's inputs and outputs, in its subgraphs too."""
    for field in (node.input, node.output):
        renamed = [names.get(name, name) for name in field]
        del field[:]
        field.extend(renamed)
    for entry in node.attribute:
        for graph in [entry.g] if entry.type == 5 else entry.graphs:
            hidden = {entry.name for entry in (*graph.initializer, *graph.input)}
            within = {name: new for name, new in names.items() if name not in hidden}
            for inner in graph.node:
                _rename(inner, within)
            for value in graph.output:
                value.name = within.get(value.name, value.name)


def _branch(lengths: _Lengths, node: Any) -> Any | None:
    """Return the branch that an `If` takes; None where unknown, or for another node."""
    if node.op_type != "If" or node.domain not in DOMAINS or len(node.input) != 1:
        return None
    condition = lengths.value(node.input[0])
    known = None if condition is None else _numbers(condition)
    if known is None or known.size != 1:
        return None
    wanted = "then_branch" if bool(known.reshape(-1)[0]) else "else_branch"
    found = next((entry.g for entry in node.attribute if entry.name == wanted and entry.type == 5), None)
    return None if found is None or found.sparse_initializer else found


def plain(model: Model) -> None:
    """Remove sums with 0 and products with 1, which exporters write to keep an input in a graph."""
    scope = Scope(model, model.proto.graph)
    for node in scope.graph.node:
        neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(node.op_type)
        if neutral is None or node.domain not in DOMAINS or len(node.input) != 2:
            continue
        for place in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
            constant = scope.constant(node.input[place])
            if isinstance(constant, np.ndarray) and constant.ndim == 0 and constant == neutral:
                kept = node.input[1 - place]
                if scope.constant(kept) is None:
                    del node.input[:]
                    node.input.append(kept)
                    node.op_type = "Identity"
                    break


def needs(scope: Scope, name: str) -> list[str]:
    """Return the inputs of the graph that a value depends on."""
    seen, waiting, found = set[str](), [name], []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in scope.inputs and name not in scope.initializers:
            found.append(name)
        node = scope.producers.get(name)
        waiting += [] if node is None else list(_taken(node))
    return sorted(found)


def _taken(node: Any) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for entry in node.attribute:
        for graph in [entry.g] if entry.type == 5 else entry.graphs:
            for inner in graph.node:
                yield from _taken(inner)


def check_settled(model: Model) -> None:
    """Raise `FormatError` where an `If` that leads to an output remains; the message says what would resolve it."""
    if not any(node.op_type == "If" for node in model.proto.graph.node):
        return
    scope = Scope(model, model.proto.graph)
    live = live_nodes(scope)
    left = [node for node in scope.graph.node if node.op_type == "If" and node.domain in DOMAINS and id(node) in live]
    inputs = {value.name: value for value in scope.graph.input}
    found = [name for node in left for name in needs(scope, node.input[0])]
    numbers = [name for name in dict.fromkeys(found) if declared(inputs[name]) == []]
    if numbers:
        kinds = [f"{short(name)} ({KINDS.get(inputs[name].type.tensor_type.elem_type, '?')})" for name in numbers]
        example = ", ".join(f"{name!r}: ..." for name in numbers)
        text = f"the file's branches depend on {', '.join(kinds)}: pass the values"
        raise FormatError(f"{model.path}: {text}: cs.load(path, constants={{{example}}})")
    if left:
        names = ", ".join(short(name) for name in dict.fromkeys(found)) or "unknown values"
        where = f"{model.path}: If {short(label(left[0]))}"
        text = f"{where}: its branch must be known when the file is loaded, but depends on the lengths of {names}"
        example = next((name for name in scope.inputs if len(declared(inputs[name]) or ()) in (2, 3)), "input")
        raise FormatError(f"{text}: pass the size of a frame, as in cs.load(path, frames={{{example!r}: 512}})")
