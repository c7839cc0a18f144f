"""ONNX's elementwise operators on one value, as activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.attention import Scores, as_steps
from cellstack.formats.onnx.cells import NAMES, OPERATORS, PARAMETERS, activation_text, decimal
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.graph import Handler, Reader, Refused, steps_apart
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Activation, Clip, Function, Merge, Power, TimeSoftmax
from cellstack.nodes.steps import FUNCTIONS

CALLED = tuple(name for name in NAMES if None not in PARAMETERS.get(name, ()))
GATED = {"HardSwish": ("hard_sigmoid",), "Mish": ("softplus", "tanh")}  # x times these activations of x
USUAL = {
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},  # as in the paper
    "Swish": {"alpha": 1.0},
}


def activation(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an activation that cells also support."""
    text = activation_text(node, attributes)
    assert text is not None  # CALLED holds no other operators
    return as_activation(reader, node, values[0], text)


def as_activation(reader: Reader, node: Any, value: Any, text: str) -> list[Any]:
    """Return a value's activation."""
    return [reader.put(node, Activation(text), reader.flowing(value))]


def softmax(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Softmax over the features, or its logarithm."""
    if isinstance(values[0], Scores) and node.op_type == "Softmax":
        if attributes.get("axis", -1) not in (-1, len(values[0].axes) - 1):
            raise Refused("expected a softmax over the steps of the keys")
        return [replace(values[0], softmax=True)]
    x = reader.flowing(values[0])
    axis = x.at(attributes.get("axis", 1 if reader.model.opset < 13 else -1))
    if x.axes[axis] == "T" and node.op_type == "Softmax" and reader.model.opset >= 13:
        steps_apart(reader)
        return [reader.put(node, TimeSoftmax(), as_steps(reader, x))]
    if x.axes[axis] != "F" or "D" in x.axes or (reader.model.opset < 13 and axis != len(x.axes) - 1):
        raise Refused(f"expected the feature axis, found axis {axis} of {' '.join(x.axes)}")
    return as_activation(reader, node, x, OPERATORS[node.op_type])


def gelu(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gelu."""
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    return as_activation(reader, node, values[0], kinds[attributes.get("approximate", "none")])


def plain(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an activation; its parameters, if any, must be the defaults."""
    for name, usual in USUAL.get(node.op_type, {}).items():
        if np.float32(attributes.get(name, usual)) != np.float32(usual):
            raise Refused(f"expected {name} {usual}, found {attributes[name]}")
    return as_activation(reader, node, values[0], OPERATORS[node.op_type])


def gated(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read x times an activation of x."""
    x = gate = reader.flowing(values[0])
    for text in GATED[node.op_type]:
        gate = reader.put(f"{label(node)}.{text}", Activation(text), gate)
    return [reader.put(node, Merge("mul"), x, gate)]


def clip(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Clip."""
    low, high = (*values[1:], None, None)[:2]
    low, high = attributes.get("min", low), attributes.get("max", high)
    return clipped(reader, node, reader.flowing(values[0]), low, high)


def clipped(reader: Reader, node: Any, x: Flowing, low: Any, high: Any) -> list[Any]:
    """Return a value within bounds, each a constant or None."""
    bounds = []
    for name, bound, usual in (("min", low, -np.inf), ("max", high, np.inf)):
        value = numbers(usual if bound is None else bound)
        if not isinstance(value, (int, float, np.ndarray)) or np.size(value) != 1 or np.isnan(value).any():
            raise Refused(f"expected {name} to be a constant")
        dtype = value.dtype if isinstance(value, np.ndarray) and value.dtype.kind == "f" else np.dtype(np.float32)
        number = float(np.reshape(value, ()))
        # exporters write an absent bound as the largest number
        bounds.append(usual if np.sign(usual) * number >= np.finfo(dtype).max else number)
    low, high = bounds
    if low > high or low == np.inf or high == -np.inf:
        raise Refused(f"expected min below max, found {low} and {high}")
    low, high = (bound if np.isfinite(bound) else None for bound in bounds)
    return [x] if low is high is None else [reader.put(node, Clip(low, high), x)]


def prelu(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a PRelu with one slope."""
    slope = numbers(values[1])
    if not isinstance(slope, np.ndarray) or not slope.size or (slope != slope.reshape(-1)[0]).any():
        raise Refused("expected one constant slope for all features")
    return as_activation(reader, node, values[0], f"leaky_relu({decimal(slope.reshape(-1)[0])!r})")


def function(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a function of each number."""
    return [reader.put(node, Function(node.op_type.lower()), reader.flowing(values[0]))]


def power(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Pow with a constant exponent, a Sqrt or a Reciprocal."""
    exponent = {"Sqrt": 0.5, "Reciprocal": -1.0}.get(node.op_type)
    if exponent is None:
        number = numbers(values[1])
        if not isinstance(number, np.ndarray) or number.size != 1:
            raise Refused("expected one constant exponent")
        exponent = decimal(float(number.reshape(())))
    return [reader.put(node, Power(exponent), reader.flowing(values[0]))]


HANDLERS: dict[str, Handler] = {
    **{name.title(): function for name in FUNCTIONS},
    "Neg": lambda reader, node, attributes, values: as_activation(reader, node, values[0], "affine(-1.0, 0.0)"),
    **dict.fromkeys(CALLED, activation),
    **dict.fromkeys(("Exp", "Selu", "Swish"), plain),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(GATED, gated),
    "Clip": clip,
    "Gelu": gelu,
    "PRelu": prelu,
}
