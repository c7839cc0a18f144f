"""The one autograd op behind every cell: `cellstack::recurrent` and its backward, registered with torch.library.

    recurrent(x, starts[], weights[], drops[], mask?, reset?, cells[], reverse, sequences, save, threads, time_major)

runs a stack of L layers in one call of the fused kernel. `cells` has a `CellCall.text` per layer; in Python, a call is
a `OpCall` record, in which it has the `CellCall` itself. Results, in order:

    final states, layer by layer: h [B, P], and the kind's other states [B, H] (`CellSpec.state_sizes`),
    with save: y [B, T, P] of every layer; gates [B, T, planes, H] of every layer; the states other than h, [B, T, H]
        each, layer by layer; intermediate values [B, T, intermediate_size] of every layer (size 0 without layer_norm
        and without a backbone). All but the intermediate values are differentiable. With recomputed gates, they and the
        gates have size 0. `by_layer` groups these by layer.
    otherwise, with sequences: y [B, T, P] of the top layer.

`starts` is empty (each layer's initial state) or has every array of the states, in the order of the results.
`weights` has the arrays of each layer in the order of `CellSpec.shapes`. `drops` is empty or has the masks of each
layer, of size 0 if absent: recurrent dropout `[B, P]`, and zoneout of each state in `Kind.zoneout`, `[B, T, P]` or
`[B, T, H]`. `mask` and `reset` are bool `[B, T]`. Where `reset` is True, the state before that step, in the order
processed, is the initial one.
`threads=0` means `torch.get_num_threads()`. With `time_major` each y is `[T, B, P]`, and the gradient of x has time
before batch in memory; everything else is the same: x is `[B, T, I]`, of any strides.

The op doesn't check its arguments: the layers check shapes and dtypes once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cellstack import native
from cellstack.layers.autocast import autocast as autocast
from cellstack.layers.autocast import uses_bfloat16
from cellstack.layers.autograd import differentiable
from cellstack.layers.autograd import recurrent as recurrent
from cellstack.layers.cell_call import CellCall as CellCall
from cellstack.layers.cell_call import OpCall as OpCall
from cellstack.layers.cell_call import Saved as Saved
from cellstack.layers.cell_call import by_layer as by_layer
from cellstack.layers.dropout_masks import dropout_mask as dropout_mask
from cellstack.layers.kernel_calls import ELEMENTS as ELEMENTS
from cellstack.layers.kernel_calls import Kept, forward, forward_each, step_of
from cellstack.layers.tracing import PLAIN as PLAIN
from cellstack.layers.tracing import direct as direct
from cellstack.layers.tracing import symbolic as symbolic
from cellstack.layers.tracing import transformed as transformed
from cellstack.layers.tracing import untraced as untraced
from cellstack.layers.tracing import wraps as wraps

isa = native.isa


def run_op(call: OpCall, keep: Kept | None = None) -> list[Tensor]:
    """Run the op on CPU tensors, without torch's dispatcher if possible.

    With `keep` direct calls without `save` pack the weights only once: the caller ensures that they don't change.
    """
    if uses_bfloat16(call.x):
        call = call._replace(cells=[cell.in_bf16 for cell in call.cells])
    if not call.x.is_cpu or not direct(call.x):
        return recurrent(*call.as_op())
    return differentiable(call) if call.save else forward(call, keep)


def run_each(calls: Sequence[OpCall], keeps: Sequence[Kept | None]) -> list[list[Tensor]]:
    """Run independent calls over the same x as `run` does; without gradients, at the same time where that is faster."""
    x = calls[0].x
    if len(calls) == 1 or any(call.save for call in calls) or not x.is_cpu or not direct(x):
        return [run_op(call, keep) for call, keep in zip(calls, keeps, strict=True)]
    if uses_bfloat16(x):
        calls = [call._replace(cells=[cell.in_bf16 for cell in call.cells]) for call in calls]
    return forward_each(calls, keeps)


def step(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], cell: CellCall, keep: Kept | None = None
) -> tuple[Tensor, ...]:
    """Run one step of one layer without gradients, on x `[B, I]` that is `direct`, and a state or nothing."""
    return step_of(x, state, weights, cell.in_bf16 if uses_bfloat16(x) else cell, keep)
