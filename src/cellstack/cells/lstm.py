"""The LSTM: input gate i, forget gate f, candidate g, output gate o; states h and c."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arguments import BELOW_ONE, COMPATIBLE, FORGET_BIAS, POSITIVE, Argument
from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN, RECURRENT_GAIN, RECURRENT_KERNEL, Array
from cellstack.cells.base import Foreign, Kind, Ops, State, V, sums

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class Trace(NamedTuple):
    """An LSTM's gates (after their activations), c and h at every step, each `[B, T, H]`; h may be projected.

    At a masked step the gates are zero, and `c` and `h` keep their values.
    """

    i: Any
    f: Any
    g: Any
    o: Any
    c: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V, c: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return i f g o, and h and c; see `cellstack.reference` for the equations."""
    z = dict(zip(spec.gates, ops.split(sums(ops, spec, a, ops.dropped(h)), len(spec.gates)), strict=True))
    seeing = [gate for gate in spec.gates if gate != "g"] if spec.peepholes else []
    p = {gate: ops.weight("peepholes", row) for row, gate in enumerate(seeing)}
    for gate in seeing[:-1]:  # i and f depend on c before the step, o on c after it
        z[gate] = ops.add(z[gate], ops.mul(p[gate], c))
    i = ops.gate("i", z["i"])
    f = ops.record("f", ops.one_minus(i)) if spec.coupled else ops.gate("f", z["f"])
    g = ops.gate("g", z["g"])
    c = ops.clip(ops.add(ops.mul(f, c), ops.mul(i, g)), spec.cell_clip)
    c = ops.record("c", _normalised(ops, c) if spec.joint else c)
    o = ops.gate("o", ops.add(z["o"], ops.mul(p["o"], c)) if spec.peepholes else z["o"])
    h = ops.mul(o, ops.activation("cell", _normalised(ops, c) if spec.layer_norm and not spec.joint else c))
    return (i, f, g, o), (ops.product(h, "projection") if spec.proj_size else h, c)


def _normalised(ops: Ops[V], c: V) -> V:
    return ops.add(ops.mul(ops.norm(c), ops.weight("cell_gain")), ops.weight("cell_bias"))


LSTM = Kind(
    name="lstm",
    title="LSTM",
    gates={"i": "write", "f": "keep", "g": "candidate", "o": "output"},
    state=State,
    trace=Trace,
    step=step,
    arrays=(
        KERNEL,
        RECURRENT_KERNEL,
        BIAS,
        Array("peepholes", "G-1 H", "zeros", "peepholes"),  # of all gates but g
        Array("projection", "H P", "kernel", "proj_size", pack="matrix"),
        KERNEL_GAIN,
        RECURRENT_GAIN,
        Array("cell_gain", "H", "ones", "layer_norm"),
        Array("cell_bias", "H", "zeros", "layer_norm"),
    ),
    flags=(
        Argument(
            "peepholes",
            "bool",
            False,
            "connect c to the gates: i and f use c before the step (`z_i += p_i·c_prev`), o uses c after it.",
        ),
        Argument("coupled", "bool", False, "f is 1 - i, and has no weights."),
        Argument(
            "proj_size", "int", 0, "width P of a projection, `h = (o·φ(c))·projection`; h is then `[B, P]`. 0: none."
        ),
        Argument("cell_clip", "float | None", None, "clip c to ±cell_clip. None: no clipping.", POSITIVE),
        Argument("zoneout_cell", "float", 0.0, "the same as zoneout, for c.", BELOW_ONE),
        *FORGET_BIAS,
        *COMPATIBLE,
    ),
    positions={"unit_forget_bias": ("bias_initializer",)},
    outputs=("cell",),
    memory="c",
    zoneout={"h": "zoneout", "c": "zoneout_cell"},
    names={
        "torch": Foreign("LSTM", "ifgo"),
        "keras": Foreign("LSTM", "ifgo"),
        "keras1": Foreign("LSTM", "igfo", letters="icfo"),
        "cudnn": Foreign("CuDNNLSTM", "ifgo"),
        "rtneural": Foreign("lstm", "ifgo"),
        "onnx": Foreign("LSTM", "iofg"),
    },
    meanings={
        "f": "forget gate: how much of the cell state is kept",
        "o": "output gate: how much of the cell state is output",
        "c": "cell state: the unit's memory",
    },
    ref='Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000, "Learning to Forget", sec. 2 and 3',
    doc="""a long short-term memory::

        z = x·kernel + h_prev·recurrent_kernel + bias        i, f, o = σ(z_i, z_f, z_o)    g = φ(z_g)
        c = f·c_prev + i·g                                   h = o·φ(c)

    Ref: Hochreiter and Schmidhuber 1997; the forget gate: Gers, Schmidhuber and Cummins 2000, sec. 3;
    peepholes: Gers and Schmidhuber 2000; coupled gates: Greff et al. 2017; projection: Sak, Senior and Beaufays 2014;
    layer normalisation: Ba, Kiros and Hinton 2016, eq. 20 to 22; zoneout: Krueger et al. 2017; dropout on the state:
    Gal and Ghahramani 2016.
    """,
)
