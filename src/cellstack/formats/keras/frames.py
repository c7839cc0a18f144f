"""What a TimeDistributed does at every step, where the step is a frame of its own: a picture's row, a word's letters.

The frames stand one after the other, as steps of one long sequence. What looks at several steps of a frame is cut so
that it never sees two frames.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

from cellstack.formats.keras.hand import MOST_COPIES, Hand, Value
from cellstack.nodes import (
    Activation,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Permute,
    Pool1D,
    Reshape,
    Scale,
    Standardise,
)
from cellstack.nodes.base import Node

POINTWISE = (Activation, Dense, LayerNorm, Scale, Standardise)


def at_every_frame(hand: Hand, nodes: list[Node], value: Value) -> Value:
    """Return what a layer makes of every step of `value [B, T, …]`, by itself.

    Args:
        hand: of the layer.
        nodes: the layer's.
        value: the frames.

    Raises:
        FormatError: a layer for which a Network has no nodes that do this.
    """
    for node in nodes:
        if len(hand.shape(value)) < 2:
            raise hand.layer.refuse("expected frames [B, T, ...] of a TimeDistributed")
        if isinstance(node, POINTWISE):
            mask = value.mask if len(hand.shape(value)) == 2 else None
            done = hand.flat(value, partial(hand.add, node))._replace(mask=mask)
        else:
            mask, done = None, _at(hand, node, value)
        if mask != value.mask:
            raise hand.layer.refuse("frames of several steps with a mask aren't what a Network has")
        value = done
    return value


def _at(hand: Hand, node: Node, value: Value) -> Value:
    shape = hand.shape(value)
    frames, rest = shape[0], shape[1:]
    if isinstance(node, Permute) and len(node.dims) == len(rest):
        return hand.permute(value, (1, *(axis + 1 for axis in node.dims)))
    numbers = prod(hand.length(value, place) for place in range(2, len(shape) + 1))
    if isinstance(node, Flatten):
        return hand.reshape(value, (frames, numbers))
    if isinstance(node, Reshape):
        left = numbers // prod(axis for axis in node.shape if axis != -1)
        made = [left if axis == -1 else axis for axis in node.shape]
        if prod(made) != numbers:
            raise hand.layer.refuse(f"expected {numbers} numbers a frame, found the shape {made}")
        return hand.reshape(value, (frames, *made))
    if isinstance(node, Embedding) and len(rest) == 1:
        return hand.reshape(hand.add(node, hand.reshape(value, (None,))), (frames, numbers, node.table.shape[1]))
    if len(rest) == 2:
        steps, width = hand.length(value, 2), hand.width(value)
        if isinstance(node, Conv1D):
            return _convolved(hand, node, value, steps, width)
        if isinstance(node, GlobalPool) and node.mode != "last":
            pooled = hand.add(Pool1D(node.mode, steps), hand.reshape(value, (None, width)))
            return hand.reshape(pooled, (frames, width))
        if isinstance(node, Pool1D):
            return _pooled(hand, node, value, steps, width)
    raise hand.layer.refuse("a layer that a Network hasn't at every step of a sequence")


def _convolved(hand: Hand, node: Conv1D, value: Value, steps: int, width: int) -> Value:
    """Return a convolution within each frame: over all of them, without the windows that see two."""
    frames = hand.shape(value)[0]
    before, after = _padding(node, steps)
    if max(before, after) > MOST_COPIES:
        raise hand.layer.refuse(f"expected at most {MOST_COPIES} steps of padding a frame, found {max(before, after)}")
    if before or after:
        zeros = hand.scale(hand.select(value, 2, slice(0, 1)), 0.0)
        value = hand.merge("concat", *[zeros] * before, value, *[zeros] * after, axis=2)
        steps += before + after
    if steps < node.span:
        raise hand.layer.refuse(f"expected frames of at least {node.span} steps, found {steps}")
    whole = replace(node, strides=1, padding=(0, node.span - 1))
    made = hand.add(whole, hand.reshape(value, (None, width)))
    made = hand.reshape(made, (frames, steps, node.kernel.shape[2]))
    return hand.select(made, 2, slice(0, steps - node.span + 1, node.strides))


def _padding(node: Conv1D, steps: int) -> tuple[int, int]:
    """Return how many zeros go before and after each frame."""
    if isinstance(node.padding, tuple):
        return node.padding
    if node.padding != "same":
        return (node.span - 1 if node.padding == "causal" else 0), 0
    missing = max(0, (-(-steps // node.strides) - 1) * node.strides + node.span - steps)
    return missing // 2, missing - missing // 2


def _pooled(hand: Hand, node: Pool1D, value: Value, steps: int, width: int) -> Value:
    frames, count = hand.shape(value)[0], steps // node.size
    if node.strides != node.size or (node.padding == "same" and steps % node.size) or not count:
        raise hand.layer.refuse("expected windows side by side within every frame")
    value = hand.select(value, 2, slice(0, count * node.size)) if steps % node.size else value
    return hand.reshape(hand.add(node, hand.reshape(value, (None, width))), (frames, count, width))
