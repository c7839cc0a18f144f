"""Exponential smoothing: its equations by hand, gaps, seasons, and the grid search."""

import numpy as np
import pytest

from cellstack.train.forecasting import smoothing
from cellstack.train.forecasting.smoothing import Smoothed, Smoothing

STILL = Smoothing(False, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def smoothed(values, seasons, how):
    values = np.asarray(values, np.float64)
    return Smoothed(values, np.array([0, len(values)]), seasons, how)


def ahead(values, seasons, how, horizon):
    return smoothed(values, seasons, how).ahead(np.array([len(values) - 1]), horizon)[0]


def test_a_level_follows_with_its_parameter():
    found = smoothed([4.0, 8.0, 2.0], (), STILL._replace(level=0.25))
    np.testing.assert_allclose(found.level, [4.0, 5.0, 4.25])
    np.testing.assert_allclose(found.fitted, [np.nan, 4.0, 5.0])
    np.testing.assert_allclose(found.ahead(np.array([1, 2]), 2), [[5.0, 5.0], [4.25, 4.25]])


def test_a_damped_trend_by_hand():
    how = STILL._replace(level=0.5, trend=0.25, damping=0.5)
    # row 1: e = 4, l = 0 + 2, b = 1; row 2: expected 2.5, e = 2, l = 3.5, b = 0.5 + 0.5
    found = smoothed([0.0, 4.0, 4.5], (), how)
    np.testing.assert_allclose(found.level, [0.0, 2.0, 3.5])
    np.testing.assert_allclose(found.ahead(np.array([2]), 3)[0], [3.5 + 0.5, 3.5 + 0.75, 3.5 + 0.875])


def test_the_drift_is_the_mean_change_of_a_row():
    how = STILL._replace(level=1.0, drift=1.0)
    np.testing.assert_allclose(ahead([1.0, 2.0, 5.0, 7.0], (), how, 2), [9.0, 11.0])
    np.testing.assert_allclose(ahead([1.0, 2.0, 5.0, 7.0], (), how._replace(drift=0.5), 2), [8.0, 9.0])


def test_the_remainder_decays():
    np.testing.assert_allclose(ahead([0.0, 8.0], (), STILL._replace(memory=0.5), 3), [4.0, 2.0, 1.0])


def test_a_season_is_continued_and_updated():
    values = [1.0, 2.0, 6.0] * 3
    np.testing.assert_allclose(ahead(values, (3,), STILL, 4), [1.0, 2.0, 6.0, 1.0])
    # in the second season a half of the error goes to the season, whatever γ; in the third a third
    np.testing.assert_allclose(ahead([0.0, 0.0, 6.0, 0.0], (2,), STILL, 2), [3.0, 0.0])
    np.testing.assert_allclose(ahead([0.0, 0.0, 6.0, 0.0, 6.0, 0.0], (2,), STILL, 2), [4.0, 0.0])


def test_two_seasons_and_one_that_is_a_divisor_of_another():
    assert smoothing.apart((24, 168)) == (168,)
    assert smoothing.apart((7, 365)) == (7, 365)
    n = np.arange(60)
    values = 5 + np.tile([0.0, 1.0, -1.0], 20) + np.tile([2.0, -1.0, 0.0, 3.0, -4.0], 12)
    np.testing.assert_allclose(ahead(values[:45], (3, 5), STILL._replace(season=0.2), 15), values[n[45:]], atol=0.1)


def test_logarithms_and_values_without_one():
    how = STILL._replace(log=True, level=1.0, drift=1.0)
    np.testing.assert_allclose(ahead([1.0, 2.0, 4.0], (), how, 2), [8.0, 16.0])
    np.testing.assert_allclose(ahead([1.0, 2.0, 4.0, -3.0], (), how._replace(drift=0.0), 1), [4.0])


def test_a_missing_value_has_no_error():
    how = STILL._replace(level=0.5, drift=1.0, memory=0.5)
    whole, gap = [2.0, 4.0, 6.0], [2.0, 4.0, 6.0, np.nan, np.nan]
    np.testing.assert_allclose(ahead(whole, (), how, 4)[2:], ahead(gap, (), how, 2))


def test_before_a_season_was_seen_there_is_no_forecast():
    found = smoothed([np.nan, 1.0, 2.0, 3.0, 1.0, 2.0], (3,), STILL._replace(level=0.5))
    said = found.ahead(np.arange(6), 2)
    assert np.isnan(said[:3]).all()
    assert not np.isnan(said[3:]).any()
    assert np.isnan(smoothed([np.nan, np.nan], (), STILL).ahead(np.array([1]), 2)).all()


def test_a_forecast_doesn_t_depend_on_later_rows():
    values = np.random.default_rng(0).normal(size=80).cumsum()
    changed = values.copy()
    changed[51:] += 100
    how = Smoothing(False, 0.3, 0.2, 0.5, 0.1, 0.9, 0.5)
    a, b = (smoothed(one, (4, 7), how).ahead(np.arange(7, 51), 9) for one in (values, changed))
    np.testing.assert_array_equal(a, b)


def test_series_of_a_panel_are_smoothed_separately():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=30) + 9
    how = Smoothing(False, 0.3, 0.2, 1.0, 0.1, 0.9, 0.5)
    panel = Smoothed(np.concatenate([a, b]), np.array([0, 40, 70]), (6,), how)
    np.testing.assert_array_equal(panel.ahead(np.array([39]), 5)[0], ahead(a, (6,), how, 5))
    np.testing.assert_array_equal(panel.ahead(np.array([69]), 5)[0], ahead(b, (6,), how, 5))


def test_the_search_measures_the_errors_of_the_forecasts():
    rng = np.random.default_rng(2)
    values = 20 + np.tile(rng.normal(size=6), 25) + np.cumsum(rng.normal(0, 0.3, 150))
    how, error = smoothing.best([values], (6,), 4, [2.0])
    origins = np.arange(12, 146)
    said = smoothed(values, (6,), how).ahead(origins, 4)
    assert error == pytest.approx(np.abs(said - values[origins[:, None] + np.arange(1, 5)]).mean() / 2.0)


def test_the_search_finds_a_season_that_grows_with_the_level():
    n = np.arange(160)
    shape = np.tile([0.8, 1.3, 1.0, 0.9], 40)
    values = 50 * 1.02**n * shape * np.exp(np.random.default_rng(3).normal(0, 0.02, 160))
    how, _ = smoothing.best([values[:120]], (4,), 8, [1.0])
    assert how.log
    assert how.drift > 0 or how.trend > 0
    said = smoothed(values, (4,), how).ahead(np.arange(119, 152), 8)
    actual = values[np.arange(119, 152)[:, None] + np.arange(1, 9)]
    assert np.abs(said / actual - 1).mean() < 0.06


def test_negative_values_have_no_logarithm_and_few_rows_no_result():
    values = np.random.default_rng(4).normal(size=60)
    assert not smoothing.best([values], (4,), 2, [1.0])[0].log
    assert smoothing.best([values[:6]], (4,), 2, [1.0]) is None
    assert smoothing.best([np.full(60, np.nan)], (4,), 2, [1.0]) is None
