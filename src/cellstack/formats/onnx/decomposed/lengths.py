"""Replaces what a graph computes from known lengths, so that the steps of cells are found in it.

If PyTorch's exporter doesn't know the shape of `gates`, as after a `view`, it exports `gates.chunk(4, 1)` as slices
with computed bounds. They are known here, from the shapes of the weights. It also exports `x.view(-1, x.size(1))` of
rows x as a Reshape, which changes nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.decomposed.linear import axes_in, sizes_of
from cellstack.formats.onnx.file import DOMAINS, ODD, Model, Scope, declared, onnx_package
from cellstack.formats.onnx.specialize import KnownLengths


def fix_lengths(model: Model) -> Model:
    """Return a model in which some operators are replaced, using known lengths:

    - bounds of slices become tensors, and the last axis becomes -1;
    - a Reshape to the shape that its input has becomes an Identity;
    - a number added before a sigmoid, such as a forget bias, becomes a vector with one number per unit.
    """
    scope, changes = model.scope(), {"Reshape": _reshape, "Slice": _slice, "Split": _split, "Add": _add}
    if not any(_hides(scope, node) for node in model.graph.node):
        return model
    lengths, tensors = _Known(scope), dict[str, Any]()
    nodes = []
    for node in model.graph.node:
        change = changes.get(node.op_type) if node.domain in DOMAINS else None
        nodes.append(node if change is None else change(lengths, node, tensors))
    return model.changed(nodes, tensors.values())


Shape = list[int | None]

PAIRS = {"Add", "Div", "Mul", "Sub"}
ELEMENTWISE = {"Cast", "Clip", "HardSigmoid", "Identity", "LayerNormalization", "Neg", "Relu", "Sigmoid", "Tanh"}


class _Known(KnownLengths):
    """Lengths that follow from the shapes of weights, through the operators of a step.

    The onnx package's own inference isn't used for this, as it ends the process for invalid files.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope, self.shapes, self.values = scope, dict[str, Shape | None](), dict[str, Any]()
        for value in scope.graph.input:
            self.shapes[value.name] = declared(value)
        for node in scope.graph.node:
            try:
                shapes = self._inferred(node) if node.domain in DOMAINS else None
            except ODD:  # its reader reports it
                shapes = None
            self.shapes.update(zip(node.output, shapes or [None] * len(node.output), strict=False))

    def _shape(self, name: str) -> Shape | None:
        constant = self.scope.constant(name) if name else None
        return [*constant.shape] if isinstance(constant, np.ndarray) else self.shapes.get(name)

    def _inferred(self, node: Any) -> list[Shape | None] | None:
        """Return the shapes of a node's outputs; None where they aren't known."""
        shapes = [self._shape(name) for name in node.input]
        x, kind, attributes = (shapes[0] if shapes else None), node.op_type, self.scope.model.attributes(node)
        if kind == "ConstantOfShape":
            return [_sizes(self.value(node.input[0]))]
        if kind == "Gemm" and len(shapes) > 1 and shapes[1] is not None and len(shapes[1]) == 2:
            return [[x[0] if x else None, shapes[1][0 if attributes.get("transB", 0) else 1]]]
        if x is None:
            return None
        if kind in PAIRS:
            both = [shape for shape in shapes if shape is not None]
            return [_broadcast(both)] if len(both) == len(shapes) == 2 else None
        if kind in ELEMENTWISE:
            return [x]
        if kind == "MatMul" and len(shapes) > 1 and shapes[1] is not None and len(shapes[1]) == 2 and x:
            return [[*x[:-1], shapes[1][1]]]
        axis = attributes.get("axis", 0)
        if kind == "Split" and -len(x) <= axis < len(x):
            sizes = sizes_of(self.scope, node) or [None] * len(node.output)
            return [_with(x, axis, size) for size in sizes]
        if kind == "Gather" and -len(x) <= axis < len(x) and shapes[1] == []:
            return [[size for n, size in enumerate(x) if n != axis % len(x)]]
        if kind in ("Squeeze", "Unsqueeze"):
            return self._squeezed(node, x)
        if kind == "Slice" and len(node.input) > 3:
            bounds = [_integers(self.value(name)) if name else None for name in node.input[1:4]]
            if all(bound is not None and bound.shape == (1,) for bound in bounds):
                start, stop, axis = (int(bound[0]) for bound in bounds if bound is not None)
                size = x[axis] if -len(x) <= axis < len(x) else None
                fits = size is not None and 0 <= start < stop
                return [_with(x, axis, min(stop, size) - start if fits and size else None)]
        if kind == "Reshape" and len(node.input) > 1:
            return [_sizes(self.value(node.input[1]))]
        return None

    def _squeezed(self, node: Any, x: Shape) -> list[Shape | None] | None:
        """Return the shape of a Squeeze or Unsqueeze of a value of shape `x`; None if its axes aren't known."""
        axes = axes_in(self.scope, node)
        total = len(x) + (len(axes or ()) if node.op_type == "Unsqueeze" else 0)
        if not axes or any(not -total <= axis < total for axis in axes):
            return None
        over = {axis % total for axis in axes}
        if node.op_type == "Squeeze":
            return [[size for n, size in enumerate(x) if n not in over]]
        left = iter(x)
        return [[1 if n in over else next(left, None) for n in range(total)]]


def _sizes(wanted: Array | None) -> Shape | None:
    """Return a list of lengths as a shape; those that aren't known, and 0 and -1 of a Reshape, as None."""
    if wanted is None or wanted.ndim != 1:
        return None
    return [one if isinstance(one, int) and one > 0 else None for one in wanted.tolist()]


def _with(shape: Shape, axis: int, size: int | None) -> Shape | None:
    """Return a shape with another length of one axis; None where it has no such axis."""
    if not -len(shape) <= axis < len(shape):
        return None
    made = [*shape]
    made[axis] = size
    return made


def _broadcast(shapes: list[Shape]) -> Shape:
    """Return the shape of an elementwise result; lengths that aren't known stay unknown."""
    rank = max(map(len, shapes))
    made: Shape = []
    for sizes in zip(*([1] * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = {size for size in sizes if size != 1}
        made.append(1 if not others else next((size for size in others if size is not None), None))
    return made


def _hides(scope: Scope, node: Any) -> bool:
    """Whether a node is one that `fix_lengths` may replace."""
    if node.domain not in DOMAINS or node.op_type not in ("Add", "Reshape", "Slice", "Split") or not node.input:
        return False
    if node.op_type == "Add":
        constants = [scope.constant(name) for name in node.input]
        return any(isinstance(one, np.ndarray) and not one.ndim for one in constants)
    return node.op_type != "Split" or scope.model.attributes(node).get("axis", 0) == 1


def _reshape(lengths: KnownLengths, node: Any, tensors: dict[str, Any]) -> Any:
    """Return an Identity for a Reshape that keeps the shape of its input; a length of -1 matches any."""
    wanted, has = (lengths.value(node.input[1]) if len(node.input) > 1 else None), lengths.lengths_of(node.input[0])
    if wanted is None or has is None or len(wanted) != len(has):
        return node
    pairs = zip(wanted.tolist(), has.tolist(), strict=True)
    if sum(one != other for one, other in pairs) > (-1 in wanted.tolist()):
        return node
    return onnx_package().helper.make_node("Identity", [node.input[0]], [*node.output], name=node.name)


def _slice(lengths: KnownLengths, node: Any, tensors: dict[str, Any]) -> Any:
    """Return a Slice with known bounds as tensors, and with -1 as its axis if that is the last one."""
    found = [lengths.value(name) if name else None for name in node.input[1:4]]
    values = {name: _integers(value) for name, value in zip(node.input[1:4], found, strict=False) if name}
    has = lengths.lengths_of(node.input[0])
    axes = values.get(node.input[3]) if len(node.input) > 3 else None
    last = has is not None and axes is not None and axes.tolist() == [len(has) - 1] and not _selects(values, node)
    if not last and not any(lengths.scope.constant(name) is None and values[name] is not None for name in values):
        return node
    made = copy.deepcopy(node)
    for n, name in enumerate(node.input[1:4], 1):
        value = np.array([-1], np.int64) if last and n == 3 else values.get(name)
        if value is not None:
            made.input[n] = f"{name} (last axis)" if last and n == 3 else f"{name} (known)"
            tensors[made.input[n]] = onnx_package().numpy_helper.from_array(value, made.input[n])
    return made


def _add(lengths: KnownLengths, node: Any, tensors: dict[str, Any]) -> Any:
    """Return an Add before a sigmoid with a vector instead of a single number."""
    scope, uses = lengths.scope, [one for one in lengths.scope.graph.node if node.output[0] in one.input]
    if not uses or any(one.op_type != "Sigmoid" for one in uses):
        return node
    for n, name in enumerate(node.input):
        number, has = scope.constant(name), lengths.lengths_of(node.input[1 - n])
        if not isinstance(number, np.ndarray) or number.ndim:
            continue
        if has is not None and len(has) and isinstance(has[-1], int) and has[-1] > 1:
            made = copy.deepcopy(node)
            made.input[n] = f"{number} ({has[-1]} times)"  # the same name at every step
            tensors[made.input[n]] = onnx_package().numpy_helper.from_array(number.repeat(has[-1]), made.input[n])
            return made
    return node


def _selects(values: dict[str, Array | None], node: Any) -> bool:
    """Whether a Slice takes one entry, which may be a step of a sequence of numbers `[B, T]`."""
    start, stop = (values.get(name) for name in node.input[1:3])
    return start is not None and stop is not None and start.shape == stop.shape == (1,) and int(stop[0] - start[0]) == 1


def _split(lengths: KnownLengths, node: Any, tensors: dict[str, Any]) -> Any:
    """Return a Split with -1 as its axis if that is the last one."""
    has, found = lengths.lengths_of(node.input[0]), lengths.scope.model.attributes(node)
    if has is None or found.get("axis", 0) != len(has) - 1 or set(sizes_of(lengths.scope, node) or ()) == {1}:
        return node
    made = copy.deepcopy(node)
    for entry in made.attribute:
        if entry.name == "axis":
            entry.i = -1
    return made


def _integers(value: Array | None) -> Array | None:
    """Return known lengths as integers; None where one of them isn't known."""
    if value is None or (value.dtype == object and not all(isinstance(one, int) for one in value.reshape(-1))):
        return None
    return np.asarray(value.astype(np.int64), order="C")
