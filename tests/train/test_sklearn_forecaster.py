"""`SequenceForecaster`: tables in, forecasts out, in searches and pickles."""

import pickle
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit

from cellstack.sklearn import SequenceForecaster

QUICK = {"horizon": 3, "seasons": (12,), "units": 4, "members": 1, "epochs": 3, "lr": 0.01, "random_state": 0}


@pytest.fixture
def table(rng):
    """Ten years of months: one column with a season and a trend, and its noise."""
    month, noise = np.arange(120), rng.normal(size=120) * 0.1
    dates = pd.date_range("2010-01-01", periods=120, freq="MS")
    return pd.DataFrame({"date": dates, "sales": 10 + np.sin(month * np.pi / 6) + 0.02 * month + noise, "noise": noise})


@pytest.mark.long
def test_a_frame_a_file_and_numbers(table, tmp_path):
    model = SequenceForecaster(**QUICK, target="sales").fit(table)
    came = model.predict()
    assert came.shape == (3,)
    assert 9 < came.min() <= came.max() < 16
    np.testing.assert_array_equal(model.predict(table), came)
    np.testing.assert_array_equal(model.predict(pl.from_pandas(table)), came)
    table.to_csv(tmp_path / "table.csv", index=False)
    np.testing.assert_allclose(model.predict(tmp_path / "table.csv"), came)
    assert np.abs(model.predict(table[:-1]) - came).max() > 1e-3
    quantiles = model.predict_quantiles()
    assert quantiles.shape == (3, 3)
    np.testing.assert_array_equal(quantiles[:, model.recipe_.quantiles.index(0.5)], came)
    assert model.recipe_.inputs == ("noise",)
    assert "monthly" in model.understood_[0]
    assert model.n_iter_ == len(model.history_) > 0
    alone = SequenceForecaster(**QUICK).fit(table["sales"].to_numpy())
    assert alone.predict().shape == alone.predict(table["sales"].tolist()).shape == (3,)


@pytest.mark.long
def test_masked_values_are_missing(table):
    values, gaps = table["sales"].to_numpy(), np.arange(120) % 7 == 3
    with_nan = np.where(gaps, np.nan, values)
    hidden = np.ma.array(np.where(gaps, 1e6, values), mask=gaps)
    expected = SequenceForecaster(**QUICK).fit(with_nan).predict()
    np.testing.assert_array_equal(SequenceForecaster(**QUICK).fit(hidden).predict(), expected)
    rows = SequenceForecaster(**QUICK, target="0").fit(list(np.ma.stack([hidden, hidden], axis=1)))
    columns = SequenceForecaster(**QUICK, target="0").fit(np.stack([with_nan, with_nan], axis=1))
    np.testing.assert_array_equal(rows.predict(), columns.predict())


@pytest.mark.long
def test_quantiles_between_those_of_the_fit(table):
    model = SequenceForecaster(**QUICK, target="sales").fit(table)
    known, levels = model.predict_quantiles(), model.predict_quantiles(quantiles=(0.9, 0.3, 0.5, 0.1))
    np.testing.assert_array_equal(levels[:, [3, 2, 0]], known)
    share = NormalDist().inv_cdf(0.3) / NormalDist().inv_cdf(0.1)  # a normal distribution's 0.3 is that
    np.testing.assert_allclose(levels[:, 1], known[:, 1] + share * (known[:, 0] - known[:, 1]))
    assert model.predict_quantiles(quantiles=[0.5 - 0.8 / 2]).shape == (3, 1)  # 0.09999999999999998
    for level in (0.05, 0.95, np.nan):
        with pytest.raises(ValueError, match=r"expected quantiles from 0.1 to 0.9, .* train it with a wider range"):
            model.predict_quantiles(quantiles=(0.5, level))
    alone = SequenceForecaster(**QUICK, target="sales", quantiles=()).fit(table)
    np.testing.assert_array_equal(alone.predict_quantiles(quantiles=[0.5])[:, 0], alone.predict())


@pytest.mark.long
def test_quantiles_stay_apart_where_few_rows_are_held_out(rng):
    series = np.sin(np.arange(60) * np.pi / 6) + 5 + rng.normal(size=60) * 0.1
    model = SequenceForecaster(**QUICK | {"epochs": 12}).fit(series)
    low, middle, high = model.predict_quantiles().T
    assert (low < middle - 0.02).all()
    assert (high > middle + 0.02).all()


@pytest.mark.long
def test_forecasts_have_names_and_times(table):
    both = pd.concat([table.assign(shop="a"), table[:-2].assign(shop="b")])
    model = SequenceForecaster(**QUICK, target="sales", id="shop").fit(both)
    came = model.forecasts()
    assert came.ids == ["a", "b"]
    assert came.times[:, 0].astype("datetime64[D]").astype(str).tolist() == ["2020-01-01", "2019-11-01"]
    np.testing.assert_array_equal(came.median[..., 0], model.predict())


@pytest.mark.long
def test_series_too_short_to_hold_some_of_it_out(table):
    model = SequenceForecaster(**QUICK | {"horizon": 6}, target="sales").fit(table[:30])
    assert (
        "no validation part: the networks are trained on all rows before the test part, for all epochs"
        in model.understood_
    )
    assert model.n_iter_ == 3
    whole = SequenceForecaster(**QUICK | {"horizon": 6}, target="sales", validation=0.0).fit(table[:30])
    np.testing.assert_array_equal(model.predict(), whole.predict())
    with pytest.raises(ValueError, match="too few rows for the validation part"):
        SequenceForecaster(**QUICK | {"horizon": 6}, target="sales", validation=0.15).fit(table[:30])
    held = SequenceForecaster(**QUICK, target="sales").fit(table)
    assert "no validation part" not in " ".join(held.understood_)


@pytest.mark.long
def test_several_series_and_targets(table):
    both = pd.concat([table.assign(shop="a"), table.assign(shop="b", sales=table["sales"] * 3)])
    model = SequenceForecaster(**QUICK, target=("sales", "noise"), id="shop").fit(both)
    assert model.predict().shape == (2, 3, 2)
    assert model.predict_quantiles().shape == (2, 3, 2, 3)
    assert (model.predict()[1, :, 0] > 2 * model.predict()[0, :, 0]).all()
    assert model.predict(both[both["shop"] == "b"]).shape == (1, 3, 2)
    new = SequenceForecaster(**QUICK, target="sales", id="shop").fit(both)
    assert new.predict(table.assign(shop="new")).shape == (1, 3)


def test_the_score_is_what_is_saved_of_the_rule_s_error(table):
    model = SequenceForecaster(**QUICK, target="sales").fit(table[:100])
    actual = table["sales"].to_numpy()[97:100]
    ours = np.abs(model.predict(table[:97]) - actual).sum()
    latest = np.abs(table["sales"][96] - actual).sum()
    assert model.score(table[:100]) == pytest.approx(1 - ours / latest)


@pytest.mark.slow
def test_a_search_over_splits_in_time(table):
    model = SequenceForecaster(**QUICK, target="sales")
    splits = TimeSeriesSplit(2, test_size=24)
    search = GridSearchCV(model, {"seasons": [(12,), ()]}, cv=splits, n_jobs=2).fit(table)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    assert search.predict(table).shape == (3,)


@pytest.mark.long
def test_it_repeats_is_cloned_and_runs_without_torch(table, tmp_path):
    model = SequenceForecaster(**QUICK, target="sales")
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        model.predict()
    came = model.fit(table).predict()
    np.testing.assert_array_equal(clone(model).fit(table).predict(), came)
    assert clone(model).set_params(random_state=1).fit(table).history_ != model.history_
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys\n"
        "print(*pickle.loads(open('model.pickle', 'rb').read()).predict().tolist())\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*map(str, came.tolist()), "False"]


def test_tables_that_cannot_be_used(table):
    with pytest.raises(ValueError, match="expected `target=…`, one or more of"):
        SequenceForecaster(**QUICK).fit(table)
    with pytest.raises(ValueError, match="expected target to be one of sales, noise, got 'sale'"):
        SequenceForecaster(**QUICK, target="sale").fit(table)
    with pytest.raises(ValueError, match="got 3 axes"):
        SequenceForecaster(**QUICK).fit(np.zeros((2, 3, 4)))
    model = SequenceForecaster(**QUICK, target="sales").fit(table)
    with pytest.raises(ValueError, match=r"expected at least 12 rows .* found 5"):
        model.predict(table[:5])
