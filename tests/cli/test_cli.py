"""The command line: every verb, --json, --help, and one-line errors with status 2 for bad input."""

import csv
import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

from cellstack import Network, load
from cellstack.cli import main as cli
from cellstack.nodes import Conv1D, Dense, GlobalPool, Merge
from cellstack.nodes.recurrent import Bidirectional
from cellstack.scale.reading import SUFFIXES as SCORED

DATA = files("cellstack_demo") / "data"
VOWELS, VOWELS_TEST, CO2 = (
    str(DATA / name) for name in ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts", "co2.csv")
)
SMALL = ["--units", "6", "--epochs", "1", "--threads", "1", "--quiet"]


def run(capsys, *words):
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def vowels(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vowels.safetensors"
    assert cli.main(["train", VOWELS, "-o", str(path), *SMALL, "--bidirectional"]) == 0
    return str(path)


@pytest.fixture(scope="module")
def co2(co2_table, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "co2"
    words = ["--target", "co2", "--horizon", "8", "--window", "20", "--members", "1"]
    assert cli.main(["train", co2_table, *words, "-o", str(path), *SMALL]) == 0
    return f"{path}.safetensors"


@pytest.mark.long
def test_train_on_sequences_and_measure(capsys, tmp_path):
    output = str(tmp_path / "net")
    status, out, _ = run(capsys, "train", VOWELS, VOWELS_TEST, "-o", output, *SMALL, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["model"] == output + ".safetensors"
    assert report["task"] == "classify"
    assert 0 < report["test"]["accuracy"] < 1
    assert np.sum(report["test"]["confusion"]) == 370
    assert report["history"][0].keys() >= {"loss", "validation_loss", "accuracy"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("cell", "summary"),
    [
        ("gru", "GRU 24 -> 6"),
        ("rnn", "SimpleRNN 24 -> 6"),
        ("mingru", "MinGRU 24 -> 6"),
        ("minlstm", "MinLSTM 24 -> 6"),
    ],
)
def test_train_with_another_cell(capsys, tmp_path, cell, summary):
    output = str(tmp_path / "net")
    status, out, _ = run(capsys, "train", VOWELS, VOWELS_TEST, "-o", output, *SMALL, "--cell", cell, "--json")
    assert status == 0
    report = json.loads(run(capsys, "info", output, "--json")[1])
    assert report["layers"][3]["summary"] == summary
    measured = json.loads(run(capsys, "run", output, VOWELS_TEST, "--json")[1])
    assert measured["accuracy"] == pytest.approx(json.loads(out)["test"]["accuracy"])


@pytest.mark.long
def test_train_inspects_its_layers(capsys, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, looked, folder = tmp_path / "plain", tmp_path / "looked", tmp_path / "looked-inspect"
    small = [*SMALL, "--epochs", "3", "--bidirectional", "--noise", "0"]
    assert run(capsys, "train", VOWELS, "-o", str(plain), *small)[0] == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "plain.safetensors"]
    for _ in range(2):  # the second run replaces the first
        status, out, _ = run(capsys, "train", VOWELS, "-o", str(looked), *small, "--inspect", "--json")
        assert status == 0
    assert (tmp_path / "looked.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    inspected = json.loads(out)["inspect"]
    assert inspected["report"] == str(folder / "report.html")
    assert inspected["tensorboard"] == str(folder)
    assert [record["epoch"] for record in inspected["records"]] == [1, 2, 3]
    layer = inspected["records"][-1]["layers"]["recurrent.0.backward_layer"]
    assert layer["figures"].keys() >= {"gates", "gates shut", "states", "weights", "gradients", "reach"}
    assert layer["lags"]["carried"][0] == pytest.approx(1.0)
    (events,) = folder.glob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    written = read.Scalars("recurrent.0.backward_layer/gradients/kernel")
    assert [event.step for event in written] == [1, 2, 3]
    assert written[-1].value == pytest.approx(layer["figures"]["gradients"]["kernel"], rel=1e-6)
    assert "Layer recurrent.0.backward_layer" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_training_that_cannot_be_inspected_leaves_no_folder(capsys, tmp_path):
    for words in ([VOWELS, "--cell", "mlstm"], [str(tmp_path / "missing.ts")]):
        status, _, err = run(capsys, "train", *words, "--inspect", "-o", str(tmp_path / "net"))
        assert (status, err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_train_says_that_tensorboard_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # makes its import fail
    output = tmp_path / "net"
    status, out, _ = run(capsys, "train", VOWELS, "-o", str(output), *SMALL, "--inspect")
    assert status == 0
    assert "no events were written, because TensorBoard isn't installed: pip install tensorboard" in out
    assert re.search(r"layers in epoch 1: (no )?findings", out)
    assert [path.name for path in (tmp_path / "net-inspect").iterdir()] == ["report.html"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "train", VOWELS, "-o", str(output), *SMALL, "--inspect")
    assert status == 2
    assert "train --inspect needs matplotlib: pip install 'cellstack[torch]'" in err


@pytest.mark.long
def test_run_gives_the_scores_of_training(capsys, vowels):
    status, out, err = run(capsys, "run", vowels, VOWELS_TEST)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert len(rows) == 370
    assert sum(float(rows[0][f"p_{n}"]) for n in range(1, 10)) == pytest.approx(1, abs=1e-4)
    status, out, _ = run(capsys, "run", vowels, VOWELS_TEST, "--json", "--threads", "1")
    report = json.loads(out)
    assert [row["predicted"] for row in rows] == report["predicted"]
    assert "answers" not in report
    assert len(report["probabilities"][0]) == len(report["labels"])
    assert f"accuracy {report['accuracy']:.4f}" in err


@pytest.mark.long
def test_the_task_may_be_given_although_it_can_be_inferred(capsys, co2_table):
    status, out, err = run(capsys, "train", co2_table, "--task", "forecast", "--dry-run")
    assert (status, err) == (0, "")
    assert "forecasting `co2` 52 steps ahead" in out
    status, _, err = run(capsys, "train", VOWELS, "--task", "forecast", "--dry-run")
    assert status == 2
    assert "expected a table to forecast, with one of the suffixes .csv, .tsv, .parquet" in err


@pytest.mark.long
def test_forecast(capsys, co2, co2_table):
    status, out, _ = run(capsys, "run", co2, co2_table)
    rows = list(csv.reader(io.StringIO(out)))
    assert status == 0
    assert rows[0] == ["date", "co2", "co2_0.1", "co2_0.9"]
    assert [row[0] for row in rows[1:3]] == ["2002-01-05", "2002-01-12"]
    assert len(rows) == 9
    status, out, _ = run(capsys, "run", co2[: -len(".safetensors")], co2_table, "--json")
    report = json.loads(out)["forecasts"][0]
    assert abs(np.array(report["co2"]["forecast"]) - 371.5).max() < 5
    assert load(co2).metadata["recipe"]["seasons"] == [52]


def test_a_forecast_warns_of_missing_inputs(capsys, tmp_path):
    """Missing future values of inputs known in advance, and categories that weren't in the training data."""
    lines = [f"2024-01-{1 + n // 24:02d} {n % 24:02d}:00,{n % 6 + n % 5 / 9},{n % 3},{'ab'[n % 2]}" for n in range(300)]
    later = [re.sub(r",[^,]*", ",", line, count=1) for line in lines[-4:]]
    for name, rows in (
        ("all", lines),
        ("ahead", [*lines[:-4], *later]),
        ("new", [line.replace(",a", ",c") for line in lines]),
    ):
        (tmp_path / f"{name}.csv").write_text("\n".join(["t,y,plan,kind", *rows]))
    words = ["--target", "y", "--known", "plan", "--horizon", "4", "--seasons", "6", "--members", "1"]
    assert run(capsys, "train", str(tmp_path / "all.csv"), *words, "-o", str(tmp_path / "net"), *SMALL)[0] == 0
    said = {name: run(capsys, "run", str(tmp_path / "net"), str(tmp_path / f"{name}.csv")) for name in ("ahead", "new")}
    assert said["ahead"][2] == ""
    assert said["new"][2].splitlines() == [
        "cellstack run: warning: `kind`: the training data didn't contain 'c': treated as no known category",
        "cellstack run: warning: `plan`, known in advance, has no value at 4 of 4 forecast steps: append "
        "these rows, without the target, to the table",
    ]
    assert len(said["new"][1].splitlines()) == len(said["ahead"][1].splitlines()) == 5


@pytest.mark.long
def test_unused_columns_are_named(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("y,place,note\n" + "".join(f"{n % 7},north,n{n}\n" for n in range(120)), encoding="utf-8")
    words = ["train", str(file), "--seasons", "7", "--window", "8", "-o", str(tmp_path / "net"), *SMALL]
    said = run(capsys, *words)[1]
    assert "constant or empty, not used: `place` (always 'north')\n" in said
    assert "ignored: `note` (text with 120 distinct values in 120 rows, such as 'n0')\n" in said
    assert list(json.loads(run(capsys, *words, "--json")[1])["understood"]["ignored"]) == ["note"]


def test_a_column_without_values_is_named(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("y,z\n" + "5,\n" * 200, encoding="utf-8")
    status, _, err = run(capsys, "train", str(file), "--target", "z", "-o", str(tmp_path / "net"), *SMALL)
    assert (status, err) == (2, f"cellstack train: error: {file}: column 'z' has no values\n")
    words = ["--target", "y", "--seasons", "1", "--horizon", "3", "-o", str(tmp_path / "net"), *SMALL]
    status, out, _ = run(capsys, "train", str(file), *words)
    assert (status, "constant or empty, not used: `z` (no value)\n" in out) == (0, True)
    assert "the target `y` is always 5, and so is its forecast\n" in out


@pytest.mark.long
def test_info(capsys, vowels):
    status, out, _ = run(capsys, "info", vowels)
    assert status == 0
    for part in ("Bidirectional", "24 -> 6", "output shape", "can't be streamed", "plan", "kernel", 'labels: ["1"'):
        assert part in out
    report = json.loads(run(capsys, "info", vowels, "--json")[1])
    assert report["input_size"] == 12
    assert [layer["kind"] for layer in report["layers"]] == [
        "Standardise",
        "Conv1D",
        "Merge",
        "Bidirectional",
        "GlobalPool",
        "Dense",
    ]
    assert report["parameters"] == sum(layer["parameters"] for layer in report["layers"])
    assert report["layers"][-1]["output"] == "[B, 9]"
    assert report["stream"].startswith("can't be streamed: layer_0 can't run step by step")


def help_of(capsys, monkeypatch, *words, columns=80, flag="--help"):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        cli.main([*words, flag])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_the_main_options_first_and_an_example_last(capsys, monkeypatch, verb):
    out = help_of(capsys, monkeypatch, verb)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert out.startswith(f"usage: cellstack {verb} ")
    assert re.search(rf"\nexamples?:\n  .*\bcellstack {verb}\b", out)
    headings = re.findall(r"^(\w.*):$", out, re.MULTILINE)
    assert headings[-2] == "general"
    assert ("--json" in out.split("\ngeneral:\n")[1]) == (verb not in ("completion", "help"))
    assert "(%" not in out
    for default in re.findall(r"\((?:default: )?(?:all|detected|unchanged|[\d.,]+)[);]", " ".join(out.split())):
        assert default.startswith("(default: ")


def test_the_help_names_the_files_that_score_reads(capsys, monkeypatch):
    for words, before in ((), "every row of many"), (("score",), "FILES"):
        out = " ".join(help_of(capsys, monkeypatch, *words).split())
        named = re.search(rf"{before} (\w+(?:, \w+)* or \w+) files", out)
        assert {f".{name.lower()}" for name in re.split(", | or ", named[1])} == set(SCORED)


def test_the_help_of_train_begins_with_the_main_options(capsys, monkeypatch):
    out = help_of(capsys, monkeypatch, "train")
    first = out.split("\ndata:\n")[0]
    found = re.findall(r"^  ([A-Z]+|-o|--[\w-]+)\b", first, re.MULTILINE)
    assert found == ["FILE", "TEST", "-o", "--task", "--dry-run", "--quiet"]
    headings = re.findall(r"^(\w+):$", out, re.MULTILINE)
    assert headings == ["options", "data", "model", "training", "reports", "general", "examples"]


@pytest.mark.parametrize(
    ("words", "shown", "hidden"),
    [
        ([], ["--units", "--help"], ["--label", "--target", "--pooling", "--steps", "--decimal"]),
        (["a.ts"], ["--label", "--pooling", "--time"], ["--target", "--steps", "--forecasts", "--noise"]),
        (["a.csv"], ["--target", "--seasons", "--forecasts", "--time"], ["--label", "--pooling", "--zone"]),
        (["a.csv", "--task", "classify"], ["--label", "--pooling"], ["--target"]),
        (["a.txt"], ["--steps", "--embedding"], ["--label", "--id", "--seasons", "--bytes"]),
    ],
    ids=str,
)
def test_the_help_of_train_shows_the_main_options_for_the_data(capsys, monkeypatch, words, shown, hidden):
    out, everything = (help_of(capsys, monkeypatch, "train", *words, flag=flag) for flag in ("--help", "--help-all"))
    flags, more = (set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) for text in (out, everything))
    assert len(flags) <= 32
    assert flags < more
    assert flags.issuperset(shown)
    assert not flags.intersection(hidden)
    assert {"--clip", "--device"} <= more - flags


def test_cellstack_alone_shows_the_help_as_help_does(capsys, monkeypatch):
    overview = help_of(capsys, monkeypatch)
    for words in ([], ["help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert (end.value.code, *capsys.readouterr()) == (0, overview, "")
    for verb in cli.VERBS:
        assert re.search(rf"^  {verb} +\w", overview, re.MULTILINE)
    for code in (0, 1, 2, 130, 143):
        assert re.search(rf"^  {code} +\w", overview, re.MULTILINE)
    assert max(map(len, overview.splitlines())) <= 80
    with pytest.raises(SystemExit) as end:
        cli.main(["help", "train"])
    assert end.value.code == 0
    assert capsys.readouterr().out == help_of(capsys, monkeypatch, "train")


def test_invalid_values_of_options_are_explained(capsys):
    for words, said in (
        (["train", "a.ts", "--units", "0"], "--units: expected positive integers separated by commas, got '0'"),
        (["train", "a.ts", "--epochs", "many"], "argument --epochs: expected an integer, got 'many'"),
        (["train", "a.ts", "--lr", "fast"], "argument --lr: expected a number, got 'fast'"),
        (["train", "a.csv", "--decimal", ";"], "argument --decimal: expected point or comma, got ';'"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert (end.value.code, said in capsys.readouterr().err) == (2, True)


@pytest.mark.long
def test_the_decimal_separator_by_name_and_as_the_character(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("y;z\n" + "".join(f"1,{n % 7:03d};{n}\n" for n in range(120)), encoding="utf-8")
    words = ["train", str(file), "--target", "y", "--dry-run"]
    said = {name: run(capsys, *words, "--decimal", name)[:2] for name in ("comma", ",", "point", ".")}
    assert [status for status, _ in said.values()] == [0, 0, 0, 0]
    understood = {
        name: [line for line in out.splitlines() if "expected" not in line] for name, (_, out) in said.items()
    }
    assert understood["comma"] == understood[","]
    assert understood["point"] == understood["."]
    assert run(capsys, "train", str(file), "--target", "y", "--dry-run")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.ts", "-o", "x"], r"nowhere.ts: No such file"),
        (["train", __file__, "-o", "x"], r"expected a file with one of the suffixes .ts, .npz, .csv"),
        (["train", VOWELS, "-o", "no/such/folder/x"], r"the folder no/such/folder doesn't exist"),
        (["train", VOWELS, "-o", "x", "--lr", "0"], r"expected --lr > 0 and finite, got 0.0"),
        (["train", VOWELS, "-o", "x", "--noise", "nan"], r"expected --noise >= 0 and finite, got nan"),
        (["train", VOWELS, "-o", "x", "--lr", "inf"], r"expected --lr > 0 and finite, got inf"),
        (["train", VOWELS, "-o", ""], r"expected a file name, got ''"),
        (["train", VOWELS, "-o", "x", "--threads", "1000000000000"], r"expected --threads from 1 to 1024"),
        (["train", VOWELS, "-o", "x", "--dropout", "1"], r"expected --dropout in \[0, 1\), got 1.0"),
        (["train", VOWELS, "-o", "x", "--validation", "1"], r"expected --validation to be a share in \[0, 1\)"),
        (
            ["train", VOWELS, "-o", "x", "--units", "1000000"],
            r"units 1000000 don't fit into memory: .* GB",
        ),
        (
            ["train", VOWELS, "-o", "x", "--units", "4,9999999999"],
            r"units 4,9999999+ don't fit into memory",
        ),
        (["train", CO2, "-o", "x", "--target", "co2", "--units", "1000000"], r"units 1000000 don't fit into memory"),
        (["train", VOWELS, "-o", "x", "--checkpoint", "no/such/c"], r"no/such/c: there is no folder "),
        (["train", VOWELS, "-o", "x", "--resume"], r"--resume needs --checkpoint"),
        (["train", VOWELS, "-o", "x", "--threads", "0"], r"expected --threads from 1 to 1024, got 0"),
        (
            ["train", VOWELS, "-o", "x", "--target", "a"],
            r"JapaneseVowels_TRAIN.ts: --target doesn't apply to sequences, only to forecasts",
        ),
        (["train", VOWELS, "-o", "x", "--seasons", "7"], r"--seasons doesn't apply to sequences"),
        (["train", VOWELS, "-o", "x", "--label", "a"], r"y applies only to tables, not to .ts, got 'a'"),
        (["train", CO2, "-o", "x", "--class-weight", "balanced"], r"--class-weight doesn't apply to forecasts"),
        (["train", CO2, "-o", "x", "--task", "classify"], r"expected --label COLUMN"),
        (["train", VOWELS], r"expected -o MODEL, the file to write, or --dry-run"),
        (["train", "missing.ts"], r"error: missing.ts: No such file or directory$"),
        (["train", "missing.cvs"], r"error: missing.cvs: No such file or directory$"),
        (["train", VOWELS, "missing.ts"], r"error: missing.ts: No such file or directory$"),
        (["train", VOWELS, "-o", "x", "--overwrite"], r"--overwrite needs --checkpoint"),
        (["train", VOWELS, "-o", "x", "--history", "x.txt"], r"expected --history to end in one of .csv, .json"),
        (["train", VOWELS, "-o", "x", "--picture", "no/x.png"], r"no/x.png: there is no folder"),
        (["train", VOWELS, "-o", "x", "--init", "none"], r"none: no such file"),
        (["train", CO2, CO2, "-o", "x"], r"expected one table: forecasts are tested on its last rows"),
        (["train", CO2, "-o", "x", "--target", "no2"], r"expected target to be one of co2, got 'no2'"),
        (
            ["train", CO2, "-o", "x", "--horizon", "5000"],
            r"too few rows for the training part",
        ),
        (
            ["train", CO2, "-o", "x", "--horizon", "-1"],
            r"expected horizon to be an integer from 1 to 2147483647, got -1",
        ),
        (
            ["train", CO2, "-o", "x", "--test", "0.9"],
            r"leave no rows to train on",
        ),
        (["run", "nothing", CO2], r"nothing: no such file"),
        (["info", VOWELS], r"expected one of .* found a file that begins with"),
        (["demo", "-o", ""], r"expected --output to name a folder, got ''"),
        (["demo", "-o", "new", "--epochs", "0"], r"expected --epochs >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, co2_table, words, message):
    monkeypatch.chdir(tmp_path)
    words = [co2_table if word == CO2 else word for word in words]
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == "" or out.startswith((f"{words[1]}: ", "520 rows, "))  # the description of the data
    assert err.count("\n") == 1
    assert err.startswith(f"cellstack {words[0]}: error: ")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["help", "fly"],
        ["train"],
        ["train", "a.ts", "-o", "x", "--units", "4,x"],
        ["run", "m"],
        ["train", "a.ts", "-o", "x", "--cell", "mlp"],
        ["train", "a.csv", "-o", "x", "--seasons", "0"],
    ],
)
def test_bad_usage_is_one_line_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_the_wrong_kind_of_file_or_model(capsys, vowels, co2, co2_table, tmp_path):
    assert run(capsys, "run", vowels, co2_table)[0] == 2
    assert run(capsys, "run", co2, VOWELS)[0] == 2
    narrow = tmp_path / "narrow.ts"
    narrow.write_text("@classLabel true 1\n@data\n1,2:3,4:1\n")
    status, _, err = run(capsys, "run", vowels, str(narrow))
    assert (status, "expected 12 channels, found 2" in err) == (2, True)
    cell = load(torch.nn.LSTM(12, 4, batch_first=True)).nodes[0]
    Network((cell, GlobalPool("last"))).save(tmp_path / "bare.safetensors")
    status, out, _ = run(capsys, "run", str(tmp_path / "bare"), VOWELS)  # sequences of many lengths
    assert (status, out.count("\n")) == (0, 1 + 270)
    (tmp_path / "notes.txt").write_text("1,2")
    status, _, err = run(capsys, "run", str(tmp_path / "bare"), str(tmp_path / "notes.txt"))
    assert (status, "expected a .npy, .npz, .csv or .jsonl file" in err) == (2, True)
    damaged = tmp_path / "damaged.safetensors"
    with open(vowels, "rb") as file:
        damaged.write_bytes(file.read()[:-100])
    status, _, err = run(capsys, "info", str(damaged))
    assert (status, err.count("\n")) == (2, 1)


def rewritten(path, folder, **changes):
    """Save the network in `path` with changed metadata; of a recipe, only the given entries change."""
    net = load(path)
    recipe = changes.pop("recipe", None)
    metadata = {**net.metadata, **changes}
    if isinstance(recipe, dict):
        metadata["recipe"] = {**metadata["recipe"], **recipe}
    elif recipe is not None:
        metadata["recipe"] = recipe
    other = folder / "other.safetensors"
    inputs = {name: net.shapes[name] for name in net.inputs}
    Network(net.nodes, net.names, metadata, inputs=inputs, wires=net.wires, outputs=net.outputs).save(other)
    return str(other)


UNLABELLED = "@classLabel false\n@data\n" + ":".join(["1,2"] * 12) + "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["1", "2"]}, r"expected 9 distinct labels, one per output, found 2"),
        ({"labels": ["1"] * 9}, r"expected 9 distinct labels, one per output, found 1"),
        ({"labels": [1, "2", 3, 4, 5, 6, 7, 8, 9]}, r"expected labels to be a list of strings, integers or bools"),
        ({"labels": "123456789"}, r"expected labels to be a list of strings"),
        ({"task": "regress"}, r"expected no labels for regress, found 9"),
        ({"task": ["classify"]}, r"expected a network written by cellstack train, for the task classify or regress"),
        ({"task": "forecast"}, r"the network's recipe isn't one of cellstack 0.2 or later"),
        ({"observed": [12]}, r"expected observed to be ascending indices of raw channels, below 11, found \[12\]"),
        ({"observed": [-1]}, r"expected observed to be ascending indices"),
        ({"observed": [0, 0]}, r"expected observed to be ascending indices"),
        ({"observed": ["1"]}, r"expected observed to be ascending indices"),
        ({"observed": 3}, r"expected observed to be ascending indices"),
        ({"observed": list(range(12))}, r"expected observed to be ascending indices"),
    ],
    ids=str,
)
def test_metadata_that_doesn_t_fit_a_classifier_is_one_line(capsys, vowels, tmp_path, changes, message):
    file = tmp_path / "unlabelled.ts"
    file.write_text(UNLABELLED)
    status, out, err = run(capsys, "run", rewritten(vowels, tmp_path, **changes), str(file))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"other\.safetensors: " + message, err), err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"seasons": [0]}, r"expected seasons to be ascending integers from 2 to 2147483647, got \(0,\)"),
        ({"seasons": [10**13]}, r"expected seasons to be ascending integers"),
        ({"seasons": 52}, r"the network's recipe isn't one of cellstack 0.2 or later"),
        ({"seasons": [], "rule": ["naive", 1]}, r"expected a network with 8 channels for its recipe, found 10"),
        ({"rule": ["seasonal", 7]}, r"expected rule to be one of"),
        ({"horizon": 10**13}, r"expected horizon to be an integer"),
        ({"horizon": 7}, r"expected a horizon of 8, as in the network's output, found 7"),
        ({"window": "20"}, r"expected window to be an integer from 1 to 2147483647, got '20'"),
        ({"window": 2.5}, r"expected window to be an integer"),
        ({"inputs": "co2"}, r"expected inputs to be "),
        ({"inputs": ["co2"]}, r"expected at least one target, and each column only once"),
        ({"calendar": []}, r"expected a network with 6 channels for its recipe, found 10"),
        ({"quantiles": [0.5]}, r"expected one output \[B, horizon, 1\]"),
        ({"quantiles": "wide"}, r"the network's recipe isn't one of cellstack 0.2 or later"),
        ({"targets": 3}, r"expected targets to be "),
        ({"pace": 3}, r"the network's recipe isn't one of cellstack 0.2 or later"),
        (["co2"], r"the network's recipe isn't one of cellstack 0.2 or later"),
    ],
    ids=str,
)
def test_a_recipe_that_doesn_t_fit_is_one_line(capsys, co2, co2_table, tmp_path, recipe, message):
    status, out, err = run(capsys, "run", rewritten(co2, tmp_path, recipe=recipe), co2_table)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"other\.safetensors: .*" + message, err), err


def test_invalid_reading_options_are_one_line(capsys, co2, co2_table, tmp_path):
    for reading in ({"pace": 3}, ["co2"]):
        status, out, err = run(capsys, "run", rewritten(co2, tmp_path, reading=reading), co2_table)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "other.safetensors: expected reading to have only keys of categories, date_format, " in err


def test_a_network_without_pooling_is_not_a_trained_classifier(capsys, vowels, tmp_path):
    net = load(vowels)
    nodes = [node for node in net.nodes if not isinstance(node, (Conv1D, Merge, GlobalPool, Bidirectional))]
    nodes[-1] = Dense(np.ones((12, 9), np.float32))
    Network(nodes, metadata={**net.metadata, "changes": False}).save(tmp_path / "a.safetensors")
    status, _, err = run(capsys, "run", str(tmp_path / "a"), VOWELS_TEST)
    assert (status, err.count("\n")) == (2, 1)
    assert "expected a network with one output per sequence" in err


def test_targets_for_a_classifier_and_classes_for_a_regressor_are_refused(capsys, vowels, tmp_path):
    file = tmp_path / "numbers.ts"
    file.write_text(UNLABELLED.replace("@classLabel false", "@targetLabel true").rstrip() + ":0.5\n")
    status, _, err = run(capsys, "run", vowels, str(file))
    assert (status, "numbers.ts: expected classes, found numbers" in err) == (2, True)
    lines = ["@targetLabel true", "@data", *(f"{n},2:{n}" for n in range(8))]
    file.write_text("\n".join(lines))
    assert run(capsys, "train", str(file), "-o", str(tmp_path / "regress"), *SMALL)[0] == 0
    classes = tmp_path / "classes.ts"
    classes.write_text("@classLabel true a b\n@data\n1,2:a\n")
    status, _, err = run(capsys, "run", str(tmp_path / "regress"), str(classes))
    assert (status, "classes.ts: expected numbers, found classes" in err) == (2, True)


@pytest.mark.long
def test_resume_of_another_model_is_refused_in_one_line(capsys, tmp_path):
    common = ["train", VOWELS, *SMALL, "-o", str(tmp_path / "a"), "--checkpoint", str(tmp_path / "c")]
    assert run(capsys, *common)[0] == 0
    for words, name in ((["--pooling", "mean"], "pooling"), (["--every-step", "--pooling", "max"], "every_step")):
        status, out, err = run(capsys, *common, "--resume", *words)
        assert (status, err.count("\n")) == (2, 1)
        assert "wrote " not in out
        assert f"expected a checkpoint with {name} " in err


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), RuntimeError("a bug"), IndexError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def broken(args):
        raise error

    monkeypatch.setitem(cli.VERBS, "info", broken)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["info", "net"])


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    def huge(args):
        np.empty(2**60, np.uint8)

    monkeypatch.setitem(cli.VERBS, "info", huge)
    status, _, err = run(capsys, "info", "net")
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(r"error: not enough memory: Unable to allocate", err)


def test_memory_that_torch_can_t_allocate_is_one_line(capsys, monkeypatch, tmp_path):
    from cellstack.train import fitting

    def huge(*args, **options):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(fitting, "learn", huge)
    status, _, err = run(capsys, "train", VOWELS, "-o", str(tmp_path / "x"), *SMALL)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("cellstack train: error: not enough memory: you tried to allocate 1152921504606846976 bytes")


@pytest.mark.long
def test_training_continues_on_a_full_disk(tmp_path):
    """Files may have 20 kB: the network is smaller, the checkpoint, with Adam's state, is larger."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code = limit + "import sys; from cellstack.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [
        "train",
        VOWELS,
        "-o",
        str(tmp_path / "net"),
        "--checkpoint",
        str(tmp_path / "run.ckpt"),
        *SMALL,
        "--units",
        "16",
        "--noise",
        "0",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    why = f"{tmp_path / 'run.ckpt'}: File too large"
    warning = f"cellstack train: warning: the checkpoint could not be written, training continues: {why}\n"
    assert (done.returncode, done.stderr) == (0, warning)
    assert f"the last checkpoint could not be written: {why}\n" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_the_network_is_saved_elsewhere_on_a_full_disk(capsys, tmp_path, monkeypatch, co2_table):
    """The network is saved elsewhere; if another file can't be written, the network and the report aren't lost."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save = Network.save
    full = tmp_path / "full.safetensors"

    def no_room(self, path):
        if path == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path)

    monkeypatch.setattr(Network, "save", no_room)
    status, _, err = run(capsys, "train", VOWELS, "-o", str(full), *SMALL)
    (kept,) = tmp_path.glob("cellstack-*/full.safetensors")
    said = f"cellstack train: error: {full}: No space left on device: the network is in {kept} instead\n"
    assert (status, err) == (2, said)
    assert load(kept).metadata["task"] == "classify"

    monkeypatch.setattr("cellstack.cli.forecast.replacing", lambda path: open(path, "wb"))  # noqa: SIM115
    monkeypatch.setattr("cellstack.cli.forecast.check_replaceable", lambda path: None)
    words = ["train", co2_table, "--target", "co2", "--horizon", "8", "--window", "20", "--members", "1", *SMALL]
    status, out, err = run(capsys, *words, "-o", str(tmp_path / "co2"), "--forecasts", "/dev/full")
    assert (status, err.count("\n")) == (2, 1)
    assert "No space left on device" in err
    assert f"wrote {tmp_path / 'co2.safetensors'}" in out
    assert load(tmp_path / "co2.safetensors").metadata["task"] == "forecast"


@pytest.mark.long
def test_a_replay_that_fails_is_one_line(capsys, monkeypatch, tmp_path):
    from cellstack_demo import demo

    def fails(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: no such thing\n")

    monkeypatch.setattr(demo.subprocess, "run", fails)
    status, _, err = run(capsys, "demo", "-o", str(tmp_path), "--epochs", "1")
    assert status == 2
    assert err.splitlines()[-1] == "cellstack demo: error: the replay failed: OSError: no such thing"


@pytest.mark.long
def test_characters_that_a_terminal_can_t_show(vowels, tmp_path):
    path = rewritten(vowels, tmp_path, labels=["Zoë", *map(str, range(8))])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["info", path], ["run", path, VOWELS_TEST]):
        command = [sys.executable, "-m", "cellstack", *words]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert "Traceback" not in done.stderr
    assert "p_Zo" in done.stdout or "Zo" in done.stderr


@pytest.mark.long
def test_run_and_info_need_no_torch(vowels, co2, co2_table):
    code = (
        "import sys; from cellstack.cli.main import main; codes = [main(words.split('|')) for words in sys.argv[1:]]; "
        "assert codes == [0] * len(codes), codes; "
        "assert not {'torch', 'matplotlib', 'tqdm'} & set(sys.modules)"
    )
    words = [f"info|{vowels}", f"run|{vowels}|{VOWELS_TEST}", f"run|{co2}|{co2_table}"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_closes_the_pipe_early(vowels):
    command = shlex.join([sys.executable, "-m", "cellstack", "run", str(vowels), VOWELS_TEST]) + " | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sequence,predicted")
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_output_to_a_full_disk(vowels):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for words in (["run", vowels, VOWELS_TEST], ["info", vowels]):  # more than Python's buffer holds, and less
        command = [sys.executable, "-m", "cellstack", *words]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
        assert done.returncode == 2
        assert done.stderr.endswith(f"cellstack {words[0]}: error: No space left on device\n")
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "cellstack", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert (done.returncode, done.stderr) == (2, "cellstack: error: No space left on device\n")


@pytest.mark.long
def test_closed_standard_output_and_input(vowels):
    cases = (
        ("cellstack", ["--version"], ">&-"),
        ("cellstack", ["info", vowels], ">&-"),
        ("cellstack run", ["run", vowels, "-"], "<&-"),
    )
    for program, words, closing in cases:
        command = f"{shlex.join([sys.executable, '-m', 'cellstack', *words])} {closing}"
        done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        closed = "output" if closing == ">&-" else "input"
        assert done.stderr.startswith(f"{program}: error: expected standard {closed} to be open")


@pytest.mark.long
def test_resume_from_the_command_line(capsys, tmp_path):
    common = ["train", VOWELS, "--units", "6", "--threads", "1", "--quiet", "--epochs", "2"]
    assert run(capsys, *common, "-o", str(tmp_path / "a"), "--checkpoint", str(tmp_path / "c"))[0] == 0
    assert run(capsys, *common, "-o", str(tmp_path / "b"), "--checkpoint", str(tmp_path / "c"), "--resume")[0] == 0
    first, second = load(tmp_path / "a.safetensors"), load(tmp_path / "b.safetensors")
    for cell, other in zip(first.cells, second.cells, strict=True):
        np.testing.assert_array_equal(cell.kernel, other.kernel)
    (tmp_path / "c").write_bytes(b"junk")
    status, _, err = run(capsys, *common, "-o", str(tmp_path / "b"), "--checkpoint", str(tmp_path / "c"), "--resume")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("mae", "said"),
    [
        (1.8, "10.0% lower than that of the best baseline, naive"),
        (2.2, "10.0% higher than that of the best baseline, naive: the baseline is better on this table"),
        (2.0007, "equal to that of the best baseline, naive: the baseline is as good on this table"),
        (1.9993, "equal to that of the best baseline, naive: the baseline is as good on this table"),
    ],
)
def test_a_sentence_compares_the_model_with_the_best_baseline(mae, said):
    from cellstack.cli.forecast import text_of

    found = {name: {"mae": error, "rmse": error, "mase": error} for name, error in (("model", mae), ("naive", 2.0))}
    lines = text_of({"origins": 9, "targets": {"y": found}})
    assert lines[-1] == f"  this model's mean absolute error is {said}"


@pytest.mark.slow
def test_co2_beats_the_seasonal_naive_forecast(capsys, tmp_path):
    words = ["train", CO2, "--target", "co2", "--horizon", "52", "-o", str(tmp_path / "co2"), "--threads", "1"]
    scores = json.loads(run(capsys, *words, "--json", "--quiet")[1])["test"]
    errors = scores["targets"]["co2"]
    assert scores["origins"] > 400
    assert errors["model"]["mae"] < 0.5 * errors["seasonal naive, 52"]["mae"]
    assert errors["model"]["mae"] < errors["seasonal naive with drift, 52"]["mae"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train x.csv --horizn 3 -o x",
            "cellstack train: error: unrecognized argument --horizn, did you mean --horizon?",
        ),
        ("bench --quik=1", "cellstack bench: error: unrecognized argument --quik=1, did you mean --quick?"),
        ("info x --zzzz", "cellstack info: error: unrecognized argument --zzzz"),
        ("run a b c", "cellstack run: error: unrecognized argument c"),
        (
            "trian x.csv",
            "inspect, info, bench, completion, help), did you mean train?",
        ),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(capsys, words, said):
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    assert (
        capsys.readouterr().err.replace("'", "").endswith(said + "\n")
    )  # Python 3.12 quotes the choices, 3.13 doesn't
