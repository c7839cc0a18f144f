"""The measures of numbers that were predicted, beside what came. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def errors(
    predicted: NDArray[np.float64], actual: NDArray[np.float64], scaled_by: float | None = None
) -> dict[str, float]:
    """Return `mae`, the mean absolute error, and `rmse`, the root of the mean squared one; NaN of nothing.

    What wasn't observed isn't measured.

    Args:
        predicted, actual: of one shape; the latter is NaN where missing.
        scaled_by: what `mase`, then there too, is the mean absolute error divided by, see `seasonal_error`.
    """
    difference = (predicted - actual)[~np.isnan(actual)]
    mae, rmse = (
        (float(np.abs(difference).mean()), float(np.sqrt(np.square(difference).mean())))
        if difference.size
        else (float("nan"),) * 2
    )
    return {"mae": mae, "rmse": rmse} | ({} if scaled_by is None else {"mase": mae / (scaled_by or np.nan)})


def seasonal_error(values: NDArray[np.float64], season: int) -> float:
    """Return the mean absolute change over a season, by which MASE divides errors; NaN where nothing is a season apart.

    Args:
        values: of the training part, `[N]`.
        season: rows.

    Ref: Hyndman and Koehler, Another look at measures of forecast accuracy, International Journal of Forecasting 22
    (2006), 679-688, section 3.
    """
    change = np.abs(values[season:] - values[:-season])
    change = change[~np.isnan(change)]
    return float(change.mean()) if change.size else np.nan


def pinball(quantiles: NDArray[np.float64], actual: NDArray[np.float64], levels: Sequence[float]) -> float:
    """Return the mean quantile loss over everything observed and all levels; NaN of nothing.

        loss = max(q·(y - ŷ), (q - 1)·(y - ŷ))

    Args:
        quantiles: `[..., Q]`, one for each level.
        actual: `[...]`, NaN where missing.
        levels: Q numbers between 0 and 1.

    Ref: Koenker and Bassett, Regression quantiles, Econometrica 46 (1978), 33-50.
    """
    over = actual[..., None] - quantiles
    loss = np.maximum(np.asarray(levels) * over, (np.asarray(levels) - 1) * over)[~np.isnan(actual)]
    return float(loss.mean()) if loss.size else np.nan


def coverage(low: NDArray[np.float64], high: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """Return the share of what was observed that lies from `low` to `high`; NaN of nothing."""
    observed = ~np.isnan(actual)
    return float(((low <= actual) & (actual <= high))[observed].mean()) if observed.any() else np.nan
