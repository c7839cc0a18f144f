"""What `print` shows of a training's results: a few lines, in which every metric says on which part it was measured."""

import numpy as np
import pandas as pd
import pytest

from cellstack import train
from cellstack.train import history

QUICK = {"units": 4, "epochs": 2, "threads": 1}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 12, 3)), np.repeat(["calm", "busy"], 20)


def test_a_result_is_described_in_six_lines(data):
    result = train.fit(*data, test=0.2, **QUICK)
    lines = repr(result).splitlines()
    assert len(lines) == 6
    assert lines[0] == "Result: LSTM 6 -> 4, 186 weights, 2 classes"
    assert lines[1] == "  trained for all 2 epochs"
    assert lines[3].startswith("  on the test part: accuracy ")
    assert lines[4].startswith("  for comparison, ")
    assert lines[5].startswith(f"  {result.fit.steps} steps in ")
    *curves, confusion = result.plot().axes
    assert [axis.get_ylabel() for axis in curves] == ["loss", "validation accuracy"]
    counts = result.scores["confusion"]
    assert [text.get_text() for text in confusion.texts] == [str(count) for count in counts.flat if count]
    assert [text.get_text() for text in confusion.get_yticklabels()] == ["busy", "calm"]
    shares = np.asarray(confusion.images[0].get_array())
    np.testing.assert_allclose(shares * counts.sum(axis=1, keepdims=True), counts)
    assert result.labels == ("busy", "calm")


def test_the_number_of_epochs_is_the_reason_where_patience_ends_in_the_same_one(data):
    how = {"units": 4, "threads": 1, "lr": 1e-30, "patience": 2, "validation": 0.5}  # the first epoch is the best
    early = "stopped after 3 epochs, because the validation loss had not decreased for 2; kept epoch 1"
    assert train.fit(*data, epochs=4, **how).sentence.startswith(early)
    assert train.fit(*data, epochs=3, **how).sentence.startswith("trained for all 3 epochs; kept epoch 1")


def test_a_fit_says_which_part_each_metric_is_of(data):
    first, best = repr(train.fit(*data, **QUICK).fit).splitlines()
    assert first.startswith("Fit: 2 epochs, all of them; ")
    assert "training loss 0." in best
    assert ", validation loss 0." in best
    assert ", validation accuracy " in best
    assert repr(train.custom.Fit()) == "Fit: 0 epochs, not finished; 0 steps in 0.0 s on 0 threads"


def test_no_metric_is_measured_on_the_training_part(data):
    result = train.fit(*data, validation=0, **QUICK)
    assert set(result.history[0]) == {"epoch", "lr", "loss"}
    assert len(result.plot().axes) == 1
    assert "accuracy" not in repr(result).replace("no data was held out to measure its accuracy on", "")


@pytest.mark.long
def test_a_forecast_is_described_with_its_best_baseline():
    rows = 5 + np.sin(np.arange(120) * np.pi / 6) + np.random.default_rng(0).normal(size=120) / 9
    frame = pd.DataFrame({"y": rows, "z": rows[::-1]})
    done = train.fit_forecast(frame, ["y", "z"], horizon=4, seasons=(12,), members=2, **QUICK)
    lines = repr(done).splitlines()
    assert len(lines) <= 7
    assert lines[:2] == ["Trained: forecasts y, z 4 steps ahead", "  2 networks of LSTM 21 -> 4, 1,144 weights"]
    assert "mean absolute error on the test part: y 0." in lines[-3]
    found = done.result.scores["targets"]["y"]
    best = min((name for name in found if name != "model"), key=lambda name: found[name]["mae"])
    assert f"y {found[best]['mae']:.4g} ({best})" in lines[-2]


def test_plots_name_the_part(tmp_path):
    entries = [{"epoch": n, "lr": 0.1, "loss": 1.0, "validation_loss": 1.0, "accuracy": 0.5} for n in (1, 2)]
    history.draw(tmp_path / "a.svg", entries)
    assert (tmp_path / "a.svg").stat().st_size
    assert [history.named(name) for name in ("accuracy", "rmse", "mine")] == [
        "validation accuracy",
        "validation RMSE",
        "mine",
    ]
