"""Which nodes of a graph can answer after every frame, how those that keep nothing do, and which go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.nodes import Conv1D, Dense, Embedding, GlobalPool, Masking, Merge, Recurrent, Select
from cellstack.nodes.base import Array, Node

Run = Callable[..., Array]  # of a node: the lengths beside B and W, () or (T,), then what comes in


def stacks(node: Any) -> bool:
    """Return whether the kernel may take a node together with those below and above it."""
    return type(node) is Dense or (type(node) is Recurrent and len(node.parts) == 1)


def beyond(node: Any) -> Callable[[Array], Array] | None:
    """Return what is left to do after the kernel: an activation that it hasn't."""
    return node.beyond if isinstance(node, Dense) else None


def together(network: Network) -> list[list[tuple[str, Node, tuple[str, ...]]]]:
    """Return the nodes in their order, with names and sources; those that one call of the kernel can run, together.

    These are cells with the dense layers below, between and above them, where each value but the last goes nowhere else
    than to the next of them.
    """
    used = Counter((*network.outputs, *(source for sources in network.wires for source in sources)))
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
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        shapes[name] = node.check(name, *(shapes[source] for source in sources))


def framewise(name: str, node: Node, masked: bool) -> Run | None:
    """Return how a node that keeps nothing runs, frame by frame; None where it keeps something.

    Args:
        name: the node's, for messages.
        node: one that `answers_framewise` lets through.
        masked: whether what it masks would matter to a node after it; then frames that it would mask are refused.
    """
    if isinstance(node, (Recurrent, Conv1D)):
        return None
    if isinstance(node, Embedding):
        return _unmasked(name, node.apply, lambda x: node.ids(x) != 0) if masked else _step_by_step(node.apply)
    if isinstance(node, Masking):
        return _unmasked(name, node.apply, node.kept) if masked else _step_by_step(node.apply)
    if isinstance(node, Merge):
        return _step_by_step(replace(node, axis=-1).merge)
    if isinstance(node, Select):
        return _step_by_step(replace(node, axis=-1).apply)
    if isinstance(node, GlobalPool) or node.axes[1] != node.axes[0]:  # the last step; or one axis made of one
        return lambda steps, x: x
    return _step_by_step(node.apply)


def _step_by_step(apply: Callable[..., Array]) -> Run:
    return lambda steps, *values: apply(*values)


def _unmasked(name: str, apply: Callable[[Array], Array], kept: Callable[[Array], NDArray[np.bool_]]) -> Run:
    """Return how a node runs whose mask matters: it refuses what it would mask, before anything has moved on."""

    def run(steps: tuple[int, ...], x: Array) -> Array:
        used = kept(x)
        if not used.all():
            row = int(np.argwhere(~used)[0, 0])
            raise ValueError(
                f"Stream: expected frames without padding, got one for row {row} that {name} masks: leave it out"
            )
        return apply(x)

    return run


def answers_framewise(owner: str, network: Network) -> frozenset[str]:
    """Raise `ValueError` where the network can't answer after every frame; return the nodes whose mask matters."""
    for name in network.inputs:
        if not network.graph.timed(name):
            shape = network.graph.shown(name)
            raise ValueError(f"{owner}: expected inputs of a frame a step, got {name} {shape}: it has no time")
    masks: dict[str, frozenset[str]] = {name: frozenset() for name in network.inputs}  # whose mask is on a value
    felt: set[str] = set()
    moved: str | None = None  # a node that keeps something from frame to frame
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        why = node.why_no_stream(len(network.shapes[sources[0]]))
        if sources[0] in network.graph.ids and not isinstance(node, Embedding):
            why = "it takes some of all ids, or moves them, and a stream has one at a time"
        if isinstance(node, Embedding) and sources[0] not in network.inputs:
            why = "it takes a vector of ids that the network makes, and answers with a sequence"
        if why is None and moved and isinstance(node, Masking):
            why = f"it may mask a frame after {moved} has moved on"
        if why is not None:
            raise ValueError(f"{owner}: expected nodes that can answer after every frame, got {name}: {why}")
        on = [masks[source] for source in sources]
        together = frozenset().union(*on)
        if isinstance(node, (Recurrent, GlobalPool)) or (isinstance(node, Merge) and node.mode in ("mul", "max")):
            felt |= together
        if isinstance(node, Conv1D) or not all(on):
            together = frozenset()
        if isinstance(node, Masking) or (isinstance(node, Embedding) and node.mask_zero):
            together |= {name}
        masks[name] = together
        if isinstance(node, Recurrent) or (isinstance(node, Conv1D) and node.span > 1):
            moved = moved or name
    return frozenset(felt)
