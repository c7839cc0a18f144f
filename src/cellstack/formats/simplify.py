"""Simplifies a graph before it becomes a Network, so that a model gives the same graph from every file format.

Each rule takes the graph and one node, rewrites the node together with the one before it, and returns whether it did.
A rule keeps the results, to within rounding. It applies only where no other node uses the value between the two nodes,
and where it doesn't pass a mask that the graph creates further than before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from cellstack import nodes
from cellstack.formats.draft import Draft
from cellstack.formats.scaling import scaled_after, scaled_before, scaled_norm, scaled_twice
from cellstack.network.graph import origin, state_of
from cellstack.nodes.windows import pads

BOUNDED = {(0.0, None): "relu", (0.0, 6.0): "relu6"}  # activations that are a Clip
BY_FEATURES = ("softmax", "log_softmax")  # activations that aren't elementwise


def simplify(draft: Draft) -> None:
    """Apply the rules to a graph until none applies."""
    with np.errstate(over="ignore", invalid="ignore"):  # weights that overflow aren't folded: see `scaling`
        while draft.waiting:
            name = draft.waiting.popleft()
            while name in draft.nodes and any(rule(draft, name) for rule in RULES):
                pass


# ── recurrent nodes ─────────────────────────────────────────────────────────────────────────────────────────────────


def last_step(draft: Draft, name: str) -> bool:
    """Let a Recurrent before a GlobalPool("last") return its last step only.

    Doesn't apply with masks: a row that is masked entirely has no last step.
    """
    before, node = draft.before(name), draft.nodes[name]
    if before is None or not isinstance(node, nodes.GlobalPool) or node.mode != "last" or before in draft.masked:
        return False
    recurrent = draft.nodes[before]
    if not isinstance(recurrent, nodes.Recurrent) or recurrent.zero_output_for_mask or not recurrent.return_sequences:
        return False
    return draft.fuse(before, name, replace(recurrent, return_sequences=False))


def states_alone(draft: Draft, name: str) -> bool:
    """Let a Recurrent return its last step if nothing uses its sequence but only its states."""
    node = draft.nodes[name]
    if (
        not isinstance(node, nodes.Recurrent)
        or not node.return_sequences
        or draft.takers.get(name)
        or name in draft.outputs
    ):
        return False
    draft.nodes[name] = replace(node, return_sequences=False)
    draft.shapes[name] = (node.units,)
    return True


def last_state(draft: Draft, name: str) -> bool:
    """Start cells from the state h of a Recurrent instead of from its last step, which is the same value."""
    comes, starts = draft.nodes[name].apart(draft.sources[name])
    states = {start: state_of(start, "h") for start in starts if _returns_h(draft.nodes.get(start))}
    if not states:
        return False
    for start, state in states.items():
        draft.takers[start] = [taker for taker in draft.takers[start] if taker != name]
        draft.takers[state].append(name)
    draft.sources[name] = (*comes, *(states.get(start, start) for start in starts))
    draft.waiting.extend(map(origin, states))
    return True


def _returns_h(node: nodes.Node | None) -> bool:
    """Return whether a node's output is its state h, with any mask."""
    if not isinstance(node, nodes.Recurrent) or len(node.cells) != 1:
        return False
    return not node.return_sequences and not node.zero_output_for_mask


def backwards(draft: Draft, name: str) -> bool:
    """Replace a Recurrent over a reversed sequence by one that runs in the other direction."""
    node = draft.nodes[name]
    if not isinstance(node, nodes.Recurrent) or not _reverses(draft, draft.sources[name][0]) or draft.starts(name):
        return False
    (source,) = draft.sources[draft.sources[name][0]]
    draft.nodes[name] = replace(node, go_backwards=not node.go_backwards)
    return draft.take(name, source)


def both_ways(draft: Draft, name: str) -> bool:
    """Replace two concatenated Recurrents that run over one sequence in both directions by a Bidirectional.

    Doesn't apply with masks that the graph creates. For a mask that the caller passes, the file defines nothing, so
    the rule of a Bidirectional is used: the outputs of masked steps are zeros.
    """
    node, shape, sources = draft.nodes[name], draft.shapes[name], draft.sources[name]
    if not isinstance(node, nodes.Merge) or node.mode != "concat" or len(sources) != 2 or shape is None:
        return False
    if node.place(len(shape)) != len(shape) or name in draft.masked:
        return False
    ahead, back = gone = list(sources)
    if _reverses(draft, back):
        (back,) = draft.sources[back]
        gone.append(back)
    one, other = draft.nodes.get(ahead), draft.nodes.get(back)
    if not isinstance(one, nodes.Recurrent) or not isinstance(other, nodes.Recurrent):
        return False
    opposite = other.go_backwards and not one.go_backwards and draft.sources[ahead] == draft.sources[back]
    in_order = one.return_sequences == other.return_sequences == (len(gone) == 3)
    zeros = one.zero_output_for_mask == other.zero_output_for_mask <= one.return_sequences
    alone = all(len(draft.takers[wire]) == 1 and wire not in draft.outputs for wire in gone)
    alone = alone and not any(draft.state_used(one) or draft.starts(one) for one in (sources[0], back))
    if not (opposite and in_order and zeros and alone) or one.dtype != other.dtype:
        return False
    draft.nodes[name] = nodes.Bidirectional(one, other)
    draft.cells |= {ahead: (name, 0), back: (name, len(one.cells))}
    return draft.take(name, *draft.sources[ahead], *gone)


def _reverses(draft: Draft, wire: str) -> bool:
    """Return whether a value is a reversed sequence."""
    node = draft.nodes.get(wire)
    return (
        isinstance(node, nodes.Select) and node.axis == 1 and node.taken in (slice(None, None, -1), slice(-1, None, -1))
    )


# ── padding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def padded_before(draft: Draft, name: str) -> bool:
    """Turn zero padding of time before a convolution into its padding."""
    before, node = draft.before(name), draft.nodes[name]
    pad, shape = (None, None) if before is None else (draft.nodes[before], draft.shapes[before])
    if before is None or not isinstance(pad, nodes.Pad) or shape is None:
        return False
    if not isinstance(node, (nodes.Conv1D, nodes.GridConv)) or pad.value != 0.0 or pad.place(len(shape)) != 1:
        return False
    if isinstance(node, nodes.GridConv):
        (first, last), *others = node.padding
        if node.spread[0] > 1:
            return False
        wide = ((pad.before + first, pad.after + last), *others)
        padded = draft.rewritten(node, pad, make=lambda: replace(node, padding=wide))
        return padded is not None and draft.fold(before, name, padded)
    if node.padding == "same":
        return False
    first, last = pads(node.padding, 0, node.span, node.strides)
    padded = draft.rewritten(node, pad, make=lambda: replace(node, padding=(pad.before + first, pad.after + last)))
    return padded is not None and draft.fold(before, name, padded)


def named_padding(draft: Draft, name: str) -> bool:
    """Replace a padding of one step at the end by "same", for windows of two steps with a stride of two.

    Both give the same result for sequences of every length.
    """
    node = draft.nodes[name]
    if not isinstance(node, (nodes.Conv1D, nodes.Pool1D)) or node.padding != (0, 1) or node.strides != 2:
        return False
    span = node.span if isinstance(node, nodes.Conv1D) else node.size
    padded = draft.rewritten(node, "same", make=lambda: replace(node, padding="same")) if span == 2 else None
    if padded is None:
        return False
    draft.nodes[name] = padded
    return True


# ── nodes without effect ────────────────────────────────────────────────────────────────────────────────────────────


def nothing(draft: Draft, name: str) -> bool:
    """Remove a node without effect: a linear activation, a full slice, a reshape to the same shape."""
    node, (source, *_) = draft.nodes[name], draft.sources[name]
    shape, masked = draft.shapes[source], source in draft.masked
    if isinstance(node, nodes.Activation):
        does_nothing = node.activation == "linear"
    elif isinstance(node, nodes.Select):
        place = 0 if shape is None else node.place(len(shape))
        length = shape[place - 1] if shape is not None and place else None
        ends = (None,) if length is None else (None, *range(length, length + 1))
        does_nothing = node.step == 1 and node.start in (None, 0) and node.stop in ends
    elif isinstance(node, nodes.Permute):  # it drops a mask
        does_nothing = list(node.dims) == sorted(node.dims) and not masked
    elif isinstance(node, (nodes.Flatten, nodes.Reshape)):
        same = shape is not None and None not in shape and shape == draft.shapes[name]
        does_nothing = shape is not None and len(shape) == 1 if isinstance(node, nodes.Flatten) else same and not masked
    elif isinstance(node, nodes.Scale):
        known = shape is not None and shape[-1] is not None  # else only the node defines the input's width
        does_nothing = known and bool((node.scale == 1.0).all()) and not node.shift.any()
    else:
        return False
    return does_nothing and draft.bypass(name)


def permuted_back(draft: Draft, name: str) -> bool:
    """Remove a Permute and a later one that undoes it, with only elementwise activations between them."""
    node, before = draft.nodes[name], draft.before(name)
    if not isinstance(node, nodes.Permute) or before is None or name in draft.masked:
        return False
    between = []
    while before is not None and _by_number(draft.nodes[before]):
        between.append(before)
        before = draft.before(before)
    first = None if before is None else draft.nodes[before]
    if before is None or not isinstance(first, nodes.Permute) or len(first.dims) != len(node.dims):
        return False
    if [first.dims[axis - 1] for axis in node.dims] != sorted(node.dims):
        return False
    (source,) = draft.sources[before]
    if name in draft.outputs and not between and (source in draft.inputs or source in draft.outputs):
        return False
    shape = draft.shapes[source]
    draft.bypass(name)
    draft.bypass(before)
    for one in between:
        draft.shapes[one] = shape
    return True


def _by_number(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Activation) and node.activation not in BY_FEATURES


def one_long_axis(draft: Draft, name: str) -> bool:
    """Replace a Permute by a Reshape if at most one axis of the value is longer than 1."""
    node, (source, *_) = draft.nodes[name], draft.sources[name]
    shape, after = draft.shapes[source], draft.shapes[name]
    if not isinstance(node, nodes.Permute) or shape is None or after is None:
        return False
    if sum(axis != 1 for axis in shape) > 1 or list(node.dims) == sorted(node.dims):
        return False
    draft.nodes[name] = nodes.Reshape(tuple(-1 if axis is None else axis for axis in after))
    return True


def two_shapes(draft: Draft, name: str) -> bool:
    """Keep only the last of two consecutive reshapes."""
    node, before = draft.nodes[name], draft.before(name)
    if before is None or not isinstance(node, (nodes.Flatten, nodes.Reshape)):
        return False
    first, shape = draft.nodes[before], draft.shapes[draft.sources[before][0]]
    known = shape is not None and None not in shape  # else the network would accept lengths that the first one refuses
    return isinstance(first, (nodes.Flatten, nodes.Reshape)) and known and draft.fold(before, name, node)


def pieces(draft: Draft, name: str) -> bool:
    """Replace consecutive feature slices of one value that are concatenated again by one slice."""
    node, sources = draft.nodes[name], draft.sources[name]
    cuts = [cut for source in sources if isinstance(cut := draft.nodes.get(source), nodes.Select) and cut.step == 1]
    if not isinstance(node, nodes.Merge) or node.mode != "concat" or len(cuts) < len(sources):
        return False
    (origin, *others), shape = {draft.sources[source][0] for source in sources}, draft.shapes[name]
    whole = draft.shapes[origin]
    if others or shape is None or whole is None or whole[-1] is None or node.place(len(shape)) != len(shape):
        return False
    if any(cut.place(len(whole)) != len(whole) for cut in cuts):
        return False
    ends = [cut.taken.indices(whole[-1]) for cut in cuts]
    if any(one[1] != other[0] for one, other in pairwise(ends)):
        return False
    draft.nodes[name] = nodes.Select(ends[0][0], ends[-1][1], axis=-1)
    return draft.take(name, origin)


# ── activations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def activated(draft: Draft, name: str) -> bool:
    """Move an activation into the Dense or Conv1D before it, if that has none."""
    before, node = draft.before(name), draft.nodes[name]
    if before is None or not isinstance(node, nodes.Activation):
        return False
    product = draft.nodes[before]
    if not isinstance(product, (nodes.Dense, nodes.Conv1D)) or product.activation != "linear":
        return False
    text = node.activation
    fused = draft.rewritten(product, text, make=lambda: replace(product, activation=text))
    return fused is not None and draft.fuse(before, name, fused)


def bounded(draft: Draft, name: str) -> bool:
    """Replace a Clip with the bounds of a ReLU or ReLU6 by that activation."""
    node = draft.nodes[name]
    text = BOUNDED.get((node.low, node.high)) if isinstance(node, nodes.Clip) else None
    if text is not None:
        draft.nodes[name] = nodes.Activation(text)
    return text is not None


def gated(draft: Draft, name: str) -> bool:
    """Replace a value times its sigmoid by a SiLU. Doesn't apply with masks, as a masked step of a product is 0."""
    node, sources = draft.nodes[name], draft.sources[name]
    if not isinstance(node, nodes.Merge) or node.mode != "mul" or len(sources) != 2 or name in draft.masked:
        return False
    for x, gate in (sources, sources[::-1]):
        of_gate = draft.nodes.get(gate)
        if isinstance(of_gate, nodes.Activation) and of_gate.activation == "sigmoid" and draft.sources[gate] == (x,):
            draft.nodes[name] = nodes.Activation("silu")
            return draft.take(name, x)
    return False


RULES: tuple[Callable[[Draft, str], bool], ...] = (
    scaled_after,
    nothing,
    one_long_axis,
    permuted_back,
    two_shapes,
    pieces,
    last_step,
    states_alone,
    last_state,
    backwards,
    both_ways,
    padded_before,
    named_padding,
    bounded,
    gated,
    activated,
    scaled_twice,
    scaled_norm,
    scaled_before,
)
