"""The closed-form solution (CfS): one candidate g, which is a sum; state h. It is ncps's CfC with `mode="pure"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN, RECURRENT_GAIN, RECURRENT_KERNEL, Array
from cellstack.cells.base import HiddenState, Kind, Ops, V, sums
from cellstack.cells.cfc import BACKBONE, BACKBONE_ARRAYS, TIMESPANS, update

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class CfSTrace(NamedTuple):
    """A CfS's g and h at every step, each `[B, T, H]`: see `Trace`."""

    g: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: Any, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return g, and h; see `cellstack.reference` for the equations."""
    a, elapsed = a if spec.timespans else (a, None)
    g = ops.gate("g", sums(ops, spec, a, ops.dropped(h)))
    rate = ops.add(ops.absolute(ops.weight("decay")), ops.absolute(g))
    kept = ops.exp(ops.affine(rate if elapsed is None else ops.mul(rate, elapsed), -1.0))
    return (g,), (ops.mul(ops.one_minus(ops.mul(g, kept)), ops.weight("limit")),)


CFS = Kind(
    name="cfs",
    title="CfS",
    gates={"g": "candidate"},
    state=HiddenState,
    trace=CfSTrace,
    step=step,
    arrays=(
        KERNEL,
        RECURRENT_KERNEL,
        BIAS,
        KERNEL_GAIN,
        RECURRENT_GAIN,
        *BACKBONE_ARRAYS,
        Array("decay", "H", "zeros"),
        Array("limit", "H", "ones"),
    ),
    scalar="timespans",
    flags=(TIMESPANS, *BACKBONE),
    defaults={"activation": "linear"},
    update=update,
    meanings={"g": "distance of h from its limit, as a share of the limit, and how fast it decays with time"},
    ref='Hasani et al. 2022, "Closed-form continuous-time neural networks"',
    doc="""the closed-form solution of a liquid time constant: h depends on the time τ since the previous step::

        g = φ(x·kernel + h_prev·recurrent_kernel + bias)        h = limit·(1 - g·e^(-τ·(|decay| + |g|)))

    φ is linear by default. With `timespans` τ is the last column of x, else 1. `backbone_units` as for a CfC.

    Ref: Hasani et al. 2022, "Closed-form continuous-time neural networks"; the package ncps, whose CfC with
    `mode="pure"` this is.
    """,
)
