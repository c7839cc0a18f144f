"""The tensors in a module's inputs and outputs, which may be nested tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors in a module's output as a flat list."""
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (tuple, list)) else [value]


def like(structure: Any, values: Iterable[Any]) -> Any:
    """Return values in the nested tuples and lists of `structure`."""
    queue = iter(values)

    def put(part: Any) -> Any:
        if not isinstance(part, (tuple, list)):
            return next(queue)
        made = [put(one) for one in part]
        if hasattr(part, "_fields"):
            return type(part)(*made)
        return tuple(made) if isinstance(part, tuple) else made

    return put(structure)


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return copies of inputs, which a module may modify."""
    return like(inputs, [value.detach().clone() for value in tensors_in(inputs)])


def wider(value: Any, axis: int, more: int) -> Any:
    """Return a tensor with a longer axis, filled by repeating it from the start."""
    size = value.shape[axis]
    return value[(slice(None),) * axis + ([n % size for n in range(size + more)],)]


def array_of(value: Any) -> Any:
    """Return a tensor as a NumPy array; bfloat16 as float32."""
    import torch

    value = value.detach().cpu()
    return np.asarray(value.float() if value.dtype is torch.bfloat16 else value)
