"""Estimators over sequences, a class or numbers each: fitted by `train.fit`, run by the Network that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from cellstack import train
from cellstack.network import Network
from cellstack.train import Labelled, Sequences, predict
from cellstack.train.checks import refuse_masked, unmasked
from cellstack.train.data.targets import in_float32
from cellstack.train.settings import check_number

FEWEST, HELD = 20, 0.15  # sequences that an epoch is chosen by at least, and the share of all that they are
EPOCHS, STEPS = 60, 750  # a fit without a word on epochs takes so many at least, and so many steps of the optimiser


@dataclass(repr=False, eq=False, kw_only=True)
class _SequenceEstimator(BaseEstimator):
    """What the estimators share: their parameters, what they take as X, and the fit.

    A dataclass, so that each class has all its parameters in the signature of its `__init__`, as scikit-learn asks.
    """

    units: int | Sequence[int] = (48, 48)
    cell: str = "lstm"
    bidirectional: bool = True
    dropout: float = 0.3
    pooling: str | None = None
    changes: bool = False
    every_step: bool = False
    epochs: int | None = None
    batch: int = 16
    lr: float = 5e-3
    clip: float = 1.0
    patience: int | None = None
    noise: float = 0.0
    offset: float = 0.0
    validation: float | None = HELD
    init: Network | str | None = None
    threads: int | None = 1
    device: str = "auto"
    verbose: bool = False
    random_state: int | np.random.RandomState | None = None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags

    def _check_sequences(self, X: Any, *, reset: bool) -> list[NDArray[np.float32]]:
        """Return X as one `[T, C]` array a sequence, and hold its width against that of the fit.

        Args:
            X: what `fit` and `predict` take.
            reset: this is the fit: remember the width.
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
                f"expected sequences [T, C] of at least one step and of one number of channels C, got "
                f"{min(len(one) for one in sequences)} steps in the shortest, channels {sorted(widths)}"
            )
        self._check_form("sequences", reset)
        channels = widths.pop()
        if reset:
            self.n_features_in_ = channels
            vars(self).pop("feature_names_in_", None)  # of a fit before, on a table with names
        elif channels != self.n_features_in_:
            raise ValueError(
                f"X has {channels} features, but {type(self).__name__} is expecting {self.n_features_in_} features as "
                "input: the last axis holds the channels"
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
            y: positions in `labels`, `[n]` int64; targets, `[n, O]` float32, where there are no labels.
            labels: the classes.
            weight: how much each sequence counts, `[n]`.
        """
        epochs = max(EPOCHS, -(-STEPS * self.batch // len(sequences))) if self.epochs is None else self.epochs
        check_number("epochs", epochs, whole=True)
        validation = self.validation
        if validation is None:
            validation = HELD if HELD * len(sequences) >= FEWEST else 0.0
        result = train.fit(
            Sequences(self._seen(sequences), y, labels, "X", weight=weight.astype(np.float32)),
            validation=validation,
            units=self.units,
            cell=self.cell,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            pooling=self._pooling if self.pooling is None else self.pooling,
            every_step=self.every_step,
            epochs=epochs,
            batch=self.batch,
            lr=self.lr,
            clip=self.clip,
            patience=-(-epochs // 3) if self.patience is None else self.patience,
            noise=self.noise,
            offset=self.offset,
            seed=seed_of(self.random_state),
            init=self.init,
            progress=self.verbose,
            threads=self.threads,
            device=self.device,
        )
        self.network_, self.history_, self.n_iter_ = result.network, result.history, len(result.history)
        if result.fit.interrupted:  # fitted as far as it came, and what called this is to stop
            raise KeyboardInterrupt

    @property
    def _pooling(self) -> str:
        return "mean"

    def _seen(self, sequences: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Return the sequences as the network sees them."""
        return list(map(with_changes, sequences)) if self.changes else sequences

    def _answers(self, X: Any) -> NDArray[np.float64]:
        """Return what the network answers, `[n, O]`."""
        check_is_fitted(self)
        sequences = Labelled(Sequences(self._seen(self._check_sequences(X, reset=False)), None, (), "X"))
        inputs = predict.trained(self.network_, type(self).__name__).inputs
        return predict.answers(self.network_, inputs, sequences, self.threads)


def with_changes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a sequence with the changes of its channels beside them, `[T, 2 * C]` for `[T, C]`.

    A change is that from the latest step at which the channel was observed, 0 where there is none; NaN stays NaN.

    Ref: Furui 1986, "Speaker-independent isolated word recognition using dynamic features of speech spectrum".

    >>> with_changes(np.array([[1.0], [3.0], [np.nan], [2.0]], np.float32))[:, 1]
    array([ 0.,  2., nan, -1.], dtype=float32)
    """
    rows = np.arange(len(x))[:, None]
    latest = np.maximum.accumulate(np.where(np.isnan(x), -1, rows), axis=0)
    before = np.concatenate([np.full((1, x.shape[1]), -1), latest[:-1]])
    return np.concatenate([x, x - np.take_along_axis(x, np.where(before < 0, rows, before), axis=0)], axis=1)


def seed_of(random_state: Any) -> int:
    """Return what a `random_state` says: itself where it is a whole number, else a draw from it."""
    if isinstance(random_state, Integral):
        return int(random_state)
    return check_random_state(random_state).randint(2**31)


def _ragged(X: Any) -> list[Any] | None:
    """Return X as a list of sequences where it is one: arrays in a list, lists of unequal length, arrays as objects."""
    if getattr(X, "ndim", None) == 1 and getattr(getattr(X, "dtype", None), "kind", "") == "O":
        X = list(X)
    if not isinstance(X, (list, tuple)) or not len(X):
        return None
    if all(hasattr(one, "__array__") and np.ndim(one) for one in X):
        return list(X)
    unequal = all(isinstance(one, (list, tuple)) for one in X) and len({len(one) for one in X}) > 1
    return list(X) if unequal else None


def _column(one: Any) -> Any:
    """Return a sequence `[T]` of one channel as `[T, 1]`, any other as it is."""
    return np.asarray(one)[:, None] if np.ndim(one) == 1 else one


@dataclass(repr=False, eq=False, kw_only=True)
class SequenceClassifier(ClassifierMixin, _SequenceEstimator):
    """Stacked recurrent layers that tell classes of sequences.

    X is what scikit-learn's splitters, searches and pipelines can index:

    - `[n, T, C]`: n sequences of T steps of C channels;
    - a list of n arrays `[T, C]`, or `[T]` where there is one channel; T may differ;
    - `[n, T]`, an array or a data frame: n sequences of one channel, a column a step.

    NaN and masked values are missing; steps without any value are left out. `n_features_in_` is the length of the last
    axis: what is predicted must have as many channels, or, as a table, as many columns, as what was fitted.

    Args:
        units: width of each layer, bottom first; one number for one layer.
        cell: `"lstm"`, `"gru"` or `"rnn"`.
        bidirectional: run each layer from both ends.
        dropout: share of values dropped out after each layer in training.
        pooling: `"mean"`, `"max"` or `"last"` over the steps; the largest where None, the mean with `every_step`.
        changes: show the network how much each channel changed since the step before, too, as channels of their own.
        every_step: read out every step and pool the answers; such a network answers frame by frame as a stream.
        epochs: most passes over the training part; where None, as many as come to 750 steps, and 60 at least.
        batch: most sequences in a step of the optimiser.
        lr: Adam's rate in the first epoch; it falls to a hundredth along half a cosine.
        clip: largest norm of all gradients together.
        patience: epochs without a better validation loss before the fit stops; 0 never stops early, None after a third
            of `epochs`.
        noise: standard deviation of the noise that training adds to each input, in units of its channel's scale.
        offset: the same for noise that is drawn once a sequence and channel.
        validation: share of the sequences, of each class, that is held out to choose the epoch; 0 for none, which is
            the last one then. None: 0.15 where that is 20 sequences or more, else 0, as fewer choose badly.
        init: a network, or the file of one, of the same shapes, whose weights are the start.
        threads: how many to use. None: as many as pay, which is measured, so that the last bits may differ from fit to
            fit.
        device: where to train: `"auto"`, `"cpu"`, `"cuda"`. Predictions are the kernel's, on the CPU.
        verbose: show a bar.
        random_state: fixes every draw. An int is `seed` in `train.fit`.
        class_weight: None, `"balanced"`, or weights by class: how much a sequence of it counts.

    Attributes:
        classes_: the classes, sorted, `[K]`.
        network_: the fitted `cellstack.Network`: raw values in, where there are `changes` as `with_changes` puts them
            beside each other, class probabilities out. It needs no torch, nor does a pickled estimator.
        history_: one dict an epoch: `loss`, `validation_loss`, `accuracy` of the validation part, `lr`.
        n_iter_: epochs run.
        n_features_in_: length of X's last axis.

    Raises:
        ValueError: from `fit` and `predict`, for parameters and data that can't be used; the message says which.
        KeyboardInterrupt: Ctrl-C in `fit`. The estimator is fitted as far as it came.

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

    changes: bool = True
    noise: float = 0.6
    offset: float = 0.3
    validation: float | None = None
    class_weight: Mapping[Any, float] | str | None = None

    @property
    def _pooling(self) -> str:
        return "mean" if self.every_step else "max"

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> SequenceClassifier:
        """Train on sequences and their classes.

        Args:
            X: n sequences.
            y: their classes, `[n]`, of any type that sorts.
            sample_weight: how much each sequence counts in the loss, `[n]`.

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
        return answers / answers.sum(axis=1, keepdims=True)  # one in float64, not in the network's float32 alone

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
        """Return the share of sequences whose class is predicted, weighted by `sample_weight`, `[n]`."""
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)


@dataclass(repr=False, eq=False, kw_only=True)
class SequenceRegressor(RegressorMixin, _SequenceEstimator):
    """Stacked recurrent layers that give numbers for sequences, one or several.

    Args:
        units, cell, bidirectional, dropout, pooling, every_step: how the network is built, see `SequenceClassifier`.
        epochs, batch, lr, clip, patience, noise, offset, validation: how it is fitted; without noise if not asked for,
            as a number is often in the very level that noise hides.
        init, threads, device, verbose, random_state: the same.

    Attributes:
        network_: the fitted `cellstack.Network`: raw values in, numbers in the targets' units out.
        history_: one dict an epoch: `loss`, `validation_loss`, `rmse` of the validation part, `lr`.
        n_iter_, n_features_in_: as those of `SequenceClassifier`.

    Raises:
        ValueError, KeyboardInterrupt: as `SequenceClassifier` does.

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
            X: n sequences, in the forms that `SequenceClassifier` takes.
            y: their targets, `[n]` or `[n, O]`.
            sample_weight: how much each sequence counts in the loss, `[n]`.

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
            `[n]` or `[n, O]`, as y was, in its units.
        """
        answers = self._answers(X)
        return answers[:, 0] if self._flat else answers

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Return the coefficient of determination R² of the predictions, weighted by `sample_weight`, `[n]`."""
        refuse_masked("y", y)
        refuse_masked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)
