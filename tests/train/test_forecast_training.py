"""Training of forecasts: model selection, calibration, output files and resuming."""

import csv
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import cellstack
from cellstack import FormatError, train
from cellstack.cli.main import main
from cellstack.train.checks import UsageError
from cellstack.train.examples import Inputs
from cellstack.train.forecasting import predict, prepare, training
from cellstack.train.forecasting.model import Calibration, Forecaster, as_network
from cellstack.train.forecasting.parts import epoch_steps, parts, typical_errors
from cellstack.train.forecasting.plan import MOST_WORK, defaults, plan, planned, understood
from cellstack.train.forecasting.recipe import SMOOTHED
from cellstack.train.forecasting.smoothing import Smoothing
from cellstack.train.forecasting.training import calibrated, train_forecast
from cellstack.train.forecasting.windows import Windows
from cellstack.train.options import Architecture, FitOptions, ForecastOptions
from cellstack.train.tables.table import date_unit, read_table

TWO_EPOCHS = FitOptions(epochs=2, batch=64, lr=1e-2, patience=0, threads=1)
QUICK = {"build": Architecture((8,), members=1, dropout=0.0), "options": TWO_EPOCHS}
YEARLY = ForecastOptions(seasons=(12,))


def waves(rows=500, seed=0, noise=0.1, period=12):
    """A series whose next season depends on a hidden level that a rule can't follow."""
    rng = np.random.default_rng(seed)
    n = np.arange(rows)
    y = 20 + 3 * np.sin(2 * np.pi * n / period) + 2 * np.sin(2 * np.pi * n / 37) + rng.normal(0, noise, rows)
    return pd.DataFrame({"date": pd.date_range("1980-01-01", periods=rows, freq="MS"), "y": y})


def trained(frame, request=YEARLY, ids=(), **over):
    return train_forecast(read_table(frame, id=ids), request, **{**QUICK, **over})


@pytest.fixture(scope="module")
def found():
    return trained(waves(), build=Architecture((16,), members=2, dropout=0.0), options=replace(TWO_EPOCHS, epochs=6))


@pytest.mark.long
def test_it_beats_every_rule_where_there_is_more_to_learn(found):
    errors = found.result.scores["targets"]["y"]
    assert {"naive", "drift", "seasonal naive, 12", "seasonal naive with drift, 12"} < set(errors)
    best = min(value["mae"] for name, value in errors.items() if name != "model")
    assert errors["model"]["mae"] < 0.8 * best
    assert 0.6 < errors["model"]["coverage"] < 0.95  # 0.8 is intended


@pytest.mark.long
def test_scores_are_those_of_the_written_forecasts(found):
    test = found.test
    off = np.abs(test.forecasts.median - test.actual)
    assert found.result.scores["targets"]["y"]["model"]["mae"] == pytest.approx(float(off.mean()))


def test_the_network_is_the_mean_of_its_members(found):
    table = read_table(waves())
    recipe, inputs = predict.trained(found.result.network, "model")
    windows = Windows(recipe, table, np.array([300, 400]))
    x, _ = inputs(windows.fetch(np.arange(2)).x)
    members = list(found.result.model)
    plain = as_network(members, {})
    with torch.no_grad():
        each = [(member(torch.from_numpy(x)) * member.scale[:, None]).numpy() for member in members]
    np.testing.assert_allclose(plain.run(x)[0], np.mean(each, axis=0).reshape(2, 12, 3), rtol=1e-4, atol=1e-5)


def test_a_calibration_is_part_of_the_weights(found):
    member = list(found.result.model)[:1]
    x = np.random.default_rng(0).normal(size=(3, 40, len(member[0].standardise.mean))).astype(np.float32)
    moved = np.array([[-0.5, 0.0, 0.25]])
    plain, changed = as_network(member, {}), as_network(member, {}, Calibration(np.array([0.5]), moved))
    np.testing.assert_allclose(changed.run(x)[0], 0.5 * plain.run(x)[0] + moved, rtol=1e-4, atol=1e-5)


def test_a_useless_network_gets_no_weight():
    table = read_table(waves())
    recipe = replace(plan(table, ForecastOptions(seasons=(12,)), 0.35), floors=(0.01,))
    cut = parts(table, recipe, 0.15, 0.2)
    windows = Windows(recipe, table, cut.validation, typical_errors(table, recipe, cut.ends))
    every = np.arange(len(cut.validation))
    inputs = Inputs.measure(windows, every)
    model = Forecaster(inputs.standardise, np.ones(1), recipe.horizon, recipe.quantiles, Architecture((4,)))
    torch.nn.init.normal_(model.head.weight, std=30.0)
    assert calibrated([model], windows, inputs, every).followed[0] <= 0.1


def test_saved_and_run_elsewhere_it_forecasts_the_same(found, tmp_path):
    found.result.network.save(tmp_path / "model.safetensors")
    net = cellstack.load(tmp_path / "model.safetensors")
    a, b = (predict.forecast(one, read_table(waves()), "model") for one in (found.result.network, net))
    np.testing.assert_array_equal(a.values, b.values)
    assert a.times[0, 0] == np.datetime64("2021-09-01")
    assert (np.diff(a.values, axis=-1) >= 0).all()


def test_a_forecast_depends_only_on_rows_up_to_its_origin(found):
    table = read_table(waves())
    changed = waves()
    changed.loc[401:, "y"] = 1e5
    a, b = (
        predict.forecast(found.result.network, one, "model", np.array([400])) for one in (table, read_table(changed))
    )
    np.testing.assert_array_equal(a.values, b.values)


def test_too_few_rows_are_refused_with_the_number_needed(found):
    with pytest.raises(
        UsageError, match=r"expected at least 12 rows \(one season\) before a forecast, found 5: 36 rows are best"
    ):
        predict.forecast(found.result.network, read_table(waves(5)), "model")


@pytest.mark.long
def test_several_series_one_new_and_one_too_short_to_train_on():
    whole = pd.concat([waves(seed=n).assign(shop=name) for n, name in enumerate("ab")])
    whole = pd.concat([whole, waves(20, seed=5).assign(shop="short")])
    done = trained(whole, ids="shop")
    assert set(done.test.forecasts.ids) == {"a", "b"}
    new = pd.concat([waves(100, seed=8).assign(shop="new"), waves(80, seed=9).assign(shop="other")])
    forecasts = predict.forecast(done.result.network, read_table(new, id="shop"), "model")
    assert forecasts.ids == ["new", "other"]
    assert np.isfinite(forecasts.values).all()


@pytest.mark.slow
def test_inputs_known_in_advance_are_used():
    rng = np.random.default_rng(3)
    frame = waves(noise=0.02)
    frame["promotion"] = (rng.random(500) < 0.3).astype(float)
    frame["y"] += 5 * frame["promotion"]
    options = replace(TWO_EPOCHS, epochs=12)
    with_known = trained(frame, ForecastOptions(("y",), seasons=(12,), known=("promotion",)), options=options)
    without_known = trained(frame, ForecastOptions(("y",), seasons=(12,)), options=options)
    errors = [one.result.scores["targets"]["y"]["model"]["mae"] for one in (with_known, without_known)]
    assert errors[0] < 0.7 * errors[1]
    ahead = frame.copy()
    ahead.loc[488:, "y"] = np.nan  # the forecast months have only the promotion
    a = predict.forecast(with_known.result.network, read_table(ahead), "model").median[0, :, 0]
    ahead.loc[488:, "promotion"] = 1.0
    b = predict.forecast(with_known.result.network, read_table(ahead), "model").median[0, :, 0]
    assert (b - a)[frame["promotion"][488:] == 0].mean() > 2.0


@pytest.mark.long
def test_two_targets_and_a_category():
    frame = waves()
    frame["z"] = -2.0 * frame["y"].shift(1).bfill()
    frame["sky"] = np.where(np.arange(500) % 12 < 6, "sun", "rain")
    done = trained(frame, ForecastOptions(("y", "z"), seasons=(12,)))
    assert set(done.result.scores["targets"]) == {"y", "z"}
    assert done.recipe.categories[0].labels == ("rain", "sun")
    forecasts = predict.forecast(done.result.network, read_table(frame), "model")
    assert forecasts.values.shape == (1, 12, 2, 3)
    assert abs(forecasts.median[0, :, 1].mean() + 2 * forecasts.median[0, :, 0].mean()) < 10


def prepared(frame, request=YEARLY):
    table = read_table(frame)
    return training.prepared(table, plan(table, request, 0.35), request, 0.15, 0.2)


def growing(rows=200):
    """A series with exponential growth and proportional variations."""
    frame = waves(rows)
    return frame.assign(y=np.exp(frame["y"] / 20 + np.arange(rows) / 50))


def test_exponential_growth_is_scaled_by_the_level():
    windows, _ = prepared(growing())
    assert windows.recipe.scale == "level"
    assert windows.recipe.smoothing[0].log
    assert windows.recipe.rule == SMOOTHED
    assert prepared(growing(), ForecastOptions(seasons=(12,), scale="spread"))[0].recipe.scale == "spread"
    below_zero = growing().assign(y=growing()["y"] - 5)
    assert prepared(below_zero)[0].recipe.scale == "spread"  # its level can't be the unit


@pytest.mark.parametrize(("error", "asked", "seasons"), [(0.9, None, ()), (1.1, None, (12,)), (0.1, (12,), (12,))])
def test_a_season_that_makes_forecasts_worse_is_dropped(monkeypatch, error, asked, seasons):
    how = Smoothing(False, 0.1, 0.0, 0.0, 0.0, 1.0, 0.0)
    errors = {(12,): 1.0, (): error}
    monkeypatch.setattr(prepare, "smoothings", lambda table, recipe, *_: ((how,), errors[recipe.seasons]))
    windows, cut = prepared(waves(), ForecastOptions(seasons=asked))
    assert windows.recipe.seasons == seasons
    assert len(cut.training) == 325 - 12 - (11 if seasons else 0)  # the first season can be used for training again


@pytest.mark.long
def test_the_final_smoothing_uses_the_validation_part(monkeypatch):
    original, known = training.smoothings, []

    def marked(table, recipe, ends, *rest):
        how, error = original(table, recipe, ends, *rest)
        known.append(int(ends[0]))
        return tuple(one._replace(level=ends[0] / 1000) for one in how), error

    for module in (prepare, training):
        monkeypatch.setattr(module, "smoothings", marked)
    done = trained(waves())
    assert known == [325, 400]
    assert done.recipe.smoothing[0].level == 0.4


def test_a_weight_has_to_improve_by_more_than_a_standard_error():
    rng = np.random.default_rng(0)
    costs = np.stack([rng.normal(1.0, 0.1, 50), rng.normal(0.99, 0.1, 50)])
    assert training._smallest(costs, 10.0) == 0
    costs[1] -= 0.2
    assert training._smallest(costs, 10.0) == 1
    assert training._smallest(np.array([[1.0, 1.0], [0.5, 1.2]]), 1.0) == 0  # two that don't agree


@pytest.mark.long
def test_networks_without_weight_are_not_trained_further(monkeypatch):
    monkeypatch.setattr(training, "calibrated", lambda *_: Calibration(np.zeros(1), np.zeros((1, 3))))
    done = trained(growing())
    assert not any(entry["whole"] for entry in done.result.history)
    said = "the networks don't clearly improve on exponential smoothing in the validation part and have weight 0"
    assert f"{said}: the forecast of y is exponential smoothing alone" in done.result.sentence
    np.testing.assert_allclose(done.test.forecasts.median, done.test.forecasts.reference)
    np.testing.assert_allclose(done.test.forecasts.median, done.test.baselines["exponential smoothing"])


def test_seasons_are_found_and_none_where_there_is_none():
    assert plan(read_table(waves()), ForecastOptions(), 0.35).seasons == (12,)
    noise = pd.DataFrame({"y": np.random.default_rng(0).normal(size=300)})
    recipe = plan(read_table(noise), ForecastOptions(), 0.35)
    assert (recipe.seasons, recipe.horizon) == ((), 12)


def test_the_table_is_described():
    frame = waves()
    frame["promotion"], frame["sky"], frame["note"] = (
        1.0 * (np.arange(500) % 5 == 0),
        "sun",
        [f"n{n}" for n in range(500)],
    )
    frame.loc[::2, "sky"] = "rain"
    table = read_table(frame.drop(index=[100, 101, 102]))
    request = ForecastOptions(("y",), known=("promotion",))
    recipe = plan(table, request, 0.35)
    said = "\n".join(understood(table, recipe, request, parts(table, recipe, 0.15, 0.2)))
    for part in (
        "497 rows, monthly from 1980-01-01 to 2021-08-01 by `date`",
        "1 gap filled with masked rows (3 rows)",
        "`sky` as 2 categories",
        "`note`",
        "forecasting `y` 12 steps ahead from a window of 24; season 12, detected in the series",
        "inputs known in advance: `promotion`",
        "calendar: the season of the year",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ForecastOptions(("x",)), r"expected target to be one of y, z, got 'x'"),
        (ForecastOptions(("note",)), r"got 'note', which is ignored: text"),
        (ForecastOptions(("sky",)), r"expected target to be one of y, z, got 'sky', which is text, such as 'rain'$"),
        (ForecastOptions(("y",), inputs=("x",)), r"expected input to be one of y, z, sky, price, got 'x'"),
        (
            ForecastOptions(("price",)),
            r"'price', which is text, such as '76.5 EUR'; to use its numbers, in pandas df\['price'\].str.removesuffix",
        ),
        (ForecastOptions(), r"expected `target=…`, one or more of y, z"),
        (ForecastOptions(("y",), inputs=("y",)), r"each column can have one role only: y can't be"),
        (
            ForecastOptions(("y",), horizon=450),
            r"too few rows for the training part, .*: choose a horizon of at most 75, or",
        ),
        (
            ForecastOptions(("y",), horizon=100),
            r"too few rows for the validation part, .*: choose a horizon of at most 75, or",
        ),
        (ForecastOptions(("y",), holidays="XX"), r"expected a supported country, such as US or DE-BY, got 'XX'"),
    ],
)
def test_invalid_requests(request_, message):
    frame = waves()
    frame["z"], frame["sky"], frame["note"] = frame["y"] ** 2, ["sun", "rain"] * 250, [f"n{n}" for n in range(500)]
    frame["price"] = ["76.5 EUR", "80 EUR"] * 250
    with pytest.raises(UsageError, match=message):
        trained(frame, request_)


def test_the_longest_horizon_that_a_message_names_is_the_longest():
    table = read_table(pd.concat([waves(60).assign(shop="a"), waves(200).assign(shop="b")]), id="shop")

    def origins(horizon, validation=0.15, test=0.2):
        return planned(table, ForecastOptions(("y",), horizon=horizon, seasons=(12,)), validation, test).parts

    with pytest.raises(UsageError, match=r"horizon of 99 don't fit: choose a horizon of at most 30,"):
        origins(99)
    assert [len(part) for part in origins(30)[1:3]] == [1, 11]
    with pytest.raises(UsageError, match="too few rows for the validation part"):
        origins(31)
    with pytest.raises(UsageError, match=r"choose a horizon of at most 40,"):
        origins(99, validation=0.0)


def test_a_target_without_values_is_refused():
    with pytest.raises(UsageError, match="column 'z' has no values"):
        trained(waves().assign(z=np.nan), ForecastOptions(("z",)))


@pytest.mark.long
def test_a_constant_series_has_a_constant_forecast():
    done = trained(waves().assign(y=3.0))
    np.testing.assert_allclose(
        predict.forecast(done.result.network, read_table(waves().assign(y=3.0)), "m").median, 3.0
    )


@pytest.mark.long
@pytest.mark.parametrize("on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_and_uninterrupted_are_the_same_bit_for_bit(tmp_path, monkeypatch, on):
    monkeypatch.setattr(training, "takes_long", lambda *_: on)

    def options(**more):
        return replace(TWO_EPOCHS, checkpoint=tmp_path / "checkpoint", **more)

    build, frame = Architecture((4,), members=2, dropout=0.3), waves(200)
    learned, batches, last = cellstack.train.loop._Run.train, [], None

    def train(run, batch):
        if len(batches) == last:
            raise KeyboardInterrupt
        batches.append(1)
        learned(run, batch)

    with monkeypatch.context() as here:
        here.setattr("cellstack.train.loop._Run.train", train)
        whole = trained(frame, build=build)
        last = len(batches) * 5 // 6  # while the members are trained further
        batches.clear()
        with pytest.raises(KeyboardInterrupt):
            trained(frame, build=build, options=options())
    with pytest.raises(UsageError, match="the checkpoint already exists"):
        trained(frame, build=build, options=options())
    again = trained(frame, build=build, options=options(resume=True))
    for a, b in zip(whole.result.network.nodes, again.result.network.nodes, strict=True):
        for name, array in a.held.items() if hasattr(a, "held") else ():
            np.testing.assert_array_equal(array, b.held[name])
    table = read_table(frame)
    a, b = (predict.forecast(one.result.network, table, "model").values for one in (whole, again))
    np.testing.assert_array_equal(a, b)
    assert whole.result.history == again.result.history


@pytest.mark.slow
def test_slow_trainings_are_continued_and_others_start_again(monkeypatch, capsys):
    build, options = Architecture((8,), members=2, dropout=0.0), replace(TWO_EPOCHS, epochs=6, progress=True)
    monkeypatch.setattr(training, "takes_long", lambda *_: True)
    done = trained(waves(), build=build, options=options).result
    whole = [entry for entry in done.history if entry["whole"]]
    assert len(whole) == 4  # a third of six epochs, of each
    assert whole[0]["loss"] < done.history[2]["loss"]  # it continues from the trained weights
    assert "trained further with the validation part for 2, 2" in done.sentence
    err = capsys.readouterr().err
    for name in (
        "network 1 of 2, epoch 6/6",
        "network 2 of 2, epoch 6/6",
        "network 2 of 2, with the validation part, epoch 2/2",
    ):
        assert name in err


def test_defaults_differ_by_how_many_windows_there_are_and_how_long_they_are():
    assert defaults(100, 40)["lr"] < defaults(2000, 40)["lr"]
    assert defaults(10_000, 40)["members"] < defaults(100, 40)["members"]
    assert defaults(10_000, 200)["epochs"] < defaults(10_000, 40)["epochs"]
    assert defaults(10_000, 20_000)["epochs"] >= 8


@pytest.mark.parametrize("windows", [1, 63, 64, 1499, 2000, 3001, 10**6])
@pytest.mark.parametrize("length", [17, 60, 99, 101, 216, 400])
def test_the_work_of_a_training_with_default_options_is_bounded(windows, length):
    usual = defaults(windows, length)
    steps = epoch_steps(windows, usual["batch"])
    work = usual["members"] * usual["epochs"] * steps * min(windows, usual["batch"]) * length
    assert work <= max(1.05 * MOST_WORK, 8 * usual["members"] * 50 * 64 * length)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    frame = waves(300)
    frame.to_csv(folder / "y.csv", index=False)
    words = ["--members", "1", "--units", "8", "--epochs", "3", "--threads", "1", "--quiet"]
    words += ["--forecasts", str(folder / "test.csv"), "--picture", str(folder / "training.svg")]
    words = ["train", str(folder / "y.csv"), *words, "-o", str(folder / "y")]
    with (folder / "printed.txt").open("w") as file, redirect_stdout(file):
        assert main(words) == 0
    return folder


@pytest.mark.long
def test_the_command_describes_the_table_and_compares_with_baselines(command):
    out = (command / "printed.txt").read_text()
    assert "300 rows, monthly from 1980-01-01" in out
    assert "exponential smoothing" in out
    assert "this model's mean absolute error is" in out
    assert "of the actual values are in the 80% prediction interval" in out


@pytest.mark.long
def test_dry_run_trains_nothing(command, capsys):
    assert main(["train", str(command / "y.csv"), "--dry-run"]) == 0
    assert "forecasting `y` 12 steps ahead" in capsys.readouterr().out
    assert main(["train", str(command / "y.csv"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["understood"]["recipe"]["seasons"] == [12]


@pytest.mark.long
def test_forecasts_of_the_test_part_are_written(command):
    rows = list(csv.DictReader(io.StringIO((command / "test.csv").read_text())))
    assert list(rows[0]) == ["origin", "date", "y_actual", "y", "y_0.1", "y_0.9"]
    assert rows[0]["origin"] == "1999-12-01"
    assert rows[0]["date"] == "2000-01-01"
    assert len(rows) == 49 * 12


@pytest.fixture(scope="module")
def hourly(tmp_path_factory):
    """Forecasts over midnight, of two shops, one of them with a formula as its name."""
    folder = tmp_path_factory.mktemp("hourly")
    times = pd.date_range("2024-01-01", periods=200, freq="h")
    shops = [
        pd.DataFrame({"time": times, "shop": shop, "=y": np.sin(np.arange(200) / 4) + n})
        for n, shop in enumerate(['=HYPERLINK("http://a.example","b")', "-5"])
    ]
    pd.concat(shops).to_csv(folder / "y.csv", index=False)
    words = ["--id", "shop", "--horizon", "30", "--seasons", "24", "--window", "24", "--members", "1", "--units", "4"]
    words += ["--epochs", "1", "--threads", "1", "--quiet", "--forecasts", str(folder / "test.csv")]
    assert main(["train", str(folder / "y.csv"), *words, "-o", str(folder / "y")]) == 0
    return folder


@pytest.mark.long
def test_the_dates_of_a_column_have_one_format(hourly, capsys):
    capsys.readouterr()
    assert main(["run", str(hourly / "y"), str(hourly / "y.csv")]) == 0
    after = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    tested = list(csv.DictReader(io.StringIO((hourly / "test.csv").read_text())))
    assert [row["time"] for row in after[15:17]] == ["2024-01-09T23:00:00", "2024-01-10T00:00:00"]
    columns = [(after, "time"), (tested, "time"), (tested, "origin")]
    for rows, name in columns:
        assert {len(row[name]) for row in rows} == {19}
        assert any(row[name].endswith("T00:00:00") for row in rows)
    assert main(["run", str(hourly / "y"), str(hourly / "y.csv"), "--json", "--origin", "2024-01-08"]) == 0
    found = json.loads(capsys.readouterr().out)["forecasts"][0]
    assert (found["origin"], found["dates"][23]) == ("2024-01-08T00:00:00", "2024-01-09T00:00:00")
    assert pd.to_datetime([row["time"] for row in after]).notna().all()


@pytest.mark.long
def test_the_dates_of_a_report_have_one_form(hourly, capsys):
    assert main(["train", str(hourly / "y.csv"), "--id", "shop", "--horizon", "5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "hourly from 2024-01-01 00:00 to 2024-01-09 07:00" in out
    assert "windows to train on, up to 2024-01-06 09:00\n" in out
    assert not re.search(r"\d{4}-\d\d-\d\d(?! \d\d:\d\d)", out)


def test_fractions_of_seconds_have_one_format_too():
    times = np.array(["2024-01-01T00:00:00", "2024-01-01T00:00:00.5"], "datetime64[us]")
    assert date_unit(times) == "us"
    assert date_unit(times[:1], times[:1]) == "D"
    assert date_unit(times[:1], times[:1] + np.timedelta64(1, "m")) == "s"


def test_names_that_a_spreadsheet_would_run_are_text(hourly, capsys):
    capsys.readouterr()
    assert main(["run", str(hourly / "y"), str(hourly / "y.csv")]) == 0
    out = capsys.readouterr().out
    for text in (out, (hourly / "test.csv").read_text()):
        rows = list(csv.reader(io.StringIO(text)))
        assert {row[0] for row in rows[1:]} == {'\'=HYPERLINK("http://a.example","b")', "-5"}
        assert {name for name in rows[0] if "y" in name} <= {"'=y", "'=y_actual", "'=y_0.1", "'=y_0.9"}
        assert not any(field.startswith(("=", "+", "@")) for row in rows for field in row)
    assert main(["run", str(hourly / "y"), str(hourly / "y.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecasts"][0]["series"].startswith("=HYPERLINK")


def test_run_forecasts_after_the_last_row_or_another(command, capsys):
    assert main(["run", str(command / "y"), str(command / "y.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [rows[0]["date"], rows[-1]["date"], len(rows)] == ["2005-01-01", "2005-12-01", 12]
    assert main(["run", str(command / "y"), str(command / "y.csv"), "--origin", "1999-12-01", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["forecasts"][0]
    tested = list(csv.DictReader(io.StringIO((command / "test.csv").read_text())))[:12]
    np.testing.assert_allclose(found["y"]["forecast"], [float(row["y"]) for row in tested], rtol=1e-4)
    np.testing.assert_allclose(found["y"]["actual"], [float(row["y_actual"]) for row in tested], rtol=1e-4)
    error = np.subtract(found["y"]["forecast"], found["y"]["actual"])
    assert report["scores"]["y"]["mae"] == pytest.approx(np.abs(error).mean())
    assert main(["run", str(command / "y"), str(command / "y.csv"), "--origin", "1999-12-01"]) == 0
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == tested
    assert main(["run", str(command / "y"), str(command / "y.csv"), "--origin", "1899-12-01"]) == 2
    assert "expected --origin to be a row of" in capsys.readouterr().err


def test_run_accepts_the_format_of_the_file_for_its_origin(command, capsys, tmp_path):
    frame = waves(300)
    frame.assign(date=frame["date"].dt.strftime("%d/%m/%Y")).to_csv(tmp_path / "z.csv", index=False)
    words = ["run", str(command / "y"), str(tmp_path / "z.csv"), "--day-first", "--json", "--origin"]
    for origin in ("01/12/1999", "1999-12-01", "1999-12"):
        assert main([*words, origin]) == 0
        assert json.loads(capsys.readouterr().out)["forecasts"][0]["dates"][0] == "2000-01-01"
    assert main([*words, "1.12.1999"]) == 2
    said = "expected --origin to be a date such as 01/12/2004 or 2004-12-01, got '1.12.1999'"
    assert said in capsys.readouterr().err


def test_pictures_of_a_training_and_of_a_forecast(command, capsys, tmp_path):
    drawn = (command / "training.svg").read_text()
    assert drawn.count('id="axes_') == 4  # losses, mase, test part, error by horizon
    words = ["run", str(command / "y"), str(command / "y.csv"), "--origin", "1999-12-01", "--picture"]
    assert main([*words, str(tmp_path / "y.png")]) == 0
    assert (tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("origin,date,y_actual,y,y_0.1,y_0.9\n1999-12-01,2000-01-01,")
    assert main([*words, str(tmp_path / "y.gif")]) == 2
    assert "expected --picture to end in one of .png, .svg, .pdf" in capsys.readouterr().err


def test_options_of_forecasts_are_refused_for_other_networks(capsys, tmp_path):
    cellstack.Network((cellstack.nodes.Activation("relu"),), inputs={"x": (None, 1)}).save(tmp_path / "net.safetensors")
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 1), np.float32))
    for option, value in (("--origin", "2024-01-01"), ("--picture", str(tmp_path / "y.png"))):
        assert main(["run", str(tmp_path / "net"), str(tmp_path / "x.npy"), option, value]) == 2
        assert f"{option} applies only to forecasts: " in capsys.readouterr().err
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--horizon", "0", "expected horizon to be an integer from 1 to"),
        ("--window", "0", "expected window to be an integer from 1 to"),
        ("--seasons", "0", "--seasons: expected positive integers separated by commas, got '0'"),
        ("--seasons", "day", "--seasons: expected positive integers separated by commas, got 'day'"),
        ("--quantiles", "2", "expected --quantiles to be numbers between 0 and 1, such as 0.1,0.9, got (2.0,)"),
        ("--quantiles", "low", "--quantiles: expected a number, got 'low'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(command, capsys, option, value, message):
    try:
        status = main(["train", str(command / "y.csv"), "--dry-run", option, value])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_run_on_too_few_rows_fails(command, capsys, tmp_path):
    waves(5).to_csv(tmp_path / "few.csv", index=False)
    assert main(["run", str(command / "y"), str(tmp_path / "few.csv")]) == 1
    assert "expected at least 12 rows" in capsys.readouterr().err


def test_a_recipe_of_an_older_version_says_to_train_again(command):
    net = cellstack.load(command / "y.safetensors")
    old = {"target": "y", "inputs": [], "horizon": 12, "window": 24, "season": 12}
    changed = cellstack.Network(
        net.nodes, net.names, {**net.metadata, "recipe": old}, inputs={"x": (None, net.input_size)}, wires=net.wires
    )
    with pytest.raises(FormatError, match=r"the network's recipe isn't one of cellstack 0.2 or later.*train it again"):
        predict.trained(changed, "old")


@pytest.mark.long
def test_the_function_and_the_command_give_the_same_network(command):
    done = train.fit_forecast(str(command / "y.csv"), members=1, units=8, epochs=3, threads=1, seed=0, target="y")
    net = cellstack.load(command / "y.safetensors")
    a, b = (predict.forecast(one, read_table(waves(300)), "y").values for one in (done.result.network, net))
    np.testing.assert_array_equal(a, b)
    assert "300 rows, monthly from 1980-01-01" in "\n".join(done.understood)
