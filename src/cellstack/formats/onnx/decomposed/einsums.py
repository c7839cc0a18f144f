"""Writes an Einsum of a value with weights as the matrix product that it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.file import DOMAINS, Model, onnx_package


def expand_einsums(model: Model) -> Model:
    """Return a model with a MatMul in place of each Einsum `…i,io->…o` or `…gi,gio->…go` of a value with weights.

    The letters, and the order of the weights' axes, may be others. With groups g, the value gets an axis of length 1
    before its last, so that each group has its own matrix.
    """
    nodes, tensors, scope = list[Any](), list[Any](), model.scope()
    make, from_array = onnx_package().helper.make_node, onnx_package().numpy_helper.from_array
    for node in model.graph.node:
        is_einsum = node.op_type == "Einsum" and node.domain in DOMAINS and len(node.input) == 2
        weights = scope.constant(node.input[1]) if is_einsum else None
        kernel = _kernel(str(model.attributes(node)["equation"]), weights) if isinstance(weights, np.ndarray) else None
        if kernel is None:
            nodes.append(node)
            continue
        (x, _), (y,) = node.input, node.output
        tensors.append(from_array(kernel, f"{y} weights"))
        if kernel.ndim == 2:
            nodes.append(make("MatMul", [x, tensors[-1].name], [y], name=node.name))
            continue
        nodes.append(make("Unsqueeze", [x], [f"{y} rows"], axes=[-2]))
        nodes.append(make("MatMul", [f"{y} rows", tensors[-1].name], [f"{y} products"], name=node.name))
        nodes.append(make("Squeeze", [f"{y} products"], [y], axes=[-2]))
    return model.changed(nodes, tensors) if tensors else model


def _kernel(equation: str, weights: Array) -> Array | None:
    """Return the weights as `[I, O]` or `[G, I, O]`, None if the equation is no product of a value's last axis."""
    of, _, to = equation.replace(" ", "").partition("->")
    x, _, w = of.partition(",")
    groups = x[-2:-1] if x[-2:-1] and x[-2:-1] in w else ""
    order = groups + x[-1:] + to[-1:]
    product = x[: len(x) - 1] + to[-1:] == to and to[-1:] not in x
    if not product or len(set(order)) != len(order) or sorted(order) != sorted(w) or len(w) != weights.ndim:
        return None
    return np.ascontiguousarray(weights.transpose([w.index(letter) for letter in order]))
