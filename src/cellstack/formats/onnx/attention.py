"""ONNX's products of two computed values: attention, and weighted sums over time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellstack.formats.onnx import grids
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.graph import Reader, Refused, steps_apart
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Attention, Merge, Reduce, Reshape, Take


@dataclass(frozen=True)
class Scores:
    """Products of queries and keys, an intermediate result of attention, `[…, steps of queries, steps of keys]`.

    Args:
        queries: the queries.
        keys: the keys.
        axes: the labels of the axes; "S" are the steps of the keys.
        heads: the label of the part that holds the heads; "" without heads.
        scale: a factor of the products.
        softmax: whether softmax has been applied.
    """

    queries: Flowing
    keys: Flowing
    axes: tuple[str, ...]
    heads: str
    scale: float = 1.0
    softmax: bool = False


def product(reader: Reader, node: Any, one: Any, other: Any) -> Any:
    """Read a MatMul of two values: return `Scores` for queries and keys, otherwise the product."""
    if isinstance(one, Scores):
        return _attended(reader, node, one, reader.flowing(other))
    one, other = reader.flowing(one), reader.flowing(other)
    heads = _heads(one, other)
    ahead = len(one.axes) - 2
    if len(one.axes) != len(other.axes) or ahead < 1 or len(one.axes) > 3 + bool(heads):
        raise _unsupported(one, other)
    (rows, inner), (inner_too, columns) = one.axes[-2:], other.axes[-2:]
    if inner == "T" and inner_too == "T" and not heads:
        return _summed(reader, node, one, other)
    if _is_features(one, inner) and _is_features(other, inner_too):
        if rows == "T" and columns == "T":
            return Scores(one, other, (*one.axes[:-1], "S"), heads)
        if not heads and "1" in (rows, columns):  # one of them has a single vector
            both = [replace(one, axes=("B", rows, "F")), replace(other, axes=("B", columns, "F"))]
            both = grids.over_steps(reader, both)
            if len({flow.axes for flow in both}) > 1 or both[0].width != both[1].width:
                raise _unsupported(one, other)
            products = reader.put(f"{label(node)}.products", Merge("mul"), *both)
            y = reader.put(node, Reduce("sum", -1, keepdims=True), products)
            axes = {"T": "T", "1": "F"} if "T" in (rows, columns) else {"1": "1"}
            return replace(y, axes=("B", axes[rows], axes[columns]))
    raise _unsupported(one, other)


def _unsupported(one: Flowing, other: Flowing) -> Refused:
    return Refused(f"a product of values with axes {' '.join(one.axes)} and {' '.join(other.axes)} isn't supported")


def _heads(one: Flowing, other: Flowing) -> str:
    """Return the label of the axis of heads that two values share; "" if they have none."""
    if len(one.axes) != 4 or len(other.axes) != 4 or one.axes[0] != "B" or other.axes[0] != "B":
        return ""
    name, name_too = one.axes[1], other.axes[1]
    sizes, sizes_too = dict(one.parts), dict(other.parts)
    return name if name in sizes and sizes[name] == sizes_too.get(name_too) else ""


def _is_features(x: Flowing, axis: str) -> bool:
    return axis == "F" or (axis in dict(x.parts) and len(x.parts) == 2)


def _summed(reader: Reader, node: Any, one: Flowing, other: Flowing) -> Flowing:
    """Return the sum over time of the products of two values, `[B, F, T]` and `[B, T, G]`, as `[B, F, G]`."""
    steps_apart(reader)
    rows, columns = one.axes[1], other.axes[2]
    if columns != "F" or rows not in ("F", "1") or one.axes[0] != other.axes[0]:
        raise _unsupported(one, other)
    weights, width = as_steps(reader, one), other.shape[-1]
    count = weights.shape[-1]
    if width is None or count is None:
        raise Refused("the number of features must be known")
    values = other
    if count > 1 and width > 1:
        reader.builder.make(2 * count * width)
        indices = np.repeat(np.arange(count), width), np.tile(np.arange(width), count)
        weights, values = (
            reader.put(f"{label(node)}.{what}", Take(tuple(index.tolist())), x)
            for what, index, x in zip(("weights", "values"), indices, (weights, values), strict=True)
        )
    products = reader.put(f"{label(node)}.products", Merge("mul"), replace(weights, axes=values.axes), values)
    y = reader.put(node, Reduce("sum", 1), products)
    if count == 1:
        return replace(y, axes=("B", "1", "F"), parts=())
    if width == 1:
        return replace(y, axes=("B", "F", "1"), parts=())
    return replace(y, axes=("B", "C", "G"), parts=(("C", count), ("G", width)))


def as_steps(reader: Reader, x: Flowing) -> Flowing:
    """Return a value with one number per step, `[B, T]`, as a sequence of one feature; return others unchanged."""
    return reader.put(f"{x.wire}.steps", Reshape((-1, 1)), x) if "T" in x.axes and len(x.shape) == 1 else x


def scaled(node: Any, values: list[Any]) -> Scores | None:
    """Return scores multiplied or divided by a number; None if the operator does something else."""
    scores = next((value for value in values if isinstance(value, Scores)), None)
    if scores is None or scores.softmax or node.op_type not in ("Mul", "Div"):
        return None
    number = numbers(next(value for value in values if value is not scores))
    if not isinstance(number, np.ndarray) or number.size != 1 or (node.op_type == "Div" and values[0] is not scores):
        return None
    factor = float(number.reshape(()))
    return replace(scores, scale=scores.scale * factor if node.op_type == "Mul" else scores.scale / factor)


def _attended(reader: Reader, node: Any, scores: Scores, values: Flowing) -> Flowing:
    """Return values weighted by attention."""
    steps_apart(reader)
    if not scores.softmax:
        raise Refused("attention without a softmax isn't supported")
    queries, keys = scores.queries, scores.keys
    if not scores.heads:
        if values.axes != ("B", "T", "F"):
            raise Refused(f"expected values with axes B T F, found {' '.join(values.axes)}")
        return reader.put(node, Attention(1, scores.scale), queries, keys, values, axes=("B", "T", "F"))
    count = dict(queries.parts)[scores.heads]
    parts = [grids.outermost(reader, x, x.axes[1]) for x in (queries, keys, values)]
    if any(len(x.parts) != 2 or x.axes[0] != "B" for x in parts) or values.axes[2] != "T":
        raise Refused(f"expected values of {count} heads, found axes {' '.join(values.axes)}")
    y = reader.put(node, Attention(count, scores.scale), *parts)
    return replace(y, axes=parts[2].axes, parts=parts[2].parts)
