"""A graph that is being rewritten before it becomes a Network."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from cellstack.network.graph import origin, state_of
from cellstack.nodes import Node
from cellstack.nodes.base import Shape

MOST_COPIED = 1 << 24  # numbers, of weights that several nodes share


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
        self._rewritten: dict[tuple[Any, ...], tuple[Any, Node | None]] = {}
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

    def rewritten(self, node: Node, *others: Any, make: Callable[[], Node | None]) -> Node | None:
        """Return a node with rewritten weights, made once for all places that share it; None = don't rewrite it.

        Args:
            node: the node whose weights are rewritten; it may occur in several places.
            others: everything else that the result depends on.
            make: makes the new node.
        """
        key = (id(node), *(id(other) if isinstance(other, Node) else other for other in others))
        if key not in self._rewritten:
            if self._uses[id(node)] > 1:  # the weights, shared until now, are copied
                self._copied += node.parameters
                if self._copied > MOST_COPIED:
                    return None
            self._rewritten[key] = ((node, *others), make())  # kept alive, so that no other node gets their ids
        rewritten = self._rewritten[key][1]
        self._uses[id(rewritten)] += 1
        return rewritten
