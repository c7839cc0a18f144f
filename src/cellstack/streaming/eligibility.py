"""Which nodes of a graph can run step by step, and how nodes without a state do so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.nodes import Bidirectional, GlobalPool, Recurrent
from cellstack.nodes.masks import NamedMasks

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.network.graph import StateValue
    from cellstack.nodes.base import Array, Node, StepRule
    from cellstack.streaming.parts import Rows, Run


def equals_output(node: Any, state: StateValue) -> bool:
    """Return whether a state equals the node's output at every step: the h of its last cell."""
    plain = type(node) is Recurrent and state.cell == len(node.cells) - 1 and not node.parts[-1][1]
    return plain and state.part == "h"


def check_widths(network: Network, arrays: dict[str, Array]) -> None:
    """Raise `ShapeError` if a node can't take its input, for widths that are known only in a call.

    Args:
        network: the network.
        arrays: its inputs, one step or a chunk; their last axes are the features, except for ids.
    """
    ids = network.graph.ids
    shapes = {
        name: network.shapes[name] if name in ids else (*network.shapes[name][:-1], array.shape[-1])
        for name, array in arrays.items()
    }
    shapes |= {state.value: network.shapes[state.value] for states in network.graph.states for state in states}
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        shapes[name] = node.check(name, *(shapes[source] for source in sources))


def step_function(owner: str, name: str, node: Node, rule: StepRule, masked: bool) -> Run:
    """Return the function that runs a node without a state, step by step.

    Args:
        owner: the function or class, for error messages.
        name: the node's name.
        node: a node that `check_streamable` accepts.
        rule: how it runs step by step.
        masked: whether its mask affects later nodes; steps that it masks are then refused.
    """
    apply = rule.step
    assert apply is not None
    if not masked:
        return lambda rows, *values: apply(*values)

    def run(rows: Rows, x: Array) -> Array:
        used = node.kept(x)
        if not used.all():  # before any state has changed
            row = int(np.argwhere(~used)[0, 0])
            raise ValueError(f"{owner}: {name} masks a step of row {row}: leave padding out of the stream")
        return apply(x)

    return run


def step_rules(network: Network) -> list[StepRule]:
    """Return how each node runs step by step."""
    return [
        node.step_rule(*(network.shapes[source] for source in sources))
        for node, sources in zip(network.nodes, network.wires, strict=True)
    ]


def check_streamable(owner: str, network: Network) -> frozenset[str]:
    """Raise `ValueError` if the network can't run step by step; return the nodes whose masks affect later nodes."""
    nodes = list(zip(network.names, network.nodes, network.wires, strict=True))
    begun = {start: name for name, node, sources in nodes for start in node.apart(sources)[1]}
    for name in network.inputs:
        if not network.graph.timed(name):
            shape, more = network.graph.shown(name), ""
            if name in begun:
                more = f". It is the initial state of {begun[name]}: call run() instead, one step at a time if needed"
            raise ValueError(f"{owner}: expected inputs with a time axis, got {name} {shape}{more}")
    masks: dict[str, frozenset[str] | None] = dict.fromkeys(network.inputs)  # the nodes that mask each value
    heeded: set[str] = set()
    moved: str | None = None  # the first node with a state
    refused: dict[str, list[str]] = {}  # nodes by the reason
    rules = step_rules(network)
    for name, node, sources, rule in zip(network.names, network.nodes, network.wires, rules, strict=True):
        why = rule.why_not
        if sources[0] in network.graph.ids and not node.takes_ids:
            why = "it selects or moves ids of a sequence, and a stream has one id at a time"
        if node.takes_ids and sources[0] not in network.inputs:
            why = "it takes a vector of ids that the network computes, and returns a sequence"
        if why is None and moved and node.makes_mask and not node.takes_ids:
            why = f"it may mask a step after the state of {moved} has changed"
        if why is None and node.apart(sources)[1]:
            why = (
                f"it starts from {', '.join(node.apart(sources)[1])}, and a stream's cells continue from their own "
                "state: call run() instead, one step at a time if needed"
            )
        for state in network.graph.states[len(masks) - len(network.inputs)]:
            if why is None and not equals_output(node, state):
                why = f"its state {state.value} is an input of a node or an output, which only run() supports"
        if why is not None:
            refused.setdefault(why, []).append(name)
        on = [masks.get(source) for source in sources]  # a state has none
        if node.heeds_mask:
            heeded.update(*(mask for mask in on if mask))
        masks[name] = node.mask_after(on, len(network.shapes[sources[0]]), NamedMasks(name))
        if node.cells or node.memory or rule.memory:
            moved = moved or name
    if refused:
        parts = [f"{', '.join(names)} can't run step by step: {why}" for why, names in refused.items()]
        raise ValueError(f"{owner}: {'; '.join(parts)}{_advice(network, rules)}")
    return frozenset(heeded)


def _advice(network: Network, rules: Sequence[StepRule]) -> str:
    """Return what to do with a network of which some nodes need whole sequences."""
    whole = [node for node, rule in zip(network.nodes, rules, strict=True) if rule.why_not is not None]
    if not whole:
        return ""
    if not network.metadata.get("task") or not all(isinstance(node, (GlobalPool, Bidirectional)) for node in whole):
        return "; it runs whole sequences only: net(x), cellstack run"
    how = ["without `bidirectional=True`"] if any(isinstance(node, Bidirectional) for node in whole) else []
    how += ["with `pooling='last'`"] if any(isinstance(node, GlobalPool) for node in whole) else []
    return f"; train {' and '.join(how)} for a network that can be streamed"
