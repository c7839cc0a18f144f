"""Gated recurrent units: update gate z, reset gate r, candidate g; state h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arguments import COMPATIBLE, Argument
from cellstack.cells.base import Foreign, HiddenState, Kind, Ops, V, biased, product

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class GRUTrace(NamedTuple):
    """A GRU's gates (after their activations) and h at every step, each `[B, T, H]`: see `Trace`."""

    z: Any
    r: Any
    g: Any
    h: Any


def inputs(ops: Ops[V], spec: CellSpec, x: V) -> V:
    """Return `x·kernel` plus its bias."""
    return biased(ops, spec, product(ops, spec, x, "kernel"), 0 if spec.reset_after else None)


def step(ops: Ops[V], spec: CellSpec, a: Any, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return z r g and, with `reset_after`, q_g; and h; see `cellstack.reference` for the equations."""
    a, attention = a if spec.attention else (a, None)
    a_z, a_r, a_g = ops.split(a, 3)
    seen = ops.dropped(h)
    if spec.reset_after:
        q_z, q_r, q_g = ops.split(biased(ops, spec, product(ops, spec, seen, "recurrent_kernel"), 1), 3)
    else:
        q_z, q_r = ops.split(ops.product(seen, "recurrent_kernel", slice(0, 2)), 2)
        q_g = None
    z, r = ops.gate("z", ops.add(a_z, q_z)), ops.gate("r", ops.add(a_r, q_r))
    b_g = ops.product(ops.mul(r, seen), "recurrent_kernel", slice(2, 3)) if q_g is None else ops.mul(r, q_g)
    g = ops.gate("g", ops.add(a_g, b_g))
    if attention is None:
        h = ops.add(ops.mul(z, h), ops.mul(ops.one_minus(z), g))
    else:
        u = ops.mul(ops.one_minus(z), attention)
        h = ops.add(ops.mul(ops.one_minus(u), h), ops.mul(u, g))
    return (z, r, g) if q_g is None else (z, r, g, q_g), (h,)


GRU = Kind(
    name="gru",
    title="GRU",
    gates={"z": "keep", "r": "reset", "g": "candidate"},
    state=HiddenState,
    trace=GRUTrace,
    step=step,
    inputs=inputs,
    scalar="attention",
    flags=(
        Argument(
            "reset_after",
            "bool",
            True,
            "apply the reset gate after the recurrent product, as Keras, PyTorch and cuDNN do; False: to h before it.",
        ),
        Argument(
            "attention",
            "bool",
            False,
            "the last column of x is an attention weight u for each row and step. It isn't multiplied by the kernel, "
            "but scales the update: `h = (1 - u·(1 - z))·h_prev + u·(1 - z)·g`, as in DIEN's AUGRU.",
        ),
        *COMPATIBLE,
    ),
    positions={"reset_after": ("unroll", "go_backwards", "recurrent_dropout")},
    normed=(2, 1),
    planes=lambda spec: ("q_g",) if spec.reset_after else (),
    names={
        "torch": Foreign("GRU", "rzg"),
        "keras": Foreign("GRU", "zrg"),
        "keras1": Foreign("GRU", "zrg", letters="zrh"),
        "cudnn": Foreign("CuDNNGRU", "zrg"),
        "rtneural": Foreign("gru", "zrg"),
        "onnx": Foreign("GRU", "zrg"),
    },
    meanings={"z": "update gate: how much of the state is kept"},
    ref='Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", eq. 5 to 8',
    doc="""a gated recurrent unit::

        a = x·kernel + bias[0]        q = h_prev·recurrent_kernel + bias[1]
        z, r = σ(a_z + q_z, a_r + q_r)        g = φ(a_g + r·q_g)        h = z·h_prev + (1 - z)·g

    With `reset_after=False` there is one bias `[3H]`, and `g = φ(a_g + (r·h_prev)·recurrent_kernel_g)`. With
    `attention` the last column of x scales the update of h.

    Ref: Cho et al. 2014, eq. 5 to 8, with z and 1 - z exchanged, as in all libraries; attention: Zhou et al. 2019,
    "Deep Interest Evolution Network for Click-Through Rate Prediction", AUGRU.
    """,
)
