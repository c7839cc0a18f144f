"""Gradient boosting on lags: a baseline for trained networks. Needs scikit-learn, no torch.

One model forecasts all steps of all series: its rows are pairs of an origin and a step ahead. Its features are the
step, the values at the same phase of the last seasons, the latest values, means of the last seasons, the calendar of
the forecast step, columns known in advance at that step, their differences from the origin and from the same phase of
the last seasons, other columns at the origin, and the series. It learns the value or its difference from the naive or a
seasonal naive forecast, of the values or of their logarithms. The validation part determines which, and the number of
trees.

Ref: Friedman, Greedy function approximation: a gradient boosting machine, Annals of Statistics 29 (2001), 1189-1232;
Ke et al., LightGBM, NeurIPS 2017, whose histograms scikit-learn's HistGradientBoostingRegressor follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train import measures
from cellstack.train.forecasting import rules

RECENT = 6  # number of latest values among the features
CATEGORIES = 255  # scikit-learn's limit
MOST_QUICK, MOST_TUNED = 12_000, 40_000  # pairs of an origin and a step to train on; twice as many in the final fit
TUNED = (
    {"max_iter": 300},
    {"max_iter": 300, "loss": "absolute_error"},
    {"max_iter": 800, "learning_rate": 0.03, "max_leaf_nodes": 15},
    {"max_iter": 500, "learning_rate": 0.05, "max_leaf_nodes": 63, "l2_regularization": 1.0},
    {"max_iter": 500, "learning_rate": 0.05, "min_samples_leaf": 100, "max_features": 0.5},
    {"max_iter": 500, "learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 5},
)


class Way(NamedTuple):
    """What the trees learn: values or logarithms, less those one season before (season 0: nothing subtracted)."""

    log: bool
    season: int


@dataclass(frozen=True)
class Panel:
    """Series on even grids, the input of `Boosting`.

    Args:
        values: the target `[N]`, NaN where missing.
        starts: rows `starts[s]:starts[s + 1]` are series s, `[S + 1]`.
        times: datetime64 `[N]`; None without dates.
        known: columns whose future values are known, `[N]` each.
        past: columns known only up to the origin, `[N]` each.
        categories: names of the columns among these that contain category codes, -1 where missing.
    """

    values: NDArray[np.float64]
    starts: NDArray[np.int64]
    times: NDArray[np.datetime64] | None = None
    known: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    past: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    categories: frozenset[str] = frozenset()


Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows of origins, steps ahead


class Boosting:
    """Gradient boosting, fitted to a panel.

    Args:
        panel: the series.
        horizon: steps ahead.
        seasons: in rows, ascending; those of which a training part has fewer than two are ignored.
        train: rows of the origins to train on, `[n]`.
        validation: rows of the origins for model selection, `[m]`; the selected model is then fitted to both.
        tuned: try more settings, which takes up to two minutes instead of ten seconds.
        seed: of the random choice of rows and features.

    The fit uses no row after the last target of these origins; `forecast` uses rows up to its origins.

    Raises:
        ImportError: scikit-learn isn't installed.
        ValueError: nothing was observed after the origins.
    """

    def __init__(
        self,
        panel: Panel,
        horizon: int,
        seasons: Sequence[int],
        train: NDArray[np.int64],
        validation: NDArray[np.int64],
        *,
        tuned: bool = False,
        seed: int = 0,
    ):
        self.panel, self.horizon, self.seed = panel, horizon, seed
        self.series = np.searchsorted(panel.starts, np.arange(len(panel.values)), side="right") - 1
        seen = np.concatenate([train, validation])
        ends = panel.starts[:-1].copy()
        np.maximum.at(ends, self.series[seen], seen + 1 + horizon)
        parts = [panel.values[a:b] for a, b in zip(panel.starts[:-1], ends, strict=True)]
        self.seasons = tuple(season for season in seasons if 1 < season <= max(map(len, parts), default=0) // 2)
        self.unit = np.array([_unit(part, (*self.seasons, 1)[0]) for part in parts])
        self.latest = {season: self._latest(season) for season in (1, *self.seasons)}
        self.by_series = 1 < len(parts) <= CATEGORIES
        columns = {**panel.known, **panel.past}
        self.categories = sorted(name for name in panel.categories if columns[name].max() < CATEGORIES)
        positive = all((part[~np.isnan(part)] > 0).all() for part in parts)
        rng = np.random.default_rng(seed)
        most = MOST_TUNED if tuned else MOST_QUICK
        learn, check = self._pairs(train, most, rng), self._pairs(validation, most // 4, rng)
        self.best: tuple[float, Way, dict[str, Any]] = (np.inf, Way(False, 0), {})
        for way in [Way(log, season) for log in (False, True) for season in (0, 1, *self.seasons)]:
            if not way.log or (tuned and positive and way.season):
                self._compare(way, {"max_iter": 100}, learn, check)
        for settings in TUNED if tuned else ():
            self._compare(self.best[1], {"loss": self.best[2].get("loss", "squared_error"), **settings}, learn, check)
        _, self.way, settings = self.best
        self.model = self._fitted(self.way, settings, self._pairs(seen, 2 * most, rng))

    def forecast(self, origins: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the forecasts `[B, horizon]`; NaN beyond the panel's end, or without values up to the origin."""
        at, ahead = np.repeat(origins, self.horizon), np.tile(np.arange(1, self.horizon + 1), len(origins))
        inside = at + ahead < self.panel.starts[self.series[at] + 1]
        out = np.full(len(at), np.nan)
        pairs = at[inside], ahead[inside]
        x, base = self._features(self.way, pairs)
        with _one_thread():
            out[inside] = self._back(self.way, pairs, base + self.model.predict(x))
        return out.reshape(-1, self.horizon)

    def _pairs(self, origins: NDArray[np.int64], most: int, rng: np.random.Generator) -> Pairs:
        """Return the pairs with an observed target, or a random sample of `most` of them, in order."""
        at, ahead = np.repeat(origins, self.horizon), np.tile(np.arange(1, self.horizon + 1), len(origins))
        first = self.latest[1][at] >= 0
        there = np.flatnonzero(first & ~np.isnan(self.panel.values[at + ahead]))
        if not len(there):
            raise ValueError("no target was observed after any of the origins")
        if len(there) > most:
            there = np.sort(rng.choice(there, most, replace=False))
        return at[there], ahead[there]

    def _compare(self, way: Way, settings: dict[str, Any], learn: Pairs, check: Pairs) -> None:
        """Fit to `learn`; keep the settings and the number of trees if they are the best so far on `check`."""
        model = self._fitted(way, settings, learn)
        x, base = self._features(way, check)
        rows = check[0] + check[1]
        with _one_thread():
            for trees, predicted in enumerate(model.staged_predict(x), 1):
                if trees % 10 == 0:
                    error = np.abs(self._back(way, check, base + predicted) - self.panel.values[rows])
                    error = float((error / self.unit[self.series[rows]]).mean())
                    if error < self.best[0]:
                        self.best = error, way, {**settings, "max_iter": trees}

    def _fitted(self, way: Way, settings: dict[str, Any], pairs: Pairs) -> Any:
        from sklearn.ensemble import HistGradientBoostingRegressor

        x, base = self._features(way, pairs)
        x[:, np.isnan(x).all(0)] = 0.0  # scikit-learn refuses a column without values
        categories = list(range(x.shape[1] - len(self._codes(pairs)), x.shape[1]))  # they are last
        fixed = {"early_stopping": False, "random_state": self.seed, "categorical_features": categories}
        with _one_thread():
            return HistGradientBoostingRegressor(**settings, **fixed).fit(
                x, self._forth(way)[pairs[0] + pairs[1]] - base
            )

    def _forth(self, way: Way) -> NDArray[np.float64]:
        """Return the transformed target, which the trees learn, `[N]`."""
        return np.log(self.panel.values) if way.log else self.panel.values / self.unit[self.series]

    def _back(self, way: Way, pairs: Pairs, y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(y) if way.log else y * self.unit[self.series[pairs[0]]]

    def _latest(self, season: int) -> NDArray[np.int64]:
        """Return `rules.latest` of each series, in rows of the panel."""
        parts = [(a, rules.latest(self.panel.values[a:b], season)) for a, b in pairwise(self.panel.starts)]
        return np.concatenate([np.where(part < 0, -1, part + start) for start, part in parts])

    def _seasonal(
        self, y: NDArray[np.float64], pairs: Pairs, season: int, back: int = 0, shift: int = 0
    ) -> NDArray[np.float64]:
        """Return the latest value at the phase of the step ahead, `back` seasons earlier, `shift` rows later.

        NaN where there is none up to the origin.
        """
        at, ahead = pairs
        rows = at + ahead - season * (-(-ahead // season) + back) + shift
        there = (rows >= self.panel.starts[self.series[at]]) & (rows <= at)
        source = np.where(there, self.latest[season][np.where(there, rows, 0)], -1)
        return np.where(source < 0, np.nan, y[source])

    def _before(self, values: NDArray[Any], pairs: Pairs, season: int) -> NDArray[np.float64]:
        """Return a column's latest value up to the origin at the phase of the forecast step; NaN before the series."""
        at, ahead = pairs
        rows = at + ahead - season * -(-ahead // season)
        return np.where(rows >= self.panel.starts[self.series[at]], values[np.maximum(rows, 0)], np.nan)

    def _codes(self, pairs: Pairs) -> list[NDArray[np.float64]]:
        """Return the categorical features, as codes: the categories, and the series."""
        at, ahead = pairs
        found = []
        for name in self.categories:
            if name in self.panel.known:
                codes = self.panel.known[name]
                found += [codes[at + ahead], codes[at], *(self._before(codes, pairs, s) for s in self.seasons)]
            else:
                found.append(self.panel.past[name][at])
        found = [np.where(codes < 0, np.nan, codes) for codes in found]
        return [*found, self.series[at].astype(np.float64)] if self.by_series else found

    def _features(self, way: Way, pairs: Pairs) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return the features `[M, F]`, and the base to add to the model's output, `[M]`."""
        at, ahead = pairs
        y = self._forth(way)
        sums = _sums(y)
        first = self.panel.starts[self.series[at]]
        now = self._seasonal(y, pairs, 1)
        base = np.zeros(len(at))
        if way.season:
            base = self._seasonal(y, pairs, way.season)
            base = np.where(np.isnan(base), now, base)
        levels = [now, *(np.where(at - lag >= first, y[at - lag], np.nan) for lag in range(RECENT))]
        changes = []
        for season in self.seasons:
            same = np.array([self._seasonal(y, pairs, season, back) for back in range(rules.MEAN_OF)])
            count = (~np.isnan(same)).sum(0)
            mean = np.where(count > 0, np.nansum(same, 0) / np.maximum(count, 1), np.nan)
            levels += [*same[:2], mean, *(self._seasonal(y, pairs, season, shift=shift) for shift in (-1, 1))]
            last = _means(sums, np.maximum(first, at + 1 - season), at + 1)
            before = _means(sums, np.maximum(first, at + 1 - 2 * season), np.maximum(first, at + 1 - season))
            levels += [last, _means(sums, np.maximum(first, at + 1 - rules.MEAN_OF * season), at + 1)]
            changes += [last - before]
        columns = [ahead, *(level - base for level in levels), *changes, *_calendar(self.panel.times, at + ahead)]
        numbers = lambda names: [name for name in names if name not in self.categories]  # noqa: E731
        for name in numbers(self.panel.known):
            values = self.panel.known[name]
            then = values[at + ahead]
            columns += [
                then,
                then - values[at],
                *(then - self._before(values, pairs, season) for season in self.seasons),
            ]
        columns += [self.panel.past[name][at] for name in numbers(self.panel.past)]
        columns += self._codes(pairs)
        return np.stack([np.asarray(column, np.float32) for column in columns], axis=1), base


def _one_thread() -> Any:
    """Return a context in which scikit-learn's loops run on one thread.

    At these sizes a loop takes microseconds: two threads gain little on an idle machine, and are ten times slower on a
    busy one, where each waits until the other is scheduled.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    return threadpool_limits(1, "openmp")


def _unit(values: NDArray[np.float64], season: int) -> float:
    """Return the mean absolute change over a season; if that is 0, the mean absolute value; if that is 0 too, 1."""
    seen = np.abs(values[~np.isnan(values)])
    change = measures.seasonal_error(values, season)
    return change if change > 0 else (float(seen.mean()) if seen.any() else 1.0)


def _sums(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return cumulative sums and counts of the observed values, `[2, N + 1]`."""
    seen = ~np.isnan(y)
    return np.pad(np.cumsum([np.where(seen, y, 0.0), seen], axis=1), ((0, 0), (1, 0)))


def _means(sums: NDArray[np.float64], low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean over the rows from `low` to before `high`; NaN without observed values."""
    total, count = sums[:, high] - sums[:, low]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _calendar(times: NDArray[np.datetime64] | None, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the minute of the day, the weekday, the day of the month and of the year, the month."""
    if times is None:
        return []
    at = times[rows].astype("datetime64[m]")
    day, month, year = (at.astype(f"datetime64[{unit}]") for unit in "DMY")
    whole = lambda part: part.astype(np.int64)  # noqa: E731
    return [whole(at - day), (whole(day) + 3) % 7, whole(day - month), whole(day - year), whole(month) % 12]
