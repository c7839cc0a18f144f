"""What simple rules achieve on the sequences that a network is measured on, so that its scores mean something.

Boosting on summary statistics of each sequence, if scikit-learn is installed, otherwise one answer for all sequences:
the most frequent class, or the mean of the targets. Needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.data.sequences import Sequences
from cellstack.train.measures import errors

MOST = 50_000_000  # values of the training part; above, boosting isn't tried
LEAST = 20  # sequences of the training part; below, it isn't either
LEAF = 20  # sequences in a leaf, at least, where there are enough


class Baseline(NamedTuple):
    """A simple rule, and its score.

    Args:
        what: the rule in words.
        name: `accuracy` or `rmse`.
        score: its score on the sequences that the network is measured on.
        others: the rules that were also tried, and are no better.
    """

    what: str
    name: str
    score: float
    others: tuple[Baseline, ...] = ()

    def wins(self, network: float) -> bool:
        """Whether it is better than a network with this score."""
        return self.score > network if self.name == "accuracy" else self.score < network


def baseline(training: Sequences, weight: NDArray[np.float32], held: Sequences, seed: int) -> Baseline:
    """Return the best one of the simple rules that are fitted to the training part, with the others.

    Args:
        training: the training part, without the sequences that the network is measured on.
        weight: of its classes or targets, in their shape.
        held: what the network is measured on.
        seed: of the boosting.
    """
    y, truth = (np.concatenate(one.y) if isinstance(one.y, list) else np.asarray(one.y) for one in (training, held))
    if training.labels:
        counts = np.bincount(y, weights=weight.reshape(-1), minlength=len(training.labels))
        same = f"always the most frequent class, {training.labels[int(counts.argmax())]!r}"
        found = [_scored(same, True, np.full(len(truth), counts.argmax()), truth)]
    else:
        found = [_scored("always the mean", False, np.broadcast_to(y.mean(axis=0), truth.shape), truth)]
    values = int(training.lengths.sum()) * training.channels
    if not training.per_step and len(y) >= LEAST and values <= MOST and find_spec("sklearn") is not None:
        found.append(_boosting(training, y, weight, held, truth, seed))
    best, *others = sorted(found, key=lambda one: -one.score if one.name == "accuracy" else one.score)
    return best._replace(others=tuple(others))


def _scored(what: str, classify: bool, answers: NDArray, truth: NDArray) -> Baseline:
    if classify:
        return Baseline(what, "accuracy", float((answers == truth).mean()))
    return Baseline(what, "rmse", errors(answers, truth.astype(np.float64))["rmse"])


def _boosting(
    training: Sequences, y: NDArray, weight: NDArray[np.float32], held: Sequences, truth: NDArray, seed: int
) -> Baseline:
    ensemble, limits = import_module("sklearn.ensemble"), import_module("threadpoolctl").threadpool_limits
    kind = ensemble.HistGradientBoostingClassifier if training.labels else ensemble.HistGradientBoostingRegressor
    x, x_held = (np.stack([summary(row) for row in one.x]) for one in (training, held))
    x, x_held = (np.where(np.isfinite(one), one, np.nan) for one in (x, x_held))
    settings: dict[str, Any] = {"min_samples_leaf": max(1, min(LEAF, len(y) // 10)), "early_stopping": False}
    answers = []
    with limits(1):  # its threads would compete with the network's
        for column, own in zip(*(one.reshape(len(y), -1).T for one in (y, weight)), strict=True):
            fitted = kind(random_state=seed, **settings).fit(x, column, sample_weight=own)
            answers.append(fitted.predict(x_held))
    return _scored(
        "boosting on summary statistics", bool(training.labels), np.stack(answers, 1).reshape(truth.shape), truth
    )


def summary(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return statistics of a sequence `[T, C]`: 10 of each channel, and its length, `[10 * C + 1]`.

    Of a channel: mean, deviation, extremes, first and last value, mean and deviation of its changes, mean size of a
    change, and the share of missing values. Statistics without observed values are NaN.
    """
    rows = []
    for channel in x.T.astype(np.float64):
        seen = channel[~np.isnan(channel)]
        changes = np.diff(seen)
        some = [seen.mean(), seen.std(), seen.min(), seen.max(), seen[0], seen[-1]] if len(seen) else [np.nan] * 6
        more = [changes.mean(), changes.std(), np.abs(changes).mean()] if len(changes) else [np.nan] * 3
        rows += [*some, *more, 1.0 - len(seen) / len(channel)]
    return np.array([*rows, len(x)])
