"""The estimators as aeon's: collections `[n, C, T]` or lists of `[C, T]`, in its pipelines and benchmarks.

Ref: aeon, "Developer guide", https://www.aeon-toolkit.org/en/stable/developer_guide.html
"""

from __future__ import annotations

from typing import Any

import numpy as np
from aeon.classification import BaseClassifier
from aeon.regression import BaseRegressor
from numpy.typing import NDArray
from sklearn.base import clone

from cellstack import sklearn

__all__ = ["SequenceClassifier", "SequenceRegressor"]

TAGS = {
    "capability:multivariate": True,
    "capability:unequal_length": True,
    "capability:missing_values": True,
    "algorithm_type": "deeplearning",
    "X_inner_type": "np-list",
    "python_dependencies": "torch",
}
SMALL: dict[str, Any] = {"units": 4, "epochs": 2, "random_state": 0}


class SequenceClassifier(BaseClassifier):
    """`cellstack.sklearn.SequenceClassifier` as a classifier of aeon's.

    Args:
        estimator: what is fitted, as a copy: `estimator_`; one with its defaults where None.
    """

    _tags = TAGS

    def __init__(self, estimator: sklearn.SequenceClassifier | None = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[NDArray], y: NDArray) -> None:
        self.estimator_ = _fitted(self.estimator or sklearn.SequenceClassifier(), X, y)

    def _predict(self, X: list[NDArray]) -> NDArray:
        return self.estimator_.predict(_turned(X))

    def _predict_proba(self, X: list[NDArray]) -> NDArray[np.float64]:
        return self.estimator_.predict_proba(_turned(X))

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        return {"estimator": sklearn.SequenceClassifier(**SMALL)}


class SequenceRegressor(BaseRegressor):
    """`cellstack.sklearn.SequenceRegressor` as a regressor of aeon's.

    Args:
        estimator: what is fitted, as a copy: `estimator_`; one with its defaults where None.
    """

    _tags = TAGS

    def __init__(self, estimator: sklearn.SequenceRegressor | None = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[NDArray], y: NDArray) -> None:
        self.estimator_ = _fitted(self.estimator or sklearn.SequenceRegressor(), X, y)

    def _predict(self, X: list[NDArray]) -> NDArray[np.float64]:
        return self.estimator_.predict(_turned(X))

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        return {"estimator": sklearn.SequenceRegressor(**SMALL)}


def _fitted(estimator: Any, X: list[NDArray], y: NDArray) -> Any:
    copy: Any = clone(estimator)
    return copy.fit(_turned(X), y)


def _turned(X: list[NDArray]) -> list[NDArray]:
    """Return aeon's `[C, T]` as `[T, C]`."""
    return [np.asarray(one).T for one in X]
