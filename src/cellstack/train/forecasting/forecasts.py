"""`Forecasts`: what a network forecasts for the series of a table. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import islice, product
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.data.frames import as_frame, distinct
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.windows import actual_after
from cellstack.train.measures import coverage, errors
from cellstack.train.tables.table import Table, date_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SHOWN = 5  # rows of the text


@dataclass(frozen=True, eq=False, repr=False)
class Forecasts:
    """Forecasts from several origins.

    Args:
        recipe: targets, inputs and windows.
        table: the series.
        ids: of the series of each origin, `[N]`: its name, or its value in the frame that `predict` was given; `""` for
            a table with one series without a name.
        origins: last row that each forecast uses, `[N]`.
        times: wall-clock time of each forecast step, `[N, horizon]`; None without dates.
        values: `[N, horizon, targets, quantiles]` in the targets' units, NaN without values to start from.
        reference: forecasts of the rule to which the network's output is added, `[N, horizon, targets]`.
        polars: whether `to_frame` returns a polars frame.
    """

    recipe: Recipe
    table: Table
    ids: list[Any]
    origins: Ints
    times: NDArray[np.datetime64] | None
    values: Floats
    reference: Floats
    polars: bool = False

    def __repr__(self) -> str:
        """Describe them in about ten lines: the first steps, and the scores if the table has later rows."""
        recipe, table, times = self.recipe, self.table, self.times
        count, horizon, levels = len(self.origins), recipe.horizon, recipe.quantiles
        steps = f"{horizon} step{'s' * (horizon != 1)}" + f" from each of {count:,} origins" * (count > 1)
        when = "" if times is None else f", {table.shown(times.min())} to {table.shown(times.max())}"
        spread = f"; median ({interval(levels[0], levels[-1])})" if len(levels) > 1 else ""
        lines = [f"Forecasts of {', '.join(recipe.targets)}: {steps}{when}{spread}"]
        for n, step in islice(product(range(count), range(horizon)), SHOWN):
            name = f"{self.ids[n]}, " if table.id else ""
            date = f"step {step + 1}" if times is None else table.shown(times[n, step])
            lines.append(f"{name}{date}: {', '.join(self._point(n, step, k) for k in range(len(recipe.targets)))}")
        lines += [f"… {count * horizon:,} rows, see to_frame()"] * (count * horizon > SHOWN)
        for name, found in self.scores.items():
            scores = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            lines.append(f"compared with the later rows, {name}: {scores}")
        return "\n  ".join(lines)

    def _point(self, n: int, step: int, target: int) -> str:
        """Return a step of a forecast as text: the median, and the outer quantiles."""
        low, high = self.values[n, step, target, [0, -1]]
        name = f"{self.recipe.targets[target]} " * (len(self.recipe.targets) > 1)
        spread = f" ({low:.4g} to {high:.4g})" * (len(self.recipe.quantiles) > 1)
        return f"{name}{self.median[n, step, target]:.4g}{spread}"

    def _repr_png_(self) -> bytes | None:
        """Return the plot, which notebooks show; None without matplotlib: they show the text."""
        if find_spec("matplotlib") is None:
            return None
        picture = BytesIO()
        self.plot().savefig(picture, format="png", dpi=100)
        return picture.getvalue()

    @property
    def median(self) -> Floats:
        """The forecast, `[N, horizon, targets]`."""
        return self.values[..., self.recipe.quantiles.index(0.5)]

    @property
    def actual(self) -> Floats:
        """The table's values after the origins, `[N, horizon, targets]`, NaN where it has none."""
        return actual_after(self.recipe, self.table, self.origins)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The errors of the median compared with `actual`, by target; {} if no target has actual values.

        `mae` and `rmse` in the target's units, and `coverage`, the share of the actual values between the outer
        quantiles.
        """
        recipe, found = self.recipe, {}
        actual = np.where(np.isnan(self.median), np.nan, self.actual)
        for n, name in enumerate(recipe.targets):
            if np.isnan(actual[..., n]).all():
                continue
            found[name] = errors(self.median[..., n], actual[..., n])
            if len(recipe.quantiles) > 1:
                outer = self.values[:, :, n]
                found[name]["coverage"] = coverage(outer[..., 0], outer[..., -1], actual[..., n])
        return found

    @property
    def dates(self) -> tuple[NDArray[np.datetime64], NDArray[np.datetime64]] | None:
        """The times of the origins, `[N]`, and of their steps, `[N, horizon]`; None without dates.

        Both have the coarsest unit, of D, s and us, that represents all times of the table.
        """
        table, times = self.table, self.times
        if table.times is None or times is None:
            return None
        unit = f"datetime64[{date_unit(table.times, times)}]"
        return table.times[self.origins].astype(unit), times.astype(unit)

    def columns(self) -> dict[str, Any]:
        """Return a table's columns by name, as lists or arrays of equal length, with a row per origin and step.

        They are the id of the series, if there are several; the date, or `step` from 1; for each target, the forecast
        in a column of its name, and the quantiles, such as `sales_0.1`. If the table has values after an origin, there
        are also `origin`, its date or row, and `sales_actual`.
        """
        recipe, table, dates = self.recipe, self.table, self.dates
        horizon, count = recipe.horizon, len(self.origins)
        pairs: list[tuple[str, Any]] = []
        if table.id:
            pairs.append((table.id, [name for name in self.ids for _ in range(horizon)]))
        actual = self.actual
        compared = not np.isnan(actual).all()
        if compared:
            pairs.append(("origin", np.repeat(self.origins if dates is None else dates[0], horizon)))
        steps = np.tile(np.arange(1, horizon + 1), count) if dates is None else dates[1].reshape(-1)
        pairs.append((table.date or "step", steps))
        for n, name in enumerate(recipe.targets):
            if compared:
                pairs.append((f"{name}_actual", actual[..., n].reshape(-1)))
            pairs.append((name, self.median[..., n].reshape(-1)))
            for q, level in enumerate(recipe.quantiles):
                if level != 0.5:
                    pairs.append((f"{name}_{level:g}", self.values[..., n, q].reshape(-1)))
        return distinct(pairs)

    def to_frame(self) -> Any:
        """Return `columns` as a pandas frame, with dates as datetime64; as a polars frame if the data was one.

        Raises:
            UsageError: pandas isn't installed.
        """
        return as_frame(self.columns(), self.polars)

    def at(self, levels: Sequence[float]) -> Floats:
        """Return any quantiles, `[N, horizon, targets, levels]`.

        Between two of the recipe's quantiles they are interpolated linearly over the quantiles of the normal
        distribution: exact if forecasts are normally distributed, and otherwise still between the two.

        Args:
            levels: from the lowest of the recipe's quantiles to the highest.

        Raises:
            UsageError: a level outside this range, for which the network wasn't trained.
        """
        known = np.array(self.recipe.quantiles)
        at = np.array(levels, np.float64)
        nearest = known[np.abs(at[:, None] - known).argmin(axis=1)]
        at = np.where(np.abs(at - nearest) < 1e-9, nearest, at)  # 0.5 - 0.9 / 2 is 0.05
        beyond = ~((at >= known[0]) & (at <= known[-1]))
        if beyond.any():
            raise UsageError(
                f"expected quantiles from {known[0]:g} to {known[-1]:g}, the range that the network was trained for, "
                f"got {at[beyond][0]:g}: train it with a wider range of quantiles"
            )
        normal = np.array([NormalDist().inv_cdf(level) for level in known])
        wanted = np.array([NormalDist().inv_cdf(level) for level in at])
        above = np.clip(np.searchsorted(known, at), 1, None) if len(known) > 1 else np.zeros(len(at), np.int64)
        below = np.maximum(above - 1, 0)  # the same if there is only one
        share = (wanted - normal[below]) / np.where(above > below, normal[above] - normal[below], 1.0)
        return self.values[..., below] * (1 - share) + self.values[..., above] * share

    def plot(self, which: int | Sequence[int] | None = None, *, history: int | None = None) -> Figure:
        """Return a matplotlib figure: the last values of the history, the median, and the intervals of the quantiles.

        Each forecast and target has its own panel. The median and the intervals begin at the last value of the history.
        Actual values after the origin are drawn where the table has them.

        Args:
            which: numbers of the forecasts, of N; None = all, or six of them, evenly spread.
            history: steps before the origin; None = twice the horizon or a window, and at least 16.

        Raises:
            UsageError: matplotlib isn't installed, or there is no such forecast.
        """
        from cellstack.train.forecasting.plot import plot

        return plot(self, which, history)


def interval(low: float, high: float) -> str:
    """Return the name of the interval between two quantiles.

    >>> interval(0.1, 0.9), interval(0.1, 0.5)
    ('80% interval', 'quantiles 0.1 to 0.5')
    """
    return f"{high - low:.0%} interval" if abs(low + high - 1) < 1e-9 else f"quantiles {low:g} to {high:g}"
