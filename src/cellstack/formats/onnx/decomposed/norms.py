"""Writes layer normalisation as the operators of which a cell's step consists of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import DOMAINS, Model, onnx_package


def expand_norms(model: Model) -> Model:
    """Return a model in which each LayerNormalization over the last axis is written as other operators."""
    nodes, tensors = list[Any](), list[Any]()
    for node in model.graph.node:
        attributes = model.attributes(node)
        if node.op_type != "LayerNormalization" or node.domain not in DOMAINS or attributes.get("axis", -1) != -1:
            nodes.append(node)
            continue
        dtype = np.float64 if _is_double(model, node.input[1]) else np.float32
        epsilon = np.array(attributes.get("epsilon", 1e-5), dtype)
        tensors.append(onnx_package().numpy_helper.from_array(epsilon, f"{node.output[0]} epsilon"))
        nodes += _expanded(node, tensors[-1].name)
    return model.changed(nodes, tensors) if tensors else model


def _is_double(model: Model, name: str) -> bool:
    constant = model.scope().constant(name)
    return isinstance(constant, np.ndarray) and constant.dtype == np.float64


def _expanded(node: Any, epsilon: str) -> Iterator[Any]:
    """Yield (x - mean) / sqrt(variance + epsilon), times a gain, plus a bias."""
    make, x, y = onnx_package().helper.make_node, node.input[0], node.output[0]
    yield make("ReduceMean", [x], [f"{y} mean"], axes=[-1], keepdims=1)
    yield make("Sub", [x, f"{y} mean"], [f"{y} apart"])
    yield make("Mul", [f"{y} apart"] * 2, [f"{y} squares"])
    yield make("ReduceMean", [f"{y} squares"], [f"{y} variance"], axes=[-1], keepdims=1)
    yield make("Add", [f"{y} variance", epsilon], [f"{y} sum"])
    yield make("Sqrt", [f"{y} sum"], [f"{y} deviation"])
    yield make("Div", [f"{y} apart", f"{y} deviation"], [f"{y} unit"])
    biased = len(node.input) > 2 and bool(node.input[2])
    yield make("Mul", [f"{y} unit", node.input[1]], [f"{y} scaled" if biased else y])
    if biased:
        yield make("Add", [f"{y} scaled", node.input[2]], [y], name=node.name)
