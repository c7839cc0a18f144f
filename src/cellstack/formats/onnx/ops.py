"""ONNX's computing operators as nodes: products, elementwise operators, reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx import attention, grids
from cellstack.formats.onnx.activations import clipped
from cellstack.formats.onnx.attributes import axes_of
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Broadcast
from cellstack.formats.onnx.graph import Handler, Reader, Refused, floats, steps_apart
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Activation, Dense, GlobalPool, Merge, Node, Power, Reduce, Scale, Standardise

MERGES = {"Add": "add", "Sum": "add", "Mul": "mul", "Sub": "sub", "Max": "max", "Min": "min", "Mean": "ave"}


def features_last(flow: Flowing) -> None:
    """Raise `Refused` unless the last axis of a value is its features."""
    if flow.axes[-1:] != ("F",) or "D" in flow.axes:
        raise Refused(f"expected the feature axis last, found axes {' '.join(flow.axes)}")


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def dense(reader: Reader, node: Any, x: Flowing, kernel: Array, bias: Array | None = None) -> list[Any]:
    """Add a Dense and return its output."""
    features_last(x)
    if kernel.ndim != 2:
        raise Refused(f"expected a matrix of weights, found {kernel.shape}")
    if bias is not None:
        bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (kernel.shape[1],)))
    return [reader.put(node, Dense(kernel, bias), x)]


def matmul(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MatMul with constant weights, or of two values."""
    if not any(isinstance(value, (np.ndarray, Broadcast)) for value in values):
        return [attention.product(reader, node, *values)]
    left = isinstance(values[0], (np.ndarray, Broadcast))
    x, weights = reader.flowing(values[left]), floats(values[not left], "the weights")
    if not left and not x.parts and weights.ndim < 3:
        return dense(reader, node, x, weights)
    if left and weights.ndim > 1:
        return [grids.dense(reader, node, x, weights.swapaxes(-1, -2), -2)]
    return [grids.dense(reader, node, x, weights)]


def gemm(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gemm with constant weights."""
    x, kernel = reader.flowing(values[0]), floats(values[1], "the weights")
    if attributes.get("transA", 0) or len(x.axes) != 2:
        raise Refused(f"expected axes B F, found axes {' '.join(x.axes)}")
    bias = floats(values[2], "the bias") if len(values) > 2 and values[2] is not None else None
    if bias is not None and bias.ndim > 1 and bias.shape[0] != 1:
        raise Refused("the bias must be the same for all rows")
    alpha, beta = (kernel.dtype.type(attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    kernel = alpha * (kernel.T if attributes.get("transB", 0) else kernel)
    return dense(reader, node, x, kernel, None if bias is None else beta * bias)


# ── along an axis ─────────────────────────────────────────────────────────────────────────────────────────────────────


def reduce(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a sum, mean, maximum or minimum over all of time, or over the features."""
    x, keep = reader.flowing(values[0]), True
    if node.op_type.startswith("Global"):
        mode, axes = ("max" if "Max" in node.op_type else "mean"), list(range(2, len(x.axes)))
        if not x.has("BF" + "".join(x.axes[2:])) and x.axes[1:2] not in {(part,) for part, _ in (*x.parts, ("1", 1))}:
            raise Refused(f"expected the axes batch, channels and at least one more, found {' '.join(x.axes)}")
        x = x if x.has("BFT") else grids.as_grid(x)
    else:
        mode, found = node.op_type.removeprefix("Reduce").lower(), axes_of(attributes, values)
        axes, keep = [] if found is None else [x.at(axis) for axis in found], bool(attributes.get("keepdims", 1))
    if mode == "l2":
        x, mode = reader.put(f"{label(node)}.squares", Power(2.0), x), "sum"
        made = reduce_over(reader, node, x, mode, axes, keep)
        return [reader.put(f"{label(node)}.root", Power(0.5), made)]
    return [reduce_over(reader, node, x, mode, axes, keep)]


def reduce_over(reader: Reader, node: Any, x: Flowing, mode: str, axes: list[int], keep: bool) -> Flowing:
    """Return a sum, mean, maximum or minimum over some axes."""
    if x.parts:
        inner = [n for n in axes if x.axes[n] in dict(x.parts)]
        if inner:
            x = grids.over_parts(reader, node, x, inner, mode, keep)
            axes = [n - (0 if keep else sum(m < n for m in inner)) for n in axes if n not in inner]
            if not axes:
                return x
    over = [x.axes[axis] for axis in axes if x.axes[axis] != "1"]
    if sorted(over) == ["F", "T"] and "D" not in x.axes:  # first over the features, of every step
        at = next(n for n in axes if x.axes[n] == "F")
        x = reader.put(f"{label(node)}.features", Reduce(mode, -1, keepdims=True), x)
        x, over = replace(x, axes=tuple("1" if n == at else axis for n, axis in enumerate(x.axes))), ["T"]
    if over not in (["T"], ["F"], []) or not axes or (over == ["F"] and "D" in x.axes):
        raise Refused(f"expected a reduction over time or the features, found axes {axes} of {' '.join(x.axes)}")
    kept = ["F" if x.axes[n] == "F" else "1" if n in axes else axis for n, axis in enumerate(x.axes)]
    labels = [axis for n, axis in enumerate(kept) if keep or n not in axes]
    if not over or (over == ["F"] and x.width == 1):  # a single number: every reduction is the identity
        return replace(x, axes=tuple(labels))
    made: Node = GlobalPool(mode) if mode in ("mean", "max") else Reduce(mode, 1)
    if over == ["F"]:  # a vector keeps its axis in a Network
        made = Reduce(mode, -1, keepdims=keep or "T" not in x.axes)
    else:
        steps_apart(reader)
    return replace(reader.put(node, made, x), axes=tuple(labels))


# ── elementwise ───────────────────────────────────────────────────────────────────────────────────────────────────────


def by_features(x: Flowing, value: Array) -> Array | None:
    """Return a constant as one number per feature, or a single one `[1]`; None where it varies along other axes."""
    if value.ndim > len(x.axes):
        return None
    if x.parts and value.size > 1:
        return grids.by_parts(x, value)
    if value.size == 1:
        return value.reshape(1)
    if "D" in x.axes or "F" not in x.axes:
        return None
    at = x.axes.index("F") - len(x.axes)
    if value.ndim < -at or value.shape[at] != value.size or x.width not in (None, value.size):
        return None
    return value.reshape(-1)


def arithmetic(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an Add, Sub, Mul, Div, Max, Min, Sum or Mean of data values, or of one and a constant."""
    name = node.op_type
    constants = [isinstance(value, (np.ndarray, Broadcast)) for value in values]
    if not any(constants):
        return merged(reader, node, values)
    if len(values) != 2 or name not in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        raise Refused("a constant isn't supported here")
    x, first = reader.flowing(values[constants.index(False)]), constants[0]
    constant = values[constants.index(True)]
    whole = x.wire in reader.ids and isinstance(constant, np.ndarray) and constant.dtype.kind in "iu"
    if whole and name == "Div":
        raise Refused("a division of ids, which rounds, isn't supported")
    numbers = by_features(x, constant := floats(constant.astype(np.float32) if whole else constant, "the constant"))
    if numbers is None:
        raise Refused(f"expected one number, or one per feature, found {constant.shape} with axes {' '.join(x.axes)}")
    if name in ("Max", "Min"):
        return clipped(reader, node, x, *((numbers, None) if name == "Max" else (None, numbers)))
    if name == "Div" and first:
        raise Refused("the divisor must be constant if the dividend is")
    one, zero = np.ones_like(numbers), np.zeros_like(numbers)
    with np.errstate(all="ignore"):
        scale, shift = {
            "Add": (one, numbers),
            "Sub": (-one, numbers) if first else (one, -numbers),
            "Mul": (numbers, zero),
            "Div": (one / numbers, zero),
        }[name]
    if numbers.size == 1 and (x.shape[-1] is None or whole):
        y = reader.put(node, Activation(f"affine({scale[0]!s}, {shift[0]!s})"), x)
        reader.ids |= {y.wire} if whole else set()
        return [y]
    width = reader.builder.make((x.shape[-1] if x.width or x.parts else 0) or numbers.size)
    scale, shift, by = (np.ascontiguousarray(np.broadcast_to(array, (width,))) for array in (scale, shift, numbers))
    exact = name == "Div" and by.all()
    return [reader.put(node, Standardise(np.zeros_like(by), by) if exact else Scale(scale, shift), x)]


def merged(reader: Reader, node: Any, values: list[Any]) -> list[Any]:
    """Read an elementwise operator on several values."""
    flows = [reader.flowing(value) for value in values]
    if node.op_type not in MERGES and node.op_type != "Div":
        raise Refused("the operator isn't supported for computed values")
    if any(flow.parts for flow in flows):
        flows = grids.aligned(reader, node, flows)
    flows = grids.over_steps(reader, flows)
    if len({flow.axes for flow in flows}) != 1:
        raise Refused(f"expected values with the same axes, found {', '.join(' '.join(f.axes) for f in flows)}")
    widths = {flow.width for flow in flows} - {1}
    if len(widths) > 1:
        raise Refused(f"expected values of the same width, found {[flow.width for flow in flows]}")
    if node.op_type == "Div":
        return [grids.divided(reader, node, *flows)]
    if len(flows) == 1:
        return [flows[0]]
    wide = max(flows, key=lambda flow: len(flow.parts))
    y = reader.put(node, Merge(MERGES[node.op_type]), *flows)
    reader.ids |= {y.wire} if all(flow.wire in reader.ids for flow in flows) else set()
    return [replace(y, parts=wide.parts)]


HANDLERS: dict[str, Handler] = {
    "MatMul": matmul,
    "Gemm": gemm,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceSum"), reduce),
    **dict.fromkeys(("Max", "Mean", "Min", "Sum"), arithmetic),
}
