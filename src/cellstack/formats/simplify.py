"""Simplifies a graph before it becomes a Network, so that a model gives the same graph from every file format.

Each rule takes the graph and one node, rewrites the node together with the one before it, and returns whether it did.
A rule keeps the results, to within rounding. It applies only where no other node uses the value between the two nodes,
and where it doesn't pass a mask that the graph creates further than before.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import spec
from cellstack.graph import origin, state_of
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Flatten,
    GlobalPool,
    GridConv,
    LayerNorm,
    Merge,
    Node,
    Pad,
    Permute,
    Pool1D,
    Recurrent,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.nodes.base import Array, Shape
from cellstack.nodes.time import pads

MOST_COPIED = 1 << 24  # numbers, of weights that several nodes share
BOUNDED = {(0.0, None): "relu", (0.0, 6.0): "relu6"}  # activations that are a Clip
BY_FEATURES = ("softmax", "log_softmax")  # activations that aren't elementwise


class Draft:
    """A graph that is being rewritten: nodes by name, in an order in which they can run.

    Args:
        inputs: the inputs' shapes.
        nodes: the nodes by name; those that reach no output are dropped.
        sources: the wires that each node takes.
        outputs: names of nodes, all different.
        shapes: the shape of every value, None where it is unknown.

    Attributes:
        cells: for each node that became part of another one, that node and the index of its first cell there.
    """

    def __init__(
        self,
        inputs: dict[str, Shape | None],
        nodes: dict[str, Node],
        sources: dict[str, tuple[str, ...]],
        outputs: Sequence[str],
        shapes: dict[str, Shape | None],
    ) -> None:
        used = set(map(origin, outputs))
        for name in reversed(nodes):
            if name in used:
                used.update(map(origin, sources[name]))
        self.inputs, self.outputs, self.shapes = dict(inputs), list(outputs), dict(shapes)
        self.cells: dict[str, tuple[str, int]] = {}
        self.nodes = {name: node for name, node in nodes.items() if name in used}
        self.sources = {name: sources[name] for name in self.nodes}
        self.takers: defaultdict[str, list[str]] = defaultdict(list)
        self.masked: set[str] = set()  # values that may carry a mask that the graph creates
        for name, node in self.nodes.items():
            for source in self.sources[name]:
                self.takers[source].append(name)
            if node.makes_mask or not self.masked.isdisjoint(self.sources[name]):
                self.masked.add(name)
        self.waiting = deque(self.nodes)  # nodes to try the rules on
        self._uses = Counter(id(node) for node in self.nodes.values())
        self._made: dict[tuple[Any, ...], tuple[Any, Node | None]] = {}
        self._copied = 0

    def before(self, name: str) -> str | None:
        """Return the node before this one, if nothing else uses its value; else None."""
        (source, *others) = self.sources[name]
        alone = not others and source in self.nodes and len(self.takers[source]) == 1 and source not in self.outputs
        return source if alone else None

    def state_used(self, name: str) -> bool:
        """Return whether another node or an output uses a state of a node."""
        states = (state_of(name, state) for state in self.nodes[name].state_sizes)
        return any(self.takers.get(state) or state in self.outputs for state in states)

    def starts(self, name: str) -> bool:
        """Return whether a node's cells take their initial state from the graph."""
        return bool(self.nodes[name].apart(self.sources[name])[1])

    def fuse(self, before: str, name: str, node: Node) -> bool:
        """Replace nodes `before` and `name` by one, which keeps the name of `before`."""
        self.nodes[before], self.shapes[before] = node, self.shapes[name]
        return self._leave_out(name, before)

    def fold(self, before: str, name: str, node: Node) -> bool:
        """Replace nodes `before` and `name` by one, which keeps the name `name`."""
        (source,) = self.sources[before]
        self.nodes[name], self.sources[name] = node, (source,)
        self.takers[source] = [name if taker == before else taker for taker in self.takers[source]]
        self._remove(before)
        return True

    def bypass(self, name: str) -> bool:
        """Remove a node that changes nothing, unless it is needed as a separate output."""
        (source,) = self.sources[name]
        if name in self.outputs and (source in self.inputs or source in self.outputs):
            return False
        return self._leave_out(name, source)

    def take(self, name: str, source: str, *gone: str) -> bool:
        """Connect a node to another source; remove the nodes `gone`, and its old sources if they are no longer used."""
        taken = self.sources[name]
        self.sources[name] = (source,)
        self.takers[source].append(name)
        for one in taken:
            self.takers[one].remove(name)
        unused = [
            one
            for one in taken
            if one in self.nodes and not self.takers[one] and one not in self.outputs and not self.state_used(one)
        ]
        gone = tuple(dict.fromkeys((*gone, *unused)))
        for one in gone:
            for below in self.sources[one]:
                self.takers[below].remove(one)
                self.waiting.extend(self.takers[below])
        for one in gone:
            self._remove(one)
        return True

    def _leave_out(self, name: str, source: str) -> bool:
        """Remove a node, connect the nodes that use it to `source`, and try the rules on these again."""
        takers = self.takers.pop(name, [])
        for taker in takers:
            self.sources[taker] = tuple(source if one == name else one for one in self.sources[taker])
        self.takers[source] = [one for one in self.takers[source] if one != name] + takers
        self.outputs = [source if one == name else one for one in self.outputs]
        self.waiting.extend(takers)
        self._remove(name)
        return True

    def _remove(self, name: str) -> None:
        self.takers.pop(name, None)
        del self.nodes[name], self.sources[name]

    def made(self, node: Node, *others: Any, make: Callable[[], Node | None]) -> Node | None:
        """Return a node with rewritten weights, made once for all places that share it; None = don't rewrite it.

        Args:
            node: the node whose weights are rewritten; it may occur in several places.
            others: everything else that the result depends on.
            make: makes the new node.
        """
        key = (id(node), *(id(other) if isinstance(other, Node) else other for other in others))
        if key not in self._made:
            if self._uses[id(node)] > 1:  # the weights, shared until now, are copied
                self._copied += node.parameters
                if self._copied > MOST_COPIED:
                    return None
            self._made[key] = ((node, *others), make())  # kept alive, so that no other node gets their ids
        made = self._made[key][1]
        self._uses[id(made)] += 1
        return made


def simplify(draft: Draft) -> None:
    """Apply the rules to a graph until none applies."""
    with np.errstate(over="ignore", invalid="ignore"):  # weights that overflow aren't folded: see `_finite`
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
    if before is None or not isinstance(node, GlobalPool) or node.mode != "last" or before in draft.masked:
        return False
    recurrent = draft.nodes[before]
    if not isinstance(recurrent, Recurrent) or recurrent.zero_output_for_mask or not recurrent.return_sequences:
        return False
    return draft.fuse(before, name, replace(recurrent, return_sequences=False))


def states_alone(draft: Draft, name: str) -> bool:
    """Let a Recurrent return its last step if nothing uses its sequence but only its states."""
    node = draft.nodes[name]
    if not isinstance(node, Recurrent) or not node.return_sequences or draft.takers.get(name) or name in draft.outputs:
        return False
    draft.nodes[name] = replace(node, return_sequences=False)
    draft.shapes[name] = (node.units,)
    return True


def last_state(draft: Draft, name: str) -> bool:
    """Start cells from the state h of a Recurrent instead of from its last step, which is the same value."""
    comes, starts = draft.nodes[name].apart(draft.sources[name])
    own = {start: state_of(start, "h") for start in starts if _returns_h(draft.nodes.get(start))}
    if not own:
        return False
    for start, state in own.items():
        draft.takers[start] = [taker for taker in draft.takers[start] if taker != name]
        draft.takers[state].append(name)
    draft.sources[name] = (*comes, *(own.get(start, start) for start in starts))
    draft.waiting.extend(map(origin, own))
    return True


def _returns_h(node: Node | None) -> bool:
    """Return whether a node's output is its state h, with any mask."""
    if not isinstance(node, Recurrent) or len(node.cells) != 1:
        return False
    return not node.return_sequences and not node.zero_output_for_mask


def backwards(draft: Draft, name: str) -> bool:
    """Replace a Recurrent over a reversed sequence by one that runs in the other direction."""
    node = draft.nodes[name]
    if not isinstance(node, Recurrent) or not _reverses(draft, draft.sources[name][0]) or draft.starts(name):
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
    if not isinstance(node, Merge) or node.mode != "concat" or len(sources) != 2 or shape is None:
        return False
    if node.place(len(shape)) != len(shape) or name in draft.masked:
        return False
    ahead, back = gone = list(sources)
    if _reverses(draft, back):
        (back,) = draft.sources[back]
        gone.append(back)
    one, other = draft.nodes.get(ahead), draft.nodes.get(back)
    if not isinstance(one, Recurrent) or not isinstance(other, Recurrent):
        return False
    opposite = other.go_backwards and not one.go_backwards and draft.sources[ahead] == draft.sources[back]
    in_order = one.return_sequences == other.return_sequences == (len(gone) == 3)
    zeros = one.zero_output_for_mask == other.zero_output_for_mask <= one.return_sequences
    alone = all(len(draft.takers[wire]) == 1 and wire not in draft.outputs for wire in gone)
    alone = alone and not any(draft.state_used(one) or draft.starts(one) for one in (sources[0], back))
    if not (opposite and in_order and zeros and alone) or one.dtype != other.dtype:
        return False
    draft.nodes[name] = Bidirectional(one, other)
    draft.cells |= {ahead: (name, 0), back: (name, len(one.cells))}
    return draft.take(name, *draft.sources[ahead], *gone)


def _reverses(draft: Draft, wire: str) -> bool:
    """Return whether a value is a reversed sequence."""
    node = draft.nodes.get(wire)
    return isinstance(node, Select) and node.axis == 1 and node.taken in (slice(None, None, -1), slice(-1, None, -1))


# ── padding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def padded_before(draft: Draft, name: str) -> bool:
    """Turn zero padding of time before a convolution into its padding."""
    before, node = draft.before(name), draft.nodes[name]
    pad, shape = (None, None) if before is None else (draft.nodes[before], draft.shapes[before])
    if before is None or not isinstance(pad, Pad) or shape is None:
        return False
    if not isinstance(node, (Conv1D, GridConv)) or pad.value != 0.0 or pad.place(len(shape)) != 1:
        return False
    if isinstance(node, GridConv):
        (first, last), *others = node.padding
        if node.spread[0] > 1:
            return False
        wide = ((pad.before + first, pad.after + last), *others)
        made = draft.made(node, pad, make=lambda: replace(node, padding=wide))
        return made is not None and draft.fold(before, name, made)
    if node.padding == "same":
        return False
    first, last = pads(node.padding, 0, node.span, node.strides)
    made = draft.made(node, pad, make=lambda: replace(node, padding=(pad.before + first, pad.after + last)))
    return made is not None and draft.fold(before, name, made)


def named_padding(draft: Draft, name: str) -> bool:
    """Replace a padding of one step at the end by "same", for windows of two steps with a stride of two.

    Both give the same result for sequences of every length.
    """
    node = draft.nodes[name]
    if not isinstance(node, (Conv1D, Pool1D)) or node.padding != (0, 1) or node.strides != 2:
        return False
    span = node.span if isinstance(node, Conv1D) else node.size
    made = draft.made(node, "same", make=lambda: replace(node, padding="same")) if span == 2 else None
    if made is None:
        return False
    draft.nodes[name] = made
    return True


# ── nodes without effect ────────────────────────────────────────────────────────────────────────────────────────────


def nothing(draft: Draft, name: str) -> bool:
    """Remove a node without effect: a linear activation, a full slice, a reshape to the same shape."""
    node, (source, *_) = draft.nodes[name], draft.sources[name]
    shape, masked = draft.shapes[source], source in draft.masked
    if isinstance(node, Activation):
        does_nothing = node.activation == "linear"
    elif isinstance(node, Select):
        place = 0 if shape is None else node.place(len(shape))
        length = shape[place - 1] if shape is not None and place else None
        ends = (None,) if length is None else (None, *range(length, length + 1))
        does_nothing = node.step == 1 and node.start in (None, 0) and node.stop in ends
    elif isinstance(node, Permute):  # it drops a mask
        does_nothing = list(node.dims) == sorted(node.dims) and not masked
    elif isinstance(node, (Flatten, Reshape)):
        same = shape is not None and None not in shape and shape == draft.shapes[name]
        does_nothing = shape is not None and len(shape) == 1 if isinstance(node, Flatten) else same and not masked
    elif isinstance(node, Scale):
        known = shape is not None and shape[-1] is not None  # else only the node defines the input's width
        does_nothing = known and bool((node.scale == 1.0).all()) and not node.shift.any()
    else:
        return False
    return does_nothing and draft.bypass(name)


def permuted_back(draft: Draft, name: str) -> bool:
    """Remove a Permute and a later one that undoes it, with only elementwise activations between them."""
    node, before = draft.nodes[name], draft.before(name)
    if not isinstance(node, Permute) or before is None or name in draft.masked:
        return False
    between = []
    while before is not None and _by_number(draft.nodes[before]):
        between.append(before)
        before = draft.before(before)
    first = None if before is None else draft.nodes[before]
    if before is None or not isinstance(first, Permute) or len(first.dims) != len(node.dims):
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


def _by_number(node: Node) -> bool:
    return isinstance(node, Activation) and node.activation not in BY_FEATURES


def one_long_axis(draft: Draft, name: str) -> bool:
    """Replace a Permute by a Reshape if at most one axis of the value is longer than 1."""
    node, (source, *_) = draft.nodes[name], draft.sources[name]
    shape, after = draft.shapes[source], draft.shapes[name]
    if not isinstance(node, Permute) or shape is None or after is None:
        return False
    if sum(axis != 1 for axis in shape) > 1 or list(node.dims) == sorted(node.dims):
        return False
    draft.nodes[name] = Reshape(tuple(-1 if axis is None else axis for axis in after))
    return True


def two_shapes(draft: Draft, name: str) -> bool:
    """Keep only the last of two consecutive reshapes."""
    node, before = draft.nodes[name], draft.before(name)
    if before is None or not isinstance(node, (Flatten, Reshape)):
        return False
    first, shape = draft.nodes[before], draft.shapes[draft.sources[before][0]]
    known = shape is not None and None not in shape  # else the network would accept lengths that the first one refuses
    return isinstance(first, (Flatten, Reshape)) and known and draft.fold(before, name, node)


def pieces(draft: Draft, name: str) -> bool:
    """Replace consecutive feature slices of one value that are concatenated again by one slice."""
    node, sources = draft.nodes[name], draft.sources[name]
    cuts = [cut for source in sources if isinstance(cut := draft.nodes.get(source), Select) and cut.step == 1]
    if not isinstance(node, Merge) or node.mode != "concat" or len(cuts) < len(sources):
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
    draft.nodes[name] = Select(ends[0][0], ends[-1][1], axis=-1)
    return draft.take(name, origin)


# ── activations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def activated(draft: Draft, name: str) -> bool:
    """Move an activation into the Dense or Conv1D before it, if that has none."""
    before, node = draft.before(name), draft.nodes[name]
    if before is None or not isinstance(node, Activation):
        return False
    product = draft.nodes[before]
    if not isinstance(product, (Dense, Conv1D)) or product.activation != "linear":
        return False
    text = node.activation
    made = draft.made(product, text, make=lambda: replace(product, activation=text))
    return made is not None and draft.fuse(before, name, made)


def bounded(draft: Draft, name: str) -> bool:
    """Replace a Clip with the bounds of a ReLU or ReLU6 by that activation."""
    node = draft.nodes[name]
    text = BOUNDED.get((node.low, node.high)) if isinstance(node, Clip) else None
    if text is not None:
        draft.nodes[name] = Activation(text)
    return text is not None


def gated(draft: Draft, name: str) -> bool:
    """Replace a value times its sigmoid by a SiLU. Doesn't apply with masks, as a masked step of a product is 0."""
    node, sources = draft.nodes[name], draft.sources[name]
    if not isinstance(node, Merge) or node.mode != "mul" or len(sources) != 2 or name in draft.masked:
        return False
    for x, gate in (sources, sources[::-1]):
        of_gate = draft.nodes.get(gate)
        if isinstance(of_gate, Activation) and of_gate.activation == "sigmoid" and draft.sources[gate] == (x,):
            draft.nodes[name] = Activation("silu")
            return draft.take(name, x)
    return False


# ── scale and shift of the features ─────────────────────────────────────────────────────────────────────────────────


def scaling(node: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the scale and the shift of a node that computes x·scale + shift; None for any other node.

    Both are `[W]`, or `[1]` if they are the same for all features.
    """
    if isinstance(node, Scale):
        return node.scale.astype(np.float64), node.shift.astype(np.float64)
    if isinstance(node, Standardise) and not node.mean.any():
        return 1.0 / node.scale.astype(np.float64), np.zeros(len(node.scale))
    if isinstance(node, Activation) and node.activation not in MORE_ACTIVATIONS:
        kind, alpha, beta = spec.activation(node.activation)
        if kind == "affine":
            return np.array([alpha]), np.array([beta])
    return None


def scaled_after(draft: Draft, name: str) -> bool:
    """Fold a scale and shift, such as a batch normalisation, into the Dense or Conv1D without activation before it."""
    before, found = draft.before(name), scaling(draft.nodes[name])
    if before is None or found is None:
        return False
    product = draft.nodes[before]
    if not isinstance(product, (Dense, Conv1D)) or product.activation != "linear":
        return False
    if draft.nodes[name].dtype not in (None, product.dtype):
        return False
    scale, shift = found

    def make() -> Node | None:
        bias = shift if product.bias is None else product.bias * scale + shift
        bias = np.broadcast_to(bias, product.kernel.shape[-1:])
        keeps = product.bias is not None or bias.any() or (scale == 1.0).all()  # a shift by zeros is a bias too
        made = _finite(product.kernel.dtype, product.kernel * scale, bias)
        return None if made is None else replace(product, kernel=made[0], bias=made[1] if keeps else None)

    made = draft.made(product, "after", draft.nodes[name], make=make)
    return made is not None and draft.fuse(before, name, made)


def scaled_before(draft: Draft, name: str) -> bool:
    """Fold a scale and shift into the weights of the Dense, the Recurrent or the Conv1D without padding after it.

    A shift without a scale stays: it may centre large numbers, which nearly cancel, and is more exact by itself.
    """
    before, node = draft.before(name), draft.nodes[name]
    found = None if before is None else scaling(draft.nodes[before])
    if before is None or found is None or draft.nodes[before].dtype not in (None, node.dtype):
        return False
    scale, shift = found
    if (scale == 1.0).all():
        return False
    fits = isinstance(node, (Dense, Recurrent, Bidirectional)) or (
        isinstance(node, Conv1D) and node.padding == "valid" and node.groups == 1
    )
    if not fits:
        return False
    made = draft.made(node, "before", draft.nodes[before], make=lambda: _with_input(node, scale, shift))
    return made is not None and draft.fold(before, name, made)


def _with_input(node: Node, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Node | None:
    """Return a node whose output for `x` is that of `node` for `x·scale + shift`; None if there is none."""
    if isinstance(node, Bidirectional):
        parts = [_with_input(part, scale, shift) for part in (node.forward, node.backward)]
        return None if None in parts else replace(node, forward=parts[0], backward=parts[1])
    if isinstance(node, Recurrent):
        cell = _cell_with_input(node.cells[0], scale, shift)
        return None if cell is None else replace(node, cells=(cell, *node.cells[1:]))
    assert isinstance(node, (Dense, Conv1D))
    sums = np.broadcast_to(shift, node.kernel.shape[-2:-1]) @ node.kernel.reshape(-1, *node.kernel.shape[-2:]).sum(0)
    bias = sums if node.bias is None else node.bias + sums
    made = _finite(node.kernel.dtype, node.kernel * scale[:, None], bias)
    keeps = node.bias is not None or shift.any()
    return None if made is None else replace(node, kernel=made[0], bias=made[1] if keeps else None)


def _cell_with_input(cell: Cell, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Cell | None:
    if cell.spec.layer_norm or cell.spec.scalar or not cell.spec.use_kernel:
        return None  # normalises the kernel's product; isn't multiplied by the kernel; there is no kernel
    made = {"kernel": cell.kernel * scale[:, None]}
    description = cell.spec
    if shift.any():
        description = replace(cell.spec, use_bias=True)
        bias = np.zeros(description.shapes["bias"]) if cell.bias is None else cell.bias.astype(np.float64)
        bias[(0, ...) if bias.ndim == 2 else ...] += np.broadcast_to(shift, len(cell.kernel)) @ cell.kernel
        made["bias"] = bias
    found = _finite(cell.kernel.dtype, *made.values())
    return None if found is None else Cell(description, **{**cell.arrays, **dict(zip(made, found, strict=True))})


def _finite(dtype: np.dtype[Any], *arrays: NDArray[Any]) -> list[Array] | None:
    """Return arrays in a dtype; None if one overflows, as infinity times zero is NaN."""
    made = [array.astype(dtype) for array in arrays]
    return made if all(np.isfinite(array).all() for array in made) else None


def scaled_twice(draft: Draft, name: str) -> bool:
    """Combine two consecutive scales and shifts. A shift before a division becomes a Standardise."""
    before, second = draft.before(name), draft.nodes[name]
    if before is None or not isinstance(draft.nodes[before], Scale) or not isinstance(second, (Scale, Standardise)):
        return False
    first, found = draft.nodes[before], scaling(second)
    assert isinstance(first, Scale)
    if found is None or first.dtype != second.dtype:
        return False
    if (first.scale == 1.0).all() and first.shift.any():  # a shift may centre large numbers: see `scaled_before`
        if isinstance(second, Standardise):
            return draft.fuse(before, name, Standardise(-first.shift, second.scale))
        if not (second.scale == 1.0).all():
            return False
    scale, shift = found
    made = _finite(first.scale.dtype, first.scale * scale, first.shift * scale + shift)
    return made is not None and draft.fuse(before, name, Scale(*made))


def scaled_norm(draft: Draft, name: str) -> bool:
    """Fold a scale and shift after a layer normalisation into its gain and bias."""
    before, second = draft.before(name), draft.nodes[name]
    norm = None if before is None else draft.nodes[before]
    if before is None or not isinstance(norm, LayerNorm) or not isinstance(second, Scale):
        return False
    if norm.dtype not in (None, second.dtype):
        return False
    gain = second.scale if norm.gain is None else norm.gain * second.scale
    bias = second.shift if norm.bias is None else norm.bias * second.scale + second.shift
    made = _finite(second.scale.dtype, gain, bias)
    return made is not None and draft.fuse(before, name, LayerNorm(made[0], made[1], norm.epsilon))


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
