"""Calls of the kernel on torch tensors, forward and backward, without autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cellstack import native
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import ARRAYS
from cellstack.layers.cell_call import CellCall, OpCall, Saved, by_layer, saved_by_layer
from cellstack.layers.memory import Reused


def _with_one_bias(cell: CellCall, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a layer's weights with one bias, as in our cells, instead of the two of PyTorch's modules."""
    if not cell.torch_layout or not cell.spec.use_bias:
        return list(weights)
    weight_ih, weight_hh, bias_ih, bias_hh, *rest = weights
    bias = torch.stack([bias_ih, bias_hh]) if cell.spec.two_biases else bias_ih + bias_hh
    return [weight_ih, weight_hh, bias, *rest]


def in_columns(cell: CellCall, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the arrays of a layer in our layout, by differentiable operations."""
    arrays = _with_one_bias(cell, weights)
    if not cell.torch_layout:
        return arrays
    arrays = [array if ARRAYS[at] == "bias" else array.t() for at, array in zip(cell.places, arrays, strict=True)]
    gates, order = cell.spec.gates, cell.spec.of_kind.names["torch"].order
    if tuple(order) == gates:
        return arrays
    places = [order.index(gate) for gate in gates]
    return [array.unflatten(-1, (len(gates), -1))[..., places, :].flatten(-2) for array in arrays]


def address(tensor: Tensor | None) -> int:
    """Return where the numbers of a tensor are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()  # 0 for an empty tensor too


_LARGE = 1 << 16  # number of elements from which a result's memory is reused
_results = Reused()


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a tensor for the values of every step."""
    if math.prod(shape) >= _LARGE:
        return _results.empty(like, shape)
    return like.new_empty(*shape)  # separate sizes take half the time of a tuple


def _contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` with contiguous memory and without a pending negation."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def _addresses(cell: CellCall, arrays: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the addresses of a cell's arrays in the order of ARRAYS, 0 for absent ones."""
    addresses = [0] * len(ARRAYS)
    for at, array in zip(cell.places, arrays, strict=True):
        if array is not None:
            addresses[at] = array.data_ptr()
    return tuple(addresses)


# Weights may change between calls without notice, so packed weights aren't kept. Packing costs as much as a few steps
# of one row: calls of fewer steps read the weights in place. The bits are the same.
_UNPACKED_STEPS = 4  # rows × steps


def _checked(cell: CellCall, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return a layer's weights as contiguous arrays, after checking them: users may have replaced one.

    Raises:
        TypeError: an array has another dtype than x.
        ShapeError: an array has another shape than the cell's.
    """
    for (name, shape), weight in zip(cell.shapes.items(), weights, strict=True):
        if weight.dtype is not dtype:
            expected, came = (str(d).removeprefix("torch.") for d in (dtype, weight.dtype))
            raise TypeError(f"{cell.spec.kind}: expected {name} of {expected}, the dtype of the input, got {came}")
        if weight.shape != shape:
            raise ShapeError(f"{cell.spec.kind}: expected {name} {list(shape)}, got {tuple(weight.shape)}")
    return [_contiguous(weight) for weight in _with_one_bias(cell, weights)]


ELEMENTS = {torch.float32: "float32", torch.float64: "float64"}


def _weights(cell: CellCall, flat: Sequence[Tensor], dtype: torch.dtype, copy: bool) -> Any:
    """Return the kernel's weights from contiguous arrays, which must outlive them without `copy`."""
    element = "bfloat16" if cell.bf16_matmul else ELEMENTS[dtype]
    return native.weights_at(cell.description, element, _addresses(cell, flat), copy, torch.get_num_threads())


def _packed(cell: CellCall, weights: Sequence[Tensor], dtype: torch.dtype) -> Any:
    return _weights(cell, _checked(cell, weights, dtype), dtype, True)


def weights_of(cell: CellCall, weights: Sequence[Tensor], x: Tensor, steps: int) -> tuple[Any, list[Tensor]]:
    """Return the kernel's weights for a forward pass over some steps of x, and the tensors that must outlive it."""
    flat = _checked(cell, weights, x.dtype)
    copy = x.shape[0] * steps > _UNPACKED_STEPS or cell.torch_layout or cell.bf16_matmul
    return _weights(cell, flat, x.dtype, copy), flat


# Packed weights by layer, with the addresses and versions of the tensors that they were packed from, and the storages
# of these: as long as they exist, no later tensor has the same address.
Kept = dict[int, tuple[list[tuple[int, int]], Any, list[torch.UntypedStorage]]]


def _uses(storage: torch.UntypedStorage) -> int:
    """Return how many tensors and Python objects refer to a storage."""
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]


_probe = torch.empty(1)
_ONE_TENSOR = _uses(_probe.untyped_storage())  # the count if only one tensor uses the storage


def kept_weights(kept: Kept, layer: int, cell: CellCall, weights: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Return the kernel's weights of a layer, from `kept` if its tensors and their versions are the same.

    If another tensor or process shares the memory of a weight, they aren't kept: its writes change no version here.
    """
    try:
        tensors = [(int(cell.bf16_matmul), 0), *((weight.data_ptr(), weight._version) for weight in weights)]
    except RuntimeError:  # tensors created in inference mode have no version
        return _packed(cell, weights, dtype)
    last = kept.get(layer)
    if last is None or last[0] != tensors:
        packed = _packed(cell, weights, dtype)
        storages = [weight.untyped_storage() for weight in weights]
        if any(_uses(storage) > _ONE_TENSOR or storage.is_shared() for storage in storages):
            return packed
        last = kept[layer] = tensors, packed, storages
    return last[1]


def _sequences(call: OpCall) -> tuple[native.Sequences, list[Any]]:
    """Return the kernel's object for the input of a call, and the tensors that must outlive it."""
    x, mask, reset = call.x.resolve_neg(), call.mask, call.reset
    (batch, steps, width), (stride_batch, stride_time, stride) = x.shape, x.stride()
    if stride != 1 and width != 1:  # the kernel supports any strides for batch and time
        x = x.contiguous()
        stride_batch, stride_time, _ = x.stride()
    mask = None if mask is None else mask.contiguous()
    reset = None if reset is None else reset.contiguous()
    flags = address(mask), address(reset), call.reverse, None, call.time_major
    return native.Sequences(batch, steps, x.data_ptr(), stride_batch, stride_time, *flags), [x, mask, reset]


def _layer(
    cell: CellCall,
    weights: Any,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    saved: Saved,
    drops: Iterator[Tensor] | None,
) -> Any:
    """Return a layer of a call, which takes its masks from `drops`; the entries of `saved` may be None."""
    first, last = [*map(Tensor.data_ptr, before)], [*map(Tensor.data_ptr, after)]  # faster than comprehensions
    if saved is _NOTHING and drops is None:  # the usual step
        return native.Layer(weights, first, last)
    y, gates, states, intermediate = saved
    results = address(y), address(gates), [*map(Tensor.data_ptr, states)], address(intermediate)
    masks = {} if drops is None else {name: address(mask) for name, mask in zip(cell.masks, drops, strict=False)}
    return native.Layer(weights, first, last, *results, **masks)


_NOTHING = Saved(None, None, (), None)
_saved = lru_cache(maxsize=1024)(CellCall.saved)


def forward(call: OpCall, keep: Kept | None = None) -> list[Tensor]:
    """Return the results of the op."""
    sequences, layers, results, _held = _prepared(call, keep)
    native.forward(sequences, layers, call.threads or torch.get_num_threads())
    return results


def forward_each(calls: Sequence[OpCall], keeps: Sequence[Kept | None]) -> list[list[Tensor]]:
    """Return the results of independent calls, which run at the same time where that is faster."""
    prepared = [_prepared(call, keep) for call, keep in zip(calls, keeps, strict=True)]
    native.forward_each([(one[0], one[1]) for one in prepared], torch.get_num_threads())
    return [one[2] for one in prepared]


def _prepared(call: OpCall, keep: Kept | None) -> tuple[native.Sequences, list[native.Layer], list[Tensor], list[Any]]:
    """Return the kernel's objects for a call, the results that it writes, and what must outlive it."""
    x, cells = call.x, call.cells
    batch, steps, _ = x.shape
    sequences, held = _sequences(call)
    begin, drops = [_contiguous(t) for t in call.starts], [_contiguous(t) for t in call.drops]
    arrays, masks = iter(call.weights), iter(drops) if drops else None
    ends: list[Tensor] = []
    saved, layers = [], []
    for n, cell in enumerate(cells):
        of_cell = list(islice(arrays, len(cell.shapes)))
        if keep is not None:
            packed = kept_weights(keep, n, cell, of_cell, x.dtype)
        else:
            packed, flat = weights_of(cell, of_cell, x, steps)
            held.append(flat)
        end = [x.new_empty(batch, size) for size in cell.sizes]
        start = begin[len(ends) : len(ends) + len(end)]
        ends += end
        saved_here = _NOTHING
        if call.save or (call.sequences and n == len(cells) - 1):
            y, gates, states, intermediate = _saved(cell, batch, steps, call.time_major)
            if call.save:
                saved_here = Saved(
                    _new(x, y), _new(x, gates), [_new(x, shape) for shape in states], _new(x, intermediate)
                )
            else:
                saved_here = Saved(_new(x, y), None, (), None)
            saved.append(saved_here)
        layers.append(_layer(cell, packed, start, end, saved_here, masks))
    held += begin, drops
    if not call.save:
        return sequences, layers, [*ends, *(saved_here.y for saved_here in saved)], held
    ys, gates, states, intermediate = zip(*saved, strict=True)
    return sequences, layers, [*ends, *ys, *gates, *(state for of in states for state in of), *intermediate], held


def step_of(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], cell: CellCall, keep: Kept | None
) -> tuple[Tensor, ...]:
    """Return the states after one step of one layer, on x `[B, I]`, and a state or nothing."""
    batch = x.shape[0]
    if keep is not None:
        packed = kept_weights(keep, 0, cell, weights, x.dtype)
    else:
        packed, _flat = weights_of(cell, weights, x, 1)
    x = _contiguous(x)  # a foreign cell's output may be a negated view
    begin = [_contiguous(part) for part in state]
    ends = tuple([x.new_empty(batch, size) for size in cell.sizes])
    sequences = native.Sequences(batch, 1, x.data_ptr(), x.shape[1], x.shape[1])
    threads = 1 if batch == 1 else torch.get_num_threads()
    before, after = [*map(Tensor.data_ptr, begin)], [*map(Tensor.data_ptr, ends)]
    native.forward(sequences, [native.Layer(packed, before, after)], threads)
    return ends


def backward(
    call: OpCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """Return the wanted gradients of `[x, *starts, *weights]`, in that order, as new contiguous tensors.

    `saved` holds what the forward pass saved at every step, `grads` the gradients of all its results, None for zeros.
    """
    cells, x = call.cells, call.x
    results = _empty_gradients(call, wanted)
    wanted_starts = iter(results[1 : 1 + len(call.starts)])
    wanted_arrays = iter(results[1 + len(call.starts) :])
    sequences, held = _sequences(call)
    begin, drops = [_contiguous(t) for t in call.starts], [_contiguous(t) for t in call.drops]
    given = [None if grad is None else _contiguous(grad) for grad in grads]
    specs = [cell.spec for cell in cells]
    before, arrays, kept = iter(begin), iter(call.weights), saved_by_layer(specs, saved)
    layers, gradients, biases, masks = [], [], [], iter(drops) if drops else None
    for n, (cell, of_ends, of_saved) in enumerate(zip(cells, *by_layer(specs, given), strict=True)):
        # The forward pass has checked the weights.
        flat = [_contiguous(weight) for weight in _with_one_bias(cell, list(islice(arrays, len(cell.shapes))))]
        into = list(islice(wanted_arrays, len(cell.shapes)))
        if cell.torch_layout and cell.spec.use_bias:  # the gradient of our one bias is that of both of PyTorch's
            both = into[2:4]
            bias = None if both == [None, None] else x.new_empty(flat[2].shape)
            into[2:4] = [bias]
            parts = [bias] * 2 if bias is None or bias.ndim == 1 else bias
            biases += [(part, target) for part, target in zip(parts, both, strict=True) if target is not None]
            held.append(bias)
        held.append(flat)
        count = len(cell.sizes) if call.starts else 0
        starts = list(islice(before, count))
        layers.append(_layer(cell, _weights(cell, flat, x.dtype, False), starts, (), kept[n], masks))
        gradients.append(
            native.Gradients(
                address(of_saved.y),
                [*map(address, of_ends)],
                address(of_saved.gates),
                [*map(address, of_saved.states)],
                address(results[0]) if n == 0 else 0,
                [*map(address, islice(wanted_starts, count))],
                _addresses(cell, into),
            )
        )
    native.backward(sequences, layers, gradients, call.threads or torch.get_num_threads())
    for bias, target in biases:
        target.copy_(bias)
    return [result for result in results if result is not None]


def _empty_gradients(call: OpCall, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Allocate a tensor for each wanted gradient of `[x, *starts, *weights]`."""
    x = call.x
    (batch, steps, width), (want, *rest) = x.shape, wanted
    dx = None
    if want:
        dx = x.new_empty(steps, batch, width).transpose(0, 1) if call.time_major else x.new_empty(batch, steps, width)
    plain, others = torch.contiguous_format, (*call.starts, *call.weights)
    return [dx, *[torch.empty_like(t, memory_format=plain) if w else None for t, w in zip(others, rest, strict=True)]]


def fake_forward(call: OpCall) -> list[Tensor]:
    """Return tensors in the shapes of the results of `forward`."""
    x, (batch, steps, _) = call.x, call.x.shape
    shapes: list[tuple[int, ...]] = [(batch, size) for cell in call.cells for size in cell.sizes]
    if call.save or call.sequences:
        saved = [cell.saved(batch, steps, call.time_major) for cell in call.cells]
        ys, gates, states, intermediate = zip(*saved, strict=True)
        shapes += [*ys, *gates, *(shape for of in states for shape in of), *intermediate] if call.save else ys[-1:]
    return [x.new_empty(shape) for shape in shapes]


def fake_backward(call: OpCall, wanted: Sequence[bool]) -> list[Tensor]:
    """Return tensors in the shapes of the results of `backward`."""
    return [t for t in _empty_gradients(call, wanted) if t is not None]
