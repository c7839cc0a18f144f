"""The tensors in a module's inputs and outputs, which may be nested tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors in a module's inputs or outputs as a flat list."""
    return [leaf for leaf in leaves_in(value) if isinstance(leaf, torch.Tensor)]


def leaves_in(value: Any) -> list[Any]:
    """Return the tensors in a module's inputs or outputs, and whatever isn't a container, as a flat list.

    A packed sequence is two: the padded one `[B, T, I]`, and its lengths.
    """
    if isinstance(value, PackedSequence):
        return list(pad_packed_sequence(value, batch_first=True))
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    return [leaf for part in value for leaf in leaves_in(part)] if isinstance(value, (tuple, list)) else [value]


def like(structure: Any, values: Iterable[Any]) -> Any:
    """Return values in the nested containers of `structure`, in the order of `leaves_in`."""
    queue = iter(values)

    def put(part: Any) -> Any:
        if isinstance(part, PackedSequence):
            sorted_rows = part.sorted_indices is None
            return pack_padded_sequence(next(queue), next(queue), batch_first=True, enforce_sorted=sorted_rows)
        if isinstance(part, Mapping):
            made: Any = copy.copy(part)
            for key, one in part.items():
                made[key] = put(one)
            return made
        if is_dataclass(part) and not isinstance(part, type):
            made = copy.copy(part)
            for field in fields(part):
                object.__setattr__(made, field.name, put(getattr(part, field.name)))
            return made
        if not isinstance(part, (tuple, list)):
            return next(queue)
        made = [put(one) for one in part]
        if hasattr(part, "_fields"):
            return type(part)(*made)
        return tuple(made) if isinstance(part, tuple) else made

    return put(structure)


def has_packed(value: Any) -> bool:
    """Return whether there is a packed sequence in a module's inputs."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, PackedSequence) or not isinstance(value, (tuple, list)):
        return isinstance(value, PackedSequence)
    return any(map(has_packed, value))


def flattened(module: Any, inputs: tuple[Any, ...]) -> Any:
    """Return a module that takes the tensors of its nested inputs as arguments, and returns a flat tuple of tensors.

    Args:
        module: a copy, which is changed.
        inputs: the example; what isn't a tensor in it is passed at every call.
    """
    known = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves_in(inputs)]
    scripted, hooks = isinstance(module, torch.jit.ScriptModule), (*module._forward_pre_hooks, *module._forward_hooks)
    own = [getattr(type(module), name) is getattr(torch.nn.Module, name) for name in ("__call__", "__setstate__")]
    if all(own) and not scripted and not hooks:  # hooks see nested tensors, and a copy would lose its forward
        module.forward = partial(_flat_forward, module.forward, inputs, known)  # keeps the names of its parameters
        return module

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> Any:
            return _flat_forward(self.module, inputs, known, *tensors)

    Flat.__name__ = type(module).__name__
    made = Flat().eval()
    if not scripted:
        return made
    with warnings.catch_warnings(), torch.no_grad():  # the exporter only calls scripted modules within scripted ones
        warnings.simplefilter("ignore")
        return torch.jit.trace(made, fresh(tensors_in(inputs)), check_trace=False)


def _flat_forward(forward: Any, inputs: tuple[Any, ...], known: list[Any], *tensors: Any) -> tuple[Any, ...]:
    """Call a module with tensors in the containers of its example; `known` are the leaves that aren't tensors."""
    queue = iter(tensors)
    leaves = [next(queue) if leaf is None else leaf[0] for leaf in known]
    return tuple(tensors_in(forward(*like(inputs, leaves))))


def fresh(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return copies of tensors, which a module may modify."""
    return tuple(value.detach().clone() for value in inputs)


def wider(value: Any, axis: int, more: int) -> Any:
    """Return a tensor with a longer axis, filled by repeating its last entry: rows sorted by length remain so."""
    size = value.shape[axis]
    return value[(slice(None),) * axis + ([min(n, size - 1) for n in range(size + more)],)]


def in_order(made: Any, value: Any) -> Any:
    """Return integers in the order of others, which may have to be rising, such as ids, or falling, such as lengths."""
    if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        return made
    falling = bool((value.diff() <= 0).all())
    return made.sort(descending=falling).values if falling or bool((value.diff() >= 0).all()) else made


def array_of(value: Any) -> Any:
    """Return a tensor as a NumPy array; bfloat16 as float32, complex numbers with a last axis of 2."""
    value = value.detach().cpu()
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return np.asarray(value.float() if value.dtype is torch.bfloat16 else value)
