"""Records of layers in training: figures, gradients by lag, and findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.inspect import diagnostics
from cellstack.inspect.trace import CellTrace
from cellstack.nodes.cell_arrays import Cell

if TYPE_CHECKING:
    from cellstack.nodes.base import Array

VANISHED = 0.01  # share of the gradient below which nothing is learned
GROWN = 10.0  # times
LEAST_STEPS = 10  # fewer steps say little about a gradient
MAJORITY = 0.5  # share of a squared norm that the named units make up


@dataclass(frozen=True)
class LayerRecord:
    """The record of one cell in one batch.

    Attributes:
        kind: the name of its kind, such as "lstm".
        figures: numbers in groups. `gates shut`, `gates open`: the share of steps at which a gate is below 0.1, above
            0.9, averaged over the units. `gates`: the mean of a gate. `states`: the root mean square of each state.
            `saturated`: the share of steps at which `|tanh(c)|` of an LSTM is above 0.99. `half-life`: minimum, median
            and maximum over the units, in steps. `weights`, `gradients`: norms of each array and of its gradient,
            before any clipping, and of all together. `reach`: the number of steps back at which half of the gradient
            is left, and a hundredth; infinite where more is left at the end.
        lags: by the number of steps back from the output, `[L]` each. `h`, `c`: norm of the loss's gradient in that
            state, over the units, root mean square over the rows. `carried`: the share left of the gradient that enters
            at lag 0, in the state that the gates keep: c of an LSTM, h of others.
        rows: the number of inspected rows.
    """

    kind: str
    figures: dict[str, dict[str, float]]
    lags: dict[str, Array]
    rows: int


@dataclass(frozen=True)
class TrainingRecord:
    """The record of a model's layers in one batch of an epoch.

    Attributes:
        epoch: its number, from 1.
        layers: the record of each cell, by its layer's name in the model, with `.cells[n]` in a stack.
        findings: sentences that name the layer, the units and the remedy; the most important come first.
    """

    epoch: int
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    def scalars(self) -> dict[str, float]:
        """Return every number by a name such as `encoder/gradients/kernel`; gradients by lag for lags 0, 1, 2, 4…"""
        found = {}
        for name, layer in self.layers.items():
            for group, numbers in layer.figures.items():
                found |= {f"{name}/{group}/{what}": number for what, number in numbers.items()}
            for what, values in layer.lags.items():
                lags = [0, *(2**power for power in range(len(values).bit_length()))]
                found |= {
                    f"{name}/gradient by lag, {what}/{lag}": float(values[lag]) for lag in lags if lag < len(values)
                }
        return found

    def to_tensorboard(self, writer: Any, step: int | None = None) -> None:
        """Write the numbers as scalars and the findings as text.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or an object with its `add_scalar` and `add_text`.
            step: the step to log under; None = the epoch.
        """
        step = self.epoch if step is None else step
        for name, number in self.scalars().items():
            writer.add_scalar(name, number, step)
        if self.findings:
            writer.add_text("findings", "\n".join(f"- {sentence}" for sentence in self.findings), step)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values; `from_json` reads it back."""
        layers = {
            name: {
                "kind": layer.kind,
                "rows": layer.rows,
                "figures": layer.figures,
                "lags": {what: values.tolist() for what, values in layer.lags.items()},
            }
            for name, layer in self.layers.items()
        }
        return {"epoch": self.epoch, "layers": layers, "findings": list(self.findings)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrainingRecord:
        """Return the record from the values that `to_json` returned."""
        layers = {
            name: LayerRecord(
                layer["kind"],
                layer["figures"],
                {what: np.array(values, np.float64) for what, values in layer["lags"].items()},
                layer["rows"],
            )
            for name, layer in record["layers"].items()
        }
        return cls(record["epoch"], layers, tuple(record["findings"]))

    def __repr__(self) -> str:
        lines = [f"epoch {self.epoch}"]
        for name, layer in self.layers.items():
            lines.append(f"{name}: {layer.kind}, {layer.rows} row{'s' * (layer.rows != 1)}")
            for group, numbers in layer.figures.items():
                lines.append(f"  {group}: {', '.join(f'{what} {number:.3g}' for what, number in numbers.items())}")
        found = [f"- {sentence}" for sentence in self.findings] or ["nothing stands out"]
        return "\n".join([*lines, *found])


def examined(looked: Any) -> tuple[LayerRecord, list[tuple[int, str]]]:
    """Return the record of what `layers.observer` recorded of a cell, and its findings with their ranks."""
    spec = looked.cell._spec
    cell = Cell(spec, **{name: _numbers(array) for name, array in looked.arrays.items()})
    fields = type(looked.trace)(*map(_numbers, looked.trace))
    used = None if looked.used is None else _numbers(looked.used)
    trace = CellTrace(cell, fields, np.arange(spec.units), used)
    counts = np.ones(trace["h"].shape[:2], bool) if used is None else used
    lags = {name: _by_lag(part) for name, part in looked.lags.items()}
    carried, shares = _carried(looked.lags[spec.of_kind.memory])
    lags["carried"] = carried
    figures, found = _figures(trace, counts, looked), _gradient_findings(looked.cell, lags, shares)
    figures["reach"] = {"half": _first_below(carried, 0.5), "a hundredth": _first_below(carried, VANISHED)}
    if counts.any():
        found += diagnostics.unit_findings(trace)
    return LayerRecord(spec.kind, figures, lags, len(counts)), found


def _figures(trace: CellTrace, counts: Array, looked: Any) -> dict[str, dict[str, float]]:
    spec, some = trace.cell.spec, counts.any()
    kind = spec.of_kind
    figures: dict[str, dict[str, float]] = {}
    if some and kind.multipliers:
        shares = diagnostics.gate_shares(trace)
        figures["gates shut"] = {gate: float(left.mean()) for gate, (left, _) in shares.items()}
        figures["gates open"] = {gate: float(right.mean()) for gate, (_, right) in shares.items()}
        figures["gates"] = {gate: float(trace[gate][counts].mean(dtype=np.float64)) for gate in shares}
    if some and kind.update(spec, trace) is not None:
        lives = diagnostics.half_lives(trace)
        measures = {"least": np.min, "median": np.median, "most": np.max}
        figures["half-life"] = {name: float(measure(lives)) for name, measure in measures.items()}
    if some:
        states = {name: trace[name][counts] for name in spec.state_sizes}
        figures["states"] = {name: diagnostics.rms(values.astype(np.float64)) for name, values in states.items()}
        if kind.outputs:
            flat = np.abs(np.tanh(states[kind.memory])) > diagnostics.FLAT
            figures["saturated"] = {kind.memory: float(flat.mean())}
    figures["weights"] = _with_all({name: float(np.linalg.norm(array)) for name, array in trace.cell.arrays.items()})
    learns = [name for name in looked.arrays if name in looked.gradients]
    figures["gradients"] = _with_all({name: float(looked.gradients[name]) for name in learns})
    return figures


def _with_all(norms: dict[str, float]) -> dict[str, float]:
    return {**norms, "all": float(np.linalg.norm(list(norms.values())))}


def _numbers(tensor: Any) -> Array:
    return tensor.cpu().numpy()


def _by_lag(part: Any) -> Array:
    """Return the norm of the gradient at each lag: over the units, root mean square over the rows."""
    return np.sqrt(_numbers(part.squares).sum(axis=1) / np.maximum(_numbers(part.rows), 1))


def _carried(part: Any) -> tuple[Array, Array]:
    """Return the share of the gradient at lag 0 that is left at each lag, `[L]`, and by unit, `[L, H]`."""
    squares, start = _numbers(part.carried), _numbers(part.start)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = squares.sum(axis=1)
        return np.sqrt(whole / start), squares / whole[:, None]


def _first_below(shares: Array, bound: float) -> float:
    """Return the first lag at which less than `bound` is left; infinite where there is none."""
    below = np.flatnonzero(shares < bound)
    return float(below[0]) if below.size else np.inf


def _remedy(cell: Any) -> str:
    """Return how to make a layer's cell keep its memory for longer."""
    kind = cell._spec.of_kind
    for gate, role in kind.gates.items():
        if role == "keep":
            how = "higher (forget_bias=)" if hasattr(cell, "forget_bias") else "higher"
            return f"Start the bias of the gate {gate} {how}, so that {kind.memory} is kept for longer"
    for gate, role in kind.gates.items():
        if role == "write":
            return f"Start the bias of the gate {gate} lower, so that {kind.memory} is kept for longer"
    return "Use an LSTM or a GRU, whose gates can keep a state"


def _gradient_findings(cell: Any, lags: dict[str, Array], parts: Array) -> list[tuple[int, str]]:
    """Return findings on how far back the gradient reaches."""
    carried, found = lags["carried"], []
    if not all(np.isfinite(values).all() for name, values in lags.items() if name != "carried"):
        found.append((0, "the gradient of its states isn't finite: clip it, or train with a smaller learning rate"))
        return found
    if not len(carried):
        return [(1, "the gradient that reaches it is zero at every step: check that the loss depends on its output")]
    gone, steps = _first_below(carried, VANISHED), len(carried)
    if steps > LEAST_STEPS and gone < steps / 2:
        gone = int(gone)
        vanishes = f"the gradient of its last output vanishes within {gone} of {steps} steps back"
        left = f"less than {VANISHED:.0%} of it is left in {cell._spec.of_kind.memory}{_most(parts[gone])}"
        found.append((2, f"{vanishes} ({left}): earlier steps are hardly learned. {_remedy(cell)}"))
    top = int(np.argmax(carried))
    if carried[top] > GROWN:
        times = f"by a factor of {carried[top]:.3g} within {top} steps back"
        grown = f"that of its last output grows {times}{_most(parts[top])}"
        grows = f"the gradient explodes: {grown}"
        remedy = "Clip it (torch.nn.utils.clip_grad_norm_), or initialise the recurrent weights smaller"
        found.append((1, f"{grows}. {remedy}"))
    return found


def _most(parts: Array) -> str:
    """Return the units that make up half of a squared norm, where they are few."""
    if not np.isfinite(parts).all():
        return ""
    order = np.argsort(-parts)
    few = order[: int(np.searchsorted(np.cumsum(parts[order]), MAJORITY)) + 1]
    if len(few) > diagnostics.NAMED:
        return ""
    return f", most in unit{'s' * (len(few) > 1)} {', '.join(map(str, sorted(few)))}"
