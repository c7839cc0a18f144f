"""Errors of forecasts from many origins, compared with simple rules. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.parts import OriginParts, spread_out
from cellstack.train.forecasting.recipe import SMOOTHED, Recipe
from cellstack.train.forecasting.rules import rules
from cellstack.train.forecasting.windows import Windows
from cellstack.train.measures import coverage, errors, pinball
from cellstack.train.tables.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_ORIGINS = 2000


class Backtest(NamedTuple):
    """Forecasts and actual values.

    Args:
        forecasts: of the model.
        actual: actual values, `[N, horizon, targets]`, NaN where missing.
        baselines: forecasts by name, each `[N, horizon, targets]`.
        typical: the scale of MASE, `[S, targets]`.
        series: of each origin, `[N]`.
    """

    forecasts: Forecasts
    actual: Floats
    baselines: dict[str, Floats]
    typical: Floats
    series: Ints

    @property
    def scores(self) -> dict[str, Any]:
        """Return the errors of the model and its baselines for each target, over the points that all of them forecast.

        `mae` and `rmse` in the target's units, and `mase`; for the model also the `pinball` loss and the `coverage` of
        the interval between the outer quantiles. With several series, `mase` is the median over them.
        """
        recipe = self.forecasts.recipe
        found = {}
        for n, name in enumerate(recipe.targets):
            every, actual = self.compared(n)
            table = {key: self._errors(values, actual, n) for key, values in every.items()}
            table["model"] |= _spread(self.forecasts.values[:, :, n], actual, recipe)
            found[name] = table
        return {"targets": found, "origins": len(self.actual)}

    def compared(self, target: int) -> tuple[dict[str, Floats], Floats]:
        """Return the forecasts of a target by `"model"` and each baseline, and the actual values, `[N, horizon]` each.

        Actual values are NaN where one of them has no forecast.
        """
        every = {"model": self.forecasts.median[..., target]}
        every |= {key: baseline[..., target] for key, baseline in self.baselines.items()}
        actual = self.actual[..., target].copy()
        actual[np.isnan(np.array(list(every.values()))).any(axis=0)] = np.nan
        return every, actual

    def plot(self) -> Figure:
        """Return a matplotlib figure: forecasts of the test part with the actual values, and the error by horizon.

        Of several series, it shows the first and the last; the errors are those of all series. The model is compared
        with the four best baselines.

        Raises:
            UsageError: matplotlib isn't installed.
        """
        from cellstack.train.forecasting.plot import backtest_panels
        from cellstack.train.history import panels

        return panels(backtest_panels(self))

    def __repr__(self) -> str:
        """Describe it in a few lines: the mean absolute errors of the model and of the two best baselines."""
        recipe, times, table = self.forecasts.recipe, self.forecasts.times, self.forecasts.table
        when = "" if times is None else f", {table.shown(times.min())} to {table.shown(times.max())}"
        lines = [
            f"Backtest: {len(self.actual):,} forecasts of {recipe.horizon} step{'s' * (recipe.horizon != 1)}{when}"
        ]
        for name, found in self.scores["targets"].items():
            mae = {key: errors["mae"] for key, errors in found.items()}
            best = sorted((key for key in mae if key != "model"), key=lambda key: (np.isnan(mae[key]), mae[key]))[:2]
            compared = ", ".join(f"{mae[key]:.4g} ({key})" for key in best)
            inside = f"; {found['model']['coverage']:.0%} in the interval" if "coverage" in found["model"] else ""
            lines.append(f"{name}: mean absolute error {mae['model']:.4g}; baselines {compared}{inside}")
        return "\n  ".join(lines)

    def _errors(self, values: Floats, actual: Floats, target: int) -> dict[str, float]:
        each = []
        for series in np.unique(self.series):
            rows = self.series == series
            each.append(errors(values[rows], actual[rows], float(self.typical[series, target]))["mase"])
        known = [mase for mase in each if not np.isnan(mase)]
        return errors(values, actual) | {"mase": float(np.median(known)) if known else float("nan")}


def _spread(quantiles: Floats, actual: Floats, recipe: Recipe) -> dict[str, float]:
    levels = recipe.quantiles
    found = {"pinball": pinball(quantiles, actual, levels)}
    if len(levels) > 1:
        found |= {
            "interval": levels[-1] - levels[0],
            "coverage": coverage(quantiles[..., 0], quantiles[..., -1], actual),
        }
    return found


def origins(cut: OriginParts) -> Ints:
    """Return the origins of the test part from which forecasts are measured."""
    return spread_out(cut.test, MOST_ORIGINS)


def by_rules(table: Table, windows: Windows) -> dict[str, Floats]:
    """Return each rule's forecasts from the windows' origins, `[N, horizon, targets]`, by name.

    Exponential smoothing is included, although it is part of the model, to show how much the network improves it.
    """
    recipe = windows.recipe
    shape = (len(windows.origins), recipe.horizon, len(recipe.targets))
    longest = int(np.diff(table.starts).max())
    names = rules(recipe.seasons, longest)
    found = {name: np.full(shape, np.nan) for name in names}
    for series in np.unique(windows.series):
        rows = table.rows(int(series))
        here = windows.series == series
        for n, target in enumerate(recipe.targets):
            values = table.columns[target][rows]
            for name, rule in names.items():
                found[name][here, :, n] = rule(values, windows.origins[here] - rows.start, recipe.horizon)
    if recipe.smoothing:
        every = np.arange(len(windows.origins))
        said = [windows.rule(SMOOTHED, n, every) for n in range(len(recipe.targets))]
        found["exponential smoothing"] = np.stack(said, axis=-1)
    return found
