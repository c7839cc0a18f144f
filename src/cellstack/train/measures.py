"""Error measures of predicted numbers. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def errors(
    predicted: NDArray[np.float64], actual: NDArray[np.float64], scaled_by: float | None = None
) -> dict[str, float]:
    """Return `mae`, the mean absolute error, and `rmse`, the root mean squared error, of the observed values.

    Both are NaN without observed values.

    Args:
        predicted, actual: arrays of the same shape; `actual` is NaN where missing.
        scaled_by: if given, also return `mase`, the mean absolute error divided by it, see `seasonal_error`.
    """
    difference = (predicted - actual)[~np.isnan(actual)]
    mae, rmse = (
        (float(np.abs(difference).mean()), float(np.sqrt(np.square(difference).mean())))
        if difference.size
        else (float("nan"),) * 2
    )
    return {"mae": mae, "rmse": rmse} | ({} if scaled_by is None else {"mase": mae / (scaled_by or np.nan)})


def seasonal_error(values: NDArray[np.float64], season: int) -> float:
    """Return the mean absolute change over a season, the scale of MASE; NaN if no observed values are a season apart.

    Args:
        values: of the training part, `[N]`.
        season: its length, in rows.

    Ref: Hyndman and Koehler, Another look at measures of forecast accuracy, International Journal of Forecasting 22
    (2006), 679-688, section 3.
    """
    change = np.abs(values[season:] - values[:-season])
    change = change[~np.isnan(change)]
    return float(change.mean()) if change.size else np.nan


def pinball(quantiles: NDArray[np.float64], actual: NDArray[np.float64], levels: Sequence[float]) -> float:
    """Return the mean quantile loss over all observed values and all levels; NaN without observed values.

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
    """Return the share of the observed values between `low` and `high`; NaN without observed values."""
    observed = ~np.isnan(actual)
    return float(((low <= actual) & (actual <= high))[observed].mean()) if observed.any() else np.nan
