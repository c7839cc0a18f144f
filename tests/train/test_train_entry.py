"""`train.fit`: forms of data, users' own parts of the training, and errors."""

import json
import re
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack import FormatError, load, train
from cellstack.train import UsageError
from cellstack.train.custom import as_sequences
from cellstack.train.data.frames import grouped
from cellstack.train.model import Noise
from cellstack.train.trained import trained

SMALL = {"units": 4, "epochs": 2, "threads": 1}


@pytest.fixture
def toy(rng):
    """40 sequences `[12, 3]` of two classes, one of them three times as loud."""
    x, y = rng.normal(size=(40, 12, 3)), np.tile(["calm", "busy"], 20)
    x[y == "busy"] *= 3
    return x, y


def long_form(x, y):
    """The same in long form, with a row per step."""
    steps = x.shape[1]
    columns = {f"c{n}": x[..., n].ravel() for n in range(x.shape[2])}
    return pd.DataFrame(
        {"id": np.repeat(np.arange(len(x)), steps), "t": np.tile(np.arange(steps), len(x)), **columns}
        | {"state": np.repeat(y, steps)}
    )


class Items(torch.utils.data.Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, n):
        return tuple(column[n] for column in self.columns)


# ── forms of the same data ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_every_form_of_the_same_data_gives_the_same_network(toy):
    x, y = toy
    frame = long_form(x, y)
    shuffled = frame.sample(frac=1, random_state=1).sort_values("id", kind="stable")  # only the times are shuffled
    by_id = pd.Series(y, index=np.arange(len(y)))
    forms = [
        ((x, y), {}),
        ((x.astype(np.float32), list(y)), {}),
        (([*x], y), {}),
        (([row.tolist() for row in x], pd.Categorical(y)), {}),
        ((torch.from_numpy(x), y), {}),
        ((Items(x, y), None), {}),
        ((frame.drop(columns="t"), "state"), {"id": "id"}),
        ((shuffled, "state"), {"id": "id", "time": "t"}),
        ((pl.from_pandas(shuffled), "state"), {"id": "id", "time": "t"}),
        ((frame.drop(columns="state"), by_id), {"id": "id", "features": ["c0", "c1", "c2"]}),
        ((frame.drop(columns=["state", "t"]), dict(by_id)), {"id": "id"}),
    ]
    expected = None
    for (data, labels), how in forms:
        result = train.fit(data, labels, **how, **SMALL)
        assert result.labels == ("busy", "calm")
        expected = expected or result.history
        assert result.history == expected


def test_a_mask_says_what_is_missing(toy, rng):
    x, y = toy
    gaps = rng.random(x.shape) < 0.2
    expected = train.fit(np.where(gaps, np.nan, x), y, **SMALL).history
    hidden = np.ma.array(np.where(gaps, 1e6, x), mask=gaps)
    for masked in (hidden, [*hidden], Items(hidden, y)):
        found = train.fit(masked, None if isinstance(masked, Items) else y, **SMALL)
        assert found.history == expected


def test_files_give_the_same_as_arrays(toy, tmp_path):
    x, y = toy
    x = x.astype(np.float32)
    frame = long_form(x, y)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    frame.to_csv(tmp_path / "a.csv", index=False, float_format="%.9g")
    frame.to_parquet(tmp_path / "a.parquet")
    expected = train.fit(x, y, **SMALL).history
    assert train.fit(tmp_path / "a.npz", **SMALL).history == expected
    for name in ("a.csv", "a.parquet"):
        assert train.fit(str(tmp_path / name), "state", id="id", time="t", **SMALL).history == expected


def test_ragged_sequences_in_npz(rng, tmp_path):
    x, lengths = rng.normal(size=(20, 9, 2)), rng.integers(3, 10, 20)
    y = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y, lengths=lengths)
    read = train.read_sequences(tmp_path / "a.npz")
    assert read.lengths.tolist() == lengths.tolist()
    np.testing.assert_array_equal(read.x[3], x[3, : lengths[3]].astype(np.float32))
    assert read.labels == (0, 1)
    np.savez(tmp_path / "a.npz", x=x, y=y, lengths=lengths + 9)
    with pytest.raises(UsageError, match=r"a\.npz: expected lengths from 1 to T = 9, got 1\d"):
        train.read_sequences(tmp_path / "a.npz")


def test_npz_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([np.zeros((3, 2)), None], object))
    with pytest.raises(
        FormatError, match="arrays of objects aren't supported, because pickles aren't read: save x padded"
    ):
        train.read_sequences(tmp_path / "a.npz")


def test_an_iterable_is_refused(toy):
    x, y = toy
    for source in (zip(x, y, strict=True), lambda: zip(x, y, strict=True)):
        with pytest.raises(UsageError, match="expected an array"):
            train.fit(source, **SMALL)


def test_a_network_is_run_on_what_it_was_trained_on(toy):
    x, y = toy
    frame = long_form(x, y).assign(place="north")
    with pytest.warns(UserWarning, match="place"):
        result = train.fit(frame, "state", id="id", time="t", test=0.2, **SMALL)
    whole = result.predict(frame, "state")
    assert whole.ids == tuple(range(40))
    assert whole.scores["confusion"].sum() == 40
    some = result.network.predict([x[3], x[1, :5]])
    assert some[0] == whole[3]
    with pytest.raises(UsageError, match="expected features among"):
        result.predict(frame.drop(columns="c1"))
    with pytest.raises(FormatError, match="expected 3 channels, found 2"):
        result.predict(x[..., :2])


# ── classes and targets ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        (["b", "a"] * 20, ("a", "b")),
        (np.array([b"b", b"a"] * 20), ("a", "b")),
        ([7, -1] * 20, (-1, 7)),
        ([np.int8(7), np.int8(-1)] * 20, (-1, 7)),
        (np.array([7, 1] * 20, np.uint8), (1, 7)),
        ([True, False] * 20, (False, True)),
        (np.array([1.5, 0.0] * 20), None),
        (["rare", *["often"] * 39], ("often", "rare")),
        (pd.Series(["b", "a"] * 20, dtype="string"), ("a", "b")),
        (pl.Series(["b", "a"] * 20), ("a", "b")),
    ],
)
def test_labels_of_any_type(toy, tmp_path, y, labels):
    result = train.fit(toy[0], y, **SMALL, test=0.2)
    assert result.labels == (labels or ())
    assert result.network.metadata["task"] == ("classify" if labels else "regress")
    result.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors")
    assert tuple(net.metadata["labels"]) == result.labels
    truth = as_sequences(toy[0], y, labels=labels)
    found = net.predict(truth)
    assert set(found) <= set(labels) if labels else all(type(one) is float for one in found)


def test_integers_that_may_be_classes_or_numbers(toy):
    with pytest.raises(
        UsageError,
        match="40 distinct integers among 40 may be classes or numbers: pass task='classify' or task='regress'",
    ):
        train.fit(toy[0], np.arange(40), **SMALL)
    assert train.fit(toy[0], np.arange(40), task="regress", **SMALL).labels == ()
    assert train.fit(toy[0], np.arange(40) / 2, **SMALL).labels == ()
    assert len(train.fit(toy[0], np.arange(40), task="classify", validation=0, **SMALL).labels) == 40


def test_zeros_and_ones_and_one_hot_rows_may_be_classes_or_numbers(toy):
    ones = np.array([1.0, 0.0] * 20)
    rows = np.eye(2)[ones.astype(int)]
    for y, message in (
        (ones, "0.0 and 1.0 may be classes or targets: pass task="),
        (rows, r"pass the classes, y.argmax"),
    ):
        with pytest.raises(UsageError, match=message):
            train.fit(toy[0], y, **SMALL)
        assert train.fit(toy[0], y, task="regress", **SMALL).labels == ()
    assert train.fit(toy[0], ones, task="classify", **SMALL).labels == (0, 1)
    with pytest.raises(UsageError, match=r"got \(40, 2\): pass the classes of one-hot rows, y.argmax"):
        train.fit(toy[0], rows.astype(int), **SMALL)
    with pytest.raises(UsageError, match=r"got \(40, 1\): pass y\[:, 0\]"):
        train.fit(toy[0], ones.astype(str)[:, None], **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda x: x.swapaxes(0, 1)}, r"expected one entry per sequence, 12, got 40; .* pass x.swapaxes\(0, 1\)"),
        (
            {"x": lambda x: [(one, 1) for one in x], "y": None},
            "got a pair: pass the sequences as x, the labels or numbers as y",
        ),
        ({"x": lambda x: (x, x)}, r"x\[0\]: expected \[T, C\], got .*: a pair \(x, y\) is passed as two arguments"),
        ({"units": 8.0}, "expected units to be integers of at least 1, one for each layer, got 8.0"),
        ({"units": "8"}, "expected units to be integers of at least 1, one for each layer, got '8'"),
        ({"units": (8, True)}, "expected units to be integers of at least 1, one for each layer, got 8, True"),
        ({"units": ()}, "expected units to be integers of at least 1, one for each layer, got none"),
        ({"optimizer": "adam"}, "expected optimizer to be a function, such as .*, got 'adam'"),
        ({"loss": "mse"}, "expected loss to be a function, such as .*, got 'mse'"),
        ({"metrics": ["accuracy"]}, r"expected metrics to be functions by name, .*, got \['accuracy'\]"),
        ({"callbacks": print}, "expected callbacks to be a list of functions"),
        ({"pooling": "none"}, "pooling none applies only to one class or target per step, got one per sequence"),
        ({"threads": 0}, "expected threads >= 1, got 0"),
        ({"y": None}, "neither classes nor targets: pass them as y"),
    ],
)
def test_wrong_arguments_are_named(toy, changes, message):
    given = {"x": lambda x: x, "y": ["a", "b"] * 20, **SMALL} | changes
    with pytest.raises(UsageError, match=message):
        train.fit(given.pop("x")(np.stack(toy[0])), given.pop("y"), **given)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_scores_on_the_training_data_are_refused(toy, name):
    y = ["a", "b"] * 20
    for given in ((toy[0], y), toy[0]):
        with pytest.raises(UsageError, match=f"{name}: this is the training data"):
            train.fit(toy[0], y, **SMALL, **{name: given})


def test_units_may_be_a_numpy_integer(toy):
    assert train.fit(toy[0], ["a", "b"] * 20, units=np.int64(4), epochs=1, threads=1).network.cells[0].spec.units == 4


@pytest.mark.parametrize(
    ("y", "how", "message"),
    [
        ([np.nan, *np.arange(39.0)], {}, r"y: missing values aren't supported, got nan at position 0 \(1 of 40"),
        ([*np.arange(39.0), -np.inf], {}, "y: expected finite numbers, got -inf at position 39"),
        ([*np.arange(39.0), 1e300], {}, r"y: the targets overflow float32, .* got 1e\+300 at position 39"),
        (np.arange(40) * 1e-300, {}, "y: the targets underflow float32, .*multiply them by a constant"),
        (np.ma.array(np.arange(40.0), mask=np.arange(40) == 7), {}, "y: masked values aren't supported: leave out"),
        (["a", "b"] * 20, {"sample_weight": np.ma.array(np.ones(40), mask=True)}, "sample_weight: masked values"),
        ([None, *"ab" * 19, "c"], {}, "got None at position 0"),
        (pd.Series([pd.NA, *["a"] * 39], dtype="string"), {}, "got None at position 0"),
        (["a", 1] * 20, {}, "y: expected entries of one type, got integers and text"),
        (["a"] * 39, {}, "y: expected one entry per sequence, 40, got 39"),
        (["a"] * 40, {}, "expected at least two classes, got only the class 'a'"),
        (["a", "b"] * 20, {"task": "regress"}, "y: expected numbers with task regress, got text"),
        ([0.5, 1] * 20, {"task": "classify"}, "got 0.5 at position 0: use task='regress' for numbers"),
        ([object()] * 40, {}, "y: expected text, numbers or bools, got object"),
        (["a", "b"] * 20, {"task": "sort"}, "expected task to be one of classify, regress, got 'sort'"),
        (
            ["a", "b"] * 20,
            {"test": (np.ones((2, 5, 3)), ["a", "c"])},
            r"test: .* 'a', 'b', as in training, got 'c' \(1 of 2\)",
        ),
        (["a", "b"] * 20, {"test": (np.ones((2, 5, 2)), ["a", "b"])}, "expected 3 channels, as trained on, found 2"),
        (
            ["a", "b"] * 20,
            {"validation": np.ones((2, 5, 3))},
            "validation: the sequences have neither classes nor targets",
        ),
        (["a", "b"] * 20, {"class_weight": {"c": 2}}, "class_weight: expected classes among 'a', 'b', got 'c'"),
        (["a", "b"] * 20, {"class_weight": "even"}, "expected class_weight to be 'balanced' or weights by class"),
        (["a", "b"] * 20, {"sample_weight": np.ones(3)}, r"sample_weight: expected one number per sequence, \[40\]"),
        (
            ["a", "b"] * 20,
            {"sample_weight": -np.ones(40)},
            "sample_weight: expected finite numbers >= 0, got -1.0 at 0",
        ),
        (np.arange(40.0), {"class_weight": "balanced"}, "class_weight applies only to classes"),
        (np.ones((40, 12)), {}, "the shape is ambiguous, because there are 12 targets and 12 steps"),
        (["a", "b"] * 20, {"id": "machine"}, "id applies only to frames"),
        (["a", "b"] * 20, {"test": 1.5}, r"expected test to be a share in \(0, 1\)"),
    ],
)
def test_invalid_labels(toy, y, how, message):
    with pytest.raises((UsageError, FormatError), match=message):
        train.fit(toy[0], y, **SMALL, **how)


def test_several_targets(toy):
    y = np.stack([toy[0].mean((1, 2)), 100 + toy[0].std((1, 2))], axis=1)
    result = train.fit(toy[0], y, **{**SMALL, "epochs": 30}, test=0.2)
    assert result.scores.keys() == {"mae", "rmse"}
    found = result.predict(toy[0], y)
    assert np.abs(np.asarray(found)[:, 1] - 100).max() < 10  # in the targets' own units
    assert (len(found[0]), found.probabilities, found.scores.keys()) == (2, None, {"mae", "rmse"})
    assert list(found.columns()) == ["sequence", "predicted_1", "predicted_2"]


def test_a_class_at_every_step(rng):
    x = [rng.normal(size=(int(rng.integers(4, 9)), 1)) for _ in range(60)]
    y = [np.where(np.cumsum(row[:, 0]) > 0, "up", "down") for row in x]
    result = train.fit(x, y, test=0.25, units=8, epochs=25, lr=2e-2, dropout=0, threads=1)
    assert result.network(x[0][None].astype(np.float32)).shape == (1, len(x[0]), 2)
    assert result.scores["accuracy"] > 0.75
    found = result.predict(x, y)
    assert [len(one) for one in found] == [len(one) for one in found.probabilities] == [len(one) for one in x]
    assert found.scores["confusion"].sum() == sum(map(len, x))
    assert np.mean([(one == truth).mean() for one, truth in zip(found, y, strict=True)]) > 0.75
    assert {len(column) for column in found.columns().values()} == {sum(map(len, x))}


# ── rates ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_two_rates(rng):
    """20 sequences of 0.6 s, half of them at 50 Hz and half at 100 Hz."""
    parts = []
    for n in range(20):
        steps, step = ((30, 0.02), (60, 0.01))[n % 2]
        parts.append(pd.DataFrame({"id": n, "time_s": 5 + step * np.arange(steps), "a": rng.normal(size=steps)}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(state=np.where(frame.id % 4 < 2, "busy", "calm"))


RATES = "the median time between steps, by 'time_s', differs: 0.01{0} in 10 sequences and 0.02{0} in 10 sequences"


def test_sequences_sampled_at_different_rates_are_reported(rng):
    frame = at_two_rates(rng)
    with pytest.warns(UserWarning, match=RATES.format("")):
        result = train.fit(frame, "state", id="id", time="time_s", **SMALL)
    assert any(line.startswith(RATES.format("")) for line in result.understood)
    dated = frame.assign(time_s=pd.Timestamp("2024-01-31") + pd.to_timedelta(frame.time_s, unit="s"))
    assert as_sequences(dated, "state", id="id", time="time_s").rates.startswith(RATES.format(" s"))
    assert as_sequences(frame[frame.id % 2 == 0], "state", id="id", time="time_s").rates == ""
    irregular = frame.assign(time_s=np.arange(len(frame)) + frame.id**2)
    assert as_sequences(irregular, id="id", time="time_s").rates == ""
    growing = frame.assign(time_s=frame.time_s * (1 + frame.id))
    assert "differs: from 0.02 to 0.38; `resample=…`" in as_sequences(growing, id="id", time="time_s").rates


def test_resampled_sequences_have_one_rate(rng):
    frame = at_two_rates(rng)
    frame["b"] = 3 * frame.time_s
    frame["own"] = np.arange(len(frame)) % 2 == 0  # a class per step: with the odd steps of 100 Hz, they differ
    rows = frame.sample(frac=1, random_state=0)
    how = {"id": "id", "time": "time_s", "features": ["a", "b"]}
    found = as_sequences(rows, "own", per_step=True, resample=0.02, **how)
    assert set(found.lengths) == {30}
    for n, x, y in zip(found.ids, found.x, found.y, strict=True):
        own = frame[frame.id == n]
        own = own[:: 1 + n % 2]  # every second step of 100 Hz, with the same bits
        np.testing.assert_array_equal(x[:, 0], own.a.to_numpy(np.float32))
        assert [found.labels[k] for k in y] == own.own.tolist()
    for x in as_sequences(rows, resample=0.003, **how).x:  # between the rows
        np.testing.assert_allclose(x[:, 1], 15 + 0.009 * np.arange(len(x)), rtol=1e-6)
    result = train.fit(frame, "state", resample=0.02, **how, **SMALL)  # without a warning
    assert result.network.metadata["table"]["resample"] == 0.02
    assert "interpolated at intervals of 0.02, by 'time_s'" in result.understood
    fast = frame[frame.id % 2 == 1]
    slow = fast[fast.groupby("id").cumcount() % 2 == 0]
    found = [result.predict(part).probabilities for part in (fast, slow)]
    np.testing.assert_array_equal(*found)


def test_a_gap_stays_missing_when_sequences_are_resampled():
    frame = pd.DataFrame({"id": 1, "t": [0.0, 1.0, 2.0, 3.0], "a": [1.0, np.nan, 3.0, 5.0]})
    (x,) = as_sequences(frame, id="id", time="t", resample=0.5).x
    np.testing.assert_array_equal(x[:, 0], [1, np.nan, np.nan, np.nan, 3, 4, 5])
    (x,) = as_sequences(frame[:1], id="id", time="t", resample=0.5).x
    assert x.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("resample", "message"),
    [
        (0, "expected `resample=…` to be the time between steps, a number above 0, got 0"),
        (np.nan, "a number above 0, got nan"),
        ("20ms", "a number above 0, got '20ms'"),
        (1e-6, "expected `resample=…` in the unit of the times .* got 1e-06, which makes 11,700,020 steps of 900"),
    ],
)
def test_invalid_rates(rng, resample, message):
    frame = at_two_rates(rng)
    with pytest.raises(UsageError, match=message):
        as_sequences(frame, id="id", time="time_s", resample=resample)
    with pytest.raises(UsageError, match="`resample=…` needs `time=…`, the column of times"):
        as_sequences(frame, id="id", resample=0.02)
    with pytest.raises(UsageError, match="resample applies only to frames"):
        as_sequences(np.ones((2, 3, 1)), resample=0.02)


# ── sequences that can't be used ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.ones((40, 12)),
            r"got \(40, 12\): add an axis, x\[\.\.\., None\] for 40 sequences of one channel, or",
        ),
        (np.ones(40), r"x: expected an array \[N, T, C\], got \(40,\)"),
        ([np.ones((3, 2))] * 39 + [np.ones(3)], r"x\[39\]: expected \[T, C\], got \(3,\): add an axis"),
        ([np.ones((3, 2))] * 39 + [np.ones((3, 1))], r"x\[39\]: expected 2 channels, as x\[0\] has, got 1"),
        ([np.ones((3, 2))] * 39 + [np.ones((0, 2))], r"x\[39\]: expected at least one step, got \(0, 2\)"),
        ([np.ones((3, 2))] * 39 + [np.full((3, 2), np.inf)], r"x\[39\]: .* got inf at step 0, channel 0"),
        (np.full((40, 3, 1), 1e300), r"x\[0\]: expected finite numbers in float32's range"),
        (np.full((40, 3, 1), "a"), r"x\[0\]: expected numbers \[T, C\], got text"),
        (np.full((40, 3, 1), 1j), r"x\[0\]: expected numbers \[T, C\], got an array of complex128"),
        ([], "x: expected at least one sequence, got none"),
        ({"a": np.ones((40, 3))}, r"a frame with id=, got dict"),
        (3, r"x: expected an array \[N, T, C\], a list of arrays \[T, C\] or a frame with id=, got int"),
        (np.full((40, 3, 2), [1, np.nan]), "channel 1 has no values in the training part: leave it out"),
    ],
)
def test_invalid_sequences(x, message):
    with pytest.raises(UsageError, match=message):
        train.fit(x, np.arange(40) % 2, **SMALL)


def test_a_lazy_frame_of_polars_is_collected(toy):
    frame = long_form(*toy)
    lazy = pl.from_pandas(frame).lazy()
    expected = train.fit(frame, "state", id="id", time="t", **SMALL)
    result = train.fit(lazy, "state", id="id", time="t", test=lazy, **SMALL)
    assert result.history == expected.history
    found = result.predict(lazy)
    assert isinstance(found.to_frame(), pl.DataFrame)
    assert list(found) == list(expected.predict(frame))
    assert train.read_table(lazy, id="id", time="").ids == train.read_table(frame, id="id", time="").ids


def test_a_result_says_how_the_data_was_understood(toy):
    x, y = toy
    x[0, 3, 1] = np.nan
    x[..., 2] = 7
    result = train.fit(x, y, test=0.25, **SMALL)
    assert result.understood == [
        "training: 30 sequences of 12 steps, 3 channels",
        "classification: 2 classes, one per sequence: busy (15), calm (15)",
        "missing: 1 values, 0.09%, handled by a mask or by indicator channels",
        "constant: channel 2",
        "test: 10 sequences of 12 steps, 3 channels",
        "classification: 2 classes, one per sequence: busy (5), calm (5)",
        "constant: channel 2",
    ]
    assert train.fit(Items(x[..., :1], y), **SMALL).understood[0] == "training: 40 sequences of 12 steps, 1 channel"
    frame = long_form(x, y).assign(name="a")
    with pytest.warns(UserWarning, match="name"):
        result = train.fit(frame, "state", id="id", **SMALL)
    assert "ignored: name, because it isn't numeric: 'a'" in result.understood
    assert (
        train.fit_text("a rose is " * 100, units=4, epochs=1, threads=1, steps=16).understood[0].startswith("1,000 ch")
    )


def test_invalid_frames(toy):
    frame = long_form(*toy)
    varied = frame.assign(state=np.where(frame.t == 3, "odd", frame.state))
    gone = frame.assign(id=frame.id.astype(float)).replace({"id": {5.0: np.nan}})
    refused = [
        (frame, "state", {}, r"x: expected `id=…`, .* of a row, one of id, t$"),
        (frame[["c0", "c1", "state"]], "state", {}, r"of a row; for a single sequence, add it with the same value"),
        (frame, "mood", {"id": "id"}, "expected `y=…` to be a column, one of id, .* got 'mood'"),
        (frame, "state", {"id": "id", "time": "when"}, "expected `time=…` to be a column"),
        (frame, "state", {"id": "id", "features": ["c0", "c9"]}, "expected features among id, .* got 'c9'"),
        (frame, "state", {"id": "id", "features": ["state"]}, "expected numbers in column 'state', got 'calm'"),
        (
            varied,
            "state",
            {"id": "id"},
            "expected one 'state' for each 'id', got 'calm' and 'odd' for 0; for one per step",
        ),
        (frame.assign(t=1), "state", {"id": "id", "time": "t"}, "'t' 1 occurs twice in the sequence with 'id'"),
        (
            frame.assign(t="noon"),
            "state",
            {"id": "id", "time": "t"},
            "numbers or dates such as 2024-05-31T12:00 in column 't', got 'noon'",
        ),
        (gone, "state", {"id": "id"}, "column 'id' has no value in row 60"),
        (
            frame,
            {0: "calm"},
            {"id": "id"},
            r"expected an entry for every 'id', found none for 1 \(39 of 40 are missing\)",
        ),
        (frame[["id", "state"]], "state", {"id": "id"}, "expected a numeric column in addition to 'id', found none"),
        (
            frame,
            frame["state"],
            {"id": "id"},
            "y: expected one entry for each of 40 'id', got 480, one per row: pass the",
        ),
        (frame, "state", {"id": "id", "features": "c0"}, "expected features as a list of columns, got 'c0'"),
        (frame[:0], "state", {"id": "id"}, "the frame has no rows"),
    ]
    for data, y, how, message in refused:
        with pytest.raises(UsageError, match=message):
            train.fit(data, y, **how, **SMALL)


def test_columns_that_aren_t_used_are_named_and_gaps_are_kept(toy):
    frame = long_form(*toy).assign(place="north", c1=lambda f: f.c1.where(f.t % 3 > 0))
    with pytest.warns(UserWarning, match="column 'place' isn't used: it isn't numeric: 'north'"):
        result = train.fit(frame, "state", id="id", time="t", **SMALL)
    assert result.network.metadata["columns"] == ["c0", "c1", "c2"]
    assert result.network.metadata["observed"] == [1]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_an_unused_column_of_dates_gets_a_hint(library):
    columns = {
        "id": [1, 1, 2],
        "when": pd.date_range("2024-01-01", periods=3).to_pydatetime().tolist(),
        "c": [1.0, 2.0, 3.0],
    }
    frame = pd.DataFrame(columns) if library == "pandas" else pl.DataFrame(columns)
    given = {"id": "id", "features": None, "weight": None, "per_step": None, "resample": None, "name": "x"}
    assert grouped(frame, None, time=None, **given).ignored == {
        "when": "contains dates: use `time=…` to order a sequence's rows by them"
    }
    assert not grouped(frame, None, time="when", **given).ignored


def test_constant_columns_and_a_class_of_one_example(toy):
    x, y = toy
    x[..., 1] = 7.5
    y = np.where(np.arange(40) == 3, "once", y)
    result = train.fit(x, y, **SMALL)
    assert result.labels == ("busy", "calm", "once")
    assert np.isfinite(result.network(x.astype(np.float32))).all()


def test_dates_put_rows_in_order(toy):
    frame = long_form(*toy)
    when = pd.Timestamp("2024-03-30") + pd.to_timedelta(frame.t, "h")
    expected = as_sequences(frame.drop(columns="t"), "state", id="id").x[0]
    for times in (when, when.dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin"), when.dt.strftime("%Y-%m-%dT%H:%M")):
        mixed = (
            frame.drop(columns="t").assign(when=times).sample(frac=1, random_state=0).sort_values("id", kind="stable")
        )
        found = as_sequences(mixed, "state", id="id", time="when")
        np.testing.assert_array_equal(found.x[0], expected)


# ── users' own ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_head_a_loss_metrics_an_optimizer_a_scheduler_and_callbacks(toy):
    x, y = toy
    head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 2))
    before = head[0].weight.detach().clone()
    seen, calls = [], []

    def loss(out, target):
        calls.append(tuple(out.shape))
        return nn.functional.cross_entropy(out, target, reduction="none", label_smoothing=0.1)

    def share_of_calm(truth, predicted):
        assert set(truth) | set(predicted) <= {"calm", "busy"}
        return (predicted == "calm").mean()

    result = train.fit(
        x,
        y,
        head=head,
        loss=loss,
        metrics={"calm": share_of_calm},
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        callbacks=[seen.append, lambda epoch: epoch.entry["epoch"] == 3],
        test=0.2,
        **{**SMALL, "epochs": 9},
    )
    assert [entry["lr"] for entry in result.history] == [0.5, 0.25, 0.125]
    assert all(0 <= entry["calm"] <= 1 for entry in result.history)
    assert [epoch.entry["epoch"] for epoch in seen] == [1, 2, 3]
    assert calls[0][1] == 2
    assert torch.equal(head[0].weight, before)  # the fit doesn't change the user's module
    assert result.sentence.startswith("stopped by a callback after 3 epochs; kept epoch")
    assert "on the test part: accuracy" in result.sentence
    with torch.no_grad():
        expected = result.model.answer(result.model(torch.from_numpy(x).float())).numpy()
    np.testing.assert_allclose(result.network(x.astype(np.float32)), expected, atol=2e-6)


class Attention(nn.Module):
    """A module of a user's own, with an output for each sequence or each step."""

    def __init__(self, channels, outputs, pools=True):
        super().__init__()
        self.lstm = nn.LSTM(channels, 6, batch_first=True, bidirectional=True)
        self.score, self.out, self.pools = nn.Linear(12, 1), nn.Linear(12, outputs), pools

    def forward(self, x):
        y, _ = self.lstm(x)
        return self.out((self.score(y).softmax(1) * y).sum(1) if self.pools else y)


@pytest.mark.long
@pytest.mark.parametrize(("pools", "numbers"), [(True, False), (True, True), (False, False)])
def test_a_module_of_ones_own(pools, numbers, tmp_path):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(steps, 2)) * 5 + 7 for steps in rng.integers(4, 9, 60)]
    x[0][1, 0] = np.nan  # so there is an indicator of missing values
    sums = [np.nancumsum(one[:, 0] - 7) for one in x]
    y = [one[-1] if numbers else one[-1] > 0 for one in sums] if pools else [one > 0 for one in sums]
    module = Attention(3, 1 if numbers else 2, pools)
    before = module.out.weight.detach().clone()
    result = train.fit(x, y, model=module, epochs=25, lr=0.02, threads=1)
    assert torch.equal(module.out.weight, before)  # a copy is trained
    assert "kernel" in str(cs.plan(result.model.head))
    result.network.save(tmp_path / "net.safetensors")
    found = load(tmp_path / "net.safetensors").predict(x, y)
    assert found.scores["rmse"] < 5 if numbers else found.scores["accuracy"] > 0.9
    for one, answer in zip(x, found.outputs, strict=True):
        rows, mask = trained(result.network, "").inputs(one[None].astype(np.float32))
        assert mask is None or mask.all()
        with torch.no_grad():
            expected = result.model.answer(result.model(torch.from_numpy(rows))).numpy()[0]
        np.testing.assert_allclose(answer, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.long
def test_invalid_modules_of_ones_own(toy):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)[:, :2]

    x, y = toy
    ends = nn.Sequential(Attention(3, 2), nn.Softmax(-1))
    for given, message in [
        ({"model": Attention(4, 2)}, "model: expected a module with 3 inputs"),
        ({"model": Attention(3, 3)}, r"model: expected 2 outputs, so \(2, 2\) for \(2, 5, 3\), got \(2, 3\)"),
        ({"model": ends}, "model: expected logits"),
        ({"model": Odd()}, "model: the module can't be converted to a Network"),
        ({"model": Attention(3, 2), "units": 8}, "units not to be given with `model`"),
        ({"model": Attention(3, 2), "pooling": "max"}, "pooling not to be given with `model`"),
    ]:
        with pytest.raises(ValueError, match=message):
            train.fit(x, y, epochs=1, **given)
    x = x.copy()
    x[0, 3] = np.nan
    with pytest.raises(ValueError, match="steps without any value"):
        train.fit(x, y, epochs=1, model=Attention(3, 2))


def test_invalid_heads_losses_and_metrics(toy):
    class Odd(nn.Module):
        def forward(self, x):
            return x[:, :2].sin()

    mean = nn.functional.cross_entropy
    refused = [
        ({"head": Odd()}, "head: the module can't be converted to a Network: the module .*to_nodes"),
        ({"head": nn.Linear(4, 3)}, r"head: expected 2 outputs, so \(2, 2\) for \(2, 4\), got \(2, 3\)"),
        ({"head": nn.Linear(5, 2)}, "head: expected a module with 4 inputs"),
        ({"head": nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1))}, "head: expected logits, got a softmax at its end"),
        ({"loss": mean}, r"expected a loss that returns one number per target, .* got \(\): .*reduction='none'"),
        ({"scheduler": "step"}, "expected scheduler to be cosine, constant or a callable"),
    ]
    for how, message in refused:
        with pytest.raises(UsageError, match=message):
            train.fit(*toy, **SMALL, **how)


def test_a_loss_per_example_applies_to_all_of_its_targets(toy):
    y = np.stack([toy[0].mean((1, 2)), toy[0].std((1, 2))], axis=1)
    ends = []
    for loss in (None, lambda out, target: (out - target).square().mean(1)):
        result = train.fit(toy[0], y, loss=loss, **SMALL)
        ends.append([entry["loss"] for entry in result.history])
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_class_and_sample_weights(toy):
    x, _ = toy
    y = np.where(np.arange(40) < 34, "often", "rare")
    # Doubling an example's weight is like having it twice: the same mean of weighted losses in a batch of all.
    how = {**SMALL, "batch": 100, "validation": 0, "dropout": 0, "noise": 0, "offset": 0, "epochs": 1}
    heavy = np.where(np.arange(40) == 3, 2.0, 1.0)
    doubled = train.fit(np.concatenate([x, x[3:4]]), [*y, y[3]], **how).history[0]["loss"]
    inputs = train.fit(x, y, sample_weight=heavy, **how).history[0]["loss"]
    assert inputs == pytest.approx(doubled, rel=2e-2)  # except for the scales of the inputs
    even = train.fit(x, y, class_weight="balanced", **how).history[0]["loss"]
    by_hand = train.fit(x, y, class_weight={"often": 40 / (2 * 34), "rare": 40 / (2 * 6)}, **how).history[0]["loss"]
    by_sample = train.fit(x, y, sample_weight=np.where(y == "rare", 40 / 12, 40 / 68), **how).history[0]["loss"]
    assert even == pytest.approx(by_hand) == pytest.approx(by_sample)
    assert even != pytest.approx(train.fit(x, y, **how).history[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("target", ["classes", "numbers"])
def test_a_warm_start(toy, tmp_path, target):
    x, y = toy[0], toy[1] if target == "classes" else 50 + toy[0].mean((1, 2))
    first = train.fit(x, y, **{**SMALL, "epochs": 5}, bidirectional=True)
    first.network.save(tmp_path / "net.safetensors")
    for given in (first.network, tmp_path / "net.safetensors"):
        second = train.fit(x, y, init=given, lr=1e-12, bidirectional=True, **SMALL)
        np.testing.assert_allclose(
            second.network(x.astype(np.float32)), first.network(x.astype(np.float32)), rtol=1e-5, atol=1e-6
        )


def test_a_warm_start_that_doesn_t_fit(toy, tmp_path):
    net = train.fit(*toy, **SMALL).network
    refused = [
        ({"units": 5}, "init: expected cell 0 with units 5, as in this model, found 4"),
        ({"units": (4, 4)}, "init: expected 2 cells, as in this model, found 1"),
        ({"cell": "gru"}, "init: expected cell 0 with kind gru"),
        ({"y": np.arange(40) % 2}, r"init: expected an initial network with classes \[0, 1\], found \['busy'"),
        ({"y": np.arange(40) / 3}, "init: expected an initial network with task regress, found classify"),
        ({"x": toy[0][..., :2]}, "init: expected an initial network with channels 2, found 3"),
    ]
    for how, message in refused:
        with pytest.raises(UsageError, match=message):
            train.fit(**{"x": toy[0], "y": toy[1], **SMALL, "init": net, **how})
    with pytest.raises(FileNotFoundError):
        train.fit(*toy, **SMALL, init=tmp_path / "none.safetensors")


# ── output files ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_logs_and_the_history_as_files_and_as_a_picture(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from cellstack.train import history

    for log in ("log.csv", "log.json", "events"):
        result = train.fit(*toy, **SMALL, log=tmp_path / log)
    read = pd.read_csv(tmp_path / "log.csv")
    assert read["validation_loss"].tolist() == [entry["validation_loss"] for entry in result.history]
    assert json.loads((tmp_path / "log.json").read_text()) == result.history
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    history.draw(tmp_path / "a.svg", result.history, result.fit.best)
    drawn = (tmp_path / "a.svg").read_text()
    assert "accuracy" in drawn or "<svg" in drawn
    history.draw(tmp_path / "a.png", result.history)
    with pytest.raises(TypeError, match=r"expected a path, then the history: draw\(path, history\), got list"):
        history.draw(result.history, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_training_continues_if_the_log_can_t_be_written(toy, tmp_path, monkeypatch):
    from cellstack.train import history

    def full(path, entries):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(history, "write", full)
    with pytest.warns(
        RuntimeWarning, match=r"the log could not be written, training continues: .*log\.csv: No space"
    ) as said:
        result = train.fit(*toy, **SMALL, log=tmp_path / "log.csv")
    assert len(said) == 1
    assert len(result.history) == 2


def test_no_output_and_no_warnings_by_default(toy, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.fit(*toy, **SMALL)
    assert capsys.readouterr() == ("", "")


def test_noise_is_chosen_by_the_validation_loss(toy, tmp_path):
    """Of two networks, with and without noise, the one with the lower validation loss is kept."""
    names = []
    how = {**SMALL, "validation": 0.5, "seed": 3, "checkpoint": tmp_path / "run.ckpt", "log": tmp_path / "log.json"}
    callbacks = [lambda epoch: names.append((epoch.entry["epoch"], epoch.model.noise.noise))]
    chosen = train.fit(*toy, **how, callbacks=callbacks)
    assert names == [(1, 0.6), (2, 0.6), (1, 0.0), (2, 0.0)]
    alone = [
        train.fit(*toy, **{**SMALL, "validation": 0.5, "seed": 3}, **noise)
        for noise in ({"noise": 0.6, "offset": 0.3}, {"noise": 0.0, "offset": 0.0})
    ]
    losses = [result.fit.best["validation_loss"] for result in alone]
    better = int(np.argmin(losses))
    assert chosen.history == alone[better].history
    logs = [json.loads((tmp_path / name).read_text()) for name in ("log.json", "log-without-noise.json")]
    assert logs == [result.history for result in alone]
    kept, other = (("with", "without"), ("without", "with"))[better]
    said = f"trained {kept} noise: validation loss {losses[better]:.4g}, {other} noise {losses[1 - better]:.4g}"
    assert said in chosen.sentence
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"run.ckpt", "run-without-noise.ckpt"}
    again = train.fit(*toy, **how, resume=True)
    assert (again.sentence, again.history, again.fit.resumed) == (chosen.sentence, chosen.history, 2)
    (tmp_path / "run.ckpt").unlink()
    with pytest.raises(ValueError, match=r"run-without-noise\.ckpt: the checkpoint already exists"):
        train.fit(*toy, **how)


def test_noise_falls_to_zero():
    noise, x = Noise(2.0, 1.0, np.array([True, False])), torch.zeros(200, 30, 2)
    sizes = []
    for noise.progress in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        sizes.append(noise(x)[..., 0].std().item())
    np.testing.assert_allclose(sizes, [5**0.5, 5**0.5 / 2, 0.0], rtol=0.03, atol=1e-12)
    noise.falls = False
    assert noise(x)[..., 0].std() > 2


def test_the_sentence_at_the_end(toy):
    how = {**SMALL, "lr": 1e-9, "validation": 0.5, "noise": 0.1}
    assert re.match(
        r"trained for all 2 epochs; kept epoch \d, with the lowest validation loss; "
        r"on the 20 validation examples, which also selected the epoch: accuracy 0\.",
        train.fit(*toy, **how).sentence,
    )
    stopped = train.fit(*toy, **{**how, "epochs": 30, "patience": 2})
    assert (
        f"stopped after {len(stopped.history)} epochs, because the validation loss had not decreased for 2"
        in stopped.sentence
    )
    assert train.fit(*toy, **how | {"validation": 0}).sentence == (
        "trained for all 2 epochs; kept epoch 2, the last, without a validation part; no data was held out to "
        "measure its accuracy on"
    )


def test_a_table_of_sequences_without_rows_is_refused(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("sensor,t,temperature,state\n")
    with pytest.raises(FormatError, match="rows below the header"):
        train.read_sequences(path, "state", id="sensor")
