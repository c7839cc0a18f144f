"""`Network.predict` for every task, and for networks without one; `Predictions` and `Forecasts` as tables."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.metrics import accuracy_score, mean_absolute_error

from cellstack import CellSpec, FormatError, Network, ShapeError, load, train
from cellstack.nodes import Cell, Dense, Embedding, Masking, Merge, Recurrent
from cellstack.train import Predictions, UsageError

SMALL = {"units": 4, "epochs": 2, "threads": 1}


@pytest.fixture(scope="module")
def ragged():
    """40 sequences `[T, 3]` of two classes, one of them three times as loud."""
    rng = np.random.default_rng(0)
    y = np.tile(["calm", "busy"], 20)
    return [
        rng.normal(size=(length, 3)) * (1 + 2 * (name == "busy")) for length, name in zip(LENGTHS, y, strict=True)
    ], y


LENGTHS = np.random.default_rng(1).integers(5, 9, 40)


def long_form(x, y):
    """Sequences as a frame with a row per step, and their classes as one of its columns."""
    parts = [
        pd.DataFrame(one, columns=["a", "b", "c"]).assign(machine=f"m{n}", hour=np.arange(len(one)), state=y[n])
        for n, one in enumerate(x)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def classifier(ragged):
    """Trained on lists of arrays, whose channels have names."""
    return train.fit(*ragged, features=["a", "b", "c"], **{**SMALL, "units": 8, "epochs": 30}, lr=2e-2)


@pytest.fixture(scope="module")
def of_frame(ragged):
    """The same, trained on a frame."""
    return train.fit(long_form(*ragged), "state", id="machine", time="hour", **SMALL)


@pytest.fixture(scope="module")
def shops():
    n = np.arange(24 * 20)
    rng = np.random.default_rng(0)
    time = pd.date_range("2024-01-01", periods=len(n), freq="h")
    level = 5 + np.sin(n * np.pi / 12)
    noise = rng.normal(size=(2, len(n))) / 10
    more = {"rain": n % 5, "kind": np.where(n % 3, "a", "b")}
    shop = [pd.DataFrame({"time": time, "shop": k, "sales": level * k + noise[k - 1], **more}) for k in (1, 2)]
    return pd.concat(shop, ignore_index=True)


@pytest.fixture(scope="module")
def forecaster(shops):
    table = train.read_table(shops, id="shop")
    how = {"members": 1, "units": 4, "epochs": 1, "threads": 1}
    return train.fit_forecast(table, "sales", horizon=5, holidays="US", **how)


@pytest.fixture(scope="module")
def writer():
    return train.fit_text("a rose is " * 200, units=16, epochs=8, batch=4, steps=32, threads=1)


# ── classes and numbers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_predictions_are_a_sequence_of_labels_with_probabilities(ragged, classifier):
    x, y = ragged
    found = classifier.network.predict(x)
    direct = np.concatenate([classifier.network(one[None].astype(np.float32)) for one in x])
    np.testing.assert_allclose(found.probabilities, direct, rtol=1e-6)
    assert list(found) == [("busy", "calm")[n] for n in direct.argmax(axis=1)]
    assert (len(found), found[3], found[1:3], found.ids, found.scores) == (40, list(found)[3], list(found)[1:3], (), {})
    assert np.asarray(found).tolist() == list(found)
    scored = classifier.predict(x, y)
    assert scored.scores["accuracy"] == accuracy_score(y, found) == (np.asarray(found) == y).mean() > 0.6
    assert scored.scores["confusion"].sum() == 40


@pytest.mark.long
def test_a_network_knows_its_task_its_classes_and_its_channels(classifier, of_frame, forecaster, writer):
    net = classifier.network
    assert (net.task, net.labels, net.channels) == ("classify", ("busy", "calm"), ("a", "b", "c"))
    assert of_frame.network.channels == ("a", "b", "c")
    net = forecaster.network
    assert (net.task, net.labels, len(net.channels)) == ("forecast", (), net.input_size)
    assert net.channels[:2] == ("sales", "sales (naive)")
    assert {"rain", "kind=a", "hour sin1", "holiday tomorrow", "steps ahead", "rain observed"} <= set(net.channels)
    assert (writer.network.task, writer.network.channels) == ("text", ())
    bare = Network(net.nodes[:1], metadata={"task": "sentiment", "columns": ["a"]})
    assert (bare.task, bare.labels, bare.channels) == (None, (), ())


def test_indicators_of_gaps_have_names(ragged):
    x = [one.copy() for one in ragged[0]]
    for one in x:
        one[2, 1] = np.nan
    net = train.fit(x, ragged[1], features=["a", "b", "c"], **SMALL).network
    assert net.channels == ("a", "b", "c", "b observed")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a", "b"], "abc"])
def test_as_many_names_as_channels(ragged, names):
    with pytest.raises(UsageError, match="expected features as a list of 3 names, one per channel"):
        train.fit(*ragged, features=names, **SMALL)


def test_every_form_of_the_data_gives_the_same_predictions(ragged, classifier, tmp_path):
    x, y = ragged
    net, frame = classifier.network, long_form(x, y)
    expected = net.predict(x).probabilities
    padded = np.zeros((40, 8, 3), np.float32)
    for row, one in zip(padded, x, strict=True):
        row[: len(one)] = one
    np.savez(tmp_path / "x.npz", x=padded, lengths=LENGTHS)
    lines = [":".join(",".join(map(str, channel)) for channel in one.T) for one in x]
    (tmp_path / "x.ts").write_text("\n".join(["@classLabel false", "@data", *lines, ""]))
    frame.to_csv(tmp_path / "x.csv", index=False)
    turned = frame[["state", "c", "hour", "b", "machine", "a"]].sample(frac=1, random_state=0)
    by_id = {"id": "machine", "time": "hour"}
    forms = [
        (np.array([*x, None], object)[:-1], {}),
        ([torch.tensor(one) for one in x], {}),
        (train.Sequences([one.astype(np.float32) for one in x], None, (), "x"), {}),
        (lambda: iter(x), {}),
        (tmp_path / "x.npz", {}),
        (str(tmp_path / "x.ts"), {}),
        (tmp_path / "x.csv", by_id),
    ]
    for data, how in forms:
        np.testing.assert_array_equal(net.predict(data, **how).probabilities, expected)
    for data in (frame, turned, pl.from_pandas(frame)):
        found = net.predict(data, "state", **by_id)
        order = [int(name[1:]) for name in found.ids]
        np.testing.assert_allclose(found.probabilities, expected[order], rtol=1e-6)
        assert found.scores["accuracy"] == classifier.predict(x, y).scores["accuracy"]
    pairs = classifier.predict(lambda: zip(x, y, strict=True))
    assert pairs.scores["accuracy"] == classifier.predict(x, y).scores["accuracy"]


def test_a_table_s_columns_are_selected_by_name_as_in_training(ragged, of_frame, tmp_path):
    x, y = ragged
    frame = long_form(x, y)
    net = of_frame.network
    found = net.predict(frame.assign(more=1.0)[["more", "b", "hour", "c", "machine", "state", "a"]])
    np.testing.assert_array_equal(found.probabilities, net.predict(x).probabilities)
    assert (found.ids[:2], found.scores.keys()) == (("m0", "m1"), {"accuracy", "confusion"})
    assert found.scores["accuracy"] == net.predict(frame, "state").scores["accuracy"]
    assert net.predict(frame.drop(columns="state")).scores == {}
    message = r"got 'machine'; for a single sequence, add it with the same value in every row"
    with pytest.raises(UsageError, match=message):
        net.predict(frame[frame["machine"] == "m0"].drop(columns="machine"))
    frame.to_csv(tmp_path / "new.csv", index=False)
    assert net.predict(tmp_path / "new.csv").scores["accuracy"] == net.predict(frame, "state").scores["accuracy"]
    frame.drop(columns="state").rename(columns={"machine": "m"}).to_csv(tmp_path / "bare.csv", index=False)
    assert net.predict(tmp_path / "bare.csv", id="m").scores == {}
    with pytest.raises(UsageError, match="expected features among"):
        net.predict(frame.drop(columns="a"))
    with pytest.raises(FormatError, match="expected 3 channels, found 2"):
        net.predict([one[:, :2] for one in x])


def test_a_network_of_unnamed_arrays_takes_frames_and_tables_with_as_many_numeric_columns(ragged, tmp_path):
    x, y = ragged
    net = train.fit(x, y, **SMALL).network
    assert net.channels == ()
    frame = long_form(x, y)
    found = net.predict(frame, id="machine", time="hour")
    np.testing.assert_array_equal(found.probabilities, net.predict(x).probabilities)
    frame.to_csv(tmp_path / "new.csv", index=False)
    frame.to_parquet(tmp_path / "new.parquet", index=False)
    for name in ("new.csv", "new.parquet"):
        read = net.predict(tmp_path / name, "state", id="machine", time="hour")
        np.testing.assert_allclose(read.probabilities, found.probabilities, rtol=1e-6)
        assert read.scores["accuracy"] == net.predict(x, y).scores["accuracy"]
    with pytest.raises(FormatError, match=r"new: expected 3 channels, found 4: a, b, c, hour$"):
        net.predict(tmp_path / "new.csv", id="machine")
    with pytest.raises(UsageError, match=r"wasn't trained on a table, or `id=…`, the column that identifies"):
        net.predict(tmp_path / "new.csv")


def test_float16_is_read_like_float32(ragged, classifier):
    half = [one.astype(np.float16) for one in ragged[0]]
    whole = classifier.predict([one.astype(np.float32) for one in half])
    np.testing.assert_array_equal(classifier.predict(half).probabilities, whole.probabilities)
    half[1][0, 2] = np.inf
    with pytest.raises(UsageError, match=r"x\[1\]: expected finite numbers .* got inf at step 0, channel 2"):
        classifier.predict(half)


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_ids_that_are_dates_stay_dates(ragged, of_frame, unit):
    x, y = ragged
    days = dict(zip([f"m{n}" for n in range(len(x))], pd.date_range("2024-01-01", periods=len(x)), strict=True))
    frame = long_form(x, y)
    frame["machine"] = frame["machine"].map(days).astype(f"datetime64[{unit}]")
    found = of_frame.predict(frame, dict(zip(days.values(), y, strict=True)))
    assert list(found.ids) == list(days.values())
    assert found.to_frame()["machine"].tolist() == list(days.values())
    assert found.scores["accuracy"] == of_frame.predict(x, y).scores["accuracy"]


@pytest.mark.parametrize("kind", ["text", "date", "pandas", "zone"])
def test_rows_are_in_the_order_of_dates_far_apart(ragged, of_frame, kind):
    x, y = ragged
    frame = long_form(x, y)
    days = [f"{2100 + 100 * hour}-01-01" for hour in frame["hour"]]  # in nanoseconds these would overflow
    dates = pd.Series(np.array(days, "datetime64[s]"))
    times = {"text": days, "date": dates.dt.date, "pandas": dates, "zone": dates.dt.tz_localize("UTC")}
    found = of_frame.predict(frame.assign(hour=times[kind])[::-1])
    np.testing.assert_array_equal(found.probabilities[::-1], of_frame.predict(x).probabilities)


@pytest.mark.parametrize("text", ["{}", "202401{:02}", "now"])
def test_text_that_is_no_iso_date_is_no_time(ragged, of_frame, text):
    frame = long_form(*ragged)
    frame["hour"] = [text.format(hour) for hour in frame["hour"]]
    with pytest.raises(UsageError, match=r"expected numbers or dates such as 2024-05-31T12:00 in column 'hour', got"):
        of_frame.predict(frame)


def test_columns_of_a_list_of_frames_are_compared(ragged, classifier):
    x, y = ragged
    frames = [pd.DataFrame(one, columns=["a", "b", "c"]) for one in x]
    swapped = [one[["b", "a", "c"]] for one in frames]
    np.testing.assert_array_equal(classifier.predict(frames).probabilities, classifier.predict(x).probabilities)
    with pytest.raises(UsageError, match=r"x\[0\]: expected the columns a, b, c, got b, a, c"):
        classifier.predict(swapped)
    with pytest.raises(UsageError, match=r"x\[1\]: expected the columns a, b, c, got b, a, c"):
        train.fit([frames[0], *swapped[1:]], y, **SMALL)
    fitted = train.fit(frames, y, validation=(x[:8], y[:8]), **SMALL)
    train.fit(x, y, validation=(frames[:8], y[:8]), **SMALL)
    assert fitted.network.channels == ("a", "b", "c")
    with pytest.raises(UsageError, match="got b, a, c"):
        fitted.predict(swapped)


def test_numbers_are_in_the_targets_units(ragged):
    x, _ = ragged
    y = np.array([1e4 + one.std() for one in x])
    found = train.fit(x, y, **SMALL).predict(x, y)
    assert (found.labels, found.probabilities) == ((), None)
    assert all(type(one) is float and 9e3 < one < 2e4 for one in found)
    assert found.scores["mae"] == pytest.approx(mean_absolute_error(y, found), rel=1e-4)
    assert repr(found).splitlines()[0] == f"Predictions of 40 sequences; mae {found.scores['mae']:.4g}" + (
        f"; rmse {found.scores['rmse']:.4g}"
    )


def test_predictions_as_columns_and_as_frames(ragged, of_frame):
    frame = long_form(*ragged)
    found = of_frame.predict(frame)
    columns = found.columns()
    assert list(columns) == ["machine", "predicted", "p_busy", "p_calm"]
    assert {len(column) for column in columns.values()} == {40}
    pandas, polars = found.to_frame(), of_frame.predict(pl.from_pandas(frame)).to_frame()
    assert (type(pandas), type(polars)) == (pd.DataFrame, pl.DataFrame)
    assert pandas.merge(frame, on="machine").groupby("machine").size().tolist() == pytest.approx(
        frame.groupby("machine").size().tolist()
    )
    assert polars["predicted"].to_list() == pandas["predicted"].tolist() == list(found)


def test_as_many_targets_as_steps_are_those_of_the_training(ragged):
    x, _ = ragged
    y = np.stack([one.sum(axis=0) for one in x])
    fitted = train.fit(x, y, **SMALL)
    short = np.stack([one[:3] for one in x])
    assert fitted.predict(short, y).scores["mae"] == pytest.approx(mean_absolute_error(y, fitted.predict(short)))
    with pytest.raises(UsageError, match=r"y\[\d+\]: expected \(\d,\) targets, as y\[0\] has, got"):
        fitted.predict(x, [one[:, 0] for one in x])


def test_predictions_of_each_step():
    outputs = [np.array([[0.2, 0.8], [0.9, 0.1]]), np.array([[0.4, 0.6]])]
    found = Predictions(outputs, (False, True))
    assert [one.tolist() for one in found] == [[True, False], [True]]
    assert [one.tolist() for one in np.asarray(found)] == [[True, False], [True]]
    columns = found.columns()
    assert (columns["sequence"], columns["step"].tolist()) == ([0, 0, 1], [0, 1, 0])
    assert columns["predicted"] == [True, False, True]
    assert repr(found) == ("Predictions of 2 sequences, one per step, classes False, True\n  0: True, False\n  1: True")
    even = Predictions([one[:1] for one in outputs], (False, True))
    assert np.asarray(even).tolist() == [[True], [True]]


def test_a_column_never_replaces_another():
    found = Predictions(np.array([[0.2, 0.8]]), ("a", "b"), ("first",), "predicted")
    assert found.columns().keys() == {"predicted", "predicted_", "p_a", "p_b"}
    assert found.columns()["predicted"] == ["first"]


def test_the_text_and_the_html_form_are_short_and_escaped():
    found = Predictions(np.tile([0.25, 0.75], (300, 1)), ("<a>", "b"), scores={"accuracy": 0.5})
    lines = repr(found).splitlines()
    assert lines[0] == "Predictions of 300 sequences, classes <a>, b; accuracy 0.5"
    assert (lines[1], lines[-1], len(lines)) == ("  0: b (0.75)", "  …", 7)
    page = found._repr_html_()
    assert "<a>" not in page
    assert page.count("<tr>") == 11


# ── forecasts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_forecasts_as_a_frame_with_dates_ids_and_quantiles(shops, forecaster, tmp_path):
    frame = forecaster.predict(shops).to_frame()
    assert list(frame) == ["shop", "time", "sales", "sales_0.1", "sales_0.9"]
    assert frame["time"].tolist() == [*pd.date_range("2024-01-21", periods=5, freq="h")] * 2
    assert frame["shop"].tolist() == [1] * 5 + [2] * 5  # as in the data, to join with it
    assert (frame["sales_0.1"] <= frame["sales"]).all()
    assert (frame["sales"] <= frame["sales_0.9"]).all()
    shops.to_csv(tmp_path / "shops.csv", index=False)
    forecaster.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net")
    for data in (tmp_path / "shops.csv", train.read_table(shops, id="shop")):
        again = net.predict(data).to_frame()
        assert again["shop"].tolist() == ["1"] * 5 + ["2"] * 5
        np.testing.assert_array_equal(again["sales"], frame["sales"])
    polars = net.predict(pl.from_pandas(shops)).to_frame()
    assert polars["time"].to_list() == frame["time"].tolist()
    np.testing.assert_array_equal(polars["sales"].to_numpy(), frame["sales"])


def test_forecasts_after_an_earlier_row(shops, forecaster):
    cut = shops[shops.time <= "2024-01-15T06:00"]
    earlier = forecaster.predict(shops, origin="2024-01-15T06:00")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        np.testing.assert_array_equal(earlier.values, forecaster.predict(cut).values)
    assert forecaster.scores["targets"].keys() == {"sales"}
    assert earlier.plot().axes[0].get_title(loc="left") == "1, sales"


def test_what_the_parts_of_a_forecast_show(shops, forecaster):
    table = train.read_table(shops, id="shop")
    assert repr(table).splitlines() == [
        "Table of a data frame: 960 rows of 2 series by `shop` (480 steps each), hourly from 2024-01-01 00:00 to "
        "2024-01-20 23:00 by `time`",
        *("  numbers: `sales`, `rain`", "  categories: `kind`"),
    ]
    first, errors = repr(forecaster.test).splitlines()
    assert first == "Backtest: 184 forecasts of 5 steps, 2024-01-17 00:00 to 2024-01-20 23:00"
    mae = forecaster.scores["targets"]["sales"]["model"]["mae"]
    assert errors.startswith(f"  sales: mean absolute error {mae:.4g}; baselines 0.")
    assert errors.endswith("% in the interval")
    assert str(forecaster.predict(shops)).splitlines()[1].startswith("  1, 2024-01-21 00:00: ")
    with pytest.raises(UsageError, match="which covers 2024-01-01 00:00 to 2024-01-20 23:00, got 2023"):
        forecaster.predict(shops, origin="2023-01-01")


@pytest.mark.long
def test_a_table_with_one_forecast_per_day_has_days():
    days = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=200), "y": np.sin(np.arange(200))})
    how = {"members": 1, "units": 4, "epochs": 1, "threads": 1}
    done = train.fit_forecast(days, horizon=2, seasons=(7,), **how)
    columns = done.predict(days).columns()
    assert columns["day"].dtype == "datetime64[D]"
    assert columns["day"].tolist() == [pd.Timestamp("2024-07-19").date(), pd.Timestamp("2024-07-20").date()]
    rows = train.fit_forecast(days[["y"]], horizon=2, seasons=(7,), **how).predict(days[["y"]])
    assert rows.columns()["step"].tolist() == [1, 2]


@pytest.mark.long
def test_warnings_of_a_forecast_name_the_line_of_the_caller(shops, forecaster):
    how = {"members": 1, "units": 4, "epochs": 1, "threads": 1}
    done = train.fit_forecast(train.read_table(shops, id="shop"), "sales", horizon=5, known=("rain",), **how)
    for predict in (done.predict, done.result.predict, done.network.predict):
        with pytest.warns(UserWarning, match="`rain`, known in advance, has no value") as caught:
            predict(shops)
        assert [Path(each.filename).name for each in caught] == ["test_predict.py"]


QUICK = {"members": 1, "units": 4, "epochs": 1, "threads": 1, "horizon": 5}


@pytest.mark.long
def test_a_column_or_a_number_alone_is_accepted_for_several(shops):
    one = train.fit_forecast(shops, "sales", id="shop", known="rain", inputs="kind", seasons=24, quantiles=0.9, **QUICK)
    recipe = one.recipe
    assert (recipe.known, recipe.seasons, recipe.quantiles) == (("rain",), (24,), (0.5, 0.9))
    assert [category.name for category in recipe.categories] == ["kind"]


@pytest.mark.long
def test_options_of_reading_are_passed_on(shops, tmp_path):
    later = shops.rename(columns={"time": "when"})
    later.to_csv(tmp_path / "shops.csv", index=False, sep=";", decimal=",")
    options = {"id": ["shop"], "time": "when", "zone": "UTC", "decimal": ","}
    done = train.fit_forecast(tmp_path / "shops.csv", "sales", seasons=24, **options, **QUICK)
    reading = done.network.metadata["reading"]
    assert (reading["id"], reading["time"], reading["zone"], reading["decimal"]) == (["shop"], "when", "UTC", ",")
    with pytest.raises(UsageError, match="fit_forecast: id has no effect for a Table"):
        train.fit_forecast(train.read_table(shops, id="shop"), "sales", id="shop", **QUICK)
    with pytest.raises(FormatError, match=r"use `id='shop'`, if"):
        train.fit_forecast(shops, "sales", **QUICK)


def test_an_unknown_option_is_refused_with_the_closest_one(shops):
    with pytest.raises(TypeError, match=r"^fit_forecast\(\) got an unexpected .* 'season': did you mean 'seasons'\?$"):
        train.fit_forecast(shops, "sales", season=7)
    with pytest.raises(TypeError, match=r"unexpected .* 'holiday': did you mean 'holidays'\?"):
        train.fit_forecast(shops, "sales", holiday="DE")
    with pytest.raises(TypeError, match=r"fit_forecast\(\) got an unexpected keyword argument 'qqq'$"):
        train.fit_forecast(shops, "sales", qqq=7)
    with pytest.raises(TypeError, match=r"^fit_forecast: `pooling=…` doesn't apply to forecasts, only to sequences$"):
        train.fit_forecast(shops, "sales", pooling="max")


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_prompt_is_continued(writer, tmp_path):
    how = {"length": 26, "temperature": 0}
    assert writer.predict("a ro", **how) == "se is a rose is a rose is "
    (tmp_path / "start.txt").write_text("a ro")
    assert writer.network.predict(tmp_path / "start.txt", **how) == "se is a rose is a rose is "
    with pytest.raises(UsageError, match=r"both a text to continue and a file's name: pass pathlib\.Path"):
        writer.predict(str(tmp_path / "start.txt"))
    assert writer.predict("a ", length=9, seed=3) == writer.predict("a ", length=9, seed=3)


# ── networks without a task ─────────────────────────────────────────────────────────────────────────────────────────


def cell(inputs=3, units=4):
    rng = np.random.default_rng(0)
    return Cell(CellSpec(inputs, units), *(rng.normal(size=shape) for shape in CellSpec(inputs, units).shapes.values()))


@pytest.mark.parametrize("sequences", [False, True])
def test_a_network_without_a_task_takes_sequences_of_any_lengths(ragged, sequences, tmp_path):
    net = Network([Recurrent((cell(),), return_sequences=sequences)])
    x = ragged[0]
    found = net.predict(x)
    assert isinstance(found, list) if sequences else found.shape == (40, 4)
    for one, row in zip(x, found, strict=True):
        np.testing.assert_allclose(row, net(one[None])[0], rtol=1e-12)
    even = np.stack([one[:5] for one in x])
    np.testing.assert_array_equal(net.predict(even), net(even))
    np.testing.assert_allclose(net.predict(list(even)), net(even), rtol=1e-12)
    np.save(tmp_path / "x.npy", even)
    np.testing.assert_array_equal(net.predict(tmp_path / "x.npy"), net(even))


def test_nan_in_the_outputs_of_a_network_without_a_task_is_warned_of():
    net = Network([Recurrent((cell(),))])
    x = np.zeros((3, 5, 3))
    x[1, 2, 0] = np.nan
    for data in (x, [x[0], x[1, :4], x[2]]):
        with pytest.warns(UserWarning, match="outputs contain NaN for 1 of 3 sequences: NaN in the data") as caught:
            net.predict(data)
        assert [one.filename for one in caught] == [__file__]
    masked = Network([Masking(0.0), Recurrent((cell(),))])
    assert not np.isnan(masked.predict(np.zeros((3, 5, 3)))).any()


def test_ids_several_inputs_and_several_outputs():
    table = np.random.default_rng(0).normal(size=(5, 3))
    net = Network([Embedding(table), Recurrent((cell(),), return_sequences=False)])
    found = net.predict([[1, 2, 3], [4]])
    np.testing.assert_allclose(found, [net([[1, 2, 3]])[0], net([[4]])[0]], rtol=1e-12)
    both = Network(
        [Recurrent((cell(),)), Dense(np.ones((4, 2)))],
        ["lstm", "head"],
        outputs=["head", "lstm/h"],
        inputs=("x",),
        wires=[("x",), ("lstm",)],
    )
    every, last = both.predict([np.ones((5, 3)), np.zeros((2, 3))])
    assert ([one.shape for one in every], last.shape) == ([(5, 2), (2, 2)], (2, 4))
    two = Network([Merge("add")], inputs={"a": (None, 3), "b": (None, 3)}, wires=[("a", "b")])
    assert two.predict({"a": np.ones((2, 4, 3)), "b": np.ones((2, 4, 3))}).shape == (2, 4, 3)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_task_doesn_t_take_is_refused_by_name(ragged, classifier, forecaster, writer, shops):
    bare = Network([Recurrent((cell(),))])
    table = train.read_table(shops, id="shop")
    frame = long_form(*ragged)
    refused = [
        (classifier.network, ragged[0], {"origin": 3}, TypeError, "expected options among day_first.*, got 'origin'"),
        (classifier.network, ragged[0], {"id": "machine"}, UsageError, "id applies only to frames"),
        (classifier.network, frame, {}, UsageError, "expected `id=…`"),
        (classifier.network, frame, {"id": "machine", "decimal": ","}, UsageError, "decimal applies only to a table's"),
        (classifier.network, ragged[0][0], {}, UsageError, r"x\[None\] for one sequence"),
        (classifier.network, ragged[0], {"y": ["loud"] * 40}, UsageError, "expected the classes 'busy', 'calm'"),
        (forecaster.network, shops, {"y": "sales"}, UsageError, r"later rows of the table are compared: see \.scores"),
        (forecaster.network, shops, {"length": 3}, TypeError, "expected options among origin, time"),
        (forecaster.network, table, {"freq": "h"}, UsageError, "freq has no effect for a Table"),
        (forecaster.network, ragged[0], {}, UsageError, "expected a path, or a pandas or polars frame"),
        (writer.network, "a", {"threads": 2}, UsageError, "threads has no effect for a network that continues a text"),
        (writer.network, "a", {"temprature": 1}, TypeError, "expected options among length, .* got 'temprature'"),
        (writer.network, 3, {}, UsageError, r"expected a text to continue, or the pathlib\.Path of one, got int"),
        (
            bare,
            ragged[0],
            {"y": ragged[1]},
            UsageError,
            r"y has no effect for a network that cellstack.train didn't train",
        ),
        (bare, frame, {}, UsageError, "got a data frame: frames need a network that was trained on one"),
        (bare, [], {}, UsageError, "expected at least one sequence"),
        (bare, "x.txt", {}, UsageError, r"expected a \.npy, \.npz, \.csv or \.jsonl file"),
        (bare, [np.ones((5, 2))], {}, ShapeError, r"expected x \[B, T, I=3\]"),
    ]
    for net, data, how, error, message in refused:
        with pytest.raises(error, match=message):
            net.predict(data, **how)


def test_a_call_of_the_network_says_that_predict_takes_lists_frames_and_files(ragged, of_frame):
    net = of_frame.network
    calls = [
        (ragged[0], "got rows of unequal length: net.predict takes lists of sequences of any lengths"),
        (long_form(*ragged), "net.predict takes data frames"),
        ("new.csv", "net.predict takes the names of files"),
    ]
    for x, message in calls:
        with pytest.raises((ShapeError, TypeError), match=message):
            net(x)
    with pytest.raises(ShapeError) as caught:
        net(np.ones((2, 3)))
    assert "predict" not in str(caught.value)


@pytest.mark.parametrize("name", ["run", "forecast"])
def test_the_error_of_a_guessed_name_mentions_predict(name):
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': use network\.predict\(data\)"):
        getattr(train, name)


def test_it_needs_no_torch(ragged, classifier, tmp_path):
    classifier.network.save(tmp_path / "net.safetensors")
    np.savez(tmp_path / "x.npz", x=np.stack([one[:5] for one in ragged[0]]))
    code = (
        "import sys, cellstack\n"
        "print(len(cellstack.load('net').predict('x.npz')))\n"
        "print([name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["40", "[]"]
