"""The one autograd op behind every LSTM: `cellstack::lstm` and its backward, registered with torch.library.

    lstm(x, h0[], c0[], weights[], recurrent_dropout[], mask?, activations[], reverse, sequences, save, threads)

runs a stack of L layers in one call of the fused kernel. Results, in order:

    h [B, H] a layer, c [B, H] a layer,
    with save: y [B, T, H] a layer, gates [B, T, 4, H] a layer, cells [B, T, H] a layer; all are differentiable,
    else, with sequences: y [B, T, H] of the top layer.

`weights` holds kernel, recurrent_kernel, bias for each layer (a bias of size 0: none). `h0` and `c0` are empty (zeros)
or have one `[B, H]` a layer; so has `recurrent_dropout`, where size 0 means none. `activations` holds two codes a layer
(positions in `cellstack.spec.ACTIVATIONS`). `threads=0` means `torch.get_num_threads()`.

The op trusts its caller: shapes and dtypes are checked once, in the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cellstack import _kernel
from cellstack.layers import eager
from cellstack.spec import ACTIVATIONS

_LIBRARY = torch.library.Library("cellstack", "DEF")
_FUNCTIONS = [eager.ACTIVATIONS[name] for name in ACTIVATIONS]

_LIBRARY.define(
    "lstm(Tensor x, Tensor[] h0, Tensor[] c0, Tensor[] weights, Tensor[] recurrent_dropout, Tensor? mask, "
    "int[] activations, bool reverse, bool sequences, bool save, int threads) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "lstm_backward(Tensor x, Tensor[] h0, Tensor[] c0, Tensor[] weights, Tensor[] recurrent_dropout, Tensor? mask, "
    "Tensor[] saved, Tensor?[] grads, int[] activations, bool reverse, bool[] wanted, int threads) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


def _plain(tensor: Tensor) -> Tensor:
    """Return `tensor` as memory has it: numbers side by side, none of them waiting to be negated."""
    return tensor.resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return `x` with its features side by side in memory; the kernel takes any strides for batch and time."""
    x = x.resolve_neg()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


# Weights may have changed since the last call, in ways that nobody hears of; so nothing packed is kept. Packing costs
# as much as a few steps of a row: calls of no more read the weights where they lie. The bits are the same.
_UNPACKED_STEPS = 4  # rows × steps


def _pack(weights: Sequence[Tensor], activation: int, recurrent_activation: int, rows_steps: int) -> tuple[Any, Any]:
    """Return the kernel's weights, and what must be kept until the call has ended."""
    flat = [_plain(weight) for weight in weights]
    kernel, recurrent_kernel, bias = flat
    packed = _kernel.Packed(
        kernel.dtype == torch.float64,
        kernel.shape[0],
        recurrent_kernel.shape[0],
        _address(kernel),
        _address(recurrent_kernel),
        _address(bias),
        activation,
        recurrent_activation,
        rows_steps > _UNPACKED_STEPS,
    )
    return packed, flat


def _forward(
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    weights: Sequence[Tensor],
    recurrent_dropout: Sequence[Tensor],
    mask: Tensor | None,
    activations: Sequence[int],
    reverse: bool,
    sequences: bool,
    save: bool,
    threads: int,
) -> list[Tensor]:
    count, (batch, steps, _) = len(weights) // 3, x.shape
    x = _rows(x)
    mask = None if mask is None else mask.contiguous()
    starts_h, starts_c, drops = ([_plain(t) for t in group] for group in (h0, c0, recurrent_dropout))
    hs, cs, ys, gates, cells, layers, kept = [], [], [], [], [], [], []
    for n in range(count):
        packed, weights_kept = _pack(
            weights[3 * n : 3 * n + 3], activations[2 * n], activations[2 * n + 1], batch * steps
        )
        kept.append(weights_kept)
        units = packed.units
        hs.append(x.new_empty(batch, units))
        cs.append(x.new_empty(batch, units))
        if save:
            gates.append(x.new_empty(batch, steps, 4, units))
            cells.append(x.new_empty(batch, steps, units))
        if save or (sequences and n == count - 1):
            ys.append(x.new_empty(batch, steps, units))
        layers.append(
            (
                packed,
                _address(starts_h[n]) if h0 else 0,
                _address(starts_c[n]) if c0 else 0,
                hs[n].data_ptr(),
                cs[n].data_ptr(),
                ys[-1].data_ptr() if ys else 0,
                gates[n].data_ptr() if save else 0,
                cells[n].data_ptr() if save else 0,
                _address(drops[n]) if drops else 0,
            )
        )
    _kernel.lstm_forward(
        batch,
        steps,
        layers,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        _address(mask),
        reverse,
        threads or torch.get_num_threads(),
    )
    return [*hs, *cs, *ys, *gates, *cells]


def _backward(
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    weights: Sequence[Tensor],
    recurrent_dropout: Sequence[Tensor],
    mask: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    activations: Sequence[int],
    reverse: bool,
    wanted: Sequence[bool],
    threads: int,
) -> list[Tensor]:
    """Return the gradients of `[x, *h0, *c0, *weights]` that are wanted, in that order, as new contiguous tensors.

    `saved` holds y, gates, cells (each a layer), `grads` the gradients of all results of the forward, None for zeros.
    """
    count, (batch, steps, _) = len(weights) // 3, x.shape
    inputs = [x, *h0, *c0, *weights]
    results = [t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True)]
    starts, at_c0, at_weights = bool(h0), 1 + len(h0), 1 + len(h0) + len(c0)
    mask = None if mask is None else mask.contiguous()
    from_above: Tensor | None = None
    for n in reversed(range(count)):
        below = _rows(x) if n == 0 else saved[n - 1]
        kernel, recurrent_kernel, _ = (_plain(weight) for weight in weights[3 * n : 3 * n + 3])
        given = [grad if grad is None else _plain(grad) for grad in grads[n::count]]
        dh, dc, dy, dgates, dcells = given
        if from_above is not None:
            dy = from_above if dy is None else dy + from_above
        lower = [*wanted[:1], *wanted[at_weights : at_weights + 3 * n]]
        if starts:
            lower += [*wanted[1 : 1 + n], *wanted[at_c0 : at_c0 + n]]
        # The gradient of the layer's input: a result for the lowest, for the others the dy of the next one.
        dx = results[0] if n == 0 else below.new_empty(below.shape) if any(lower) else None
        dweights = results[at_weights + 3 * n : at_weights + 3 * n + 3]
        start_h, start_c = (_plain(h0[n]), _plain(c0[n])) if starts else (None, None)
        drop = _plain(recurrent_dropout[n]) if recurrent_dropout else None
        _kernel.lstm_backward(
            x.dtype == torch.float64,
            batch,
            steps,
            below.shape[2],
            recurrent_kernel.shape[0],
            kernel.data_ptr(),
            recurrent_kernel.data_ptr(),
            below.data_ptr(),
            below.stride(0),
            below.stride(1),
            _address(start_h),
            _address(start_c),
            saved[n].data_ptr(),
            saved[count + n].data_ptr(),
            saved[2 * count + n].data_ptr(),
            _address(drop),
            _address(mask),
            _address(dy),
            _address(dh),
            _address(dc),
            _address(dgates),
            _address(dcells),
            _address(dx),
            _address(results[1 + n] if starts else None),
            _address(results[at_c0 + n] if starts else None),
            _address(dweights[0]),
            _address(dweights[1]),
            _address(dweights[2]),
            activations[2 * n],
            activations[2 * n + 1],
            reverse,
            threads or torch.get_num_threads(),
        )
        if dx is None:
            break
        from_above = dx
    return [result for result in results if result is not None]


def _fake_forward(
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    weights: Sequence[Tensor],
    recurrent_dropout: Sequence[Tensor],
    mask: Tensor | None,
    activations: Sequence[int],
    reverse: bool,
    sequences: bool,
    save: bool,
    threads: int,
) -> list[Tensor]:
    batch, steps, _ = x.shape
    widths = [recurrent_kernel.shape[0] for recurrent_kernel in weights[1::3]]
    finals = [x.new_empty(batch, units) for units in widths * 2]
    if not save:
        return [*finals, x.new_empty(batch, steps, widths[-1])] if sequences else finals
    ys = [x.new_empty(batch, steps, units) for units in widths]
    gates = [x.new_empty(batch, steps, 4, units) for units in widths]
    return [*finals, *ys, *gates, *(y.new_empty(y.shape) for y in ys)]


def _fake_backward(
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    weights: Sequence[Tensor],
    recurrent_dropout: Sequence[Tensor],
    mask: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    activations: Sequence[int],
    reverse: bool,
    wanted: Sequence[bool],
    threads: int,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip([x, *h0, *c0, *weights], wanted, strict=True) if want]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keep what the backward pass needs: of the inputs, which are the op's, and of its results."""
    x, h0, c0, weights, drops, mask, activations, reverse, _, save, threads = inputs
    count = len(weights) // 3
    ctx.counts = [1, len(h0), len(c0), len(weights), len(drops), int(mask is not None)]
    ctx.rest = activations, reverse, save, threads
    ctx.set_materialize_grads(False)  # gradients of gates are big and mostly absent
    ctx.save_for_backward(x, *h0, *c0, *weights, *drops, *([] if mask is None else [mask]), *output[2 * count :])


def _gradients(ctx: Any, needs: list[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients of `[x, *h0, *c0, *weights]`, None where `needs` says that none is wanted."""
    activations, reverse, save, threads = ctx.rest
    if not save:
        raise RuntimeError("cellstack::lstm was run with save=False: nothing was kept for its backward pass")
    groups, at = [], 0
    kept = ctx.saved_tensors
    for count in ctx.counts:
        groups.append(list(kept[at : at + count]))
        at += count
    (x,), h0, c0, weights, drops, masks = groups
    mask, saved = (masks[0] if masks else None), list(kept[at:])
    if torch.is_grad_enabled():  # create_graph: second derivatives go through the torch loop
        # Of views: an input may depend on another one, and that way is not for this op to differentiate.
        x, h0, c0, weights = x.view_as(x), *([t.view_as(t) for t in group] for group in (h0, c0, weights))
        functions = [_FUNCTIONS[code] for code in activations]
        outputs = eager.lstm(x, h0, c0, weights, drops, mask, functions, reverse, True, True)
        asked = zip(outputs, grads, strict=True)
        pairs = [(out, grad) for out, grad in asked if grad is not None and out.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [t for t, need in zip([x, *h0, *c0, *weights], needs, strict=True) if need],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    else:
        call = _backward if x.is_cpu and direct(x) else torch.ops.cellstack.lstm_backward
        found = call(x, h0, c0, weights, drops, mask, saved, grads, activations, reverse, needs, threads)
    queue = iter(found)
    return [next(queue) if need else None for need in needs]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1], *ctx.needs_input_grad[2], *ctx.needs_input_grad[3]]
    flat = _gradients(ctx, needs, grads)
    ends = 1, 1 + ctx.counts[1], 1 + ctx.counts[1] + ctx.counts[2]
    parts = flat[ends[0] : ends[1]], flat[ends[1] : ends[2]], flat[ends[2] :]
    return flat[0], *parts, [None] * ctx.counts[4], *[None] * 6


class _Direct(torch.autograd.Function):
    """The op without its dispatcher, for a training step that nobody watches (see `direct`).

    Tensors come flat, `[x, *h0, *c0, *weights]`; the op's other inputs come as they are.
    """

    @staticmethod
    def forward(ctx: Any, starts: int, rest: tuple[Any, ...], *flat: Tensor) -> tuple[Tensor, ...]:
        ends = 1 + starts, 1 + 2 * starts
        inputs = flat[0], flat[1 : ends[0]], flat[ends[0] : ends[1]], flat[ends[1] :], *rest
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_gradients(ctx, list(ctx.needs_input_grad[2:]), grads)


_LIBRARY.impl("lstm", _forward, "CPU")
_LIBRARY.impl("lstm_backward", _backward, "CPU")
torch.library.register_fake("cellstack::lstm", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("cellstack::lstm_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("cellstack::lstm", _differentiate, setup_context=_keep, lib=_LIBRARY)

lstm = torch.ops.cellstack.lstm.default
isa = _kernel.isa


# ── Straight to the kernel ─────────────────────────────────────────────────────────────────────────────────────────


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: only the torch loop knows these."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or forward_ad._current_level >= 0
    )


def direct(x: Tensor) -> bool:
    """Whether nobody watches a call on `x` that isn't `transformed`: no compiler, no tracer, no mode.

    Then the dispatcher, which costs a small step more than its arithmetic does, may be left out.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
    )


def run(
    x: Tensor,
    h0: list[Tensor],
    c0: list[Tensor],
    weights: list[Tensor],
    recurrent_dropout: list[Tensor],
    mask: Tensor | None,
    activations: list[int],
    reverse: bool,
    sequences: bool,
    save: bool,
) -> list[Tensor]:
    """Call the op on CPU tensors, by the shortest way that gives the same."""
    rest = recurrent_dropout, mask, activations, reverse, sequences, save, 0
    if not x.is_cpu or not direct(x):
        return lstm(x, h0, c0, weights, *rest)
    if save:
        return list(_Direct.apply(len(h0), rest, x, *h0, *c0, *weights))  # type: ignore[arg-type]
    return _forward(x, h0, c0, weights, *rest)


def step(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], activations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run one step of one layer without gradients, where `direct(x)` holds: x `[B, I]`, h and c `[B, H]` or None."""
    batch = x.shape[0]
    packed, _kept = _pack(weights, activations[0], activations[1], batch)
    x = _plain(x)  # a foreign cell's output may be a negated view
    if h is not None and c is not None:
        h, c = _plain(h), _plain(c)
    h_next, c_next = x.new_empty(batch, packed.units), x.new_empty(batch, packed.units)
    layer = (packed, _address(h), _address(c), h_next.data_ptr(), c_next.data_ptr(), 0, 0, 0, 0)
    threads = 1 if batch == 1 else torch.get_num_threads()
    _kernel.lstm_forward(batch, 1, [layer], x.data_ptr(), x.shape[1], x.shape[1], 0, False, threads)
    return h_next, c_next


# ── Dropout masks with a seed of the layer's own ───────────────────────────────────────────────────────────────────

_LIBRARY.define(
    "dropout_mask(Tensor(a!) draws, Tensor like, SymInt rows, SymInt width, float rate, int seed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dropout_mask(draws: Tensor, like: Tensor, rows: int, width: int, rate: float, seed: int) -> Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed((seed * 1_000_003 + int(draws)) % 2**63)
    draws += 1
    keep = torch.empty(rows, width, dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)


def _fake_dropout_mask(draws: Tensor, like: Tensor, rows: int, width: int, rate: float, seed: int) -> Tensor:
    return like.new_empty(rows, width)


_LIBRARY.impl("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake("cellstack::dropout_mask", _fake_dropout_mask, lib=_LIBRARY)


def dropout_mask(draws: Tensor | None, like: Tensor, rows: int, width: int, rate: float, seed: int | None) -> Tensor:
    """Draw a mask `[rows, width]` of zeros and `1/(1-rate)`.

    With a `seed`, the n-th mask is a function of the seed and n, which `draws` counts: a run can be repeated, and
    resumed where it stopped. Without one it comes from torch's own generator.
    """
    if seed is None or draws is None:
        return torch.nn.functional.dropout(like.new_ones(rows, width), rate)
    return torch.ops.cellstack.dropout_mask(draws, like.detach(), rows, width, rate, seed)
