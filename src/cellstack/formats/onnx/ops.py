"""ONNX's operators that compute, as nodes: products, convolutions, pools, sums of values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Spread, axes_of, whole
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.values import Flowing
from cellstack.layout import Array
from cellstack.nodes import Activation, Conv1D, Dense, GlobalPool, Merge, Scale, Standardise
from cellstack.spec import DTYPES

MERGES = {"Add": "add", "Mul": "mul", "Sub": "sub", "Max": "max", "Mean": "ave"}


def floats(reader: Reader, value: Any, what: str) -> Array:
    """Return a constant array of float32 or float64; `Refused` where it isn't one."""
    if isinstance(value, Spread) and value.uniform:
        value = value.array.reshape(())
    if not isinstance(value, np.ndarray):
        raise Refused(f"expected {what} to be constant")
    if value.dtype.name == "float16":
        value = value.astype(np.float32)
    if value.dtype.name not in DTYPES:
        raise Refused(f"expected {what} in floats, found {value.dtype}")
    return value


def last_is(flow: Flowing, wanted: str, operator: str) -> None:
    """Raise `Refused` unless the last axis of a value has this label."""
    if not flow.axes or flow.axes[-1] != wanted or "D" in flow.axes:
        raise Refused(f"expected the features on the last axis, found axes {' '.join(flow.axes)}")


def steps_apart(reader: Reader) -> None:
    """Raise `Refused` where rows have lengths: what takes steps together sees those past a row's end in ONNX."""
    if reader.lengths:
        raise Refused("takes steps together, in ONNX also those past the end that sequence_lens gives a row")


# ── products ────────────────────────────────────────────────────────────────────────────────────────────────────────


def dense(reader: Reader, node: Any, x: Flowing, kernel: Array, bias: Array | None) -> list[Any]:
    """Put in a Dense and return what it gives."""
    last_is(x, "F", "Dense")
    if kernel.ndim != 2:
        raise Refused(f"expected a matrix of weights, found {kernel.shape}")
    if bias is not None:
        bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (kernel.shape[1],)))
    wire = reader.add(label(node), Dense(kernel, bias), x.wire)
    return [replace(x, wire=wire, width=kernel.shape[1])]


def matmul(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MatMul with constant weights."""
    x = reader.flowing(values[0])
    return dense(reader, node, x, floats(reader, values[1], "the weights"), None)


def gemm(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gemm with constant weights."""
    x, kernel = reader.flowing(values[0]), floats(reader, values[1], "the weights")
    if attributes.get("transA", 0) or len(x.axes) != 2:
        raise Refused(f"expected rows of features, found axes {' '.join(x.axes)}")
    bias = floats(reader, values[2], "the bias") if len(values) > 2 and values[2] is not None else None
    if bias is not None and bias.ndim > 1 and bias.shape[0] != 1:
        raise Refused("expected one bias for all rows")
    alpha, beta = (kernel.dtype.type(attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    kernel = alpha * (kernel.T if attributes.get("transB", 0) else kernel)
    return dense(reader, node, x, kernel, None if bias is None else beta * bias)


def conv(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a convolution over one axis, or over two of which one is of length 1."""
    x, kernel = values[0], floats(reader, values[1], "the weights")
    if not isinstance(x, Flowing):
        x = reader.flowing(x)
    bias = floats(reader, values[2], "the bias") if len(values) > 2 and values[2] is not None else None
    spatial = x.axes[2:]
    if not x.has("BF" + "".join(spatial)) or sorted(spatial) not in (["T"], ["1", "T"]):
        raise Refused(f"expected axes B F T, found {' '.join(x.axes)}")
    over, count = spatial.index("T"), len(spatial)
    if kernel.ndim != count + 2:
        raise Refused(f"expected weights of {count + 2} axes, found {kernel.shape}")
    if count == 2:
        if kernel.shape[3 - over] != 1:
            raise Refused(f"expected a window over time alone, found {kernel.shape[2:]}")
        kernel = kernel[:, :, :, 0] if over == 0 else kernel[:, :, 0]
    strides, dilations, pads = window(attributes, count)
    padding = padding_of(attributes, pads, over, count)
    if any(x.pad):
        if padding not in ("valid", x.pad) and not isinstance(padding, tuple):
            raise Refused("expected padding once")
        own = (0, 0) if padding == "valid" else padding
        padding = (x.pad[0] + own[0], x.pad[1] + own[1])
    span = (kernel.shape[2] - 1) * dilations[over] + 1
    if padding == (span - 1, 0) and span > 1:
        padding = "causal"
    taps = kernel.transpose(2, 1, 0)
    made = Conv1D(taps, bias, strides[over], padding, dilations[over], attributes.get("group", 1))
    if made.mixes_steps:
        steps_apart(reader)
    steps, _ = made.check(label(node), (x.steps, None))
    if steps == 0:
        raise Refused(f"expected at least one window of {x.steps} steps, found none")
    wire = reader.add(label(node), made, x.wire)
    return [replace(x, wire=wire, width=kernel.shape[0], steps=steps, pad=(0, 0))]


def window(attributes: dict[str, Any], count: int) -> tuple[list[int], list[int], list[int]]:
    """Return strides, dilations and pads, one an axis of the window and two for the pads."""
    found = [
        whole(attributes.get(name, usual))
        for name, usual in (("strides", [1] * count), ("dilations", [1] * count), ("pads", [0] * 2 * count))
    ]
    if [len(values) for values in found] != [count, count, 2 * count]:
        raise Refused(f"expected strides, dilations and pads for {count} axes")
    return found[0], found[1], found[2]


def padding_of(attributes: dict[str, Any], pads: list[int], over: int, count: int) -> Any:
    """Return the padding over time as Conv1D has it."""
    auto = attributes.get("auto_pad", "NOTSET")
    if auto == "SAME_UPPER":
        return "same"
    if auto not in ("NOTSET", "VALID", ""):
        raise Refused(f"expected auto_pad NOTSET, VALID or SAME_UPPER, found {auto}")
    if auto == "VALID":
        return "valid"
    if any(steps for n, steps in enumerate(pads) if n % count != over) or min(pads) < 0:
        raise Refused(f"expected pads over time alone, found {pads}")
    both = (pads[over], pads[over + count])
    return "valid" if both == (0, 0) else both


def reduce(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a mean or a maximum over all of time."""
    x = reader.flowing(values[0])
    if node.op_type.startswith("Global"):
        axes, keep = list(range(2, len(x.axes))), True
        if not x.has("BF" + "".join(x.axes[2:])):
            raise Refused(f"expected axes B F T, found {' '.join(x.axes)}")
    else:
        found = axes_of(attributes, values)
        axes = [] if found is None else [x.at(axis) for axis in found]
        keep = bool(attributes.get("keepdims", 1))
    if [x.axes[axis] for axis in axes if x.axes[axis] != "1"] != ["T"]:
        raise Refused(f"expected to go over time, found axes {axes} of {' '.join(x.axes)}")
    steps_apart(reader)
    wire = reader.add(label(node), GlobalPool("max" if "Max" in node.op_type else "mean"), x.wire)
    left = [("1" if keep else "") if n in axes else axis for n, axis in enumerate(x.axes)]
    return [replace(x, wire=wire, axes=tuple(axis for axis in left if axis), steps=None)]


# ── number by number ────────────────────────────────────────────────────────────────────────────────────────────────


def by_features(x: Flowing, value: Array) -> Array | None:
    """Return a constant as one number a feature, or one in all `[1]`; None where it goes along other axes."""
    if value.ndim > len(x.axes):
        return None
    if value.size == 1:
        return value.reshape(1)
    if "D" in x.axes or "F" not in x.axes:
        return None
    at = x.axes.index("F") - len(x.axes)
    if value.ndim < -at or value.shape[at] != value.size or x.width not in (None, value.size):
        return None
    return value.reshape(-1)


def arithmetic(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an Add, Sub, Mul, Div, Max or Mean of values that flow, or of one and a constant."""
    name = node.op_type
    constants = [isinstance(value, (np.ndarray, Spread)) for value in values]
    if not any(constants):
        return merged(reader, node, values)
    if len(values) != 2 or name not in ("Add", "Sub", "Mul", "Div"):
        raise Refused("expected values that flow, found a constant")
    x = reader.flowing(values[constants.index(False)])
    constant = floats(reader, values[constants.index(True)], "the other")
    numbers = by_features(x, constant)
    if numbers is None:
        raise Refused(f"expected one number, or one a feature, found {constant.shape} with axes {' '.join(x.axes)}")
    first = constants[0]
    if name == "Div" and first:
        raise Refused("expected a constant as the divisor")
    behind = reader.last(x.wire)
    if name == "Add" and behind is not None and isinstance(behind[1], (Dense, Conv1D)):
        made = behind[1]
        if made.bias is None and made.activation == "linear" and numbers.dtype == made.kernel.dtype:
            width = made.kernel.shape[-1]
            bias = np.ascontiguousarray(np.broadcast_to(numbers, (width,)))
            reader.replace(behind[0], replace(made, bias=bias))
            return [x]
    if behind is not None and isinstance(behind[1], Scale) and numbers.size == len(behind[1].scale) and not first:
        scale, shift = behind[1].scale, behind[1].shift
        if name == "Add" and not shift.any() and numbers.dtype == scale.dtype:  # x·scale, and now + shift
            reader.replace(behind[0], Scale(scale, numbers))
            return [x]
        if name == "Div" and (scale == 1.0).all() and numbers.all() and numbers.dtype == scale.dtype:
            reader.replace(behind[0], Standardise(-shift, numbers))
            return [x]
    one, zero = np.ones_like(numbers), np.zeros_like(numbers)
    with np.errstate(all="ignore"):
        scale, shift = {
            "Add": (one, numbers),
            "Sub": (-one, numbers) if first else (one, -numbers),
            "Mul": (numbers, zero),
            "Div": (one / numbers, zero),
        }[name]
    if x.width is None and numbers.size == 1:
        return [replace(x, wire=reader.add(label(node), Activation(f"affine({scale[0]!s}, {shift[0]!s})"), x.wire))]
    width = x.width or numbers.size
    reader.budget.take(width)
    scale, shift = (np.ascontiguousarray(np.broadcast_to(a, (width,))) for a in (scale, shift))
    return [replace(x, wire=reader.add(label(node), Scale(scale, shift), x.wire))]


def merged(reader: Reader, node: Any, values: list[Any]) -> list[Any]:
    """Read an operator that takes several values together, number by number."""
    flows = [reader.flowing(value) for value in values]
    if node.op_type not in MERGES or len({flow.axes for flow in flows}) != 1:
        raise Refused(f"expected values with the same axes, found {', '.join(' '.join(f.axes) for f in flows)}")
    if len({flow.width for flow in flows}) != 1:
        raise Refused(f"expected values of one width, found {[flow.width for flow in flows]}")
    if len(flows) == 1:
        return [flows[0]]
    wire = reader.add(label(node), Merge(MERGES[node.op_type]), *(flow.wire for flow in flows))
    return [replace(flows[0], wire=wire)]


HANDLERS: dict[str, Handler] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": conv,
    "GlobalAveragePool": reduce,
    "GlobalMaxPool": reduce,
    "ReduceMax": reduce,
    "Max": arithmetic,
    "Mean": arithmetic,
}
