"""The steps of all kinds of cell in NumPy, and the backward pass of each: the equations of `cellstack.reference`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import BFloat16Array, rounded, widened
from cellstack.cells.spec import CellSpec

Array = NDArray[np.float64]
Arrays = dict[str, Array]
Back = tuple[Array, Array, tuple[Any, ...]]


def _sigmoid(z: Array, *_: float) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * z))  # the formula with exp(-z) overflows


_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy has no erf; this takes some 0.1 us per number


def _normal(z: Array) -> Array:
    return 0.5 + 0.5 * np.asarray(_erf(z * math.sqrt(0.5)), z.dtype)


# name -> (y as a function of z and the parameters, dy/dz as a function of z, y and the parameters). NaN stays NaN.
ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "sigmoid": (_sigmoid, lambda z, y, *_: y * (1.0 - y)),
    "tanh": (lambda z, *_: np.tanh(z), lambda z, y, *_: 1.0 - y * y),
    "linear": (lambda z, *_: z, lambda z, *_: np.ones_like(z)),
    "relu": (lambda z, *_: np.where(z <= 0.0, 0.0, z), lambda z, *_: (z > 0.0) * 1.0),
    "hard_sigmoid": (lambda z, a, b: np.clip(a * z + b, 0.0, 1.0), lambda z, y, a, b: ((y > 0.0) & (y < 1.0)) * a),
    "softsign": (lambda z, *_: z / (1.0 + np.abs(z)), lambda z, *_: (1.0 + np.abs(z)) ** -2.0),
    "softplus": (lambda z, *_: np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z))), lambda z, *_: _sigmoid(z)),
    "elu": (
        lambda z, a, b: np.where(z > 0.0, z, a * np.expm1(np.minimum(z, 0.0))),
        lambda z, y, a, b: np.where(z > 0.0, 1.0, y + a),
    ),
    "affine": (lambda z, a, b: a * z + b, lambda z, y, a, b: np.full_like(z, a)),
    "leaky_relu": (lambda z, a, b: np.where(z > 0.0, z, a * z), lambda z, y, a, b: np.where(z > 0.0, 1.0, a)),
    "thresholded_relu": (lambda z, a, b: np.where(z <= a, 0.0, z), lambda z, y, a, b: (z > a) * 1.0),
    "positive": (
        lambda z, *_: np.where(z < 0.0, _sigmoid(z), z + 0.5),
        lambda z, y, *_: np.where(z < 0.0, y * (1.0 - y), 1.0),
    ),
    "scaled_tanh": (lambda z, a, b: a * np.tanh(b * z), lambda z, y, a, b: a * b * (1.0 - (y / a) ** 2)),
    "silu": (lambda z, *_: z * _sigmoid(z), lambda z, y, *_: y + _sigmoid(z) * (1.0 - y)),
    "gelu": (
        lambda z, *_: z * _normal(z),
        lambda z, *_: _normal(z) + z * np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi),
    ),
}


# ── parts that all kinds share; each is followed by its backward pass ───────────────────────────────────────────────

GAINS = {"kernel": "kernel_gain", "recurrent_kernel": "recurrent_gain"}


class _Cell:
    """A cell's description and arrays, and the operations that all kinds share.

    An operation saves what its backward pass needs on the step's tape `s`. A backward pass takes the gradient w.r.t.
    the output, adds to `d`, the gradients w.r.t. the arrays by name, and returns the gradient w.r.t. the input.
    """

    def __init__(self, spec: CellSpec, arrays: Mapping[str, Any]) -> None:
        self.spec = spec
        self.w = {name: np.asarray(arrays[name], np.float64) for name in spec.shapes}
        self.bfloat16 = {name for name in spec.shapes if isinstance(arrays[name], BFloat16Array)}
        self.patched = lambda name, value, before: value
        self.dropout: Any = 1.0  # the mask of recurrent dropout, for kinds that don't apply it to h
        ends = np.cumsum([0, *spec.of_kind.blocks(spec)]) * spec.units  # of a GRU, z and r together and g separately
        self.together = [slice(*pair) for pair in pairwise(ends)]  # the columns that are normalised together

    def initial_state(self, batch: int) -> list[Array]:
        sizes = self.spec.state_sizes.items()
        return [np.broadcast_to(self.w.get(f"initial_{name}", 0.0), (batch, size)) for name, size in sizes]

    def initial_state_back(self, d: Arrays, dstate: Sequence[Array]) -> None:
        if self.spec.learn_initial_state:
            for name, da in zip(self.spec.state_sizes, dstate, strict=True):
                d[f"initial_{name}"] += da.sum(axis=0)

    def features(self, s: SimpleNamespace, x: Array) -> Array:
        """Return the columns of x that the kernel multiplies; save the last one, `[B, 1]`, of a cell with a scalar."""
        if self.spec.scalar:
            x, s.scalar = x[:, :-1], x[:, -1:]
        return x

    def rows(self, name: str, v: Array) -> Array:
        return widened(rounded(v.astype(np.float32))).astype(np.float64) if name in self.bfloat16 else v

    def product(self, s: SimpleNamespace, name: str, v: Array) -> Array:
        s.factors[name] = v
        out = self.times(name, v) if name in self.w else v
        return self.normalise(s, GAINS[name], out) if self.spec.layer_norm is True else out

    def product_back(self, s: SimpleNamespace, d: Arrays, name: str, dout: Array) -> Array:
        if self.spec.layer_norm is True:
            dout = self.normalise_back(s, d, GAINS[name], dout)
        return self.times_back(d, name, s.factors[name], dout) if name in self.w else dout

    def by_head(self, arrays: Arrays, name: str, gates: slice) -> Array:
        """Return a view of a matrix, or of some of its gates, as `[heads, inputs/heads, gates, H/heads]`.

        The product of a backbone has one gate, of U units.
        """
        heads = self.spec.heads if name == "recurrent_kernel" else 1
        count = 1 if self.spec.backbone_units and name != "gate_kernel" else len(self.spec.gates)
        return arrays[name].reshape(heads, -1, count, arrays[name].shape[-1] // count)[:, :, gates]

    def times(self, name: str, v: Array, gates: slice = slice(None)) -> Array:
        w = self.by_head(self.w, name, gates)
        heads, inputs, count, units = w.shape
        parts = self.rows(name, v).reshape(len(v), heads, inputs).swapaxes(0, 1)
        out = parts @ w.reshape(heads, inputs, count * units)
        return out.reshape(heads, len(v), count, units).transpose(1, 2, 0, 3).reshape(len(v), count * heads * units)

    def times_back(self, d: Arrays, name: str, v: Array, dout: Array, gates: slice = slice(None)) -> Array:
        w = self.by_head(self.w, name, gates)
        heads, inputs, count, units = w.shape
        parts = v.reshape(len(v), heads, inputs).transpose(1, 2, 0)
        douts = dout.reshape(len(v), count, heads, units).transpose(2, 0, 1, 3).reshape(heads, len(v), count * units)
        dw = self.by_head(d, name, gates)
        dw += (parts @ douts).reshape(w.shape)
        return (douts @ w.reshape(heads, inputs, -1).swapaxes(1, 2)).swapaxes(0, 1).reshape(v.shape)

    def sums(self, s: SimpleNamespace, x: Array, h_in: Array) -> Array:
        z = self.product(s, "kernel", x) + self.product(s, "recurrent_kernel", h_in)
        if self.spec.joint:
            z = self.normalise(s, "kernel_gain", z)
        z = z + self.w.get("bias", 0.0)
        if not self.spec.backbone_units:
            return z
        s.layers = [self.layer(s, z)]
        for n in range(self.spec.backbone_layers - 1):
            z = self.rows("backbone_kernel", s.layers[-1][0]) @ self.w["backbone_kernel"][n]
            s.layers.append(self.layer(s, z + self.w["backbone_bias"][n] if self.spec.use_bias else z))
        return self.times("gate_kernel", s.layers[-1][0]) + self.w.get("gate_bias", 0.0)

    def layer(self, s: SimpleNamespace, z: Array) -> tuple[Array, Array]:
        """Return the output of a layer of the backbone, and its slope."""
        return self.activate(s, "backbone", z), s.slopes["backbone"]

    def sums_back(self, s: SimpleNamespace, d: Arrays, dz: Array) -> tuple[Array, Array]:
        if self.spec.backbone_units:
            if self.spec.use_bias:
                d["gate_bias"] += dz.sum(axis=0)
            dz = self.times_back(d, "gate_kernel", s.layers[-1][0], dz) * s.layers[-1][1]
            for n in reversed(range(self.spec.backbone_layers - 1)):
                d["backbone_kernel"][n] += s.layers[n][0].T @ dz
                if self.spec.use_bias:
                    d["backbone_bias"][n] += dz.sum(axis=0)
                dz = (dz @ self.w["backbone_kernel"][n].T) * s.layers[n][1]
        if self.spec.use_bias:
            d["bias"] += dz.sum(axis=0)
        if self.spec.joint:
            dz = self.normalise_back(s, d, "kernel_gain", dz)
        return self.product_back(s, d, "kernel", dz), self.product_back(s, d, "recurrent_kernel", dz)

    def normalise(self, s: SimpleNamespace, gain: str, v: Array) -> Array:
        unit, scale = np.empty_like(v), np.empty_like(v)
        for part in self.together:
            scale[:, part] = np.sqrt(v[:, part].var(axis=1, keepdims=True) + self.spec.norm_epsilon)
            unit[:, part] = (v[:, part] - v[:, part].mean(axis=1, keepdims=True)) / scale[:, part]
        s.norms[gain] = unit, scale
        return unit * self.w[gain]

    def normalise_back(self, s: SimpleNamespace, d: Arrays, gain: str, dout: Array) -> Array:
        unit, scale = s.norms[gain]
        d[gain] += (dout * unit).sum(axis=0)
        dv = dout * self.w[gain]
        for part in self.together:  # unit doesn't depend on the mean of v, nor (except for epsilon) on its scale
            du, u = dv[:, part], unit[:, part]
            dv[:, part] = du - du.mean(axis=1, keepdims=True) - u * (du * u).mean(axis=1, keepdims=True)
        return dv / scale

    def activate(self, s: SimpleNamespace, slot: str, z: Array) -> Array:
        name, alpha, beta = self.spec.activations[self.spec.slots.index(slot)]
        function, slope = ACTIVATIONS[name]
        gate = slot in self.spec.of_kind.gates
        clip = self.spec.clip if gate and self.spec.clip is not None else np.inf
        cut = np.clip(z, -clip, clip)
        s.sums[slot] = z
        y = function(cut, alpha, beta)
        s.slopes[slot] = slope(cut, y, alpha, beta) * (np.abs(z) < clip)  # dy/dz
        return self.patched(slot, y, None) if gate else y


# ── the kinds: a step takes x [B, I], h_in and the state before; `back` returns the gradients w.r.t. these three, and
#    saves that of a scalar, `s.dscalar` ──────────────────────────────────────────────────────────────────────────────


class _LSTM(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        spec, w, (_, c_prev) = self.spec, self.w, state
        z = dict(zip(spec.gates, np.split(self.sums(s, x, h_in), len(spec.gates), axis=1), strict=True))
        p = self.peepholes(w)
        for gate in list(p)[:-1]:  # i and f depend on c before the step, o on c after it
            z[gate] = z[gate] + p[gate] * c_prev
        i = self.activate(s, "i", z["i"])
        f = self.patched("f", 1.0 - i, None) if spec.coupled else self.activate(s, "f", z["f"])
        g = self.activate(s, "g", z["g"])
        c_new = f * c_prev + i * g
        if spec.cell_clip is not None:
            s.cell_inside = np.abs(c_new) < spec.cell_clip
            c_new = np.clip(c_new, -spec.cell_clip, spec.cell_clip)
        if spec.joint:
            c_new = self.normalise(s, "cell_gain", c_new) + w["cell_bias"]
        seen = self.patched("c", c_new, c_prev)
        if spec.peepholes:
            z["o"] = z["o"] + p["o"] * seen
        o = self.activate(s, "o", z["o"])
        apart = spec.layer_norm and not spec.joint
        c_out = self.normalise(s, "cell_gain", seen) + w["cell_bias"] if apart else seen
        c_act = self.activate(s, "cell", c_out)
        m = o * c_act
        h_new = self.rows("projection", m) @ w["projection"] if spec.proj_size else m
        s.state, s.gates = (h_new, c_new), (i, f, g, o)
        s.c_prev, s.c_new, s.c_act, s.m = c_prev, c_new, c_act, m

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        spec, w, slopes = self.spec, self.w, s.slopes
        (dm, dc_new), (i, f, g, o), (di, df, dg, do) = dstate, s.gates, dgates
        if spec.proj_size:
            d["projection"] += s.m.T @ dm
            dm = dm @ w["projection"].T
        do = do + dm * s.c_act  # m = o⊙φ(c_out)
        dc_out = dm * o * slopes["cell"]
        if spec.layer_norm and not spec.joint:
            dc_out = self.cell_norm_back(s, d, dc_out)
        dc_new = dc_new + dc_out
        dz, p, dp = {"o": do * slopes["o"]}, self.peepholes(w), self.peepholes(d)
        if spec.peepholes:
            dp["o"] += (dz["o"] * s.c_new).sum(axis=0)
            dc_new = dc_new + dz["o"] * p["o"]
        if spec.joint:
            dc_new = self.cell_norm_back(s, d, dc_new)
        if spec.cell_clip is not None:
            dc_new = dc_new * s.cell_inside
        di, df, dg, dc_prev = di + dc_new * g, df + dc_new * s.c_prev, dg + dc_new * i, dc_new * f  # f⊙c_prev + i⊙g
        if spec.coupled:
            di = di - df  # f = 1 - i
        else:
            dz["f"] = df * slopes["f"]
        dz["i"], dz["g"] = di * slopes["i"], dg * slopes["g"]
        for gate in list(p)[:-1]:  # i and f depend on c before the step, o on c after it
            dp[gate] += (dz[gate] * s.c_prev).sum(axis=0)
            dc_prev = dc_prev + dz[gate] * p[gate]
        dx, dh_in = self.sums_back(s, d, np.concatenate([dz[gate] for gate in spec.gates], axis=1))
        return dx, dh_in, (0.0, dc_prev)

    def cell_norm_back(self, s: SimpleNamespace, d: Arrays, dc: Array) -> Array:
        d["cell_bias"] += dc.sum(axis=0)
        return self.normalise_back(s, d, "cell_gain", dc)

    def peepholes(self, arrays: Arrays) -> Arrays:  # views of the rows
        gates = [gate for gate in self.spec.gates if gate != "g"]
        return dict(zip(gates, arrays["peepholes"], strict=True)) if self.spec.peepholes else {}


class _GRU(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        spec, w, (h_prev,) = self.spec, self.w, state
        u = s.scalar if spec.attention else 1.0
        a, q = self.product(s, "kernel", x), self.product(s, "recurrent_kernel", h_in)
        if spec.use_bias:
            a, q = (a + w["bias"][0], q + w["bias"][1]) if spec.reset_after else (a + w["bias"], q)
        (a_z, a_r, a_g), (q_z, q_r, q_g) = np.split(a, 3, axis=1), np.split(q, 3, axis=1)
        z, r = self.activate(s, "z", a_z + q_z), self.activate(s, "r", a_r + q_r)
        b_g = r * q_g if spec.reset_after else self.times("recurrent_kernel", r * h_in, slice(2, 3))
        g = self.activate(s, "g", a_g + b_g)
        keep = 1.0 - u * (1.0 - z) if spec.attention else z
        s.state = (keep * h_prev + (1.0 - keep) * g,)
        s.gates = (z, r, g, q_g) if spec.reset_after else (z, r, g)
        s.h_prev, s.h_in, s.q_g, s.u, s.keep = h_prev, h_in, q_g, u, keep

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        spec, slopes = self.spec, s.slopes
        (dh_new,), (z, r, g, *_), (dz, dr, dg, *_) = dstate, s.gates, dgates
        dkeep = dh_new * (s.h_prev - g)  # keep⊙h_prev + (1 - keep)⊙g
        da_z = (dz + dkeep * s.u) * slopes["z"]
        da_g = (dg + dh_new * (1.0 - s.keep)) * slopes["g"]
        if spec.reset_after:  # r⊙q_g
            dr, dq_g, dh_in = dr + da_g * s.q_g, da_g * r, 0.0
        else:  # (r⊙h_in)·recurrent_kernel_g
            drh = self.times_back(d, "recurrent_kernel", r * s.h_in, da_g, slice(2, 3))
            dr, dq_g, dh_in = dr + drh * s.h_in, np.zeros_like(da_g), drh * r
        da_r = dr * slopes["r"]
        da, dq = np.concatenate([da_z, da_r, da_g], axis=1), np.concatenate([da_z, da_r, dq_g], axis=1)
        if spec.use_bias:
            d["bias"] += [da.sum(axis=0), dq.sum(axis=0)] if spec.reset_after else da.sum(axis=0)
        dh_in = dh_in + self.product_back(s, d, "recurrent_kernel", dq)
        dx = self.product_back(s, d, "kernel", da)
        s.dscalar = (dkeep * (z - 1.0)).sum(axis=1, keepdims=True)
        return dx, dh_in, (dh_new * s.keep,)


class _RNN(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        g = self.activate(s, "g", self.sums(s, x, h_in))
        s.state, s.gates = (g,), (g,)

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        dx, dh_in = self.sums_back(s, d, (dgates[0] + dstate[0]) * s.slopes["g"])
        return dx, dh_in, (0.0,)


class _LiGRU(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        (h_prev,) = state
        z, g = np.split(self.sums(s, x, h_prev), 2, axis=1)
        z, g = s.gates = self.activate(s, "z", z), self.activate(s, "g", g)
        s.state, s.h_prev = (z * h_prev + (1.0 - z) * (self.dropout * g),), h_prev

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh,), (z, g), (dz, dg), m = dstate, s.gates, dgates, self.dropout
        dz, dg = dz + dh * (s.h_prev - m * g), dg + dh * (1.0 - z) * m
        dx, dh_prev = self.sums_back(s, d, np.concatenate([dz * s.slopes["z"], dg * s.slopes["g"]], axis=1))
        return dx, np.zeros_like(dh), (dh * z + dh_prev,)


class _CfC(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        z_g, z_k, z_s, z_t = np.split(self.sums(s, x, h_in), 4, axis=1)
        s.sums["s"], s.time = z_s, s.scalar if self.spec.timespans else 1.0
        g, k, slope = self.activate(s, "g", z_g), self.activate(s, "k", z_k), self.patched("s", z_s, None)
        t = self.activate(s, "t", z_t + slope * s.time)
        s.share = 1.0 if self.spec.mode == "no_gate" else 1.0 - t  # of g in h
        s.state, s.gates = (s.share * g + t * k,), (g, k, slope, t)

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh,), (g, k, slope, t), (dg, dk, dslope, dt) = dstate, s.gates, dgates
        dz_t = (dt + dh * (k if self.spec.mode == "no_gate" else k - g)) * s.slopes["t"]
        dz_g, dz_k = (dg + dh * s.share) * s.slopes["g"], (dk + dh * t) * s.slopes["k"]
        s.dscalar = (dz_t * slope).sum(axis=1, keepdims=True)
        dx, dh_in = self.sums_back(s, d, np.concatenate([dz_g, dz_k, dslope + dz_t * s.time, dz_t], axis=1))
        return dx, dh_in, (0.0,)


class _CfS(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        g = self.activate(s, "g", self.sums(s, x, h_in))
        s.time = s.scalar if self.spec.timespans else 1.0
        s.rate = np.abs(self.w["decay"]) + np.abs(g)
        s.kept = np.exp(-s.time * s.rate)
        s.state, s.gates = (self.w["limit"] * (1.0 - g * s.kept),), (g,)

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh,), (g,) = dstate, s.gates
        d["limit"] += (dh * (1.0 - g * s.kept)).sum(axis=0)
        dleft = -dh * self.w["limit"]  # of g·e^(-τ·rate)
        drate = -dleft * g * s.kept * s.time
        d["decay"] += np.sign(self.w["decay"]) * drate.sum(axis=0)
        s.dscalar = -(dleft * g * s.kept * s.rate).sum(axis=1, keepdims=True)
        dg = dgates[0] + dleft * s.kept + drate * np.sign(g)
        dx, dh_in = self.sums_back(s, d, dg * s.slopes["g"])
        return dx, dh_in, (0.0,)


class _Min(_Cell):
    """What minGRU and minLSTM share: gates that depend on x alone."""

    def gates_of(self, s: SimpleNamespace, x: Array) -> list[Array]:
        a = self.product(s, "kernel", x) + self.w.get("bias", 0.0)
        parts = np.split(a, len(self.spec.gates), axis=1)
        return [self.activate(s, gate, part) for gate, part in zip(self.spec.gates, parts, strict=True)]

    def gates_back(self, s: SimpleNamespace, d: Arrays, dgates: Sequence[Array]) -> Array:
        da = np.concatenate([dv * s.slopes[gate] for gate, dv in zip(self.spec.gates, dgates, strict=True)], axis=1)
        if self.spec.use_bias:
            d["bias"] += da.sum(axis=0)
        return self.product_back(s, d, "kernel", da)


class _MinGRU(_Min):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        (h_prev,) = state
        z, g = s.gates = self.gates_of(s, x)
        s.state, s.h_prev = ((1.0 - z) * h_prev + z * g,), h_prev

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh,), (z, g), (dz, dg) = dstate, s.gates, dgates
        dx = self.gates_back(s, d, [dz + dh * (g - s.h_prev), dg + dh * z])
        return dx, np.zeros_like(dh), (dh * (1.0 - z),)


class _MinLSTM(_Min):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        (h_prev,) = state
        i, f, g = s.gates = self.gates_of(s, x)
        h_new = (f * h_prev + i * g) / (f + i)
        s.state, s.h_prev, s.h_new = (h_new,), h_prev, h_new

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh,), (i, f, g), (di, df, dg) = dstate, s.gates, dgates
        share = dh / (f + i)  # of f⊙h_prev + i⊙g; the gradient of f + i is -share⊙h_new
        dx = self.gates_back(s, d, [di + share * (g - s.h_new), df + share * (s.h_prev - s.h_new), dg + share * i])
        return dx, np.zeros_like(dh), (share * f,)


class _SLSTM(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        _, c_prev, n_prev, m_prev = state
        z_i, z_f, z_g, z_o = np.split(self.sums(s, x, h_in), 4, axis=1)
        s.sums |= {"i": z_i, "f": z_f}
        log_f = z_f if self.spec.exponential_forget else -ACTIVATIONS["softplus"][0](-z_f)
        s.slope_f = np.ones_like(z_f) if self.spec.exponential_forget else _sigmoid(-z_f)  # of log_f
        stored, kept = n_prev != 0.0, log_f + m_prev
        most = np.maximum(kept, z_i)
        m_new = np.where(stored, most, z_i)
        i = self.patched("i", np.exp(z_i - m_new), None)
        f = self.patched("f", np.where(stored, np.exp(kept - most), 0.0), None)
        g, o = self.activate(s, "g", z_g), self.activate(s, "o", z_o)
        c_new, n_new = f * c_prev + i * g, f * n_prev + i
        c, n = self.patched("c", c_new, c_prev), self.patched("n", n_new, n_prev)
        s.state, s.gates = (o * (c / n), c_new, n_new, m_new), (i, f, g, o, log_f)
        # The part of m's gradient that l + m_prev gets; z_i gets the rest.
        s.share = np.where(stored, np.where(kept == z_i, 0.5, kept > z_i), 0.0)
        s.c_prev, s.n_prev = c_prev, n_prev

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh, dc, dn, dm), (h, c, n, _), (i, f, g, o, _), (di, df, dg, do, _) = dstate, s.state, s.gates, dgates
        do = do + dh * (c / n)
        dc, dn = dc + dh * o / n, dn - dh * h / n
        di, df, dg = di + dc * g + dn, df + dc * s.c_prev + dn * s.n_prev, dg + dc * i
        dm = dm - i * di - f * df
        dkept, dz_i = f * df + s.share * dm, i * di + (1.0 - s.share) * dm
        dz = [dz_i, dkept * s.slope_f, dg * s.slopes["g"], do * s.slopes["o"]]
        dx, dh_in = self.sums_back(s, d, np.concatenate(dz, axis=1))
        return dx, dh_in, (0.0, dc * f, dn * f, dkept)


class _SRU(_Cell):
    def step(self, s: SimpleNamespace, x: Array, h_in: Array, state: Sequence[Array]) -> None:
        (_, c_prev), (v_f, v_r) = state, self.w["cell_vectors"]
        a_g, a_f, a_r, a_s = np.split(self.product(s, "kernel", x) + self.w.get("bias", 0.0), 4, axis=1)
        g, f = self.activate(s, "g", a_g), self.activate(s, "f", a_f + v_f * c_prev)
        r, skip = self.activate(s, "r", a_r + v_r * c_prev), self.activate(s, "s", a_s)
        c_new = f * c_prev + (1.0 - f) * g
        c_act = self.activate(s, "cell", self.patched("c", c_new, c_prev))
        s.state, s.gates = (r * c_act + (1.0 - r) * skip, c_new), (g, f, r, skip)
        s.c_prev, s.c_act = c_prev, c_act

    def back(self, s: SimpleNamespace, d: Arrays, dstate: Sequence[Array], dgates: Array) -> Back:
        (dh, dc), (g, f, r, skip), (dg, df, dr, ds), (v_f, v_r) = dstate, s.gates, dgates, self.w["cell_vectors"]
        dc = dc + dh * r * s.slopes["cell"]
        dz_g, dz_f = (dg + dc * (1.0 - f)) * s.slopes["g"], (df + dc * (s.c_prev - g)) * s.slopes["f"]
        dz_r, dz_s = (dr + dh * (s.c_act - skip)) * s.slopes["r"], (ds + dh * (1.0 - r)) * s.slopes["s"]
        d["cell_vectors"] += [(dz_f * s.c_prev).sum(axis=0), (dz_r * s.c_prev).sum(axis=0)]
        da = np.concatenate([dz_g, dz_f, dz_r, dz_s], axis=1)
        if self.spec.use_bias:
            d["bias"] += da.sum(axis=0)
        dx = self.product_back(s, d, "kernel", da)
        return dx, np.zeros_like(dh), (0.0, dc * f + dz_f * v_f + dz_r * v_r)


CELLS = {
    "lstm": _LSTM,
    "gru": _GRU,
    "rnn": _RNN,
    "mingru": _MinGRU,
    "minlstm": _MinLSTM,
    "ligru": _LiGRU,
    "cfc": _CfC,
    "slstm": _SLSTM,
    "sru": _SRU,
    "cfs": _CfS,
}
