"""Products in bfloat16 under `torch.autocast`."""

from __future__ import annotations

import torch
from torch import Tensor

from cellstack import native

_PAIRS = "avx512bf16"  # the instruction set that multiplies pairs
_AT_FIRST = native.isa()  # the instruction set at import, as compilers can't trace the call of isa()


def uses_bfloat16(like: Tensor) -> bool:
    """Whether products in `like`'s dtype on the CPU now have factors in bfloat16.

    This is so for float32 under `torch.autocast("cpu", torch.bfloat16)` if the processor multiplies pairs of bfloat16
    as fast as single float32 values.
    """
    return torch.is_autocast_enabled("cpu") and like.dtype is torch.float32 and _rounds()


def _rounds() -> bool:
    now = _AT_FIRST if torch.compiler.is_compiling() else native.isa()
    return now == _PAIRS and torch.get_autocast_dtype("cpu") is torch.bfloat16


def autocast() -> str:
    """Return a plan's text about `torch.autocast`; "" if it is off."""
    if not torch.is_autocast_enabled("cpu"):
        return ""
    return f", in float32{' with products in bfloat16' if _rounds() else ''} under torch.autocast"
