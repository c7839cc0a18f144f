"""`cellstack train --dry-run`: the training to come, in words and figures, and the options that are refused."""

import json
import time
from importlib.resources import files

import numpy as np
import pytest

from cellstack.cli import main as cli
from cellstack.cli.train import _duration, _expected_text

DATA = files("cellstack_demo") / "data"
VOWELS, CO2 = str(DATA / "JapaneseVowels_TRAIN.ts"), str(DATA / "co2.csv")
QUICK = ["--threads", "1", "--quiet"]


def run(capsys, *words):
    """Run the command line; return its status, standard output and standard error."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def series(tmp_path):
    rows = np.sin(np.arange(200) * np.pi / 6) + np.random.default_rng(0).normal(size=200) / 3
    dates = np.datetime64("1990-01", "M") + np.arange(200)
    file = tmp_path / "y.csv"
    file.write_text("date,y\n" + "".join(f"{date}-01,{row:.4f}\n" for date, row in zip(dates, rows, strict=True)))
    return file


@pytest.mark.long
def test_a_forecast_names_the_test_span_the_baselines_and_the_networks(capsys, series):
    words = ["train", series, "--members", "2", "--units", "4", "--epochs", "2", *QUICK]
    status, out, err = run(capsys, *words, "--dry-run")
    assert (status, err) == (0, "")
    assert "windows to train on, up to 2000-10-01\n" in out
    assert "to validate on, of the rows from 2000-11-01 to 2003-04-01\n" in out
    assert "29 forecasts to test on, of the rows from 2003-05-01 to 2006-08-01\n" in out
    assert "`seasonal naive, 12`" in out
    assert "2 networks, each: LSTM " in out
    assert "; at most 2 epochs of 20 steps, batches of 64; then trained again with the validation part\n" in out
    planned = json.loads(run(capsys, *words, "--dry-run", "--json")[1])["plan"]
    assert planned["test"] == {"forecasts": 29, "rows": ["2003-05-01", "2006-08-01"]}
    assert 0 < planned["seconds"][0] <= planned["seconds"][1]
    report = json.loads(run(capsys, *words, "-o", series.parent / "net", "--json")[1])
    measured = report["test"]["targets"]["y"]
    assert [*planned["baselines"]] == [name for name in measured if name != "model"]
    assert report["test"]["origins"] == 29
    assert report["parameters"] == planned["weights"]
    assert report["plan"] == {name: value for name, value in planned.items() if name != "seconds"}


@pytest.mark.long
@pytest.mark.parametrize("more", [["--bidirectional", "--cell", "gru"], ["--units", "5"]])
def test_the_weights_and_steps_are_those_of_the_training(capsys, tmp_path, more):
    words = ["train", VOWELS, "--epochs", "1", "--noise", "0", *more, *QUICK, "--json"]
    planned = json.loads(run(capsys, *words, "--dry-run")[1])["plan"]
    report = json.loads(run(capsys, *words, "-o", tmp_path / "net")[1])
    assert planned["weights"] == report["parameters"]
    assert planned["steps"] == report["steps"]


@pytest.mark.long
def test_the_expected_time_is_about_that_of_the_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # which other processes hardly change
    words = ["train", VOWELS, "--epochs", "10", "--patience", "0", *QUICK, "--json"]
    planned = json.loads(run(capsys, *words, "--dry-run")[1])["plan"]["seconds"]
    took = json.loads(run(capsys, *words, "-o", tmp_path / "net")[1])["seconds"]
    assert planned[0] == planned[1]
    assert planned[1] / 5 < took < planned[1] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([VOWELS, "--epochs", "0"], "expected --epochs >= 1, got 0"),
        ([VOWELS, "--lr", "-1"], "expected --lr > 0 and finite, got -1.0"),
        ([VOWELS, "--batch", "0"], "expected --batch >= 1, got 0"),
        ([VOWELS, "--clip", "-1"], "expected --clip > 0 and finite, got -1.0"),
        ([VOWELS, "--dropout", "1"], "expected --dropout in [0, 1), got 1.0"),
        ([VOWELS, "--validation", "1"], "expected --validation to be a share in [0, 1), got 1.0"),
        ([VOWELS, "--init", "missing"], "missing: no such file"),
        ([VOWELS, "-o", "missing/net"], "the folder missing doesn't exist"),
        ([VOWELS, "-o", "net.onnx"], "`cellstack convert net.safetensors net.onnx` writes .onnx"),
        ([VOWELS, "-o", "net.c"], "`cellstack convert net.safetensors net.c` writes .c"),
        ([VOWELS, "--checkpoint", "old"], "old: the checkpoint already exists"),
        ([VOWELS, "--log", "missing/log.csv"], "missing/log.csv: there is no folder"),
        ([VOWELS, VOWELS], "the test file is the training file; test on other data"),
        (
            [VOWELS, str(DATA / "JapaneseVowels_TEST.ts"), "--test", "0.2"],
            "both name data to test on: give one of them",
        ),
        ([CO2, "--members", "0"], "expected --members from 1 to 99, got 0"),
        ([CO2, "--horizon", "0"], "expected horizon to be an integer from 1 to 2147483647, got 0"),
        ([CO2, "--window", "0"], "expected window to be an integer from 1 to 2147483647, got 0"),
        ([CO2, "--checkpoint", "old"], "old.1: the checkpoint already exists"),
    ],
)
def test_what_a_training_refuses_a_dry_run_refuses(capsys, tmp_path, monkeypatch, co2_table, words, message):
    monkeypatch.chdir(tmp_path)
    words = [co2_table if word == CO2 else word for word in words]
    for name in ("old", "old.1"):
        (tmp_path / name).write_text("")
    before = sorted(tmp_path.iterdir())
    for more in (["--dry-run"], ["-o", "net"] if "-o" not in words else []):
        status, _, err = run(capsys, "train", *words, *more)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
    assert [path for path in sorted(tmp_path.iterdir()) if path.suffix != ".lock"] == before


def test_durations_have_one_or_two_digits():
    said = [_duration(seconds) for seconds in (0.2, 1.2, 47, 130, 5000, 9000)]
    assert said == ["1 second", "1 second", "47 seconds", "2 minutes", "83 minutes", "2.5 hours"]
    assert _expected_text((9.0, 26.0)) == "expected time: 9 to 26 seconds on this machine, depending on early stopping"
    assert _expected_text((50.0, 55.0)) == "expected time: about 55 seconds on this machine"
    assert "50 seconds to 5 minutes" in _expected_text((50.0, 300.0))
