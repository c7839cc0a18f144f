"""The SRU: forget gate f and output gate r see c, not h; candidate g and highway s see x alone; states h, c."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arrays import BIAS, KERNEL, Array
from cellstack.cells.base import Kind, Ops, State, V

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class SRUTrace(NamedTuple):
    """An SRU's gates (after their activations), c and h at every step, each `[B, T, H]`: see `Trace`."""

    g: Any
    f: Any
    r: Any
    s: Any
    c: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V, c: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return g f r s, and h and c; see `cellstack.reference` for the equations."""
    a_g, a_f, a_r, a_s = ops.split(a, 4)
    v_f, v_r = (ops.weight("cell_vectors", row) for row in range(2))
    g, s = ops.gate("g", a_g), ops.gate("s", a_s)
    f, r = ops.gate("f", ops.add(a_f, ops.mul(v_f, c))), ops.gate("r", ops.add(a_r, ops.mul(v_r, c)))
    c = ops.record("c", ops.add(ops.mul(f, c), ops.mul(ops.one_minus(f), g)))
    return (g, f, r, s), (ops.add(ops.mul(r, ops.activation("cell", c)), ops.mul(ops.one_minus(r), s)), c)


def update(spec: CellSpec, gates: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the factor by which a step keeps c, and what it adds to it; see `Kind.update`."""
    return gates["f"], (1.0 - gates["f"]) * gates["g"]


SRU = Kind(
    name="sru",
    title="SRU",
    gates={"g": "candidate", "f": "keep", "r": "output", "s": "candidate"},
    state=State,
    trace=SRUTrace,
    step=step,
    arrays=(KERNEL, BIAS, Array("cell_vectors", "2 H", "zeros")),  # of f and r
    without=("layer_norm", "norm_epsilon"),
    defaults={"activation": "linear"},
    outputs=("cell",),
    memory="c",
    update=update,
    meanings={
        "r": "output gate: how much of c is output; the rest is the highway's",
        "s": "highway: a product with x, which is output where the output gate is closed",
        "c": "cell state: a moving average of the candidates",
        "h": "output of the unit, which no later step uses",
    },
    ref='Lei et al. 2018, "Simple Recurrent Units for Highly Parallelizable Recurrence", eq. 1 to 4',
    doc="""a simple recurrent unit, whose gates see c elementwise, and not h::

        a = x·kernel + bias        g, s = φ(a_g, a_s)        f, r = σ(a_f + v_f·c_prev, a_r + v_r·c_prev)
        c = f·c_prev + (1 - f)·g        h = r·φ(c) + (1 - r)·s

    φ is linear by default; v_f and v_r are the rows of `cell_vectors`. s is the highway from x to the output.

    Ref: Lei et al. 2018, "Simple Recurrent Units for Highly Parallelizable Recurrence", eq. 1 to 4; in theirs s is x
    itself where x is as wide as the units: a block of the kernel that is the identity.
    """,
)
