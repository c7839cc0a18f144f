"""The estimators in aeon's API: for collections `[n, C, T]`, lists of `[C, T]` and series.

Ref: aeon, "Developer guide", https://www.aeon-toolkit.org/en/stable/developer_guide.html
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from aeon.classification import BaseClassifier
from aeon.forecasting.base import (
    BaseForecaster,
    DirectForecastingMixin,
    IterativeForecastingMixin,
    SeriesToSeriesForecastingMixin,
)
from aeon.regression import BaseRegressor
from numpy.typing import NDArray
from sklearn.base import clone

from cellstack import sklearn

__all__ = ["SequenceClassifier", "SequenceForecaster", "SequenceRegressor"]

TAGS = {
    "capability:multivariate": True,
    "capability:unequal_length": True,
    "capability:missing_values": True,
    "algorithm_type": "deeplearning",
    "X_inner_type": "np-list",
    "python_dependencies": "torch",
}
SMALL: dict[str, Any] = {"units": 4, "epochs": 2, "random_state": 0}


class _OfSequences:
    """What the classifier and the regressor share; `_usual` is the estimator's class."""

    _tags = TAGS
    _usual: ClassVar[Any]

    def __init__(self, estimator: Any = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[NDArray], y: NDArray) -> None:
        copy: Any = clone(self.estimator or self._usual())
        self.estimator_ = copy.fit(_turned(X), y)

    def _predict(self, X: list[NDArray]) -> NDArray:
        return self.estimator_.predict(_turned(X))

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        return {"estimator": cls._usual(**SMALL)}


class SequenceClassifier(_OfSequences, BaseClassifier):
    """`cellstack.sklearn.SequenceClassifier` as an aeon classifier.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters.
    """

    _usual = sklearn.SequenceClassifier

    def _predict_proba(self, X: list[NDArray]) -> NDArray[np.float64]:
        return self.estimator_.predict_proba(_turned(X))


class SequenceRegressor(_OfSequences, BaseRegressor):
    """`cellstack.sklearn.SequenceRegressor` as an aeon regressor.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters.
    """

    _usual = sklearn.SequenceRegressor


class SequenceForecaster(
    DirectForecastingMixin, IterativeForecastingMixin, SeriesToSeriesForecastingMixin, BaseForecaster
):
    """`cellstack.sklearn.SequenceForecaster` as an aeon forecaster, for one series of numbers without dates.

    As in aeon, `predict` returns one number, `horizon` steps after the end of the series. `series_to_series_forecast`
    fits one network for all steps of a horizon; `direct_forecast` fits one network per step, and `iterative_forecast`
    appends each forecast to the series and continues from there.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters. Its
            `horizon` is replaced by aeon's.
        horizon: steps from the series' last value to the forecast one.

    Raises:
        ValueError: from `predict`, for a series that ends with a missing value; and the errors of the estimator.

    Example:
        >>> import numpy as np
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.aeon import SequenceForecaster
        >>> y = np.sin(np.arange(96) * np.pi / 6) + 5
        >>> model = SequenceForecaster(sklearn.SequenceForecaster(units=4, members=1, epochs=2))
        >>> isinstance(model.forecast(y), float), model.series_to_series_forecast(y, 3).shape
        (True, (3,))
    """

    # No exogenous values: aeon passes to `predict` only those of the forecast step, and the window needs earlier ones.
    _tags: ClassVar = {
        "capability:horizon": True,
        "capability:missing_values": True,
        "algorithm_type": "deeplearning",
        "python_dependencies": "torch",
    }

    def __init__(self, estimator: sklearn.SequenceForecaster | None = None, horizon: int = 1):
        self.estimator = estimator
        super().__init__(horizon=horizon, axis=1)

    def _fit(self, y: NDArray, exog: None) -> Any:
        estimator: Any = clone(self.estimator or sklearn.SequenceForecaster())
        self.estimator_ = estimator.set_params(horizon=self.horizon).fit(y[0])
        return self

    def _predict(self, y: NDArray, exog: None) -> float:  # type: ignore[override]
        if np.isnan(y[0, -1]):  # the estimator's horizon starts at the last observed value
            raise ValueError("expected y to end with a value, got a missing one: remove it and use a longer horizon")
        return float(self.estimator_.predict(y[0])[-1])

    def _series_to_series_forecast(self, y: Any, prediction_horizon: int, exog: NDArray | None) -> Any:
        model = SequenceForecaster(self.estimator, prediction_horizon)
        model.forecast(y, exog)
        return model.estimator_.predict()

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        small = {"members": 1, "seasons": (), "validation": 0.0}
        return {"estimator": sklearn.SequenceForecaster(**small, **SMALL)}


def _turned(X: list[NDArray]) -> list[NDArray]:
    """Return aeon's `[C, T]` as `[T, C]`."""
    return [np.asarray(one).T for one in X]
