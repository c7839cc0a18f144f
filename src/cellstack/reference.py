"""The law: an LSTM's equations in NumPy, forward and backward, in float64. All else is held against this file.

Gate order is i, f, g, o throughout. Arrays of 4H columns hold one block of H columns a gate, in that order.

Ref: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory"; the forget gate: Gers, Schmidhuber and Cummins 2000,
"Learning to Forget", eq. 2.4 to 2.8. Backward: the chain rule on these lines, worked out beside each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# name -> (activation of z, its derivative written in terms of the activation's value y)
ACTIVATIONS = {
    "sigmoid": (lambda z: 0.5 * (1.0 + np.tanh(0.5 * z)), lambda y: y * (1.0 - y)),
    "tanh": (np.tanh, lambda y: 1.0 - y * y),
    "linear": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z < 0.0, 0.0, z), lambda y: (y > 0.0) * 1.0),
    "hard_sigmoid": (lambda z: np.clip(z / 6.0 + 0.5, 0.0, 1.0), lambda y: ((y > 0.0) & (y < 1.0)) / 6.0),
    "softsign": (lambda z: z / (1.0 + np.abs(z)), lambda y: (1.0 - np.abs(y)) ** 2),
    "softplus": (lambda z: np.logaddexp(0.0, z), lambda y: -np.expm1(-y)),
    "elu": (lambda z: np.where(z > 0.0, z, np.expm1(np.minimum(z, 0.0))), lambda y: np.where(y > 0.0, 1.0, y + 1.0)),
}


class Forward(NamedTuple):
    """What a pass over a sequence leaves. At masked steps gates are zero and `y`, `c` are carried."""

    y: Array  # [B, T, H]
    h: Array  # [B, H], after the last step
    c: Array  # [B, H], after the last step
    gates: Array  # [B, T, 4, H], after the activations
    cells: Array  # [B, T, H]


class Gradients(NamedTuple):
    """Gradients of a scalar loss, each in the shape of what it is the gradient of."""

    x: Array
    h0: Array
    c0: Array
    kernel: Array
    recurrent_kernel: Array
    bias: Array


def lstm_forward(
    x: Array,
    h0: Array,
    c0: Array,
    kernel: Array,
    recurrent_kernel: Array,
    bias: Array | None = None,
    *,
    mask: NDArray[np.bool_] | None = None,
    recurrent_dropout: Array | None = None,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    reverse: bool = False,
) -> Forward:
    """Run an LSTM over a sequence.

        z = x·kernel + h_prev·recurrent_kernel + bias        i, f, o = σ(z_i, z_f, z_o)    g = φ(z_g)
        c = f·c_prev + i·g                                   h = o·φ(c)

    Args:
        x: `[B, T, I]`.
        h0, c0: state before the first step, `[B, H]`.
        kernel, recurrent_kernel, bias: `[I, 4H]`, `[H, 4H]`, `[4H]`.
        mask: `[B, T]`, True where a step counts; elsewhere the state is carried.
        recurrent_dropout: `[B, H]`, what h_prev is multiplied by at every step (0 or 1/(1-p)).
        reverse: run from the last step to the first; `y[:, t]` still belongs to `x[:, t]`.
    """
    phi, sigma = ACTIVATIONS[activation][0], ACTIVATIONS[recurrent_activation][0]
    batch, steps, _ = x.shape
    units = h0.shape[1]
    y, cells = np.empty((2, batch, steps, units))
    gates = np.zeros((batch, steps, 4, units))
    h, c = h0, c0
    for t in reversed(range(steps)) if reverse else range(steps):
        used = np.ones((batch, 1), bool) if mask is None else mask[:, t, None]
        h_in = h if recurrent_dropout is None else h * recurrent_dropout
        z = x[:, t] @ kernel + h_in @ recurrent_kernel + (0.0 if bias is None else bias)
        z_i, z_f, z_g, z_o = np.split(z, 4, axis=1)
        i, f, g, o = sigma(z_i), sigma(z_f), phi(z_g), sigma(z_o)
        c_new = f * c + i * g
        c, h = np.where(used, c_new, c), np.where(used, o * phi(c_new), h)
        gates[:, t] = np.where(used[:, None], np.stack([i, f, g, o], axis=1), 0.0)
        y[:, t], cells[:, t] = h, c
    return Forward(y, h, c, gates, cells)


def lstm_backward(
    out: Forward,
    x: Array,
    h0: Array,
    c0: Array,
    kernel: Array,
    recurrent_kernel: Array,
    *,
    dy: Array | None = None,
    dh: Array | None = None,
    dc: Array | None = None,
    dgates: Array | None = None,
    dcells: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
    recurrent_dropout: Array | None = None,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    reverse: bool = False,
) -> Gradients:
    """Backpropagate through `lstm_forward`.

    `dy`, `dh`, `dc`, `dgates`, `dcells` are the loss's gradients with respect to the fields of `out`, zero where None.
    """
    phi, dphi = ACTIVATIONS[activation]
    dsigma = ACTIVATIONS[recurrent_activation][1]
    batch, steps, _ = x.shape
    dx = np.zeros_like(x)
    dkernel, drecurrent = np.zeros_like(kernel), np.zeros_like(recurrent_kernel)
    dbias = np.zeros(kernel.shape[1])
    dh = np.zeros_like(h0) if dh is None else dh
    dc = np.zeros_like(c0) if dc is None else dc
    order = list(reversed(range(steps)) if reverse else range(steps))
    for n in reversed(range(steps)):
        t = order[n]
        h_prev, c_prev = (out.y[:, order[n - 1]], out.cells[:, order[n - 1]]) if n else (h0, c0)
        used = np.ones((batch, 1), bool) if mask is None else mask[:, t, None]
        i, f, g, o = (out.gates[:, t, k] for k in range(4))
        dh = dh if dy is None else dh + dy[:, t]
        dc = dc if dcells is None else dc + dcells[:, t]
        di, df, dg, do = np.zeros((4, batch, 1)) if dgates is None else (dgates[:, t, k] for k in range(4))
        c_act = phi(out.cells[:, t])
        dc_new = dc + dh * o * dphi(c_act)  # h = o·φ(c)
        dz = np.concatenate(  # c = f·c_prev + i·g, then each gate's own activation
            [
                (di + dc_new * g) * dsigma(i),
                (df + dc_new * c_prev) * dsigma(f),
                (dg + dc_new * i) * dphi(g),
                (do + dh * c_act) * dsigma(o),
            ],
            axis=1,
        )
        dz = np.where(used, dz, 0.0)
        drop = 1.0 if recurrent_dropout is None else recurrent_dropout
        dx[:, t] = dz @ kernel.T
        dkernel += np.where(used, x[:, t], 0.0).T @ dz  # 0·NaN is NaN: what is masked must not meet dz
        drecurrent += np.where(used, h_prev * drop, 0.0).T @ dz
        dbias += dz.sum(axis=0)
        dh = np.where(used, dz @ recurrent_kernel.T * drop, dh)
        dc = np.where(used, dc_new * f, dc)
    return Gradients(dx, dh, dc, dkernel, drecurrent, dbias)
