"""The SimpleRNN: the candidate g is the new h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.base import Foreign, HiddenState, Kind, Ops, V, sums

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec


class RNNTrace(NamedTuple):
    """A SimpleRNN's candidate and h at every step, each `[B, T, H]`: see `Trace`. They differ only under zoneout."""

    g: Any
    h: Any


def step(ops: Ops[V], spec: CellSpec, a: V, h: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return g, and h; see `cellstack.reference` for the equations."""
    g = ops.gate("g", sums(ops, spec, a, ops.dropped(h)))
    return (g,), (g,)


SIMPLE_RNN = Kind(
    name="rnn",
    title="SimpleRNN",
    gates={"g": "candidate"},
    state=HiddenState,
    trace=RNNTrace,
    step=step,
    positions={"seed": ("unroll", "recurrent_dropout")},
    names={
        "torch": Foreign("RNN", "g"),
        "keras": Foreign("SimpleRNN", "g"),
        "keras1": Foreign("SimpleRNN", "g"),
        "onnx": Foreign("RNN", "g"),
    },
    ref='Elman 1990, "Finding Structure in Time"',
    doc="""a simple recurrent network::

        h = φ(x·kernel + h_prev·recurrent_kernel + bias)

    Ref: Elman 1990.
    """,
)
