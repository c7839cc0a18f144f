"""Gradient boosting on lags: it uses only past values, and is a strong baseline."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cellstack.train import measures
from cellstack.train.forecasting import rules
from cellstack.train.forecasting.boosting import Boosting, Panel

HORIZON = 7


def daily(seed, rows=420, scale=1.0):
    """A weekly season, a slow random walk, holidays known in advance, and noise."""
    rng = np.random.default_rng(seed)
    holiday = (rng.random(rows) < 0.1).astype(np.float64)
    week = np.tile([4.0, 4, 5, 5, 6, 2, 1], rows // 7 + 1)[:rows]
    return scale * (20 + week - 4 * holiday + 0.2 * rng.standard_normal((2, rows)).cumsum(1)[0]), holiday


def origins(starts, low, high):
    return np.concatenate(
        [np.arange(a + int(low * (b - a)), a + int(high * (b - a)) - HORIZON) for a, b in pairwise(starts)]
    )


def panel(count=1):
    series = [daily(seed, 420 - 30 * seed, 10.0**seed) for seed in range(count)]
    starts = np.cumsum([0, *(len(values) for values, _ in series)])
    days = np.concatenate([np.arange(b - a) for a, b in pairwise(starts)])
    return Panel(
        values=np.concatenate([values for values, _ in series]),
        starts=starts,
        times=np.datetime64("2021-01-04", "s") + days * np.timedelta64(1, "D"),
        known={"holiday": np.concatenate([holiday for _, holiday in series])},
    )


def fitted(data, **arguments):
    return Boosting(data, HORIZON, (7,), origins(data.starts, 0.1, 0.6), origins(data.starts, 0.6, 0.8), **arguments)


@pytest.fixture(scope="module")
def one():
    data = panel()
    return data, fitted(data)


def measured(data, model, test):
    actual = data.values[test[:, None] + np.arange(1, HORIZON + 1)]
    naive = rules.seasonal(data.values, test, HORIZON, season=7)
    return measures.errors(model.forecast(test), actual)["mae"], measures.errors(naive, actual)["mae"]


def test_it_beats_the_seasonal_naive_forecast_with_inputs_known_in_advance(one):
    data, model = one
    mae, naive = measured(data, model, origins(data.starts, 0.8, 1.0))
    assert mae < 0.6 * naive
    blind = replace(data, known={})
    assert measured(blind, fitted(blind), origins(data.starts, 0.8, 1.0))[0] > 1.5 * mae


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 4))])
def test_a_known_column_explains_how_this_season_differs_from_the_last(seed):
    """The temperatures of the test part are new, and so is the value one season before, which depends on them too."""
    rng, rows = np.random.default_rng(seed), 420
    day = np.arange(rows)
    temperature = 15 * np.sin(day * 2 * np.pi / 365) + rng.standard_normal(rows).cumsum()
    week = np.tile([4.0, 4, 5, 5, 6, 2, 1], rows // 7)
    data = Panel(
        values=50 + 2 * week - temperature + 0.3 * rng.standard_normal(rows),
        starts=np.array([0, rows]),
        times=np.datetime64("2021-01-04", "s") + day * np.timedelta64(1, "D"),
        known={"temperature": temperature},
    )
    blind, test = replace(data, known={}), origins(data.starts, 0.8, 1.0)
    assert measured(data, fitted(data), test)[0] < 0.4 * measured(blind, fitted(blind), test)[0]


@pytest.mark.slow
def test_a_known_category_explains_how_this_season_differs_from_the_last():
    rng, rows = np.random.default_rng(0), 420
    codes = rng.integers(0, 3, rows)
    level = rng.standard_normal(rows).cumsum()
    values = 50 + level + np.array([0.0, 8.0, -8.0])[codes] + 0.1 * rng.standard_normal(rows)
    data = replace(panel(), values=values, known={"kind": codes}, categories=frozenset({"kind"}))
    bare, test = (
        replace(data, values=values - np.array([0.0, 8.0, -8.0])[codes], known={}),
        origins(data.starts, 0.8, 1),
    )
    bare = replace(bare, categories=frozenset())
    assert measured(data, fitted(data), test)[0] < 1.4 * measured(bare, fitted(bare), test)[0]


def test_it_uses_nothing_after_its_origins(one):
    data, model = one
    first = int(0.8 * len(data.values))
    changed = replace(data, values=np.where(np.arange(len(data.values)) < first, data.values, -1e6))
    again, last = fitted(changed), np.array([first - 1])
    assert (again.best, again.seasons) == (model.best, model.seasons)
    np.testing.assert_array_equal(again.forecast(last), model.forecast(last))
    for origin in (first + 5, first + 20):
        values = data.values.copy()
        values[origin + 1 :] = np.nan
        model.panel = replace(data, values=values)
        hidden = model.forecast(np.array([origin]))
        model.panel = data
        np.testing.assert_array_equal(hidden, model.forecast(np.array([origin])))


@pytest.mark.slow
def test_series_of_other_scales_are_learned_together():
    data = panel(3)
    model = fitted(data)
    for a, b in pairwise(data.starts):
        mae, naive = measured(data, model, origins(np.array([a, b]), 0.8, 1.0))
        assert mae < 0.8 * naive


def test_gaps_in_values_and_in_columns_and_categories():
    data = panel()
    rng = np.random.default_rng(3)
    values = np.where(rng.random(len(data.values)) < 0.2, np.nan, data.values)
    codes = np.where(rng.random(len(values)) < 0.1, -1, data.known["holiday"].astype(np.int64))
    gappy = replace(
        data,
        values=values,
        known={"holiday": codes, "empty": np.full(len(values), np.nan)},
        past={"other": data.values[::-1]},
        categories=frozenset({"holiday"}),
    )
    mae, naive = measured(gappy, fitted(gappy), origins(data.starts, 0.8, 1.0))
    assert mae < 0.8 * naive


def test_growth_is_learned_by_differences():
    grown = replace(panel(), known={})
    grown = replace(grown, values=grown.values * 1.01 ** np.arange(len(grown.values)))
    model = fitted(grown)
    mae, naive = measured(grown, model, origins(grown.starts, 0.8, 1.0))
    assert model.way.season > 0
    assert mae < naive


def test_forecasts_end_with_the_panel_and_need_an_observed_value(one):
    data, model = one
    forecast = model.forecast(np.array([len(data.values) - 3]))
    assert np.isfinite(forecast[0, :2]).all()
    assert np.isnan(forecast[0, 2:]).all()
    late = replace(data, values=np.where(np.arange(len(data.values)) < 100, np.nan, data.values))
    assert np.isfinite(fitted(late).forecast(np.array([300]))).all()
    with pytest.raises(ValueError, match="no target was observed after any of the origins"):
        fitted(replace(data, values=np.full(len(data.values), np.nan)))


@pytest.mark.slow
def test_tuning_is_at_least_as_good_on_the_validation_part_and_repeats():
    data = panel()
    tuned = fitted(data, tuned=True)
    assert tuned.best[0] <= fitted(data).best[0]
    test = origins(data.starts, 0.8, 1.0)
    np.testing.assert_array_equal(fitted(data, tuned=True).forecast(test), tuned.forecast(test))
