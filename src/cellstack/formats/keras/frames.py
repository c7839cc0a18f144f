"""Applies the layers of a TimeDistributed to each step, where a step has axes itself: an image row, a word's letters.

Such steps are called frames here. They are concatenated to one long sequence. The windows of convolutions and pools
that would overlap two frames are left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

from cellstack import nodes
from cellstack.formats.keras.layer_builder import LayerBuilder, Value
from cellstack.nodes.base import Node
from cellstack.nodes.windows import pads

POINTWISE = (nodes.Activation, nodes.Clip, nodes.Dense, nodes.LayerNorm, nodes.Scale, nodes.Standardise)


def at_every_frame(build: LayerBuilder, steps: list[Node], value: Value) -> Value:
    """Apply a layer to each step of `value [B, T, …]` separately.

    Raises:
        FormatError: a layer for which this isn't supported.
    """
    for node in steps:
        if len(build.shape(value)) < 2:
            raise build.layer.refuse("expected frames [B, T, ...] of a TimeDistributed")
        if isinstance(node, POINTWISE):
            mask = value.mask if len(build.shape(value)) == 2 else None
            done = build.flat(value, partial(build.add, node))._replace(mask=mask)
        else:
            mask, done = None, _at(build, node, value)
        if mask != value.mask:
            raise build.layer.refuse("frames of several steps with a mask aren't supported")
        value = done
    return value


def _at(build: LayerBuilder, node: Node, value: Value) -> Value:
    shape = build.shape(value)
    frames, rest = shape[0], shape[1:]
    if isinstance(node, nodes.Permute) and len(node.dims) == len(rest):
        return build.permute(value, (1, *(axis + 1 for axis in node.dims)))
    numbers = prod(build.length(value, place) for place in range(2, len(shape) + 1))
    if isinstance(node, nodes.Flatten):
        return build.reshape(value, (frames, numbers))
    if isinstance(node, nodes.Reshape):
        left = numbers // prod(axis for axis in node.shape if axis != -1)
        made = [left if axis == -1 else axis for axis in node.shape]
        if prod(made) != numbers:
            raise build.layer.refuse(f"expected {numbers} numbers a frame, found the shape {made}")
        return build.reshape(value, (frames, *made))
    if isinstance(node, nodes.Embedding) and len(rest) == 1:
        return build.reshape(build.add(node, build.reshape(value, (None,))), (frames, numbers, node.table.shape[1]))
    if len(rest) == 2:
        steps, width = build.length(value, 2), build.width(value)
        if isinstance(node, nodes.Conv1D):
            return _convolved(build, node, value, steps, width)
        if isinstance(node, nodes.GlobalPool) and node.mode != "last":
            pooled = build.add(nodes.Pool1D(node.mode, steps), build.reshape(value, (None, width)))
            return build.reshape(pooled, (frames, width))
        if isinstance(node, nodes.Pool1D):
            return _pooled(build, node, value, steps, width)
    raise build.layer.refuse("this layer isn't supported within a TimeDistributed")


def _convolved(build: LayerBuilder, node: nodes.Conv1D, value: Value, steps: int, width: int) -> Value:
    """Return a convolution within each frame: that over all frames, without the windows that overlap two of them."""
    frames = build.shape(value)[0]
    before, after = pads(node.padding, steps, node.span, node.strides)
    if before or after:
        value = build.add(nodes.Pad(before, after, axis=2), value)
        steps += before + after
    if steps < node.span:
        raise build.layer.refuse(f"expected frames of at least {node.span} steps, found {steps}")
    whole = replace(node, strides=1, padding=(0, node.span - 1))
    made = build.add(whole, build.reshape(value, (None, width)))
    made = build.reshape(made, (frames, steps, node.kernel.shape[2]))
    return build.select(made, 2, slice(0, steps - node.span + 1, node.strides))


def _pooled(build: LayerBuilder, node: nodes.Pool1D, value: Value, steps: int, width: int) -> Value:
    frames, count = build.shape(value)[0], steps // node.size
    if node.strides != node.size or (node.padding == "same" and steps % node.size) or not count:
        raise build.layer.refuse("expected windows that don't overlap and fill every frame")
    value = build.select(value, 2, slice(0, count * node.size)) if steps % node.size else value
    return build.reshape(build.add(node, build.reshape(value, (None, width))), (frames, count, width))
