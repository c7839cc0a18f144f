"""Changes graphs of `torch.export` that PyTorch's exporter to ONNX would write wrongly, or with more operators."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

ATEN = torch.ops.aten
SLICE, VIEW = ATEN.slice.Tensor, ATEN.view.default
PLACES = "nn_module_stack", "stack_trace"  # what PyTorch notes of a node's module, and of the line of its source
WHOLE = (0, sys.maxsize), (None, sys.maxsize)  # starts and ends of slices of all entries


def corrected(graph: Graph) -> None:
    """Change what the exporter would write with another meaning, or with more operators.

    - A squeeze of an axis that is longer than 1 keeps it: a copy.
    - Rounding an integer, which ONNX doesn't, keeps it.
    - The end of a slice such as `x[..., :-n]` may be 0 at other sizes, where code has a branch for it: the size less n.
    - Integer bounds of a clamp of floats become floats: the exporter refuses one bound of each type.
    - An entry of a list that splits a tensor is taken from the tensor: ONNX has another type for lists.
    - Operators that consist of one, `item` and `to`, are that one: the exporter would record the graph again for them,
      as it would for `detach_`, which each `torch.tensor` in the code ends with.
    - A size that became fixed while the module was recorded is a tensor where it is an operand, as the exporter asks.
    - A view of a view is one view; a view of the same shape, and a slice of all entries, are the tensor itself.
    """
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            as_entry(graph, node)
        elif node.target is VIEW and _is_unchanged(node) and _keeps_shape(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is VIEW and node.args[0].target is VIEW and _is_unchanged(node.args[0].args[0]):
            node.args = node.args[0].args[0], node.args[1]
        elif node.target is SLICE and node.args[2:] in WHOLE and _is_unchanged(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is SLICE and getattr((*node.args, None)[3], "target", "") is operator.neg:
            x, axis, start, minus = node.args
            size = x.meta["val"].shape[axis]
            given = _before(node, ATEN.sym_size.int, (x, axis), size)
            end = _before(node, operator.sub, (given, minus.args[0]), size - minus.args[0].meta["val"])
            node.args = x, axis, start, end
        elif node.target is ATEN.clamp.default and node.args[0].meta["val"].is_floating_point():
            node.args = node.args[0], *(float(one) if isinstance(one, int) else one for one in node.args[1:])
        elif node.target is ATEN.item.default:
            node.target = ATEN._local_scalar_dense.default
        elif node.target is ATEN._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is ATEN.detach_.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is ATEN.to.dtype and len(node.args) == 2:
            x, dtype = node.args
            if x.meta["val"].dtype is dtype:
                node.target, node.args = ATEN.alias.default, (x,)
            else:
                node.target, node.args, node.kwargs = ATEN._to_copy.default, (x,), {"dtype": dtype}
        elif node.target in (math.ceil, math.floor) and isinstance(node.args[0].meta["val"], (int, torch.SymInt)):
            node.replace_all_uses_with(node.args[0])
        elif node.target is ATEN.squeeze.dim:
            value, axis = node.args
            size = value.meta["val"].shape[axis]
            if not isinstance(size, int) or size != 1:
                node.target, node.args = ATEN.clone.default, (value,)
        elif isinstance(node.target, OpOverload):
            _with_tensors(node)


def _before(node: Node, target: Any, args: tuple[Any, ...], value: Any, **kwargs: Any) -> Node:
    """Insert an operator of the same module and line before a node: the exporter warns of one that is in no module."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args, kwargs)
    made.meta = {"val": value, **{key: node.meta[key] for key in PLACES if key in node.meta}}
    return made


def _with_tensors(node: Any) -> None:
    """Let an operator of tensors take a tensor where it takes a size that became fixed."""
    for place, (one, taken) in enumerate(zip(node.args, node.target._schema.arguments, strict=False)):
        if (
            isinstance(one, Node)
            and isinstance(taken.type, torch.TensorType)
            and isinstance(size := one.meta["val"], (int, torch.SymInt))
            and str(size).isdigit()
        ):
            value = node.meta["val"].new_empty((), dtype=torch.int64)
            node.update_arg(place, _before(node, ATEN.scalar_tensor.default, (one,), value, dtype=torch.int64))


def _keeps_shape(view: Any) -> bool:
    ours, theirs = view.meta["val"].shape, view.args[0].meta["val"].shape
    return len(ours) == len(theirs) and all(map(statically_known_true, map(operator.eq, ours, theirs)))


def _is_unchanged(node: Node) -> bool:
    """Whether no operator changes a tensor in place, such as `transpose_`."""
    return not any(user.target._schema.is_mutable for user in node.users if isinstance(user.target, OpOverload))


def as_entry(graph: Graph, node: Any) -> None:
    """Make an entry of a list that splits a tensor a `select` or a `slice`; other nodes stay."""
    whole, n = node.args
    if not isinstance(whole, Node) or not whole.args:
        return
    given: Any = (*whole.args, 0, 0)
    x, count, axis = given[:3]
    if whole.target is ATEN.unbind.int:
        target, args = ATEN.select.int, (x, count, n)
    elif whole.target is ATEN.split_with_sizes.default and all(isinstance(size, int) for size in count):
        target, args = SLICE, (x, axis, sum(count[:n]), sum(count[: n + 1]))
    elif whole.target is ATEN.split.Tensor and isinstance(count, int):
        target, args = SLICE, (x, axis, n * count, (n + 1) * count)
    elif whole.target is ATEN.chunk.default and isinstance(size := x.meta["val"].shape[axis], int):
        width = math.ceil(size / count)
        target, args = SLICE, (x, axis, n * width, (n + 1) * width)
    else:
        return
    node.replace_all_uses_with(_before(node, target, args, node.meta["val"]))
    graph.erase_node(node)
    if not whole.users:
        graph.erase_node(whole)
