"""The gradient of one output number with respect to all earlier values, by the chain rule.

Every node defines its own derivative, `Node.gradients`. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.network.graph import state_of
from cellstack.nodes.base import Array, Flow, GradientError, Node, NodeRun

if TYPE_CHECKING:
    from cellstack.network import Network


def _state_gradients(name: str, node: Node, found: Mapping[str, Array]) -> list[list[Array | None]]:
    """Return the gradients of a node's states after the last step, by its cells."""
    arrays = iter([found.get(state_of(name, state)) for state in node.state_sizes])
    return [[next(arrays) for _ in cell.spec.state_sizes] for cell in node.cells]


def gradient(
    network: Network,
    flows: Mapping[str, Flow],
    records: Mapping[str, Sequence[Any]],
    output: str,
    step: int,
    unit: int,
) -> dict[str, Array]:
    """Return the gradient of one number of every row with respect to each input and each node's output.

    Args:
        network: a network without patches.
        flows: the values of inputs and nodes in a run.
        records: the records of each node's cells, or of its memory, in that run.
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
            dy, dstates = found[name], _state_gradients(name, node, found)
            given = [dy, *(one for states in dstates for one in states if one is not None)]
            if node.takes_ids or not any(one.any() for one in given):
                continue
            run = NodeRun([flows[source] for source in sources], flows[name].x, records[name])
            try:
                back = node.gradients(run, dy, dstates)
            except GradientError as why:
                raise ValueError(f"gradient: {name} ({type(node).__name__}): {why}") from None
            for source, one in zip(sources, back, strict=False):  # a state passed by the caller isn't among the sources
                if source in found:
                    found[source] = (found[source] + one).astype(found[source].dtype)
    return found
