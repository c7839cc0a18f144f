"""The equations as a torch loop: the differentiable reference, and the route for what the fused kernel can't serve.

Also the list of activations by Keras's names, and cuDNN's LSTM through torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def linear(z: Tensor) -> Tensor:
    """Return `z`."""
    return z


def hard_sigmoid(z: Tensor) -> Tensor:
    """Return `z/6 + 1/2`, cut off at 0 and 1."""
    return torch.clamp(z / 6.0 + 0.5, 0.0, 1.0)


def leaky_relu(z: Tensor) -> Tensor:
    """Return `z`, or `0.2·z` where negative (Keras's slope)."""
    return functional.leaky_relu(z, 0.2)


def softmax(z: Tensor) -> Tensor:
    """Return the softmax over the last axis."""
    return functional.softmax(z, dim=-1)


def log_softmax(z: Tensor) -> Tensor:
    """Return the logarithm of the softmax over the last axis."""
    return functional.log_softmax(z, dim=-1)


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": linear,
    "relu": torch.relu,
    "hard_sigmoid": hard_sigmoid,
    "softsign": functional.softsign,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "celu": functional.celu,
    "exponential": torch.exp,
    "gelu": functional.gelu,
    "hard_silu": functional.hardswish,
    "hard_swish": functional.hardswish,
    "hard_tanh": functional.hardtanh,
    "leaky_relu": leaky_relu,
    "log_sigmoid": functional.logsigmoid,
    "log_softmax": log_softmax,
    "mish": functional.mish,
    "relu6": functional.relu6,
    "selu": functional.selu,
    "silu": functional.silu,
    "softmax": softmax,
    "swish": functional.silu,
    "tanh_shrink": functional.tanhshrink,
}
"""Activations by Keras's names; the kernel knows the first eight itself (`cellstack.spec.ACTIVATIONS`)."""

_NAMES: dict[object, str] = {function: name for name, function in reversed(ACTIVATIONS.items())}
_NAMES |= {functional.tanh: "tanh", functional.sigmoid: "sigmoid", functional.relu: "relu"}


def activation_name(given: str | Activation | None) -> str | None:
    """Return the name that an activation goes by, or None for a callable of the user's own.

    Raises:
        ValueError: a name that is not in `ACTIVATIONS`.
        TypeError: neither a name nor a callable.
    """
    if given is None:
        return "linear"
    if isinstance(given, str):
        if given not in ACTIVATIONS:
            raise ValueError(f"expected an activation out of {', '.join(ACTIVATIONS)} or a callable, got {given!r}")
        return given
    if not callable(given):
        raise TypeError(f"expected an activation's name or a callable, got {type(given).__name__}")
    return _NAMES.get(given)


def lstm(
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    weights: Sequence[Tensor],
    recurrent_dropout: Sequence[Tensor],
    mask: Tensor | None,
    activations: Sequence[Activation],
    reverse: bool,
    sequences: bool,
    save: bool,
) -> list[Tensor]:
    """Run a stack of LSTMs as a torch loop; arguments and results are those of `cellstack::lstm` (see `op`).

    Only `activations` differ: callables, two a layer (on g and c; on i, f, o).
    """
    count, (batch, steps, _) = len(weights) // 3, x.shape
    finals_h, finals_c, ys, all_gates, all_cells = [], [], [], [], []
    for n in range(count):
        kernel, recurrent_kernel, bias = weights[3 * n : 3 * n + 3]
        phi, sigma = activations[2 * n : 2 * n + 2]
        units = recurrent_kernel.shape[0]
        h = h0[n].clone() if h0 else x.new_zeros(batch, units)  # a clone: with no step the result must not be the input
        c = c0[n].clone() if c0 else x.new_zeros(batch, units)
        drop = recurrent_dropout[n] if recurrent_dropout and recurrent_dropout[n].numel() else None
        # What is masked must not meet a gradient, not even one of zero: 0·NaN is NaN.
        z_x = (x if mask is None else torch.where(mask[:, :, None], x, 0.0)) @ kernel  # [B, T, 4H]
        if bias.numel():
            z_x = z_x + bias
        outputs, gates, cells = ([x.new_zeros(0)] * steps for _ in range(3))
        for t in reversed(range(steps)) if reverse else range(steps):
            used = None if mask is None else mask[:, t, None]
            h_in, c_in = (h, c) if used is None else (torch.where(used, h, 0.0), torch.where(used, c, 0.0))
            z = z_x[:, t] + (h_in if drop is None else h_in * drop) @ recurrent_kernel
            z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
            i, f, g, o = sigma(z_i), sigma(z_f), phi(z_g), sigma(z_o)
            c_new = f * c_in + i * g
            h_new = o * phi(c_new)
            h, c = (h_new, c_new) if used is None else (torch.where(used, h_new, h), torch.where(used, c_new, c))
            outputs[t] = h
            if save:
                gate = torch.stack([i, f, g, o], dim=1)  # [B, 4, H]
                gates[t] = gate if used is None else torch.where(used[:, :, None], gate, 0.0)
                cells[t] = c
        x = torch.stack(outputs, dim=1) if steps else x.new_zeros(batch, 0, units)
        finals_h.append(h)
        finals_c.append(c)
        ys.append(x)
        if save:
            all_gates.append(torch.stack(gates, dim=1) if steps else x.new_zeros(batch, 0, 4, units))
            all_cells.append(torch.stack(cells, dim=1) if steps else x.new_zeros(batch, 0, units))
    if save:
        return [*finals_h, *finals_c, *ys, *all_gates, *all_cells]
    return [*finals_h, *finals_c, *(ys[-1:] if sequences else ())]


def cudnn_lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer (tanh, sigmoid, no mask) through cuDNN, by way of torch.

    Returns:
        `y [B, T, H]`, `h [B, H]`, `c [B, H]`; `y[:, t]` belongs to `x[:, t]` in either direction.
    """
    kernel, recurrent_kernel, bias = weights
    batch, units = x.shape[0], recurrent_kernel.shape[0]
    if not bias.numel():
        bias = kernel.new_zeros(4 * units)
    # cuDNN wants matrices, then biases, in one block of memory: views of one are taken without another copy.
    parts = [kernel.t(), recurrent_kernel.t(), bias, torch.zeros_like(bias)]
    block = torch.cat([part.reshape(-1) for part in parts])
    flat = [v.view(p.shape) for v, p in zip(block.split([p.numel() for p in parts]), parts, strict=True)]
    h = x.new_zeros(1, batch, units) if h0 is None else h0.unsqueeze(0).contiguous()
    c = x.new_zeros(1, batch, units) if c0 is None else c0.unsqueeze(0).contiguous()
    x = x.flip(1) if reverse else x.contiguous()
    y, h, c = torch._Vfunctional.lstm(x, (h, c), flat, True, 1, 0.0, torch.is_grad_enabled(), False, True)  # type: ignore[attr-defined]
    return y.flip(1) if reverse else y, h.squeeze(0), c.squeeze(0)
