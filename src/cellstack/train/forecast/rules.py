"""Forecasts by rules, which a trained model has to beat. Needs no torch.

Every rule is a function of the values `[N]` of one series on an even grid (float64, NaN where missing), of the rows of
the last step that is known `[B]`, and of the horizon; it returns `[B, horizon]` and looks at no row after an origin.
A missing value is replaced by the latest one that was observed a whole number of seasons before it. A forecast is NaN
where nothing was observed at its phase of the season.

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
    """Return every rule that `rows` known rows allow, by its name.

    Args:
        seasons: rows after which the series repeats itself; those longer than half of the rows are left out.
        rows: how many come before the first origin.
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
    """Return the value one season before, or the smallest number of seasons before that is known: seasonal naive.

        forecast(t + k) = x(t + k - season·j) + drift(t)·j        smallest whole j that is known at t

    `drift(t)` is the mean change over a season up to the origin, 0 unless asked for. With a season of 1 these are the
    naive forecast and that with drift.
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
    """Return the mean of what was observed at the same phase of the last `count` seasons."""
    rows = _phase(origins, horizon, season)[..., None] - season * np.arange(count)  # [B, horizon, count]
    seen = np.where(rows >= 0, values[np.maximum(rows, 0)], np.nan)
    observed = ~np.isnan(seen)
    number = observed.sum(-1)
    return np.where(number > 0, np.where(observed, seen, 0.0).sum(-1) / np.maximum(number, 1), np.nan)


def latest(values: NDArray[np.float64], period: int) -> NDArray[np.int64]:
    """Return the latest row at which something was observed, of each row and those whole periods before it; else -1."""
    period = min(period, len(values))  # a longer one looks back at as little, and would take more memory
    grid = np.full(-(-len(values) // period) * period, -1)
    grid[: len(values)] = np.where(np.isnan(values), -1, np.arange(len(values)))
    return np.maximum.accumulate(grid.reshape(-1, period), axis=0).reshape(-1)[: len(values)]


def _phase(origins: NDArray[np.int64], horizon: int, season: int) -> NDArray[np.int64]:
    """Return the latest row not after the origin at the phase of each step ahead, `[B, horizon]`."""
    ahead = np.arange(1, horizon + 1)
    return origins[:, None] + ahead - season * -(-ahead // season)


def _change(values: NDArray[np.float64], at: NDArray[np.int64], season: int) -> NDArray[np.float64]:
    """Return the mean change over a season up to each row, 0 before there is one."""
    before = np.full(len(values), -1)
    before[season:] = at[: max(0, len(at) - season)]
    pairs = ~np.isnan(values) & (before >= 0)
    change = np.where(pairs, values - values[np.maximum(before, 0)], 0.0).cumsum()
    seasons = np.where(pairs, (np.arange(len(values)) - before) // season, 0).cumsum()
    return change / np.maximum(seasons, 1)
