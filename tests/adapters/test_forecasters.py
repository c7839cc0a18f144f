"""`SequenceForecaster` for sktime: horizons, indices, panels, columns known in advance, errors."""

import doctest
import pickle

import numpy as np
import pandas as pd
import pytest

from cellstack import sklearn
from cellstack.sklearn import SequenceForecaster as Estimator

ROWS = 60
SEASON = np.sin(np.arange(ROWS) * np.pi / 6) + 5 + np.random.default_rng(0).normal(size=ROWS) * 0.1


def quick(**more):
    small = {"units": 4, "members": 1, "epochs": 2, "lr": 0.01, "validation": 0.0, "seasons": (12,), "random_state": 0}
    return Estimator(**small | more)


# sktime takes seconds to import: it is imported where it is used, by the one process that runs these tests.


def forecaster(**more):
    from cellstack.adapters import sktime

    return sktime.SequenceForecaster(quick(**more))


@pytest.mark.long
def test_the_examples_in_the_docstrings():
    from cellstack.adapters import sktime

    failed, attempted = doctest.testmod(sktime)
    assert attempted
    assert not failed


@pytest.fixture(scope="module")
def days():
    return pd.Series(SEASON, pd.date_range("2024-01-01", periods=ROWS, freq="D"), name="sales")


@pytest.fixture(scope="module")
def fitted(days):
    return forecaster().fit(days, fh=[1, 2, 5])


def panel(*ends):
    """Series of one shape and several lengths, which end at different rows."""
    dates = pd.date_range("2024-01-01", periods=ROWS, freq="D")
    parts = {f"shop {n}": pd.DataFrame({"sales": SEASON * (n + 1)}, dates)[:end] for n, end in enumerate(ends)}
    return pd.concat(parts, names=["shop", "day"])


@pytest.mark.long
def test_forecasts_equal_those_of_the_estimator(days, fitted):
    alone = quick(horizon=5, target="sales").fit(days.rename_axis("time").reset_index())
    np.testing.assert_array_equal(fitted.predict(), alone.predict()[[0, 1, 4]])
    np.testing.assert_array_equal(fitted.predict_quantiles(alpha=[0.1, 0.5, 0.9]), alone.predict_quantiles()[[0, 1, 4]])


def test_any_horizon_up_to_the_fitted_one(days, fitted):
    assert fitted.estimator_.recipe_.horizon == 5
    every = fitted.predict(fh=np.arange(1, 6))
    assert list(every.index) == list(pd.date_range("2024-03-01", periods=5))
    assert every.name == "sales"
    pd.testing.assert_series_equal(fitted.predict(fh=[4, 2]), every.iloc[[1, 3]], check_freq=False)
    absolute = pd.DatetimeIndex(["2024-03-04"], freq="D")
    np.testing.assert_array_equal(fitted.predict(fh=absolute), every.iloc[[3]])
    with pytest.raises(ValueError, match=r"within 5 steps .* got 2024-03-06 .* step 6: pass fit an fh up to"):
        fitted.predict(fh=[6])
    with pytest.raises(NotImplementedError, match="in-sample"):
        fitted.predict(fh=[0, 1])
    late = forecaster(horizon=3).fit(days)
    assert len(late.predict(fh=[1, 2, 3])) == 3
    assert forecaster(horizon=7).fit(days, fh=[2]).estimator_.recipe_.horizon == 7


def test_quantiles_within_the_fitted_range_only(fitted):
    came = fitted.predict_interval(fh=[1], coverage=[0.8, 0.4])
    assert list(came.columns) == [("sales", c, side) for c in (0.8, 0.4) for side in ("lower", "upper")]
    low, high, inner_low, inner_high = came.iloc[0]
    assert low < inner_low < fitted.predict(fh=[1]).iloc[0] < inner_high < high
    with pytest.raises(ValueError, match=r"from 0.1 to 0.9, .* got 0.05: train it with a wider range of quantiles"):
        fitted.predict_interval(fh=[1], coverage=0.9)


def test_the_default_estimator_has_sktime_s_quantiles(days, monkeypatch):
    from cellstack.adapters import sktime

    monkeypatch.setattr(sklearn, "SequenceForecaster", quick)
    model = sktime.SequenceForecaster().fit(days, fh=[1])
    assert list(model.predict_interval().columns) == [("sales", 0.9, "lower"), ("sales", 0.9, "upper")]


@pytest.mark.parametrize("freq", ["h", "B", "W-TUE", "MS", "QE"])
def test_dates_with_missing_rows(freq):
    dates = pd.date_range("2024-01-31", periods=ROWS + 3, freq=freq)
    y = pd.Series(SEASON, dates[:ROWS]).drop(dates[[3, 7, 8]])
    came = forecaster().fit(y, fh=[1, 3]).predict()
    assert list(came.index) == [dates[ROWS], dates[ROWS + 2]]


@pytest.mark.parametrize("freq", ["h", "W", "M", "2M", "Y"])
def test_periods(freq):
    periods = pd.period_range("2024-01", periods=ROWS + 3, freq=freq)
    came = forecaster().fit(pd.Series(SEASON, periods[:ROWS]), fh=[1, 3]).predict()
    assert list(came.index) == [periods[ROWS], periods[ROWS + 2]]


def test_the_repeated_hour_of_a_clock_change():
    hours = pd.date_range("2024-10-24 12:00", periods=ROWS + 30, freq="h", tz="Europe/Berlin")
    came = forecaster().fit(pd.Series(SEASON, hours[:ROWS]), fh=np.arange(1, 31)).predict()
    assert list(came.index) == list(hours[ROWS:])
    assert hours[ROWS:].tz_localize(None).has_duplicates


def test_dates_without_a_frequency_of_pandas_are_refused():
    fifteenth = pd.date_range("2024-01-01", periods=ROWS, freq="MS") + pd.Timedelta(days=14)
    with pytest.raises(ValueError, match=r"spaced by 1MS: use an index of periods for y"):
        forecaster().fit(pd.Series(SEASON, fifteenth), fh=[1]).predict()


@pytest.mark.long
def test_whole_numbers_count_steps():
    y = pd.Series(SEASON, np.arange(ROWS) + 1900)
    whole = forecaster().fit(y, fh=[1, 3])
    assert list(whole.predict().index) == [1960, 1962]
    assert whole.estimator_.recipe_.calendar == ()
    gaps = forecaster().fit(y.drop([1905, 1930]), fh=[1, 3])
    filled = forecaster().fit(y.where(~y.index.isin([1905, 1930])), fh=[1, 3])
    pd.testing.assert_series_equal(gaps.predict(), filled.predict())
    arrays = forecaster().fit(np.stack([SEASON, SEASON * 2], axis=1), fh=[1, 3])
    assert arrays.predict().shape == (2, 2)


def test_missing_values_at_the_end_are_forecast_too(days):
    y = days.copy()
    y.iloc[-2:] = np.nan
    model = forecaster().fit(y, fh=[1, 3])
    assert model.estimator_.recipe_.horizon == 5
    before = forecaster().fit(days[:-2], fh=[1, 3, 5])
    assert list(model.predict().index) == list(before.predict().index[1:])
    np.testing.assert_allclose(model.predict(), before.predict()[1:], rtol=0.05)


def test_columns_known_in_advance(days, rng):
    X = pd.DataFrame(
        {"price": rng.normal(size=ROWS + 3), "day": rng.choice(["off", "on"], ROWS + 3), "sales": rng.random(ROWS + 3)},
        pd.date_range("2024-01-01", periods=ROWS + 3),
    )
    model = forecaster(inputs=("X sales",)).fit(days, X=X[:ROWS], fh=[1, 3])
    recipe = model.estimator_.recipe_
    assert (recipe.known, recipe.inputs) == (("price",), ("X sales",))
    assert [(each.name, each.known) for each in recipe.categories] == [("day", True)]
    came = model.predict(X=X[ROWS:])
    pd.testing.assert_series_equal(model.predict(X=X), came)
    other = X[ROWS:].assign(price=9.0)
    assert not np.allclose(model.predict(X=other), came)
    pd.testing.assert_series_equal(model.predict(fh=[1], X=X[ROWS : ROWS + 1]), came[:1], check_freq=False)
    with pytest.raises(ValueError, match="expected X to hold price, day, sales, as in fit, got no column"):
        model.predict()
    with pytest.raises(ValueError, match="got price"):
        model.predict(X=X[["price"]])
    with pytest.raises(ValueError, match=r"a row at every step up to the last of fh, .* none at step 2"):
        model.predict(fh=[3], X=X.drop(X.index[ROWS + 1]))


def test_inputs_are_not_required_for_the_horizon(days):
    X = pd.DataFrame({"weather": np.cos(np.arange(ROWS))}, days.index)
    model = forecaster(inputs=("weather",)).fit(days, X=X, fh=[1, 2])
    assert model.estimator_.recipe_.inputs == ("weather",)
    assert len(model.predict()) == 2


@pytest.mark.long
def test_one_network_for_all_series_of_a_panel():
    y = panel(60, 60, 55)
    model = forecaster().fit(y, fh=[1, 3])
    assert "3 series by `shop`" in model.estimator_.understood_[0]
    came = model.predict()
    assert came.index.names == ["shop", "day"]
    assert list(came.loc["shop 0"].index) == list(pd.to_datetime(["2024-03-01", "2024-03-03"]))
    assert list(came.loc["shop 2"].index) == list(pd.to_datetime(["2024-02-25", "2024-02-27"]))
    np.testing.assert_allclose(came.loc["shop 1"], came.loc["shop 0"] * 2, rtol=1e-4)
    levels = model.predict_quantiles(alpha=[0.5])
    np.testing.assert_array_equal(levels, came)
    counted = y.groupby("shop").cumcount()
    same = forecaster().fit(y.set_index(pd.MultiIndex.from_arrays([y.index.get_level_values(0), counted])), fh=[1, 3])
    assert list(same.predict().index.get_level_values(1)) == [60, 62, 60, 62, 55, 57]


@pytest.mark.long
def test_columns_known_in_advance_of_a_panel():
    y = panel(57, 57)
    X = panel(60, 60).rename(columns={"sales": "price"})
    model = forecaster().fit(y, X=X.loc[y.index], fh=[1, 3])
    assert model.predict(X=X).shape == (4, 1)
    with pytest.raises(ValueError, match="none at step 1"):
        model.predict(X=X.loc[["shop 0"]])
    with pytest.raises(ValueError, match="every row of y, got none at"):
        forecaster().fit(y, X=X[5:], fh=[1])


@pytest.mark.long
def test_newer_values_with_the_same_network_or_with_a_new_one(days):
    model = forecaster().fit(days[:50], fh=[1, 2])
    network = model.estimator_.network_
    model.update(days[50:], update_params=False)
    assert model.estimator_.network_ is network
    assert list(model.predict().index) == list(pd.to_datetime(["2024-03-01", "2024-03-02"]))
    direct = model.estimator_.predict(days.rename_axis("time").reset_index())
    np.testing.assert_array_equal(model.predict(), direct)
    model.update(days[50:], update_params=True)
    assert model.estimator_.network_ is not network
    anew = forecaster().fit(days, fh=[1, 2])
    pd.testing.assert_series_equal(model.predict(), anew.predict())


def test_a_network_of_a_panel_forecasts_other_series(days):
    model = forecaster().pretrain(panel(60, 60, 55), fh=[1, 2, 3])
    network = model.estimator_.network_
    came = model.fit(days).predict(fh=[1, 2])
    assert model.estimator_.network_ is network
    other = model.clone().fit(days * 10)
    np.testing.assert_allclose(other.predict(fh=[1, 2]), came * 10, rtol=1e-4)
    model.update(days[-1:] + 1)
    assert model.estimator_.network_ is network
    assert not np.allclose(model.predict(fh=[1, 2]), came)


def test_it_is_pickled_cloned_and_evaluated(days, fitted):
    from sktime.forecasting.model_evaluation import evaluate
    from sktime.split import ExpandingWindowSplitter

    pd.testing.assert_series_equal(pickle.loads(pickle.dumps(fitted)).predict(), fitted.predict())
    assert fitted.clone().get_params()["estimator__units"] == 4
    cv = ExpandingWindowSplitter(fh=[1, 2], initial_window=40, step_length=15)
    scores = evaluate(forecaster(), cv, days, strategy="no-update_params")
    assert scores["test_MeanAbsolutePercentageError"].between(0, 0.1).all()


@pytest.mark.parametrize(("name", "value"), [("target", "sales"), ("id", "shop"), ("time", "day")])
def test_parameters_determined_by_sktime_are_refused(days, name, value):
    with pytest.raises(ValueError, match=f"expected an estimator without {name}, .* got '{value}'"):
        forecaster(**{name: value}).fit(days, fh=[1])
