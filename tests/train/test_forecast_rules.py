"""Simple forecasting rules and error measures, compared with numbers worked by hand."""

import numpy as np
import pytest

from cellstack.train import measures
from cellstack.train.forecasting import rules

NAN = np.nan
AT = np.array([5])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [9, 9, 9, 9]),
        ({"season": 3}, [5, 7, 9, 5]),
        ({"drift": True}, [9 + 7 / 5, 9 + 14 / 5, 9 + 21 / 5, 9 + 28 / 5]),
        ({"season": 3, "drift": True}, [5 + 11 / 3, 7 + 11 / 3, 9 + 11 / 3, 5 + 22 / 3]),
    ],
)
def test_each_rule_by_hand(arguments, expected):
    values = np.array([2.0, 3, 5, 5, 7, 9, 100, -100])  # changes over 3 rows: 3, 4, 4
    np.testing.assert_allclose(rules.seasonal(values, AT, 4, **arguments), [expected])


def test_the_mean_of_seasons_ignores_missing_values():
    values = np.array([1.0, 10, NAN, 20, 3, NAN, 99, 99])
    np.testing.assert_allclose(rules.seasonal_mean(values, AT, 3, season=2), [[2, 15, 2]])
    np.testing.assert_allclose(rules.seasonal_mean(values, AT, 2, season=2, count=1), [[3, NAN]])


def test_a_gap_is_bridged_by_the_season_before_and_drift_counts_the_seasons_between():
    values = np.array([1.0, 10, 3, 12, 5, NAN])
    np.testing.assert_allclose(rules.seasonal(values, AT, 2, season=2), [[5, 12]])
    np.testing.assert_allclose(rules.seasonal(values, AT, 2, season=2, drift=True), [[5 + 2, 12 + 2 * 2]])
    np.testing.assert_allclose(rules.seasonal(values, AT, 2), [[5, 5]])


def test_a_phase_without_observed_values_has_no_forecast():
    values = np.array([NAN, 10, NAN, 12, NAN, 14])
    np.testing.assert_allclose(rules.seasonal(values, AT, 2, season=2, drift=True), [[NAN, 16]])
    assert np.isnan(rules.seasonal(np.full(6, NAN), AT, 2)).all()


def test_no_rule_uses_values_after_its_origin_and_many_origins_equal_one_by_one():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(60).cumsum()
    values[rng.random(60) < 0.2] = NAN
    origins = np.array([20, 33, 47])
    for name, rule in rules.rules((4, 7), 20).items():
        together = rule(values, origins, 9)
        for row, origin in zip(together, origins, strict=True):
            cut = values.copy()
            cut[origin + 1 :] = 1e9
            np.testing.assert_allclose(row, rule(cut, np.array([origin]), 9)[0], err_msg=name)


def test_a_season_needs_two_periods_before_the_first_origin():
    assert list(rules.rules((4, 7), 13)) == [
        "naive",
        "drift",
        "seasonal naive, 4",
        "seasonal naive with drift, 4",
        "mean of the last 4 seasons, 4",
    ]


def test_mase_divides_by_the_mean_change_over_a_season():
    training = np.array([1.0, 5, 2, 9, NAN, 10])  # changes over 2 rows: 1, 4, 1
    assert measures.seasonal_error(training, 2) == 2
    actual, forecast = np.array([[3.0, NAN], [1, 7]]), np.array([[2.0, 5], [4, 7]])
    measured = measures.errors(forecast, actual, 2.0)
    assert measured == pytest.approx({"mae": 4 / 3, "rmse": np.sqrt(10 / 3), "mase": 2 / 3})
    assert np.isnan(list(measures.errors(forecast, np.full((2, 2), NAN)).values())).all()
    assert np.isnan(measures.errors(forecast, actual, measures.seasonal_error(np.ones(9), 2))["mase"])
    assert np.isnan(measures.seasonal_error(training, 6))


def test_pinball_and_coverage_by_hand():
    actual = np.array([10.0, 0, NAN])
    quantiles = np.array([[8.0, 11], [1, 2], [5, 6]])
    assert measures.pinball(quantiles, actual, (0.1, 0.9)) == pytest.approx((0.1 * 2 + 0.1 * 1 + 0.9 * 1 + 0.1 * 2) / 4)
    assert measures.coverage(quantiles[:, 0], quantiles[:, 1], actual) == 0.5
    half = np.array([[9.0], [9]])
    assert measures.pinball(half, np.array([7.0, 13]), (0.5,)) == pytest.approx(0.5 * np.mean([2, 4]))
