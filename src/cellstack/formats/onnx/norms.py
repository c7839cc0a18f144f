"""ONNX's normalisations, as one operator or decomposed into means and squares, and lookups in tables of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx import attention, grids
from cellstack.formats.onnx.activations import power
from cellstack.formats.onnx.attributes import axes_of
from cellstack.formats.onnx.cells import decimal
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.graph import Handler, Reader, Refused, floats, steps_apart
from cellstack.formats.onnx.ops import arithmetic, features_last
from cellstack.formats.onnx.ops import reduce as over_time
from cellstack.formats.onnx.values import Flowing, Grouped, Moment, Squares
from cellstack.nodes import Embedding, GroupNorm, LayerNorm, Magnitude, Merge, Scale

NEXT = {  # transitions between the moments of a decomposed LayerNorm, by operator; `x` is the input
    ("Sub", "x", "mean"): "centred",
    ("Pow", "centred", 2.0): "squares",
    ("Mul", "centred", "centred"): "squares",
    ("ReduceMean", "squares"): "variance",
    ("Sqrt", "variance"): "deviation",
    ("Pow", "variance", 0.5): "deviation",
    ("Pow", "variance", -0.5): "inverse",
    ("Reciprocal", "deviation"): "inverse",
    ("Div", 1.0, "deviation"): "inverse",
    ("Div", "centred", "deviation"): "normed",
    ("Mul", "centred", "inverse"): "normed",
    ("Mul", "inverse", "centred"): "normed",
}


def moment(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> Any:
    """Return an operator's result on moments; None where it isn't a step of a layer norm."""
    moments = [value for value in values if isinstance(value, Moment)]
    if not moments:
        return None
    first = moments[0]
    if any(value.of != first.of for value in moments):
        return None
    epsilon = max(value.epsilon for value in moments)
    if node.op_type == "ReduceMean" and not _features(first.of, attributes, values):
        return None
    key: list[Any] = [node.op_type]
    for value in values[:1] if node.op_type == "ReduceMean" else values:
        number = _number(value, len(first.of.axes))
        key.append(value.what if isinstance(value, Moment) else "x" if _is(value, first.of) else number)
    number = next((entry for entry in key[1:] if isinstance(entry, float)), None)
    if node.op_type == "Add" and first.what == "variance" and number is not None and not first.epsilon:
        return replace(first, epsilon=number)
    what = NEXT.get(tuple(key))
    if what == "normed":
        if epsilon <= 0.0:
            raise Refused("epsilon, added to the variance, must be above 0")
        return reader.put(node, LayerNorm(None, None, epsilon), first.of)
    return None if what is None else Moment(first.of, what, epsilon)


def squares(reader: Reader, node: Any, values: list[Any]) -> Any:
    """Return an operator's result on squares, as in complex magnitudes; None where it isn't part of one."""
    first = values[0]
    if isinstance(first, Flowing) and "F" in first.axes and "D" not in first.axes:
        twice = node.op_type == "Mul" and _is(values[1], first)
        if twice or (node.op_type == "Pow" and _number(values[1], len(first.axes)) == 2.0):
            return Squares((first,), label(node))
    parts_of_sum = [value for value in values if isinstance(value, Squares)]
    if not parts_of_sum or len({flow.axes for value in parts_of_sum for flow in value.parts}) != 1:
        return None
    one = parts_of_sum[0]
    number = next((n for value in values if (n := _number(value, len(one.parts[0].axes))) is not None), None)
    if node.op_type == "Add" and len(parts_of_sum) == 2 and sum(len(value.parts) for value in parts_of_sum) == 2:
        parts = (*one.parts, *parts_of_sum[1].parts)
        return Squares(parts, label(node), one.epsilon + parts_of_sum[1].epsilon) if _one_width(parts) else None
    if node.op_type == "Add" and len(values) == 2 and number is not None and number >= 0 and not one.epsilon:
        return replace(one, name=label(node), epsilon=number)
    if node.op_type != "Sqrt" and not (node.op_type == "Pow" and values[0] is one and number == 0.5):
        return None
    if len(one.parts) != 2:
        return None
    both = reader.put(f"{label(node)}.parts", Merge("concat"), *one.parts)
    return reader.put(node, Magnitude(one.epsilon), both)


def _one_width(parts: tuple[Flowing, ...]) -> bool:
    return parts[0].width is not None and len({part.width for part in parts}) == 1


def _is(value: Any, flow: Flowing) -> bool:
    return isinstance(value, Flowing) and value == flow


def _number(value: Any, axes: int) -> float | None:
    """Return a constant as a number; None where it isn't one, or has more axes than the value it is combined with."""
    value = numbers(value)
    fits = isinstance(value, np.ndarray) and value.size == 1 and value.ndim <= axes
    return decimal(float(value.reshape(()))) if fits else None


def _features(x: Flowing, attributes: dict[str, Any], values: list[Any]) -> bool:
    """Whether a reduction runs over the features, the last axis, only, and keeps it."""
    axes = axes_of(attributes, values)
    last = x.axes[-1:] == ("F",) and "D" not in x.axes
    return (
        last
        and bool(attributes.get("keepdims", 1))
        and axes is not None
        and [x.at(n) for n in axes] == [len(x.axes) - 1]
    )


def decomposed(usual: Handler | None) -> Handler:
    """Return a handler that reads an operator as a step of a layer norm where it is one, else with `usual`."""

    def read(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
        made = attention.scaled(node, values)
        if made is None:
            made = moment(reader, node, attributes, values)
        if made is None:
            made = squares(reader, node, values)
        if made is not None:
            return [made]
        if usual is None or any(isinstance(value, Moment) and value.what != "mean" for value in values):
            raise Refused("the operator isn't supported")
        return usual(reader, node, attributes, values)

    return read


def mean(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a ReduceMean: over time, or over the features as a layer norm begins."""
    x = reader.flowing(values[0])
    if _features(x, attributes, values):
        return [Moment(x, "mean")]
    return over_time(reader, node, attributes, values)


def batch_norm(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a BatchNormalization at inference."""
    x = reader.flowing(values[0])
    gain, bias, mean, variance = (floats(value, "its parameters") for value in values[1:5])
    if attributes.get("training_mode", 0) or not attributes.get("spatial", 1):
        raise Refused("training mode and spatial=0 aren't supported")
    made = Scale.of_statistics(mean, variance, float(attributes.get("epsilon", 1e-5)), gain, bias)
    if x.parts or x.axes[1:2] == ("1",):  # one number per channel, for every step and feature of it
        shape = (1, -1, *(1,) * (len(x.axes) - 2))
        x = grids.as_grid(x)
        scale, shift = (grids.by_parts(x, array.reshape(shape)) for array in (made.scale, made.shift))
        if scale is None or shift is None:
            raise Refused(f"expected the channels to be axis 1, found axes {' '.join(x.axes)}")
        reader.builder.make(scale.size)
        return [grids.as_features(reader.put(node, Scale(scale, shift), x))]
    if len(x.axes) < 2 or x.axes[1] != "F" or "D" in x.axes:
        raise Refused(f"expected the feature axis to be axis 1, found axes {' '.join(x.axes)}")
    return [reader.put(node, made, x)]


def layer_norm(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a LayerNormalization over the features."""
    x = reader.flowing(values[0])
    gain = floats(values[1], "the gain").reshape(-1)
    bias = floats(values[2], "the bias").reshape(-1) if len(values) > 2 and values[2] is not None else None
    epsilon = decimal(attributes.get("epsilon", 1e-5))
    if x.parts:
        return [_norm_of_parts(reader, node, x, x.axes[x.at(attributes.get("axis", -1)) :], gain, bias, epsilon)]
    features_last(x)
    if x.at(attributes.get("axis", -1)) != len(x.axes) - 1:
        raise Refused("only normalisation over the features is supported")
    return [reader.put(node, LayerNorm(gain, bias, epsilon), x)]


def _norm_of_parts(
    reader: Reader, node: Any, x: Flowing, over: Sequence[str], gain: Array, bias: Array | None, epsilon: float
) -> Flowing:
    """Return a value normalised over the parts `over`, separately for each entry of its other parts."""
    sizes = dict(x.parts)
    if any(axis not in sizes and axis != "1" for axis in over):
        raise Refused(f"only normalisation over features is supported, found axes {' '.join(over)}")
    within = [axis for axis in over if axis in sizes]
    rest = [name for name in sizes if name not in within]
    x = grids.arranged(reader, x, [*rest, *within])
    groups = prod(sizes[name] for name in rest)
    shift = None if bias is None else np.tile(bias, groups)
    return reader.put(node, GroupNorm(groups, np.tile(gain, groups), shift, epsilon, over_time=False), x)


def instance_norm(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an InstanceNormalization: over time and every feature axis after the channels."""
    grouped = values[0] if isinstance(values[0], Grouped) else None
    x = grids.as_grid(reader.flowing(values[0] if grouped is None else grouped.of))
    gain, bias = (floats(value, what) for value, what in zip(values[1:3], ("the gain", "the bias"), strict=True))
    sizes = dict(x.parts)
    channel = x.axes[1] if len(x.axes) > 2 else ""
    if not channel or x.axes[:1] not in {("B",), ("1",)} or channel not in (*sizes, "1") or "N" in x.axes:
        raise Refused(f"expected the axes batch, channels and at least one more, found {' '.join(x.axes)}")
    over_time = "T" in x.axes
    if over_time:
        steps_apart(reader)
    groups = sizes.get(channel, 1) if grouped is None else grouped.groups
    if channel in sizes:  # so that a group of channels is a block of features
        x = grids.outermost(reader, x, channel)
    each = prod(sizes.values()) // groups
    if len(gain) != groups:
        raise Refused(f"expected a gain of {groups} channels, found {len(gain)}")
    reader.builder.make(2 * groups * each)
    gain, bias = (np.repeat(array, each) for array in (gain, bias))
    plain = (gain == 1).all() and not bias.any()
    arrays = (None, None) if plain else (gain, bias)
    made = GroupNorm(groups, *arrays, decimal(attributes.get("epsilon", 1e-5)), over_time)
    y = grids.as_features(reader.put(node, made, x))
    return [y if grouped is None else Grouped(y, groups)]


def embedding(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gather of rows of a constant table by ids from the data."""
    table = values[0]
    if isinstance(table, np.ndarray) and table.dtype.name in ("int8", "uint8"):  # a DequantizeLinear comes after it
        table = table.astype(np.float32)
    table, ids = floats(table, "the table"), reader.flowing(values[1], "the ids")
    if table.ndim != 2 or attributes.get("axis", 0) not in (0, -2) or "F" in ids.axes:
        found = f"{table.shape} and axes {' '.join(ids.axes)}"
        raise Refused(f"expected a table [N, D] and ids without a feature axis, found {found}")
    return [reader.put(node, Embedding(table), ids, axes=(*ids.axes, "F"))]


HANDLERS: dict[str, Handler] = {
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "ReduceMean": decomposed(mean),
    **{name: decomposed(arithmetic) for name in ("Add", "Sub", "Mul", "Div")},
    **{name: decomposed(power) for name in ("Pow", "Sqrt", "Reciprocal")},
}
