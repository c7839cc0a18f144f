"""ONNX's operators that work number by number on one value, as activations; part of the node before where they can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import NAMES, decimal
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Spread
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Activation, Conv1D, Dense, Merge

PARAMETERS = {  # of the operators: attributes and what they are where not given
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
    "Elu": (("alpha", 1.0),),
    "LeakyRelu": (("alpha", 0.01),),
    "ThresholdedRelu": (("alpha", 1.0),),
}
CALLED = {name: ours for name, ours in NAMES.items() if name not in ("Affine", "ScaledTanh")}
SOFTMAX = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}
GATED = {"HardSwish": ("hard_sigmoid",), "Mish": ("softplus", "tanh")}  # x times what these make of it
SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}


def activation(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an activation that cells have too."""
    given = [attributes.get(key, usual) for key, usual in PARAMETERS.get(node.op_type, ())]
    numbers = ", ".join(repr(decimal(value)) for value in given)
    text = CALLED[node.op_type] + (f"({numbers})" if given else "")
    return as_activation(reader, node, values[0], text)


def as_activation(reader: Reader, node: Any, value: Any, text: str) -> list[Any]:
    """Return a value's activation."""
    x = reader.flowing(value)
    return [replace(x, wire=activated(reader, label(node), x, text))]


def activated(reader: Reader, name: str, x: Flowing, text: str) -> str:
    """Return the wire of a value's activation."""
    behind = reader.last(x.wire)
    if behind is not None and isinstance(behind[1], (Dense, Conv1D)) and behind[1].activation == "linear":
        reader.replace(behind[0], replace(behind[1], activation=text))
        return x.wire
    return reader.add(name, Activation(text), x.wire)


def softmax(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Softmax over the features, or its logarithm."""
    x = reader.flowing(values[0])
    axis = x.at(attributes.get("axis", 1 if reader.model.opset < 13 else -1))
    if x.axes[axis] != "F" or "D" in x.axes or (reader.model.opset < 13 and axis != len(x.axes) - 1):
        raise Refused(f"expected the axis of the features, found axis {axis} of {' '.join(x.axes)}")
    return as_activation(reader, node, x, SOFTMAX[node.op_type])


def gelu(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gelu."""
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    return as_activation(reader, node, values[0], kinds[attributes.get("approximate", "none")])


def selu(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Selu of the paper's constants."""
    if any(np.float32(attributes.get(name, usual)) != np.float32(usual) for name, usual in SELU.items()):
        raise Refused(f"expected alpha and gamma of the paper, found {attributes}")
    return as_activation(reader, node, values[0], "selu")


def gated(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read x times an activation of x."""
    x = reader.flowing(values[0])
    wire = x.wire
    for text in GATED[node.op_type]:
        wire = reader.add(f"{label(node)}.{text}", Activation(text), wire)
    return [replace(x, wire=reader.add(label(node), Merge("mul"), x.wire, wire))]


def swish(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Swish of alpha 1."""
    if attributes.get("alpha", 1.0) != 1.0:
        raise Refused(f"expected alpha 1, found {attributes['alpha']}")
    return as_activation(reader, node, values[0], "silu")


def clip(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Clip: from 0 up, from 0 to 6, or from -b to b and the like, which a hard sigmoid and a line make."""
    bounds = []
    for place, name, usual in ((1, "min", -np.inf), (2, "max", np.inf)):
        value = attributes.get(name, values[place] if len(values) > place and values[place] is not None else usual)
        value = value.array if isinstance(value, Spread) else value
        if not isinstance(value, (int, float, np.ndarray)) or np.size(value) != 1:
            raise Refused(f"expected {name} to be a constant")
        bounds.append(float(np.reshape(value, ())))
    low, high = bounds
    if (low, high) == (0.0, np.inf):
        return as_activation(reader, node, values[0], "relu")
    if (low, high) == (0.0, 6.0):
        return as_activation(reader, node, values[0], "relu6")
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise Refused(f"expected bounds from a number to a greater one, found {low} and {high}")
    span = high - low
    x = reader.flowing(values[0])
    wire = activated(reader, label(node), x, f"hard_sigmoid({1.0 / span!r}, {-low / span!r})")
    return [replace(x, wire=reader.add(f"{label(node)}.spread", Activation(f"affine({span!r}, {low!r})"), wire))]


def prelu(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a PRelu with one slope."""
    slope = values[1].array if isinstance(values[1], Spread) else values[1]
    if not isinstance(slope, np.ndarray) or not slope.size or (slope != slope.reshape(-1)[0]).any():
        raise Refused("expected one constant slope for all features")
    return as_activation(reader, node, values[0], f"leaky_relu({decimal(slope.reshape(-1)[0])!r})")


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(CALLED, activation),
    **dict.fromkeys(SOFTMAX, softmax),
    **dict.fromkeys(GATED, gated),
    "Clip": clip,
    "Exp": lambda reader, node, attributes, values: as_activation(reader, node, values[0], "exponential"),
    "Gelu": gelu,
    "PRelu": prelu,
    "Selu": selu,
    "Swish": swish,
}
