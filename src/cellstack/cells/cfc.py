"""The closed-form continuous-time cell (CfC): candidates g and k, time gate t and its slope s; state h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.cells.arguments import Argument, among
from cellstack.cells.base import HiddenState, Kind, Ops, V, sums

if TYPE_CHECKING:
    from cellstack.spec import CellSpec


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


CFC = Kind(
    name="cfc",
    title="CfC",
    gates={"g": "candidate", "k": "candidate", "s": "slope", "t": "time"},
    state=HiddenState,
    trace=CfCTrace,
    step=step,
    scalar="timespans",
    flags=(
        Argument(
            "timespans",
            "bool",
            False,
            "the last column of x is the time since the previous step, of each row and step, in any unit. It isn't "
            "multiplied by the kernel. False: the time between steps is 1.",
        ),
        Argument(
            "mode",
            "str",
            "default",
            '"default": the time gate mixes the candidates, `h = (1 - t)·g + t·k`; "no_gate": `h = g + t·k`.',
            among(
                "default",
                "no_gate",
                hint=": ncps's 'pure' isn't supported, as it has neither these gates nor their weights",
            ),
        ),
    ),
    fixed=("s",),
    update=update,
    meanings={
        "g": "candidate for short times: the new h where the time gate is 0",
        "k": "candidate for long times: the new h where the time gate is 1",
    },
    ref='Hasani et al. 2022, "Closed-form continuous-time neural networks"',
)
