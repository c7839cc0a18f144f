"""ONNX's operators that select, join, pad or repeat entries along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx import grids
from cellstack.formats.onnx.attributes import LARGEST, pads_of, place, slices, split_sizes, whole, within
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Broadcast
from cellstack.formats.onnx.graph import Handler, Reader, Refused, steps_apart
from cellstack.formats.onnx.norms import embedding
from cellstack.formats.onnx.shapes import moving, rearranged, squeeze
from cellstack.formats.onnx.values import Counted, Dim, Filled, Flowing, Formula, States, Symbols, Vector, entries_of
from cellstack.nodes import GlobalPool, Merge, Pad, Repeat, RepeatLike, Select, Take


def cut(reader: Reader, node: Any, x: Flowing, axis: int, taken: slice) -> Flowing:
    """Return part of an axis of a value."""
    which = x.axes[axis]
    length = x.length(which)
    known = length if isinstance(length, int) else None
    if known is not None:
        taken = within(taken, known)
    everything = taken.step in (None, 1) and taken.start in (None, 0)
    if everything and (taken.stop is None or taken.stop >= (known or LARGEST)):
        return x
    if which in dict(x.parts):
        return grids.cut_part(reader, node, x, axis, range(dict(x.parts)[which])[taken])
    if which in ("1", "B") and known == 1 and len(range(1)[taken]) == 1:
        return x
    start, stop, step = taken.start, taken.stop, taken.step or 1
    if stop is not None and stop >= LARGEST and step > 0:
        stop = None
    if start is not None and (start >= LARGEST or start == -1 if step < 0 else start == 0):
        start = None
    if step < 0 and known is None and (start or 0) < 0:
        raise Refused(
            f"the length is unknown, so the slice must start at the last entry; found start {start} and step {step}"
        )
    if which == "T":
        if start not in (-1, None) or step != 1 or stop is not None:
            steps_apart(reader)
        y = reader.put(node, Select(start, stop, step), x)
        if (start, stop, step) in ((-1, None, 1), (None, 1, 1)):  # one step, regardless of the length
            reader.builder.shapes[y.wire] = (1, *y.shape[1:])
        return replace(y, shape=reader.shape(y.wire))
    if which == "D":
        directions = range(2)[taken]
        if len(directions) != 1 or x.width is None:
            raise Refused("the slice must select one of the two directions")
        width = x.width // 2
        half = Select(directions[0] * width, (directions[0] + 1) * width, axis=-1)
        return reader.put(node, half, x, axes=["1" if a == "D" else a for a in x.axes])
    if which != "F" or "D" in x.axes:
        raise Refused(f"only slices of time or of the features are supported, found axis {which} of {' '.join(x.axes)}")
    return reader.put(node, Select(start, stop, step, axis=-1), x)


def _cut_states(value: States, axis: int, taken: slice) -> States:
    """Return some of the states that a value holds along an axis."""
    backwards = (taken.step or 1) < 0
    if value.axes[axis] != "S":
        everything = taken.start in (None, 0) and (taken.stop is None or taken.stop >= LARGEST)
        if backwards or not everything or taken.step not in (None, 1):
            raise Refused(f"only slices along the stacked states are supported, found axis {value.axes[axis]}")
        return value
    ends = [end for end in (taken.start, taken.stop) if end is not None and end < LARGEST]
    if not value.counted and (backwards or any(end < 0 for end in ends)):
        raise Refused("the number of states is unknown, so indices from the end aren't supported")
    place_in = (slice(None),) * value.axes[:axis].count("S") + (taken,)
    whole_axis = not value.counted and len(ends) < 2
    return replace(value, refs=value.refs[place_in], counted=value.counted or not whole_axis)


def slice_(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Slice."""
    filled = values[0] if isinstance(values[0], Filled) else None
    value = filled.of if filled is not None else moving(reader, values[0])
    arguments = list(values[1:])
    if len(arguments) > 1 and isinstance(arguments[1], Symbols) and not isinstance(value, States):
        over = whole(arguments[2]) if len(arguments) > 2 and arguments[2] is not None else range(len(value.axes))
        of = value.timed_by if filled is None else filled.length_of
        arguments[1] = _ends(arguments[1], [value.axes[axis] for axis in over], of)
    constants = [v if v is None or isinstance(v, np.ndarray) else None for v in arguments]
    taken = slices(attributes, [value, *constants], len(value.axes))
    if taken is None:
        raise Refused("starts and ends must be constant")
    if filled is not None:
        if any(
            (part.start or 0, part.stop or LARGEST, part.step) != (0, LARGEST, 1)
            for part in taken
            if part != slice(None)
        ):
            raise Refused("steps of a sequence padded to fit strides can't be selected")
        return [filled]
    for axis, part in enumerate(taken):
        if part != slice(None):
            if isinstance(value, States):
                value = _cut_states(value, axis, part)
            else:
                value = cut(reader, node, value, axis, part)
    return [value]


def _ends(ends: Symbols, axes: Sequence[str], of: str) -> Any:
    """Return the ends of a Slice of the value `of`, those computed from its number of steps as negative numbers."""
    entries = list(ends.array.reshape(-1))
    for n, (end, axis) in enumerate(zip(entries, axes, strict=True)):
        formula = end.formula() if isinstance(end, Counted) else None
        if formula is None:
            continue
        behind = formula.constant(1) if formula.of == of and axis == "T" else None
        if behind is None or behind > 0:
            raise Refused("the end of a slice computed from another value's number of steps isn't supported")
        entries[n] = behind or LARGEST
    return np.array(entries, np.int64) if all(isinstance(end, (int, np.integer)) for end in entries) else ends


def gather(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Gather: rows of a table by ids, or one entry of an axis."""
    value, index = values
    if isinstance(value, np.ndarray):
        return embedding(reader, node, attributes, values)
    if isinstance(index, np.ndarray) and index.ndim == 1 and index.size > 1 and not isinstance(value, States):
        return [_several(reader, node, reader.flowing(value), attributes.get("axis", 0), whole(index, index.size))]
    if not isinstance(index, np.ndarray) or index.size != 1:
        raise Refused("expected one constant index")
    number = int(index.reshape(()))
    value = moving(reader, value)
    axis = place(attributes.get("axis", 0), len(value.axes))
    part = slice(number, number + 1 or None)
    if isinstance(value, Flowing) and value.axes[axis] in dict(value.parts):
        part_of_value = cut(reader, node, value, axis, part)
        return [part_of_value if index.ndim else grids.without(part_of_value, [axis])]
    if isinstance(value, States):
        part_of_value = _cut_states(value, axis, part)
        rest = [n for n in range(len(part_of_value.axes)) if index.ndim or n != axis]
        return [rearranged(part_of_value, rest)]
    if value.axes[axis] == "F" and "D" not in value.axes and not index.ndim:
        return squeeze(reader, node, {"axes": [axis]}, [cut(reader, node, value, axis, part)])
    if value.axes[axis] not in ("T", "D", "1"):
        raise Refused(
            f"expected a step, a direction or a feature, found axis {value.axes[axis]} of {' '.join(value.axes)}"
        )
    if value.axes[axis] != "T" or index.ndim:
        part_of_value = cut(reader, node, value, axis, part)
        dropped = () if index.ndim else (axis,)
        return [replace(part_of_value, axes=tuple(a for n, a in enumerate(part_of_value.axes) if n not in dropped))]
    axes = [a for n, a in enumerate(value.axes) if n != axis]
    if number not in (-1, (value.steps or 0) - 1):
        value = cut(reader, node, value, axis, part)
    return [reader.put(node, GlobalPool("last"), value, axes=axes)]


def _several(reader: Reader, node: Any, x: Flowing, axis: int, indices: list[int]) -> Flowing:
    """Return several features, by their indices."""
    at = x.at(axis)
    if x.axes[at] != "F" or "D" in x.axes or x.width is None:
        raise Refused(f"expected entries of the features, found axis {x.axes[at]} of {' '.join(x.axes)}")
    return reader.put(node, Take(tuple(n + x.width if n < 0 else n for n in indices)), x)


def split(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Split: a slice for each output."""
    value = moving(reader, values[0])
    axis = place(attributes.get("axis", 0), len(value.axes))
    if isinstance(value, States):
        length = value.refs.shape[value.axes[:axis].count("S")] if value.axes[axis] == "S" else None
    else:
        length = value.length(value.axes[axis])
    if not isinstance(length, int):
        raise Refused(f"expected an axis of known length, found {value.axes[axis]}")
    parts, start = [], 0
    for name, size in zip(node.output, split_sizes(attributes, values, length, len(node.output)), strict=True):
        part = slice(start, start + size)
        start += size
        if not reader.uses.get(name):
            parts.append(None)
        elif isinstance(value, States):
            parts.append(_cut_states(value, axis, part))
        else:
            parts.append(cut(reader, node, value, axis, part))
    return parts


def concat(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Concat: of states, of features, or of steps."""
    if all(isinstance(value, States) for value in values) and len({value.axes for value in values}) == 1:
        axes = values[0].axes
        axis = place(attributes["axis"], len(axes))
        if axes[axis] == "S":
            if len({value.initial for value in values}) != 1 or not all(value.counted for value in values):
                raise Refused("initial and final states can't be joined")
            refs = np.concatenate([value.refs for value in values], axis=axes[:axis].count("S"))
            return [States(axes, refs)]
    among = [one for one in map(_among_states, values) if one is not None]
    alike = len(among) == len(values) and len({one.axes for one in among}) == 1
    if alike and among[0].axes[place(attributes["axis"], 3)] == "S":
        return [replace(among[0], refs=np.concatenate([one.refs for one in among]))]
    flows = [reader.flowing(value) for value in values]
    axes = flows[0].axes
    axis = place(attributes["axis"], len(axes))
    if axes[axis : axis + 1] == ("T",) and any(flow.parts for flow in flows):
        flows = grids.aligned(reader, node, flows)
        axes = flows[0].axes
    elif any(flow.parts for flow in flows) or any(flow.axes[axis : axis + 1] == ("1",) for flow in flows):
        return [grids.joined(reader, node, flows, axis)]
    if any(flow.axes != axes for flow in flows) or axes[axis] not in ("F", "T") or "D" in axes:
        shapes = ", ".join(" ".join(flow.axes) for flow in flows)
        raise Refused(f"values can be joined along features or time only, found axis {axis} of {shapes}")
    if len(flows) == 1:
        return [flows[0]]
    if axes[axis] == "T":
        steps_apart(reader)
    return [reader.put(node, Merge("concat", axis=1 if axes[axis] == "T" else -1), *flows)]


def _among_states(value: Any) -> States | None:
    """Return a vector per row with an additional axis of length 1 as a state; None for anything else."""
    if isinstance(value, States) and not value.initial and value.axes.count("S") == 1 and len(value.axes) == 3:
        return value
    if not isinstance(value, Flowing) or value.axes not in (("1", "B", "F"), ("B", "1", "F")):
        return None
    refs = np.empty((1,), object)
    refs[0] = Vector(value.wire)
    return States(tuple("S" if axis == "1" else axis for axis in value.axes), refs)


def pad(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Pad with one value, over time or the features."""
    x = reader.flowing(values[0])
    value = np.asarray(attributes.get("value", values[2] if len(values) > 2 and values[2] is not None else 0.0))
    mode, count = attributes.get("mode", "constant"), len(x.axes)
    if value.dtype.kind not in "fiu" or value.size != 1:
        raise Refused("the pads must be constant, with a single value")
    if len(values) > 1 and isinstance(values[1], Symbols):
        return [_filled(node, x, values[1], mode, float(value.reshape(())))]
    pads = pads_of(attributes, values, count)
    if min(pads) < 0:
        raise Refused(f"expected pads for {count} axes, none negative, found {pads}")
    for n, axis in enumerate(x.axes):
        if pads[n] or pads[n + count]:
            if axis in dict(x.parts):
                x = grids.pad_part(reader, node, x, axis, pads[n], pads[n + count], mode, float(value.reshape(())))
                continue
            if axis not in ("T", "F") or (axis == "F" and "D" in x.axes):
                raise Refused(f"only time and the features can be padded, found {pads} of axes {' '.join(x.axes)}")
            if axis == "T":
                steps_apart(reader)
            over_axis = 1 if axis == "T" else -1
            if mode != "constant":
                length = x.steps if axis == "T" else x.width
                if length is None and axis == "T" and mode in ("reflect", "edge"):
                    x = _with_own_ends(reader, node, x, pads[n], pads[n + count], mode)
                    continue
                if length is None:
                    raise Refused(f"padding with mode {mode} needs an axis of known length, found {axis}")
                reader.builder.pinned |= axis == "T"
                x = reader.put(node, Take.of_padding(mode, length, pads[n], pads[n + count], over_axis), x)
                continue
            x = reader.put(node, Pad(pads[n], pads[n + count], float(value.reshape(())), over_axis), x)
    return [x]


def _filled(node: Any, x: Flowing, pads: Symbols, mode: str, value: float) -> Filled:
    """Return a sequence padded at its end by a number of steps that depends on its own number of steps."""
    entries, count = list(pads.array.reshape(-1)), len(x.axes)
    if len(entries) == 2 * count and "T" in x.axes:
        at = x.axes.index("T")
        before, after = entries[at], entries[at + count]
        rest = [entry for n, entry in enumerate(entries) if n % count != at]
        whole_numbers = all(isinstance(entry, (int, np.integer)) for entry in (before, *rest))
        if whole_numbers and not any(rest) and isinstance(after, Formula) and after.of == x.timed_by:
            return Filled(x, int(before), after, mode, value, label(node))
    raise Refused("the pads must be constant, or fill up the last window of a convolution")


def unfilled(reader: Reader, x: Filled, span: int, stride: int) -> Flowing:
    """Return a `Filled` sequence padded by a constant number of steps, for a convolution.

    This is the most that its formula gives, `stride - 1`; the convolution has the same whole windows with it.
    """
    if not x.fits(span, stride):
        raise Refused(f"the pads, computed from the number of steps, don't fit windows of {span} every {stride} steps")
    if x.mode == "constant":
        return reader.put(x.name, Pad(x.before, stride - 1, x.value), x.of)
    return _with_own_ends(reader, x.name, x.of, x.before, stride - 1, x.mode)


def _with_own_ends(reader: Reader, node: Any, x: Flowing, before: int, after: int, mode: str) -> Flowing:
    """Return a sequence of any length padded with its own steps, with mode reflect or edge."""

    name = node if isinstance(node, str) else label(node)
    near = range(1, max(before, after) + 1) if mode == "reflect" else [0] * max(before, after)
    parts = [x]
    if before:
        parts.insert(0, reader.put(f"{name}.before", Take(tuple(near[:before][::-1]), axis=1), x))
    if after:
        backward = reader.put(f"{name}.backward", Select(step=-1), x)
        parts.append(reader.put(f"{name}.after", Take(tuple(near[:after]), axis=1), backward))
    return reader.put(node, Merge("concat", axis=1), *parts)


def expand(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Tile or an Expand that repeats a vector at every step."""
    if isinstance(values[0], States) and values[0].initial:
        return [_as_they_are(values[0], node, values[1])]
    x, target = reader.flowing(values[0]), values[1]
    if isinstance(target, Broadcast) and (target.array == 1).all():
        return [x]
    if node.op_type == "Expand" and (wide := _repeated_feature(reader, node, x, target)) is not None:
        return [wide]
    entries = entries_of(target)
    if entries is None:
        raise Refused("expected a known shape")
    axes = ("1",) * (len(entries) - len(x.axes)) + x.axes
    entries = [1] * (len(axes) - len(entries)) + entries
    x = replace(x, axes=axes)
    unchanged = [1 if node.op_type == "Tile" else length for length in x.lengths]
    new = [n for n, entry in enumerate(entries) if entry not in (1, -1, unchanged[n])]
    if not new:
        return [x]
    at = new[0]
    vector = sorted(axis for axis in axes if axis != "1") in (["B", "F"], ["F"]) and len(x.shape) == 1
    if len(new) > 1 or axes[at] != "1" or not vector:
        raise Refused(f"expected a vector to be repeated over time only, found axes {' '.join(axes)}")
    steps, timed = entries[at], [*axes[:at], "T", *axes[at + 1 :]]
    if not isinstance(steps, Counted):
        return [reader.put(node, Repeat(steps), x, axes=timed)]
    if (
        not isinstance(steps, Dim)
        or steps.labels != ("T",)
        or steps.times != 1
        or not steps.of
        or len(reader.shape(steps.of)) < 2
    ):
        raise Refused("expected the number of repetitions to be constant or the number of steps of an input")
    return [reader.put(node, RepeatLike(), x, replace(x, wire=steps.of), axes=timed)]


def _repeated_feature(reader: Reader, node: Any, x: Flowing, target: Any) -> Flowing | None:
    """Return a value of one feature with this feature repeated by an Expand; None if other axes change too."""
    entries = entries_of(target)
    if entries is None or len(entries) != len(x.axes) or x.width != 1:
        return None
    count = next(entry for axis, entry in zip(x.axes, entries, strict=True) if axis == "F")
    alike = all(axis == "F" or entry in (1, x.length(axis)) for axis, entry in zip(x.axes, entries, strict=True))
    if not alike or isinstance(count, Dim):
        return None
    return reader.put(node, Take((0,) * reader.builder.make(int(count))), x)


def _as_they_are(states: States, node: Any, target: Any) -> States:
    """Return states that an Expand doesn't change; otherwise raise `Refused`."""
    entries = entries_of(target) or []
    sizes = iter(states.refs.shape)
    fits = {"B": (1, Dim(("B",))), "S": (1,), "F": (1,)}
    same_axes = [
        entry in fits[axis] or (axis == "S" and entry == next(sizes)) or (axis == "F" and isinstance(entry, int))
        for axis, entry in zip(states.axes, entries, strict=False)
    ]
    if node.op_type != "Expand" or len(entries) != len(states.axes) or not all(same_axes):
        raise Refused(f"it changes states {' '.join(states.axes)}, which isn't supported")
    return states


HANDLERS: dict[str, Handler] = {
    "Slice": slice_,
    "Gather": gather,
    "Split": split,
    "Concat": concat,
    "Pad": pad,
    "Tile": expand,
    "Expand": expand,
}
