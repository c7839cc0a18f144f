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
from cellstack.formats.onnx.decomposed.linear import sizes_of
from cellstack.formats.onnx.file import DOMAINS, Model, Scope, onnx_package
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
    lengths, tensors = KnownLengths(scope, {}), dict[str, Any]()
    nodes = []
    for node in model.graph.node:
        change = changes.get(node.op_type) if node.domain in DOMAINS else None
        nodes.append(node if change is None else change(lengths, node, tensors))
    return model.changed(nodes, tensors.values())


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
    if wanted is None or has is None or wanted.shape != has.shape:
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
