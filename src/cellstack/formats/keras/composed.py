"""Keras's layers that take several nodes, and the states that recurrent layers return."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np

from cellstack.cells.spec import TRACES
from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short
from cellstack.formats.keras.layer_builder import LayerBuilder, Pending, Value
from cellstack.nodes import Activation, Bidirectional, GlobalPool, Recurrent, Scale
from cellstack.nodes.base import Node

Composer = Callable[[LayerBuilder, list[Node], list[Value]], Value]


def _prelu(build: LayerBuilder, nodes: list[Node], values: list[Value]) -> Value:
    """Return `max(x, 0) - alpha·max(-x, 0)`."""
    (node,), (value,) = nodes, values
    assert isinstance(node, Scale)
    shape = build.shape(value)
    shared = build.layer.config.get("shared_axes") or []
    whole = len(shape) > 1 and not {*range(1, len(shape))} <= set(shared)
    one = build.reshape(value, (prod(build.length(value, n + 1) for n in range(len(shape))),)) if whole else value

    def work(one: Value) -> Value:
        alpha = node.scale if len(node.scale) > 1 else build.constant(one, float(node.scale[0]))
        below = build.add(Activation("relu"), build.scale(one, -1.0))
        below = build.add(Scale(-alpha, np.zeros_like(alpha)), below)
        return build.merge("add", build.add(Activation("relu"), one), below)

    done = build.flat(one, work)
    return build.reshape(done, shape) if whole else done._replace(mask=value.mask)


def _over_axis(build: LayerBuilder, nodes: list[Node], values: list[Value]) -> Value:
    """Apply a node for the features to another axis."""
    (node,), (value,) = nodes, values
    axes = len(build.shape(value))
    place = build.place(build.layer.axis("axis"), axes)
    if place == axes:
        return build.flat(value, partial(build.add, node))._replace(mask=value.mask)
    return build.last(value, place, lambda one: build.flat(one, partial(build.add, node)))


def _rescaling(build: LayerBuilder, nodes: list[Node], values: list[Value]) -> Value:
    (value,) = values
    config = build.layer.config
    return build.scale(value, config.get("scale"), config.get("offset", 0.0))._replace(mask=value.mask)


def _up_sampling(build: LayerBuilder, nodes: list[Node], values: list[Value]) -> Value:
    """Repeat every step: tile the features, then reshape the copies to steps."""
    (value,) = values
    times, (steps, _) = build.layer.integer("size", 2), build.shape(value)
    wide = build.repeat(value, 2, times)
    return build.reshape(wide, (None if steps is None else steps * times, build.width(value)))


def _dot(build: LayerBuilder, nodes: list[Node], values: list[Value]) -> Value:
    """Return dot products: of two vectors, or over time if one of the two sequences has one feature."""
    layer, axes = build.layer, build.layer.config.get("axes")
    if len(values) != 2 or layer.flag("normalize"):
        raise layer.refuse("expected two values and normalize=False")
    shapes = [build.shape(value) for value in values]
    ranks = {len(shape) for shape in shapes}
    places = [build.place(axis, len(shapes[0])) for axis in (axes if isinstance(axes, list) else [axes, axes])]
    product = build.merge("mul", *values)
    if ranks == {1}:
        return build.reduce("sum", product, 1, True)
    if ranks != {2} or places != [1, 1] or 1 not in (shapes[0][1], shapes[1][1]):
        raise layer.refuse(f"axes {short(axes)} aren't supported")
    total = build.reduce("sum", product, 1, False)
    return build.reshape(total, (shapes[0][1], shapes[1][1]))


AXES = ("BatchNormalization", "LayerNormalization", "Normalization", "Softmax")  # layers that name an axis
COMPOSED: dict[str, Composer] = {
    "PReLU": _prelu,
    **dict.fromkeys(AXES, _over_axis),
    "Rescaling": _rescaling,
    "UpSampling1D": _up_sampling,
    "Dot": _dot,
}
KEEPS = ("PReLU", "Rescaling", "UpSampling1D")  # their composers handle the mask


def composer(build: LayerBuilder, values: list[Value]) -> Composer | None:
    """Return the function that builds a layer of several nodes; None if one node is enough."""
    layer, kind = build.layer, build.layer.kind
    if kind in AXES and over_features(build, values[0]):
        return None
    found = COMPOSED.get(kind)
    if found is not None and kind not in KEEPS and any(value.mask is not None for value in values):
        raise layer.refuse("its mask isn't supported")
    return found


def over_features(build: LayerBuilder, value: Value) -> bool:
    """Return whether a layer's axis is the last one; raise `FormatError` if it has none or several."""
    layer = build.layer
    axis = layer.axis("axis") if "axis" in layer.config else -1
    if axis is None:
        raise layer.refuse(f"expected one axis, found {short(layer.config['axis'])}")
    return axis == -1 or build.place(axis, len(build.shape(value))) == len(build.shape(value))


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def returned(build: LayerBuilder, node: Node, value: Value, masked: bool) -> list[Value | Pending]:
    """Return the outputs of a recurrent layer: its sequence or last step, then its states if it returns them."""
    layer = build.layer
    if isinstance(node, Recurrent):
        states = _states(build, node, value, lambda: value, masked, 0) if layer.flag("return_state") else []
        gates = TRACES[node.cells[-1].spec.kind]._fields if layer.flag("return_gates") else ()
        return [value, *states, *(partial(_no_gates, layer) for _ in gates)]
    assert isinstance(node, Bidirectional)
    whole = value
    units = node.forward.units

    def direction(taken: slice) -> Value:
        if node.merge_mode != "concat":
            raise layer.refuse("states of a Bidirectional are only supported with merge_mode concat or None")
        return build.select(value, len(build.shape(value)), taken)._replace(mask=value.mask)

    directions = [partial(direction, taken) for taken in (slice(0, units), slice(units, None))]
    outputs = directions if layer.config.get("merge_mode", "concat") is None else [value]
    if not layer.within(layer.config.get("layer"), "layer").flag("return_state"):
        return [*outputs]
    ahead = _states(build, node.forward, whole, directions[0], masked, 0)
    return [*outputs, *ahead, *_states(build, node.backward, whole, directions[1], masked, 1)]


def _no_gates(layer: Layer) -> Value:
    raise layer.refuse("a Network doesn't return the gates of every step: use net.trace(x)")


def _states(
    build: LayerBuilder, node: Recurrent, whole: Value, last: Pending, masked: bool, way: int
) -> list[Value | Pending]:
    """Return the states of a layer, cell by cell.

    Where possible, the top cell's h is taken as the step of the layer's output that is computed last, because a stream
    has that value after every step.

    Args:
        build: the layer's builder.
        node: the layer's node, or one direction of it.
        whole: the output of the layer's node.
        last: returns the output of `node`.
        masked: whether the layer's input has a mask.
        way: 0 for the forward direction, 1 for the backward one.
    """
    wires = build.builder.states[whole.wire]
    count = len(node.state_sizes)
    own = wires[:count] if way == 0 else wires[-count:]
    states = [Value(wire, state=wire) for wire in own]
    top = len(states) - len(node.cells[-1].spec.state_sizes)
    merged = build.layer.kind == "Bidirectional" and build.layer.config.get("merge_mode", "concat") not in (
        "concat",
        None,
    )

    def h() -> Value:
        if not node.return_sequences:
            found = last()
        elif way == 0:
            found = build.add(GlobalPool("last"), last())
        else:
            found = build.squeeze(build.select(last(), 1, slice(0, 1)), 1)
        return found._replace(state=own[top])

    started = len(build.builder.sources[whole.wire]) > 1  # with initial states it can't be streamed
    if merged or started or (masked and node.zero_output_for_mask):
        return [*states]
    return [*states[:top], h, *states[top + 1 :]]
