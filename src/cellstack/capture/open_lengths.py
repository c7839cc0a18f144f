"""Opens the lengths of a graph of `torch.export` that its code fixed, as `zeros(x.shape[1])` does after a loop.

The module is recorded again with one more unit along each axis whose length became fixed. A number that is then another
one is taken for a sum of multiples of these lengths, and computed from the sizes of the inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from cellstack.cells.errors import FormatError

SIZE = torch.ops.aten.sym_size.int
SCAN = torch.ops.higher_order.scan
DIFFERENT = "its code runs other operators at another length"

Number = Callable[[tuple[int, ...]], Node]


def open_lengths(graphs: Sequence[GraphModule], places: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> None:
    """Compute the numbers of a graph that aren't the same in others from the sizes of its inputs.

    Args:
        graphs: the graph, and the same recorded with one more unit along each of `places`.
        places: the inputs, an axis of each, and the entries that are a unit of its length.
        lengths: the lengths of these in the graph, in units.
    """
    graph, known = graphs[0].graph, dict[tuple[int, ...], Node]()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    after = inputs[-1].next

    def add(target: Any, *args: Any) -> Node:
        with graph.inserting_before(after):
            return graph.call_function(target, args)

    def number(values: tuple[int, ...]) -> Node:
        """Return a number that is `values[0]` in the graph, and in the others `values[1:]`."""
        if values not in known:
            made: Any = None
            rest = values[0]
            for value, (n, axis, unit), length in zip(values[1:], places, lengths, strict=True):
                if share := value - values[0]:
                    size = add(SIZE, inputs[n], axis)
                    size = add(operator.floordiv, size, unit) if unit > 1 else size
                    part = add(operator.mul, size, share) if share != 1 else size
                    made, rest = part if made is None else add(operator.add, made, part), rest - share * length
            known[values] = add(operator.add, made, rest) if rest else made
        return known[values]

    _compare(graphs, number)


def _compare(graphs: Sequence[GraphModule], number: Number) -> None:
    """Replace the numbers of a graph that aren't the same in others by what `number` returns of all."""
    every = [list(one.graph.nodes) for one in graphs]
    index = [{node: n for n, node in enumerate(nodes)} for nodes in every]
    if len({len(nodes) for nodes in every}) > 1:
        raise FormatError(DIFFERENT)
    for row in zip(*every, strict=True):
        leaves, (structure, *structures) = zip(*(tree_flatten((node.args, node.kwargs)) for node in row), strict=True)
        kinds = {(node.op, node.meta.get("constant", node.target)) for node in row if node.op != "placeholder"}
        if len(kinds) > 1 or any(one != structure for one in structures):
            raise FormatError(DIFFERENT)
        args, kwargs = tree_unflatten([_same(values, index, number) for values in zip(*leaves, strict=True)], structure)
        if row[0].target is SCAN:
            args = *args[:3], (*args[3], *_within(row, graphs, number))
        row[0].args, row[0].kwargs = args, kwargs


def _same(values: tuple[Any, ...], index: Sequence[dict[Node, int]], number: Number) -> Any:
    """Return an argument that is the same in all graphs, or a number in its place."""
    if all(type(one) is int for one in values):
        return values[0] if len(set(values)) == 1 else number(values)
    pairs = zip(values, index, strict=True)
    if len({known.get(one, one) if isinstance(one, Node) else one for one, known in pairs}) > 1:
        raise FormatError(DIFFERENT)
    return values[0]


def _within(row: Sequence[Any], graphs: Sequence[GraphModule], number: Number) -> list[Node]:
    """Replace the numbers of a loop's step by inputs; return these."""
    steps: list[Any] = [getattr(made, str(node.args[0].target)) for node, made in zip(row, graphs, strict=True)]
    inputs, made = dict[Node, Node](), steps[0].graph
    last = [node for node in made.nodes if node.op == "placeholder"][-1]

    def given(values: tuple[int, ...]) -> Node:
        outer = number(values)
        if outer not in inputs:
            with made.inserting_before(last.next):
                inputs[outer] = made.placeholder(f"n_{len(inputs)}")
        return inputs[outer]

    _compare(steps, given)
    steps[0].recompile()
    return list(inputs)
