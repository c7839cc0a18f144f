"""The gradient of one output number with respect to all earlier values, by the chain rule.

Cells use the kernel's backward pass, as in training; every other node has its rule here. Nothing is approximated: each
rule is the derivative of what the node computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native, reference, spec
from cellstack.graph import state_of
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Pad,
    Permute,
    Pool1D,
    Recurrent,
    Reduce,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
    StepMask,
)
from cellstack.nodes.base import SELU_ALPHA, SELU_SCALE, Array, Flow, Node, activation_function, padded, softmax
from cellstack.nodes.time import pads

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.recurrent import Cell, Record


class _UnsupportedError(Exception):
    """The reason why a node has no gradient."""


# ── cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


Ends = tuple[Array | None, Array | None]
"""Gradients of h and c after the last step; None where they have no gradient."""


def _through_cell(cell: Cell, record: Record, dy: Array | None, ends: Ends) -> tuple[Array, list[Array]]:
    """Return the gradients of a cell's input, and of its initial state, where one was given."""
    own = {name: native.plain(array) for name, array in cell.arrays.items()}
    weights = native.weights(cell.spec, own, copy=False)
    x = native.plain(record.x)
    batch, steps, _ = x.shape
    before = [native.plain(array) for array in record.before or ()]
    made = native.results(cell.spec, batch, steps, lambda shape: np.empty(shape, x.dtype))
    layer = native.Layer(weights, before, **made)
    sequences = native.sequences(x, record.mask, record.reset, record.reverse)
    native.forward(sequences, [layer], 1)
    dx = np.zeros_like(x)
    dbefore = [np.zeros_like(array) for array in before]
    dy, *dafter = (None if array is None else native.plain(array) for array in (dy, *ends))
    native.backward(sequences, [layer], [native.Gradients(dy, dafter, dx=dx, dbefore=dbefore)], 1)
    return dx, dbefore


def _through_stack(
    node: Recurrent, records: Sequence[Record], flow: Flow, dy: Array, ends: Sequence[Ends]
) -> tuple[Array, list[Array]]:
    """Return the gradients of a stack's input, in the order of time like `dy`, and of its initial states.

    `ends`: one per cell.
    """
    steps, at_end = flow.x.shape[1], 0 if node.go_backwards else -1
    residual = any(added for _, added in node.parts)
    dh = None
    if not node.return_sequences:
        if node.zero_output_for_mask and flow.mask is not None and steps:
            dy = np.where(flow.mask[:, at_end, None], dy, 0)
        dh, dy = dy, np.zeros((len(dy), steps, dy.shape[1]), dy.dtype)
        if residual and steps:  # the output is a sum; take its last step
            dy[:, at_end], dh = dh, None
    elif node.zero_output_for_mask and flow.mask is not None:
        dy = np.where(flow.mask[:, :, None], dy, 0)
    last, begun = len(records), []
    for cells, added in reversed(node.parts):
        passed: Any = 0
        if added:
            passed, dy = _through_sum(node, records[last - 1], dy)
        for number in reversed(range(last - len(cells), last)):
            after, dc = ends[number]
            dh = dh if after is None else after if dh is None else dh + after
            dy, before = _through_cell(node.cells[number], records[number], dy, (dh, dc))
            dh, begun = None, [*before, *begun]
        last -= len(cells)
        dy = dy + passed
    return dy, begun


def _through_sum(node: Recurrent, record: Record, dy: Array) -> tuple[Array, Array]:
    """Return the gradients of x and of h in h + x; a masked step repeats the sum of the last used one."""
    if record.mask is None:
        return dy, dy
    order, last = slice(None, None, -1 if node.go_backwards else 1), node.last_used(record.mask, record.reset)
    dy, dx = dy[:, order], np.zeros_like(dy)
    rows, steps = np.nonzero(last >= 0)
    np.add.at(dx, (rows, last[rows, steps]), dy[rows, steps])
    return dx[:, order], (dx + np.where(last[:, :, None] < 0, dy, 0))[:, order]


def _recurrent(
    node: Recurrent, records: Sequence[Record], flows: Sequence[Flow], dy: Array, ends: Sequence[Ends]
) -> list[Array]:
    turned = node.go_backwards and node.return_sequences
    dx, begun = _through_stack(node, records, flows[0], dy[:, ::-1] if turned else dy, ends)
    return [dx, *begun]


def _bidirectional(
    node: Bidirectional, records: Sequence[Record], flows: Sequence[Flow], dy: Array, ends: Sequence[Ends]
) -> list[Array]:
    flow, count = flows[0], len(node.forward.cells)
    if node.merge_mode == "concat":
        ahead, back = dy[..., : node.forward.units], dy[..., node.forward.units :]
    elif node.merge_mode == "mul":
        befores = tuple(record.before for record in records)
        ahead, _ = node.forward.forward(flow, befores[:count], 1)
        back, _ = node.backward.forward(flow, befores[count:], 1)
        ahead, back = dy * back, dy * ahead
    else:
        ahead = back = dy if node.merge_mode == "sum" else dy * dy.dtype.type(0.5)
    dx, begun = _through_stack(node.forward, records[:count], flow, ahead, ends[:count])
    other, begun_back = _through_stack(node.backward, records[count:], flow, back, ends[count:])
    return [dx + other, *begun, *begun_back]


def _ends(name: str, node: Node, found: Mapping[str, Array]) -> list[Ends]:
    """Return the gradients of a node's final states, by its cells."""
    arrays = iter([found.get(state_of(name, state)) for state in node.state_sizes])
    each = ([next(arrays) for _ in cell.spec.state_sizes] for cell in node.cells)
    return [(h, rest[0] if rest else None) for h, *rest in each]


# ── activations ───────────────────────────────────────────────────────────────────────────────────────────────────────

_sigmoid = reference.ACTIVATIONS["sigmoid"][0]


def _gelu_slope(z: Array) -> Array:
    share = np.where(z == 0, 0.5, activation_function("gelu")(z) / np.where(z == 0, 1, z))  # (1 + erf(z/sqrt 2))/2
    return share + z * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _gelu_tanh_slope(z: Array) -> Array:
    rate = np.sqrt(2 / np.pi)
    t = np.tanh(rate * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * rate * (1 + 3 * 0.044715 * z * z)


SLOPES: dict[str, Callable[[Array], Array]] = {
    "silu": lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "selu": lambda z: SELU_SCALE * np.where(z > 0, 1, SELU_ALPHA * np.exp(np.minimum(z, 0))),
    "exponential": np.exp,
    "relu6": lambda z: ((z > 0) & (z < 6)) * 1.0,
}


def _through_activation(text: str, z: Array, dy: Array) -> Array:
    """Return the gradient of an activation's input, z."""
    if text in ("softmax", "log_softmax"):
        y = softmax(z)
        total = (dy * y).sum(axis=-1, keepdims=True) if text == "softmax" else dy.sum(axis=-1, keepdims=True)
        return y * (dy - total) if text == "softmax" else dy - y * total
    if text in SLOPES:
        return dy * SLOPES[text](z)
    name, alpha, beta = spec.activation(text)
    function, slope = reference.ACTIVATIONS[name]
    return dy * slope(z, function(z, alpha, beta), alpha, beta)


# ── nodes run by NumPy: each rule gets inputs, output and the output's gradient ───────────────────────────────────────


def _dense(node: Dense, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    z = flows[0].x @ node.kernel + (0 if node.bias is None else node.bias)
    return [_through_activation(node.activation, z, dy) @ node.kernel.T]


def _clip(node: Clip, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    x = flows[0].x
    low, high = -np.inf if node.low is None else node.low, np.inf if node.high is None else node.high
    return [np.where((x > low) & (x < high), dy, 0)]


def _layer_norm(node: LayerNorm, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    x = flows[0].x
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + node.epsilon)
    unit = centred / deviation
    du = dy if node.gain is None else dy * node.gain
    return [(du - du.mean(axis=-1, keepdims=True) - unit * (du * unit).mean(axis=-1, keepdims=True)) / deviation]


def _masking(node: Masking, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    return [np.where(node.kept(flows[0].x)[..., None], dy, 0)]


def _convolution(node: Conv1D, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    x, (taps, channels, filters) = flows[0].x, node.kernel.shape
    before, after = pads(node.padding, x.shape[1], node.span, node.strides)
    wide = padded(x, before, after, 0.0)
    count, each = y.shape[1], filters // node.groups
    starts = np.arange(count) * node.strides
    whole = (
        node
        if node.activation == "linear"
        else Conv1D(node.kernel, node.bias, node.strides, node.padding, node.dilation, node.groups)
    )
    dz = dy if node.activation == "linear" else _through_activation(node.activation, whole.apply(x), dy)
    dwide = np.zeros_like(wide)
    for tap in range(taps):
        for group in range(node.groups):
            kernel = node.kernel[tap][:, group * each : (group + 1) * each]
            own = dz[:, :, group * each : (group + 1) * each] @ kernel.T
            # Windows overlap, but not within one tap: its steps are distinct.
            dwide[:, starts + tap * node.dilation, group * channels : (group + 1) * channels] += own
    return [dwide[:, before : before + x.shape[1]]]


def _pool(node: Pool1D, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    x, strides = flows[0].x, node.strides or 1
    steps = x.shape[1]
    before, _ = pads(node.padding, steps, node.size, strides)
    first = np.arange(y.shape[1]) * strides - before
    counts = np.maximum(np.minimum(first + node.size, steps) - np.maximum(first, 0), 1)
    dx = np.zeros_like(x)
    taken = np.zeros(y.shape, bool)  # of several maxima, the first
    for tap in range(node.size):
        inside = (first + tap >= 0) & (first + tap < steps)
        at = (first + tap)[inside]
        if node.mode == "mean":
            dx[:, at] += dy[:, inside] / counts[inside, None]
        else:
            own = (x[:, at] == y[:, inside]) & ~taken[:, inside]
            taken[:, inside] |= own
            dx[:, at] += np.where(own, dy[:, inside], 0)
    return [dx]


def _reduction(mode: str, x: Array, used: Array | None, y: Array, dy: Array, axis: int) -> Array:
    """Return the gradient of a reduction's input; y and dy keep the axis, with length 1."""
    there = np.ones(x.shape, bool) if used is None else np.broadcast_to(used, x.shape)
    if mode in ("sum", "mean"):
        count = np.maximum(there.sum(axis=axis, keepdims=True), 1) if mode == "mean" else 1
        return np.where(there, dy / count, 0)
    same = there & (x == y)
    first = same & (np.cumsum(same, axis=axis) == 1)
    return np.where(first, dy, 0)


def _reduce(node: Reduce, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    (flow,) = flows
    place = node.place(flow.x.ndim - 1)
    used = None
    if flow.mask is not None and place == 1:
        used = flow.mask.reshape(*flow.mask.shape, *(1,) * (flow.x.ndim - 2))
    y, dy = (a if node.keepdims else np.expand_dims(a, place) for a in (y, dy))
    return [_reduction(node.mode, flow.x, used, y, dy, place)]


def _global_pool(node: GlobalPool, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    (flow,) = flows
    if node.mode == "last":
        return _moved(node, flows, y, dy)
    used = None if flow.mask is None else flow.mask[:, :, None]
    return [_reduction(node.mode, flow.x, used, y[:, None], dy[:, None], 1)]


def _merge(node: Merge, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    values = [flow.x for flow in flows]
    if node.mode == "concat":
        place = node.place(y.ndim - 1)
        return np.split(dy, np.cumsum([value.shape[place] for value in values])[:-1], axis=place)
    if node.heeds_mask and any(flow.mask is not None for flow in flows):
        raise _UnsupportedError(f"{node.mode} under a mask")
    if node.mode in ("add", "ave"):
        found = [dy / (len(values) if node.mode == "ave" else 1)] * len(values)
    elif node.mode == "sub":
        found = [dy, -dy]
    elif node.mode == "mul":
        products = [[v for k, v in enumerate(values) if k != own] for own in range(len(values))]
        found = [dy * np.prod(np.broadcast_arrays(*others), axis=0) for others in products]
    else:
        taken, found = np.zeros(y.shape, bool), []
        for value in values:
            own = (value == y) & ~taken
            taken |= own
            found.append(np.where(own, dy, 0))
    return [_summed_to(one, value.shape) for one, value in zip(found, values, strict=True)]


def _summed_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over the axes along which its value was broadcast."""
    axes = tuple(axis for axis, (long, own) in enumerate(zip(gradient.shape, shape, strict=True)) if long != own)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def _moved(node: Node, flows: Sequence[Flow], y: Array, dy: Array) -> list[Array]:
    """Backpropagate through a node that only moves numbers; running it on indices shows where each number goes."""
    (flow,) = flows
    size = flow.x.size
    places = np.arange(1.0, size + 1).reshape(flow.x.shape)
    one, other = (node.run([flow._replace(x=numbers)], (), 1).x for numbers in (places, places + size))
    from_input = other - one == size  # padding doesn't change
    dx = np.zeros(size, dy.dtype)
    np.add.at(dx, (one[from_input] - 1).astype(np.int64), dy[from_input])
    return [dx.reshape(flow.x.shape)]


Rule = Callable[[Any, Sequence[Flow], Array, Array], list[Array]]

RULES: dict[type[Node], Rule] = {
    Standardise: lambda node, flows, y, dy: [dy / node.scale],
    Scale: lambda node, flows, y, dy: [dy * node.scale],
    LayerNorm: _layer_norm,
    Dense: _dense,
    Activation: lambda node, flows, y, dy: [_through_activation(node.activation, flows[0].x, dy)],
    Clip: _clip,
    Masking: _masking,
    StepMask: lambda node, flows, y, dy: [dy, np.zeros_like(flows[1].x)],
    Conv1D: _convolution,
    Pool1D: _pool,
    GlobalPool: _global_pool,
    Reduce: _reduce,
    Merge: _merge,
    **dict.fromkeys((Pad, Flatten, Reshape, Permute, Repeat, Select), _moved),
}
"""The backward rule of each node that isn't recurrent."""


def gradient(
    network: Network,
    flows: Mapping[str, Flow],
    records: Mapping[str, Sequence[Record]],
    output: str,
    step: int,
    unit: int,
) -> dict[str, Array]:
    """Return the gradient of one number of every row with respect to each input and each node's output.

    Args:
        network: a network without patches.
        flows: the values of inputs and nodes in a run.
        records: the records of each node's cells in that run.
        output: the node that returns the number.
        step: its step; -1 = the last. A vector per row has no step.
        unit: the index of the number in the step, or in the vector.

    Returns:
        An array by the name of each input and node, with the shape of its value; zeros where the number doesn't depend
        on it. Ids have none.

    Raises:
        ValueError: a node without a gradient; the message names it.
        IndexError: a step or a unit that doesn't exist.
        TypeError: a step or a unit that isn't a whole number.
    """
    dy = np.zeros_like(flows[output].x)
    if dy.ndim > 3 or dy.ndim < 2:
        raise ValueError(f"gradient: expected an output [B, T, W] or [B, W], got {list(dy.shape)} of {output}")
    for what, number, length in (("unit", unit, dy.shape[-1]), ("step", step, dy.shape[1] if dy.ndim == 3 else 1)):
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
            raise TypeError(f"gradient: expected {what} to be a whole number, got {number!r:.80}")
        if not -length <= number < length:
            raise IndexError(f"gradient: expected a {what} of {output} below {length}, got {number}")
    if dy.ndim == 3:
        dy[:, step, unit] = 1
    else:
        dy[:, unit] = 1
    found = {name: np.zeros_like(flow.x) for name, flow in flows.items() if name not in network.graph.ids}
    found[output] = dy
    entries = list(zip(network.names, network.nodes, network.wires, strict=True))
    with np.errstate(all="ignore"):  # NaN and inf propagate
        for name, node, sources in reversed(entries[: network.names.index(output) + 1]):
            ends = _ends(name, node, found)
            given = (one for one in (found[name], *(one for pair in ends for one in pair)) if one is not None)
            if isinstance(node, Embedding) or not any(one.any() for one in given):
                continue
            own, y = [flows[source] for source in sources], flows[name].x
            try:
                if isinstance(node, Recurrent):
                    back = _recurrent(node, records[name], own, found[name], ends)
                elif isinstance(node, Bidirectional):
                    back = _bidirectional(node, records[name], own, found[name], ends)
                else:
                    back = RULES[type(node)](node, own, y, found[name])
            except _UnsupportedError as why:
                raise ValueError(f"gradient: {name} ({type(node).__name__}): {why} isn't supported") from None
            for source, one in zip(sources, back, strict=False):  # a state passed by the caller isn't among the sources
                if source in found:
                    found[source] = (found[source] + one).astype(found[source].dtype)
    return found
