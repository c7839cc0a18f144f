"""Which nodes of a graph can answer after every frame, how those that keep nothing do, and which go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.graph import origin
from cellstack.nodes import Dense, Recurrent
from cellstack.nodes.masks import NamedMasks

if TYPE_CHECKING:
    from cellstack.graph import StateValue
    from cellstack.network import Network
    from cellstack.nodes.base import Array, FrameRule, Node
    from cellstack.streaming.parts import Rows, Run


def stacks(node: Any) -> bool:
    """Return whether the kernel may take a node together with those below and above it."""
    return type(node) is Dense or (type(node) is Recurrent and len(node.parts) == 1)


def beyond(node: Any) -> Callable[[Array], Array] | None:
    """Return what is left to do after the kernel: an activation that it lacks."""
    return node.beyond if isinstance(node, Dense) else None


def answers_with(node: Any, state: StateValue) -> bool:
    """Return whether a state is what the node itself answers after every frame: the h of its last cell."""
    plain = type(node) is Recurrent and state.cell == len(node.cells) - 1 and not node.parts[-1][1]
    return plain and state.part == "h"


def together(network: Network) -> list[list[tuple[str, Node, tuple[str, ...]]]]:
    """Return the nodes in their order, with names and sources; those that one call of the kernel can run, together.

    These are cells with the dense layers below, between and above them, where each value but the last goes nowhere else
    than to the next of them.
    """
    taken = (*network.outputs, *(source for sources in network.wires for source in sources))
    used = Counter(map(origin, taken))  # what a node answers and its state are one value, frame by frame
    chains: list[list[tuple[str, Node, tuple[str, ...]]]] = []
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        if chains and stacks(node) and sources == (chains[-1][-1][0],) and used[sources[0]] == 1:
            below = chains[-1][-1][1]
            if stacks(below) and not beyond(below):
                chains[-1].append((name, node, sources))
                continue
        chains.append([(name, node, sources)])
    # Dense layers alone may stand on values that have more axes than frames have.
    return [
        part
        for chain in chains
        for part in ([chain] if any(node.cells for _, node, _ in chain) else [[entry] for entry in chain])
    ]


def check_widths(network: Network, arrays: dict[str, Array]) -> None:
    """Raise `ShapeError` where a node can't take what such inputs bring to it: for widths that only a call tells.

    Args:
        network: the network.
        arrays: its inputs, frames or chunks of them; their last axes are the features, but for ids.
    """
    ids = network.graph.ids
    shapes = {
        name: network.shapes[name] if name in ids else (*network.shapes[name][:-1], array.shape[-1])
        for name, array in arrays.items()
    }
    shapes |= {state.value: network.shapes[state.value] for states in network.graph.states for state in states}
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        shapes[name] = node.check(name, *(shapes[source] for source in sources))


def framewise(owner: str, name: str, node: Node, rule: FrameRule, masked: bool) -> Run:
    """Return how a node that keeps nothing runs, frame by frame.

    Args:
        owner: who runs it, for messages.
        name: the node's.
        node: one that `answers_framewise` lets through.
        rule: how it answers frame by frame.
        masked: whether what it masks would matter to a node after it; then frames that it would mask are refused.
    """
    apply = rule.step
    assert apply is not None
    if not masked:
        return lambda rows, *values: apply(*values)

    def run(rows: Rows, x: Array) -> Array:
        used = node.kept(x)
        if not used.all():  # refused before anything has moved on
            row = int(np.argwhere(~used)[0, 0])
            raise ValueError(
                f"{owner}: expected frames without padding, got one for row {row} that {name} masks: leave it out"
            )
        return apply(x)

    return run


def frame_rules(network: Network) -> list[FrameRule]:
    """Return how each node answers frame by frame."""
    return [
        node.frames(*(network.shapes[source] for source in sources))
        for node, sources in zip(network.nodes, network.wires, strict=True)
    ]


def answers_framewise(owner: str, network: Network) -> frozenset[str]:
    """Raise `ValueError` where the network can't answer after every frame; return the nodes whose mask matters."""
    nodes = list(zip(network.names, network.nodes, network.wires, strict=True))
    begun = {start: name for name, node, sources in nodes for start in node.apart(sources)[1]}
    for name in network.inputs:
        if not network.graph.timed(name):
            shape, more = network.graph.shown(name), ""
            if name in begun:
                needs = "run the network, a step at a time where one step needs another"
                more = f", and {begun[name]} starts from it: {needs}"
            raise ValueError(f"{owner}: expected inputs of a frame a step, got {name} {shape}: it has no time{more}")
    masks: dict[str, frozenset[str] | None] = dict.fromkeys(network.inputs)  # the nodes whose mask is on a value
    heeded: set[str] = set()
    moved: str | None = None  # a node that keeps something from frame to frame
    rules = frame_rules(network)
    for name, node, sources, rule in zip(network.names, network.nodes, network.wires, rules, strict=True):
        why = rule.why_not
        if sources[0] in network.graph.ids and not node.takes_ids:
            why = "it takes some of all ids, or moves them, and a stream has one at a time"
        if node.takes_ids and sources[0] not in network.inputs:
            why = "it takes a vector of ids that the network makes, and answers with a sequence"
        if why is None and moved and node.makes_mask and not node.takes_ids:
            why = f"it may mask a frame after {moved} has moved on"
        if why is None and node.apart(sources)[1]:
            why = (
                f"it starts from {', '.join(node.apart(sources)[1])}, and a stream's cells go on from their own state: "
                "run the network, a step at a time where it must be"
            )
        for state in network.graph.states[len(masks) - len(network.inputs)]:
            if why is None and not answers_with(node, state):
                why = f"it hands on its state {state.value}, which a stream has after a chunk, not after every frame"
        if why is not None:
            raise ValueError(f"{owner}: expected nodes that can answer after every frame, got {name}: {why}")
        on = [masks.get(source) for source in sources]  # a state has none
        if node.heeds_mask:
            heeded.update(*(mask for mask in on if mask))
        masks[name] = node.mask_after(on, len(network.shapes[sources[0]]), NamedMasks(name))
        if node.cells or rule.memory:
            moved = moved or name
    return frozenset(heeded)
