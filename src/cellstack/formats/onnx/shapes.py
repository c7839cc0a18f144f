"""ONNX's operators that change the shape of values: most only relabel axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.formats.onnx import grids
from cellstack.formats.onnx.attributes import order_of
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.graph import Handler, Reader, Refused, steps_apart
from cellstack.formats.onnx.values import (
    Dim,
    Filled,
    Flowing,
    Formula,
    Grouped,
    Lengths,
    States,
    Symbols,
    Unknown,
    entries_of,
    shown,
)
from cellstack.nodes import Flatten, GlobalPool, Permute, Reshape


def same(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an operator without effect: Identity, Dropout at inference, a Cast from floats to floats or of ids."""
    value, training = values[0], values[2] if node.op_type == "Dropout" and len(values) > 2 else None
    if training is not None and (not isinstance(training, np.ndarray) or training.any()):
        raise Refused("training mode isn't supported")
    if not isinstance(value, (States, Lengths)):
        value = reader.flowing(value)
    if node.op_type == "Cast":
        whole_numbers = isinstance(value, Lengths) or (isinstance(value, Flowing) and value.wire in reader.ids)
        if attributes.get("to") not in ((6, 7, 12, 13) if whole_numbers else (1, 11)):
            raise Refused(f"expected a cast from floats to floats, or of ids, found one to type {attributes.get('to')}")
    return [value]


def shape(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Shape: lengths, where known."""
    value = values[0]
    if isinstance(value, Filled):
        found = [Dim(("T",), of=value.length_of) if axis == "T" else value.of.length(axis) for axis in value.of.axes]
        value = value.of
    elif isinstance(value, States):
        if not value.counted:
            return [Unknown("the shape of a state is unknown", False)]
        sizes = iter(value.refs.shape)
        found = [next(sizes) if axis == "S" else Dim((axis,)) for axis in value.axes]
    else:
        value = reader.flowing(value)
        found = value.lengths
    lengths = np.empty(len(value.axes), object)
    for n, length in enumerate(found):
        lengths[n] = length
    return [Symbols(lengths[attributes.get("start", 0) : attributes.get("end")])]


def moving(reader: Reader, value: Any) -> Flowing | States:
    """Return a value whose axes can be moved and sliced; otherwise raise `Refused`."""
    return value if isinstance(value, (Flowing, States)) else reader.flowing(value)


def rearranged(value: States, order: Sequence[int | None]) -> States:
    """Return states with their axes in the notation of `order_of`."""
    stacked = [n for n, axis in enumerate(value.axes) if axis == "S"]
    gone = [n for n in range(len(value.axes)) if n not in order]
    for axis in gone:
        if axis not in stacked or value.refs.shape[stacked.index(axis)] != 1:
            raise Refused(f"expected an axis of length 1, found axis {axis} of states {' '.join(value.axes)}")
    kept = [n for n in order if n is None or n in stacked]
    refs = value.refs.transpose([stacked.index(n) for n in (*kept, *gone) if n is not None])
    lengths = iter(refs.shape)
    refs = refs.reshape([1 if n is None else next(lengths) for n in kept])
    return replace(value, axes=tuple("S" if n is None else value.axes[n] for n in order), refs=refs)


def transpose(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Transpose: reorders the labels."""
    value = moving(reader, values[0])
    order = order_of("Transpose", attributes, values[:1], [False for _ in value.axes])
    if isinstance(value, States):
        return [rearranged(value, order)]
    return [replace(value, axes=tuple(value.axes[n] for n in order if n is not None))]


def squeeze(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Squeeze: removes axes of length 1, and a time axis from which one step was selected."""
    x = moving(reader, values[0])
    if isinstance(x, States):
        return [rearranged(x, order_of("Squeeze", attributes, values, [axis == "S" for axis in x.axes]))]
    one_row = x.batch == 1  # a batch axis of length 1 may go: it comes back later, or the file omits it
    ones = [axis == "1" or (axis == "B" and one_row) for axis in x.axes]
    order, y = order_of("Squeeze", attributes, values, ones), x
    for n, axis in enumerate(x.axes):
        if n in order or ones[n] or dict(x.parts).get(axis) == 1:
            continue
        if axis == "F" and x.width == 1:  # a Network stores one number per row as `[B, 1]`
            y = reader.put(node, Flatten(), y) if "T" in x.axes else y
        elif axis == "T" and x.steps == 1:
            y = reader.put(node, GlobalPool("last"), y)
        else:
            raise Refused(f"expected axes of length 1, found {axis} of {' '.join(x.axes)}")
    return [grids.without(y, [n for n in range(len(x.axes)) if n not in order])]


def unsqueeze(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an Unsqueeze: adds axes of length 1."""
    x = moving(reader, values[0])
    order = order_of("Unsqueeze", attributes, values, [False for _ in x.axes])
    if isinstance(x, States):
        return [rearranged(x, order)]
    axes = tuple("1" if n is None else x.axes[n] for n in order)
    if "F" not in x.axes and "T" in x.axes and not x.parts and x.wire not in reader.ids:  # one feature each
        roles, chosen = reader.axes.roles_of(node.output[0]) or "", [n for n, old in enumerate(order) if old is None]
        found = [n for n in chosen if roles[n : n + 1] == "F"] or chosen
        if len(found) == 1:
            labels = tuple("F" if n == found[0] else axis for n, axis in enumerate(axes))
            if len(x.shape) == 2:  # one number per step, as a sequence
                return [replace(x, axes=labels)]
            return [reader.put(node, Reshape((-1, 1)), x, axes=labels)]
    return [replace(x, axes=axes)]


def reshape(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Reshape: adds and removes axes of length 1, or merges two axes or all after the batch."""
    entries = entries_of(values[1])
    if entries is None:
        raise Refused("the shape must be known")
    if any(isinstance(entry, Formula) for entry in entries):
        raise Refused("a length computed from the number of steps isn't supported")
    if isinstance(values[0], Grouped):
        if entries != values[0].of.lengths:
            raise Refused(f"expected the shape before the group normalisation, found {shown(entries)}")
        return [values[0].of]
    x = reader.flowing(values[0])
    if len(entries) == 3 and entries[0] in (0, *x.lengths[:1]) and entries[2] == -1:
        takers = {other.op_type for other in reader.scope.graph.node if node.output[0] in other.input}
        channels = x.length(x.axes[1]) if len(x.axes) > 2 else None
        if takers == {"InstanceNormalization"} and isinstance(channels, int) and channels % entries[1] == 0:
            return [Grouped(x, int(entries[1]))]
    keep_zero = bool(attributes.get("allowzero", 0))
    made = None if x.parts else grids.reshaped(reader, x, entries, keep_zero, split=False)
    whole_shape = entries[1:] if all(isinstance(entry, int) for entry in entries[1:]) else []
    plain = x.axes in (("B", "T", "F"), ("B", "F")) and len(whole_shape) in (1, 2)
    row = [x.length(a) for a in x.axes[1:]]
    left = -1 not in whole_shape and all(isinstance(n, int) for n in row) and prod(row) == prod(whole_shape)  # for B
    if (
        made is None
        and plain
        and 0 not in whole_shape
        and (entries[0] in (0, x.length("B")) or (entries[0] == -1 and left))
    ):
        return [reader.put(node, Reshape(tuple(whole_shape)), x, axes="BTF" if len(whole_shape) == 2 else "BF")]
    made = grids.reshaped(reader, x, entries, keep_zero) if made is None else made
    if made is None:
        raise Refused(f"the shape must keep batch, time and features separate, found {shown(entries)}")
    return [flattened(reader, node, x, made.axes) if "*" in made.axes else made]


def flatten(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Flatten: merges all axes after the batch."""
    x = reader.flowing(values[0])
    axis = attributes.get("axis", 1) % max(1, len(x.axes))
    ahead, behind = ("".join(a for a in part if a != "1") for part in (x.axes[:axis], x.axes[axis:]))
    if ahead and behind == "F" and len(ahead) == 1:  # two axes stay unchanged
        return [replace(x, axes=(ahead, "F"))]
    if (ahead, behind) == ("BT", "F"):  # rows of all steps
        return [replace(x, axes=("N", "F"))]
    if ahead not in ("B", "" if "B" not in x.axes else "B"):
        raise Refused(f"the batch axis must stay, found axis {axis} of {' '.join(x.axes)}")
    return [flattened(reader, node, x, (ahead or "1", "*"))]


def flattened(reader: Reader, node: Any, x: Flowing, axes: tuple[str, ...]) -> Flowing:
    """Return a value with all axes after the batch merged, in their order."""
    labels = [a for a in x.axes if a not in "1B"]
    final = tuple("F" if a == "*" else a for a in axes)
    if labels in (["F"], ["D", "F"]):
        return replace(x, axes=final)
    if x.parts and "T" not in labels:
        return replace(grids.in_order(reader, x), axes=final, parts=())
    if "T" in labels:
        steps_apart(reader)
    if labels == ["F", "T"]:
        x = reader.put(f"{label(node)}.transposed", Permute((2, 1)), x)
    elif labels not in (["T", "F"], ["T", "D", "F"]):
        raise Refused(f"expected time and features, found axes {' '.join(x.axes)}")
    return reader.put(node, Flatten(), x, axes=final)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("Identity", "Dropout", "Cast"), same),
    "Shape": shape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Reshape": reshape,
    "Flatten": flatten,
}
