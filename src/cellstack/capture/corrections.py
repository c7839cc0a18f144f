"""Changes graphs of `torch.export` that PyTorch's exporter to ONNX would write wrongly, or with more operators."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

ATEN = torch.ops.aten
SLICE, VIEW = ATEN.slice.Tensor, ATEN.view.default


def corrected(graph: Graph) -> None:
    """Change what the exporter would write with another meaning, or with more operators.

    - A squeeze of an axis that is longer than 1 keeps it: a copy.
    - Rounding an integer, which ONNX doesn't, keeps it.
    - The end of a slice such as `x[..., :-n]` may be 0 at other sizes, where code has a branch for it: the size less n.
    - An entry of a list that splits a tensor is taken from the tensor: ONNX has another type for lists.
    - A view of a view is one view.
    """
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            as_entry(graph, node)
        elif node.target is VIEW and _is_view_of_unchanged(node.args[0]):
            node.args = node.args[0].args[0], node.args[1]
        elif node.target in (math.ceil, math.floor) and isinstance(node.args[0].meta["val"], (int, torch.SymInt)):
            node.replace_all_uses_with(node.args[0])
        elif node.target is SLICE and getattr((*node.args, None)[3], "target", "") is operator.neg:
            x, axis, start, minus = node.args
            with graph.inserting_before(node):
                size = graph.call_function(ATEN.sym_size.int, (x, axis))
                end = graph.call_function(operator.sub, (size, minus.args[0]))
            size.meta["val"] = x.meta["val"].shape[axis]
            end.meta["val"] = size.meta["val"] - minus.args[0].meta["val"]
            node.args = x, axis, start, end
        elif node.target is ATEN.squeeze.dim:
            value, axis = node.args
            size = value.meta["val"].shape[axis]
            if not isinstance(size, int) or size != 1:
                node.target, node.args = ATEN.clone.default, (value,)


def _is_view_of_unchanged(node: Any) -> bool:
    """Whether a node is a view of a tensor that no operator changes in place, such as `transpose_`."""
    users = node.args[0].users if getattr(node, "target", None) is VIEW else ()
    return bool(users) and not any(
        getattr(user.target, "_schema", None) and user.target._schema.is_mutable for user in users
    )


def as_entry(graph: Graph, node: Any) -> None:
    """Make an entry of a list that splits a tensor a `select` or a `slice`; other nodes stay."""
    whole, n = node.args
    if not isinstance(whole, Node):
        return
    x, *given = whole.args or (None,)
    if whole.target is ATEN.unbind.int:
        target, args = ATEN.select.int, (x, *(given or [0]), n)
    elif whole.target is ATEN.split.Tensor and isinstance(given[0], int):
        size, axis = (*given, 0)[:2]
        target, args = SLICE, (x, axis, n * size, (n + 1) * size)
    else:
        return
    with graph.inserting_before(node):
        made = graph.call_function(target, args)
    made.meta = node.meta
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    if not whole.users:
        graph.erase_node(whole)
