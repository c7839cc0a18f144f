"""The scikit-learn estimators: their inputs, outputs, and use of the trained networks."""

import os
import pickle
import signal
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import cellstack
from cellstack import train
from cellstack.sklearn import SequenceClassifier, SequenceRegressor

QUICK = {"units": 6, "epochs": 12, "lr": 0.03, "dropout": 0.0, "bidirectional": False, "random_state": 0}
QUICK |= {"noise": 0.0, "offset": 0.0, "validation": 0.15, "threads": 1}
BRIEF = QUICK | {"epochs": 2}  # to compare trainings


@pytest.fixture
def ragged(rng):
    """Sixty sequences `[T, 2]` of 5 to 8 steps, and the sign of the first channel's mean as a word."""
    X = [rng.normal(size=(length, 2)).astype(np.float32) + 0.7 for length in rng.integers(5, 9, 60)]
    for n, x in enumerate(X):
        x[:, 0] = x[:, 0] * 0.5 - 1.5 * (n % 2)
    return X, np.array(["high", "low"])[[n % 2 for n in range(60)]]


@pytest.fixture
def table(rng):
    """Sixty univariate sequences of six steps as `[n, T]`, and whether they rise."""
    y = np.arange(60) % 2
    return rng.normal(size=(60, 6)) * 0.3 + np.linspace(-1, 1, 6) * (2 * y[:, None] - 1), y


def test_ragged_lists_and_words_as_classes(ragged):
    X, y = ragged
    model = SequenceClassifier(**QUICK).fit(X, y)
    assert model.classes_.tolist() == ["high", "low"]
    assert model.n_features_in_ == 2
    assert model.score(X, y) > 0.95
    probabilities = model.predict_proba(X)
    assert probabilities.shape == (60, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-15)
    assert log_loss(y, probabilities) < 0.3
    assert (model.classes_[probabilities.argmax(1)] == model.predict(X)).all()
    assert model.n_iter_ == len(model.history_) == 12
    assert {"loss", "validation_loss", "accuracy"} <= model.history_[0].keys()


def test_an_epoch_is_chosen_only_where_there_is_enough_to_choose_by(ragged):
    X, y = ragged
    few = SequenceClassifier(**QUICK | {"validation": None}).fit(X, y)
    assert "validation_loss" not in few.history_[0]
    many = SequenceClassifier(**QUICK | {"validation": None, "epochs": 1}).fit(X * 3, [*y] * 3)  # 27 of 180
    assert "validation_loss" in many.history_[0]


@pytest.mark.long
def test_small_changes_on_large_swings_are_seen(rng):
    """Whether a wave rises in small steps or smoothly is less than noise to its level, and plain in its changes."""
    n = np.arange(40)
    waves = [np.sin(n / 6 + phase) for phase in rng.uniform(0, 6, 60)]
    X = np.stack([wave + 0.04 * (-1) ** n * (k % 2) for k, wave in enumerate(waves)])
    y = np.arange(60) % 2
    how = QUICK | {"epochs": 60, "validation": 0.0, "filters": 0}
    assert SequenceClassifier(**how).fit(X, y).score(X, y) == 1.0
    assert SequenceClassifier(**how, changes=False).fit(X, y).score(X, y) < 1.0


def test_answers_of_steps_are_averaged_and_states_are_not(ragged):
    X, y = ragged
    kinds = [SequenceClassifier(**QUICK | {"epochs": 1}, every_step=each).fit(X, y) for each in (False, True)]
    pools = [node for model in kinds for node in model.network_.nodes if isinstance(node, cellstack.nodes.GlobalPool)]
    assert [pool.mode for pool in pools] == ["max", "mean"]
    np.testing.assert_allclose(kinds[1].predict_proba(X).sum(1), 1, rtol=1e-6)


@pytest.mark.long
def test_the_forms_of_one_and_the_same_sequences(ragged, table):
    same = np.stack([x[:5] for x in ragged[0]])  # [60, 5, 2]
    y = ragged[1]
    want = SequenceClassifier(**BRIEF).fit(same, y).predict_proba(same)
    for form in (list(same), tuple(same), same.tolist()):
        np.testing.assert_array_equal(SequenceClassifier(**BRIEF).fit(form, y).predict_proba(form), want)
    objects = np.empty(60, object)
    objects[:] = list(same)
    for form in (objects, pd.Series(list(same))):
        np.testing.assert_array_equal(SequenceClassifier(**BRIEF).fit(form, y).predict_proba(form), want)
    X, y = table
    want = SequenceClassifier(**BRIEF).fit(X, y).predict_proba(X)
    for form in (X[:, :, None], list(X), pd.DataFrame(X), pl.DataFrame(X), X.tolist()):
        np.testing.assert_array_equal(SequenceClassifier(**BRIEF).fit(form, y).predict_proba(form), want)
    uneven = [x.tolist()[: 4 + n % 3] for n, x in enumerate(X)]
    assert SequenceClassifier(**BRIEF).fit(uneven, y).predict(uneven[:3]).shape == (3,)


def test_a_table_is_held_to_its_columns_and_sequences_to_their_channels(ragged, table):
    X, y = table
    model = SequenceClassifier(**QUICK).fit(pd.DataFrame(X, columns=list("abcdef")), y)
    assert model.feature_names_in_.tolist() == list("abcdef")
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(pd.DataFrame(X[:, :4], columns=list("abcd")))
    with pytest.raises(ValueError, match="4 features, but SequenceClassifier is expecting 6"):
        model.fit(X, y).predict(X[:, :4])
    with pytest.raises(ValueError, match=r"expected X as in fit, a table \[n, T\], got sequences"):
        model.predict(X[:, :, None])
    model.fit(*ragged)
    assert not hasattr(model, "feature_names_in_")
    assert model.predict([ragged[0][0][:2]]).shape == (1,)
    with pytest.raises(ValueError, match="3 features, but SequenceClassifier is expecting 2"):
        model.predict(np.zeros((2, 5, 3)))


@pytest.mark.parametrize(
    ("X", "said"),
    [
        ([np.zeros((3, 2)), np.zeros((3, 1))], r"got 3 steps in the shortest, channels \[1, 2\]"),
        ([np.zeros((3, 2)), np.zeros((0, 2))], "minimum of 1 is required"),
        ([np.zeros((3, 2)), np.full((3, 2), np.inf)], "infinity"),
        (np.zeros((2, 0, 3)), "at least one step"),
        (np.zeros((2, 2, 2, 2)), "dim"),
        (np.zeros(2), "2D array"),
    ],
)
def test_sequences_that_are_none(X, said):
    with pytest.raises(ValueError, match=said):
        SequenceClassifier(**QUICK).fit(X, [0, 1])


def test_classes_and_settings_that_cannot_be(table):
    X, y = table
    with pytest.raises(ValueError, match="at least two classes, got one class, 1"):
        SequenceClassifier().fit(X[y == 1], y[y == 1])
    with pytest.raises(ValueError, match="NaN"):
        SequenceRegressor().fit(X, np.where(y, np.nan, 1.0))
    with pytest.raises(ValueError, match=r"pooling to be one of mean, max, last.*, got 'sum'"):
        SequenceClassifier(pooling="sum").fit(X, y)
    with pytest.raises(ValueError, match="inconsistent"):
        SequenceClassifier().fit(X, y[:-1])
    with pytest.raises(NotFittedError):
        SequenceRegressor().predict(X)


def test_gaps_are_missing_values(ragged):
    X, y = [x.copy() for x in ragged[0]], ragged[1]
    for n, x in enumerate(X):
        x[n % len(x)] = np.nan
        x[(n + 1) % len(x), 1] = np.nan
    model = SequenceClassifier(**QUICK).fit(X, y)
    assert model.score(X, y) > 0.9
    cut = [x[~np.isnan(x).all(1)] for x in X]  # steps without a value are left out
    np.testing.assert_allclose(model.predict_proba(cut), model.predict_proba(X), atol=1e-6)


def masked(x, at):
    """Return `x` with nonsense behind the mask."""
    x = np.ma.array(x, copy=True)
    x[at] = 1e6
    x[at] = np.ma.masked
    return x


@pytest.mark.long
def test_a_mask_says_what_is_missing(ragged, table, rng):
    def same(X, Y, y):
        """Both are fitted and answered alike."""
        first, second = (SequenceClassifier(**QUICK | {"epochs": 2}).fit(one, y) for one in (X, Y))
        np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(Y))

    X, y = table
    gaps = rng.random(X.shape) < 0.2
    with_nan = np.where(gaps, np.nan, X)
    same(masked(X, gaps), with_nan, y)
    same(masked(X, gaps)[:, :, None], with_nan[:, :, None], y)
    same([masked(one, gap) for one, gap in zip(X, gaps, strict=True)], list(with_nan), y)
    whole = np.rint(10 * X).astype(int)
    same(masked(whole, gaps), np.where(gaps, np.nan, whole), y)
    same(np.ma.array(X), X, y)
    cut = [masked(x, (n % len(x), 1)) for n, x in enumerate(ragged[0])]
    same(cut, [x.filled(np.nan) for x in cut], ragged[1])
    assert {x.dtype for x in cut} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="expected real numbers in a masked array, got complex128"):
        SequenceClassifier(**QUICK).fit(masked(X + 0j, gaps), y)


@pytest.mark.parametrize("kind", [SequenceClassifier, SequenceRegressor])
def test_masked_targets_and_weights_are_refused(kind, table):
    X, y = table
    model, some = kind(**QUICK | {"epochs": 1}), np.arange(60) == 3
    model.fit(X, np.ma.array(y), np.ma.ones(60))
    for called in (model.fit, model.score):
        with pytest.raises(ValueError, match="y: masked values aren't supported: leave out their sequences"):
            called(X, np.ma.array(y, mask=some))
        with pytest.raises(ValueError, match="sample_weight: masked values aren't supported"):
            called(X, y, np.ma.array(np.ones(60), mask=some))
    with pytest.raises(ValueError, match="y: masked values"):
        SequenceRegressor(**QUICK).fit(X, [np.ma.array([1.0, n], mask=[n == 3, False]) for n in range(60)])


def test_targets_that_float32_cannot_hold_are_named(rng):
    X = rng.normal(size=(40, 5, 2))
    y = X[:, -1]
    quick = QUICK | {"epochs": 2}
    for column in (y, y[:, 0]):
        with pytest.raises(ValueError, match=r"y: the targets overflow float32, .*divide them by a constant, got"):
            SequenceRegressor(**quick).fit(X, column * 1e300)
        with pytest.raises(ValueError, match=r"y: the targets underflow float32, .*multiply them by a constant"):
            SequenceRegressor(**quick).fit(X, column * 1e-300)
    with pytest.raises(
        ValueError, match=r"y: the targets' range, -3\.3e\+38 to 3\.3e\+38, overflows float32: divide them"
    ):
        SequenceRegressor(**quick).fit(X, np.sign(y) * 3.3e38)
    with pytest.raises(ValueError, match=r"y: the targets' range, .*underflows float32: multiply them"):
        SequenceRegressor(**quick).fit(X, y * [1.0, 1e-40])
    expected = SequenceRegressor(**quick).fit(X, y)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        model = SequenceRegressor(**quick).fit(X, y * scale)
        np.testing.assert_allclose(model.predict(X) / scale, expected.predict(X), atol=1e-5)
        assert model.history_[-1]["rmse"] / scale == pytest.approx(expected.history_[-1]["rmse"], rel=1e-5)


@pytest.mark.long
def test_numbers_one_or_several(rng):
    X = rng.normal(size=(80, 6, 2))
    y = np.stack([X[:, :, 0].sum(1), 100 + 10 * X[:, :, 1].mean(1)], 1)
    quick = QUICK | {"epochs": 30}
    model = SequenceRegressor(**quick).fit(X, y)
    assert model.predict(X).shape == (80, 2)
    assert model.score(X, y) > 0.8
    one = SequenceRegressor(**quick).fit(X, y[:, 1])
    assert one.predict(X).shape == (80,)
    assert one.score(X, y[:, 1]) > 0.8
    assert "rmse" in one.history_[0]


@pytest.mark.long
def test_the_seed_is_that_of_train_fit_and_repeats(ragged):
    X, y = ragged
    fit = lambda **seed: SequenceClassifier(**(BRIEF | seed)).fit(X, y).predict_proba(X)  # noqa: E731
    np.testing.assert_array_equal(fit(), fit(random_state=np.int64(0)))
    assert np.abs(fit() - fit(random_state=1)).max() > 1e-3
    options = {name: value for name, value in BRIEF.items() if name != "random_state"}
    same = train.fit(X, y, seed=0, patience=20, **options)
    loss = [entry["loss"] for entry in same.history]
    assert loss == [entry["loss"] for entry in SequenceClassifier(**BRIEF, patience=20).fit(X, y).history_]
    drawn = [fit(random_state=np.random.RandomState(7)) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)
    np.random.seed(3)  # noqa: NPY002 - what random_state=None draws from
    first = fit(random_state=None)
    np.random.seed(3)  # noqa: NPY002
    np.testing.assert_array_equal(first, fit(random_state=None))


def test_a_warm_start_goes_on_from_a_network(table):
    X, y = table
    first = SequenceClassifier(**QUICK).fit(X, y)
    more = SequenceClassifier(**QUICK, init=first.network_).fit(X, y)
    assert more.history_[0]["validation_loss"] < first.history_[0]["validation_loss"] / 2
    with pytest.raises(ValueError, match="init"):
        SequenceClassifier(**QUICK | {"units": 7}, init=first.network_).fit(X, y)


@pytest.mark.long
def test_weights_of_samples_and_classes(table):
    X, _ = table
    y = np.arange(60) % 3 == 0  # nothing to be learned: what comes out are the classes' shares

    def share(weight=None, **more):
        model = SequenceClassifier(**BRIEF | {"validation": 0.0, "epochs": 30, "lr": 0.01} | more)
        return model.fit(X * 0, y, sample_weight=weight).predict_proba(X[:1] * 0)[0, 1]

    assert share() < 0.42
    assert 0.44 < share(class_weight="balanced") < 0.56
    assert share(class_weight={False: 1.0, True: 10.0}) > 0.6
    assert share(np.where(y, 10.0, 1.0)) == share(class_weight={False: 1.0, True: 10.0})
    assert share(np.where(y, 5.0, 1.0), class_weight={False: 1.0, True: 2.0}) == share(np.where(y, 10.0, 1.0))
    with pytest.raises(ValueError, match="Negative"):
        share(-np.ones(60))


@pytest.mark.slow
def test_a_pipeline_and_a_search_in_two_processes(ragged, table):
    X, y = table
    pipeline = make_pipeline(StandardScaler(), SequenceClassifier(**QUICK))
    search = GridSearchCV(pipeline, {"sequenceclassifier__units": [2, (4, 4)]}, cv=2, n_jobs=2).fit(X, y)
    assert search.best_score_ > 0.9
    assert set(search.cv_results_["param_sequenceclassifier__units"]) == {2, (4, 4)}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    alone = GridSearchCV(pipeline, search.param_grid, cv=2).fit(X, y)
    np.testing.assert_array_equal(alone.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"])
    X, y = ragged
    differences = FunctionTransformer(lambda sequences: [np.diff(x, axis=0, prepend=0) for x in sequences])
    assert cross_val_score(make_pipeline(differences, SequenceClassifier(**QUICK)), X, y, cv=2).mean() > 0.8


def test_clones_and_parameters():
    model = SequenceClassifier(units=(3, 4), class_weight="balanced")
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(cell="gru").cell == "gru"
    assert "class_weight" not in SequenceRegressor().get_params()
    assert repr(model) == "SequenceClassifier(cell='gru', class_weight='balanced', units=(3, 4))"


@pytest.mark.long
def test_a_pickle_is_run_without_torch(ragged, tmp_path):
    X, y = ragged
    model = SequenceClassifier(**QUICK).fit(X, y)
    joblib.dump((model, X), tmp_path / "model.joblib")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, X)))
    code = (
        "import joblib, pickle, sys\n"
        "model, X = joblib.load('model.joblib')\n"
        "print(*model.predict(X), sep=',')\n"
        "model, X = pickle.loads(open('model.pickle', 'rb').read())\n"
        "print(*model.predict(X), sep=',')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [",".join(model.predict(X))] * 2 + ["False"]


def test_the_network_goes_where_networks_go(ragged, tmp_path):
    X, y = ragged
    model = SequenceClassifier(**QUICK).fit(X, y)
    model.network_.save(tmp_path / "net.safetensors")
    sequences = train.Sequences(X, None, (), "X")
    loaded = cellstack.load(tmp_path / "net.safetensors")
    answered = train.predict.sequences(loaded, sequences, "net.safetensors")
    assert list(answered) == model.predict(X).tolist()
    np.testing.assert_allclose(answered.probabilities, model.predict_proba(X), rtol=1e-6)


def test_ctrl_c_leaves_a_fitted_estimator_and_stops_what_called(table, monkeypatch):
    X, y = table
    model = SequenceClassifier(**QUICK | {"epochs": 1000})
    fetched = []
    fetch = train.custom.Labelled.fetch

    def interrupting(self, indices):
        fetched.append(len(indices))
        if len(fetched) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return fetch(self, indices)

    monkeypatch.setattr(train.custom.Labelled, "fetch", interrupting)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    monkeypatch.undo()
    assert 0 < model.n_iter_ < 1000
    assert model.predict(X).shape == (60,)


@pytest.mark.parametrize("name", ["epochs", "batch", "patience", "lr", "noise"])
def test_a_setting_that_is_no_number_is_named(name):
    x = np.random.default_rng(0).normal(size=(12, 5, 2)).astype("f4")
    with pytest.raises(ValueError, match=f"expected {name} to be (an integer|a number), got 'a'"):
        SequenceClassifier(units=2, **{"epochs": 1, name: "a"}).fit(x, [0, 1] * 6)
