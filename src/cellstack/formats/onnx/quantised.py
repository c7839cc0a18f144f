"""Models whose products take 8-bit integers: x is rounded where the file runs, and stays as it is here.

q, grain, zero = DynamicQuantizeLinear(x)            x ≈ (q - zero)·grain
MatMulInteger(q, W, zero, zero of W)·(grain·scale)   x times the matrix (W - zero of W)·scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.ops import dense, floats
from cellstack.formats.onnx.values import Flowing
from cellstack.layout import Array
from cellstack.nodes import Scale


@dataclass(frozen=True, eq=False)
class Rounded:
    """What stands for a value that the file rounds: `"q"` or `"zero"`; or `"grain"`, times `factor`."""

    of: Flowing
    what: str
    factor: Array | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """A value times a matrix of integers, still to be multiplied by the value's grain."""

    of: Flowing
    kernel: Array


def rounded(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a DynamicQuantizeLinear: the value itself, its grain and its zero."""
    x = reader.flowing(values[0])
    return [Rounded(x, "q"), Rounded(x, "grain", np.ones(1, np.float32)), Rounded(x, "zero")]


def product(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MatMulInteger of such a value and a constant matrix."""
    x, weights, zero, offset = (*values, None, None)[:4]
    if not isinstance(x, Rounded) or x.what != "q" or not isinstance(zero, Rounded) or zero.of != x.of:
        raise Refused("expected a value out of DynamicQuantizeLinear, and its zero")
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or weights.dtype.kind not in "iu":
        raise Refused("expected a constant matrix of integers")
    if zero.what != "zero" or not (offset is None or isinstance(offset, np.ndarray)):
        raise Refused("expected constant zeros of the weights")
    return [Product(x.of, _less(weights, offset, -1))]


def _less(numbers: Array, zero: Array | None, axis: int) -> Array:
    """Return integers less their zero, one in all or one for each entry of an axis, as float32."""
    wide = numbers.astype(np.float32)
    if zero is None:
        return wide
    if zero.size not in (1, numbers.shape[axis]):
        raise Refused(f"expected one zero or {numbers.shape[axis]}, found {zero.size}")
    return wide - zero.reshape(-1).astype(np.float32)


def multiplied(reader: Reader, node: Any, values: list[Any]) -> list[Any]:
    """Read a Mul of a grain and scales, or of a product and its grain."""
    one, other = values if isinstance(values[0], (Rounded, Product)) else values[::-1]
    if isinstance(one, Rounded) and isinstance(other, Product):
        one, other = other, one
    if isinstance(one, Rounded) and one.factor is not None:
        return [replace(one, factor=one.factor * floats(other, "the scales").reshape(-1))]
    if isinstance(one, Product) and isinstance(other, Rounded) and other.factor is not None and other.of == one.of:
        factor = other.factor
        if factor.size not in (1, one.kernel.shape[1]):
            raise Refused(f"expected one scale or {one.kernel.shape[1]}, found {factor.size}")
        return dense(reader, node, one.of, one.kernel * factor)
    raise Refused("expected the product of a value's grain and scales")


def dequantised(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a DequantizeLinear of 8-bit vectors out of a table."""
    x, scale, zero = reader.flowing(values[0]), values[1], values[2] if len(values) > 2 else None
    scale = floats(scale, "the scale").reshape(-1)
    offset = np.zeros(1, np.float32) if zero is None else zero
    if not isinstance(offset, np.ndarray) or scale.size != 1 or offset.size != 1 or x.width is None:
        raise Refused("expected one constant scale and zero")
    wide = np.full(reader.builder.make(x.width), scale[0], scale.dtype)
    shift = -wide * offset.reshape(-1)[0].astype(scale.dtype)
    return [reader.put(node, Scale(wide, shift), x)]


def quantised(usual: Handler) -> Handler:
    """Return a handler that passes on what stands for a rounded value, and else does as `usual` does."""

    def read(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
        if not any(isinstance(value, (Rounded, Product)) for value in values):
            return usual(reader, node, attributes, values)
        if node.op_type == "Mul" and len(values) == 2:
            return multiplied(reader, node, values)
        if node.op_type == "Cast" and attributes.get("to") == 1:
            return values[:1]
        raise Refused("expected a value that isn't rounded")

    return read


HANDLERS: dict[str, Handler] = {
    "DequantizeLinear": dequantised,
    "DynamicQuantizeLinear": rounded,
    "MatMulInteger": product,
}
