"""The mLSTM's memory in NumPy, in the step form and the chunkwise form: what the kernel is compared with.

Per head, with k scaled by 1/√dk and the state C [dk, dv], n [dk], m:

    ℓ = log σ(f̃)    m = max(ℓ + m₋, ĩ)    f = exp(ℓ + m₋ - m)    i = exp(ĩ - m)
    C = f·C₋ + i·k·vᵀ    n = f·n₋ + i·k    h = Cᵀq / (max(|nᵀq|, exp(-m)) + ε)

m is only a common factor: h depends on C·e^m and n·e^m, apart from ε. So a state with zeros as C and n is empty,
whatever m is; the initial state is zeros. A masked step keeps the state, and its h is zero; a reset sets the state to
zeros before its step.

Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eqs. 19 to 27; the chunkwise form: Beck et al. 2025,
"Tiled Flash Linear Attention", section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.base import MatrixState

Array = NDArray[Any]


class MatrixInputs(NamedTuple):
    """The inputs of every step: q and k `[B, T, heads, dk]`, v `[B, T, heads, dv]`, ĩ and f̃ `[B, T, heads]`."""

    q: Array
    k: Array
    v: Array
    i: Array
    f: Array


class MatrixFields(NamedTuple):
    """What doesn't depend on C, at every step, with the axes of `MatrixInputs`: at masked steps i is 0 and f is 1."""

    q: Array
    k: Array
    v: Array
    i: Array
    f: Array
    m: Array
    n: Array


Patched = Callable[[str, int, Array, Any], Array]
"""A function that returns the new value of a field, given its name, the step, its value and, for m and n, the value
before the step: see `cellstack.nodes.patches.Patch`. Masked steps keep their state."""


def split(x: Array, heads: int, dk: int, dv: int) -> MatrixInputs:
    """Return the parts of `x [..., q | k | v | ĩ | f̃]` by head."""
    ends = np.cumsum([heads * dk, heads * dk, heads * dv, heads])
    q, k, v, i, f = np.split(x, ends, axis=-1)
    q, k, v = (part.reshape(*x.shape[:-1], heads, part.shape[-1] // heads) for part in (q, k, v))
    return MatrixInputs(q, k, v, i, f)


def zero_state(batch: int, heads: int, dk: int, dv: int, dtype: Any = np.float64) -> MatrixState:
    """Return the initial state, zeros."""
    return MatrixState(*(np.zeros((batch, heads, *axes), dtype) for axes in ((dk, dv), (dk,), ())))


def log_sigmoid(x: Array) -> Array:
    """Return log σ(x)."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def fields_of(
    inputs: MatrixInputs,
    state: MatrixState,
    mask: Array | None = None,
    reset: Array | None = None,
    patched: Patched | None = None,
) -> MatrixFields:
    """Return the fields of every step.

    At a reset, f is that of the kernel: the state before it is dropped all the same.
    """
    change = patched or (lambda name, t, value, before: value)
    found = MatrixFields(*map(np.empty_like, (*inputs, inputs.i, inputs.k)))
    _, n, m = state
    scale = inputs.k.shape[-1] ** -0.5
    for t in range(inputs.i.shape[1]):
        if reset is not None:
            m, n = np.where(reset[:, t, None], 0, m), np.where(reset[:, t, None, None], 0, n)
        q, k, v = (change(name, t, array[:, t], None) for name, array in zip("qkv", inputs, strict=False))
        kept = log_sigmoid(inputs.f[:, t]) + m
        m_new = change("m", t, np.maximum(kept, inputs.i[:, t]), m)
        i = change("i", t, np.exp(inputs.i[:, t] - m_new), None)
        f = change("f", t, np.exp(kept - m_new), None)
        n_new = change("n", t, f[..., None] * n + i[..., None] * k * scale, n)
        if mask is not None:
            used = mask[:, t, None]
            i, f, m_new = np.where(used, i, 0), np.where(used, f, 1), np.where(used, m_new, m)
            n_new = np.where(used[..., None], n_new, n)
        m, n = m_new, n_new
        for all_steps, now in zip(found, (q, k, v, i, f, m, n), strict=True):
            all_steps[:, t] = now
    return found


def steps(
    inputs: MatrixInputs,
    state: MatrixState,
    epsilon: float = 1e-6,
    mask: Array | None = None,
    reset: Array | None = None,
    patched: Patched | None = None,
    o: Array | None = None,
) -> tuple[Array, MatrixState]:
    """Run step by step; return `h [B, T, heads, dv]`, times the output gate `o` if given, and the state at the end."""
    C, *others = state
    fields, scale = fields_of(inputs, state, mask, reset, patched), inputs.q.shape[-1] ** -0.5
    h = np.zeros_like(inputs.v)
    for t in range(h.shape[1]):
        if reset is not None:
            C = np.where(reset[:, t, None, None, None], 0, C)
        q, k, v, i, f, m, n = (array[:, t] for array in fields)
        C = f[..., None, None] * C + (i[..., None] * k * scale)[..., :, None] * v[..., None, :]
        size = np.maximum(np.abs((n * q).sum(-1)), np.exp(-m))
        now = np.einsum("bhkv,bhk->bhv", C, q) / (size + epsilon)[..., None]
        if o is not None:
            now = (o[:, t] if patched is None else patched("o", t, o[:, t], None)) * now
        now = now if patched is None else patched("h", t, now, None)
        h[:, t] = now if mask is None else np.where(mask[:, t, None, None], now, 0)
        others = [n, m]
    return h, MatrixState(C, *others)


def chunks(
    inputs: MatrixInputs, state: MatrixState, epsilon: float = 1e-6, length: int = 64
) -> tuple[Array, MatrixState]:
    """Run in chunks of `length` steps, each as products of matrices; return what `steps` returns.

    D[t, s] = i[s]·f[s+1]·…·f[t] is the share of step s in the state after step t, and e[t] = f[0]·…·f[t] that of the
    state before the chunk; with S = (Q·Kᵀ)∘D, the sums that h divides are S·V + e∘(Q·C₋).

    For example, two steps change C₋ to C = f₁·(f₀·C₋ + i₀·k₀·v₀ᵀ) + i₁·k₁·v₁ᵀ, of which q₁ reads
    f₁·i₀·(q₁·k₀)·v₀ + i₁·(q₁·k₁)·v₁ + f₀·f₁·C₋ᵀ·q₁. No step needs the C of the step before it: the last row of
    D = [[i₀, 0], [f₁·i₀, i₁]] has the factors of v₀ and v₁, and the last entry of e = [f₀, f₀·f₁] that of C₋. So a
    chunk is a few products of matrices, and C is computed once per chunk.
    """
    C, n, m = state
    gates, scale = fields_of(inputs, state)[3:6], inputs.q.shape[-1] ** -0.5
    h = np.zeros_like(inputs.v)
    for first in range(0, h.shape[1], length):
        part = slice(first, first + length)
        q, k, v = (np.moveaxis(array[:, part], 2, 1) for array in inputs[:3])  # [B, heads, L, …]
        i, f, m = (np.moveaxis(gate[:, part], 2, 1) for gate in gates)
        k = k * scale
        D = np.zeros((*i.shape, i.shape[-1]), i.dtype)
        for t in range(i.shape[-1]):
            D[..., t, :] = f[..., t, None] * D[..., t - 1, :] if t else 0
            D[..., t, t] = i[..., t]
        e = np.cumprod(f, axis=-1)[..., None]
        S = D * (q @ np.swapaxes(k, -1, -2))
        sums = S @ v + e * (q @ C)
        size = np.abs(S.sum(-1, keepdims=True) + e * (q @ n[..., None]))
        h[:, part] = np.moveaxis(sums / (np.maximum(size, np.exp(-m[..., None])) + epsilon), 1, 2)
        weights = D[..., -1, :, None]
        C = e[..., -1:, :] * C + np.swapaxes(weights * k, -1, -2) @ v
        n = e[..., -1, :] * n + (weights * k).sum(-2)
    return h, MatrixState(C, n, gates[2][:, -1] if h.shape[1] else state.m)


def backward(
    inputs: MatrixInputs,
    state: MatrixState,
    dh: Array,
    dstate: MatrixState,
    epsilon: float = 1e-6,
    mask: Array | None = None,
    reset: Array | None = None,
) -> tuple[MatrixInputs, MatrixState]:
    """Return the gradients of the inputs and of the state before the first step, step by step from the last one.

    Args:
        inputs, state, epsilon, mask, reset: as for `steps`.
        dh: the gradient of h.
        dstate: that of the state after the last step.
    """
    count, scale = inputs.q.shape[1], inputs.q.shape[-1] ** -0.5
    gates = fields_of(inputs, state, mask, reset)[3:6]
    before = [state]
    for t in range(count):
        now = slice(t, t + 1)
        _, after = steps(
            MatrixInputs(*(array[:, now] for array in inputs)),
            before[-1],
            epsilon,
            None if mask is None else mask[:, now],
            None if reset is None else reset[:, now],
        )
        before.append(after)
    found = MatrixInputs(*(np.zeros_like(array) for array in inputs))
    dC, dn, dm = dstate
    for t in reversed(range(count)):
        q, k, v = inputs.q[:, t], inputs.k[:, t] * scale, inputs.v[:, t]
        i, f = (gate[:, t, :, None] for gate in gates[:2])
        kept = np.ones(len(q), bool) if reset is None else ~reset[:, t]
        used = np.ones(len(q), bool) if mask is None else mask[:, t]
        C_before = np.where(kept[:, None, None, None], before[t].C, 0)
        n_before = np.where(kept[:, None, None], before[t].n, 0)
        m_before = np.where(kept[:, None], before[t].m, 0)
        C, n, m = before[t + 1]
        given = np.where(used[:, None, None], dh[:, t], 0)
        dot = (n * q).sum(-1, keepdims=True)
        floor = np.exp(-m)[..., None]
        size = np.maximum(np.abs(dot), floor) + epsilon
        numerator = np.einsum("bhkv,bhk->bhv", C, q)
        dnumerator = given / size
        dsize = -(given * numerator).sum(-1, keepdims=True) / size**2
        ddot = np.where(np.abs(dot) > floor, np.sign(dot) * dsize, 0)
        dm = dm + np.where(np.abs(dot) > floor, 0, -floor * dsize)[..., 0]
        found.q[:, t] = np.einsum("bhkv,bhv->bhk", C, dnumerator) + ddot * n
        dC = dC + q[..., :, None] * dnumerator[..., None, :]
        dn = dn + ddot * q
        dk = i * (np.einsum("bhkv,bhv->bhk", dC, v) + dn)
        found.k[:, t] = scale * dk
        found.v[:, t] = i * np.einsum("bhkv,bhk->bhv", dC, k)
        di = (dk * k).sum(-1)  # of log i = ĩ - m
        df = f[..., 0] * ((dC * C_before).sum((-1, -2)) + (dn * n_before).sum(-1))  # of log f = ℓ + m₋ - m
        dafter = dm - di - df
        ell = log_sigmoid(inputs.f[:, t]) + m_before
        from_input = inputs.i[:, t] >= ell
        dell = df + np.where(from_input, 0, dafter)
        found.i[:, t] = np.where(used[:, None], di + np.where(from_input, dafter, 0), 0)
        found.f[:, t] = np.where(used[:, None], dell / (1 + np.exp(inputs.f[:, t])), 0)
        dm = np.where(kept[:, None], np.where(used[:, None], dell, dm), 0)
        dC = np.where(kept[:, None, None, None], f[..., None] * dC, 0)
        dn = np.where(kept[:, None, None], f * dn, 0)
    return found, MatrixState(dC, dn, dm)
