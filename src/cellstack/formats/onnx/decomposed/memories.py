"""Reads a Scan as the memory of an mLSTM: its body is compared with the graph that we write for one.

Operators that are symmetric match in either order; numbers match within the precision of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack.formats.onnx.decomposed.scans import KNOWN
from cellstack.formats.onnx.decomposed.sums import bare
from cellstack.formats.onnx.file import DOMAINS, Budget, Graph, Model, Scope, Tensors, declared, label, onnx_package
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.scan import body_of
from cellstack.nodes import MLSTM

EPSILON = 2.0  # of the memory that we write to compare with: no other number in it is as large
FORM_OPSET = 17
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
    form = MLSTM(*sizes[:3], epsilon=EPSILON, output_gate=sizes[3])
    graph = Graph.of(body_of("step", form.memory_in(dtype)))
    ours = Model("", graph, FORM_OPSET, (), "", None, Tensors(""), Budget(0)).scope()
    comparison = _Comparison(ours, Scope(scope.model, body, scope, label(node)))
    if not comparison.same_graph() or len(comparison.epsilons) != 1:
        return None
    return MLSTM(*sizes[:3], epsilon=comparison.epsilons.pop(), output_gate=sizes[3])


def _sizes(body: Any) -> tuple[int, int, int, bool] | None:
    """Return heads, widths of keys and values, and whether there is an output gate, from the widths of the inputs."""
    C, *_, x = (declared(value) or [] for value in body.input)
    if len(C) != 4 or len(x) != 2 or None in (*C[1:], x[1]):
        return None
    heads, keys, values = (int(n or 0) for n in C[1:])
    gated = x[1] != heads * (2 * keys + values + 2)
    return heads, keys, values, gated


class _Comparison:
    """Compares the values of a graph with ours, from the outputs on.

    Attributes:
        epsilons: the numbers in place of `EPSILON`.
    """

    def __init__(self, ours: Scope, theirs: Scope) -> None:
        self.ours, self.theirs = ours, theirs
        self.epsilons: set[float] = set()
        self.known = dict(zip(zip(ours.inputs, theirs.inputs, strict=True), [True] * len(ours.inputs), strict=True))

    def same_graph(self) -> bool:
        """Return whether all outputs are the same."""
        outputs = ([value.name for value in scope.graph.output] for scope in (self.ours, self.theirs))
        return all(self.same(one, other) for one, other in zip(*outputs, strict=True))

    def same(self, one: str, other: str) -> bool:
        """Return whether two values are the same."""
        one, other = bare(self.ours, one), bare(self.theirs, other)
        if (one, other) not in self.known:
            constant = numbers(self.ours.constant(one))
            self.known[one, other] = False  # should a graph have a cycle
            self.known[one, other] = (
                self._same_operation(one, other) if constant is None else self._same_number(constant, other)
            )
        return self.known[one, other]

    def _same_number(self, constant: Any, other: str) -> bool:
        found = numbers(self.theirs.constant(other))
        if not isinstance(found, np.ndarray) or found.size != constant.size or found.dtype.kind not in "fi":
            return False
        if constant.dtype.kind == "f" and float(constant.flat[0]) == EPSILON:
            self.epsilons.add(float(str(found.flat[0])))  # the shortest decimal number: 1e-6 also in float32
            return True
        return bool(np.allclose(found.ravel(), constant.ravel(), rtol=1e-6, atol=0))

    def _same_operation(self, one: str, other: str) -> bool:
        ours, theirs = self.ours.producers.get(one), self.theirs.producers.get(other)
        if ours is None or theirs is None or theirs.domain not in DOMAINS:
            return False
        if (ours.op_type, len(ours.input)) != (theirs.op_type, len(theirs.input)):
            return False
        if self.ours.model.attributes(ours) != self.theirs.model.attributes(theirs):
            return False
        orders = [list(theirs.input)]
        if ours.op_type in SYMMETRIC:
            orders.append(orders[0][::-1])
        return any(all(map(self.same, ours.input, order)) for order in orders)
