"""The search for settings: what it tries, keeps, stores and refuses."""

import itertools
import json
import os
import signal
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from cellstack import train
from cellstack.cells import errors
from cellstack.cli import main as cli
from cellstack.train import workflow
from cellstack.train.checks import UsageError

QUICK = {"epochs": 3, "threads": 1, "baseline": False}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(length, 2)).cumsum(0) for length in rng.integers(4, 8, 60)]
    return x, ["up" if one[-1, 0] > 0 else "down" for one in x]


@pytest.mark.long
def test_the_best_of_the_settings_is_trained(data):
    result = train.fit(*data, test=0.2, search=4, validation=0.4, **QUICK)
    losses = [trial.loss for trial in result.trials if trial.completed]
    assert len(result.trials) == 4
    assert losses == sorted(losses)
    best = result.trials[0].settings
    assert [cell.spec.units for cell in result.network.cells] == [best["width"]] * best["layers"]
    assert {cell.spec.kind for cell in result.network.cells} == {best["cell"]}
    assert result.fit.best["validation_loss"] == result.trials[0].loss
    usual = train.fit(*data, test=0.2, validation=0.4, **QUICK)
    first = {"layers": 2, "width": 48, "lr": 0.005, "cell": "lstm", "pooling": "max", "noise": 0.6}
    assert usual.fit.best["validation_loss"] in [trial.loss for trial in result.trials if trial.settings == first]
    lines = repr(result.trials).splitlines()
    assert lines[0].startswith("4 trials; ")
    assert lines[1].split()[:4] == ["validation", "loss", "accuracy", "epochs"]
    assert len(lines) == 6
    assert "accuracy" in result.scores


def test_what_is_given_is_kept(data):
    result = train.fit(*data, units=5, cell="gru", pooling="last", noise=0, search=2, **QUICK)
    assert [[*trial.settings] for trial in result.trials] == [["lr"]] * 2
    assert [cell.spec.units for cell in result.network.cells] == [5]
    per_step = [np.sign(one[:, 0]).astype(int) for one in data[0]]
    result = train.fit(data[0], per_step, units=5, lr=0.01, search=2, **QUICK)
    assert {*result.trials[0].settings} == {"cell", "noise"}
    assert result.network(np.zeros((1, 3, 2), np.float32)).shape[:2] == (1, 3)


def test_settings_that_fail_are_left_out(data):
    count, most = itertools.count(), 10_000

    def loss(out, y):
        return torch.nn.functional.cross_entropy(out, y, reduction="none") * (torch.nan if next(count) > most else 1)

    how = {"units": 4, "cell": "gru", "pooling": "last", "noise": 0, "loss": loss, **QUICK}
    train.fit(*data, **how)
    most = 2 * next(count)  # calls of the first two trials
    count = itertools.count()
    with pytest.raises(UsageError, match="the loss is no longer finite"):  # in the final training
        train.fit(*data, search=4, **how)
    assert next(count) == most + 4  # one in each of the other trials, and in the final training
    count, most = itertools.count(), -1
    with pytest.raises(UsageError, match="the loss is no longer finite in epoch 1"):  # in the first trial
        train.fit(*data, search=4, **how)
    assert next(count) == 1


@pytest.mark.parametrize(
    ("how", "searched"),
    [
        ({"cell": "mlstm", "heads": 2}, {"lr", "pooling", "noise"}),
        ({"cell": "mlstm"}, {"layers", "width", "lr", "pooling", "noise"}),
        ({"bidirectional": True, "every_step": True, "cell": "gru"}, {"layers", "width", "lr", "noise"}),
        ({"offset": 0.1, "cell": "gru"}, {"layers", "width", "lr", "pooling"}),
    ],
)
def test_settings_that_do_not_go_together_are_not_tried(data, how, searched):
    assert {*train.fit(*data, search=3, **how, **QUICK | {"epochs": 1}).trials[0].settings} == searched


@pytest.mark.long
def test_a_search_is_resumed(data, tmp_path):
    how = {**QUICK, "checkpoint": tmp_path / "trials.log", "cell": "gru", "units": 4}
    first = train.fit(*data, search=2, **how)
    with pytest.raises(UsageError, match=r"trials\.log"):
        train.fit(*data, search=2, **how)
    more = train.fit(*data, search=4, resume=True, **how)
    assert len(more.trials) == 4
    settings = [trial.settings for trial in more.trials]
    assert all(trial.settings in settings for trial in first.trials)
    assert len({str(one) for one in settings}) == 4
    with pytest.raises(UsageError, match=r"expected the trials of a search with given .*gru.* found"):
        train.fit(*data, search=4, resume=True, **how | {"dropout": 0.1})
    assert len(train.fit(*data, search=2, overwrite=True, **how).trials) == 2


def test_what_can_not_be_searched_is_refused(data, monkeypatch):
    with pytest.raises(UsageError, match="search: expected a validation part"):
        train.fit(*data, search=2, validation=0, **QUICK)
    with pytest.raises(UsageError, match="search: all options that it would choose are given"):
        train.fit(*data, search=2, units=4, cell="gru", lr=0.01, pooling="last", noise=0.1, **QUICK)
    with pytest.raises(UsageError, match="expected search >= 2, got 1"):
        train.fit(*data, search=1, **QUICK)
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"search needs optuna: pip install 'cellstack\[search\]'"):
        train.fit(*data, search=2, **QUICK)


def test_callbacks_are_those_of_the_final_training(data):
    seen = []
    result = train.fit(*data, search=2, units=4, callbacks=[lambda epoch: seen.append(epoch.entry["epoch"])], **QUICK)
    assert seen == [1, 2, 3]
    assert len(result.trials) == 2


@pytest.mark.parametrize(("trial", "found"), [(2, 1), (1, None)])
def test_ctrl_c_ends_the_search(data, monkeypatch, trial, found):
    done, fitted = [], workflow.fitted

    def interrupted(*args):
        done.append(args)
        if len(done) == trial:
            os.kill(os.getpid(), signal.SIGINT)
        return fitted(*args)

    monkeypatch.setattr(workflow, "fitted", interrupted)
    if found is None:
        with pytest.raises(KeyboardInterrupt):
            train.fit(*data, search=5, units=4, **QUICK)
    else:
        assert len(train.fit(*data, search=5, units=4, **QUICK).trials) == found
        assert len(done) == trial + 1


def test_the_command_line(data, tmp_path, capsys):
    x = np.stack([np.resize(one, (6, 2)) for one in data[0]]).astype(np.float32)
    np.savez(tmp_path / "toy.npz", x=x, y=np.array(data[1]))
    words = ["train", str(tmp_path / "toy.npz"), "-o", str(tmp_path / "net"), "--search", "2", "--units", "4"]
    words += ["--epochs", "2", "--threads", "1"]
    assert cli.main([*words, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "\n2 trials; " in out
    assert "\nvalidation loss  accuracy  epochs  " in out
    assert cli.main([*words, "--json", "--quiet"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [{*trial["settings"]} for trial in trials] == [{"lr", "cell", "pooling", "noise"}] * 2


def test_the_command_line_names_what_is_not_installed(data, tmp_path, capsys, monkeypatch):
    x = np.stack([np.resize(one, (6, 2)) for one in data[0]]).astype(np.float32)
    np.savez(tmp_path / "toy.npz", x=x, y=np.array(data[1]))
    monkeypatch.setattr("cellstack.cli.train.find_spec", lambda name: None)
    assert cli.main(["train", str(tmp_path / "toy.npz"), "-o", str(tmp_path / "net"), "--search", "2"]) == 2
    assert capsys.readouterr().err == (
        "cellstack train: error: train --search needs optuna: pip install 'cellstack[search]'\n"
    )
