"""Exponential smoothing: a level, a trend and seasons, updated row by row. Needs no torch.

For a series y, or its logarithm: the error e of the prediction at row t, and the updates of level l, slope b and
seasons s (d is the mean change per row so far, r the remainder at the previous row, n the number of seasons so far):

    e = y - (l + δ·d + φ·b + ρ·r + s)
    l ← l + δ·d + φ·b + α·e        b ← φ·b + β·e        s ← s + (1 - α)·(γ + (1 - γ) / n)·e        r ← y - l - s

    forecast(t + k) = l + k·δ·d + (φ + … + φ^k)·b + ρ^k·r + s(t + k)

At a missing value e is 0 and r ← ρ·r. Seasons that aren't divisors of a longer one have their own s. The seven
parameters are those that forecast best so far, over the whole horizon, in a grid search.

Ref: Gardner and McKenzie, Forecasting trends in time series, Management Science 31 (1985), 1237-1246 (φ); Taylor,
Short-term electricity demand forecasting using double seasonal exponential smoothing, Journal of the Operational
Research Society 54 (2003), 799-805 (several seasons, ρ); as the start of a network's forecast: Smyl, A hybrid method of
exponential smoothing and recurrent neural networks for time series forecasting, International Journal of Forecasting
36 (2020), 75-85.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEVELS = (0.0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)
SEASONS = (0.0, 0.05, 0.1, 0.2, 0.4)
TRENDS = ((0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.05, 0.9), (0.0, 0.1, 0.98), (0.0, 0.02, 1.0))
MEMORIES = (0.0, 0.5, 0.8, 0.95)
MOST_ROWS, MOST_ORIGINS = 6000, 300  # of the grid search, over all series
SURE = 1.02  # the logarithm may have a larger error by this factor: most positive series vary with their level


class Smoothing(NamedTuple):
    """The parameters of the smoothing, with the letters of the equations.

    Args:
        log: smooth the logarithm; a value without a logarithm is treated as missing.
        level, season: α, γ.
        drift, trend, damping: δ, β, φ.
        memory: ρ.
    """

    log: bool
    level: float
    season: float
    drift: float
    trend: float
    damping: float
    memory: float


class SmoothingState(NamedTuple):
    """The state after a row: numbers, or arrays with one entry per set of parameters.

    Args:
        fitted: the prediction of the row.
        level, drift, slope, rest: l, δ·d, b, r.
        phases: for each season, its values by phase.
    """

    fitted: Any
    level: Any
    drift: Any
    slope: Any
    rest: Any
    phases: list[list[Any]]


class Smoothed:
    """A column with the state after each of its rows.

    Args:
        values: `[N]`, NaN where missing.
        starts: rows `starts[s]:starts[s + 1]` are series s, `[S + 1]`.
        seasons: in rows, ascending.
        how: the parameters.
    """

    def __init__(self, values: Floats, starts: Ints, seasons: Sequence[int], how: Smoothing):
        self.how, self.seasons = how, apart(seasons)
        self.fitted, self.level, self.drift, self.slope, self.rest = np.full((5, len(values)), np.nan)
        self.phases = np.full((len(self.seasons), len(values)), np.nan)
        for first, end in pairwise(starts.tolist()):
            for row, state in states(scaled(values[first:end], how.log), self.seasons, how):
                at = first + row
                self.fitted[at], self.level[at], self.drift[at] = state.fitted, state.level, state.drift
                self.slope[at], self.rest[at] = state.slope, state.rest
                for n, season in enumerate(self.seasons):
                    self.phases[n, at] = state.phases[n][row % season]
                    if np.isnan(state.fitted):  # the first state has a complete season before it
                        places = np.arange(row + 1 - season, row + 1)
                        self.phases[n, first + places] = np.array(state.phases[n])[places % season]
        if how.log:
            with np.errstate(over="ignore"):
                self.fitted = np.exp(self.fitted)

    def ahead(self, origins: Ints, horizon: int) -> Floats:
        """Return forecasts `[B, horizon]` from rows `origins`; NaN before the first state."""
        steps = np.arange(1, horizon + 1)
        season = np.zeros((len(origins), horizon))
        for n, length in enumerate(self.seasons):
            rows = origins[:, None] + steps - length * -(-steps // length)
            season += self.phases[n, np.maximum(rows, 0)]
        level, drift, slope, rest = (each[origins, None] for each in (self.level, self.drift, self.slope, self.rest))
        return ahead(SmoothingState(None, level, drift, slope, rest, []), season, self.how, steps)


def apart(seasons: Sequence[int]) -> tuple[int, ...]:
    """Return the seasons that aren't divisors of a longer one, which would include them."""
    return tuple(one for one in seasons if not any(other > one and other % one == 0 for other in seasons))


def scaled(values: Floats, log: bool) -> list[float]:
    """Return the values, or their logarithms with `log`."""
    if log:
        values = np.log(np.where(values > 0, values, np.nan))
    return values.tolist()


def states(y: list[float], seasons: tuple[int, ...], how: Any) -> Iterator[tuple[int, SmoothingState]]:
    """Yield rows and the states after them, starting after the first complete season."""
    longest = max(seasons, default=1)
    begin = next((row for row, value in enumerate(y) if value == value), len(y))
    end = begin + longest
    if end > len(y):
        return
    level, phases = begun(y[begin:end], begin, seasons)
    slope = rest = drift = 0.0
    known = {row % longest: row for row in range(begin, end) if y[row] == y[row]}
    change = passed = 0.0
    yield end - 1, SmoothingState(float("nan"), level, drift, slope, rest, phases)
    for row in range(end, len(y)):
        value = y[row]
        here = [(phase, row % season) for phase, season in zip(phases, seasons, strict=True)]
        season = sum([phase[at] for phase, at in here])
        moved = level + drift + how.damping * slope
        fitted = moved + how.memory * rest + season
        slope = how.damping * slope
        if value == value:
            error = value - fitted
            level = moved + how.level * error
            slope = slope + how.trend * error
            for phase, at in here:
                gain = how.season + (1 - how.season) / ((row - begin) // len(phase) + 1)
                phase[at] = phase[at] + (1 - how.level) * gain * error
            rest = value - level - sum([phase[at] for phase, at in here])
            before = known.get(row % longest)
            if before is not None:
                change, passed = change + value - y[before], passed + row - before
                drift = how.drift * (change / passed)
            known[row % longest] = row
        else:
            level, rest = moved, how.memory * rest
        yield row, SmoothingState(fitted, level, drift, slope, rest, phases)


def begun(y: list[float], begin: int, seasons: tuple[int, ...]) -> tuple[float, list[list[Any]]]:
    """Return the initial level and the seasons' values by phase, from one season that starts at row `begin`."""
    left = np.array(y)
    level = float(np.nanmean(left))
    left -= level
    phases = []
    for season in seasons:
        places = (begin + np.arange(len(left))) % season
        seen = ~np.isnan(left)
        total = np.bincount(places[seen], left[seen], season)
        values = total / np.maximum(np.bincount(places[seen], minlength=season), 1)
        left -= values[places]
        phases.append(values.tolist())
    return level, phases


def ahead(state: SmoothingState, season: Any, how: Any, steps: Ints) -> Floats:
    """Return forecasts for `steps`, along the last axis, from a state whose arrays have a last axis of length 1."""
    damping = np.asarray(how.damping)[..., None] ** np.arange(1, steps[-1] + 1)
    damped = damping.cumsum(-1)
    found = state.level + state.drift * steps + state.slope * damped
    found = found + state.rest * np.asarray(how.memory)[..., None] ** steps + season
    if how.log:
        with np.errstate(over="ignore"):
            found = np.exp(found)
    return np.where(np.isfinite(found), found, np.nan)


def best(
    series: Sequence[Floats], seasons: Sequence[int], horizon: int, typical: Sequence[float], after: int = 0
) -> tuple[Smoothing, float] | None:
    """Return the parameters that forecast the series best, and their mean error relative to the typical ones.

    Args:
        series: values `[N]` each, NaN where missing.
        seasons: in rows, ascending.
        horizon: steps ahead.
        typical: typical error of each series, by which its errors are divided.
        after: rows of each series before the first measured forecast, at least two of the longest season.

    Returns:
        None if no series is long enough. The logarithm is smoothed unless the values give clearly smaller errors.
    """
    kept = apart(seasons)
    longest = max(kept, default=1)
    after = max(after, 2 * longest)
    usable = [n for n, values in enumerate(series) if (~np.isnan(values)).any() and len(values) > longest + horizon]
    most = max(1, MOST_ROWS // (after + longest + horizon))
    usable = [usable[n] for n in np.linspace(0, len(usable) - 1, min(most, len(usable))).astype(int)]
    if not usable:
        return None
    rows = max(after + longest + horizon, MOST_ROWS // len(usable))
    positive = all(bool(np.nanmin(series[n]) > 0) for n in usable)
    seasonal = SEASONS if kept else SEASONS[:1]
    ways = np.array([(a, g, *t, r) for a, g, t, r in product(LEVELS, seasonal, TRENDS, MEMORIES)]).T
    found: list[tuple[Smoothing, float]] = []
    for log in (False, True) if positive else (False,):
        how = Smoothing(log, *ways)
        total, count = np.zeros(len(ways[0])), 0
        for n in usable:
            some = _origins(min(len(series[n]), rows), after, horizon, max(10, MOST_ORIGINS // len(usable)))
            errors, number = _errors(series[n][-rows:], kept, horizon, how, some)
            total += errors / typical[n]
            count += number
        if count:
            at = int(np.argmin(total))
            found.append((Smoothing(log, *(float(way[at]) for way in ways)), float(total[at]) / count))
    if len(found) == 2 and found[1][1] < SURE * found[0][1]:
        return found[1]
    return found[0] if found else None


def _origins(rows: int, after: int, horizon: int, most: int) -> set[int]:
    first, last = min(after, (rows - horizon) // 2), rows - horizon - 1
    return set(np.linspace(first, last, min(most, max(0, last - first + 1))).astype(int).tolist())


def _errors(values: Floats, seasons: tuple[int, ...], horizon: int, how: Any, origins: set[int]) -> tuple[Floats, int]:
    """Return the sum of absolute errors from some origins, for each set of parameters, and the number of errors."""
    steps = np.arange(1, horizon + 1)
    total, count = np.zeros(len(how.level)), 0
    for row, state in states(scaled(values, how.log), seasons, how):
        if row not in origins:
            continue
        y = values[row + steps]
        seen = ~np.isnan(y)
        season = np.zeros((1, horizon))
        for phase in state.phases:
            season = season + np.stack([np.broadcast_to(phase[(row + k) % len(phase)], len(total)) for k in steps], -1)
        level, drift, slope, rest = (np.broadcast_to(each, len(total))[:, None] for each in state[1:5])
        said = ahead(SmoothingState(None, level, drift, slope, rest, []), season, how, steps)
        with np.errstate(over="ignore"):  # a diverging forecast has an infinite error
            total += np.nan_to_num(np.abs(said - y)[:, seen], nan=np.inf).sum(-1)
        count += int(seen.sum())
    return total, count
