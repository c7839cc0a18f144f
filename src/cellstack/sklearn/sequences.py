"""Estimators that predict a class or numbers per sequence: trained with `train.fit`, run with the trained Network."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from cellstack import train
from cellstack.sklearn.parameters import (
    CLASSIFIER,
    SEQUENCE,
    ClassifierParameters,
    SequenceParameters,
    described,
)
from cellstack.train import Sequences, predict
from cellstack.train.checks import refuse_masked, unmasked
from cellstack.train.data.targets import in_float32
from cellstack.train.options import FEWEST, applying

VALIDATION = 0.15  # share of the validation sequences


class _SequenceEstimator(SequenceParameters):
    """Base class: the checks of X, and the fit."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags

    def _check_sequences(self, X: Any, *, reset: bool) -> list[NDArray[np.float32]]:
        """Return X as one `[T, C]` array per sequence, after checking its width against that of `fit`.

        Args:
            X: the X of `fit` and `predict`.
            reset: True in `fit`: store the width.
        """
        X = unmasked(X)
        ragged = _ragged(X)
        if ragged is None and (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) != 3:
            table: Any = validate_data(self, X, reset=reset, dtype=np.float32, ensure_all_finite="allow-nan")
            self._check_form("table", reset)
            return list(table[:, :, None])
        checks = {"dtype": np.float32, "ensure_all_finite": "allow-nan", "estimator": self}
        if ragged is None:
            sequences = list(check_array(X, allow_nd=True, ensure_min_features=0, **checks))
        else:
            sequences = [check_array(_column(unmasked(one)), **checks) for one in ragged]
        widths = {one.shape[1] for one in sequences}
        if len(widths) != 1 or not all(len(one) for one in sequences):
            raise ValueError(
                f"expected sequences [T, C] with at least one step and the same number of channels C, got "
                f"{min(len(one) for one in sequences)} steps in the shortest, channels {sorted(widths)}"
            )
        self._check_form("sequences", reset)
        channels = widths.pop()
        if reset:
            self.n_features_in_ = channels
            vars(self).pop("feature_names_in_", None)  # of an earlier fit on a table with column names
        elif channels != self.n_features_in_:
            raise ValueError(
                f"X has {channels} features, but {type(self).__name__} is expecting {self.n_features_in_} features as "
                "input: the last axis is the channel axis"
            )
        return sequences

    def _check_form(self, form: str, reset: bool) -> None:
        if reset:
            self._form = form
        elif form != self._form:
            said = {"table": "a table [n, T]", "sequences": "sequences, [n, T, C] or a list"}
            raise ValueError(f"expected X as in fit, {said[self._form]}, got {said[form]}")

    def _fit(self, sequences: list[NDArray[np.float32]], y: NDArray, labels: tuple[Any, ...], weight: NDArray) -> None:
        """Train; set `network_`, `history_` and `n_iter_`.

        Args:
            sequences: `[T, C]` each.
            y: positions in `labels`, `[n]` int64; without labels, targets `[n, O]` float32.
            labels: the classes.
            weight: weight of each sequence, `[n]`.
        """
        validation = self.validation
        if validation is None:
            validation = VALIDATION if VALIDATION * len(sequences) >= FEWEST else 0.0
        given = {name: getattr(self, name) for name in SEQUENCE if name in applying("sequences")} | {
            "validation": validation,
            "seed": seed_of(self.random_state),
            "progress": self.verbose,
            "baseline": False,
        }
        known = Sequences(sequences, y, labels, "X", weight=weight.astype(np.float32))
        result = train.fit(known, **given)
        self.network_, self.history_, self.n_iter_ = result.network, result.history, len(result.history)
        if result.fit.interrupted:  # fitted up to this point, but the caller has to stop
            raise KeyboardInterrupt

    def _answers(self, X: Any) -> NDArray[np.float64]:
        """Return the network's outputs, `[n, O]`."""
        check_is_fitted(self)
        sequences = Sequences(self._check_sequences(X, reset=False), None, (), "X")
        return np.asarray(predict.sequences(self.network_, sequences, type(self).__name__, self.threads).outputs)


def seed_of(random_state: Any) -> int:
    """Return the seed of a `random_state`: itself if it is an integer, else a draw from it."""
    if isinstance(random_state, Integral):
        return int(random_state)
    return check_random_state(random_state).randint(2**31)


def _ragged(X: Any) -> list[Any] | None:
    """Return X as a list of sequences if it is a list of arrays, lists of unequal length, or an object array."""
    if getattr(X, "ndim", None) == 1 and getattr(getattr(X, "dtype", None), "kind", "") == "O":
        X = list(X)
    if not isinstance(X, (list, tuple)) or not len(X):
        return None
    if all(hasattr(one, "__array__") and np.ndim(one) for one in X):
        return list(X)
    unequal = all(isinstance(one, (list, tuple)) for one in X) and len({len(one) for one in X}) > 1
    return list(X) if unequal else None


def _column(one: Any) -> Any:
    """Return a sequence `[T]` of one channel as `[T, 1]`, any other unchanged."""
    return np.asarray(one)[:, None] if np.ndim(one) == 1 else one


@described(CLASSIFIER)
class SequenceClassifier(ClassifierMixin, _SequenceEstimator, ClassifierParameters):
    """Stacked recurrent layers that classify sequences.

    X can be anything that scikit-learn's splitters, searches and pipelines can index:

    - `[n, T, C]`: n sequences of T steps of C channels;
    - a list of n arrays `[T, C]`, or `[T]` for one channel; T may differ;
    - `[n, T]`, an array or a data frame: n sequences of one channel, one column per step.

    NaN and masked values are missing; steps without any value are skipped. `n_features_in_` is the length of the last
    axis: predictions need the same number of channels, or, for a table, of columns.

    Attributes:
        classes_: the sorted classes, `[K]`.
        network_: the fitted `cellstack.Network`, from raw values to class probabilities. It needs no torch, nor does a
            pickled estimator.
        history_: one dict per epoch: `loss`, `validation_loss`, `accuracy` of the validation part, `lr`.
        n_iter_: number of epochs run.
        n_features_in_: length of X's last axis.

    Raises:
        ValueError: from `fit` and `predict`, for unusable parameters and data; the message says which.
        KeyboardInterrupt: Ctrl-C in `fit`. The estimator is fitted up to that point.

    Example:
        >>> import numpy as np
        >>> from cellstack.sklearn import SequenceClassifier
        >>> rng = np.random.default_rng(0)
        >>> X = [rng.normal(size=(length, 2)).cumsum(0) for length in rng.integers(8, 12, 40)]
        >>> y = ["up" if x[-1, 0] > 0 else "down" for x in X]
        >>> model = SequenceClassifier(units=8, epochs=10, random_state=0).fit(X, y)
        >>> model.predict(X[:2]).shape, model.predict_proba(X[:3]).shape
        ((2,), (3, 2))
    """

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> SequenceClassifier:
        """Train on sequences and their classes.

        Args:
            X: n sequences.
            y: their classes, `[n]`, of any sortable type.
            sample_weight: weight of each sequence in the loss, `[n]`.

        Returns:
            This estimator.
        """
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        y = validate_data(self, X="no_validation", y=y)
        sequences = self._check_sequences(X, reset=True)
        check_consistent_length(sequences, y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected at least two classes, got one class, {self.classes_[0]}")
        weight = _check_sample_weight(sample_weight, y, ensure_non_negative=True)
        weight = weight * compute_sample_weight(self.class_weight, y)
        labels = self.classes_.tolist()
        if {type(label) for label in labels} not in ({str}, {int}, {bool}):
            labels = list(map(str, labels))
        self._fit(sequences, codes.astype(np.int64), tuple(labels), weight)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class.

        Args:
            X: n sequences.

        Returns:
            `[n, K]`, in the order of `classes_`.
        """
        answers = self._answers(X)
        return answers / answers.sum(axis=1, keepdims=True)  # so that the float64 sum is 1, not only the float32 one

    def predict(self, X: Any) -> NDArray:
        """Return the most probable class.

        Args:
            X: n sequences.

        Returns:
            `[n]`, in the type of `classes_`.
        """
        chosen = self._answers(X).argmax(axis=1)
        return self.classes_[chosen]

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Return the accuracy, weighted by `sample_weight`, `[n]`."""
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)


@described(SEQUENCE)
class SequenceRegressor(RegressorMixin, _SequenceEstimator):
    """Stacked recurrent layers that predict one or more numbers per sequence, see `SequenceClassifier`.

    Attributes:
        network_: the fitted `cellstack.Network`, from raw values to numbers in the targets' units.
        history_: one dict per epoch: `loss`, `validation_loss`, `rmse` of the validation part, `lr`.
        n_iter_, n_features_in_: see `SequenceClassifier`.

    Raises:
        ValueError, KeyboardInterrupt: see `SequenceClassifier`.

    Example:
        >>> import numpy as np
        >>> from cellstack.sklearn import SequenceRegressor
        >>> X = np.random.default_rng(0).normal(size=(40, 10, 3))
        >>> SequenceRegressor(units=8, epochs=10, random_state=0).fit(X, X[:, -1]).predict(X[:2]).shape
        (2, 3)
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> SequenceRegressor:
        """Train on sequences and their targets.

        Args:
            X: n sequences, see `SequenceClassifier`.
            y: their targets, `[n]` or `[n, O]`.
            sample_weight: weight of each sequence in the loss, `[n]`.

        Returns:
            This estimator.
        """
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        y = validate_data(self, X="no_validation", y=y, multi_output=True, y_numeric=True)
        sequences = self._check_sequences(X, reset=True)
        check_consistent_length(sequences, y)
        weight = _check_sample_weight(sample_weight, y, ensure_non_negative=True)
        self._flat = y.ndim == 1
        self._fit(sequences, in_float32(y.reshape(len(y), -1).astype(np.float64)), (), weight)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the targets.

        Args:
            X: n sequences.

        Returns:
            `[n]` or `[n, O]`, like y in `fit`, in its units.
        """
        answers = self._answers(X)
        return answers[:, 0] if self._flat else answers

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Return the coefficient of determination R² of the predictions, weighted by `sample_weight`, `[n]`."""
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)
