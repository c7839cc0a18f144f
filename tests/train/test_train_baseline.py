"""The simple rules that a network's scores are compared with."""

import sys

import numpy as np
import pytest

from cellstack import train
from cellstack.train.baseline import summary

QUICK = {"units": 4, "epochs": 1, "threads": 1, "progress": False}


@pytest.fixture
def data():
    """Sequences whose class is the sign of their last step, 60 up and 20 down."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(length, 2)) for length in rng.integers(4, 9, 80)]
    y = np.repeat(["up", "down"], [60, 20])
    for sequence, label in zip(x, y, strict=True):
        sequence[-1, 0] = abs(sequence[-1, 0]) * (1 if label == "up" else -1)
    return x, y


def test_boosting_is_fitted_to_the_training_part_and_scored_on_the_test_part(data):
    x, y = data
    found = train.fit(x[::2], y[::2], test=(x[1::2], y[1::2]), **QUICK)
    assert found.baseline.what == "boosting on summary statistics"
    assert found.baseline.name == "accuracy"
    assert found.baseline.score > 0.9
    (constant,) = found.baseline.others
    assert (constant.what, constant.score) == ("always the most frequent class, 'up'", 0.75)
    said = (
        f"for comparison, boosting on summary statistics: accuracy {found.baseline.score:.4g} ({constant.what}: 0.75)"
    )
    assert said in found.sentence
    assert found.sentence.endswith(": better than the network") == (found.baseline.score > found.scores["accuracy"])
    swapped = np.where(y == "up", "down", "up")
    other = train.fit(x[::2], y[::2], test=(x[1::2], swapped[1::2]), **QUICK)
    assert other.baseline.what == "always the most frequent class, 'up'"  # the better one where boosting is wrong
    assert other.baseline.score == 0.25
    wrong = 1 - found.baseline.score
    assert f"'up': accuracy 0.25 (boosting on summary statistics: {wrong:.4g})" in other.sentence


def test_without_scikit_learn_it_is_one_answer_for_all(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    x, y = data
    found = train.fit(x, y, test=0.25, **QUICK).baseline
    assert found.what == "always the most frequent class, 'up'"
    assert found.score == 0.75
    assert found.others == ()
    numbers = np.array([sequence[-1] for sequence in x])
    found = train.fit(x, numbers, test=(x[:40], numbers[:40]), validation=0, **QUICK).baseline
    assert (found.what, found.name) == ("always the mean", "rmse")
    assert found.score == pytest.approx(np.sqrt(np.square(numbers[:40] - numbers.mean(axis=0)).mean()))


def test_several_targets(data):
    x, _ = data
    y = np.stack([[row[0, 0] for row in x], [row[:, 1].max() for row in x]], axis=1)
    found = train.fit(x, y, test=0.25, **QUICK).baseline
    assert found.what == "boosting on summary statistics"
    assert found.score < 0.6 * np.std(y)


def test_an_answer_for_every_step_is_compared_with_the_most_frequent_class(data):
    x, _ = data
    steps = [np.arange(len(row)) > 0 for row in x]
    found = train.fit(x, steps, **QUICK).baseline
    assert found.what == "always the most frequent class, True"
    assert 0.7 < found.score < 0.9


def test_it_can_be_left_out(data):
    found = train.fit(*data, test=0.25, baseline=False, **QUICK)
    assert found.baseline is None
    assert "for comparison" not in found.sentence
    assert train.fit(*data, validation=0, **QUICK).baseline is None  # nothing is held out


def test_statistics_of_a_sequence():
    found = summary(np.array([[1, np.nan], [3, np.nan], [np.nan, np.nan], [2, np.nan]], np.float32))
    np.testing.assert_allclose(found[:10], [2, np.sqrt(2 / 3), 1, 3, 1, 2, 0.5, 1.5, 1.5, 0.25])
    assert np.isnan(found[10:19]).all()
    assert list(found[19:]) == [1, 4]
