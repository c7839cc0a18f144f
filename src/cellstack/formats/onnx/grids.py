"""ONNX's operators on values with several feature axes, such as channels and frequencies.

A wire has one axis of features. The `parts` of such a value are its feature axes, in the order in which the wire's
features hold them. Most operators only change labels of axes. If one needs the parts in another order, a `Take`
reorders the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.graph import Reader, Refused, steps_apart
from cellstack.formats.onnx.values import GRID, Dim, Flowing, Length, shown
from cellstack.nodes import (
    Activation,
    Dense,
    Flatten,
    GridConv,
    GridPool,
    GroupedDense,
    Merge,
    Node,
    Pad,
    Power,
    Reshape,
    Select,
    Take,
)


def as_grid(x: Flowing) -> Flowing:
    """Return a value whose feature axes are parts: `F`, or `D` and `F`, become parts too."""
    if x.parts or "F" not in x.axes:
        return x
    width = x.shape[-1]
    if width is None:
        raise Refused("the number of features must be known")
    free = fresh(x.axes)
    names = {"F": next(free)} | ({"D": next(free)} if "D" in x.axes else {})
    parts = ((names["D"], 2), (names["F"], width // 2)) if "D" in names else ((names["F"], width),)
    return replace(x, axes=tuple(names.get(axis, axis) for axis in x.axes), parts=parts)


def fresh(axes: Sequence[str]) -> Iterator[str]:
    """Yield labels of parts that a value doesn't use yet."""
    yield from (letter for letter in GRID if letter not in axes)
    raise Refused("too many feature axes")


def as_features(x: Flowing) -> Flowing:
    """Return a value with `F` instead of its only part; return others unchanged."""
    if len(x.parts) != 1:
        return x
    ((name, _),) = x.parts
    return replace(x, axes=tuple("F" if axis == name else axis for axis in x.axes), parts=())


def arranged(reader: Reader, x: Flowing, order: Sequence[str]) -> Flowing:
    """Return a value whose wire holds its parts in this order."""
    names = [name for name, _ in x.parts]
    sizes = dict(x.parts)
    moved = [name for name in order if sizes[name] > 1]
    if moved != [name for name in names if sizes[name] > 1]:
        total = reader.builder.make(prod(sizes.values()))
        places = np.arange(total).reshape([sizes[name] for name in names])
        indices = places.transpose([names.index(name) for name in order]).reshape(-1)
        x = reader.put(f"{x.wire}.arranged", Take(tuple(indices.tolist())), x)
    return replace(x, parts=tuple((name, sizes[name]) for name in order))


def in_order(reader: Reader, x: Flowing) -> Flowing:
    """Return a value whose wire holds its parts in the order of its axes."""
    x = as_grid(x)
    names = {name for name, _ in x.parts}
    return arranged(reader, x, [axis for axis in x.axes if axis in names])


def outermost(reader: Reader, x: Flowing, axis: str) -> Flowing:
    """Return a value whose wire holds one part first, and the others in their order."""
    return arranged(reader, x, [axis, *(name for name, _ in x.parts if name != axis)])


MERGED = {"N": "BT", "M": "TB"}  # axes that are two axes merged

# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def reshaped(reader: Reader, x: Flowing, target: Sequence[Any], keep_zero: bool, split: bool = True) -> Flowing | None:
    """Return a value in another shape, in which batch, time and features stay separate; None for other shapes.

    Axes of length 1 are added and removed, and feature axes are joined. B and T become N, N becomes B and T again, and
    all axes after B may become one, which has the label `*`.

    Args:
        reader: the reader.
        x: the value.
        target: the lengths of the shape, with 0 and -1 as in ONNX.
        keep_zero: whether 0 is a length, not that of the same axis before.
        split: whether feature axes may be split too.
    """
    try:
        grid = as_grid(x)
    except Refused:  # the number of features isn't known
        grid = x
    lengths = grid.lengths
    shape = [lengths[n] if e == 0 and not keep_zero and n < len(lengths) else e for n, e in enumerate(target)]
    items = [axis for axis in grid.axes if axis != "1"]
    tries = (way(grid, items, shape, strict, split) for strict in (True, False) for way in (_matched, _flattened))
    axes = next((matched for matched in tries if matched is not None), None)
    if axes is None:
        return None
    sizes = dict(grid.parts)
    if "*" in axes or {axis for axis in axes if axis in sizes} == sizes.keys():  # only axes of length 1 change
        own = dict(zip(grid.axes, x.axes, strict=True))
        return as_features(replace(x, axes=tuple(own.get(axis, axis) for axis in axes)))
    grid, free = in_order(reader, grid), fresh(grid.axes)
    named = [(next(free), axis) if isinstance(axis, int) else (axis, sizes.get(axis, 0)) for axis in axes]
    parts = tuple((name, size) for name, size in named if size)
    return as_features(replace(grid, axes=tuple(name for name, _ in named), parts=parts))


def _fits(label: str, length: Length, entry: Any, strict: bool) -> bool:
    """Return whether an axis can have a length of a shape."""
    return entry in (-1, length) or (not strict and isinstance(length, Dim) and label != "F" and entry != 1)


def _flattened(x: Flowing, items: list[str], shape: Sequence[Any], strict: bool, split: bool) -> list[Any] | None:
    """Return the axes of a shape, as `_matched` does, if all axes after the batch become one."""
    wide = [n for n, entry in enumerate(shape) if n and entry != 1]
    if items[:1] != ["B"] or len(items) < 3 or len(wide) != 1 or not _fits("B", x.length("B"), shape[0], strict):
        return None
    rest = [x.length(axis) for axis in items[1:]]
    numbers = [length for length in rest if isinstance(length, int)]
    whole = prod(numbers) if len(numbers) == len(rest) else Dim(("*",))
    fits = _fits("*", whole, shape[wide[0]], strict)
    return ["B", *("*" if n == wide[0] else "1" for n in range(1, len(shape)))] if fits else None


def _matched(x: Flowing, items: list[str], shape: Sequence[Any], strict: bool, split: bool) -> list[Any] | None:
    """Return for each axis of a shape the value's axis, "1", or the length of a new part; None if nothing matches.

    Args:
        x: the value.
        items: the value's axes that aren't matched yet, without those of length 1.
        shape: the lengths of the shape that aren't matched yet.
        strict: whether a number can't match an unknown length; in files written for one size it can.
        split: whether several lengths can match one part.
    """
    sizes = dict(x.parts)
    if not shape:
        return None if any(sizes.get(item) != 1 for item in items) else []
    first, rest = shape[0], shape[1:]
    for axes, left, behind in _ways(x, items, shape, strict, split):
        if (tail := _matched(x, left, behind, strict, split)) is not None:
            return [*axes, *tail]
    if first == 1 and (tail := _matched(x, items, rest, strict, split)) is not None:
        return ["1", *tail]
    if items and sizes.get(items[0]) == 1:
        return _matched(x, items[1:], shape, strict, split)
    return None


def _ways(
    x: Flowing, items: list[str], shape: Sequence[Any], strict: bool, split: bool
) -> Iterator[tuple[list[Any], Any, Any]]:
    """Yield matches of the first axes: the axes of the shape as `_matched` returns them, the axes and lengths left."""
    sizes = dict(x.parts)
    if not items:
        return
    if items[0] in sizes:
        run = next((n for n, item in enumerate(items) if item not in sizes), len(items))
        for count in range(1, run + 1):
            total = prod(sizes[item] for item in items[:count])
            for number in range(1, len(shape) + 1 if split else 2):
                entries = shape[:number]
                if any(isinstance(entry, Dim) for entry in entries):
                    break
                known = prod(entry for entry in entries if entry != -1)
                if known != total and (-1 not in entries or total % known):
                    continue
                lengths = [total // known if entry == -1 else int(entry) for entry in entries]
                axes = (
                    [items[0]] if (count, number) == (1, 1) else [length if length > 1 else "1" for length in lengths]
                )
                yield axes, items[count:], shape[number:]
        return
    if _fits(items[0], x.length(items[0]), shape[0], strict):
        yield items[:1], items[1:], shape[1:]
    for merged, apart in MERGED.items():
        if items[0] == merged and len(shape) > 1:
            pairs = zip(apart, shape, strict=False)
            if all(_fits(axis, x.length(axis), entry, strict) for axis, entry in pairs):
                yield list(apart), items[1:], shape[2:]
        elif items[:2] == list(apart) and _fits(merged, x.length(merged), shape[0], strict):
            yield [merged], items[2:], shape[1:]


def without(x: Flowing, gone: Sequence[int]) -> Flowing:
    """Return a value without some of its axes, each of length 1."""
    lost = [x.axes[n] for n in gone]
    parts = tuple(part for part in x.parts if part[0] not in lost)
    return as_features(replace(x, axes=tuple(a for n, a in enumerate(x.axes) if n not in gone), parts=parts))


def cut_part(reader: Reader, node: Any, x: Flowing, axis: int, taken: range) -> Flowing:
    """Return a value with the entries `taken` of the part at an axis."""
    name, sizes = x.axes[axis], dict(x.parts)
    x = outermost(reader, x, name)
    inner = prod(sizes.values()) // sizes[name]
    selection = Select(taken.start * inner, taken.stop * inner, axis=-1) if taken.step == 1 else _blocks(taken, inner)
    y = reader.put(node, selection, x)
    return replace(y, parts=((name, len(taken)), *x.parts[1:]))


def _blocks(taken: Iterable[int], size: int) -> Take:
    """Return a node that selects blocks of features of this size, by their indices."""
    return Take(tuple(at * size + n for at in taken for n in range(size)))


def pad_part(
    reader: Reader, node: Any, x: Flowing, axis: str, before: int, after: int, mode: str, value: float
) -> Flowing:
    """Return a value with one part padded."""
    x, size = outermost(reader, x, axis), dict(x.parts)[axis]
    inner = prod(size for _, size in x.parts[1:])
    padding: Node = Pad(before * inner, after * inner, value, -1)
    if mode != "constant":
        padding = _blocks(Take.of_padding(mode, size, before, after).indices, inner)
    y = reader.put(node, padding, x)
    return replace(y, parts=((axis, before + size + after), *x.parts[1:]))


def joined(reader: Reader, node: Any, flows: Sequence[Flowing], axis: int) -> Flowing:
    """Return values concatenated along a feature axis, or along an axis of length 1, which becomes one."""
    grids = [as_grid(flow) for flow in flows]
    name = next((grid.axes[axis] for grid in grids if grid.axes[axis] in dict(grid.parts)), next(fresh(grids[0].axes)))
    over, values = list[int](), list[Flowing]()
    for grid in grids:
        sizes = dict(grid.parts)
        if grid.axes[axis] not in (*sizes, "1"):
            raise Refused(f"values can only be concatenated along features or time, found axis {grid.axes[axis]}")
        here = grid.axes[axis]
        over.append(sizes.get(here, 1))
        others = [a for n, a in enumerate(grid.axes) if a in sizes and n != axis]
        grid = arranged(reader, grid, [*([here] if here != "1" else []), *others])
        axes = tuple(name if n == axis else a for n, a in enumerate(grid.axes))
        values.append(replace(grid, axes=axes, parts=((name, over[-1]), *((a, sizes[a]) for a in others))))
    first = values[0]
    rest = [size for _, size in first.parts[1:]]
    places = {name: n for n, name in enumerate(first.axes)}
    for other in values[1:]:
        both = f"{shown(first.lengths)} and {shown(other.lengths)}"
        alike = [places.get(a) for a, _ in first.parts[1:]] == [other.axes.index(a) for a, _ in other.parts[1:]]
        if not alike or [size for _, size in other.parts[1:]] != rest or len(other.axes) != len(first.axes):
            raise Refused(f"expected values of compatible shapes, found {both}")
        if [a for a in other.axes if a in "BTN"] != [a for a in first.axes if a in "BTN"]:
            raise Refused(f"expected values with the same axes, found {both}")
    if len(values) == 1:
        return as_features(first)
    y = reader.put(node, Merge("concat"), *values)
    return as_features(replace(y, axes=first.axes, parts=((name, sum(over)), *first.parts[1:])))


def over_parts(reader: Reader, node: Any, x: Flowing, axes: Sequence[int], mode: str, keep: bool) -> Flowing:
    """Return the mean, sum or maximum over the parts at some axes; with `keep`, these stay as axes of length 1."""
    if mode not in ("mean", "sum", "max"):
        raise Refused(f"a {mode} over one of several feature axes isn't supported")
    x = as_grid(x)
    sizes = dict(x.parts)
    gone = [x.axes[n] for n in axes if x.axes[n] in sizes]
    rest = [name for name, _ in x.parts if name not in gone]
    x = arranged(reader, x, [*gone, *rest])
    size, inner = prod(sizes[name] for name in gone), prod(sizes[name] for name in rest)
    y = reader.put(node, GridPool("max" if mode == "max" else "mean", (size,), inner, (1, size)), x)
    if mode == "sum":
        y = reader.put(f"{label(node)}.sum", Activation(f"affine({size}, 0)"), y)
    labels = ["1" if n in axes else axis for n, axis in enumerate(x.axes)]
    labels = [axis for n, axis in enumerate(labels) if keep or n not in axes]
    if not rest:  # a single number stays as one feature
        if keep:
            labels[labels.index("1")] = "F"
        return replace(y, axes=tuple(labels), parts=())
    return as_features(replace(y, axes=tuple(labels), parts=tuple((name, sizes[name]) for name in rest)))


# ── constants and several values ──────────────────────────────────────────────────────────────────────────────────────


def by_parts(x: Flowing, value: Array) -> Array | None:
    """Return a constant as one number per feature of the wire; None where it varies along other axes."""
    if not x.parts or value.ndim > len(x.axes):
        return None
    sizes = dict(x.parts)
    value = value.reshape((1,) * (len(x.axes) - value.ndim) + value.shape)
    lengths = [sizes.get(axis, 1) for axis in x.axes]
    if any(got not in (1, want) for got, want in zip(value.shape, lengths, strict=True)):
        return None
    places = [n for n, axis in enumerate(x.axes) if axis in sizes]
    wide = np.broadcast_to(value, lengths).reshape([lengths[n] for n in places])
    names = [x.axes[n] for n in places]
    return np.ascontiguousarray(wide.transpose([names.index(name) for name, _ in x.parts])).reshape(-1)


def aligned(reader: Reader, node: Any, flows: Sequence[Flowing]) -> list[Flowing]:
    """Return values with the same labels, and the same order and width on the wire, for an elementwise operator."""
    grids = [as_grid(flow) for flow in flows]
    rank = max(len(grid.axes) for grid in grids)
    wide = max(grids, key=lambda grid: (len(grid.parts), prod(size for _, size in grid.parts)))
    axes = ("1",) * (rank - len(wide.axes)) + wide.axes
    sizes, values = dict(wide.parts), []
    for grid in grids:
        own_axes = ("1",) * (rank - len(grid.axes)) + grid.axes
        lengths = dict(grid.parts)
        names: dict[str, str] = {}
        both = f"{shown(wide.lengths)} and {shown(grid.lengths)}"
        for one, other in zip(own_axes, axes, strict=True):
            if one in lengths and (other not in sizes or lengths[one] not in (1, sizes[other])):
                raise Refused(f"expected values of compatible shapes, found {both}")
            if one not in lengths and one not in ("1", other):
                raise Refused(f"expected values with the same axes, found {both}")
            if one in lengths:
                names[one] = other
        parts = tuple((names[name], size) for name, size in grid.parts)
        labels = tuple(
            other if one in lengths or (one == "1" and other in sizes) else one
            for one, other in zip(own_axes, axes, strict=True)
        )
        values.append(_repeated(reader, node, replace(grid, axes=labels, parts=parts), wide))
    return values


def _repeated(reader: Reader, node: Any, x: Flowing, wide: Flowing) -> Flowing:
    """Return a value with the parts of another one, repeated along those that it lacks; one number stays as it is."""
    own_sizes, sizes = dict(x.parts), dict(wide.parts)
    if prod(own_sizes.values()) == 1:
        return x
    if len(own_sizes) == len(sizes) and prod(own_sizes.values()) == prod(sizes.values()):
        return arranged(reader, x, list(sizes))
    names = [name for name, _ in x.parts]
    places = np.arange(prod(own_sizes.values())).reshape([own_sizes[name] for name in names])
    there = [name for name in sizes if name in own_sizes]
    places = places.transpose([names.index(name) for name in there])
    places = places.reshape([own_sizes.get(name, 1) for name in sizes])
    reader.builder.make(prod(sizes.values()))
    indices = np.broadcast_to(places, list(sizes.values())).reshape(-1)
    y = reader.put(f"{label(node)}.repeated", Take(tuple(indices.tolist())), x)
    return replace(y, parts=wide.parts)


def over_steps(reader: Reader, flows: Sequence[Flowing]) -> list[Flowing]:
    """Return values with the same axes: those that lack time become sequences of one step."""
    rank = max(len(flow.axes) for flow in flows)
    flows = [replace(flow, axes=("1",) * (rank - len(flow.axes)) + flow.axes) for flow in flows]
    if len({flow.axes for flow in flows}) == 1 or not any("T" in flow.axes for flow in flows):
        return flows
    wide = next(flow for flow in flows if "T" in flow.axes)
    values = []
    for flow in flows:
        at, here = wide.axes.index("T"), flow
        if flow.axes[at] == "1" and "T" not in flow.axes and len(flow.shape) == 1:
            here = reader.put(f"{flow.wire}.step", Reshape((1, -1)), flow)
        axes = list(flow.axes)
        for n, (own_axis, other) in enumerate(zip(flow.axes, wide.axes, strict=True)):
            one = (other == "T" and here is not flow) or (other == "F" and here.shape[-1] == 1)
            axes[n] = other if own_axis == "1" and (one or other == "B") else own_axis
        values.append(replace(here, axes=tuple(axes)))
    return values


def divided(reader: Reader, node: Any, one: Flowing, other: Flowing) -> Flowing:
    """Return the quotient of two values."""
    inverse = reader.put(f"{label(node)}.inverse", Power(-1.0), other)
    return reader.put(node, Merge("mul"), one, inverse)


def dense(reader: Reader, node: Any, x: Flowing, kernel: Array, last: int = -1) -> Flowing:
    """Return the product of one feature axis with a matrix, or with a matrix for each entry of other feature axes.

    Args:
        reader: the reader.
        node: the operator.
        x: the value.
        kernel: `[…, I, O]`. As in a MatMul, its axes before the last two belong to those of the value before its last
            two, and an axis of length 1 there becomes as long as the kernel's.
        last: the axis that is multiplied, -1 or -2.
    """
    if kernel.ndim < 2 or len(x.axes) < 2:
        raise Refused(f"expected a matrix of weights, found {kernel.shape} with axes {' '.join(x.axes)}")
    x = _with_steps(reader, as_grid(x), kernel)
    name, outer, counts = x.axes[last], list(x.axes[:-2]), list(kernel.shape[:-2])
    outer, counts = ["1"] * (len(counts) - len(outer)) + outer, [1] * (len(outer) - len(counts)) + counts
    sizes, free, rank = {"1": 1, **dict(x.parts)}, fresh(x.axes), len(outer)
    spread = {n: next(free) for n, axis in enumerate(outer) if sizes.get(axis) == 1 < counts[n]}
    unlike = [n for n, axis in enumerate(outer) if n not in spread and counts[n] not in (1, sizes.get(axis))]
    if unlike or sizes.get(name) != kernel.shape[-2]:
        raise Refused(f"expected weights for the feature axes, found {kernel.shape}, {' '.join(x.axes)}")
    gone = [outer[n] for n in spread if outer[n] != "1"]
    rest = [part for part, _ in x.parts if part not in (*gone, name)]
    x = arranged(reader, x, [*gone, *rest, name])
    inner = [outer.index(part) for part in rest if part in outer]
    others = [n for n in range(rank) if n not in (*inner, *spread)]
    weights = kernel.reshape(*counts, *kernel.shape[-2:]).transpose(*others, *inner, rank, *spread, rank + 1)
    groups = [counts[outer.index(part)] if part in outer else 1 for part in rest]
    weights = weights.reshape(*groups, sizes[name], -1)
    *_, inputs, outputs = weights.shape
    size = prod(sizes[part] for part in rest)
    if prod(groups) > 1:
        reader.builder.make((size - prod(groups)) * inputs * outputs)
        weights = np.broadcast_to(weights, (*(sizes[part] for part in rest), inputs, outputs))
        y = reader.put(node, GroupedDense(weights.reshape(size, inputs, outputs)), x)
    elif size > 1:
        y = reader.put(node, GridConv(weights.reshape(1, 1, inputs, outputs), (size,)), x)
    else:
        y = reader.put(node, Dense(weights.reshape(inputs, outputs)), x)
    axes = (*(spread.get(n, axis) for n, axis in enumerate(outer)), *x.axes[-2:])
    parts = (*((part, sizes[part]) for part in rest), *((spread[n], counts[n]) for n in spread))
    return as_features(replace(y, axes=axes, parts=(*parts, (name, kernel.shape[-1]))))


def _with_steps(reader: Reader, x: Flowing, kernel: Array) -> Flowing:
    """Return a value whose steps are a feature axis where the kernel has a matrix for each: see `dense`."""
    at = x.axes.index("T") - len(x.axes) if "T" in x.axes else 0
    if not -kernel.ndim <= at < -2 or kernel.shape[at] == 1 or kernel.shape[at] != x.steps:
        return x
    steps_apart(reader)
    step = next(fresh(x.axes))
    axes = tuple(step if axis == "T" else axis for axis in x.axes)
    return replace(reader.put(f"{x.wire}.rows", Flatten(), x), axes=axes, parts=((step, x.steps), *x.parts))
