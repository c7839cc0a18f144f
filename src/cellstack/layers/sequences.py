"""The inputs of a call over sequences: the sequences, their mask, resets and packing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cellstack.cells.errors import ShapeError, check_mask
from cellstack.layers.base import as_input, as_mask


class Given(NamedTuple):
    """The checked inputs of a call."""

    x: Tensor  # [B, T, …], rows in batch order
    used: Tensor | None  # bool [B, T], True where a step counts; None: everywhere
    reset: Tensor | None  # bool [B, T], True where a piece begins, in time order; None: nowhere
    packed: PackedSequence | None  # the input that x was padded from


def as_used(owner: str, x: Tensor, mask: Any, lengths: Any) -> Tensor | None:
    """Return bool `[B, T]`, True where a step of x counts, from a mask or the rows' lengths; None without either.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a mask that isn't bool, or lengths that aren't integers.
        ValueError: both mask and lengths, or a length out of range.
    """
    if mask is not None and lengths is not None:
        raise ValueError(f"{owner}: expected mask or lengths, got both")
    if lengths is not None:
        return _within(owner, lengths, x)
    return None if mask is None else as_steps(owner, "mask", mask, x)


def as_steps(owner: str, name: str, value: Any, x: Tensor) -> Tensor:
    """Check and return the argument `name`, a bool for each step of `x [B, T, …]`."""
    steps = as_mask(owner, value, x, name)
    check_mask(owner, tuple(steps.shape), x.shape[0], x.shape[1], name)
    return steps


def _within(owner: str, lengths: Any, x: Tensor) -> Tensor:
    batch, steps = x.shape[:2]
    counts = lengths if isinstance(lengths, Tensor) else torch.from_numpy(np.array(lengths))
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise TypeError(f"{owner}: expected lengths to be integers, got {str(counts.dtype).removeprefix('torch.')}")
    if tuple(counts.shape) != (batch,):
        raise ShapeError(f"{owner}: expected lengths [B={batch}], got {tuple(counts.shape)}")
    # A compiled graph can't depend on values: there, a length above T is treated as T.
    if not torch.compiler.is_compiling() and batch and (int(counts.min()) < 0 or int(counts.max()) > steps):
        raise ValueError(f"{owner}: expected lengths from 0 to T={steps}, got {counts.tolist()}")
    return torch.arange(steps, device=x.device) < counts.to(x.device)[:, None]


def shifted(reset: Tensor) -> Tensor:
    """Return the resets of a pass from the last step to the first, for `reset [B, T]` in time order.

    Such a pass enters a piece at its last step, the one before the next piece begins.
    """
    return torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], dim=1)


def unpack(owner: str, packed: PackedSequence, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a PackedSequence as `x [B, T, …]`, rows in the batch order before packing, and its mask.

    Raises:
        TypeError, ValueError: see `base.as_input`.
    """
    data = as_input(owner, "sequences", packed.data, like)
    rest = packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
    x, lengths = pad_packed_sequence(PackedSequence(data, *rest), batch_first=True)
    return x, torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]


def pack(y: Tensor, like: PackedSequence) -> PackedSequence:
    """Pack `y [B, T, …]`, rows in batch order, like the PackedSequence `like`."""
    order = like.sorted_indices
    rows = y if order is None else y.index_select(0, order)
    lengths = (like.batch_sizes[:, None] > torch.arange(rows.shape[0], device=like.batch_sizes.device)).sum(0)
    data = pack_padded_sequence(rows, lengths, batch_first=True).data
    return PackedSequence(data, like.batch_sizes, order, like.unsorted_indices)


def flipped(value: Tensor, given: Given) -> Tensor:
    """Reverse the steps of `value [B, T, …]`; those of packed rows within their lengths."""
    if given.packed is None or given.used is None:
        return value.flip(1)
    steps = value.shape[1]
    order = torch.remainder(given.used.sum(1, keepdim=True) - 1 - torch.arange(steps, device=value.device), steps)
    return value.take_along_dim(order.reshape(*order.shape, *(1,) * (value.ndim - 2)), 1)


def at_last_used(x: Tensor, used: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """Return, for each step, x of the last unmasked step since the last reset; zeros if there is none."""
    if reverse:
        flipped = None if reset is None else reset.flip(1)
        return at_last_used(x.flip(1), used.flip(1), flipped, False).flip(1)
    count = torch.arange(1, x.shape[1] + 1, device=x.device)
    last = torch.where(used, count, 0).cummax(1).values  # 0: none
    if reset is not None:
        last = torch.where(last >= torch.where(reset, count, 0).cummax(1).values, last, 0)
    padded = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
    return padded.gather(1, last.unsqueeze(2).expand(x.shape))
