"""Models with 8-bit integer products: the file rounds x at run time, the Network doesn't.

q, grain, zero = DynamicQuantizeLinear(x)            x ≈ (q - zero)·grain
MatMulInteger(q, W, zero, zero of W)·(grain·scale)   x times the matrix (W - zero of W)·scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.graph import Handler, Reader, Refused, floats
from cellstack.formats.onnx.ops import dense
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Scale


@dataclass(frozen=True, eq=False)
class Rounded:
    """An output of a value's quantisation: `"q"`, `"zero"`, or `"grain"`, the scale, times `factor`."""

    of: Flowing
    what: str
    factor: Array | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """A value times a matrix of integers, not yet multiplied by the value's grain."""

    of: Flowing
    kernel: Array


def rounded(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a DynamicQuantizeLinear: the value, its grain and its zero."""
    x = reader.flowing(values[0])
    return [Rounded(x, "q"), Rounded(x, "grain", np.ones(1, np.float32)), Rounded(x, "zero")]


def product(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MatMulInteger of a quantised value and a constant matrix."""
    x, weights, zero, offset = (*values, None, None)[:4]
    if not isinstance(x, Rounded) or x.what != "q" or not isinstance(zero, Rounded) or zero.of != x.of:
        raise Refused("expected a value and its zero from one DynamicQuantizeLinear")
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or weights.dtype.kind not in "iu":
        raise Refused("expected a constant matrix of integers")
    if zero.what != "zero" or not (offset is None or isinstance(offset, np.ndarray)):
        raise Refused("the weights' zero points must be constant")
    return [Product(x.of, _less(weights, offset, -1))]


def _less(numbers: Array, zero: Array | None, axis: int) -> Array:
    """Return integers minus their zero, a single one or one for each entry of an axis, as float32."""
    wide = numbers.astype(np.float32)
    if zero is None:
        return wide
    if zero.size not in (1, numbers.shape[axis]):
        raise Refused(f"expected one zero point or {numbers.shape[axis]}, found {zero.size}")
    return wide - zero.reshape(-1).astype(np.float32)


def multiplied(reader: Reader, node: Any, values: list[Any]) -> list[Any]:
    """Read a Mul of a grain and scales, or of an integer product and its grain."""
    one, other = values if isinstance(values[0], (Rounded, Product)) else values[::-1]
    if isinstance(one, Rounded) and isinstance(other, Product):
        one, other = other, one
    if isinstance(one, Rounded) and one.factor is not None:
        return [replace(one, factor=one.factor * floats(other, "the scales").reshape(-1))]
    if isinstance(one, Product) and isinstance(other, Rounded) and other.factor is not None and other.of == one.of:
        factor = other.factor
        if factor.size not in (1, one.kernel.shape[1]):
            raise Refused(f"expected one scale, or {one.kernel.shape[1]}, found {factor.size}")
        return dense(reader, node, one.of, one.kernel * factor)
    raise Refused("expected an integer product times its grain, or a grain times scales")


def dequantised(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a DequantizeLinear of 8-bit vectors from a table."""
    x, scale, zero = reader.flowing(values[0]), values[1], values[2] if len(values) > 2 else None
    scale = floats(scale, "the scale").reshape(-1)
    offset = np.zeros(1, np.float32) if zero is None else zero
    if not isinstance(offset, np.ndarray) or scale.size != 1 or offset.size != 1 or x.width is None:
        raise Refused("expected one scale and one zero point, both constant")
    wide = np.full(reader.builder.make(x.width), scale[0], scale.dtype)
    shift = -wide * offset.reshape(-1)[0].astype(scale.dtype)
    return [reader.put(node, Scale(wide, shift), x)]


def quantised(usual: Handler) -> Handler:
    """Return a handler that processes quantised values, and calls `usual` for others."""

    def read(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
        if not any(isinstance(value, (Rounded, Product)) for value in values):
            return usual(reader, node, attributes, values)
        if node.op_type == "Mul" and len(values) == 2:
            return multiplied(reader, node, values)
        if node.op_type == "Cast" and attributes.get("to") == 1:
            return values[:1]
        raise Refused("quantised values aren't supported here")

    return read


HANDLERS: dict[str, Handler] = {
    "DequantizeLinear": dequantised,
    "DynamicQuantizeLinear": rounded,
    "MatMulInteger": product,
}
