"""Ablation: the effect of single units on a number computed from the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.cells.errors import ShapeError
from cellstack.inspect.differences import SHOWN
from cellstack.inspect.values import as_tuple
from cellstack.nodes.checks import check_choice
from cellstack.nodes.patches import Patch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.inspect.trace import CellTrace, NetworkTrace
    from cellstack.network import Network
    from cellstack.nodes.base import Array

HOWS = ("mean", "zero", "resample")
AT_ONCE = 1 << 22  # maximum numbers that the widest node returns per run; further rows go into the next run

Metric = Callable[[Any], Any]


class UnitEffect(NamedTuple):
    """The effect of ablating one unit on the metric."""

    node: str
    cell: int
    unit: int
    effect: float
    """The metric with the unit ablated, minus the metric of the unchanged network."""


class Ablation:
    """The effect of ablating each unit alone on the metric.

    Attributes:
        effects: by node and number of the cell, `[H]` each: the metric with a unit ablated, minus `metric`.
        metric: the metric of the unchanged network.
        how: `"mean"`, `"zero"` or `"resample"`.
        gate: the ablated gate or state.
    """

    def __init__(self, effects: dict[tuple[str, int], Array], metric: float, how: str, gate: str) -> None:
        self.effects, self.metric, self.how, self.gate = effects, metric, how, gate

    @property
    def ranked(self) -> list[UnitEffect]:
        """Every unit, by decreasing absolute effect; units without a number last."""
        units = [
            UnitEffect(node, cell, unit, float(effect))
            for (node, cell), effects in self.effects.items()
            for unit, effect in enumerate(effects)
        ]
        return sorted(units, key=lambda one: -abs(one.effect) if one.effect == one.effect else np.inf)

    def plot(self, count: int = 20) -> Figure:
        """Return a matplotlib bar chart of the units with the largest effects.

        Args:
            count: the number of units.

        Raises:
            ImportError: matplotlib isn't installed.
        """
        from cellstack.inspect.plot import bars

        first = self.ranked[:count]
        labels = [f"{one.node}{f'.{one.cell}' if self._several(one.node) else ''} unit {one.unit}" for one in first]
        return bars(labels, [one.effect for one in first], f"change of the metric, {self.gate} by {self.how}")

    def _several(self, node: str) -> bool:
        return (node, 1) in self.effects

    def __repr__(self) -> str:
        ranked = self.ranked
        lines = [f"Ablation of {self.gate} by {self.how}, {len(ranked)} units; the metric is {self.metric:.6g}"]
        for node, cell, unit, effect in ranked[:SHOWN]:
            which = f", cell {cell}" if self._several(node) else ""
            lines.append(f"  {effect:+.6g}  {node}{which}, unit {unit}")
        if len(ranked) > SHOWN:
            lines.append(f"  and {len(ranked) - SHOWN} more: see .ranked")
        return "\n".join(lines)


def ablate(
    network: Network,
    x: Any,
    nodes: str | Iterable[str] | None = None,
    how: str = "mean",
    metric: Metric | None = None,
    *,
    gate: str = "h",
    mask: Any = None,
    lengths: Any = None,
    seed: int = 0,
    threads: int | None = None,
) -> Ablation:
    """Return the effect on a metric of ablating each unit of a layer, one at a time.

    The runs for all units are rows of one batch, split where it gets too large.

    Args:
        network: the network.
        x, mask, lengths, threads: as for `Network.run`; the mask or lengths apply to all inputs.
        nodes: the names of the nodes whose cells' units are ablated; None = all with cells.
        how: what replaces the unit's value: `"mean"`, its mean over all used rows and steps; `"zero"`; or `"resample"`,
            its value at another row and step, drawn at random.
        metric: a function that maps the network's output for the batch, `y [B, …]` or a tuple of these, to a number;
            None = the mean absolute change of the first output.
        gate: the gate or state of the unit, named as in `Patch`; `"h"` is its output.
        seed: the seed of the random draws.

    Raises:
        ValueError: a node that has no cells or doesn't exist, another `how`, a cell without the gate, a metric that
            isn't a number.
        ShapeError: an input without rows or without steps.

    Ref: ablation by zero and mean: Lakretz et al. 2019, "The emergence of number and syntax units in LSTM language
    models", section 4.1; by resampling: Chan et al. 2022, "Causal Scrubbing".

    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(1, 2, kind="rnn", use_bias=False), np.array([[2.0, 0.0]]), np.zeros((2, 2)))
    >>> net = Network([Recurrent((cell,))])
    >>> ablate(net, np.ones((1, 3, 1)), how="zero", metric=lambda y: y.sum())
    Ablation of h by zero, 2 units; the metric is 2.89208
      -2.89208  layer_0, unit 0
      +0  layer_0, unit 1
    """
    check_choice("ablate", "how", how, HOWS)
    cells = _cells(network, nodes, gate)
    batch = _Batch(network, x, mask, lengths, threads)
    t = batch.trace({name for name, _ in cells})
    plain = t.y
    asked = metric or (lambda y: np.abs(as_tuple(y)[0] - as_tuple(plain)[0]).mean())
    rng = np.random.default_rng(seed)
    ablations: list[tuple[tuple[str, int], int, Callable[[Sequence[int]], Patch]]] = []
    effects: dict[tuple[str, int], Array] = {}
    for name, number in cells:
        seen = t[name].cells[number]
        replaced = _replacements(seen, gate, how, rng)
        effects[name, number] = np.full(replaced.shape[-1], np.nan)
        for unit in range(replaced.shape[-1]):
            value = replaced[..., unit : unit + 1]

            def patch(rows: Sequence[int], name=name, number=number, unit=unit, value=value) -> Patch:
                steps = slice(value.shape[1]) if value.shape[1] > 1 else None
                return Patch(name, gate, unit, rows, steps, value, cell=number)

            ablations.append(((name, number), unit, patch))
    whole = _number(asked(plain))
    answers = batch.edited([patch for _, _, patch in ablations], asked)
    for (key, unit, _), answer in zip(ablations, answers, strict=True):
        effects[key][unit] = answer - whole
    return Ablation(effects, whole, how, gate)


def _replacements(seen: CellTrace, gate: str, how: str, rng: np.random.Generator) -> Array:
    """Return the replacement of each unit's value, `[1 or B, 1 or T, H]`."""
    array = np.asarray(seen[gate], np.float64)
    array = array.reshape(*array.shape[:2], -1)  # without the axis of the heads of an mLSTM
    if how == "zero":
        return np.zeros((1, 1, array.shape[2]))
    used = np.ones(array.shape[:2], bool) if seen.mask is None else seen.mask
    if how == "mean":
        return array[used].mean(axis=0)[None, None] if used.any() else np.zeros((1, 1, array.shape[2]))
    rows, steps = np.nonzero(used)
    drawn = rng.permutation(len(rows))
    resampled = array.copy()
    resampled[rows, steps] = array[rows[drawn], steps[drawn]]
    return resampled


class _Batch:
    """An input that is run many times, as blocks of rows of one batch, each block with its own patches."""

    def __init__(self, network: Network, x: Any, mask: Any, lengths: Any, threads: int | None) -> None:
        self.network, self.threads = network, threads
        self.x = network.as_inputs("ablate", x)
        flags = {"mask": mask, "lengths": lengths}
        self.flags: dict[str, Any] = {name: np.asarray(flag) for name, flag in flags.items() if flag is not None}
        self.rows = min(len(array) if array.ndim else 0 for array in self.x.values())
        self.steps = max((array.shape[1] for array in self.x.values() if array.ndim > 1), default=1)
        if not self.rows or not self.steps:
            raise ShapeError(f"ablate: expected at least one row and one step, got {self.rows} and {self.steps}")

    def trace(self, nodes: set[str]) -> NetworkTrace:
        """Return the trace of the unchanged input."""
        return self.network.trace(self.x, **self.flags, threads=self.threads, nodes=sorted(nodes))

    def edited(self, patches: Sequence[Callable[[Sequence[int]], Patch]], metric: Metric) -> list[float]:
        """Return the metric for each of several patches.

        Args:
            patches: functions that return the patch for given rows.
            metric: the metric of the output.
        """
        shapes = (cell.spec.trace_shapes.values() for cell in self.network.stateful)
        widest = max(sum(map(math.prod, of_cell)) for of_cell in shapes)
        each = max(1, AT_ONCE // (widest * self.steps * self.rows))
        metrics: list[float] = []
        for first in range(0, len(patches), each):
            some = patches[first : first + each]
            x = {name: np.concatenate([array] * len(some)) for name, array in self.x.items()}
            flags: dict[str, Any] = {name: np.concatenate([flag] * len(some)) for name, flag in self.flags.items()}
            blocks = [range(place * self.rows, (place + 1) * self.rows) for place in range(len(some))]
            edited = self._repeated(len(some)).edit([make(rows) for make, rows in zip(some, blocks, strict=True)])
            y = edited.run(x, **flags, threads=self.threads)[0]
            for block in blocks:
                rows = slice(block.start, block.stop)
                answer = tuple(array[rows] for array in y) if isinstance(y, tuple) else y[rows]
                metrics.append(_number(metric(answer)))
        return metrics

    def _repeated(self, blocks: int) -> Network:
        """Return the network with each block's patches for its rows."""
        patches = self.network.patches
        if all(patch.rows is None and (patch.value is None or patch.value.ndim < 3) for patch in patches):
            return self.network
        repeated = []
        for patch in patches:
            rows = slice(None) if patch.rows is None else patch.rows
            chosen = np.arange(self.rows)[rows] if isinstance(rows, slice) else np.array(rows)
            repeated += [replace(patch, rows=chosen + place * self.rows) for place in range(blocks)]
        return self.network.unedited.edit(repeated)


def _cells(network: Network, nodes: str | Iterable[str] | None, gate: str) -> list[tuple[str, int]]:
    """Return the cells of some nodes, by name and number, after checking that they have the gate."""
    every = dict(zip(network.names, network.nodes, strict=True))
    own = {name: node.cells_in(network.dtype) for name, node in every.items()}
    able = [name for name, cells in own.items() if cells]
    names = able if nodes is None else [nodes] if isinstance(nodes, str) else list(nodes)
    for name in names:
        if name not in able:
            expected = f"nodes with cells, {', '.join(able)}" if able else "a network with cells, and this one has none"
            raise ValueError(f"ablate: expected {expected}, got {name!r:.80}")
    cells = [(name, number) for name in names for number in range(len(own[name]))]
    if not cells:
        what = "none of the nodes has cells" if able else "the network has no cells"
        raise ValueError(f"ablate: {what}")
    for name, number in cells:
        fields = own[name][number].spec.of_kind.trace._fields
        if gate not in fields:
            raise ValueError(f"ablate: expected a gate of {name} out of {', '.join(fields)}, got {gate!r:.80}")
    return cells


def _number(value: Any) -> float:
    """Return what a metric returned as a number; otherwise raise `ValueError`."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        got = f"shape {list(array.shape)} of {array.dtype}"
        raise ValueError(f"ablate: the metric must return one number for the batch, got {got}")
    return float(array.reshape(()))
