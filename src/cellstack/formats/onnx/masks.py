"""Masks in ONNX, which has none: flags `[B, T, 1]` that are computed beside the values, True where a step is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from cellstack.formats.onnx.pieces import Pieces
from cellstack.nodes import (
    Bidirectional,
    Conv1D,
    Embedding,
    Flatten,
    GlobalPool,
    Masking,
    Merge,
    Node,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Select,
)

NEUTRAL = {"mul": 1.0, "max": -np.inf}  # what a step that is left out counts as in a Merge; elsewhere what it holds
WITHOUT = (Conv1D, Pool1D, GlobalPool, Flatten, Permute, Repeat, Reshape)  # what they return has no mask


def both(pieces: Pieces, one: str, other: str) -> str:
    """Return the steps that two masks keep; "" = all of them."""
    return pieces.of("And", one, other) if one and other else one or other


def of_lengths(pieces: Pieces, x: str, lengths: str) -> str:
    """Return the mask that lengths `[B]` stand for, of an input `x [B, T, …]`."""
    steps = pieces.of("Squeeze", pieces.of("Shape", x, start=1, end=2), pieces.integers(0))
    zero, one = (pieces.tensor(f"{x}.{name}", np.array(n, np.int64)) for name, n in (("first", 0), ("next", 1)))
    places = pieces.of("Unsqueeze", pieces.of("Range", zero, steps, one), pieces.integers(0, 2))
    used = pieces.of("Less", places, pieces.of("Unsqueeze", lengths, pieces.integers(1, 2)))
    batch = pieces.of("Concat", pieces.of("Shape", x, start=0, end=2), pieces.integers(1), axis=0)
    return pieces.of("Expand", used, batch)  # one length for all rows is one for each


def masked(pieces: Pieces, name: str, node: Embedding | Masking, x: str, mask: str) -> str:
    """Put a node in that may make a mask, whose output goes by its name, and return that output's mask."""
    if isinstance(node, Masking):
        same = pieces.of("Cast", pieces.of("Equal", x, pieces.number(node.value)), to=pieces.type)
        least = pieces.of("ReduceMin", same, axes=[-1], keepdims=1)
        kept = pieces.of("Less", least, pieces.number(1.0))
        pieces.put("Where", [kept, x, pieces.number(0.0)], name)
        return both(pieces, mask, kept)
    if mask:  # ids that are left out may be anything
        zeros = pieces.tensor(f"{name}.zero", np.array(0, np.int64))
        x = pieces.of("Where", pieces.of("Squeeze", mask, pieces.integers(2)), x, zeros)
    pieces.put("Gather", [pieces.tensor(f"{name}.table", node.table), x], name, axis=0)
    if not node.mask_zero:
        return mask
    zero = pieces.of("Equal", x, pieces.tensor(f"{name}.padding", np.array(0, np.int64)))
    return both(pieces, mask, pieces.of("Unsqueeze", pieces.of("Not", zero), pieces.integers(2)))


def pooled(pieces: Pieces, name: str, node: GlobalPool, x: str, mask: str) -> None:
    """Put a GlobalPool in whose input has a mask: a row without a step gives zeros."""
    of, zero = pieces.of, pieces.number(0.0)
    ones = of("Cast", mask, to=pieces.type)
    if node.mode == "mean":
        count = of("Max", of("ReduceSum", ones, pieces.integers(1), keepdims=0), pieces.number(1.0))
        total = of("ReduceSum", of("Where", mask, x, zero), pieces.integers(1), keepdims=0)
        pieces.put("Div", [total, count], name)
        return
    some = of("Greater", of("ReduceMax", ones, axes=[1], keepdims=0), zero)
    if node.mode == "max":
        most = of("ReduceMax", of("Where", mask, x, pieces.number(-np.inf)), axes=[1], keepdims=0)
    else:  # of each row the one step that no step used comes after
        later = of("CumSum", ones, pieces.tensor(f"{name}.axis", np.array(1, np.int64)), reverse=1)
        last = of("And", mask, of("Less", later, pieces.number(1.5)))
        most = of("ReduceSum", of("Where", last, x, zero), pieces.integers(1), keepdims=0)
    pieces.put("Where", [some, most, zero], name)


def neutral(pieces: Pieces, node: Merge, sources: Sequence[str], masks: Sequence[str]) -> list[str]:
    """Return what a Merge takes: where a value's mask leaves a step out, what changes nothing.

    Where the masks leave a step out of all values, the first one stands for what comes out: itself, or 0 of products.
    """
    if node.mode not in NEUTRAL or not any(masks):
        return list(sources)
    nothing = pieces.number(NEUTRAL[node.mode])
    taken = [pieces.of("Where", mask, x, nothing) if mask else x for mask, x in zip(masks, sources, strict=True)]
    if all(masks):
        unused = pieces.number(0.0) if node.mode == "mul" else sources[0]
        anyone = reduce(lambda one, other: pieces.of("Or", one, other), masks)
        taken[0] = pieces.of("Where", anyone, taken[0], unused)
    return taken


def used_after(pieces: Pieces, node: Node, sources: Sequence[str], masks: Sequence[str], axes: int) -> str:
    """Return the mask of what a node returns, "" where it has none.

    Args:
        pieces: the graph.
        node: any but those that `masked` puts in.
        sources: what it takes.
        masks: theirs.
        axes: how many each of them has beside the batch.
    """
    first = masks[0]
    if isinstance(node, Merge):
        if node.mode == "concat" and axes > 1 and node.place(axes) == 1:
            return pieces.of("Concat", *_full(pieces, sources, masks), axis=1) if any(masks) else ""
        return reduce(lambda one, other: pieces.of("Or", one, other), masks) if all(masks) else ""
    if not first or isinstance(node, WITHOUT):
        return ""
    if isinstance(node, Recurrent):
        return (_turned(pieces, first) if node.go_backwards else first) if node.return_sequences else ""
    if isinstance(node, Bidirectional):
        return first if node.forward.return_sequences else ""
    if isinstance(node, Select) and node.place(axes) == 1:
        return pieces.cut(first, node.taken, 1, pieces.fresh("used"))
    return first


def _turned(pieces: Pieces, mask: str) -> str:
    return pieces.cut(mask, slice(None, None, -1), 1, pieces.fresh("used"))


def _full(pieces: Pieces, sources: Sequence[str], masks: Sequence[str]) -> list[str]:
    """Return a mask for each value, all steps used where it has none."""
    full = []
    for x, mask in zip(sources, masks, strict=True):
        shape = pieces.of("Concat", pieces.of("Shape", x, start=0, end=2), pieces.integers(1), axis=0)
        full.append(mask or pieces.of("Expand", pieces.tensor("all_used", np.array(True)), shape))
    return full
