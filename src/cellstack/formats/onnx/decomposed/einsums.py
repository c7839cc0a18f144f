"""Writes an Einsum of a value with weights as the matrix product that it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.file import DOMAINS, Model, onnx_package


class Product(NamedTuple):
    """An Einsum as a product.

    Args:
        x: the order of the value's axes; None: their own.
        ones: the axes of length 1 that the value then gets.
        kernel: the weights, `[…, I, O]`.
        less: the axes of length 1 of the product that the result lacks.
        y: the order of the result's axes.
    """

    x: list[int] | None
    ones: list[int]
    kernel: Array
    less: list[int]
    y: list[int] | None


def expand_einsums(model: Model) -> Model:
    """Return a model with a MatMul in place of each Einsum of a value with weights, as in `…i,io->…o`.

    One letter of the value is summed. Other letters of the weights may be groups, as in `…gi,gio->…go`: the value gets
    an axis of length 1 before its last, so that each group has its own matrix. Letters of the weights alone are axes of
    the result, as in `…i,igo->…go`.
    """
    nodes, tensors, scope = list[Any](), list[Any](), model.scope()
    make, from_array = onnx_package().helper.make_node, onnx_package().numpy_helper.from_array
    for node in model.graph.node:
        is_einsum = node.op_type == "Einsum" and node.domain in DOMAINS and len(node.input) == 2
        weights = [scope.constant(name) if is_einsum else None for name in node.input]
        given = [(n, array) for n, array in enumerate(weights) if isinstance(array, np.ndarray)]
        found = _product(str(model.attributes(node)["equation"]), *given[0]) if len(given) == 1 else None
        if found is None:
            nodes.append(node)
            continue
        value, (y,) = node.input[1 - given[0][0]], node.output
        tensors.append(from_array(found.kernel, f"{y} weights"))
        steps: list[tuple[str, dict[str, Any]]] = [("Transpose", {"perm": found.x})] if found.x else []
        steps += [("Unsqueeze", {"axes": found.ones})] if found.ones else []
        steps.append(("MatMul", {}))
        steps += [("Squeeze", {"axes": found.less})] if found.less else []
        steps += [("Transpose", {"perm": found.y})] if found.y else []
        for n, (operator, attributes) in enumerate(steps):
            made = y if n == len(steps) - 1 else f"{y} {operator} {n}"
            taken = [value, tensors[-1].name] if operator == "MatMul" else [value]
            nodes.append(make(operator, taken, [made], name=node.name, **attributes))
            value = made
    return model.changed(nodes, tensors) if tensors else model


def _product(equation: str, place: int, weights: Array) -> Product | None:
    """Return an Einsum as a product; None for one that isn't a product with matrices.

    Args:
        equation: the equation.
        place: which of the two operands are the weights.
        weights: their numbers.
    """
    of, _, to = equation.replace(" ", "").replace("...", ".").partition("->")
    x, w = of.partition(",")[:: -2 if place == 0 else 2]
    groups, new = ([letter for letter in to if letter in w and (letter in x) is shared] for shared in (True, False))
    summed = [letter for letter in w if letter not in to]
    rest = [letter for letter in x if letter not in w]
    given, made = [*rest, *groups, *summed], [*rest, *groups, *new]
    twice = any(len(set(letters)) != len(letters) for letters in (x, w, to))
    known = sorted(x) == sorted(given) and sorted(to) == sorted(made) and len(w) == weights.ndim
    if twice or not known or len(summed) != 1 or not new or "." in w:
        return None
    first, last = ([one.index(letter) for letter in other] for one, other in ((x, given), (made, to)))
    first, last = (None if order == sorted(order) else order for order in (first, last))
    if "." in x and (first or last):  # the number of axes isn't known
        return None
    kernel = weights.transpose([w.index(letter) for letter in (*groups, *new[:-1], *summed, new[-1])])
    more = len(new) if kernel.ndim > 2 else 0
    return Product(first, [-2 - n for n in range(more)], np.ascontiguousarray(kernel), [-2] * (more > 0), last)
