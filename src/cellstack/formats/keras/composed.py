"""Keras's layers that are several nodes; states that layers return beside what they return; layers at every frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np

from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short
from cellstack.formats.keras.hand import Hand, Value
from cellstack.nodes import (
    Activation,
    Bidirectional,
    GlobalPool,
    Recurrent,
    Scale,
)
from cellstack.nodes.base import Node

Composer = Callable[[Hand, list[Node], list[Value]], Value]


def _prelu(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return `max(x, 0) - alpha·max(-x, 0)`."""
    (node,), (value,) = nodes, values
    assert isinstance(node, Scale)
    shape = hand.shape(value)
    shared = hand.layer.config.get("shared_axes") or []
    whole = len(shape) > 1 and not {*range(1, len(shape))} <= set(shared)
    one = hand.reshape(value, (prod(hand.length(value, n + 1) for n in range(len(shape))),)) if whole else value

    def work(one: Value) -> Value:
        alpha = node.scale if len(node.scale) > 1 else hand.constant(one, float(node.scale[0]))
        below = hand.add(Activation("relu"), hand.scale(one, -1.0))
        below = hand.add(Scale(-alpha, np.zeros_like(alpha)), below)
        return hand.merge("add", hand.add(Activation("relu"), one), below)

    done = hand.flat(one, work)
    return hand.reshape(done, shape) if whole else done._replace(mask=value.mask)


def _relu(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return a ReLU with a greatest value m: `m - max(m - relu(x), 0)`."""
    (value,) = values
    most = hand.number(hand.layer.config.get("max_value"))
    if most == 6.0:
        return hand.activate(value, "relu6")._replace(mask=value.mask)
    below = hand.activate(hand.scale(hand.activate(value, "relu"), -1.0, most), "relu")
    return hand.scale(below, -1.0, most)._replace(mask=value.mask)


def _over_axis(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return what a node does to the features, done to another axis."""
    (node,), (value,) = nodes, values
    axes = len(hand.shape(value))
    place = hand.place(hand.layer.axis("axis"), axes)
    if place == axes:
        return hand.flat(value, partial(hand.add, node))._replace(mask=value.mask)
    return hand.last(value, place, lambda one: hand.flat(one, partial(hand.add, node)))


def _rescaling(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    (value,) = values
    config = hand.layer.config
    return hand.scale(value, config.get("scale"), config.get("offset", 0.0))


def _pair(layer: Layer, name: str) -> tuple[int, int]:
    found = layer.config.get(name)
    pair = [found, found] if type(found) is int else found
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(one) is int and 0 <= one < 2**31 for one in pair):
        raise layer.refuse(f"expected {name} at the start and the end, found {short(found)}")
    return pair[0], pair[1]


def _zero_padding(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    return hand.pad(values[0], *_pair(hand.layer, "padding"))


def _up_sampling(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return every step several times: as many copies of the features, cut into steps."""
    (value,) = values
    times, (steps, _) = hand.layer.integer("size", 2), hand.shape(value)
    wide = hand.repeat(value, 2, times)
    return hand.reshape(wide, (None if steps is None else steps * times, hand.width(value)))


def _minimum(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    return hand.merge("min", *values)


def _global(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return a pool over time that keeps the axis."""
    (node,), (value,) = nodes, values
    return hand.expand(hand.add(node, value), 1)


def _dot(hand: Hand, nodes: list[Node], values: list[Value]) -> Value:
    """Return sums of products: of two vectors, or over time where one of the two sequences is one feature wide."""
    layer, axes = hand.layer, hand.layer.config.get("axes")
    if len(values) != 2 or layer.flag("normalize"):
        raise layer.refuse("expected two values and normalize=False")
    shapes = [hand.shape(value) for value in values]
    ranks = {len(shape) for shape in shapes}
    places = [hand.place(axis, len(shapes[0])) for axis in (axes if isinstance(axes, list) else [axes, axes])]
    product = hand.merge("mul", *values)
    if ranks == {1}:
        return hand.reduce("sum", product, 1, True)
    if ranks != {2} or places != [1, 1] or 1 not in (shapes[0][1], shapes[1][1]):
        raise layer.refuse(f"axes {short(axes)} aren't what a Network has")
    total = hand.reduce("sum", product, 1, False)
    return hand.reshape(total, (shapes[0][1], shapes[1][1]))


COMPOSED: dict[str, Composer] = {
    "PReLU": _prelu,
    "ReLU": _relu,
    "Softmax": _over_axis,
    "BatchNormalization": _over_axis,
    "Rescaling": _rescaling,
    "ZeroPadding1D": _zero_padding,
    "UpSampling1D": _up_sampling,
    "Minimum": _minimum,
    "Dot": _dot,
    "GlobalMaxPooling1D": _global,
    "GlobalAveragePooling1D": _global,
}
KEEPS = ("PReLU", "ReLU", "ZeroPadding1D", "UpSampling1D")  # of these, what Keras does with a mask is done here


def composer(hand: Hand, values: list[Value]) -> Composer | None:
    """Return what makes several nodes of a layer; None where its node alone does."""
    layer, kind = hand.layer, hand.layer.kind
    if kind == "ReLU" and layer.config.get("max_value") is None:
        return None
    if kind.startswith("Global") and not layer.flag("keepdims"):
        return None
    if kind in ("Softmax", "BatchNormalization"):
        shape = hand.graph.shapes.get(values[0].wire)
        if layer.axis("axis") in (-1, None) or (shape is not None and layer.axis("axis") == len(shape)):
            return None
    found = COMPOSED.get(kind)
    if found is not None and kind not in KEEPS and any(value.mask is not None for value in values):
        raise layer.refuse("its mask isn't what a Network has")
    return found


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def returned(hand: Hand, node: Node, value: Value, masked: bool) -> list[Callable[[], Value]]:
    """Return what a recurrent layer returns: its sequence or last step, then its states where it returns them.

    Args:
        hand: of the layer.
        node: the layer's.
        value: what the node returns.
        masked: whether what it takes has a mask.
    """
    if isinstance(node, Bidirectional):
        return _both(hand, node, value, masked)
    assert isinstance(node, Recurrent)
    return [lambda: value, *_states(hand, node, lambda: value, masked, 0)]


def _states(
    hand: Hand, node: Recurrent, last: Callable[[], Value], masked: bool, step: int
) -> list[Callable[[], Value]]:
    """Return the states of a layer whose output's last step, in the order of work, is h; a node hands no c on."""

    def h() -> Value:
        if masked and node.zero_output_for_mask:
            raise hand.layer.refuse("its state after masked steps isn't what it returns")
        value = last()
        if not node.return_sequences:
            return value
        if step == 0:
            return hand.add(GlobalPool("last"), value)
        return hand.squeeze(hand.select(value, 1, slice(0, 1)), 1)

    def c() -> Value:
        raise hand.layer.refuse("expected its output or h to be taken, found a cell's state c, which a node keeps")

    if len(node.cells) != 1:
        return []
    (cell,) = node.cells
    return [h, c] if cell.spec.kind == "lstm" else [h]


def _both(hand: Hand, node: Bidirectional, value: Value, masked: bool) -> list[Callable[[], Value]]:
    units = node.forward.cells[-1].spec.units
    kept: dict[bool, Value] = {}

    def half(back: bool) -> Value:
        if node.merge_mode != "concat":
            raise hand.layer.refuse("the states of halves that are merged aren't what a Network has")
        if back not in kept:
            taken = slice(units, None) if back else slice(0, units)
            kept[back] = hand.select(value, len(hand.shape(value)), taken)._replace(mask=value.mask)
        return kept[back]

    halves = [partial(half, False), partial(half, True)]
    outputs = halves if hand.layer.config.get("merge_mode", "concat") is None else [lambda: value]
    ahead = _states(hand, node.forward, halves[0], masked, 0)
    return [*outputs, *ahead, *_states(hand, node.backward, halves[1], masked, 1)]
