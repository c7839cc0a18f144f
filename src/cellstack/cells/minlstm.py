"""The minLSTM: input gate i, forget gate f and candidate g depend on x alone; state h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN
from cellstack.cells.base import HiddenState, Kind, Ops, V

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class MinLSTMTrace(NamedTuple):
    """A minLSTM's gates (after their activations, before the division by f + i) and h at every step: see `Trace`."""

    i: Any
    f: Any
    g: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return i f g, and h; see `cellstack.reference` for the equations."""
    a_i, a_f, a_g = ops.split(a, 3)
    i, f, g = ops.gate("i", a_i), ops.gate("f", a_f), ops.gate("g", a_g)
    h = ops.div(ops.add(ops.mul(f, h), ops.mul(i, g)), ops.add(f, i))
    return (i, f, g), (h,)


def update(spec: CellSpec, gates: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the share of h that is kept, and what is added to it; see `Kind.update`."""
    total = gates["f"] + gates["i"]
    return gates["f"] / total, gates["i"] / total * gates["g"]


MIN_LSTM = Kind(
    name="minlstm",
    title="MinLSTM",
    gates={"i": "write", "f": "keep", "g": "candidate"},
    state=HiddenState,
    trace=MinLSTMTrace,
    step=step,
    arrays=(KERNEL, BIAS, KERNEL_GAIN),
    defaults={"activation": "positive"},
    update=update,
    meanings={
        "i": "input gate: how much of the candidate is written, divided by f + i",
        "f": "forget gate: how much of the state is kept, divided by f + i",
        "h": "output of the unit, and its memory",
    },
    ref='Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.2 and appendix B.3',
    doc="""a minimal long short-term memory, whose gates depend on x alone, and whose only state is h::

        i, f = σ(a_i, a_f)    g = φ(a_g)    with a = x·kernel + bias        h = (f·h_prev + i·g)/(f + i)

    The default φ is "positive", v + 1/2 where v >= 0, else sigmoid(v).

    Ref: Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.2; φ: appendix B.3.
    """,
)
