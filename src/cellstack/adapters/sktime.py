"""The estimators as sktime's: panels in each of its types, in its pipelines and benchmarks.

Ref: sktime, "Implementing your own estimator", https://www.sktime.net/en/stable/developer_guide/add_estimators.html
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sktime.classification.base import BaseClassifier
from sktime.regression.base import BaseRegressor

from cellstack import sklearn

__all__ = ["SequenceClassifier", "SequenceRegressor"]

TAGS = {
    "X_inner_mtype": "df-list",
    "capability:multivariate": True,
    "capability:unequal_length": True,
    "capability:missing_values": True,
    "capability:categorical_in_X": False,
    "python_dependencies": "torch",
}
SMALL: tuple[dict[str, Any], ...] = (
    {"units": 4, "epochs": 2, "random_state": 0},
    {"units": 3, "epochs": 2, "cell": "gru", "random_state": 0},
)


class SequenceClassifier(BaseClassifier):
    """`cellstack.sklearn.SequenceClassifier` as a classifier of sktime's.

    Args:
        estimator: what is fitted, as a copy: `estimator_`; one with its defaults where None.

    Example:
        >>> import numpy as np
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.sktime import SequenceClassifier
        >>> X = np.random.default_rng(0).normal(size=(20, 2, 9))  # [n, C, T]
        >>> model = SequenceClassifier(sklearn.SequenceClassifier(units=4, epochs=2)).fit(X, np.array(["a", "b"] * 10))
        >>> model.predict(X).shape
        (20,)
    """

    _tags: ClassVar = {**TAGS, "capability:predict_proba": True}

    def __init__(self, estimator: sklearn.SequenceClassifier | None = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[Any], y: NDArray) -> Any:
        self.estimator_ = _fitted(self.estimator or sklearn.SequenceClassifier(), X, y)
        return self

    def _predict(self, X: list[Any]) -> NDArray:
        return self.estimator_.predict(_arrays(X))

    def _predict_proba(self, X: list[Any]) -> NDArray[np.float64]:
        return self.estimator_.predict_proba(_arrays(X))

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> Any:
        """Return parameters for sktime's own checks.

        Args:
            parameter_set: which; there is one.
        """
        return [{"estimator": sklearn.SequenceClassifier(**small)} for small in SMALL]


class SequenceRegressor(BaseRegressor):
    """`cellstack.sklearn.SequenceRegressor` as a regressor of sktime's.

    Args:
        estimator: what is fitted, as a copy: `estimator_`; one with its defaults where None.

    Example:
        >>> import numpy as np
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.sktime import SequenceRegressor
        >>> X = np.random.default_rng(0).normal(size=(20, 2, 9))  # [n, C, T]
        >>> model = SequenceRegressor(sklearn.SequenceRegressor(units=4, epochs=2)).fit(X, X[:, 0, -1])
        >>> model.predict(X).shape
        (20,)
    """

    _tags = TAGS

    def __init__(self, estimator: sklearn.SequenceRegressor | None = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[Any], y: NDArray) -> Any:
        self.estimator_ = _fitted(self.estimator or sklearn.SequenceRegressor(), X, y)
        return self

    def _predict(self, X: list[Any]) -> NDArray[np.float64]:
        return self.estimator_.predict(_arrays(X))

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> Any:
        """Return parameters for sktime's own checks.

        Args:
            parameter_set: which; there is one.
        """
        return [{"estimator": sklearn.SequenceRegressor(**small)} for small in SMALL]


def _fitted(estimator: Any, X: list[Any], y: NDArray) -> Any:
    copy: Any = clone(estimator)
    return copy.fit(_arrays(X), y)


def _arrays(X: list[Any]) -> list[NDArray]:
    """Return sktime's frames, a row a step, as `[T, C]`."""
    return [frame.to_numpy() for frame in X]
