"""What a trace says of the units of a cell: how their gates stand, how long they remember, and where c came from.

Each measure stands in docs/inspect.md with its definition and its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack import reference

if TYPE_CHECKING:
    from cellstack.inspect.trace import CellTrace, NetworkTrace
    from cellstack.nodes.base import Array
    from cellstack.nodes.recurrent import Cell, Record

LEFT, RIGHT = 0.1, 0.9  # a gate below is nearly shut, one above nearly open (Karpathy et al.)
MOSTLY = 0.95  # of the steps
SILENT = 0.01  # h of a unit that does nothing, or that doesn't change
FLAT = 0.99  # |tanh(c)| beyond has a slope of less than 0.02
LONGEST = 1000  # steps over which a Lyapunov exponent is measured, unless told otherwise
NUDGE = 1e-6
GROWN = 1.5  # a state whose size has grown so many times, between quarters of at least so many steps, drifts
LEAST_QUARTER = 25
NAMED = 5  # units named one by one in a sentence
GATES_OF = {"lstm": ("i", "f", "o"), "gru": ("z", "r"), "rnn": ()}


class Shares(NamedTuple):
    """In what share of the steps each unit's gate is nearly shut and nearly open, `[H]` each."""

    left: Array
    """Below 0.1."""
    right: Array
    """Above 0.9."""


def gate_shares(cell: CellTrace) -> dict[str, Shares]:
    """Return in what share of the steps each gate is below 0.1 and above 0.9, unit by unit.

    Steps that the mask leaves out don't count. A SimpleRNN has no gates.

    Ref: Karpathy, Johnson and Li 2015, "Visualizing and Understanding Recurrent Networks", section 4.2.
    """
    used = _used(cell)
    return {
        gate: Shares((cell[gate][used] < LEFT).mean(axis=0), (cell[gate][used] > RIGHT).mean(axis=0))
        if used.any()
        else Shares(*np.full((2, len(cell.units)), np.nan))
        for gate in GATES_OF[cell.cell.spec.kind]
    }


def half_lives(cell: CellTrace) -> Array:
    """Return in how many steps half of what a unit holds is forgotten, `[H]`; infinite where nothing is.

    It is ln 2 over the mean of -ln f, f being the forget gate (of a GRU its z): the half-life under the gate's
    geometric mean. Steps that the mask leaves out don't count.

    Raises:
        ValueError: a SimpleRNN, which has no gate that keeps.
    """
    kept, used = _kept(cell.cell, cell)[0], _used(cell)
    if not used.any():
        return np.full(len(cell.units), np.nan)
    with np.errstate(divide="ignore"):
        rate = -np.log(kept[used].astype(np.float64)).mean(axis=0)
        return np.where(rate > 0.0, math.log(2.0) / rate, np.inf)


def contributions(cell: CellTrace, step: int = -1) -> Array:
    """Return what each past step wrote into c, as much of it as later gates kept until a step, `[B, n + 2, H]`.

    Entry 0 is what is left of the state before the first step, entry 1 + s what is left of step s. They sum to c at
    that step, to rounding: c_t is f·c + i·g, unrolled. Of a GRU it is h, z·h + (1 - z)·g.

    Args:
        cell: the trace of a whole run.
        step: until which step n, in the order of time; of a cell that runs backwards, steps after it are its past.

    Returns:
        For a cell that runs backwards, entry 1 + s is step T - 1 - s.

    Raises:
        ValueError: a SimpleRNN or a clipped cell, whose state isn't a sum of what was written; a trace of some steps
            or units.
        IndexError: a step that isn't there.
    """
    kept, written = _kept(cell.cell, cell)
    record = _whole(cell)
    spec = cell.cell.spec
    if spec.cell_clip is not None:
        raise ValueError(f"contributions: expected a cell without cell_clip, got {spec.cell_clip}: c is no sum then")
    batch, steps, units = kept.shape
    if not -steps <= step < steps:
        raise IndexError(f"contributions: expected a step from 0 to {steps - 1}, got {step}")
    order = slice(None, None, -1) if record.reverse else slice(None)
    last = (steps - 1 - step % steps) if record.reverse else step % steps
    kept, written = (array[:, order][:, : last + 1].astype(np.float64) for array in (kept, written))
    name = "c" if spec.kind == "lstm" else "h"
    fresh = np.broadcast_to(cell.cell.initial[name], (batch, units))
    start = fresh if record.before is None else getattr(record.before, name)
    if record.mask is not None:  # left out: all is kept, nothing is written
        used = record.mask[:, order][:, : last + 1, None]
        kept, written = np.where(used, kept, 1.0), np.where(used, written, 0.0)
    # How much of what there was before each step is left at the end: the product of what is kept from there on.
    left = np.ones((batch, last + 2, units))
    left[:, 1:-1] = np.flip(np.cumprod(np.flip(kept[:, 1:], axis=1), axis=1), axis=1)
    left[:, 0] = kept[:, 0] * left[:, 1]
    parts = np.concatenate([np.asarray(start, np.float64)[:, None], written], axis=1) * left
    if record.reset is not None:
        for row, begun in enumerate(record.reset[:, order][:, : last + 1]):
            if begun.any():
                first = int(np.flatnonzero(begun)[-1])  # what lies before is gone; the initial state takes its place
                parts[row, : first + 1] = 0.0
                parts[row, 0] = fresh[row] * kept[row, first] * left[row, first + 1]
    return parts


def spectral_radii(cell: Cell) -> dict[str, float]:
    """Return the spectral radius of each gate's recurrent weights, by gate; of a projected cell with its projection."""
    spec = cell.spec
    blocks = np.split(cell.recurrent_kernel.astype(np.float64), len(spec.gates), axis=1)
    through = np.eye(spec.units) if cell.projection is None else cell.projection.astype(np.float64)
    return {
        gate: float(np.abs(np.linalg.eigvals(through @ block)).max())
        for gate, block in zip(spec.gates, blocks, strict=True)
    }


def lyapunov_exponent(cell: CellTrace, steps: int = LONGEST) -> float:
    """Return the largest Lyapunov exponent of a cell along a run, in nats a step, the mean over the rows.

    How fast two states that differ a little part (above 0: chaos) or meet (below 0: the past is forgotten): a small
    difference is carried along in float64 and brought back to its first length after every step. Resets and masks
    aren't applied.

    Args:
        cell: the trace of a whole run.
        steps: how many, at most, from the first on.

    Raises:
        ValueError: a trace of some steps or units; no step.

    Ref: Benettin et al. 1980, "Lyapunov Characteristic Exponents for smooth dynamical systems", Meccanica 15; of gated
    cells: Can, Krishnamurthy and Schwab 2020, "Gating creates slow modes and controls phase-space complexity".
    """
    record, spec = _whole(cell), cell.cell.spec
    x = (record.x[:, ::-1] if record.reverse else record.x)[:, :steps].astype(np.float64)
    batch, count = x.shape[:2]
    if not batch or not count:
        raise ValueError("lyapunov_exponent: expected at least one row and one step, got none")
    fresh = cell.cell.initial.values()
    sizes = [len(array) for array in fresh]
    state = [np.array(np.broadcast_to(array, (batch, len(array))), np.float64) for array in fresh]
    if record.before is not None:
        state = [np.asarray(array, np.float64) for array in record.before]
    apart = np.random.default_rng(0).standard_normal((batch, sum(sizes)))
    apart *= NUDGE / np.linalg.norm(apart, axis=1, keepdims=True)
    total = np.zeros(batch)
    for step in range(count):
        near = [a + d for a, d in zip(state, np.split(apart, np.cumsum(sizes)[:-1], axis=1), strict=True)]
        both = [np.concatenate(pair) for pair in zip(state, near, strict=True)]
        after = reference.forward(spec, cell.cell.arrays, np.tile(x[:, step : step + 1], (2, 1, 1)), both).state
        state = [array[:batch] for array in after]
        apart = np.concatenate([array[batch:] - array[:batch] for array in after], axis=1)
        length = np.linalg.norm(apart, axis=1, keepdims=True)
        if not np.isfinite(length).all():
            return math.nan
        if not (length > 0.0).all():
            return -math.inf  # the difference is gone within one step
        total += np.log(length[:, 0] / NUDGE)
        apart *= NUDGE / length
    return float((total / count).mean())


def _kept(cell: Cell, fields: CellTrace) -> tuple[Array, Array]:
    """Return what a step keeps of the state before it, and what it writes, `[B, T, H]` each."""
    spec = cell.spec
    if spec.kind == "rnn":
        raise ValueError("expected an LSTM or a GRU, got a SimpleRNN, which has no gate that keeps a state")
    if spec.kind == "gru":
        kept, written, rate = fields["z"], (1.0 - fields["z"]) * fields["g"], spec.zoneout
    else:
        kept, written, rate = fields["f"], fields["i"] * fields["g"], spec.zoneout_cell
    return rate + (1.0 - rate) * kept, (1.0 - rate) * written


def _whole(cell: CellTrace) -> Record:
    if cell.record is None:
        raise ValueError("expected the trace of a whole run, got some of its steps or units")
    return cell.record


def _used(cell: CellTrace) -> Array:
    """Return which rows and steps count, `[B, T]`."""
    h = cell["h"]
    return np.ones(h.shape[:2], bool) if cell.mask is None else cell.mask


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Report:
    """What stands out in a trace: a sentence for each finding, and the figures behind it, cell by cell.

    Attributes:
        findings: sentences that name the units and what to do about them; what matters most comes first.
        figures: for each cell, by its name in the trace, what was measured: a number, or numbers by gate.
    """

    findings: tuple[str, ...]
    figures: dict[str, dict[str, float | dict[str, float]]]

    def __repr__(self) -> str:
        lines = []
        for name, figures in self.figures.items():
            lines.append(name)
            for what, value in figures.items():
                each = value.items() if isinstance(value, dict) else [("", value)]
                lines.append(f"  {what}: {', '.join(f'{gate} {number:.3g}'.strip() for gate, number in each)}")
        found = [f"- {sentence}" for sentence in self.findings] or ["nothing stands out"]
        return "\n".join([*lines, *found])


def report(t: NetworkTrace) -> Report:
    """Return what stands out in a trace of a whole run.

    Args:
        t: the trace.

    Raises:
        ValueError: a trace of some steps or units, or one without a cell, a row or a step.
    """
    cells = {name: cell for node, seen in t.items() for name, cell in _named(node, seen.cells)}
    if not cells:
        raise ValueError("report: expected a trace of cells, got none")
    findings: list[tuple[int, str]] = []
    figures = {}
    for name, cell in cells.items():
        _whole(cell)
        if not _used(cell).any():
            raise ValueError(f"report: expected at least one step that is used, got none in {name}")
        own, found = _examined(cell)
        figures[name] = own
        findings += [(rank, f"{name}: {sentence}") for rank, sentence in found]
    return Report(tuple(sentence for _, sentence in sorted(findings, key=lambda one: one[0])), figures)


def _named(node: str, cells: Sequence[CellTrace]) -> Iterable[tuple[str, CellTrace]]:
    return [(node if len(cells) == 1 else f"{node}.cells[{number}]", cell) for number, cell in enumerate(cells)]


def _examined(cell: CellTrace) -> tuple[dict[str, float | dict[str, float]], list[tuple[int, str]]]:
    """Return the figures of a cell, and its findings with their ranks."""
    spec, used = cell.cell.spec, _used(cell)
    found = standing(cell)
    h = cell["h"][used].astype(np.float64)
    figures: dict[str, float | dict[str, float]] = {"rms of h": rms(h)}
    for gate, (left, right) in gate_shares(cell).items():
        means = {"shut": float(left.mean()), "open": float(right.mean())}
        figures[f"steps with {gate} below {LEFT}, above {RIGHT}"] = means
    if spec.kind == "lstm":
        figures["rms of c"] = rms(cell["c"][used].astype(np.float64))
    if spec.kind != "rnn":
        lives, steps = half_lives(cell), cell["h"].shape[1]
        measures = {"least": np.min, "median": np.median, "most": np.max}
        figures["half-life in steps"] = {name: float(measure(lives)) for name, measure in measures.items()}
        keeping = (lives > steps) & (steps > 1)
        if keeping.any():
            text = f"keeping more than half over the whole run of {steps} steps"
            found.append((5, f"{units(keeping)} {text}: reset the state where a new sequence begins"))
    figures["spectral radius of the recurrent weights"] = spectral_radii(cell.cell)
    exponent = lyapunov_exponent(cell)
    figures["largest Lyapunov exponent, nats a step"] = exponent
    if exponent > 0.0:
        grow = f"small differences in the state grow by {math.expm1(exponent):.1%} a step, so that outputs far ahead"
        found.append((2, f"{grow} can't be trusted. Regularise the recurrent weights"))
    sizes = _rms_by_step(cell, "c" if spec.kind == "lstm" else "h")
    quarter = len(sizes) // 4
    if quarter >= LEAST_QUARTER:
        early, late = (float(part.mean()) for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
        drift = late / early if early else math.nan
        figures["drift of the state, last quarter over the second"] = drift
        if drift > GROWN:
            grown = f"the state grows, by {drift:.1f} times from the second quarter of the run to the last"
            found.append((2, f"{grown}. Reset it, or clip c"))
    return figures, found


def standing(cell: CellTrace) -> list[tuple[int, str]]:
    """Return what stands out in how units and gates stand, over the steps that count: sentences with their ranks."""
    spec, used = cell.cell.spec, _used(cell)
    found: list[tuple[int, str]] = []

    def say(rank: int, which: Any, text: str) -> None:
        if np.any(which):
            found.append((rank, f"{units(which)} {text}"))

    h = cell["h"][used].astype(np.float64)
    broken = ~np.isfinite(h).all(axis=0)
    silent = (np.abs(h) < SILENT).all(axis=0)
    stuck = (h.max(axis=0) - h.min(axis=0) < SILENT) & ~silent & (len(h) > 1)
    say(0, broken, "NaN or infinite: look at the inputs, or train with a smaller learning rate")
    say(1, silent, f"dead: |h| stays below {SILENT}. Use fewer units, or regularise them less")
    say(2, stuck, f"stuck: h changes by less than {SILENT}. Use fewer units, or scale the inputs")
    if spec.kind == "lstm":
        c = cell["c"][used].astype(np.float64)
        if spec.activations[spec.slots.index("cell")].name == "tanh":
            flat = (np.abs(np.tanh(c)) > FLAT).mean(axis=0) > MOSTLY
            say(3, flat, f"saturated: |tanh(c)| is above {FLAT} nearly always. Clip c, or reset it now and then")
        closed = gate_shares(cell)["i"].left > MOSTLY
        say(4, closed, f"closed to what comes in: i is below {LEFT} at nearly every step")
    return found


def rms(values: Array) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt((values**2).mean()))


def _rms_by_step(cell: CellTrace, field: str) -> Array:
    """Return the size of a state at each step in the order in which they were run, over rows and units."""
    state = cell[field].astype(np.float64)
    sizes = np.sqrt((state**2).mean(axis=(0, 2)))
    return sizes[::-1] if cell.record is not None and cell.record.reverse else sizes


def units(which: Array) -> str:
    """Return the units that a flag marks, as the subject of a sentence with its verb."""
    numbers = np.flatnonzero(which)
    shown = ", ".join(map(str, numbers[:NAMED]))
    rest = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"unit {shown} is" if len(numbers) == 1 else f"units {shown}{rest} are"
