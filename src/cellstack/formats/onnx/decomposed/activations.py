"""Recognises a cell's activations in a graph: one operator, or the operators that the writer builds one from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.activations import OF_BACKBONES, PARAMETERS
from cellstack.formats.onnx.cells import NAMES, activation_text
from cellstack.formats.onnx.decomposed.linear import inputs_of, scalar
from cellstack.formats.onnx.file import DOMAINS, Scope, onnx_package
from cellstack.formats.onnx.pieces import Pieces

COMMUTATIVE = ("Add", "Max", "Min", "Mul")
UNKNOWN = (0.8125, 0.6875)  # parameters in the templates; no other constant in them has these values


class Template(NamedTuple):
    """An activation of x as the writer builds it: each value's operator and inputs, the last is "y"; constants."""

    name: str
    nodes: Mapping[str, tuple[str, tuple[str, ...]]]
    constants: Mapping[str, float]


@lru_cache(maxsize=1)
def templates() -> dict[str, list[Template]]:
    """Return the activations that the writer builds from several operators, by the operator that comes last."""
    found: dict[str, list[Template]] = {}
    for name in OF_BACKBONES:
        given = UNKNOWN[: len(PARAMETERS.get(name, ()))]
        made = Pieces(onnx_package(), np.dtype(np.float64), {"x", "y"})
        made.activate("y", "x", f"{name}({', '.join(map(repr, given))})" if given else name, "y", plain=True)
        if len(made.nodes) > 1:
            nodes = {node.output[0]: (node.op_type, tuple(node.input)) for node in made.nodes}
            constants = {one.name: float(made.onnx.numpy_helper.to_array(one)) for one in made.tensors}
            found.setdefault(nodes["y"][0], []).append(Template(name, nodes, constants))
    return found


def activated(scope: Scope, name: str) -> tuple[str, str] | None:
    """Return the activation that computes a value, and the name of its input; None where it isn't one."""
    node = scope.producers.get(name)
    if node is None or not node.input or node.domain not in DOMAINS:
        return None
    attributes = scope.model.attributes(node)
    text = activation_text(node, attributes) if node.op_type in NAMES else None
    if node.op_type == "Gelu" and attributes.get("approximate", "none") == "none":  # see `products`
        text = "gelu"
    if text is not None:
        return text, node.input[0]
    for template in templates().get(node.op_type, ()):
        for bound in _matches(scope, template, "y", name, {}):
            given = [bound[number] for number in UNKNOWN if number in bound]
            return template.name + (f"({', '.join(map(repr, given))})" if given else ""), bound["x"]
    return None


Bound = dict[Any, Any]  # the value of x, of each result, and of each parameter


def _matches(scope: Scope, template: Template, ours: str, theirs: str, bound: Bound) -> Iterator[Bound]:
    """Yield how a value of a template can be a value of the graph."""
    if ours in template.constants:
        number, value = template.constants[ours], scalar(scope, theirs)
        if value is None:
            return
        if value == bound.get(number, value) if number in UNKNOWN else np.float32(value) == np.float32(number):
            yield {**bound, number: value}
        return
    if ours in bound or ours == "x":
        if bound.get(ours, theirs) == theirs:
            yield {**bound, ours: theirs}
        return
    operator, names = template.nodes[ours]
    found = inputs_of(scope, theirs, operator)
    if len(found) != len(names):
        return
    for given in (found, found[::-1]) if operator in COMMUTATIVE else (found,):
        each = [{**bound, ours: theirs}]
        for inner, value in zip(names, given, strict=True):
            each = [more for one in each for more in _matches(scope, template, inner, value, one)]
        yield from each
