"""What operators' attributes and constant inputs say: axes, slices, pads, orders, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NO_END = (2**31 - 1, 2**63 - 1)  # ends that mean an open end, in either direction
LARGEST = 2**31 - 1  # larger starts or ends mean those of the axis


def whole(values: Any, most: int = 0) -> list[int]:
    """Return a constant list of integers, such as axes, of length up to `most` or 64; else `ValueError`."""
    array = np.asarray(values)
    if array.dtype.kind == "O":
        raise ValueError("expected constant integers, found some that are computed from the size of an input")
    if array.dtype.kind not in "iu" or array.ndim > 1 or array.size > max(most, 64):
        raise ValueError(f"expected a short list of integers, found {array.dtype} {array.shape}")
    return [int(value) for value in array.reshape(-1)]


def place(axis: int, axes: int) -> int:
    """Return an axis counted from the front; `ValueError` where it doesn't exist."""
    if not -axes <= axis < axes:
        raise ValueError(f"expected an axis of {axes}, found {axis}")
    return axis % axes


def slices(attributes: dict[str, Any], values: list[Any], axes: int) -> tuple[slice, ...] | None:
    """Return the slices that a Slice takes of a value with `axes` axes; None where they aren't constant."""
    if len(values) == 1:  # before opset 10
        starts, ends, chosen = attributes["starts"], attributes["ends"], attributes.get("axes")
        steps = None
    else:
        starts, ends, chosen, steps = (*values[1:], None, None)[:4]
        if starts is None or ends is None:
            return None
    starts, ends = whole(starts), whole(ends)
    chosen = list(range(len(starts))) if chosen is None else [place(axis, axes) for axis in whole(chosen)]
    steps = [1] * len(starts) if steps is None else whole(steps)
    if not len(starts) == len(ends) == len(chosen) == len(steps) or len(set(chosen)) != len(chosen) or 0 in steps:
        raise ValueError("starts, ends, axes and steps must have one length, with distinct axes and no step of 0")
    taken = [slice(None)] * axes
    for start, end, axis, step in zip(starts, ends, chosen, steps, strict=True):
        backwards_to_the_front = step < 0 and (end <= -LARGEST or end in NO_END)
        taken[axis] = slice(start, None if backwards_to_the_front else end, step)
    return tuple(taken)


def within(taken: slice, length: int) -> slice:
    """Return a slice in Python's terms for an axis of this length: backward, an early start is clipped to 0."""
    start, step = taken.start, taken.step or 1
    return slice(0, taken.stop, step) if step < 0 and start is not None and start < -length else taken


def axes_of(attributes: dict[str, Any], values: list[Any]) -> list[int] | None:
    """Return the axes of a Squeeze, Unsqueeze or reduction: an attribute in older opsets, an input in newer ones."""
    if "axes" in attributes:
        return whole(attributes["axes"])
    return whole(values[1]) if len(values) > 1 and values[1] is not None else None


def pads_of(attributes: dict[str, Any], values: list[Any], count: int) -> list[int]:
    """Return the pads before each of `count` axes, then after each; `ValueError` where they aren't constant."""
    pads = attributes.get("pads", values[1] if len(values) > 1 else None)
    if pads is None:
        raise ValueError("pads must be constant")
    pads = whole(pads)
    if len(values) > 3 and values[3] is not None:
        over = [place(axis, count) for axis in whole(values[3])]
        given = dict(zip([*over, *(axis + count for axis in over)], pads, strict=True))
        pads = [given.get(n, 0) for n in range(2 * count)]
    if len(pads) != 2 * count:
        raise ValueError(f"expected pads for {count} axes, found {pads}")
    return pads


def order_of(operator: str, attributes: dict[str, Any], values: list[Any], ones: Sequence[bool]) -> list[int | None]:
    """Return, for each output axis of a Transpose, Squeeze or Unsqueeze, its input axis; None for a new one.

    Args:
        operator: which of the three.
        attributes: by name.
        values: the inputs; the data comes first.
        ones: which axes of the data have length 1: a Squeeze without axes removes these.
    """
    count, axes = len(ones), axes_of(attributes, values)
    if operator == "Transpose":
        perm = whole(attributes.get("perm", list(range(count))[::-1]))
        if sorted(perm) != list(range(count)):
            raise ValueError(f"expected perm to be a permutation of {count} axes, found {perm}")
        return [*perm]
    if operator == "Squeeze":
        gone = [n for n in range(count) if ones[n]] if axes is None else [place(axis, count) for axis in axes]
        return [n for n in range(count) if n not in gone]
    if axes is None:
        raise ValueError("axes must be constant")
    old, new = iter(range(count)), {place(axis, count + len(axes)) for axis in axes}
    if len(new) != len(axes):
        raise ValueError(f"axes must be distinct, found {axes}")
    return [None if n in new else next(old) for n in range(count + len(axes))]


def split_sizes(attributes: dict[str, Any], values: list[Any], length: int, outputs: int) -> list[int]:
    """Return the lengths that a Split cuts an axis into."""
    sizes = attributes.get("split", values[1] if len(values) > 1 and values[1] is not None else None)
    if sizes is None:
        each = -(-length // outputs)
        sizes = [min(each, length - n * each) for n in range(outputs)]
    sizes = whole(sizes, outputs)
    if len(sizes) != outputs or sum(sizes) != length or min(sizes) < 0:
        raise ValueError(f"expected {outputs} lengths that add up to {length}, found {sizes}")
    return sizes
