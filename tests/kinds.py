"""All that tests need to know of each kind of cell: to test a new one, add its entry to `TESTED`."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rows import SCALARS, activated, normalised, row_of_x, sums_row, times, times_heads

from cellstack.cells import KINDS


@dataclass(frozen=True)
class Tested:
    """How a kind is tested.

    Args:
        row: a second version of its step for one row: from the description, the arrays, x, h after dropout (the mask
            itself where the candidate is dropped) and the states to the states and planes, as lists of numbers.
        flags: cells by name; every flag is in one of them, with a distinct effect on every result.
        faults: of some of `flags`, settings that differ so little that tests must notice it.
        several: cells with several flags at once, which stay finite over long sequences.
        drawn: returns random own flags, given a generator, `often(share)` and the units, and the largest width.
        positive: whether gates divide, so that their activations must be positive.
        bounded: whether its candidates must be bounded, lest rounding errors grow from step to step.
        finite: whether the outputs stay finite where a step's gates are all 0 or infinite.
        units: how many units threads of the kernel share, since this saves time.
    """

    row: Callable[..., Any]
    flags: dict[str, dict[str, Any]]
    faults: dict[str, dict[str, Any]]
    several: dict[str, dict[str, Any]]
    drawn: Callable[..., dict[str, Any]] = lambda rng, often, units, largest: {}
    positive: bool = False
    bounded: bool = False
    finite: bool = True
    units: int = 450


def lstm_row(spec, w, x, h_in, state):
    H, c_prev, blocks = spec.units, state[1], {gate: n * spec.units for n, gate in enumerate(spec.gates)}
    z = sums_row(spec, w, x, h_in)
    i, f, g, o, c = ([0.0] * H for _ in range(5))
    for n in range(H):
        z_i, z_g = (z[blocks[gate] + n] for gate in "ig")
        see_i, see_f = (w["peepholes"][k, n] if spec.peepholes else 0.0 for k in (0, 0 if spec.coupled else 1))
        i[n] = activated(spec, "i", z_i + see_i * c_prev[n])
        f[n] = 1.0 - i[n] if spec.coupled else activated(spec, "f", z[blocks["f"] + n] + see_f * c_prev[n])
        g[n] = activated(spec, "g", z_g)
        c[n] = f[n] * c_prev[n] + i[n] * g[n]
        if spec.cell_clip is not None:
            c[n] = min(max(c[n], -spec.cell_clip), spec.cell_clip)
    out = c
    if spec.layer_norm:
        out = [
            v + shift for v, shift in zip(normalised(c, w["cell_gain"], spec.norm_epsilon), w["cell_bias"], strict=True)
        ]
    if spec.layer_norm == "joint":
        c = out
    for n in range(H):
        see_o = w["peepholes"][-1, n] if spec.peepholes else 0.0
        o[n] = activated(spec, "o", z[blocks["o"] + n] + see_o * c[n])
    m = [o[n] * activated(spec, "cell", out[n], clip=False) for n in range(H)]
    return (times(m, w["projection"]) if spec.proj_size else m, c), (i, f, g, o)


def gru_row(spec, w, x, h_in, state):
    H, h_prev, U = spec.units, state[0], w["recurrent_kernel"]
    *x, attention = x if spec.attention else (*x, 1.0)
    a, q = times(x, w["kernel"]), times_heads(spec, h_in, U)
    if spec.layer_norm:
        for row, gain in ((a, w["kernel_gain"]), (q, w["recurrent_gain"])):
            row[: 2 * H] = normalised(row[: 2 * H], gain[: 2 * H], spec.norm_epsilon)
            row[2 * H :] = normalised(row[2 * H :], gain[2 * H :], spec.norm_epsilon)
    if spec.use_bias:
        a = [v + shift for v, shift in zip(a, w["bias"][0] if spec.reset_after else w["bias"], strict=True)]
    if spec.use_bias and spec.reset_after:
        q = [v + shift for v, shift in zip(q, w["bias"][1], strict=True)]
    z = [activated(spec, "z", a[n] + q[n]) for n in range(H)]
    r = [activated(spec, "r", a[n] + q[n]) for n in range(H, 2 * H)]
    q_g = q[2 * H :]
    if spec.reset_after:
        recurrent = [r[n] * q_g[n] for n in range(H)]
    else:
        recurrent = times_heads(spec, [r[n] * h_in[n] for n in range(H)], U, first=2)
    g = [activated(spec, "g", a[2 * H + n] + recurrent[n]) for n in range(H)]
    written = [attention * (1.0 - z[n]) for n in range(H)]
    h = [(1.0 - written[n]) * h_prev[n] + written[n] * g[n] for n in range(H)]
    return (h,), (z, r, g, q_g)[: spec.planes]


def rnn_row(spec, w, x, h_in, state):
    g = [activated(spec, "g", z) for z in sums_row(spec, w, x, h_in)]
    return (g,), (g,)


def mingru_row(spec, w, x, h_in, state):
    z, g = ([activated(spec, gate, v) for v in row] for gate, row in zip("zg", row_of_x(spec, w, x), strict=True))
    return ([(1.0 - z[n]) * state[0][n] + z[n] * g[n] for n in range(spec.units)],), (z, g)


def minlstm_row(spec, w, x, h_in, state):
    i, f, g = ([activated(spec, gate, v) for v in row] for gate, row in zip("ifg", row_of_x(spec, w, x), strict=True))
    return ([(f[n] * state[0][n] + i[n] * g[n]) / (f[n] + i[n]) for n in range(spec.units)],), (i, f, g)


def ligru_row(spec, w, x, drops, state):
    H, h_prev, sums = spec.units, state[0], sums_row(spec, w, x, state[0])
    z, g = ([activated(spec, gate, v) for v in row] for gate, row in (("z", sums[:H]), ("g", sums[H:])))
    return ([z[n] * h_prev[n] + (1.0 - z[n]) * drops[n] * g[n] for n in range(H)],), (z, g)


def slstm_row(spec, w, x, h_in, state):
    H, (_, c_prev, n_prev, m_prev), z = spec.units, state, sums_row(spec, w, x, h_in)
    i, f, g, o, log_f, h, c, n, m = ([0.0] * H for _ in range(9))
    for u in range(H):
        z_i, z_f, z_g, z_o = (z[gate * H + u] for gate in range(4))
        log_f[u] = z_f if spec.exponential_forget else math.log(SCALARS["sigmoid"](z_f, 0, 0))
        kept = log_f[u] + (m_prev[u] if n_prev[u] else -math.inf)
        m[u] = max(kept, z_i)
        i[u], f[u] = math.exp(z_i - m[u]), math.exp(kept - m[u])
        g[u], o[u] = activated(spec, "g", z_g), activated(spec, "o", z_o)
        c[u], n[u] = f[u] * c_prev[u] + i[u] * g[u], f[u] * n_prev[u] + i[u]
        h[u] = o[u] * c[u] / n[u]
    return (h, c, n, m), (i, f, g, o, log_f)


def gate_sums_row(spec, w, z):
    """Return the sums of the gates, from those over x and h: the same without a backbone."""
    if not spec.backbone_units:
        return z
    biased = lambda z, bias: [v + shift for v, shift in zip(z, bias, strict=True)] if spec.use_bias else z  # noqa: E731
    for n in range(spec.backbone_layers - 1):
        b = [activated(spec, "backbone", v, clip=False) for v in z]
        z = biased(times(b, w["backbone_kernel"][n]), w["backbone_bias"][n] if spec.use_bias else None)
    b = [activated(spec, "backbone", v, clip=False) for v in z]
    return biased(times(b, w["gate_kernel"]), w.get("gate_bias"))


def cfc_row(spec, w, x, h_in, state):
    H, h = spec.units, [0.0] * spec.units
    *x, elapsed = x if spec.timespans else (*x, 1.0)
    z = gate_sums_row(spec, w, sums_row(spec, w, x, h_in))
    g, k = ([activated(spec, gate, v) for v in row] for gate, row in (("g", z[:H]), ("k", z[H : 2 * H])))
    s = z[2 * H : 3 * H]
    t = [activated(spec, "t", z[3 * H + u] + s[u] * elapsed) for u in range(H)]
    for u in range(H):
        h[u] = g[u] + t[u] * (k[u] if spec.mode == "no_gate" else k[u] - g[u])
    return (h,), (g, k, s, t)


def cfs_row(spec, w, x, h_in, state):
    *x, elapsed = x if spec.timespans else (*x, 1.0)
    g = [activated(spec, "g", v) for v in gate_sums_row(spec, w, sums_row(spec, w, x, h_in))]
    rates = [abs(decay) + abs(v) for decay, v in zip(w["decay"], g, strict=True)]
    return ([w["limit"][u] * (1.0 - g[u] * math.exp(-elapsed * rates[u])) for u in range(spec.units)],), (g,)


def sru_row(spec, w, x, h_in, state):
    H, c_prev, (v_f, v_r) = spec.units, state[1], w["cell_vectors"]
    a_g, a_f, a_r, a_s = row_of_x(spec, w, x)
    g, s = ([activated(spec, gate, v) for v in row] for gate, row in (("g", a_g), ("s", a_s)))
    f = [activated(spec, "f", a_f[u] + v_f[u] * c_prev[u]) for u in range(H)]
    r = [activated(spec, "r", a_r[u] + v_r[u] * c_prev[u]) for u in range(H)]
    c = [f[u] * c_prev[u] + (1.0 - f[u]) * g[u] for u in range(H)]
    h = [r[u] * activated(spec, "cell", c[u], clip=False) + (1.0 - r[u]) * s[u] for u in range(H)]
    return (h, c), (g, f, r, s)


def lstm_drawn(rng, often, units, largest):
    return {
        "peepholes": often(0.4),
        "coupled": often(0.3),
        "proj_size": int(rng.integers(1, units)) if units > 1 and often(0.4) else 0,
        "cell_clip": round(rng.uniform(0.3, 1.5), 2) if often(0.3) else None,
        "zoneout_cell": round(rng.uniform(0.1, 0.6), 2) if often(0.3) else 0.0,
    }


def cfc_drawn(rng, often, units, largest):
    drawn = {"timespans": often(0.5), "mode": "no_gate" if often(0.3) else "default"}
    return drawn | backbone_drawn(rng, often, largest)


def cfs_drawn(rng, often, units, largest):
    drawn = backbone_drawn(rng, often, largest)
    # at negative times h grows exponentially with g
    return drawn | ({"timespans": True, "clip": round(rng.uniform(0.3, 1.5), 2)} if often(0.5) else {})


def backbone_drawn(rng, often, largest):
    drawn = {}
    if often(0.5):
        drawn |= {"backbone_units": int(rng.integers(1, 3 * largest)), "layer_norm": False}
        drawn["backbone_layers"] = int(rng.integers(1, 4)) if often(0.5) else 1
    return drawn


TESTED = {
    "lstm": Tested(
        row=lstm_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "peepholes": {"peepholes": True},
            "coupled": {"coupled": True},
            "coupled with peepholes": {"coupled": True, "peepholes": True},
            "projection": {"proj_size": 2},
            "layer norm": {"layer_norm": True},
            "clip": {"clip": 0.3},
            "cell clip": {"cell_clip": 0.2},
            "zoneout": {"zoneout": 0.3},
            "zoneout of c": {"zoneout_cell": 0.3},
            "activations": {
                "gate_activations": {"i": "tanh", "f": "softsign", "o": "hard_sigmoid", "cell": "elu(0.5)"}
            },
            "learned start": {"learn_initial_state": True},
            "all": {
                "peepholes": True,
                "coupled": True,
                "proj_size": 2,
                "layer_norm": True,
                "norm_epsilon": 0.01,
                "clip": 1.1,
                "cell_clip": 0.9,
                "zoneout": 0.2,
                "zoneout_cell": 0.3,
                "gate_activations": {"cell": "scaled_tanh(1.2, 0.7)"},
                "learn_initial_state": True,
            },
            "joint layer norm": {"layer_norm": "joint"},
        },
        faults={
            "peepholes": {"peepholes": False},
            "layer norm": {"layer_norm": False},
            "clip": {"clip": 0.301},
            "cell clip": {"cell_clip": 0.201},
            "zoneout": {"zoneout": 0.301},
            "zoneout of c": {"zoneout_cell": 0.301},
            "activations": {"gate_activations": {"i": "tanh", "f": "softsign", "o": "hard_sigmoid", "cell": "elu"}},
            "learned start": {"learn_initial_state": False},
        },
        several={
            "": {},
            "coupled": {"coupled": True, "peepholes": True},
            "flags": {"peepholes": True, "clip": 1.5, "cell_clip": 2.0, "zoneout": 0.2, "zoneout_cell": 0.1},
            "projection": {"proj_size": 3},
            "norm": {"layer_norm": True, "learn_initial_state": True},
            "joint norm": {"layer_norm": "joint", "learn_initial_state": True},
            "joint norm, flags": {
                "layer_norm": "joint",
                "coupled": True,
                "peepholes": True,
                "cell_clip": 2.0,
                "zoneout_cell": 0.1,
            },
        },
        drawn=lstm_drawn,
    ),
    "gru": Tested(
        row=gru_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "reset before": {"reset_after": False},
            "reset before, no bias": {"reset_after": False, "use_bias": False},
            "layer norm": {"layer_norm": True},
            "attention": {"attention": True},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"z": "hard_sigmoid", "r": "tanh", "g": "softplus"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "": {"reset_after": False},
            "layer norm": {"norm_epsilon": 0.0011},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"z": "tanh", "r": "hard_sigmoid", "g": "softplus"}},
        },
        several={
            "": {},
            "reset before": {"reset_after": False},
            "norm": {"layer_norm": True},
            "attention": {"attention": True},
            "attention, reset before": {"attention": True, "reset_after": False},
        },
        drawn=lambda rng, often, units, largest: {"reset_after": often(0.5), "attention": often(0.3)},
    ),
    "rnn": Tested(
        row=rnn_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "layer norm": {"layer_norm": True},
            "joint layer norm": {"layer_norm": "joint"},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activation": {"activation": "leaky_relu(0.3)"},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activation": {"activation": "leaky_relu(0.301)"},
        },
        several={"": {}},
        units=900,
    ),
    "mingru": Tested(
        row=mingru_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "layer norm": {"layer_norm": True},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"z": "hard_sigmoid", "g": "tanh"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "layer norm": {"norm_epsilon": 0.0011},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"z": "sigmoid", "g": "tanh"}},
        },
        several={"": {}, "flags": {"layer_norm": True, "clip": 1.5, "zoneout": 0.2, "learn_initial_state": True}},
        units=16000,
    ),
    "minlstm": Tested(
        row=minlstm_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "layer norm": {"layer_norm": True},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"f": "softplus", "g": "tanh"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "layer norm": {"norm_epsilon": 0.0011},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"i": "softplus", "g": "tanh"}},
        },
        several={"": {}, "flags": {"layer_norm": True, "clip": 1.5, "zoneout": 0.2, "learn_initial_state": True}},
        positive=True,
        finite=False,
        units=8005,
    ),
    "ligru": Tested(
        row=ligru_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "layer norm": {"layer_norm": True},
            "joint layer norm": {"layer_norm": "joint"},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"z": "hard_sigmoid", "g": "tanh"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "layer norm": {"norm_epsilon": 0.0011},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"z": "sigmoid", "g": "tanh"}},
        },
        several={"": {}, "flags": {"layer_norm": "joint", "clip": 1.5, "zoneout": 0.2, "learn_initial_state": True}},
    ),
    "slstm": Tested(
        row=slstm_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "exponential forget": {"exponential_forget": True},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"g": "softsign", "o": "hard_sigmoid"}},
        },
        faults={
            "": {"exponential_forget": True},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"g": "tanh", "o": "hard_sigmoid"}},
        },
        several={"": {}, "flags": {"exponential_forget": True, "zoneout": 0.2}},
        drawn=lambda rng, often, units, largest: {"exponential_forget": often(0.3)},
        bounded=True,
        finite=False,
    ),
    "cfc": Tested(
        row=cfc_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "timespans": {"timespans": True},
            "no gate": {"mode": "no_gate"},
            "layer norm": {"layer_norm": True},
            "joint layer norm": {"layer_norm": "joint", "timespans": True},
            "backbone": {"backbone_units": 5, "backbone_activation": "softsign", "timespans": True},
            "backbone of silu": {"backbone_units": 5, "backbone_activation": "silu"},
            "three layers": {"backbone_units": 6, "backbone_layers": 3, "backbone_activation": "gelu"},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"g": "softsign", "t": "hard_sigmoid"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "": {"mode": "no_gate"},
            "layer norm": {"norm_epsilon": 0.0011},
            "backbone": {"backbone_activation": "tanh"},
            "backbone of silu": {"backbone_activation": "gelu"},
            "three layers": {"backbone_activation": "silu"},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"g": "softsign", "t": "tanh"}},
        },
        several={
            "": {},
            "timespans": {"timespans": True},
            "flags": {"timespans": True, "mode": "no_gate", "layer_norm": True, "clip": 1.5, "zoneout": 0.2},
            "backbone": {"backbone_units": 37},
            "layers": {
                "backbone_units": 37,
                "backbone_layers": 2,
                "backbone_activation": "gelu",
                "clip": 0.7,
                "zoneout": 0.4,
            },
            "backbone, flags": {
                "backbone_units": 70,
                "backbone_activation": "tanh",
                "timespans": True,
                "mode": "no_gate",
                "clip": 1.5,
                "zoneout": 0.2,
                "learn_initial_state": True,
            },
        },
        drawn=cfc_drawn,
    ),
    "cfs": Tested(
        row=cfs_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "timespans": {"timespans": True, "activation": "tanh"},
            "layer norm": {"layer_norm": True},
            "joint layer norm": {"layer_norm": "joint"},
            "backbone": {"backbone_units": 5, "backbone_activation": "silu"},
            "layers": {"backbone_units": 5, "backbone_layers": 2, "activation": "tanh", "timespans": True},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"g": "softsign"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "": {"activation": "tanh"},
            "layer norm": {"norm_epsilon": 0.0011},
            "backbone": {"backbone_activation": "gelu"},
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"g": "tanh"}},
        },
        several={
            "": {},
            "flags": {"timespans": True, "activation": "tanh", "layer_norm": True, "clip": 0.7, "zoneout": 0.4},
            "layers": {"backbone_units": 37, "backbone_layers": 2, "backbone_activation": "tanh", "zoneout": 0.4},
        },
        drawn=cfs_drawn,
        bounded=True,
        finite=False,
        units=900,
    ),
    "sru": Tested(
        row=sru_row,
        flags={
            "": {},
            "no bias": {"use_bias": False},
            "clip": {"clip": 0.3},
            "zoneout": {"zoneout": 0.3},
            "activations": {"gate_activations": {"f": "hard_sigmoid", "s": "softsign", "cell": "tanh"}},
            "learned start": {"learn_initial_state": True},
        },
        faults={
            "clip": {"clip": 0.301},
            "zoneout": {"zoneout": 0.301},
            "activations": {"gate_activations": {"f": "hard_sigmoid", "s": "softsign", "cell": "softsign"}},
        },
        several={"": {}, "flags": {"activation": "tanh", "clip": 1.5, "zoneout": 0.2, "learn_initial_state": True}},
        bounded=True,  # at a c of 0, the φ of some has no slope
        units=8000,
    ),
}


def named(table):
    """Return the cells of one of the tables of all kinds, by kind and name, as settings of `CellSpec`."""
    return {
        f"{kind}, {name}" if name else kind: {"kind": kind, **flags}
        for kind, tested in TESTED.items()
        for name, flags in getattr(tested, table).items()
    }


def chosen(rng, names=tuple(KINDS)):
    """Return one of some kinds at random. A further name changes only those choices that it wins."""
    number = int(rng.integers(2**32))
    return max(names, key=lambda name: hashlib.blake2b(f"{number} {name}".encode(), digest_size=8).digest())


def of_seed(seed, names=tuple(KINDS)):
    """Return the kind of a numbered case; see `chosen`."""
    return max(names, key=lambda name: hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
