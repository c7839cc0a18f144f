"""The light GRU: update gate z and candidate g, without a reset gate; state h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.base import HiddenState, Kind, Ops, V, sums

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class LiGRUTrace(NamedTuple):
    """A light GRU's gates (after their activations) and h at every step, each `[B, T, H]`: see `Trace`."""

    z: Any
    g: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return the gates z and g, and the new h; see `cellstack.reference` for the equations."""
    z, g = ops.split(sums(ops, spec, a, h), 2)
    z, g = ops.gate("z", z), ops.gate("g", g)
    return (z, g), (ops.add(ops.mul(z, h), ops.mul(ops.one_minus(z), ops.dropped(g))),)


LI_GRU = Kind(
    name="ligru",
    title="LiGRU",
    gates={"z": "keep", "g": "candidate"},
    state=HiddenState,
    trace=LiGRUTrace,
    step=step,
    drops="candidate",
    defaults={"activation": "relu"},
    meanings={"z": "update gate: how much of the state is kept"},
    ref='Ravanelli et al. 2018, "Light Gated Recurrent Units for Speech Recognition", sec. III',
    doc="""a light gated recurrent unit, which has no reset gate::

        a = x·kernel + h_prev·recurrent_kernel + bias        z = σ(a_z)    g = φ(a_g)        h = z·h_prev + (1 - z)·g

    The default φ is ReLU. Recurrent dropout applies to g, not to h_prev.

    Ref: Ravanelli et al. 2018, "Light Gated Recurrent Units for Speech Recognition", sec. III.
    """,
)
