"""Reads a Scan as the memory of an mLSTM: its body is compared with the graph that we write for one.

Operators that are symmetric match in either order; numbers match within the precision of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack.formats.onnx.decomposed.scans import KNOWN
from cellstack.formats.onnx.file import DOMAINS, Budget, Graph, Model, Scope, Tensors, declared, label, onnx_package
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.scan import body_of
from cellstack.nodes import MLSTM

FORM_OPSET = 17
MOST_NUMBERS = 64  # of a constant that is compared; those in a memory's step are smaller
SYMMETRIC = ("Add", "Max", "Mul")
DTYPES = {1: np.dtype(np.float32), 11: np.dtype(np.float64)}


def memory_of(scope: Scope, node: Any) -> MLSTM | None:
    """Return the memory whose step a Scan computes; None if it computes something else, or skips masked steps."""
    attributes = scope.model.attributes(node)
    backwards = any(attributes.get(f"scan_{end}_directions", [0]) != [0] for end in ("input", "output"))
    if backwards or attributes.keys() - KNOWN or attributes.get("num_scan_inputs") != 1:
        return None
    body: Any = attributes.get("body")
    if not isinstance(body, onnx_package().GraphProto):
        return None
    if {len(part) for part in (body.input, body.output, node.input, node.output)} != {4}:
        return None
    sizes = _sizes(body)
    dtype = DTYPES.get(body.input[0].type.tensor_type.elem_type)
    if sizes is None or dtype is None:
        return None
    theirs, kept = Scope(scope.model, body, scope, label(node)), dict[Any, int]()
    found = _computed(theirs, kept)
    constants = [numbers(theirs.constant(name)) for name in {name for one in body.node for name in one.input}]
    floats = [one for one in constants if isinstance(one, np.ndarray) and one.dtype.kind == "f" and one.size == 1]
    for number in {float(str(one.flat[0])) for one in floats}:  # the shortest decimal number: 1e-6 also in float32
        form = MLSTM(*sizes[:3], epsilon=abs(number), output_gate=sizes[3])
        graph = Graph.of(body_of("step", form.memory_in(dtype)))
        ours = Model("", graph, FORM_OPSET, (), "", None, Tensors(""), Budget(0)).scope()
        if _computed(ours, kept) == found:
            return form
    return None


def _sizes(body: Any) -> tuple[int, int, int, bool] | None:
    """Return heads, widths of keys and values, and whether there is an output gate, from the widths of the inputs."""
    C, *_, x = (declared(value) or [] for value in body.input)
    if len(C) != 4 or len(x) != 2 or None in (*C[1:], x[1]):
        return None
    heads, keys, values = (int(n or 0) for n in C[1:])
    gated = x[1] != heads * (2 * keys + values + 2)
    return heads, keys, values, gated


def _computed(scope: Scope, kept: dict[Any, int]) -> list[int]:
    """Return numbers for a graph's outputs, equal where the same operators compute them from the same inputs.

    Args:
        scope: the graph.
        kept: a number for each computation; what other graphs compute keeps its number.
    """
    known = {name: kept.setdefault(place, len(kept)) for place, name in enumerate(scope.inputs)}

    def number(name: str) -> int:
        if name not in known:  # of a constant, or a value of an enclosing graph
            constant, key = numbers(scope.constant(name)), name
            if isinstance(constant, np.ndarray) and constant.size <= MOST_NUMBERS:
                key = constant.dtype.kind, *(f"{entry:.6g}" for entry in constant.ravel().tolist())
            known[name] = kept.setdefault(key, len(kept))
        return known[name]

    for node in scope.graph.node:
        taken = [number(name) for name in node.input]
        key: Any = id(node)
        if node.domain in DOMAINS:
            attributes = sorted(scope.model.attributes(node).items())
            key = node.op_type, repr(attributes), *(sorted(taken) if node.op_type in SYMMETRIC else taken)
        for place, name in enumerate(node.output):
            if scope.constant(name) is None:
                known[name] = taken[0] if node.op_type == "Identity" else kept.setdefault((key, place), len(kept))
    return [number(value.name) for value in scope.graph.output]
