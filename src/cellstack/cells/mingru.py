"""The minGRU: update gate z and candidate g depend on x alone; state h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN
from cellstack.cells.base import HiddenState, Kind, Ops, V

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class MinGRUTrace(NamedTuple):
    """A minGRU's gates (after their activations) and h at every step, each `[B, T, H]`: see `Trace`."""

    z: Any
    g: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return z g, and h; see `cellstack.reference` for the equations."""
    a_z, a_g = ops.split(a, 2)
    z, g = ops.gate("z", a_z), ops.gate("g", a_g)
    return (z, g), (ops.add(ops.mul(ops.one_minus(z), h), ops.mul(z, g)),)


MIN_GRU = Kind(
    name="mingru",
    title="MinGRU",
    gates={"z": "write", "g": "candidate"},
    state=HiddenState,
    trace=MinGRUTrace,
    step=step,
    arrays=(KERNEL, BIAS, KERNEL_GAIN),
    defaults={"activation": "positive"},
    meanings={
        "z": "update gate: how much of the candidate replaces the state",
        "h": "output of the unit, and its memory",
    },
    ref='Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.1 and appendix B.3',
    doc="""a minimal gated recurrent unit, whose gates depend on x alone::

        z = σ(a_z)    g = φ(a_g)    with a = x·kernel + bias        h = (1 - z)·h_prev + z·g

    The default φ is "positive", v + 1/2 where v >= 0, else sigmoid(v).

    Ref: Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.1; φ: appendix B.3.
    """,
)
