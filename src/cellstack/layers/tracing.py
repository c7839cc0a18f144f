"""Which of torch's compilers, tracers, modes and transforms are active, and which tensors have memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active: only the torch loop has these."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or forward_ad._current_level >= 0
    )


def batched(grad: Tensor) -> bool:
    """Whether `grad` is a batch of gradients, as torch.autograd.grad(…, is_grads_batched=True) gives them."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)  # pyright: ignore[reportAttributeAccessIssue]


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
