"""Decides which nodes run together in one call of the kernel, for runs, `net(x)`, streams, traces and `plan()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

from cellstack.network.graph import Graph, origin
from cellstack.nodes.base import KernelLayers, Node
from cellstack.nodes.recurrent import Recurrent


class PlannedCall(NamedTuple):
    """A unit of execution: one node, or consecutive nodes that run in one call of the kernel.

    Attributes:
        nodes: the indices of its nodes, in order.
        node: the node; for several nodes of cells, one node with all these cells.
        sources: the names of its inputs.
        layers: what the kernel runs; None if it doesn't run these nodes, or each for itself only.
    """

    nodes: tuple[int, ...]
    node: Node
    sources: tuple[str, ...]
    layers: KernelLayers | None = None


class PlannedCalls:
    """The calls of a network, in order: for whole sequences, for single steps, and for the whole network.

    In one call, threads can work on different layers, and no values are stored between them. The bits are the same.

    Args:
        nodes: the nodes in the order of execution.
        names: their names.
        graph: their wiring.
        patched: the names of the nodes with patches.
    """

    def __init__(self, nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph, patched: Iterable[str]) -> None:
        self._nodes, self._names, self._graph, self._patched = nodes, names, graph, frozenset(patched)

    @cached_property
    def sequences(self) -> tuple[PlannedCall, ...]:
        """The calls of a run over sequences, with masks, resets and states: consecutive cells are joined."""

        def joins(call: PlannedCall, below: KernelLayers, above: KernelLayers, name: str) -> bool:
            if not (below.only_cells and above.only_cells) or below.last_step or below.zeros_at_masked or above.reverse:
                return False  # a backward node reverses its sequence, so only the lowest may run backwards
            # Patches above a backward node count the steps of its output, which is in reverse order.
            return len(call.sources) == 1 and not (below.reverse and name in self._patched)

        return tuple(
            call
            if call.layers is None or len(call.nodes) == 1
            else call._replace(node=Recurrent.of_layers(call.layers))
            for call in self._joined(joins)
        )

    @cached_property
    def steps(self) -> tuple[PlannedCall, ...]:
        """The calls for single steps and chunks of steps, as in a stream, which include dense layers around states."""

        def joins(call: PlannedCall, below: KernelLayers, above: KernelLayers, name: str) -> bool:
            return not ((below.has_memories and above.has_cells) or (below.has_cells and above.has_memories))

        # Step by step, the output of a node and its state are the same value.
        calls = self._joined(joins, origin)
        return tuple(
            part
            for call in calls
            for part in ([call] if call.layers and call.layers.has_states else self._separate(call))
        )

    @cached_property
    def whole(self) -> KernelLayers | None:
        """The network as one call over sequences without masks and initial states; None if that isn't possible."""
        if any(node.memory is not None for node in self._nodes):
            return None

        def joins(call: PlannedCall, below: KernelLayers, above: KernelLayers, name: str) -> bool:
            return not above.reverse and not (below.last_step and above.has_cells)

        first, *others = self._joined(joins)
        layers, graph = first.layers, self._graph
        chain = not others and len(first.sources) == len(graph.inputs) == 1 and graph.outputs == self._names[-1:]
        if not chain or self._patched or layers is None or layers.reverse or layers.finish or len(layers.groups) > 1:
            return None
        return layers

    def _joined(
        self,
        joins: Callable[[PlannedCall, KernelLayers, KernelLayers, str], bool],
        value: Callable[[str], str] = str,
    ) -> list[PlannedCall]:
        """Return the calls, given whether the next node can be part of the call below it.

        Args:
            joins: decides, from the call, its layers, and the layers and the name of the next node.
            value: returns the value that is used, from its name.
        """
        calls: list[PlannedCall] = []
        used = Counter(map(value, (*self._graph.outputs, *(name for names in self._graph.wires for name in names))))
        for number, (node, sources) in enumerate(zip(self._nodes, self._graph.wires, strict=True)):
            above, call = node.kernel_layers, calls[-1] if calls else None
            below = None if call is None else call.layers
            if call and below and above and below.finish is None and len(below.groups) == len(above.groups) == 1:
                alone = sources == (self._names[call.nodes[-1]],) and used[sources[0]] == 1
                if alone and joins(call, below, above, self._names[number]):
                    calls[-1] = call._replace(nodes=(*call.nodes, number), layers=below.then(above))
                    continue
            calls.append(PlannedCall((number,), node, sources, above))
        return calls

    def _separate(self, call: PlannedCall) -> list[PlannedCall]:
        """Return a call for each node: dense layers without cells may have inputs with more axes than the kernel's."""
        return [PlannedCall((number,), self._nodes[number], self._graph.wires[number]) for number in call.nodes]
