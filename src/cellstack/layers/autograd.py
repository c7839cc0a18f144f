"""The op in autograd and torch.library: registration, gradients, batches of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cellstack.layers import eager
from cellstack.layers.cell_call import OpCall
from cellstack.layers.kernel_calls import backward, fake_backward, fake_forward, forward, in_columns
from cellstack.layers.tracing import batched, direct, transformed

_LIBRARY = torch.library.Library("cellstack", "DEF")

_LIBRARY.define(
    "recurrent(Tensor x, Tensor[]? starts, Tensor[] weights, Tensor[]? drops, Tensor? mask, Tensor? reset, "
    "str[] cells, bool reverse, bool sequences, bool save, int threads, bool time_major) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "recurrent_backward(Tensor x, Tensor[] starts, Tensor[] weights, Tensor[] drops, Tensor? mask, Tensor? reset, "
    "Tensor[] saved, Tensor?[] grads, str[] cells, bool reverse, bool[] wanted, int threads, bool time_major) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _of_op(
    x: Tensor,
    starts: Sequence[Tensor],
    weights: Sequence[Tensor],
    drops: Sequence[Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    cells: Sequence[str],
    reverse: bool,
    wanted: Sequence[bool],
    threads: int,
    time_major: bool,
) -> tuple[OpCall, Sequence[Tensor], Sequence[Tensor | None], Sequence[bool]]:
    """Return the arguments of `backward` from those of the op."""
    call = OpCall.of_op(x, starts, weights, drops, mask, reset, cells, reverse, True, True, threads, time_major)
    return call, saved, grads, wanted


def _dispatched(
    call: OpCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """Call the backward op with the arguments of `backward`."""
    *tensors, cells, reverse, _, _, threads, time_major = call.as_op()
    return torch.ops.cellstack.recurrent_backward(*tensors, saved, grads, cells, reverse, wanted, threads, time_major)


def _keep(ctx: Any, call: OpCall, output: Sequence[Tensor]) -> None:
    """Save what the backward pass needs of the op's inputs and results."""
    x, starts, weights, drops, mask, reset, *rest = call
    flags = [t for t in (mask, reset) if t is not None]
    ctx.counts = 1, len(starts), len(weights), len(drops), len(flags)
    ctx.rest = mask is not None, rest
    ctx.set_materialize_grads(False)  # gradients of gates are large and mostly absent
    kept = output[sum(len(cell.sizes) for cell in call.cells) :]
    ctx.save_for_backward(x, *starts, *weights, *drops, *flags, *kept)
    if call.save:
        count = len(call.cells)
        absent = [t for t in kept[count : 2 * count] if t.ndim == 1]  # recomputed gates
        ctx.mark_non_differentiable(*absent, *kept[len(kept) - count :])  # and intermediate values


def _keep_of_op(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _keep(ctx, OpCall.of_op(*inputs), output)


# ── Batches of gradients: vmap over the backward pass ─────────────────────────────────────────────────────────────────


def _picked(value: Any, dim: Any, n: int) -> Any:
    """Return the n-th entry of a batch along `dim`, for lists entry by entry; a `dim` of None: not batched."""
    if isinstance(dim, (list, tuple)):
        return [_picked(part, own, n) for part, own in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, n)


def _one_by_one(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    """Implement torch.func.vmap for `recurrent_backward`, one entry at a time."""
    call = torch.ops.cellstack.recurrent_backward
    found = [call(*_picked(inputs, dims, n)) for n in range(info.batch_size)]
    results = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return results, [0] * len(results)


def _of_each(call: Callable[[list[Tensor | None]], list[Tensor]], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Apply `call` to each entry of a batch of `grads` of torch's older vmap; return a batch of the same kind."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Unbatched gradients become a batch of one.
    each = [None if grad is None else torch._remove_batch_dim(grad, level, 1, 0) for grad in grads]  # pyright: ignore[reportPrivateImportUsage]
    sizes = {len(grad) for grad in each if grad is not None}
    found = [call([g if g is None else g[min(n, len(g) - 1)] for g in each]) for n in range(max(sizes))]
    return [torch._add_batch_dim(torch.stack(parts), 0, level) for parts in zip(*found, strict=True)]  # pyright: ignore[reportPrivateImportUsage]


# ── Gradients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _gradients(ctx: Any, needs: list[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of `[x, *starts, *weights]`, None where `needs` is False."""
    masked, rest = ctx.rest
    cells, reverse, _, save, _, time_major = rest
    if not save:
        raise RuntimeError("cellstack::recurrent ran with save=False, so it has no backward pass")
    kept = iter(ctx.saved_tensors)
    (x,), starts, weights, drops, flags = (list(islice(kept, count)) for count in ctx.counts)
    saved = list(kept)
    mask = flags.pop(0) if masked else None
    reset = flags[0] if flags else None
    graph = torch.is_grad_enabled()  # create_graph
    if graph or forward_ad._current_level >= 0:  # the torch loop computes second derivatives
        with torch.enable_grad():
            # Views, as one input may depend on another: that dependency isn't part of this op's gradient.
            x, starts, weights = x.view_as(x), *([t.view_as(t) for t in group] for group in (starts, weights))
            specs, functions = [cell.spec for cell in cells], [cell.functions for cell in cells]
            left = iter(weights)
            arrays = [a for cell in cells for a in in_columns(cell, list(islice(left, len(cell.shapes))))]
            outputs = eager.run_eagerly(x, starts, arrays, drops, mask, reset, specs, functions, reverse, True, True)
            if time_major:
                first = sum(len(cell.sizes) for cell in cells)
                ys = slice(first, first + len(specs))
                outputs[ys] = [y.transpose(0, 1) for y in outputs[ys]]
            asked = zip(outputs, grads, strict=True)
            pairs = [(out, grad) for out, grad in asked if grad is not None and out.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                [t for t, need in zip([x, *starts, *weights], needs, strict=True) if need],
                [grad for _, grad in pairs],
                create_graph=graph,
                allow_unused=True,
            )
    else:
        call = OpCall(x, starts, weights, drops, mask, reset, *rest)
        through = backward if x.is_cpu and direct(x) and not transformed() else _dispatched

        def back(grads: Sequence[Tensor | None]) -> list[Tensor]:
            return through(call, saved, grads, needs)

        several = any(grad is not None and batched(grad) for grad in grads)
        found = _of_each(back, grads) if several else back(grads)
    queue = iter(found)
    return [next(queue) if need else None for need in needs]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
    x, *flat = _gradients(ctx, needs, grads)
    starts = ctx.counts[1]
    return x, flat[:starts], flat[starts:], [None] * ctx.counts[3], *[None] * 8


class _Direct(torch.autograd.Function):
    """The op without torch's dispatcher, for training steps that nothing records (see `direct`).

    `flat` has the tensors `[x, *starts, *weights]` of the call, which may require gradients.
    """

    @staticmethod
    def forward(ctx: Any, call: OpCall, *flat: Tensor) -> tuple[Tensor, ...]:
        output = forward(call)
        _keep(ctx, call, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *_gradients(ctx, list(ctx.needs_input_grad[1:]), grads)


# Skips what `Function.apply` does for transforms of torch.func: callers have checked that none is active.
_apply: Any = super(torch.autograd.Function, _Direct).apply  # pyright: ignore[reportAttributeAccessIssue]


def differentiable(call: OpCall) -> list[Tensor]:
    """Run a call with `save`, without torch's dispatcher."""
    return list(_apply(call, call.x, *call.starts, *call.weights))


_LIBRARY.impl("recurrent", lambda *given: forward(OpCall.of_op(*given)), "CPU")
_LIBRARY.impl("recurrent_backward", lambda *given: backward(*_of_op(*given)), "CPU")


def _fake(*given: Any) -> list[Tensor]:
    return fake_forward(OpCall.of_op(*given))


def _fake_back(*given: Any) -> list[Tensor]:
    call, _, _, wanted = _of_op(*given)
    return fake_backward(call, wanted)


torch.library.register_fake("cellstack::recurrent", _fake, lib=_LIBRARY)
torch.library.register_fake("cellstack::recurrent_backward", _fake_back, lib=_LIBRARY)
torch.library.register_vmap("cellstack::recurrent_backward", _one_by_one, lib=_LIBRARY)
torch.library.register_autograd("cellstack::recurrent", _differentiate, setup_context=_keep_of_op, lib=_LIBRARY)

recurrent = torch.ops.cellstack.recurrent.default
