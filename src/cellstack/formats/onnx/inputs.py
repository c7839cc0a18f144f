"""What the inputs of a graph are: data, initial states, lengths of rows, or weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cellstack.formats.onnx.cells import is_recurrent
from cellstack.formats.onnx.decomposed.scans import is_scan
from cellstack.formats.onnx.file import Scope, declared, live_nodes

MOVES = {
    "Cast", "Concat", "Dropout", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


def roles(scope: Scope) -> tuple[set[str], set[str]]:
    """Return the inputs that hold only initial states, and those that hold the rows' lengths."""
    starts: set[str] = set()
    lengths: set[str] = set()
    given = set(scope.given)
    for node in scope.graph.node:
        if is_scan(node):
            starts.update(_behind(scope, given, node.input[:-1]))
        elif is_recurrent(node):
            starts.update(_behind(scope, given, node.input[5:7]))
            lengths.update(_behind(scope, given, node.input[4:5]))
    takers: dict[str, list[Any]] = {}
    live = live_nodes(scope)  # the replaced nodes of decomposed cells are still there, but dead
    for node in scope.graph.node:
        for name in set(node.input) if id(node) in live else ():
            takers.setdefault(name, []).append(node)
    return {name for name in starts if _starts_alone(takers, name)}, lengths - starts


def _starts_alone(takers: dict[str, list[Any]], name: str) -> bool:
    """Whether an input reaches, through moves only, nothing but the initial states of operators."""
    waiting, seen = [name], {name}
    while waiting:
        value = waiting.pop()
        for node in takers.get(value, ()):
            at = [place for place, taken in enumerate(node.input) if taken == value]
            if node.op_type == "Shape":
                continue
            if is_scan(node) or is_recurrent(node):
                places = range(len(node.input) - 1) if is_scan(node) else (5, 6)
                if not set(at) <= set(places):
                    return False
            elif node.op_type in MOVES:
                waiting += [one for one in node.output if one not in seen]
                seen.update(node.output)
            else:
                return False
    return True


def weight_inputs(scope: Scope) -> set[str]:
    """Return the inputs without a default that recurrent operators use as weights."""
    given = set(scope.given)
    nodes = [node for node in scope.graph.node if is_recurrent(node)]
    return {name for node in nodes for name in _behind(scope, given, [*node.input[1:4], *node.input[7:]])}


def _behind(scope: Scope, given: set[str], names: Sequence[str]) -> Iterator[str]:
    """Yield the inputs from which values derive through moves only."""
    waiting, seen = [name for name in names if name], set[str]()
    while waiting:
        name = waiting.pop()
        node = None if name in given else scope.producers.get(name)
        if name in given:
            yield name
        elif node is not None and node.input and node.op_type in MOVES and name not in seen:
            waiting += node.input if node.op_type == "Concat" else node.input[:1]
        seen.add(name)


def data_inputs(scope: Scope) -> list[str]:
    """Return the data inputs of a graph: neither initial states, nor lengths, nor single numbers."""
    starts, lengths = roles(scope)
    given = [value for value in scope.graph.input if value.name not in scope.initializers]
    return [value.name for value in given if value.name not in starts | lengths and declared(value) != []]
