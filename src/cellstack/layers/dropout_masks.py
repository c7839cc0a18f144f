"""Dropout masks with a layer's own seed, as an operator: the number of masks drawn is part of the layer's state."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("cellstack", "FRAGMENT")
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
