"""ONNX's operators that move numbers: most change labels of axes alone, others become nodes that cut and flatten."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import axes_of, place, slices, split_sizes, whole
from cellstack.formats.onnx.graph import Handler, Reader, Refused, Turned
from cellstack.formats.onnx.norms import embedding
from cellstack.formats.onnx.ops import steps_apart
from cellstack.formats.onnx.values import Ends, Flowing, Symbols, reshaped
from cellstack.nodes import Flatten, GlobalPool, Merge, Permute, Repeat, Select
from cellstack.nodes import Reshape as ReshapeNode


def same(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read what changes nothing: Identity, Dropout at inference, a Cast from floats to floats or of ids."""
    training = values[2] if node.op_type == "Dropout" and len(values) > 2 else None
    if training is not None and (not isinstance(training, np.ndarray) or training.any()):
        raise Refused("expected the form of inference")
    if node.op_type == "Cast":
        ids, to = "F" not in reader.flowing(values[0]).axes, attributes.get("to")
        if to not in ((6, 7, 12, 13, 5, 2, 3, 4) if ids else (1, 11)):
            raise Refused(f"expected a cast from numbers to their like, found one to type {to}")
    return [values[0]] if isinstance(values[0], Flowing) else [reader.flowing(values[0])]


def shape(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Shape: lengths as far as they are known."""
    value = values[0]
    if isinstance(value, Ends):
        raise Refused("expected the shape of data that flows, found that of a state")
    lengths = np.empty(len(value.axes), object)
    for n, length in enumerate(value.lengths):
        lengths[n] = length
    return [Symbols(lengths[attributes.get("start", 0) : attributes.get("end")])]


def transpose(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Transpose: the labels in another order."""
    value = values[0]
    count = len(value.axes) if isinstance(value, (Flowing, Ends)) else 0
    perm = whole(attributes.get("perm", list(range(count))[::-1]))
    if sorted(perm) != list(range(count)):
        raise Refused(f"expected the order of {count} axes, found {perm}")
    axes = tuple(value.axes[n] for n in perm)
    if isinstance(value, Flowing):
        return [replace(value, axes=axes)]
    stacked = [n for n, axis in enumerate(value.axes) if axis == "S"]
    order = [stacked.index(n) for n in perm if value.axes[n] == "S"]
    return [Ends(axes, value.refs.transpose(order))]


def squeeze(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Squeeze: axes of length 1 go; one of time too, where one step was taken out of it."""
    value, axes = values[0], axes_of(attributes, values)
    if isinstance(value, Ends):
        axes = [n for n, axis in enumerate(value.axes) if axis == "S"] if axes is None else axes
        axes = sorted(place(axis, len(value.axes)) for axis in axes)
        for axis in reversed(axes):
            value = _drop(value, axis)
        return [value]
    x = value if isinstance(value, Flowing) else reader.flowing(value)
    chosen = [n for n, axis in enumerate(x.axes) if axis == "1"] if axes is None else [x.at(axis) for axis in axes]
    wire, steps = x.wire, x.steps
    for axis in chosen:
        if x.axes[axis] == "F" and x.width == 1 and "T" in x.axes:
            wire = reader.add(label(node), Flatten(), wire)
        elif x.axes[axis] == "F" and x.width == 1:
            pass  # one number a row, which a Network has as `[B, 1]`
        elif x.axes[axis] == "T" and x.steps == 1:
            wire, steps = reader.add(label(node), GlobalPool("last"), wire), None
        elif x.axes[axis] != "1":
            raise Refused(f"expected axes of length 1, found {x.axes[axis]} of {' '.join(x.axes)}")
    left = tuple(a for n, a in enumerate(x.axes) if n not in chosen)
    return [replace(x, wire=wire, steps=steps, axes=left, width=x.width if "F" in left else None)]


def _drop(value: Ends, axis: int) -> Ends:
    stacked = value.axes[:axis].count("S")
    if value.axes[axis] != "S" or value.refs.shape[stacked] != 1:
        raise Refused(f"expected an axis of length 1, found axis {axis} of a state, {' '.join(value.axes)}")
    return Ends(
        (*value.axes[:axis], *value.axes[axis + 1 :]),
        value.refs.reshape([n for axis, n in enumerate(value.refs.shape) if axis != stacked]),
    )


def unsqueeze(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read an Unsqueeze: axes of length 1 come."""
    value, axes = values[0], axes_of(attributes, values)
    if axes is None:
        raise Refused("expected constant axes")
    count = len(value.axes) + len(axes) if isinstance(value, (Flowing, Ends)) else 0
    chosen = {place(axis, count) for axis in axes}
    if isinstance(value, Ends):
        old, labels, refs = iter(value.axes), [], value.refs
        for n in range(count):
            labels.append("S" if n in chosen else next(old))
            if n in chosen:
                refs = np.expand_dims(refs, labels[:-1].count("S"))
        return [Ends(tuple(labels), refs)]
    x = value if isinstance(value, Flowing) else reader.flowing(value)
    old = iter(x.axes)
    axes_now = tuple("1" if n in chosen else next(old) for n in range(count))
    if "F" not in x.axes and len(chosen) == 1 and "T" in x.axes:  # numbers without features: one feature each
        wire = reader.add(label(node), ReshapeNode((-1, 1)), x.wire)
        return [replace(x, wire=wire, width=1, axes=tuple("F" if a == "1" else a for a in axes_now))]
    return [replace(x, axes=axes_now)]


def reshape(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Reshape: axes of length 1 come and go, two become one, or all after the batch."""
    x = reader.flowing(values[0])
    target = values[1]
    if isinstance(target, Symbols):
        entries = list(target.array.reshape(-1))
    elif isinstance(target, np.ndarray):
        entries = whole(target)
    else:
        raise Refused("expected a shape that is known")
    axes = reshaped(x, entries, bool(attributes.get("allowzero", 0)))
    whole_shape = entries[1:] if all(isinstance(entry, int) for entry in entries[1:]) else []
    plain = x.axes in (("B", "T", "F"), ("B", "F")) and len(whole_shape) in (1, 2)
    row = [x.length(a) for a in x.axes[1:]]
    left = -1 not in whole_shape and all(isinstance(n, int) for n in row) and prod(row) == prod(whole_shape)  # for B
    if (
        axes is None
        and plain
        and 0 not in whole_shape
        and (entries[0] in (0, x.length("B")) or (entries[0] == -1 and left))
    ):
        wire = reader.add(label(node), ReshapeNode(tuple(whole_shape)), x.wire)
        last, first = whole_shape[-1], whole_shape[0] if len(whole_shape) == 2 else None
        width, steps = (None if n in (-1, None) else n for n in (last, first))
        axes = ("B", "T", "F") if len(whole_shape) == 2 else ("B", "F")
        return [replace(x, wire=wire, axes=axes, width=width, steps=steps)]
    if axes is None:
        raise Refused(f"expected a shape that keeps batch, time and features apart, found {_shown(entries)}")
    if "*" in axes:
        return [flattened(reader, node, x, axes)]
    return [replace(x, axes=axes)]


def _shown(entries: list[Any]) -> str:
    return "[" + ", ".join(str(e) if isinstance(e, int) else "·".join(e.labels) for e in entries) + "]"


def flatten(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Flatten: all axes after the batch become one."""
    x = reader.flowing(values[0])
    axis = attributes.get("axis", 1) % max(1, len(x.axes))
    ahead = [a for a in x.axes[:axis] if a != "1"]
    if ahead != ["B"]:
        raise Refused(f"expected to keep the batch, found axis {axis} of {' '.join(x.axes)}")
    return [flattened(reader, node, x, ("B", "*"))]


def flattened(reader: Reader, node: Any, x: Flowing, axes: tuple[str, ...]) -> Flowing:
    """Return a value with all axes after the batch in one, in the order in which they stand."""
    labels = [a for a in x.axes if a != "1"][1:]
    final = tuple("F" if a == "*" else a for a in axes)
    if labels in (["F"], ["D", "F"]):
        return replace(x, axes=final)
    if "T" in labels:
        steps_apart(reader)
    wire = x.wire
    if labels == ["F", "T"]:
        wire = reader.add(f"{label(node)}.turned", Permute((2, 1)), wire)
    elif labels not in (["T", "F"], ["T", "D", "F"]):
        raise Refused(f"expected time and features, found axes {' '.join(x.axes)}")
    width = None if x.width is None or x.steps is None else x.width * x.steps
    return replace(x, wire=reader.add(label(node), Flatten(), wire), axes=final, width=width, steps=None)


# ── cutting and joining ─────────────────────────────────────────────────────────────────────────────────────────────


def cut(reader: Reader, node: Any, x: Flowing, axis: int, taken: slice) -> Flowing:
    """Return part of an axis of a value."""
    which = x.axes[axis]
    length = x.length(which)
    known = length if isinstance(length, int) else None
    everything = taken.step in (None, 1) and taken.start in (None, 0)
    if everything and (taken.stop is None or taken.stop >= (known or 2**31 - 1)):
        return x
    if which == "1" and len(range(*taken.indices(1))) == 1:
        return x
    start, stop = taken.start, taken.stop
    if stop is not None and stop >= 2**31 - 1:
        stop = None
    if start is not None and (start >= 2**31 - 1 if (taken.step or 1) < 0 else start == 0):
        start = None
    if which == "T":
        if start not in (-1, None) or taken.step not in (None, 1) or stop is not None:
            steps_apart(reader)
        made = Select(start, stop, taken.step or 1)
        steps, _ = made.check(label(node), (x.steps, None))
        if (start, stop, taken.step or 1) in ((-1, None, 1), (None, 1, 1)):
            steps = 1
        return replace(x, wire=reader.add(label(node), made, x.wire), steps=steps)
    if which == "D":
        halves = range(2)[taken]
        if len(halves) != 1 or x.width is None:
            raise Refused("expected one direction of the two")
        half = x.width // 2
        wire = reader.add(label(node), Select(halves[0] * half, (halves[0] + 1) * half, axis=-1), x.wire)
        return replace(x, wire=wire, width=half, axes=tuple("1" if a == "D" else a for a in x.axes))
    if which != "F" or "D" in x.axes:
        raise Refused(f"expected a slice of time or of the features, found axis {which} of {' '.join(x.axes)}")
    made = Select(start, stop, taken.step or 1, axis=-1)
    (width,) = made.check(label(node), (x.width,))
    return replace(x, wire=reader.add(label(node), made, x.wire), width=width)


def _cut_ends(value: Ends, axis: int, taken: slice) -> Ends:
    if value.axes[axis] != "S":
        size = range(2**31)[taken]
        if len(size) == 2**31:
            return value
        raise Refused(f"expected a slice of the stacked states, found axis {value.axes[axis]}")
    place_in = (slice(None),) * value.axes[:axis].count("S") + (taken,)
    return Ends(value.axes, value.refs[place_in])


def slice_(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Slice."""
    value = values[0] if isinstance(values[0], (Flowing, Ends)) else reader.flowing(values[0])
    constants = [v if v is None or isinstance(v, np.ndarray) else None for v in values[1:]]
    taken = slices(attributes, [value, *constants], len(value.axes))
    if taken is None:
        raise Refused("expected starts and ends that are constant")
    for axis, part in enumerate(taken):
        if part != slice(None):
            value = _cut_ends(value, axis, part) if isinstance(value, Ends) else cut(reader, node, value, axis, part)
    return [value]


def gather(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gather: of a table's rows by ids, or of one entry of an axis."""
    value, index = values
    if isinstance(value, np.ndarray):
        return embedding(reader, node, attributes, values)
    if not isinstance(index, np.ndarray) or index.size != 1:
        raise Refused("expected one index that is constant")
    number = int(index.reshape(()))
    value = value if isinstance(value, (Flowing, Ends)) else reader.flowing(value)
    axis = place(attributes.get("axis", 0), len(value.axes))
    part = slice(number, number + 1 or None)
    if isinstance(value, Ends):
        found = _cut_ends(value, axis, part)
        return [found if index.ndim else _drop(found, axis)]
    if value.axes[axis] not in ("T", "D", "1"):
        raise Turned(f"expected one step or one direction, found axis {value.axes[axis]} of {' '.join(value.axes)}")
    if value.axes[axis] != "T" or index.ndim:
        found = cut(reader, node, value, axis, part)
        dropped = () if index.ndim else (axis,)
        return [replace(found, axes=tuple(a for n, a in enumerate(found.axes) if n not in dropped))]
    wire = value.wire
    if number not in (-1, (value.steps or 0) - 1):
        wire = cut(reader, node, value, axis, part).wire
    axes = tuple(a for n, a in enumerate(value.axes) if n != axis)
    return [replace(value, wire=reader.add(f"{label(node)}", GlobalPool("last"), wire), axes=axes, steps=None)]


def split(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Split: a slice for each output."""
    value = values[0] if isinstance(values[0], (Flowing, Ends)) else reader.flowing(values[0])
    axis = place(attributes.get("axis", 0), len(value.axes))
    if isinstance(value, Ends):
        length = value.refs.shape[value.axes[:axis].count("S")] if value.axes[axis] == "S" else None
    else:
        length = value.length(value.axes[axis])
    if not isinstance(length, int):
        raise Refused(f"expected an axis of a length that is known, found {value.axes[axis]}")
    made, start = [], 0
    for name, size in zip(node.output, split_sizes(attributes, values, length, len(node.output)), strict=True):
        part = slice(start, start + size)
        start += size
        if not reader.uses.get(name):
            made.append(None)
        elif isinstance(value, Ends):
            made.append(_cut_ends(value, axis, part))
        else:
            made.append(cut(reader, node, value, axis, part))
    return made


def concat(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Concat: of states, of features, or of steps."""
    if all(isinstance(value, Ends) for value in values) and len({value.axes for value in values}) == 1:
        axes = values[0].axes
        axis = place(attributes["axis"], len(axes))
        if axes[axis] == "S":
            return [Ends(axes, np.concatenate([v.refs for v in values], axis=axes[:axis].count("S")))]
    flows = [reader.flowing(value) for value in values]
    axes = flows[0].axes
    axis = place(attributes["axis"], len(axes))
    if any(flow.axes != axes for flow in flows) or axes[axis] not in ("F", "T") or "D" in axes:
        found = ", ".join(" ".join(flow.axes) for flow in flows)
        raise Refused(f"expected values to be joined along features or time, found axis {axis} of {found}")
    if len(flows) == 1:
        return [flows[0]]
    if axes[axis] == "T":
        steps_apart(reader)
        steps = [flow.steps for flow in flows]
        total = None if None in steps else sum(s for s in steps if s is not None)
        wire = reader.add(label(node), Merge("concat", axis=1), *(flow.wire for flow in flows))
        return [replace(flows[0], wire=wire, steps=total)]
    widths = [flow.width for flow in flows]
    width = None if None in widths else sum(w for w in widths if w is not None)
    wire = reader.add(label(node), Merge("concat", axis=-1), *(flow.wire for flow in flows))
    return [replace(flows[0], wire=wire, width=width)]


def pad(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Pad with zeros over time, which the convolution after it takes up."""
    x = reader.flowing(values[0])
    pads = attributes.get("pads", values[1] if len(values) > 1 else None)
    value = attributes.get("value", values[2] if len(values) > 2 and values[2] is not None else 0.0)
    if pads is None or not isinstance(value, (float, np.ndarray)) or np.any(value):
        raise Refused("expected constant pads of zeros")
    if attributes.get("mode", "constant") != "constant" or (len(values) > 3 and values[3] is not None):
        raise Refused("expected constant pads of zeros along all axes")
    pads, count = whole(pads), len(x.axes)
    both = {x.axes[n]: (pads[n], pads[n + count]) for n in range(count)} if len(pads) == 2 * count else {}
    if not both or any(steps != (0, 0) for axis, steps in both.items() if axis != "T") or min(pads) < 0:
        raise Refused(f"expected pads over time alone, found {pads} of axes {' '.join(x.axes)}")
    return [replace(x, pad=both.get("T", (0, 0)))]


def expand(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Tile or an Expand that repeats a vector at every step."""
    x = reader.flowing(values[0])
    numbers = whole(values[1]) if isinstance(values[1], np.ndarray) else []
    if x.axes != ("B", "1", "F") or len(numbers) != 3:
        raise Refused(f"expected a vector to be repeated over time, found axes {' '.join(x.axes)}")
    wire = reader.add(label(node), Repeat(numbers[1]), x.wire)
    if numbers[0] != 1 or numbers[2] not in (1, x.width if node.op_type == "Expand" else 1):
        raise Refused("expected a vector to be repeated over time alone")
    return [replace(x, wire=wire, axes=("B", "T", "F"), steps=numbers[1])]


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("Identity", "Dropout", "Cast"), same),
    "Shape": shape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Reshape": reshape,
    "Flatten": flatten,
    "Slice": slice_,
    "Gather": gather,
    "Split": split,
    "Concat": concat,
    "Pad": pad,
    "Tile": expand,
    "Expand": expand,
}
