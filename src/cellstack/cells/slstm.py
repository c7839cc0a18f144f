"""The sLSTM of the xLSTM: exponential input gate i, forget gate f, candidate g, output gate o; states h, c, n and m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arguments import FORGET_BIAS, Argument
from cellstack.cells.arrays import BIAS, KERNEL, RECURRENT_KERNEL
from cellstack.cells.base import Kind, Ops, V, sums

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class SLSTMState(NamedTuple):
    """State of one sLSTM layer after a step, each `[B, H]`. Where n is 0 nothing is stored yet, whatever m is."""

    h: Any
    c: Any
    n: Any
    m: Any


class SLSTMTrace(NamedTuple):
    """An sLSTM's gates and states at every step: see `Trace`. i and f are the stabilised ones, of which one is 1."""

    i: Any
    f: Any
    g: Any
    o: Any
    c: Any
    n: Any
    m: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V, c: V, n: V, m: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return i f g o and log_f, and h c n m; see `cellstack.reference` for the equations."""
    z_i, z_f, z_g, z_o = ops.split(sums(ops, spec, a, ops.dropped(h)), 4)
    log_f = z_f if spec.exponential_forget else ops.log_sigmoid(z_f)
    kept = ops.add(log_f, m)
    most = ops.maximum(kept, z_i)
    m = ops.select(n, most, z_i)
    i = ops.record("i", ops.exp(ops.sub(z_i, m)))
    f = ops.record("f", ops.select(n, ops.exp(ops.sub(kept, most))))
    g, o = ops.gate("g", z_g), ops.gate("o", z_o)
    c = ops.record("c", ops.add(ops.mul(f, c), ops.mul(i, g)))
    n = ops.record("n", ops.add(ops.mul(f, n), i))
    return (i, f, g, o, log_f), (ops.mul(o, ops.div(c, n)), c, n, m)


def refuses(state: Mapping[str, Any]) -> str:
    """Return why a state can't be one; see `Kind.refuses`."""
    for name, values in state.items():
        if not (abs(values) < math.inf).all():
            return f"expected {name} to be finite, got NaN or an infinity: in an empty state all arrays are 0"
    return (
        "expected n to be at least 0, got a negative number: it is a sum of weights" if (state["n"] < 0).any() else ""
    )


SLSTM = Kind(
    name="slstm",
    title="SLSTM",
    gates={"i": "write", "f": "keep", "g": "candidate", "o": "output"},
    state=SLSTMState,
    trace=SLSTMTrace,
    step=step,
    arrays=(KERNEL, RECURRENT_KERNEL, BIAS),
    flags=(
        Argument(
            "exponential_forget",
            "bool",
            False,
            "the forget gate is exp(z_f), not σ(z_f): it may exceed 1. `unit_forget_bias` initialises its bias with 0.",
        ),
        *FORGET_BIAS,
    ),
    without=("layer_norm", "norm_epsilon", "clip", "learn_initial_state"),
    fixed=("i", "f"),
    planes=lambda spec: ("log_f",),
    memory="c",
    stabiliser="m",
    refuses=refuses,
    meanings={
        "i": "input gate: how much of the candidate is written, exp(z_i - m)",
        "f": "forget gate: how much of c and n is kept, σ(z_f)·exp(m_prev - m)",
        "o": "output gate: how much of c/n is output",
        "c": "cell state: the weighted sum of the candidates, times exp(-m)",
        "n": "normaliser: the sum of their weights, times exp(-m); 0: nothing is stored yet",
        "m": "stabiliser: the logarithm of the scale of c and n",
    },
    ref='Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", sec. 2.2 and appendix A.2',
    doc="""an sLSTM, the LSTM of the xLSTM whose input gate is exponential; n normalises c, m scales both::

        z = x·kernel + h_prev·recurrent_kernel + bias        g = φ(z_g)    o = σ(z_o)
        m = max(log σ(z_f) + m_prev, z_i)        i = exp(z_i - m)        f = exp(log σ(z_f) + m_prev - m)
        c = f·c_prev + i·g        n = f·n_prev + i        h = o·c/n

    Where n_prev is 0, as in the initial state, nothing is stored: m is z_i, and f is 0.

    Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", sec. 2.2; stabilised: appendix A.2.
    """,
)
