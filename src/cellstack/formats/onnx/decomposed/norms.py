"""Expands LayerNormalization into elementary operators, which cells with layer normalisation are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import DOMAINS, Model, onnx_package


def expand_norms(model: Model, least: int = 1) -> Model:
    """Return a model in which each LayerNormalization over the last axis is written as other operators.

    Args:
        model: the file.
        least: only those whose gain is used at least this often; 2 selects those that a loop repeats at every step.
    """
    nodes, tensors = list[Any](), list[Any]()
    norms = {id(node) for node in model.graph.node if _is_norm(model, node)}
    gains = Counter(node.input[1] for node in model.graph.node if id(node) in norms)
    scope = model.scope()
    for node in model.graph.node:
        if id(node) not in norms or gains[node.input[1]] < least:
            nodes.append(node)
            continue
        gain = scope.constant(node.input[1])
        dtype = gain.dtype if isinstance(gain, np.ndarray) else np.float32
        # The attribute is a float32; its shortest decimal form is the number that was meant, such as 1e-5.
        epsilon = np.array(str(np.float32(model.attributes(node).get("epsilon", 1e-5))), dtype)
        tensors.append(onnx_package().numpy_helper.from_array(epsilon, f"{node.output[0]} epsilon"))
        nodes += _expanded(node, tensors[-1].name)
    return model.changed(nodes, tensors) if tensors else model


def _is_norm(model: Model, node: Any) -> bool:
    """Whether a node is a LayerNormalization over the last axis."""
    if node.op_type != "LayerNormalization" or node.domain not in DOMAINS:
        return False
    return len(node.output) == 1 and model.attributes(node).get("axis", -1) == -1


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
