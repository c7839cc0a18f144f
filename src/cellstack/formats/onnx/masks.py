"""Masks in ONNX, which has none: flags `[B, T, 1]` computed alongside the values, True where a step is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from cellstack.nodes import Masking

if TYPE_CHECKING:
    from cellstack.formats.onnx.pieces import Pieces
    from cellstack.nodes import Embedding, Merge


def of_lengths(pieces: Pieces, x: str, lengths: str) -> str:
    """Return the mask of an input `x [B, T, …]` from lengths `[B]`."""
    steps = pieces.of("Squeeze", pieces.of("Shape", x, start=1, end=2), pieces.integers(0))
    zero, one = (pieces.tensor(f"{x}.{name}", np.array(n, np.int64)) for name, n in (("first", 0), ("next", 1)))
    places = pieces.of("Unsqueeze", pieces.of("Range", zero, steps, one), pieces.integers(0, 2))
    used = pieces.of("Less", places, pieces.of("Unsqueeze", lengths, pieces.integers(1, 2)))
    batch = pieces.of("Concat", pieces.of("Shape", x, start=0, end=2), pieces.integers(1), axis=0)
    return pieces.of("Expand", used, batch)  # a single length applies to every row


def masked(pieces: Pieces, name: str, node: Embedding | Masking, x: str, mask: str) -> str:
    """Add a node that may create a mask, with its name as output, and return the mask, or ""."""
    if isinstance(node, Masking):
        same = pieces.of("Cast", pieces.of("Equal", x, pieces.number(node.value)), to=pieces.type)
        least = pieces.of("ReduceMin", same, axes=[-1], keepdims=1)
        kept = pieces.of("Less", least, pieces.number(1.0))
        pieces.put("Where", [kept, x, pieces.number(0.0)], name)
        return kept
    if mask:  # masked ids may have any value
        zeros = pieces.tensor(f"{name}.zero", np.array(0, np.int64))
        x = pieces.of("Where", pieces.of("Squeeze", mask, pieces.integers(2)), x, zeros)
    pieces.put("Gather", [pieces.tensor(f"{name}.table", node.table), x], name, axis=0)
    if not node.mask_zero:
        return ""
    zero = pieces.of("Equal", x, pieces.tensor(f"{name}.padding", np.array(0, np.int64)))
    return pieces.of("Unsqueeze", pieces.of("Not", zero), pieces.integers(2))


def last_used(pieces: Pieces, name: str, x: str, mask: str) -> None:
    """Add, as `name`, the last step that the mask keeps; zeros where it keeps none."""
    of, zero = pieces.of, pieces.number(0.0)
    ones = of("Cast", mask, to=pieces.type)
    later = of("CumSum", ones, pieces.tensor(f"{name}.axis", np.array(1, np.int64)), reverse=1)
    last = of("And", mask, of("Less", later, pieces.number(1.5)))  # the one without a used step after it
    taken = of("ReduceSum", of("Where", last, x, zero), pieces.integers(1), keepdims=0)
    pieces.put("Where", [_some(pieces, ones), taken, zero], name)


def _some(pieces: Pieces, ones: str, keepdims: int = 0) -> str:
    return pieces.of("Greater", pieces.of("ReduceMax", ones, axes=[1], keepdims=keepdims), pieces.number(0.0))


def reduced(pieces: Pieces, name: str, mode: str, x: str, axis: int, keepdims: bool, mask: str) -> None:
    """Add, as `name`, the sum, mean, maximum or minimum over an axis.

    Args:
        pieces: the graph.
        name: the name of the node.
        mode: `"sum"`, `"mean"`, `"max"` or `"min"`.
        x: the input.
        axis: the axis.
        keepdims: whether the axis stays, with length 1.
        mask: the mask of `x`, where the axis is time; "" = all steps count.
    """
    keep = int(keepdims)
    if not mask and mode == "sum":
        pieces.put("ReduceSum", [x, pieces.integers(axis)], name, keepdims=keep)
        return
    if not mask:
        pieces.put(f"Reduce{mode.title()}", [x], name, axes=[axis], keepdims=keep)
        return
    zero, ones = pieces.number(0.0), pieces.of("Cast", mask, to=pieces.type)
    if mode in ("sum", "mean"):
        used = pieces.of("Where", mask, x, zero)
        if mode == "sum":
            pieces.put("ReduceSum", [used, pieces.integers(1)], name, keepdims=keep)
            return
        count = pieces.of("Max", pieces.of("ReduceSum", ones, pieces.integers(1), keepdims=keep), pieces.number(1.0))
        pieces.put("Div", [pieces.of("ReduceSum", used, pieces.integers(1), keepdims=keep), count], name)
        return
    nothing = pieces.number(-np.inf if mode == "max" else np.inf)
    found = pieces.of(f"Reduce{mode.title()}", pieces.of("Where", mask, x, nothing), axes=[1], keepdims=keep)
    pieces.put("Where", [_some(pieces, ones, keep), found, zero], name)


def neutral(pieces: Pieces, node: Merge, sources: Sequence[str], masks: Sequence[str]) -> list[str]:
    """Return the inputs of a Merge, with the neutral element at each value's masked steps.

    Where all masks leave out a step, the result is the first value, or 0 for products.
    """
    if node.neutral is None or not any(masks):
        return list(sources)
    nothing = pieces.number(node.neutral)
    taken = [pieces.of("Where", mask, x, nothing) if mask else x for mask, x in zip(masks, sources, strict=True)]
    if all(masks):
        unused = pieces.number(0.0) if node.mode == "mul" else sources[0]
        taken[0] = pieces.of("Where", GraphMasks(pieces, "", sources).either(masks), taken[0], unused)
    return taken


class GraphMasks:
    """Masks as values of a graph, for use by `Node.mask_after`.

    Args:
        pieces: the graph.
        own: the mask that the node itself creates, if any.
        sources: the inputs of the node.
    """

    def __init__(self, pieces: Pieces, own: str, sources: Sequence[str]) -> None:
        self.pieces, self.own, self.sources = pieces, own, sources

    def of_node(self) -> str:
        """See `Masks`."""
        return self.own

    def both(self, one: str, other: str) -> str:
        """See `Masks`."""
        return self.pieces.of("And", one, other)

    def either(self, masks: Sequence[str]) -> str:
        """See `Masks`."""
        return reduce(lambda one, other: self.pieces.of("Or", one, other), masks)

    def join(self, masks: Sequence[str | None]) -> str:
        """See `Masks`."""
        full, pieces = [], self.pieces
        for x, mask in zip(self.sources, masks, strict=True):
            shape = pieces.of("Concat", pieces.of("Shape", x, start=0, end=2), pieces.integers(1), axis=0)
            full.append(mask or pieces.of("Expand", pieces.tensor("all_used", np.array(True)), shape))
        return pieces.of("Concat", *full, axis=1)

    def cut(self, mask: str, taken: slice) -> str:
        """See `Masks`."""
        return self.pieces.cut(mask, taken, 1, self.pieces.fresh("used"))
