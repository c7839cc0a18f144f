"""What precedes the training of the networks: the rule to which they are added, and the windows. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.examples import Inputs
from cellstack.train.forecasting import smoothing
from cellstack.train.forecasting.backtest import MOST_ORIGINS
from cellstack.train.forecasting.parts import OriginParts, epoch_steps, floors, parts, typical_errors
from cellstack.train.forecasting.recipe import SMOOTHED, Recipe
from cellstack.train.forecasting.rules import rules
from cellstack.train.forecasting.smoothing import Smoothing
from cellstack.train.forecasting.windows import Windows
from cellstack.train.options import Architecture, FitOptions, ForecastOptions
from cellstack.train.sizes import size_of
from cellstack.train.tables.table import Table, iso

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MEASURED = 2048  # windows on which scales are measured
CONTINUED = 1 / 3  # share of the epochs for continued training with the validation part


def prepared(
    table: Table, recipe: Recipe, request: ForecastOptions, validation: float, test: float
) -> tuple[Windows, OriginParts]:
    """Return the windows of the training part followed by the validation part, with a complete recipe, and the parts.

    The rule is smoothing, or the naive one if no series is long enough. If the logarithm is smoothed, the unit is the
    level. If smoothing is better without the longest season, that season is dropped: its length may vary, like that of
    a cycle.
    """
    cut = parts(table, recipe, validation, test)
    typical = typical_errors(table, recipe, cut.ends)
    smoothed = smoothings(table, recipe, cut.ends, typical)
    if request.seasons is None and recipe.seasons and smoothed is not None:
        shorter = replace(recipe, seasons=recipe.seasons[:-1])
        other = smoothings(table, shorter, cut.ends, typical, 2 * recipe.seasons[-1])
        if other is not None and other[1] < smoothed[1]:
            recipe, smoothed = shorter, other
            cut = parts(table, recipe, validation, test)
            typical = typical_errors(table, recipe, cut.ends)
    if smoothed is not None:
        how = smoothed[0]
        scale = request.scale or ("level" if all(each.log for each in how) else "spread")
        recipe = replace(recipe, smoothing=how, scale=scale, rule=SMOOTHED)
    windows = Windows(recipe, table, np.concatenate([cut.training, cut.validation]), typical)
    return windows.with_recipe(replace(recipe, floors=floors(windows, np.arange(len(cut.training))))), cut


def smoothings(
    table: Table, recipe: Recipe, ends: Ints, typical: Floats, after: int = 0
) -> tuple[tuple[Smoothing, ...], float] | None:
    """Return the best smoothing of each target in the rows before `ends`, and the mean error; see `smoothing.best`."""
    found = []
    for n, name in enumerate(recipe.targets):
        series = [table.columns[name][first:end] for first, end in zip(table.starts[:-1], ends, strict=True)]
        best = smoothing.best(series, recipe.seasons, recipe.horizon, typical[:, n].tolist(), after)
        if best is None:
            return None
        found.append(best)
    return tuple(how for how, _ in found), float(np.mean([error for _, error in found]))


def refit_epochs(best: int, long: bool) -> int:
    """Return the epochs of a network's second fit, with the validation part.

    Args:
        best: the best epoch of the first fit.
        long: whether training is slow: then the second fit continues the first, instead of starting again.
    """
    return max(1, round(best * CONTINUED)) if long else best


def describe(
    windows: Windows, cut: OriginParts, build: Architecture, options: FitOptions
) -> tuple[list[str], dict[str, Any]]:
    """Describe the training to come on windows that `prepared` returned, in sentences and as plain values."""
    table, recipe = windows.table, windows.recipe
    inputs = Inputs.measure(windows, np.arange(len(cut.training)), MEASURED)
    width, outputs = len(inputs.standardise[0]), len(recipe.targets) * len(recipe.quantiles)
    size = size_of(build, width)
    weights = size.weights + (size.width + width + 1) * outputs
    steps, many = epoch_steps(len(cut.training), options.batch), build.members > 1
    spans: dict[str, list[str] | None] = {"validation": None, "test": None}
    trained = _span(table, table.starts[:-1], cut.ends, table.shown)
    said = [f"{len(cut.training):,} windows to train on, up to {trained[1]}"]
    if len(cut.validation):
        part = table, cut.ends, cut.validation_ends
        spans["validation"] = _span(*part, iso)
        shown = " to ".join(_span(*part, table.shown))
        said.append(f"{len(cut.validation):,} forecasts to validate on, of the rows from {shown}")
    compared: list[str] = []
    if len(cut.test):
        compared, used = baselines(table, recipe), min(len(cut.test), MOST_ORIGINS)
        part = table, cut.validation_ends, table.starts[1:]
        spans["test"] = _span(*part, iso)
        said.append(f"{used:,} forecasts to test on, of the rows from {' to '.join(_span(*part, table.shown))}")
        said.append(f"baselines to compare with: {', '.join(f'`{name}`' for name in compared)}")
    else:
        said.append("no test part")
    again = "; then trained again with the validation part" * bool(len(cut.validation))
    said.append(
        f"{build.members} network{'s' * many}{', each' * many}: {size.layers}, {weights:,} weights; at most "
        f"{options.epochs} epoch{'s' * (options.epochs != 1)} of {steps} steps, batches of {options.batch}{again}"
    )
    return said, {
        "training": {"windows": len(cut.training)},
        "validation": {"forecasts": len(cut.validation), "rows": spans["validation"]},
        "test": {"forecasts": min(len(cut.test), MOST_ORIGINS), "rows": spans["test"]},
        "baselines": compared,
        "networks": build.members,
        "layers": size.layers,
        "weights": build.members * weights,
        "epochs": options.epochs,
        "steps": steps,
        "batch": options.batch,
    }


def baselines(table: Table, recipe: Recipe) -> list[str]:
    """Return the names of the baselines with which a test compares, see `backtest`."""
    names = [*rules(recipe.seasons, int(np.diff(table.starts).max()))]
    return names + ["exponential smoothing"] * bool(recipe.smoothing)


def _span(table: Table, first: Ints, end: Ints, form: Callable[[Any], str]) -> list[str]:
    """Return the dates, written by `form`, or the numbers from 1, of the first and last row of a part of the series."""
    used = first < end
    first, last = first[used], end[used] - 1
    if table.times is not None:
        return [form(table.times[first].min()), form(table.times[last].max())]
    before = table.starts[:-1][used]
    return [f"{int((first - before).min()) + 1:,}", f"{int((last - before).max()) + 1:,}"]
