"""`SequenceForecaster`: forecasts of tables as `cellstack train` makes them, as an estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from cellstack.sklearn.sequences import seed_of
from cellstack.train.checks import UsageError, unmasked
from cellstack.train.forecast import predict
from cellstack.train.forecast.rules import seasonal
from cellstack.train.tables.table import Table, read_table

Floats = NDArray[np.float64]


@dataclass(repr=False, eq=False, kw_only=True)
class SequenceForecaster(BaseEstimator):
    """Stacked recurrent layers that forecast what comes next in one series or many, with quantiles.

    X is a table, a row a step of time: a pandas or polars frame, the name of a CSV or Parquet file, or numbers `[n]` or
    `[n, K]`, whose columns are then `"0"`, `"1"` and so on; NaN and masked values are missing. Rows aren't samples here
    but steps of one thing, so that `sklearn.model_selection.TimeSeriesSplit` is the splitter to take, with test parts
    that hold the steps that a forecast starts from and those that it is of.

    Args:
        target: column to forecast, or several; the only column of numbers where None.
        horizon: steps to forecast; one season where None.
        window: steps that the network sees; two seasons, from 16 to 168, where None.
        seasons: steps after which the series repeats itself; found in the series where None, () for none.
        inputs: further columns that are known up to now; every one that isn't named elsewhere where None.
        known: columns that are known in advance: rows after the last observed target hold them.
        holidays: a country whose holidays the network sees, `"US"` or `"DE-BY"`; "" for none.
        scale: unit of the values, `"spread"` or `"level"`; the latter where None and the logarithm is smoothed.
        quantiles: of the forecasts' distribution; 0.5, the forecast, is added.
        date, id, zone, day_first, freq: how the table is read, see `train.table.read_table`; `id` is its `ids`.
        units, cell, dropout, members: how the networks are built, see `train.forecast.training.Build`.
        epochs, batch, lr, clip, patience: how each is fitted, see `train.Settings`.
        validation: share of each series' rows, its last, by which epochs and more are chosen; where None, 0.15, or 0
            where the series are too short for that: then all rows are trained on, in all epochs.
        threads, device, verbose, random_state: as those of `SequenceClassifier`.

    What is None of `units`, `dropout`, `members`, `epochs`, `batch`, `lr` and `patience` is as `cellstack train` has it
    for as many windows as there are.

    Attributes:
        network_: the fitted `cellstack.Network`; `cellstack run` takes it once it is saved.
        recipe_: what is forecast from what, a `train.Recipe`.
        understood_: how the table was understood, a sentence each.
        history_: one dict an epoch of each member.
        n_iter_: epochs of all members together.

    Raises:
        ValueError: from `fit` and `predict`, for tables and parameters that can't be used; the message says which.
        KeyboardInterrupt: Ctrl-C in `fit`. The estimator is fitted as far as it came.

    Example:
        >>> import numpy as np
        >>> from cellstack.sklearn import SequenceForecaster
        >>> series = np.sin(np.arange(120) * np.pi / 6) + 5  # [n]
        >>> model = SequenceForecaster(horizon=4, seasons=(12,), units=4, members=1, epochs=2, random_state=0)
        >>> model.fit(series).predict().shape, model.predict_quantiles(series[:60]).shape
        ((4,), (4, 3))
    """

    target: str | Sequence[str] | None = None
    horizon: int | None = None
    window: int | None = None
    seasons: Sequence[int] | None = None
    inputs: Sequence[str] | None = None
    known: Sequence[str] = ()
    holidays: str = ""
    scale: str | None = None
    quantiles: Sequence[float] = (0.1, 0.5, 0.9)
    date: str | None = None
    id: str | Sequence[str] = ()
    zone: str | None = None
    day_first: bool | None = None
    freq: str | None = None
    units: int | Sequence[int] | None = None
    cell: str = "lstm"
    dropout: float | None = None
    members: int | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    clip: float = 1.0
    patience: int | None = None
    validation: float | None = None
    threads: int | None = 1
    device: str = "auto"
    verbose: bool = False
    random_state: int | np.random.RandomState | None = None

    def fit(self, X: Any, y: None = None) -> SequenceForecaster:
        """Train on a table.

        Args:
            X: the table.
            y: not used: the targets are columns of X.

        Returns:
            This estimator.
        """
        from cellstack.train.forecast.entry import fit_forecast  # torch

        table = self._table(X)
        same = ("units", "cell", "dropout", "members", "epochs", "batch", "lr", "clip", "patience", "validation")
        trained = fit_forecast(
            table,
            self.target,
            self.horizon,
            **{name: getattr(self, name) for name in (*same, "threads", "device", "window", "scale")},
            test=0.0,
            baselines=False,
            seed=seed_of(self.random_state),
            progress=self.verbose,
            seasons=None if self.seasons is None else tuple(self.seasons),
            inputs=None if self.inputs is None else tuple(self.inputs),
            known=tuple(self.known),
            country=self.holidays,
            quantiles=tuple(self.quantiles),
        )
        result = trained.result
        self.network_, self.recipe_, self.history_ = result.network, trained.recipe, result.history
        self.understood_, self.n_iter_ = trained.understood, len(result.history)
        self._last = table
        if result.fit.interrupted:  # fitted as far as it came, and what called this is to stop
            raise KeyboardInterrupt
        return self

    def forecasts(self, X: Any = None) -> predict.Forecasts:
        """Forecast with the names of the series, the steps' times and all quantiles.

        Args:
            X: see `predict`.

        Returns:
            One row a series, see `train.forecast.predict.Forecasts`.
        """
        return self._forecasts(self._seen(X))

    def predict(self, X: Any = None) -> Floats:
        """Forecast what comes after the last observed target of each series.

        Args:
            X: a table with the columns of that of the fit, of the same series or of others; that of the fit where None.

        Returns:
            `[horizon]`, the median: `[S, horizon]` of S named series, in the order in which they appear, and with a
            further axis for the targets where there are several.
        """
        forecasts = self.forecasts(X)
        median = forecasts.median
        return _squeezed(forecasts, median[..., 0] if median.shape[-1] == 1 else median)

    def predict_quantiles(self, X: Any = None, quantiles: Sequence[float] | None = None) -> Floats:
        """Forecast quantiles.

        Args:
            X: see `predict`.
            quantiles: those of `recipe_.quantiles` where None; others, from the lowest of these to the highest, lie
                between the two on either side, see `train.forecast.predict.Forecasts.at`.

        Returns:
            As `predict`, with a last axis for the quantiles, in the order in which they were asked for.
        """
        forecasts = self.forecasts(X)
        values = forecasts.values if quantiles is None else forecasts.at(quantiles)
        return _squeezed(forecasts, values[:, :, 0] if values.shape[2] == 1 else values)

    def score(self, X: Any, y: None = None) -> float:
        """Return how much less than the naive forecast's the absolute error is, over X's last `horizon` rows.

        Args:
            X: a table whose series end with the truth; what lies before it is forecast from.
            y: not used.

        Returns:
            `1 - error / error of the latest value`: 1 is without error, 0 no better than the latest value. It doesn't
            depend on how the estimator was told to forecast, so that searches can go by it.
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

    def _forecasts(self, table: Table, origins: NDArray[np.int64] | None = None) -> predict.Forecasts:
        return predict.forecast(self.network_, table, type(self).__name__, origins, self.threads)

    def _seen(self, X: Any) -> Table:
        check_is_fitted(self)
        return self._last if X is None else self._table(X)

    def _table(self, X: Any) -> Table:
        """Return what X holds, as series on even grids."""
        if isinstance(X, (np.ndarray, list, tuple)):
            import pandas as pd

            X = np.asarray([unmasked(row) for row in X] if isinstance(X, (list, tuple)) else unmasked(X), np.float64)
            if X.ndim not in (1, 2):
                raise UsageError(f"expected a frame, a file, or numbers [n] or [n, K], got {X.ndim} axes")
            X = X.reshape(len(X), -1)
            X = pd.DataFrame(X, columns=[str(n) for n in range(X.shape[1])])
        return read_table(X, date=self.date, day_first=self.day_first, zone=self.zone, ids=self.id, freq=self.freq)


def _squeezed(forecasts: predict.Forecasts, values: Floats) -> Floats:
    """Return `[S, …]`, or the values alone of a table's only series, where that has no name."""
    return values[0] if forecasts.ids == [""] else values
