"""Diagnostics of a cell's trace: the values of its gates, how long its units remember, and which steps wrote c.

docs/inspect.md lists each measure with its definition and its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack import reference
from cellstack.nodes.checks import check_integer

if TYPE_CHECKING:
    from cellstack.inspect.trace import CellTrace, NetworkTrace
    from cellstack.nodes.base import Array
    from cellstack.nodes.cell_arrays import Cell
    from cellstack.nodes.recording import MemoryRecord, Record

LEFT, RIGHT = 0.1, 0.9  # below, a gate is nearly closed; above, nearly open (Karpathy et al.)
MOSTLY = 0.95  # share of the steps
SHARE = "share of steps"  # how the names of such figures begin: they are printed in percent
SILENT = 0.01  # bound on |h| of a dead unit, and on the change of h of a stuck one
FLAT = 0.99  # above, tanh has a slope of less than 0.02
LONGEST = 1000  # default number of steps of a Lyapunov exponent
NUDGE = 1e-6
GROWN = 1.5  # growth factor, and minimum steps of a quarter, from which a state drifts
LEAST_QUARTER = 25
NAMED = 5  # maximum number of units listed in a sentence


class Shares(NamedTuple):
    """The share of steps at which each unit's gate is nearly closed and nearly open, `[H]` each; or each head's."""

    left: Array
    """Below 0.1."""
    right: Array
    """Above 0.9."""


def gate_shares(cell: CellTrace) -> dict[str, Shares]:
    """Return the share of steps at which each gate is below 0.1 and above 0.9, per unit.

    Masked steps don't count. A SimpleRNN has no gates.

    Ref: Karpathy, Johnson and Li 2015, "Visualizing and Understanding Recurrent Networks", section 4.2.
    """
    used = _used(cell)
    return {
        gate: Shares((values < LEFT).mean(axis=0), (values > RIGHT).mean(axis=0))
        if len(values)
        else Shares(*np.full((2, values.shape[1]), np.nan))
        for gate in cell.cell.spec.of_kind.multipliers
        for values in [cell.flat(gate)[used]]
    }


def half_lives(cell: CellTrace) -> Array:
    """Return the number of steps in which each unit forgets half of its state, `[H]`; infinite without forgetting.

    It is ln 2 over the mean of -ln |f|, f being the forget gate (z of a GRU): the half-life under the gate's
    geometric mean. Masked steps don't count. The f of an sLSTM or mLSTM is scaled by its stabiliser: instead, it is
    σ(z_f). An mLSTM has one for each head.

    An activation may yield gates outside 0 to 1: of a negative f, which also changes the sign of the state, the
    magnitude counts; an f of 0 at any step makes the half-life 0; a geometric mean of 1 or more makes it infinite.

    Raises:
        ValueError: a SimpleRNN, which has no gate that keeps its state; an sLSTM's trace of some steps or units without
            pre-activations.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # gates of 0, and of infinity as well
        log_kept, used = _log_kept(cell), _used(cell)
        if not used.any():
            return np.full(log_kept.shape[2], np.nan)
        rate = -log_kept[used].mean(axis=0)
        return np.where(rate <= 0.0, np.inf, math.log(2.0) / rate)


def contributions(cell: CellTrace, step: int = -1) -> Array:
    """Return each past step's contribution to c at a step: its write, scaled by later gates, `[B, n + 2, H]`.

    Entry 0 is the remainder of the initial state, entry 1 + s that of step s. Up to rounding, they sum to c at that
    step: c_t is f·c + i·g, unrolled. For a kind without c, it is h, as z·h + (1 - z)·g for a GRU.

    Args:
        cell: the trace of a whole run.
        step: the step n, in the order of time; for a cell that runs backward, later steps are its past.

    Returns:
        For a cell that runs backward, entry 1 + s is step T - 1 - s.

    Raises:
        ValueError: a SimpleRNN; a clipped cell, or one whose state is patched, as its state isn't a sum of writes; an
            mLSTM; a trace of some steps or units.
        IndexError: a step that doesn't exist.
    """
    spec = cell.cell.spec
    if _has_matrix(cell):
        raise ValueError(f"contributions: {spec.of_kind.title} isn't supported: its state is a matrix, see shares()")
    kept, written = _update(cell)
    record = _whole(cell)
    if spec.cell_clip is not None:
        clip = spec.cell_clip
        raise ValueError(f"contributions: cell_clip isn't supported ({clip}): a clipped c isn't a sum of writes")
    name = spec.of_kind.memory
    if record.patches is not None and any(patch.gate == name for patch in record.patches.patches):
        raise ValueError(f"contributions: patches of {name} aren't supported: a patched {name} isn't a sum of writes")
    batch, steps, units = kept.shape
    if not -steps <= step < steps:
        raise IndexError(f"contributions: expected a step from 0 to {steps - 1}, got {step}")
    order = slice(None, None, -1) if record.reverse else slice(None)
    last = (steps - 1 - step % steps) if record.reverse else step % steps
    kept, written = (array[:, order][:, : last + 1].astype(np.float64) for array in (kept, written))
    fresh = np.broadcast_to(cell.cell.initial[name], (batch, units))
    start = fresh if record.before is None else getattr(record.before, name)
    if record.mask is not None:  # masked: the state is kept, nothing is written
        used = record.mask[:, order][:, : last + 1, None]
        kept, written = np.where(used, kept, 1.0), np.where(used, written, 0.0)
    # The share of the state before each step that remains at the end: the product of all later keep factors.
    left = np.ones((batch, last + 2, units))
    left[:, 1:-1] = np.flip(np.cumprod(np.flip(kept[:, 1:], axis=1), axis=1), axis=1)
    left[:, 0] = kept[:, 0] * left[:, 1]
    parts = np.concatenate([np.asarray(start, np.float64)[:, None], written], axis=1) * left
    if record.reset is not None:
        for row, begun in enumerate(record.reset[:, order][:, : last + 1]):
            if begun.any():
                first = int(np.flatnonzero(begun)[-1])  # earlier writes are gone; the initial state replaces them
                parts[row, : first + 1] = 0.0
                parts[row, 0] = fresh[row] * kept[row, first] * left[row, first + 1]
    return parts


def spectral_radii(cell: Cell) -> dict[str, float]:
    """Return the spectral radius of each gate's recurrent weights, including the projection, by gate.

    With a backbone they are the product of all its matrices, as if its activation were linear. Empty for a kind without
    recurrent weights.
    """
    cell = cell.one_head
    spec = cell.spec
    if not spec.of_kind.has_recurrent_kernel:
        return {}
    recurrent = cell.recurrent_kernel.astype(np.float64)
    if cell.gate_kernel is not None:
        between = [] if cell.backbone_kernel is None else cell.backbone_kernel
        for matrix in (*between, cell.gate_kernel):
            recurrent = recurrent @ matrix.astype(np.float64)
    blocks = np.split(recurrent, len(spec.gates), axis=1)
    through = np.eye(spec.units) if cell.projection is None else cell.projection.astype(np.float64)
    return {
        gate: float(np.abs(np.linalg.eigvals(through @ block)).max())
        for gate, block in zip(spec.gates, blocks, strict=True)
    }


def lyapunov_exponent(cell: CellTrace, steps: int = LONGEST) -> float:
    """Return the largest Lyapunov exponent of a cell along a run, in nats per step, averaged over the rows.

    The rate at which two nearly equal states diverge (above 0: chaos) or converge (below 0: the past is forgotten). A
    small difference is propagated in float64 and rescaled to its initial length after every step. Resets and masks
    aren't applied.

    Args:
        cell: the trace of a whole run.
        steps: the maximum number of steps, from the first on.

    Raises:
        ValueError: a trace of some steps or units; a trace without steps; a cell with patches; an mLSTM.

    Ref: Benettin et al. 1980, "Lyapunov Characteristic Exponents for smooth dynamical systems", Meccanica 15; for gated
    cells: Can, Krishnamurthy and Schwab 2020, "Gating creates slow modes and controls phase-space complexity".
    """
    record, spec = _whole(cell), cell.cell.spec
    if _has_matrix(cell):
        raise ValueError(f"lyapunov_exponent: {spec.of_kind.title} isn't supported: no h enters its gates")
    if record.patches is not None:
        raise ValueError("lyapunov_exponent: patched cells aren't supported")
    steps = check_integer("lyapunov_exponent", "steps", steps)
    x = (record.x[:, ::-1] if record.reverse else record.x)[:, :steps].astype(np.float64)
    batch, count = x.shape[:2]
    if not batch or not count:
        raise ValueError("lyapunov_exponent: expected at least one row and one step")
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
            return -math.inf  # the difference vanishes within one step
        total += np.log(length[:, 0] / NUDGE)
        apart *= NUDGE / length
    return float((total / count).mean())


def _by_gates(cell: CellTrace) -> tuple[Array, Array] | None:
    """Return `Kind.update` of a trace, any values at masked steps."""
    with np.errstate(invalid="ignore"):  # at masked steps the gates are zeros, by which a kind may divide
        return cell.cell.spec.of_kind.update(cell.cell.spec, cell)


def _update(cell: CellTrace) -> tuple[Array, Array]:
    """Return the factor by which each step keeps the memory, and what it adds to it, `[B, T, H]` each."""
    spec = cell.cell.spec
    kind, update = spec.of_kind, _by_gates(cell)
    if update is None and {"keep", "write"} & set(kind.gates.values()):
        raise ValueError(f"expected a cell whose gates alone determine its state, got {kind.title} with {spec.text}")
    if update is None:
        raise ValueError(f"expected a cell with gates: {kind.title} has no gate that keeps a state")
    (kept, written), rate = update, spec.zoneout_rates[kind.memory]
    return rate + (1.0 - rate) * kept, (1.0 - rate) * written


def _log_kept(cell: CellTrace) -> Array:
    """Return the logarithm of the size of the factor by which each step keeps the memory, `[B, T, H]`."""
    spec = cell.cell.spec
    if not spec.of_kind.stabiliser:
        return np.log(np.abs(_update(cell)[0].astype(np.float64)))
    z = cell.pre["f"]
    return z if spec.exponential_forget else -np.logaddexp(0.0, -z)


def _has_matrix(cell: CellTrace) -> bool:
    """Return whether its memory is a matrix for each head, not a number for each unit."""
    spec = cell.cell.spec
    return len(spec.state_shapes[spec.of_kind.memory]) > 1


def _whole(cell: CellTrace) -> Record | MemoryRecord:
    if cell.record is None:
        raise ValueError("expected the trace of a whole run, got some of its steps or units")
    return cell.record


def _used(cell: CellTrace) -> Array:
    """Return which rows and steps count, `[B, T]`."""
    h = cell["h"]
    return np.ones(h.shape[:2], bool) if cell.mask is None else cell.mask


# ── the report ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Report:
    """The findings of a trace, one sentence each, and the figures behind them, by cell.

    Attributes:
        findings: sentences that name the units and the remedy; the most important come first.
        figures: the measures of each cell, by its name in the trace: a number, or numbers by gate.
    """

    findings: tuple[str, ...]
    figures: dict[str, dict[str, float | dict[str, float]]]

    def __repr__(self) -> str:
        lines = []
        for name, figures in self.figures.items():
            lines.append(name)
            for what, value in figures.items():
                each = value.items() if isinstance(value, dict) else [("", value)]
                form = ".1%" if what.startswith(SHARE) else ".3g"
                lines.append(f"  {what}: {', '.join(f'{part} {number:{form}}'.strip() for part, number in each)}")
        findings = [f"- {sentence}" for sentence in self.findings] or ["nothing stands out"]
        return "\n".join([*lines, *findings])


def report(t: NetworkTrace) -> Report:
    """Return the findings of a trace of a whole run.

    Args:
        t: the trace.

    Raises:
        ValueError: a trace of some steps or units, or one without a cell, a row or a step.
    """
    cells = {name: cell for node, seen in t.items() for name, cell in _named(node, seen.cells)}
    if not cells:
        raise ValueError("report: the trace has no cells")
    findings: list[tuple[int, str]] = []
    figures = {}
    for name, cell in cells.items():
        _whole(cell)
        if not _used(cell).any():
            raise ValueError(f"report: expected at least one used step, got none in {name}")
        cell_figures, cell_findings = _examined(cell)
        figures[name] = cell_figures
        findings += [(rank, f"{name}: {sentence}") for rank, sentence in cell_findings]
    return Report(tuple(sentence for _, sentence in sorted(findings, key=lambda one: one[0])), figures)


def _named(node: str, cells: Sequence[CellTrace]) -> Iterable[tuple[str, CellTrace]]:
    return [(node if len(cells) == 1 else f"{node}.cells[{number}]", cell) for number, cell in enumerate(cells)]


def _examined(cell: CellTrace) -> tuple[dict[str, float | dict[str, float]], list[tuple[int, str]]]:
    """Return the figures of a cell, and its findings with their ranks."""
    spec, used = cell.cell.spec, _used(cell)
    findings = unit_findings(cell)
    h = cell.flat("h")[used].astype(np.float64)
    figures: dict[str, float | dict[str, float]] = {"rms of h": rms(h)}
    for gate, (left, right) in gate_shares(cell).items():
        means = {f"shut (below {LEFT})": float(left.mean()), f"open (above {RIGHT})": float(right.mean())}
        figures[f"{SHARE} at which {gate} is"] = means
    for name in spec.state_shapes:
        if name in cell and name != "h":
            figures[f"rms of {name}"] = rms(cell[name][used].astype(np.float64))
    if _by_gates(cell) is not None:
        lives, steps = half_lives(cell), cell["h"].shape[1]
        measures = {"least": np.min, "median": np.median, "most": np.max}
        figures["half-life in steps"] = {name: float(measure(lives)) for name, measure in measures.items()}
        keeping = (lives > steps) & (steps > 1)
        if keeping.any():
            text = f"keeping more than half over the whole run of {steps} steps"
            findings.append((5, f"{units(keeping, cell)} {text}: reset the state where a new sequence begins"))
    if radii := spectral_radii(cell.cell):
        figures["spectral radius of the recurrent weights"] = radii
    patched = cell.record is not None and cell.record.patches is not None
    exponent = math.nan if patched or _has_matrix(cell) else lyapunov_exponent(cell)
    if patched:
        findings.append((6, "patched: the figures describe the changed run, without a Lyapunov exponent"))
    elif not _has_matrix(cell):
        figures["largest Lyapunov exponent, nats a step"] = exponent
    if exponent > 0.0:
        grow = f"small differences in the state grow by {math.expm1(exponent):.1%} per step, so distant outputs"
        findings.append((2, f"{grow} are unreliable. Regularise the recurrent weights"))
    sizes = np.empty(0) if _has_matrix(cell) else _rms_by_step(cell, spec.of_kind.memory)
    quarter = len(sizes) // 4
    if quarter >= LEAST_QUARTER:
        early, late = (float(part.mean()) for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
        drift = late / early if early else math.nan
        figures["growth of the state (mean size in the last quarter of the run, relative to the second quarter)"] = (
            drift
        )
        if drift > GROWN:
            grown = f"the state grows by a factor of {drift:.1f} from the second quarter of the run to the last"
            findings.append((2, f"{grown}. Reset it, or clip c"))
    return figures, findings


def unit_findings(cell: CellTrace) -> list[tuple[int, str]]:
    """Return findings on the values of units and gates over the used steps: sentences with their ranks."""
    spec, used = cell.cell.spec, _used(cell)
    findings: list[tuple[int, str]] = []

    def say(rank: int, which: Any, text: str) -> None:
        if np.any(which):
            findings.append((rank, f"{units(which, cell)} {text}"))

    h = cell.flat("h")[used].astype(np.float64)
    broken = ~np.isfinite(h).all(axis=0)
    silent = (np.abs(h) < SILENT).all(axis=0)
    stuck = (h.max(axis=0) - h.min(axis=0) < SILENT) & ~silent & (len(h) > 1)
    say(0, broken, "NaN or infinite: check the inputs, or train with a smaller learning rate")
    say(1, silent, f"dead: |h| stays below {SILENT}. Use fewer units, or regularise them less")
    say(2, stuck, f"stuck: h changes by less than {SILENT}. Use fewer units, or scale the inputs")
    kind, shares = spec.of_kind, gate_shares(cell)
    for slot in kind.outputs:
        if spec.activations[spec.slots.index(slot)].name == "tanh":
            flat = (np.abs(np.tanh(cell[kind.memory][used].astype(np.float64))) > FLAT).mean(axis=0) > MOSTLY
            said = f"saturated: |tanh({kind.memory})| is above {FLAT} at nearly every step"
            say(3, flat, f"{said}. Clip {kind.memory}, or reset it regularly")
    for gate in (gate for gate, role in kind.gates.items() if role == "write"):
        say(4, shares[gate].left > MOSTLY, f"closed to new input: {gate} is below {LEFT} at nearly every step")
    return findings


def rms(values: Array) -> float:
    """Return the root mean square."""
    return float(np.sqrt((values**2).mean()))


def _rms_by_step(cell: CellTrace, field: str) -> Array:
    """Return the root mean square of a state over rows and units at each step, in the order of processing."""
    state = cell[field].astype(np.float64)
    sizes = np.sqrt((state**2).mean(axis=(0, 2)))
    return sizes[::-1] if cell.record is not None and cell.record.reverse else sizes


def units(which: Array, cell: CellTrace) -> str:
    """Return the flagged units, or heads, as the subject of a sentence, with its verb."""
    what = "head" if _has_matrix(cell) and len(which) == cell.cell.spec.heads else "unit"
    numbers = np.flatnonzero(which)
    shown = ", ".join(map(str, numbers[:NAMED]))
    rest = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{what} {shown} is" if len(numbers) == 1 else f"{what}s {shown}{rest} are"
