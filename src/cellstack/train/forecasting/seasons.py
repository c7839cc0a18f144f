"""Detect the seasons of a series or of a panel in its values. Needs no torch.

A period is tested on the values minus their centred moving average over one period. That removes levels and random
walks: the remainder of either has no autocorrelation at that lag or beyond, because the filter spans one period. The
autocorrelation at the period must exceed Bartlett's bound, and its neighbours, because a slow wave has a similar
autocorrelation at all lags. A longer season is tested on the remainder after the shorter ones are removed.

Ref: Bartlett, On the theoretical specification and sampling properties of autocorrelated time-series, Supplement to
the Journal of the Royal Statistical Society 8 (1946), 27-41; Hyndman and Athanasopoulos, Forecasting: Principles and
Practice, 3rd edition (2021), section 3.4 (classical decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cellstack.train.forecasting.recipe import MOST_SEASONS

LEAST = 0.1  # least autocorrelation: a weaker season doesn't help, even if it is significant
BOUND = 2.33  # standard errors for a natural period: one false detection in a hundred series without a season
SEARCHED = 4.0  # standard errors for a period that the search has chosen among many
PEAKS = 8  # peaks of the spectrum that the search tries
ALIKE = 0.8  # share of the strongest: multiples of a period are about as strong, so the shortest such period is taken
LONGEST = 2048  # rows: the longest period to search for


def find(
    values: NDArray[np.float64], starts: NDArray[np.int64] | None = None, natural: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the significant seasons in rows, ascending, three at most.

    Args:
        values: `[N]`, NaN where missing; rows `starts[s]:starts[s + 1]` are series s, on an even grid.
        starts: `[S + 1]`; None for one series. The series of a panel are tested together.
        natural: periods that follow from the spacing of the rows, such as 24 and 168 hours. If none is significant, or
            none is given, as without dates, other periods are searched for.
    """
    bounds = [0, len(values)] if starts is None else [int(start) for start in starts]
    series = [values[a:b] for a, b in pairwise(bounds)]
    series = [one for one in series if (~np.isnan(one)).sum() >= 3]
    found: list[int] = []
    for period in sorted(natural):
        if len(found) < MOST_SEASONS and _certain(series, period, found, BOUND):
            found.append(period)
    if not found:
        while len(found) < MOST_SEASONS and (period := _searched(series, found)) is not None:
            found.append(period)
    return tuple(found)


def _certain(series: list[NDArray[np.float64]], period: int, shorter: Sequence[int], bound: float) -> bool:
    """Whether the autocorrelation at `period` exceeds its bound and its neighbours."""
    step = max([season for season in shorter if season < period], default=1)
    apart = step * max(1, round(period / 6 / step))
    if period < 2 or period - apart < 1:
        return False
    correlation, pairs = _autocorrelation(series, period, shorter, period + apart)
    if pairs[period] < max(1, period // 4):  # less than a quarter of a season to compare with another
        return False
    memory = np.minimum.accumulate(correlation[1:period] > 0)  # up to its first zero, after which a season returns
    error = np.sqrt((1 + 2 * np.square(correlation[1:period][memory]).sum()) / pairs[period])
    neighbours = max(correlation[period - apart], correlation[period + apart])
    return bool(correlation[period] > max(LEAST, bound * error, neighbours))


def _searched(series: list[NDArray[np.float64]], found: Sequence[int]) -> int | None:
    """Return the strongest significant period that is longer than those found; None if there is none.

    Candidates are peaks of the spectrum, refined by the autocorrelation.
    """
    longest = min(LONGEST, max((len(one) for one in series), default=0) // 3)
    if longest < 2:
        return None
    size = 1 << (2 * max(len(one) for one in series) - 1).bit_length()
    power = np.zeros(size // 2 + 1)
    for one in series:
        power += np.square(np.abs(np.fft.rfft(np.nan_to_num(_left(one, longest, found)), size)))
    frequencies = np.arange(len(power))
    power[(frequencies < size / longest) | (frequencies > size / 2)] = 0.0
    inner = power[1:-1]
    peaks = 1 + np.flatnonzero((inner > power[:-2]) & (inner >= power[2:]) & (inner > 0))
    peaks = peaks[np.argsort(-power[peaks])][:PEAKS]
    correlation, _ = _autocorrelation(series, longest, found, longest)
    best: dict[int, float] = {}
    for peak in peaks:
        low = max(2, 1 + 3 * max(found, default=0) // 2, int(0.9 * size / peak))
        high = min(longest, int(np.ceil(1.1 * size / peak)))
        if low <= high:
            period = low + int(np.argmax(_autocorrelation(series, high, found, high)[0][low:]))
            if _certain(series, period, found, SEARCHED):
                best[period] = float(correlation[period])
    strong = [period for period, height in best.items() if height >= ALIKE * max(best.values())]
    return min(strong, default=None)


def _autocorrelation(
    series: list[NDArray[np.float64]], period: int, shorter: Sequence[int], lags: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the autocorrelation of the detrended values without shorter seasons, and the pairs at each lag.

    Both are `[lags + 1]`, over the pairs of observed values of all series together; 0 without any.
    """
    product, pairs = np.zeros(lags + 1), np.zeros(lags + 1)
    for one in series:
        left = _left(one, period, shorter)
        size = 1 << (len(one) + lags).bit_length()
        product += _correlated(np.nan_to_num(left), size, lags)
        pairs += np.rint(_correlated((~np.isnan(left)).astype(np.float64), size, lags))
    return product / np.maximum(pairs, 1), pairs


def _correlated(x: NDArray[np.float64], size: int, lags: int) -> NDArray[np.float64]:
    return np.fft.irfft(np.square(np.abs(np.fft.rfft(x, size))), size)[: lags + 1]


def _left(values: NDArray[np.float64], period: int, shorter: Sequence[int]) -> NDArray[np.float64]:
    """Return the detrended values without shorter seasons, scaled to a spread of 1; all NaN if they are constant."""
    left = _without(_detrended(values, period), [season for season in shorter if season < period])
    spread = np.sqrt(np.nanmean(np.square(left)))
    return np.where(spread > 1e-9 * np.nanmax(np.abs(values)), left / (spread or 1.0), np.nan)


def _detrended(values: NDArray[np.float64], period: int) -> NDArray[np.float64]:
    """Return the values minus their centred moving average over one period, of the observed values."""
    seen = ~np.isnan(values)
    rows = np.arange(len(values))
    low, high = np.maximum(rows - period // 2, 0), np.minimum(rows + (period + 1) // 2, len(values))
    total = np.concatenate([[0.0], np.where(seen, values, 0.0).cumsum()])
    count = np.concatenate([[0], seen.cumsum()])
    return values - (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)


def _without(values: NDArray[np.float64], seasons: Sequence[int]) -> NDArray[np.float64]:
    """Return the values minus the mean of each phase of each season, shortest season first."""
    for season in sorted(seasons):
        phase = np.arange(len(values)) % season
        seen = ~np.isnan(values)
        total = np.bincount(phase[seen], values[seen], season)
        values = values - (total / np.maximum(np.bincount(phase[seen], minlength=season), 1))[phase]
    return values
