"""The closed-form continuous-time cell (CfC): candidates g and k, time gate t and its slope s; state h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arguments import Argument, Limit, among
from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN, RECURRENT_GAIN, RECURRENT_KERNEL, Array
from cellstack.cells.base import HiddenState, Kind, Ops, V, sums

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class CfCTrace(NamedTuple):
    """A CfC's gates and h at every step, each `[B, T, H]`: see `Trace`. s has no activation."""

    g: Any
    k: Any
    s: Any
    t: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: Any, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return g k s t, and h; see `cellstack.reference` for the equations."""
    a, elapsed = a if spec.timespans else (a, None)
    z_g, z_k, z_s, z_t = ops.split(sums(ops, spec, a, ops.dropped(h)), 4)
    g, k, s = ops.gate("g", z_g), ops.gate("k", z_k), ops.record("s", z_s)
    t = ops.gate("t", ops.add(z_t, s if elapsed is None else ops.mul(s, elapsed)))
    kept = g if spec.mode == "no_gate" else ops.mul(ops.one_minus(t), g)
    return (g, k, s, t), (ops.add(kept, ops.mul(t, k)),)


def update(spec: CellSpec, gates: Mapping[str, Any]) -> None:
    """Return None: every step computes h anew, and the gates keep none of it."""


BACKBONE_ARRAYS = (
    Array("gate_kernel", "U GH", "kernel", "backbone_units", pack="matrix"),
    Array("gate_bias", "GH", "zeros", "backbone_units and use_bias", pack="bias"),
    Array("backbone_kernel", "L-1 U U", "kernel", "deep", pack="matrix"),
    Array("backbone_bias", "L-1 U", "zeros", "deep and use_bias", pack="bias"),
)
TIMESPANS = Argument(
    "timespans",
    "bool",
    False,
    "the last column of x is the time since the previous step, of each row and step, in any unit. It isn't "
    "multiplied by the kernel. False: the time between steps is 1.",
)
BACKBONE = (
    Argument(
        "backbone_units",
        "int",
        0,
        "width U of a backbone, a dense layer over x and h from which the gates are computed: "
        "`b = φ_b(x·kernel + h_prev·recurrent_kernel + bias)` and `z = b·gate_kernel + gate_bias`, with matrices "
        "`[I, U]`, `[H, U]` and `[U, 4H]`. 0: none.",
        Limit(lambda value: value >= 0, "to be at least 0"),
    ),
    Argument(
        "backbone_activation",
        "Any",
        "scaled_tanh(1.7159, 0.666)",
        'φ_b, in the forms of `activation`, or "silu" or "gelu"; the default is ncps\'s `lecun_tanh`.',
    ),
    Argument(
        "backbone_layers",
        "int",
        1,
        "number of layers of the backbone: each after the first is `b = φ_b(b·backbone_kernel[n] + "
        "backbone_bias[n])` of the one before it.",
        Limit(lambda value: value >= 1, "to be at least 1"),
    ),
)
"""Arrays and arguments that the CfS has too."""

CFC = Kind(
    name="cfc",
    title="CfC",
    gates={"g": "candidate", "k": "candidate", "s": "slope", "t": "time"},
    state=HiddenState,
    trace=CfCTrace,
    step=step,
    arrays=(
        KERNEL,
        RECURRENT_KERNEL,
        BIAS,
        KERNEL_GAIN,
        RECURRENT_GAIN,
        *BACKBONE_ARRAYS,
    ),
    scalar="timespans",
    flags=(
        TIMESPANS,
        Argument(
            "mode",
            "str",
            "default",
            '"default": the time gate mixes the candidates, `h = (1 - t)·g + t·k`; "no_gate": `h = g + t·k`.',
            among(
                "default",
                "no_gate",
                hint=": ncps's 'pure' is another kind, 'cfs'",
            ),
        ),
        *BACKBONE,
    ),
    fixed=("s",),
    update=update,
    meanings={
        "g": "candidate for short times: the new h where the time gate is 0",
        "k": "candidate for long times: the new h where the time gate is 1",
    },
    ref='Hasani et al. 2022, "Closed-form continuous-time neural networks"',
    doc="""a closed-form continuous-time network: h depends on the time τ since the previous step::

        z = x·kernel + h_prev·recurrent_kernel + bias        g, k = φ(z_g, z_k)    s = z_s
        t = σ(z_t + s·τ)                                     h = (1 - t)·g + t·k

    With `timespans` τ is the last column of x, else 1. With `backbone_units` the sums are computed from a dense layer::

        b = φ_b(x·kernel + h_prev·recurrent_kernel + bias)   z = b·gate_kernel + gate_bias

    `backbone_layers` is the number of such layers; after the first, `b = φ_b(b·backbone_kernel[n] + backbone_bias[n])`.

    Ref: Hasani et al. 2022, "Closed-form continuous-time neural networks". Without a backbone it is the cell of the
    package ncps's networks with wirings; ncps's own default is a backbone of 128 units.
    """,
)

NCPS_ACTIVATIONS = {
    "LeCun": "scaled_tanh(1.7159, 0.666)",
    "Tanh": "tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "GELU": "gelu",
}
"""The activations of a backbone, by the classes of the package ncps."""

MIXED = "mixed_memory isn't supported: cs.compile(module, x) runs it, with its loop over time"


def ncps_settings(cell: Any) -> dict[str, Any]:
    """Return the settings of a `CellSpec` for a `CfCCell` of the package ncps."""
    kind = {"kind": "cfs"} if cell.mode == "pure" else {"kind": "cfc", "mode": cell.mode}
    settings = kind | {"input_size": cell.input_size, "units": cell.hidden_size}
    if not cell.backbone_layers:
        return settings
    activation = cell.backbone[1]
    return settings | {
        "backbone_units": cell.backbone[0].out_features,
        "backbone_activation": NCPS_ACTIVATIONS[type(activation).__name__],
        "backbone_layers": cell.backbone_layers,
    }


def backbone_layers(cell: Any) -> list[int]:
    """Return the places of the linear layers in the backbone of ncps's `CfCCell`, among activations and dropouts."""
    return [n for n, one in enumerate(cell.backbone) if type(one).__name__ == "Linear"]
