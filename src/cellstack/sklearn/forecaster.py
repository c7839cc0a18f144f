"""`SequenceForecaster`: the forecasts of tables of `cellstack train`, as an estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from cellstack import train
from cellstack.sklearn.parameters import FORECASTER, ForecasterParameters, described
from cellstack.sklearn.sequences import seed_of
from cellstack.train.checks import UsageError, unmasked
from cellstack.train.forecasting import predict
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.rules import seasonal
from cellstack.train.options import applying
from cellstack.train.tables.table import READING, Table, read_table

Floats = NDArray[np.float64]


@described(FORECASTER)
class SequenceForecaster(ForecasterParameters):
    """Stacked recurrent layers that forecast one or more series, with quantiles.

    X is a table with one row per time step: a pandas or polars frame, the name of a CSV or Parquet file, or numbers
    `[n]` or `[n, K]`, whose columns are then `"0"`, `"1"` and so on; NaN and masked values are missing. Rows are steps
    of a series, not independent samples, so use `sklearn.model_selection.TimeSeriesSplit`, with test parts that contain
    the steps that a forecast starts from and the forecast steps.

    Attributes:
        network_: the fitted `cellstack.Network`; once saved, `cellstack run` can use it.
        recipe_: the inputs and targets of the forecast, a `Recipe`.
        understood_: how the table was interpreted, as sentences.
        history_: one dict per epoch of each member.
        n_iter_: total number of epochs of all members.

    Raises:
        ValueError: from `fit` and `predict`, for unusable tables and parameters; the message says which.
        KeyboardInterrupt: Ctrl-C in `fit`. The estimator is fitted up to that point.

    Example:
        >>> import numpy as np
        >>> from cellstack.sklearn import SequenceForecaster
        >>> series = np.sin(np.arange(120) * np.pi / 6) + 5  # [n]
        >>> model = SequenceForecaster(horizon=4, seasons=(12,), units=4, members=1, epochs=2, random_state=0)
        >>> model.fit(series).predict().shape, model.predict_quantiles(series[:60]).shape
        ((4,), (4, 3))
    """

    def fit(self, X: Any, y: None = None) -> SequenceForecaster:
        """Train on a table.

        Args:
            X: the table.
            y: ignored: the targets are columns of X.

        Returns:
            This estimator.
        """
        table = self._table(X)
        given = {
            name: getattr(self, name) for name in FORECASTER if name in applying("forecasts") and name not in READING
        }
        given |= {"seed": seed_of(self.random_state), "progress": self.verbose}
        trained = train.fit_forecast(table, **given, test=0.0)
        result = trained.result
        self.network_, self.recipe_, self.history_ = result.network, trained.recipe, result.history
        self.understood_, self.n_iter_ = trained.understood, len(result.history)
        self._last = table
        if result.fit.interrupted:  # fitted up to this point, but the caller has to stop
            raise KeyboardInterrupt
        return self

    def forecasts(self, X: Any = None) -> Forecasts:
        """Return forecasts with the names of the series, the times of the steps and all quantiles.

        Args:
            X: see `predict`.

        Returns:
            One row per series, see `train.forecasting.forecasts.Forecasts`.
        """
        return self._forecasts(self._seen(X))

    def predict(self, X: Any = None) -> Floats:
        """Forecast the steps after the last observed target of each series.

        Args:
            X: a table with the same columns as in `fit`, of the same or other series; None: the table of `fit`.

        Returns:
            The median, `[horizon]`; for S named series `[S, horizon]`, in the order of their first rows; with several
            targets a last axis for them.
        """
        forecasts = self.forecasts(X)
        median = forecasts.median
        return _squeezed(forecasts, median[..., 0] if median.shape[-1] == 1 else median)

    def predict_quantiles(self, X: Any = None, quantiles: Sequence[float] | None = None) -> Floats:
        """Forecast quantiles.

        Args:
            X: see `predict`.
            quantiles: None: those of `recipe_.quantiles`. Others, from the lowest to the highest of these, are
                interpolated, see `train.forecasting.forecasts.Forecasts.at`.

        Returns:
            As `predict`, with an additional last axis for the quantiles, in the given order.
        """
        forecasts = self.forecasts(X)
        values = forecasts.values if quantiles is None else forecasts.at(quantiles)
        return _squeezed(forecasts, values[:, :, 0] if values.shape[2] == 1 else values)

    def score(self, X: Any, y: None = None) -> float:
        """Return the skill of the forecast of X's last `horizon` rows, compared with the naive forecast.

        Args:
            X: a table whose series end with the true values; the rows before them are the input of the forecast.
            y: ignored.

        Returns:
            `1 - absolute error / absolute error of repeating the latest value`: 1 is a perfect forecast, 0 is no better
            than the latest value. The baseline doesn't depend on the estimator's parameters, so searches can use the
            score.
        """
        check_is_fitted(self)
        table, recipe = self._table(X), self.recipe_
        origins = predict.last_origins(table, recipe) - recipe.horizon
        forecasts = self._forecasts(table, origins)
        rows = origins[:, None] + np.arange(1, recipe.horizon + 1)
        actual = np.stack([table.columns[name][rows] for name in recipe.targets], axis=-1)
        naive = np.full(actual.shape, np.nan)
        for series, origin in enumerate(origins):
            here = table.rows(series)
            for n, name in enumerate(recipe.targets):
                naive[series, :, n] = seasonal(table.columns[name][here], origin[None] - here.start, recipe.horizon)[0]
        ours, latest = (np.nansum(np.abs(said - actual)) for said in (forecasts.median, naive))
        return float(1 - ours / max(latest, np.finfo(float).tiny))

    def _forecasts(self, table: Table, origins: NDArray[np.int64] | None = None) -> Forecasts:
        return predict.forecast(self.network_, table, type(self).__name__, origins, self.threads)

    def _seen(self, X: Any) -> Table:
        check_is_fitted(self)
        return self._last if X is None else self._table(X)

    def _table(self, X: Any) -> Table:
        """Read X as a table of series at regular steps."""
        if isinstance(X, (np.ndarray, list, tuple)):
            import pandas as pd

            rows = [unmasked(row) for row in X] if isinstance(X, (list, tuple)) else unmasked(X)
            try:
                X = np.asarray(rows, np.float64)
            except OverflowError:
                raise UsageError("expected numbers that float32 can hold, got an integer beyond float64") from None
            if X.ndim not in (1, 2):
                raise UsageError(f"expected a frame, a file, or numbers [n] or [n, K], got {X.ndim} axes")
            X = X.reshape(len(X), -1)
            X = pd.DataFrame(X, columns=[str(n) for n in range(X.shape[1])])
        return read_table(X, **{name: getattr(self, name) for name in READING})


def _squeezed(forecasts: Forecasts, values: Floats) -> Floats:
    """Return `[S, …]`; for a single series without a name, its values without the first axis."""
    return values[0] if forecasts.ids == [""] else values
