"""Which axes of a module's input tensors may have other lengths, found by calling the module.

To test an axis, it is made longer by one, alone or together with axes of the same length. For `x [2, 7, 3]` and
`h [1, 2, 4]`, the first axis of x can only change together with the second of h, the second of x can change alone, and
no other axis can change. An axis that only changes by multiples of a number, as that of `[B, 6 T]`, changes alone; the
example has two of them at least, or features would be taken for a sequence.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cellstack.capture.nested import fresh, tensors_in, wider

MOST_WAYS = 30  # combinations of axes of several inputs that are tried
Axes = frozenset[tuple[int, int, int]]  # the indices of tensors, an axis of each, and by how many entries it changes


def free_axes(module: Any, inputs: tuple[Any, ...]) -> list[list[int]]:
    """Return, for each input tensor, the axes that a graph for a Network leaves open."""
    group, found = _finder(module, inputs, []), []
    for n, value in enumerate(inputs):
        if value.ndim > 2:
            found.append([axis for axis in range(value.ndim) if group(n, axis)] or [0, 1])
        elif len(inputs) > 1 and all(one.ndim == 2 and not one.is_floating_point() for one in inputs):  # ids
            found.append([axis for axis in range(2) if group(n, axis)])
        else:
            found.append([0, 1] if value.ndim == 2 and len(inputs) == 1 and group(0, 1) == {(0, 1, 1)} else [])
    return found


def axes_in_groups(module: Any, inputs: tuple[Any, ...], left: list[str]) -> list[Axes]:
    """Return the axes of the input tensors that may change, in groups that change together.

    Where a module cuts a sequence to its mask, which can't be the longer one, both are one group.
    An axis for which there are more combinations with others than are tried is added to `left`.
    """
    group, found = _finder(module, inputs, left), list[Axes]()
    for n, value in enumerate(inputs):
        for axis in range(value.ndim):
            if any((n, axis) == place[:2] for one in found for place in one):
                continue
            size = value.shape[axis]
            several = (unit for unit in range(2, size // 2 + 1) if size % unit == 0)
            if made := group(n, axis) or next((one for unit in several if (one := group(n, axis, unit))), None):
                found = [one for one in found if not one < made] + [made]
    return _with_cut_ones(module, inputs, found)


def _with_cut_ones(module: Any, inputs: tuple[Any, ...], found: list[Axes]) -> list[Axes]:
    """Return groups, those joined of which a module only uses the shorter one, as `for x, done in zip(xs, dones)`."""

    def outputs(axes: Axes) -> list[Any]:
        with torch.no_grad():
            return tensors_in(module(*fresh(resized(list(inputs), axes, 1))))

    alike, before = dict[tuple[int, int], list[Axes]](), outputs(frozenset())
    for one in found:
        (n, axis, unit), *others = one
        if not others and all(map(torch.equal, outputs(one), before)):
            alike.setdefault((inputs[n].shape[axis], unit), []).append(one)
    for several in alike.values():
        found = [one for one in found if one not in several] + [frozenset().union(*several)]
    return found


def resized(given: list[Any], axes: Axes, more: int) -> list[Any]:
    """Return tensors with longer or shorter axes. Lengths, which count the steps of one of them, change with it."""
    made = list(given)
    sizes = {given[n].shape[axis] for n, axis, _ in axes}
    for n, axis, unit in axes:
        made[n] = wider(made[n], axis, more * unit)
    for n, value in enumerate(given):
        if value.ndim == 1 and is_count(value) and int(value.max()) in sizes:
            made[n] = (made[n] + more).clamp(min=1)
    return made


def longer(given: Sequence[Any], groups: Sequence[Axes]) -> list[Any]:
    """Return tensors with each group of axes longer."""
    return functools.reduce(lambda made, group: resized(made, group, 1), groups, list(given))


def is_count(value: Any) -> bool:
    """Return whether a tensor holds integers."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)


def _finder(module: Any, inputs: tuple[Any, ...], left: list[str]) -> Callable[..., Axes | None]:
    """Return a function that returns the smallest group of axes with a given one that may change; None: it may not."""
    flat = list(inputs)

    def takes(axes: Axes) -> bool:
        try:
            with torch.no_grad():
                module(*fresh(resized(flat, axes, 1)))
        except Exception:  # the module rejects these lengths
            return False
        return True

    def group(n: int, axis: int, unit: int = 1) -> Axes | None:
        alone = frozenset({(n, axis, unit)})
        taken = takes(alone)
        if taken or unit > 1:
            return alone if taken else None
        alike: dict[tuple[int, ...], list[int]] = {}  # tensors of one shape change together
        for m, value in enumerate(flat):
            alike.setdefault((-1,) if m == n else tuple(value.shape), []).append(m)
        ways = []
        for members in alike.values():
            shape = flat[members[0]].shape
            same = [other for other in range(len(shape)) if shape[other] == flat[n].shape[axis]]
            alone_of_them = sorted(([one] for one in same), key=lambda one: one != [axis])  # mostly the same axis
            choices = [*alone_of_them, same, []] if axis in same else [same, *alone_of_them, []]
            ways.append([*dict.fromkeys(frozenset(itertools.product(members, chosen, [1])) for chosen in choices)])
        for tried, way in enumerate(itertools.product(*ways)):
            if tried == MOST_WAYS:
                left.append(f"axis {axis} of input {n}")
                break
            if not takes(frozenset().union(alone, *way)):
                continue
            kept = [part for part in way if part]
            for part in tuple(kept):  # one that isn't needed changes on its own
                rest = [one for one in kept if one is not part]
                kept = rest if takes(frozenset().union(alone, *rest)) else kept
            return frozenset().union(alone, *kept)
        return None

    return group
