"""Windows over a table's series, the inputs of a network, and the inverse scaling of its outputs. Needs no torch.

The input is one sequence of `window` steps up to an origin t and the `horizon` steps after it. The channels of a step
u, for each target y:

    y(u)          up to t; missing after it
    rule(t, u)    the forecast of u by each simple rule: the latest value, and for each season the latest value at the
                  same phase and the mean of the latest four (for u up to t, forecast one season earlier); and
                  exponential smoothing (for u up to t, forecast one step earlier); for u after t, all forecast at t

and inputs up to t, known inputs, categories and the calendar at every step. All of a target's values are scaled with
the window's own statistics, (y - base) / unit, so that one network can forecast levels and series that it wasn't
trained on. Its outputs, one per quantile, are added to one of the rules:

    forecast(t + k) = rule(t, t + k) + unit(t) · network(…)[k]           k = 1 … horizon

Ref: lagged values and calendar as inputs of a network that all series share: Salinas et al. 2020, "DeepAR:
Probabilistic forecasting with autoregressive recurrent networks", section 3; the units: Kim et al. 2022, "Reversible
instance normalization for accurate time-series forecasting against distribution shift".
"""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.examples import Batch
from cellstack.train.forecasting.calendar import features
from cellstack.train.forecasting.recipe import NAIVE, SMOOTHED, Recipe, Rule
from cellstack.train.forecasting.rules import MEAN_OF, latest
from cellstack.train.forecasting.smoothing import Smoothed, Smoothing
from cellstack.train.tables.table import Table, listed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Units(NamedTuple):
    """Base and unit of each target in each window, `[B, targets]`."""

    base: Floats
    unit: Floats


class Target:
    """A column with the rules' forecasts of each of its rows."""

    def __init__(self, values: Floats, starts: Ints, seasons: tuple[int, ...], how: Smoothing | None):
        self.values = values
        self.smoothed = None if how is None else Smoothed(values, starts, seasons, how)
        self.latest = {period: _carried(values, starts, period) for period in (1, *seasons)}
        self.means = {season: _means(values, starts, season) for season in seasons}

    def of(self, rule: Rule) -> Floats:
        """Return, at each row, a rule's forecast for whole seasons later, `[N]`."""
        return self.means[rule.season] if rule.name == "mean" else self.latest[rule.season]


class Windows:
    """Windows of a table that end at `origins`, as `Examples`.

    Args:
        recipe: targets, inputs and windows.
        table: the series.
        origins: last row of each window, `[N]`.
        typical: typical error of each series and target, `[S, targets]`, by which the loss is divided, so that all
            series have the same weight; None if not for training.

    Raises:
        UsageError: a column is missing, or dates are needed and there are none; the message names the columns.
    """

    def __init__(self, recipe: Recipe, table: Table, origins: Ints, typical: Floats | None = None):
        _check_columns(recipe, table)
        self.recipe, self.table, self.origins, self.typical = recipe, table, origins, typical
        self.lengths = np.full(len(origins), recipe.window + recipe.horizon, np.int64)
        self.series = np.searchsorted(table.starts, origins, side="right") - 1
        smoothings = recipe.smoothing or (None,) * len(recipe.targets)
        self.targets = [
            Target(table.columns[name], table.starts, recipe.seasons, how)
            for name, how in zip(recipe.targets, smoothings, strict=True)
        ]
        self.past = _columns([table.columns[name] for name in recipe.inputs], len(table))
        self.always = self._known()
        self.labels = self._labels()

    def _known(self) -> NDArray[np.float32]:
        """Return the inputs known in advance at each row and `horizon` rows past each series, `[N + S·horizon, …]`."""
        recipe, table = self.recipe, self.table
        known = _columns([table.columns[name] for name in recipe.known], len(table))
        parts = [known]
        if recipe.categories:
            parts.append(_one_hot(recipe, table, known=True))
        numbers = _extended(np.concatenate(parts, axis=1), table.starts, recipe.horizon)
        if not recipe.calendar:
            return numbers
        dates = features(extended_times(table, recipe.horizon), recipe.calendar, recipe.holidays)
        return np.concatenate([numbers, dates], axis=1)

    def _labels(self) -> NDArray[np.float32]:
        """Return the categories that are known only up to the origin, `[N, labels]`."""
        return _one_hot(self.recipe, self.table, known=False)

    def with_recipe(self, recipe: Recipe) -> Windows:
        """Return the same windows for a recipe that differs only in rule or floors."""
        other = copy(self)
        other.recipe = recipe
        return other

    def typical_of(self, indices: Ints) -> Floats:
        """Return the typical error in each window, `[B, targets]`; 1 if not for training."""
        if self.typical is None:
            return np.ones((len(indices), len(self.targets)))
        return self.typical[self.series[indices]]

    @property
    def channels(self) -> int:
        """Channels of a step."""
        per_target = 1 + len(self.recipe.rules)
        return len(self.targets) * per_target + self.past.shape[1] + self.labels.shape[1] + self.always.shape[1] + 1

    def fetch(self, indices: Ints) -> Batch:
        """See `Examples`: `x [B, window + horizon, channels]`, `y [B, horizon · targets]` in the windows' units."""
        recipe, table = self.recipe, self.table
        window, horizon = recipe.window, recipe.horizon
        origins, series = self.origins[indices], self.series[indices]
        first = table.starts[series][:, None]
        steps = origins[:, None] + np.arange(1 - window, horizon + 1)  # [B, T]
        begun = steps >= first
        rows = np.maximum(steps[:, :window], first)  # up to the origin
        units = self.units(indices)
        x = np.full((*steps.shape, self.channels), np.nan, np.float32)
        at = 0
        for n, target in enumerate(self.targets):
            base, unit = units.base[:, n, None], units.unit[:, n, None]
            x[:, :window, at] = (target.values[rows] - base) / unit
            for rule in recipe.rules:
                at += 1
                if rule == SMOOTHED and target.smoothed is not None:
                    said = target.smoothed.fitted[rows]
                else:
                    before = steps[:, :window] - rule.season
                    said = np.where(before >= first, target.of(rule)[np.maximum(before, first)], np.nan)
                x[:, :window, at] = (said - base) / unit
                x[:, window:, at] = (self.rule(rule, n, indices) - base) / unit
            at += 1
        for columns in (self.past, self.labels):
            x[:, :window, at : at + columns.shape[1]] = columns[rows]
            at += columns.shape[1]
        x[:, :, at:-1] = self.always[np.maximum(steps, first) + (series * horizon)[:, None]]
        x[:, :, -1] = np.maximum(np.arange(1 - window, horizon + 1), 0) / horizon
        x[~begun] = np.nan  # before the series' first row: masked
        y = (self.actual(indices) - self.reference(indices)) / units.unit[:, None]  # [B, horizon, targets]
        seen = ~np.isnan(y)
        weight = seen * (units.unit / self.typical_of(indices))[:, None]
        shape = (len(indices), -1)
        return Batch(
            x,
            np.where(seen, y, 0.0).reshape(shape).astype(np.float32),
            weight.reshape(shape).astype(np.float32),
        )

    def units(self, indices: Ints) -> Units:
        """Return base and unit of each target in each window; without observed values, 0 and the smallest unit."""
        recipe = self.recipe
        span = recipe.span
        steps = self.origins[indices][:, None] + np.arange(1 - span, 1)
        first = self.table.starts[self.series[indices]][:, None]
        inside = steps >= first
        bases, units = [], []
        for n, target in enumerate(self.targets):
            values = np.where(inside, target.values[np.maximum(steps, first)], np.nan)
            count = np.maximum((~np.isnan(values)).sum(axis=1), 1)
            base = np.nansum(values, axis=1) / count
            spread = np.sqrt(np.nansum(np.square(values - base[:, None]), axis=1) / count)
            floor = recipe.floors[n] if recipe.floors else np.finfo(np.float64).tiny
            bases.append(base)
            units.append(np.maximum(np.abs(base) if recipe.scale == "level" else spread, floor))
        return Units(np.stack(bases, axis=1), np.stack(units, axis=1))

    def rule(self, rule: Rule, target: int, indices: Ints) -> Floats:
        """Return a rule's forecasts of a target, `[B, horizon]`, NaN where it has no value to use."""
        smoothed = self.targets[target].smoothed
        if rule == SMOOTHED and smoothed is not None:
            return smoothed.ahead(self.origins[indices], self.recipe.horizon)
        ahead = np.arange(1, self.recipe.horizon + 1)
        back = ahead - rule.season * -(-ahead // rule.season)  # in (-season, 0]
        rows = self.origins[indices][:, None] + back
        first = self.table.starts[self.series[indices]][:, None]
        return np.where(rows >= first, self.targets[target].of(rule)[np.maximum(rows, first)], np.nan)

    def reference(self, indices: Ints) -> Floats:
        """Return the forecasts of the rule to which the network's output is added, `[B, horizon, targets]`.

        Where the recipe's rule has no value to use, for example at an hour that was never observed, it is the latest
        value.
        """
        every = []
        for n in range(len(self.targets)):
            said, latest_value = (self.rule(rule, n, indices) for rule in (self.recipe.rule, NAIVE))
            every.append(np.where(np.isnan(said), latest_value, said))
        return np.stack(every, axis=-1)

    def actual(self, indices: Ints) -> Floats:
        """Return the actual values, `[B, horizon, targets]`, NaN where missing or beyond the series."""
        return actual_after(self.recipe, self.table, self.origins[indices])

    def forecasts(self, indices: Ints, out: NDArray) -> Floats:
        """Return forecasts in the targets' units, `[B, horizon, targets, quantiles]`, from a network's outputs.

        Quantiles that cross are sorted: Chernozhukov et al. 2010, "Quantile and probability curves without
        crossing".
        """
        recipe = self.recipe
        out = out.reshape(len(indices), recipe.horizon, len(recipe.targets), len(recipe.quantiles))
        unit = self.units(indices).unit[:, None, :, None]
        return np.sort(self.reference(indices)[..., None] + unit * out.astype(np.float64), axis=-1)


def actual_after(recipe: Recipe, table: Table, origins: Ints) -> Floats:
    """Return the targets' values after `origins`, `[N, horizon, targets]`, NaN where missing or beyond the series."""
    rows = origins[:, None] + np.arange(1, recipe.horizon + 1)
    end = table.starts[np.searchsorted(table.starts, origins, side="right")][:, None]
    inside = rows < end
    kept = np.where(inside, rows, end - 1)
    return np.stack([np.where(inside, table.columns[name][kept], np.nan) for name in recipe.targets], axis=-1)


def extended_times(table: Table, rows: int) -> NDArray[np.datetime64]:
    """Return the time of each row and of `rows` rows past each series, `[N + S·rows]`; the table must have dates."""
    parts = []
    for series in range(len(table.ids)):
        after = table.times_after(rows, series)
        assert table.times is not None
        assert after is not None
        parts += [table.times[table.rows(series)], after]
    return np.concatenate(parts)


def _check_columns(recipe: Recipe, table: Table) -> None:
    numbers = (*recipe.targets, *recipe.inputs, *recipe.known)
    for name in numbers:
        if name not in table.columns:
            raise UsageError(f"{table.path}: expected a numeric column {name!r}, found {listed([*table.columns])}")
    for category in recipe.categories:
        if category.name not in table.categories:
            found = listed([*table.categories]) or "none"
            raise UsageError(f"{table.path}: expected a text column {category.name!r}, found {found}")
    if recipe.calendar and (table.times is None or table.spacing is None):
        raise UsageError(f"{table.path}: the model needs dates for its input {recipe.calendar[0]!r}, found none")


def _columns(columns: list[Floats], rows: int) -> NDArray[np.float32]:
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.empty((rows, 0), np.float32)


def _one_hot(recipe: Recipe, table: Table, known: bool) -> NDArray[np.float32]:
    """Return a channel per label, NaN where the text is missing, zeros for labels that weren't in training."""
    parts = [np.empty((len(table), 0), np.float32)]
    for category in recipe.categories:
        if category.known == known:
            here = table.categories[category.name]
            place = {label: n for n, label in enumerate(category.labels)}
            codes = np.array([*(place.get(label, len(place)) for label in here.labels), len(place) + 1])[here.codes]
            channels = np.eye(len(place) + 2, len(place), dtype=np.float32)
            channels[-1] = np.nan
            parts.append(channels[codes])
    return np.concatenate(parts, axis=1)


def _extended(columns: NDArray[np.float32], starts: Ints, rows: int) -> NDArray[np.float32]:
    """Return the columns with `rows` missing rows after each series."""
    count = len(starts) - 1
    out = np.full((len(columns) + count * rows, columns.shape[1]), np.nan, np.float32)
    series = np.repeat(np.arange(count), np.diff(starts))
    out[np.arange(len(columns)) + series * rows] = columns
    return out


def _carried(values: Floats, starts: Ints, period: int) -> Floats:
    """Return the latest observed value at each row or whole periods before it in its series, else NaN."""
    out = np.full(len(values), np.nan)
    for first, end in pairwise(starts):
        at = latest(values[first:end], period)
        out[first:end] = np.where(at < 0, np.nan, values[first:end][at])
    return out


def _means(values: Floats, starts: Ints, season: int) -> Floats:
    """Return at each row the mean of the observed values at this phase of the last seasons, `MEAN_OF` at most."""
    rows = np.arange(len(values))
    first = np.repeat(starts[:-1], np.diff(starts))
    total, count = np.zeros(len(values)), np.zeros(len(values))
    for back in range(MEAN_OF):
        before = rows - back * season
        value = np.where(before >= first, values[np.maximum(before, 0)], np.nan)
        total += np.nan_to_num(value)
        count += ~np.isnan(value)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
