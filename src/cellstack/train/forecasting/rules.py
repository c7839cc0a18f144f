"""Simple forecasting rules, the baselines of a trained model. Needs no torch.

Each rule is a function of the values `[N]` of one series on an even grid (float64, NaN where missing), of the origins,
which are the last known rows `[B]`, and of the horizon; it returns `[B, horizon]` and uses no row after an origin. A
missing value is replaced by the latest observed one a whole number of seasons before it. A forecast is NaN if no value
was observed at its phase of the season.

Ref: Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 3rd edition (2021), section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

Rule = Callable[[NDArray[np.float64], NDArray[np.int64], int], NDArray[np.float64]]
MEAN_OF = 4  # seasons


def rules(seasons: Sequence[int], rows: int) -> dict[str, Rule]:
    """Return the rules that can be applied to `rows` known rows, by name.

    Args:
        seasons: in rows; those longer than half of `rows` are ignored.
        rows: number of rows before the first origin.
    """
    found: dict[str, Rule] = {"naive": partial(seasonal, season=1), "drift": partial(seasonal, season=1, drift=True)}
    for season in seasons:
        if 1 < season <= rows // 2:
            found[f"seasonal naive, {season}"] = partial(seasonal, season=season)
            found[f"seasonal naive with drift, {season}"] = partial(seasonal, season=season, drift=True)
            found[f"mean of the last {MEAN_OF} seasons, {season}"] = partial(seasonal_mean, season=season)
    return found


def seasonal(
    values: NDArray[np.float64], origins: NDArray[np.int64], horizon: int, *, season: int = 1, drift: bool = False
) -> NDArray[np.float64]:
    """Return the seasonal naive forecast: the value the smallest number of seasons earlier that is known.

        forecast(t + k) = x(t + k - season·j) + drift(t)·j        smallest integer j for which x is known at t

    `drift(t)` is the mean change over a season up to the origin, 0 unless `drift` is set. With a season of 1 this is
    the naive forecast, without or with drift.
    """
    rows = _phase(origins, horizon, season)
    at = latest(values, season)
    source = np.where(rows >= 0, at[np.maximum(rows, 0)], -1)
    forecast = np.where(source < 0, np.nan, values[np.maximum(source, 0)])
    if not drift:
        return forecast
    seasons = (origins[:, None] + np.arange(1, horizon + 1) - source) // season
    return forecast + seasons * _change(values, at, season)[origins][:, None]


def seasonal_mean(
    values: NDArray[np.float64], origins: NDArray[np.int64], horizon: int, *, season: int, count: int = MEAN_OF
) -> NDArray[np.float64]:
    """Return the mean of the observed values at the same phase of the last `count` seasons."""
    rows = _phase(origins, horizon, season)[..., None] - season * np.arange(count)  # [B, horizon, count]
    seen = np.where(rows >= 0, values[np.maximum(rows, 0)], np.nan)
    observed = ~np.isnan(seen)
    number = observed.sum(-1)
    return np.where(number > 0, np.where(observed, seen, 0.0).sum(-1) / np.maximum(number, 1), np.nan)


def latest(values: NDArray[np.float64], period: int) -> NDArray[np.int64]:
    """Return, for each row, the latest row with a value among it and those whole periods before it; -1 for none."""
    period = min(period, len(values))  # a longer one gives the same, with more memory
    grid = np.full(-(-len(values) // period) * period, -1)
    grid[: len(values)] = np.where(np.isnan(values), -1, np.arange(len(values)))
    return np.maximum.accumulate(grid.reshape(-1, period), axis=0).reshape(-1)[: len(values)]


def _phase(origins: NDArray[np.int64], horizon: int, season: int) -> NDArray[np.int64]:
    """Return the latest row up to the origin at the phase of each step ahead, `[B, horizon]`."""
    ahead = np.arange(1, horizon + 1)
    return origins[:, None] + ahead - season * -(-ahead // season)


def _change(values: NDArray[np.float64], at: NDArray[np.int64], season: int) -> NDArray[np.float64]:
    """Return the mean change over a season up to each row, 0 before the first one."""
    before = np.full(len(values), -1)
    before[season:] = at[: max(0, len(at) - season)]
    pairs = ~np.isnan(values) & (before >= 0)
    change = np.where(pairs, values - values[np.maximum(before, 0)], 0.0).cumsum()
    seasons = np.where(pairs, (np.arange(len(values)) - before) // season, 0).cumsum()
    return change / np.maximum(seasons, 1)
