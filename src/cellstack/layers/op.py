"""The one autograd op behind every cell: `cellstack::recurrent` and its backward, registered with torch.library.

    recurrent(x, starts[], weights[], drops[], mask?, reset?, cells[], reverse, sequences, save, threads, time_major)

runs a stack of L layers in one call of the fused kernel. `cells` has one `CellSpec.text` per layer, which these
functions extend, in this order: `with_torch_layout` for weights in the layout of PyTorch's modules;
`with_recomputed_gates` to recompute gates and norms in the backward pass instead of saving them; `with_bfloat16` to
round the factors of products to bfloat16 in the forward and the backward pass. Results, in order:

    final states, layer by layer: h [B, P], and an LSTM's c [B, H],
    with save, per layer: y [B, T, P], gates [B, T, planes, H], cells [B, T, H] (size 0 except for an LSTM),
        norms [B, T, norm_size] (size 0 without layer_norm); all but norms are differentiable; with recomputed gates,
        gates and norms have size 0,
    otherwise, with sequences: y [B, T, P] of the top layer.

`starts` is empty (each layer's initial state) or has every array of the states, in the order of the results.
`weights` has the arrays of each layer in the order of `CellSpec.shapes`. `drops` is empty or has three masks per layer,
of size 0 if absent: recurrent dropout `[B, P]`, zoneout of h `[B, T, P]` and of c `[B, T, H]`. `mask` and `reset` are
bool `[B, T]`. Where `reset` is True, the state before that step, in the order processed, is the initial one.
`threads=0` means `torch.get_num_threads()`. With `time_major` each y is `[T, B, P]`, and the gradient of x has time
before batch in memory; everything else is the same: x is `[B, T, I]`, of any strides.

The op doesn't check its arguments: the layers check shapes and dtypes once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cellstack import native
from cellstack.layers import eager
from cellstack.layers.memory import Reused
from cellstack.spec import ARRAYS, CellSpec, ShapeError, described

_LIBRARY = torch.library.Library("cellstack", "DEF")

_LIBRARY.define(
    "recurrent(Tensor x, Tensor[] starts, Tensor[] weights, Tensor[] drops, Tensor? mask, Tensor? reset, str[] cells, "
    "bool reverse, bool sequences, bool save, int threads, bool time_major) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "recurrent_backward(Tensor x, Tensor[] starts, Tensor[] weights, Tensor[] drops, Tensor? mask, Tensor? reset, "
    "Tensor[] saved, Tensor?[] grads, str[] cells, bool reverse, bool[] wanted, int threads, bool time_major) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Form(NamedTuple):
    """A parsed entry of `cells`, cached with the values that every call needs."""

    spec: CellSpec
    rows: bool  # whether the weights are in PyTorch's layout
    recomputes: bool  # whether the backward pass recomputes gates and norms
    bfloat16: bool  # whether the factors of products are rounded to bfloat16
    description: Any  # the kernel's object
    names: tuple[str, ...]  # of the weights
    shapes: tuple[tuple[int, ...], ...]  # of the weights
    at: tuple[int, ...]  # the position of each of the cell's arrays in ARRAYS
    sizes: tuple[int, ...]  # of the state's arrays
    width: int  # of h
    functions: list[eager.Function]

    def every(self, batch: int, steps: int, time_major: bool) -> list[tuple[int, ...]]:
        """Return the shapes of the values saved at every step: y, gates, cells and norms, of size 0 if absent."""
        shapes = native.results(self.spec, batch, steps)
        if time_major:
            shapes["y"] = (steps, batch, self.width)
        if self.recomputes:
            shapes = {name: shapes[name] for name in ("y", "cells") if name in shapes}
        return [shapes.get(name, (0,)) for name in ("y", "gates", "cells", "norms")]


_ROWS = "rows "


def with_torch_layout(text: str) -> str:
    """Return the entry of the op's `cells` for a cell whose weights are in the layout of PyTorch's modules.

    They are, in this order, `weight_ih [G·H, I]`, `weight_hh [G·H, P]`, with a bias `bias_ih` and `bias_hh [G·H]`, and
    with a projection `weight_hr [P, H]`; the order of a GRU's gates is r z g.
    """
    return _ROWS + text


_RECOMPUTES = "recomputes "


def with_recomputed_gates(text: str) -> str:
    """Return the entry of the op's `cells` for a cell whose backward pass recomputes its gates."""
    return _RECOMPUTES + text


_BFLOAT16 = "bfloat16 "


def with_bfloat16(text: str) -> str:
    """Return the entry of the op's `cells` for a float32 cell whose products have factors in bfloat16."""
    return _BFLOAT16 + text


@lru_cache(maxsize=1024)
def _form(text: str) -> _Form:
    bfloat16 = text.startswith(_BFLOAT16)
    text = text.removeprefix(_BFLOAT16)
    recomputes = text.startswith(_RECOMPUTES)
    text = text.removeprefix(_RECOMPUTES)
    rows = text.startswith(_ROWS)
    spec = described(text.removeprefix(_ROWS))
    weights: dict[str, tuple[int, ...]] = dict(spec.shapes)
    if rows:
        columns = len(spec.gates) * spec.units
        weights = {"weight_ih": (columns, spec.input_size), "weight_hh": (columns, spec.output_size)}
        weights |= {"bias_ih": (columns,), "bias_hh": (columns,)} if spec.use_bias else {}
        weights |= {"weight_hr": (spec.output_size, spec.units)} if "projection" in spec.shapes else {}
    return _Form(
        spec,
        rows,
        recomputes,
        bfloat16,
        native.description(spec, rows),
        tuple(weights),
        tuple(weights.values()),
        tuple(ARRAYS.index(name) for name in spec.shapes),
        tuple(spec.state_sizes.values()),
        spec.output_size,
        [eager.function_of(activation) for activation in spec.activations],
    )


@lru_cache(maxsize=1024)
def _every(text: str, batch: int, steps: int, time_major: bool) -> list[tuple[int, ...]]:
    return _form(text).every(batch, steps, time_major)


def _with_one_bias(form: _Form, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a layer's weights with one bias, as in our cells, instead of the two of PyTorch's modules."""
    if not form.rows or not form.spec.use_bias:
        return list(weights)
    weight_ih, weight_hh, bias_ih, bias_hh, *rest = weights
    bias = torch.stack([bias_ih, bias_hh]) if form.spec.two_biases else bias_ih + bias_hh
    return [weight_ih, weight_hh, bias, *rest]


def _in_columns(form: _Form, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the arrays of a layer in our layout, by differentiable operations."""
    arrays = _with_one_bias(form, weights)
    if not form.rows:
        return arrays
    arrays = [array if ARRAYS[at] == "bias" else array.t() for at, array in zip(form.at, arrays, strict=True)]
    gates, order = form.spec.gates, form.spec.of_kind.names["torch"].order
    if tuple(order) == gates:
        return arrays
    places = [order.index(gate) for gate in gates]
    return [array.unflatten(-1, (len(gates), -1))[..., places, :].flatten(-2) for array in arrays]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()  # 0 for an empty tensor too


_LARGE = 1 << 16  # number of elements from which a result's memory is reused
_results = Reused()


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a tensor for the values of every step."""
    if math.prod(shape) >= _LARGE:
        return _results.empty(like, shape)
    return like.new_empty(*shape)  # separate sizes take half the time of a tuple


def _plain(tensor: Tensor) -> Tensor:
    """Return `tensor` with contiguous memory and without a pending negation."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return `x` with contiguous features; the kernel supports any strides for batch and time."""
    x = x.resolve_neg()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _addresses(form: _Form, arrays: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the addresses of a cell's arrays in the order of ARRAYS, 0 for absent ones."""
    addresses = [0] * len(ARRAYS)
    for at, array in zip(form.at, arrays, strict=True):
        if array is not None:
            addresses[at] = array.data_ptr()
    return tuple(addresses)


# Weights may change between calls without notice, so packed weights aren't kept. Packing costs as much as a few steps
# of one row: calls of fewer steps read the weights in place. The bits are the same.
_UNPACKED_STEPS = 4  # rows × steps


def _checked(form: _Form, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return a layer's weights as contiguous arrays, after checking them: users may have replaced one.

    Raises:
        TypeError: an array has another dtype than x.
        ShapeError: an array has another shape than the cell's.
    """
    for name, shape, weight in zip(form.names, form.shapes, weights, strict=True):
        if weight.dtype is not dtype:
            wanted, came = (str(d).removeprefix("torch.") for d in (dtype, weight.dtype))
            raise TypeError(f"{form.spec.kind}: expected {name} of {wanted}, the dtype of the input, got {came}")
        if weight.shape != shape:
            raise ShapeError(f"{form.spec.kind}: expected {name} {list(shape)}, got {tuple(weight.shape)}")
    return [_plain(weight) for weight in _with_one_bias(form, weights)]


ELEMENTS = {torch.float32: "float32", torch.float64: "float64"}


def _element(form: _Form, dtype: torch.dtype) -> str:
    return "bfloat16" if form.bfloat16 else ELEMENTS[dtype]


def _weights(form: _Form, weights: Sequence[Tensor], dtype: torch.dtype, copy: bool) -> tuple[Any, list[Tensor]]:
    """Return the kernel's weights, and the tensors that must outlive the call."""
    flat = _checked(form, weights, dtype)
    return native.weights_at(form.description, _element(form, dtype), _addresses(form, flat), copy), flat


def _unpacked(form: _Form, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """Return the kernel's weights, read in place, of a call whose forward pass has checked them."""
    flat = [_plain(weight) for weight in _with_one_bias(form, weights)]
    return native.weights_at(form.description, _element(form, dtype), _addresses(form, flat), False), flat


# Packed weights by layer, with the addresses and versions of the tensors that they were packed from, and the storages
# of these: as long as they exist, no later tensor has the same address.
Kept = dict[int, tuple[list[tuple[int, int]], Any, list[torch.UntypedStorage]]]


def _uses(storage: torch.UntypedStorage) -> int:
    """Return how many tensors and Python objects refer to a storage."""
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]


_probe = torch.empty(1)
_ONE_TENSOR = _uses(_probe.untyped_storage())  # the count if only one tensor uses the storage


def _kept_weights(kept: Kept, layer: int, form: _Form, weights: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Return the kernel's weights of a layer, from `kept` if its tensors and their versions are the same.

    If another tensor or process shares the memory of a weight, they aren't kept: its writes change no version here.
    """
    try:
        tensors = [(int(form.bfloat16), 0), *((weight.data_ptr(), weight._version) for weight in weights)]
    except RuntimeError:  # tensors created in inference mode have no version
        return _weights(form, weights, dtype, copy=True)[0]
    found = kept.get(layer)
    if found is None or found[0] != tensors:
        packed = _weights(form, weights, dtype, copy=True)[0]
        storages = [weight.untyped_storage() for weight in weights]
        if any(_uses(storage) > _ONE_TENSOR or storage.is_shared() for storage in storages):
            return packed
        found = kept[layer] = tensors, packed, storages
    return found[1]


def _flags(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous()


def _sequences(
    x: Tensor, mask: Tensor | None, reset: Tensor | None, reverse: bool, time_major: bool
) -> native.Sequences:
    """Return the kernel's object for `x [B, T, I]` and its contiguous flags."""
    (batch, steps, _), (stride_batch, stride_time, _) = x.shape, x.stride()
    flags = _address(mask), _address(reset)
    return native.Sequences(
        batch, steps, x.data_ptr(), stride_batch, stride_time, *flags, reverse, time_major=time_major
    )


def _layer(
    weights: Any, start: Sequence[Tensor], end: Sequence[Tensor], every: Sequence[Tensor], drops: Sequence[Tensor]
) -> native.Layer:
    """Return a layer of a call; `every` has y, gates, cells and norms of every step, or only y, or nothing."""
    kept = map(_address, every)
    if not drops:
        return native.Layer(weights, *_pair(start), *_pair(end), *kept)
    recurrent_dropout, zoneout, zoneout_cell = map(_address, drops)
    masks = {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout, "zoneout_cell": zoneout_cell}
    return native.Layer(weights, *_pair(start), *_pair(end), *kept, **masks)


def _forward(
    x: Tensor,
    starts: Sequence[Tensor],
    weights: Sequence[Tensor],
    drops: Sequence[Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    cells: Sequence[str],
    reverse: bool,
    sequences: bool,
    save: bool,
    threads: int,
    time_major: bool,
    keep: Kept | None = None,
) -> list[Tensor]:
    batch, steps, _ = x.shape
    x = _rows(x)
    mask, reset = _flags(mask), _flags(reset)
    long = batch * steps > _UNPACKED_STEPS
    begin, drops = [_plain(t) for t in starts], [_plain(t) for t in drops]
    arrays = iter(weights)
    ends, ys, gates, memory, norms, layers, kept = [], [], [], [], [], [], []
    for n, text in enumerate(cells):
        form = _form(text)
        own = list(islice(arrays, len(form.shapes)))
        if keep is not None:
            packed = _kept_weights(keep, n, form, own, x.dtype)
        else:
            packed, flat = _weights(form, own, x.dtype, long or form.rows or form.bfloat16)
            kept.append(flat)
        end = [x.new_empty(batch, size) for size in form.sizes]
        start = begin[len(ends) : len(ends) + len(end)]
        ends += end
        if save:
            every = [_new(x, shape) for shape in _every(text, batch, steps, time_major)]
            for group, tensor in zip((ys, gates, memory, norms), every, strict=True):
                group.append(tensor)
        elif sequences and n == len(cells) - 1:
            every = [_new(x, _every(text, batch, steps, time_major)[0])]
            ys += every
        else:
            every = []
        layers.append(_layer(packed, start, end, every, drops[3 * n : 3 * n + 3]))
    native.forward(_sequences(x, mask, reset, reverse, time_major), layers, threads or torch.get_num_threads())
    return [*ends, *ys, *gates, *memory, *norms]


def _backward(
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
) -> list[Tensor]:
    """Return the wanted gradients of `[x, *starts, *weights]`, in that order, as new contiguous tensors.

    `saved` holds y, gates, cells, norms (each per layer), `grads` the gradients of all results of the forward pass,
    None for zeros.
    """
    count = len(cells)
    results = _empty_gradients(x, [*starts, *weights], wanted, time_major)
    wanted_starts = iter(results[1 : 1 + len(starts)])
    wanted_arrays = iter(results[1 + len(starts) :])
    x = _rows(x)
    mask, reset = _flags(mask), _flags(reset)
    begin, drops = [_plain(t) for t in starts], [_plain(t) for t in drops]
    given = [None if grad is None else _plain(grad) for grad in grads]
    arrays = iter(weights)
    every = sum(len(_form(text).sizes) for text in cells)  # position of the first gradient of values of every step
    layers, gradients, kept, biases, first = [], [], [], [], 0
    for n, text in enumerate(cells):
        form = _form(text)
        own = slice(first, first + len(form.sizes))
        first = own.stop
        unpacked, flat = _unpacked(form, list(islice(arrays, len(form.shapes))), x.dtype)
        into = list(islice(wanted_arrays, len(form.shapes)))
        if form.rows and form.spec.use_bias:  # the gradient of our one bias is that of both of PyTorch's
            both = into[2:4]
            bias = None if both == [None, None] else x.new_empty(flat[2].shape)
            into[2:4] = [bias]
            parts = [bias] * 2 if bias is None or bias.ndim == 1 else bias
            biases += [(part, target) for part, target in zip(parts, both, strict=True) if target is not None]
            kept.append([bias])
        kept.append(flat)
        layers.append(_layer(unpacked, begin[own], (), saved[n::count], drops[3 * n : 3 * n + 3]))
        dy, dgates, dcells = given[every + n :: count][:3]
        gradients.append(
            native.Gradients(
                _address(dy),
                *_pair(given[own]),
                _address(dgates),
                _address(dcells),
                _address(results[0]) if n == 0 else 0,
                *_pair(list(islice(wanted_starts, len(form.sizes) if starts else 0))),
                _addresses(form, into),
            )
        )
    native.backward(
        _sequences(x, mask, reset, reverse, time_major), layers, gradients, threads or torch.get_num_threads()
    )
    for bias, target in biases:
        target.copy_(bias)
    return [result for result in results if result is not None]


def _empty_gradients(
    x: Tensor, others: Sequence[Tensor], wanted: Sequence[bool], time_major: bool
) -> list[Tensor | None]:
    """Allocate a tensor for each wanted gradient of `[x, *others]`."""
    (batch, steps, width), (want, *rest) = x.shape, wanted
    dx = None
    if want:
        dx = x.new_empty(steps, batch, width).transpose(0, 1) if time_major else x.new_empty(batch, steps, width)
    plain = torch.contiguous_format
    return [dx, *[torch.empty_like(t, memory_format=plain) if w else None for t, w in zip(others, rest, strict=True)]]


def _pair(arrays: Sequence[Tensor | None]) -> tuple[int, int]:
    """Return the addresses of h and c, 0 for absent ones."""
    if not arrays:
        return 0, 0
    return _address(arrays[0]), _address(arrays[1]) if len(arrays) > 1 else 0


def _fake_forward(
    x: Tensor,
    starts: Sequence[Tensor],
    weights: Sequence[Tensor],
    drops: Sequence[Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    cells: Sequence[str],
    reverse: bool,
    sequences: bool,
    save: bool,
    threads: int,
    time_major: bool,
) -> list[Tensor]:
    batch, steps, _ = x.shape
    forms = [_form(text) for text in cells]
    shapes: list[tuple[int, ...]] = [(batch, size) for form in forms for size in form.sizes]
    if save:
        shapes += [
            shape
            for group in zip(*(form.every(batch, steps, time_major) for form in forms), strict=True)
            for shape in group
        ]
    elif sequences:
        shapes.append(forms[-1].every(batch, steps, time_major)[0])
    return [x.new_empty(shape) for shape in shapes]


def _fake_backward(
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
) -> list[Tensor]:
    return [t for t in _empty_gradients(x, [*starts, *weights], wanted, time_major) if t is not None]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward pass needs of the op's inputs and results."""
    x, starts, weights, drops, mask, reset, cells, reverse, _, save, threads, time_major = inputs
    flags = [t for t in (mask, reset) if t is not None]
    ctx.counts = [1, len(starts), len(weights), len(drops), len(flags)]
    ctx.rest = mask is not None, cells, reverse, save, threads, time_major
    ctx.set_materialize_grads(False)  # gradients of gates are large and mostly absent
    kept = output[sum(len(_form(text).sizes) for text in cells) :]
    ctx.save_for_backward(x, *starts, *weights, *drops, *flags, *kept)
    if save:
        count = len(cells)
        absent = [t for t in kept[count : 3 * count] if t.ndim == 1]  # cells of kinds without c, recomputed gates
        ctx.mark_non_differentiable(*absent, *kept[3 * count :])


# ── Batches of gradients: vmap over the backward pass ─────────────────────────────────────────────────────────────────


def _batched(grad: Tensor) -> bool:
    """Whether `grad` is a batch of gradients, as torch.autograd.grad(…, is_grads_batched=True) gives them."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)  # pyright: ignore[reportAttributeAccessIssue]


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


def _gradients(ctx: Any, needs: list[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of `[x, *starts, *weights]`, None where `needs` is False."""
    masked, cells, reverse, save, threads, time_major = ctx.rest
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
            forms = [_form(text) for text in cells]
            specs, functions = [form.spec for form in forms], [form.functions for form in forms]
            left = iter(weights)
            arrays = [array for form in forms for array in _in_columns(form, list(islice(left, len(form.shapes))))]
            outputs = eager.run(x, starts, arrays, drops, mask, reset, specs, functions, reverse, True, True)
            if time_major:
                ys = slice(sum(len(form.sizes) for form in forms), None)
                outputs[ys] = [y.transpose(0, 1) if n < len(forms) else y for n, y in enumerate(outputs[ys])]
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
        call = _backward if x.is_cpu and direct(x) and not transformed() else torch.ops.cellstack.recurrent_backward

        def back(grads: Sequence[Tensor | None]) -> list[Tensor]:
            return call(
                x, starts, weights, drops, mask, reset, saved, grads, cells, reverse, needs, threads, time_major
            )

        batched = [grad for grad in grads if grad is not None and _batched(grad)]
        found = _of_each(back, grads) if batched else back(grads)
    queue = iter(found)
    return [next(queue) if need else None for need in needs]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
    x, *flat = _gradients(ctx, needs, grads)
    starts = ctx.counts[1]
    return x, flat[:starts], flat[starts:], [None] * ctx.counts[3], *[None] * 8


class _Direct(torch.autograd.Function):
    """The op without torch's dispatcher, for training steps that nothing records (see `direct`).

    `flat` has the tensors `[x, *starts, *weights]`, `rest` the op's other inputs.
    """

    @staticmethod
    def forward(ctx: Any, starts: int, rest: tuple[Any, ...], *flat: Tensor) -> tuple[Tensor, ...]:
        inputs = flat[0], flat[1 : 1 + starts], flat[1 + starts :], *rest
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_gradients(ctx, list(ctx.needs_input_grad[2:]), grads)


# Skips what `Function.apply` does for transforms of torch.func: callers have checked that none is active.
_apply: Any = super(torch.autograd.Function, _Direct).apply  # pyright: ignore[reportAttributeAccessIssue]


_LIBRARY.impl("recurrent", _forward, "CPU")
_LIBRARY.impl("recurrent_backward", _backward, "CPU")
torch.library.register_fake("cellstack::recurrent", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("cellstack::recurrent_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_vmap("cellstack::recurrent_backward", _one_by_one, lib=_LIBRARY)
torch.library.register_autograd("cellstack::recurrent", _differentiate, setup_context=_keep, lib=_LIBRARY)

recurrent = torch.ops.cellstack.recurrent.default
isa = native.isa


# ── Calls without torch's dispatcher ──────────────────────────────────────────────────────────────────────────────────


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active: only the torch loop has these."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or forward_ad._current_level >= 0
    )


def untraced() -> bool:
    """Whether no compiler, tracer or mode records or intercepts torch's operators."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
    )


PLAIN = (Tensor, nn.Parameter)
"""The types of weights that the kernel can read: a subclass may have no memory, or intercept operations."""


def wraps(tensor: Tensor) -> bool:
    """Whether a tensor's class defines `__torch_dispatch__`: such a tensor may have no memory."""
    if type(tensor) in PLAIN:
        return False
    kinds: tuple[Any, ...] = type(tensor), Tensor
    own, usual = (kind.__torch_dispatch__ for kind in kinds)
    return own is not usual


def symbolic(tensor: Tensor) -> bool:
    """Whether a tensor only records operations and has no values, as in an export."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def direct(x: Tensor) -> bool:
    """Whether a call on `x` that isn't `transformed` can skip torch's dispatcher: a plain tensor, `untraced`.

    The dispatcher costs more than the arithmetic of a small step.
    """
    return type(x) is Tensor and untraced()


def run(
    x: Tensor,
    starts: list[Tensor],
    weights: list[Tensor],
    drops: list[Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    cells: list[str],
    reverse: bool,
    sequences: bool,
    save: bool,
    time_major: bool = False,
    keep: Kept | None = None,
) -> list[Tensor]:
    """Call the op on CPU tensors, without torch's dispatcher if possible.

    With `keep` direct calls without `save` pack the weights only once: the caller ensures that they don't change.
    """
    if uses_bfloat16(x):
        cells = [with_bfloat16(text) for text in cells]
    rest = drops, mask, reset, cells, reverse, sequences, save, 0, time_major
    if not x.is_cpu or not direct(x):
        return recurrent(x, starts, weights, *rest)
    if save:
        return list(_apply(len(starts), rest, x, *starts, *weights))
    return _forward(x, starts, weights, *rest, keep)


def step(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], cell: str, keep: Kept | None = None
) -> tuple[Tensor, ...]:
    """Run one step of one layer without gradients, on x `[B, I]` that is `direct`, and a state or nothing."""
    batch, form = x.shape[0], _form(with_bfloat16(cell) if uses_bfloat16(x) else cell)
    if keep is not None:
        packed = _kept_weights(keep, 0, form, weights, x.dtype)
    else:
        packed, _flat = _weights(form, weights, x.dtype, batch > _UNPACKED_STEPS or form.rows or form.bfloat16)
    x = _plain(x)  # a foreign cell's output may be a negated view
    begin = [_plain(part) for part in state]
    ends = tuple([x.new_empty(batch, size) for size in form.sizes])
    sequences = native.Sequences(batch, 1, x.data_ptr(), x.shape[1], x.shape[1])
    threads = 1 if batch == 1 else torch.get_num_threads()
    native.forward(sequences, [native.Layer(packed, *_pair(begin), *_pair(ends))], threads)
    return ends


# ── Dropout masks with the layer's own seed ───────────────────────────────────────────────────────────────────────────

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

    With a `seed`, the n-th mask depends only on the seed and n, which `draws` counts: a run can be repeated and
    resumed. Without one, torch's generator draws it.
    """
    if seed is None or draws is None:
        return torch.nn.functional.dropout(like.new_ones(rows, width), rate)
    return torch.ops.cellstack.dropout_mask(draws, like.detach(), rows, width, rate, seed)


def uses_bfloat16(like: Tensor) -> bool:
    """Whether products in `like`'s dtype on the CPU now have factors in bfloat16.

    This is so for float32 under `torch.autocast("cpu", torch.bfloat16)` if the processor multiplies pairs of bfloat16
    as fast as single float32 values.
    """
    return torch.is_autocast_enabled("cpu") and like.dtype is torch.float32 and _rounds()


_PAIRS = "avx512bf16"  # the instruction set that multiplies pairs
_AT_FIRST = isa()  # the instruction set at import, as compilers can't trace the call of isa()


def _rounds() -> bool:
    now = _AT_FIRST if torch.compiler.is_compiling() else isa()
    return now == _PAIRS and torch.get_autocast_dtype("cpu") is torch.bfloat16


def autocast() -> str:
    """Return a plan's text about `torch.autocast`; "" if it is off."""
    if not torch.is_autocast_enabled("cpu"):
        return ""
    return f", in float32{' with products in bfloat16' if _rounds() else ''} under torch.autocast"
