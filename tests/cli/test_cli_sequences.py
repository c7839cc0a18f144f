"""`cellstack train` and `run` on sequences in every kind of file, and their reports."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from cellstack import load
from cellstack.cli import main as cli
from cellstack.train import history

VOWELS = str(files("cellstack_demo") / "data" / "JapaneseVowels_TRAIN.ts")
CO2 = str(files("cellstack_demo") / "data" / "co2.csv")
SMALL = ["--units", "4", "--epochs", "2", "--threads", "1", "--quiet"]


def run(capsys, *words):
    status = cli.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def machines(rng, tmp_path):
    """A table of 30 machines with 8 hours each, and the same as arrays."""
    x, states = rng.normal(size=(30, 8, 2)), np.where(np.arange(30) % 3 == 0, "broken", "fine")
    table = pd.DataFrame(
        {
            "machine": np.repeat([f"m{n}" for n in range(30)], 8),
            "hour": np.tile(np.arange(8), 30),
            "heat": x[..., 0].ravel(),
            "noise": x[..., 1].ravel(),
            "place": "hall",
            "state": np.repeat(states, 8),
        }
    )
    table.to_parquet(tmp_path / "machines.parquet")
    table.to_csv(tmp_path / "machines.csv", index=False)
    np.savez(tmp_path / "machines.npz", x=x, y=states)
    return tmp_path


COLUMNS = ["--id", "machine", "--time", "hour", "--label", "state"]


def test_the_data_is_described_before_training_and_by_dry_run(capsys, machines):
    said = [
        f"{machines / 'machines.parquet'}: 30 sequences of 8 steps, 2 channels (heat, noise)",
        "  classification: 2 classes, one per sequence: broken (10), fine (20)",
        "  ignored: place, because it isn't numeric: 'hall'",
    ]
    words = ["train", machines / "machines.parquet", *COLUMNS]
    said += [
        "25 sequences to train on; 5 to validate on (15% of each class, chosen at random); none to test on",
        "1 network: LSTM 4 -> 48 -> 48, 28,898 weights; at most 400 epochs of 2 steps, batches of 16",
    ]
    status, out, err = run(capsys, *words, "--dry-run")
    assert (status, out.splitlines()[:-1], err) == (0, said, "")
    assert re.fullmatch(r"expected time: .*\d+ seconds? on this machine.*", out.splitlines()[-1])
    status, out, _ = run(capsys, *words, "-o", machines / "net", *SMALL)
    assert (status, out.splitlines()[:4]) == (0, said[:4])
    report = json.loads(run(capsys, *words, "--dry-run", "--json")[1])
    assert (report["plan"]["training"], report["plan"]["validation"], report["plan"]["test"]) == (25, 5, 0)
    understood = report["understood"]["training"]
    assert understood["classes"] == {"broken": 10, "fine": 20}
    assert understood["ignored"] == {"place": "isn't numeric: 'hall'"}


def test_gaps_and_constants_are_described(capsys, tmp_path):
    file = tmp_path / "a.ts"
    file.write_text("@classLabel true a b c\n@data\n1,?:5,5:a\n2,3,4:5,5,5:b\n1,1:5,5:a\n")
    said = run(capsys, "train", file, "--dry-run")[1]
    assert "3 sequences of 2 to 3 steps, 2 channels\n" in said
    assert "classification: 3 classes, one per sequence: a (2), b (1), c (0)\n" in said
    assert "with a single example, so either without training or without validation: b\n" in said
    assert "missing: 1 values, 7.14%" in said
    assert "constant: channel 1\n" in said


@pytest.mark.slow
def test_a_dry_run_needs_no_torch(machines):
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'tqdm', 'matplotlib')); "
        "from cellstack.cli.main import main; assert main(sys.argv[1:]) == 0"
    )
    for words in (
        [VOWELS],
        [CO2, "--members", "1"],
        [str(machines / "machines.npz")],
        [str(machines / "machines.csv"), *COLUMNS],
    ):
        command = [sys.executable, "-c", code, "train", *words, "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "expected time: not measured, because torch isn't installed"


@pytest.mark.parametrize("name", ["machines.parquet", "machines.csv", "machines.npz"])
def test_train_and_run_on_every_kind_of_file(capsys, machines, tmp_path, name):
    columns = [] if name.endswith("npz") else COLUMNS
    other = tmp_path / f"other-{name}"
    other.write_bytes((machines / name).read_bytes())
    words = ["train", machines / name, other, *columns, "-o", machines / "net", *SMALL]
    report = json.loads(run(capsys, *words, "--json")[1])
    assert report["task"] == "classify"
    assert np.sum(report["test"]["confusion"]) == 30
    status, out, err = run(capsys, "run", machines / "net", machines / name)  # the columns are known
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert f"accuracy {report['test']['accuracy']:.4f}" in err
    assert [row["predicted"] for row in rows][:3] == [
        ("broken", "fine")[float(row["p_fine"]) > 0.5] for row in rows[:3]
    ]
    assert rows[7].get("machine", "m7") == "m7"
    lines = [line.split() for line in err.splitlines()]
    assert [*lines[-3:-1], lines[-1][:1]] == [["broken", "fine"], ["broken", *lines[-2][1:]], ["fine"]]
    assert [[int(count) for count in line[1:]] for line in lines[-2:]] == report["test"]["confusion"]
    again = json.loads(run(capsys, "run", machines / "net", machines / name, "--json")[1])
    assert (again["labels"], again["confusion"]) == (["broken", "fine"], report["test"]["confusion"])


def test_a_dry_run_reports_different_rates(capsys, tmp_path):
    parts = [pd.DataFrame({"id": n, "t": (1 + n % 2) * np.arange(9) / 100, "a": np.arange(9) % 4}) for n in range(8)]
    frame = pd.concat(parts).assign(state=np.repeat(["off", "on"], 36))
    frame.to_csv(tmp_path / "a.csv", index=False)
    words = ["train", tmp_path / "a.csv", "--label", "state", "--id", "id", "--time", "t", "--dry-run"]
    said = "differs: 0.01 in 4 sequences and 0.02 in 4 sequences; --resample interpolates at one rate"
    assert said in run(capsys, *words)[1]
    assert "median time" not in run(capsys, *words[:-3], *words[-1:])[1]
    report = run(capsys, *words, "--resample", "0.02")[1].splitlines()
    assert "a.csv: 8 sequences of 5 to 9 steps, 1 channel (a)" in report[0]
    assert "  interpolated at intervals of 0.02, by 't'" in report
    status, _, err = run(capsys, *words[:-3], *words[-1:], "--resample", "0.02")
    assert (status, "--resample needs --time, the column of times" in err) == (2, True)


def test_tables_as_spreadsheets_and_pandas_write_them(capsys, machines):
    """Semicolons, decimal commas, another encoding; an index column, which isn't used."""
    table = pd.read_csv(machines / "machines.csv")
    table.to_csv(machines / "index.csv")
    table.to_csv(machines / "german.csv", sep=";", decimal=",", index=False)
    table.replace("hall", "Gebäude").to_csv(machines / "latin.csv", index=False, encoding="latin-1")
    learned = {}
    for name in ("machines.csv", "index.csv", "german.csv", "latin.csv"):
        words = ["train", machines / name, *COLUMNS, *["--encoding", "latin-1"] * (name == "latin.csv")]
        learned[name] = json.loads(run(capsys, *words, "--dry-run", "--json")[1])["understood"]["training"]
    assert learned["index.csv"]["ignored"].pop("index") == "numbers the rows"
    for name in learned:
        for what in ("channels", "classes", "sequences", "missing"):
            assert learned[name][what] == learned["machines.csv"][what], name
    assert run(capsys, "train", machines / "machines.csv", *COLUMNS, "-o", machines / "net", *SMALL)[0] == 0
    answers = [run(capsys, "run", machines / "net", machines / name)[1] for name in ("machines.csv", "german.csv")]
    assert answers[0] == answers[1]
    table.to_csv(machines / "quoted.csv", decimal=",", index=False)
    assert "use --decimal ',' if these" in run(capsys, "run", machines / "net", machines / "quoted.csv")[2]
    assert run(capsys, "run", machines / "net", machines / "quoted.csv", "--decimal", ",")[1] == answers[0]


def test_a_network_of_arrays_runs_on_a_table(capsys, machines):
    assert run(capsys, "train", machines / "machines.npz", "-o", machines / "net", *SMALL)[0] == 0
    words = ["run", machines / "net", machines / "machines.csv", "--id", "machine", "--time", "hour"]
    status, out, err = run(capsys, *words, "--label", "state")
    table = pd.read_csv(machines / "machines.csv")
    assert (status, out.count("\n")) == (0, 1 + table["machine"].nunique())
    table.assign(more=1.5).to_csv(machines / "machines.csv", index=False)
    status, out, err = run(capsys, *words, "--label", "state")
    assert (status, out) == (2, "")
    assert "channels, found" in err
    assert "heat, " in err


def test_run_on_a_table_without_labels(capsys, machines):
    assert run(capsys, "train", machines / "machines.csv", *COLUMNS, "-o", machines / "net", *SMALL)[0] == 0
    table = pd.read_csv(machines / "machines.csv").drop(columns=["state", "place"])
    table[table.machine == "m4"].to_csv(machines / "new.csv", index=False)
    status, out, err = run(capsys, "run", machines / "net", machines / "new.csv")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "machine,predicted,p_broken,p_fine"
    assert out.splitlines()[1].startswith("m4,")
    table.rename(columns={"heat": "Heat"}).to_csv(machines / "new.csv", index=False)
    status, _, err = run(capsys, "run", machines / "net", machines / "new.csv")
    assert (status, "expected features among machine, hour, Heat, noise, got 'heat'" in err) == (2, True)
    status, _, err = run(capsys, "run", machines / "net", machines / "new.csv", "--label", "state")
    assert (status, err.count("\n")) == (2, 1)


def test_the_page_of_a_network_that_was_trained_on_a_table(capsys, machines):
    assert run(capsys, "train", machines / "machines.csv", *COLUMNS, "-o", machines / "net", *SMALL)[0] == 0
    page = machines / "a.html"
    status, out, _ = run(capsys, "inspect", machines / "net", machines / "machines.parquet", "-o", page, "--rows", "3")
    assert (status, f"3 of 30 sequences of {machines / 'machines.parquet'}" in out) == (0, True)
    assert page.stat().st_size > 10_000


def test_an_output_per_step(capsys, rng, tmp_path):
    x = rng.normal(size=(12, 5, 1))
    table = pd.DataFrame({"id": np.repeat(np.arange(12), 5), "x": x.ravel(), "sum": x.cumsum(axis=1).ravel()})
    table.to_csv(tmp_path / "a.csv", index=False)
    words = ["train", tmp_path / "a.csv", "--id", "id", "--label", "sum", "--per-step", "-o", tmp_path / "net", *SMALL]
    status, out, _ = run(capsys, *words)
    assert (status, "regression: a number per step, from" in out) == (0, True)
    status, out, err = run(capsys, "run", tmp_path / "net", tmp_path / "a.csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["id", "step", "predicted"]
    assert [row[:2] for row in rows[5:7]] == [["0", "4"], ["1", "0"]]
    assert "rmse" in err


def test_one_epoch_and_the_test_score_are_said_once(capsys, machines, tmp_path):
    other = tmp_path / "other.npz"
    other.write_bytes((machines / "machines.npz").read_bytes())
    words = ["train", machines / "machines.npz", other, "-o", tmp_path / "net", *SMALL, "--epochs", "1"]
    out = run(capsys, *words)[1]
    assert "; at most 1 epoch of " in out
    assert "\ntrained for 1 epoch; kept epoch 1" in out
    assert len(re.findall(r"accuracy [01]", out)) == 2  # the network's, and the baseline's


@pytest.mark.long
def test_it_ends_with_a_sentence(capsys, tmp_path):
    _, out, _ = run(capsys, "train", VOWELS, "-o", tmp_path / "net", *SMALL)
    assert re.search(
        r"\ntrained for all 2 epochs; kept epoch \d, with the lowest validation loss; "
        r"trained with(out)? noise: validation loss [\d.]+, with(out)? noise [\d.]+; "
        r"on the 36 validation examples, which also selected the epoch: accuracy 0\.\d+; "
        r"for comparison, boosting on summary statistics: accuracy [01]\.?\d* \(always the most frequent class, '\d': "
        r"0\.\d+\): better than the network\nwrote ",
        out,
    )
    assert re.search(r"\n\d+ steps in [\d.]+ s, on 1 thread\n", out)


@pytest.mark.long
def test_history_picture_log_and_warm_start(capsys, tmp_path):
    words = ["train", VOWELS, "-o", tmp_path / "net", *SMALL, "--noise", 0]
    more = ["--history", tmp_path / "h.csv", "--picture", tmp_path / "h.svg", "--log", tmp_path / "log.csv"]
    report = json.loads(run(capsys, *words, *more, "--json")[1])
    assert (tmp_path / "h.csv").read_text() == (tmp_path / "log.csv").read_text()
    assert len((tmp_path / "h.csv").read_text().splitlines()) == 3
    assert "<svg" in (tmp_path / "h.svg").read_text()
    again = ["train", VOWELS, "-o", tmp_path / "more", *SMALL, "--init", tmp_path / "net", "--json"]
    status, out, _ = run(capsys, *again)
    assert status == 0
    assert json.loads(out)["history"][0]["loss"] < report["history"][0]["loss"]


@pytest.mark.long
def test_a_checkpoint_is_overwritten_or_resumed_only_on_request(capsys, tmp_path):
    words = ["train", VOWELS, "-o", tmp_path / "net", *SMALL, "--checkpoint", tmp_path / "c"]
    assert run(capsys, *words)[0] == 0
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "c: the checkpoint already exists: --resume continues from it, --overwrite starts again" in err
    assert run(capsys, *words, "--overwrite")[0] == 0
    status, out, _ = run(capsys, *words, "--resume", "--epochs", "3")
    assert status == 0
    assert (
        "the checkpoint is of a training of 2 epochs: from epoch 3 on, the learning rate is that of a training of 3"
        in out
    )
    status, _, err = run(capsys, *words, "--resume", "--overwrite")
    assert (status, "--overwrite, to start again, exclude each other" in err) == (2, True)


def test_the_ts_format_is_described(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "one sequence per line, channels separated by colons, the class last" in said


def test_class_weights(capsys, machines):
    words = ["train", machines / "machines.npz", "-o", machines / "net", *SMALL, "--validation", "0", "--json"]
    plain, even = (json.loads(run(capsys, *words, *more)[1]) for more in ([], ["--class-weight", "balanced"]))
    assert plain["history"] != even["history"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_one_line(capsys, tmp_path):
    words = ["train", VOWELS, *SMALL, "-o", tmp_path / "net"]
    for flag in ("--history", "--checkpoint"):
        status, _, err = run(capsys, *words, flag, "/dev/full")
        assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["machines.csv", "--task", "classify"], "expected --label COLUMN"),
        (["machines.csv", "--label", "state"], "expected --id, the column"),
        (["machines.csv", "--label", "mood", "--id", "machine"], "expected --label to be a column, one of machine"),
        (["machines.csv", *COLUMNS, "--seasons", "7"], "--seasons doesn't apply to sequences, only to forecasts"),
        (["machines.csv", *COLUMNS, "--task", "regress"], "y: expected numbers with task regress, got text"),
        (["machines.npz", "--label", "state"], "y applies only to tables, not to .npz"),
        (["empty.csv", *COLUMNS], "empty.csv: line 1: expected column names, found ''"),
        (["broken.parquet", *COLUMNS], "broken.parquet: expected a Parquet file ("),
        (["broken.npz"], "broken.npz: expected named arrays written by np.savez, found another kind of file"),
    ],
)
def test_bad_input_is_one_line(capsys, machines, words, message):
    (machines / "empty.csv").write_text("")
    (machines / "broken.parquet").write_bytes(b"PAR1 nothing")
    (machines / "broken.npz").write_bytes(b"PK nothing")
    status, out, err = run(capsys, "train", machines / words[0], *words[1:], "-o", machines / "net", *SMALL)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (machines / "net.safetensors").exists()


def test_the_network_holds_labels_that_are_numbers(capsys, rng, tmp_path):
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(20, 5, 1)), y=np.arange(20) % 2 * 3)
    assert run(capsys, "train", tmp_path / "a.npz", "-o", tmp_path / "net", *SMALL)[0] == 0
    assert load(tmp_path / "net.safetensors").metadata["labels"] == [0, 3]
    rows = list(csv.DictReader(io.StringIO(run(capsys, "run", tmp_path / "net", tmp_path / "a.npz")[1])))
    assert {row["predicted"] for row in rows} <= {"0", "3"}
    assert "p_3" in rows[0]


def test_a_table_with_usual_dates_and_decimals(capsys, machines):
    table = pd.read_csv(machines / "machines.csv")
    plain = ["train", machines / "machines.csv", *COLUMNS, "--features", "heat,noise", "-o", machines / "plain", *SMALL]
    assert run(capsys, *plain)[0] == 0
    hours = pd.Timestamp("2024-02-01") + pd.to_timedelta(table.hour, unit="D")
    table["hour"] = hours.dt.strftime("%d/%m/%Y")  # as text, sorted by month they would not be ascending
    table["machine"] = table.machine.str.replace("m", "ü0")
    table = table.sample(frac=1, random_state=0).sort_values("machine", key=lambda ids: ids.str[2:].astype(int))
    file = machines / "german.csv"
    table.to_csv(file, sep=";", decimal=",", encoding="latin-1")  # with pandas's index
    status, _, err = run(capsys, "train", file, *COLUMNS, "--dry-run")
    assert (status, "use --encoding, such as latin-1" in err, err.count("\n")) == (2, True, 1)
    words = ["train", file, *COLUMNS, "--encoding", "latin-1"]
    status, _, err = run(capsys, *words, "--features", "heat,noise", "--dry-run")
    assert (status, "use --day-first or --month-first" in err, err.count("\n")) == (2, True, 1)
    status, out, _ = run(capsys, *words, "--day-first", "--features", "heat,noise", "--dry-run")
    assert (status, "8 steps, 2 channels (heat, noise)\n" in out, "  decimal commas\n" in out) == (0, True, True)
    assert run(capsys, *words, "--day-first", "--features", "heat,noise", "-o", machines / "net", *SMALL)[0] == 0
    out = run(capsys, "run", machines / "net", file)[1]  # read with the options of the training table
    rows = list(csv.DictReader(io.StringIO(out)))
    want = list(csv.DictReader(io.StringIO(run(capsys, "run", machines / "plain", machines / "machines.csv")[1])))
    assert [row.pop("machine") for row in rows] == [row.pop("machine").replace("m", "ü0") for row in want]
    assert rows == want


def test_row_numbers_are_no_feature_and_ids_keep_their_zeros(capsys, tmp_path, rng):
    table = pd.DataFrame({"id": np.repeat([f"00{n}" for n in range(9)], 4), "x": rng.normal(size=36)})
    table["y"] = np.repeat(np.arange(9) % 2, 4)
    table.to_csv(tmp_path / "a.csv")
    words = ["train", tmp_path / "a.csv", "--id", "id", "--label", "y"]
    out = run(capsys, *words, "--dry-run")[1]
    assert "1 channel (x)\n" in out
    assert "ignored: index, because it numbers the rows\n" in out
    assert run(capsys, *words, "-o", tmp_path / "net", *SMALL)[0] == 0
    assert run(capsys, "run", tmp_path / "net", tmp_path / "a.csv")[1].splitlines()[3].startswith("002,")
    status, _, err = run(capsys, *words, "--day-first", "--dry-run")
    assert (status, "--day-first and --date-format need --time, the column of dates" in err) == (2, True)
    status, _, err = run(capsys, *words, "--time", "x", "--day-first", "--dry-run")
    assert (status, "--day-first has no effect: column 'x' contains numbers, not dates" in err) == (2, True)
    status, _, err = run(capsys, "train", VOWELS, "--decimal", ",", "--dry-run")
    assert (status, "decimal applies only to tables" in err) == (2, True)


@pytest.mark.parametrize("task", [[], ["--task", "regress"]])
def test_numbers_to_learn_with_decimal_commas(capsys, tmp_path, rng, task):
    x = rng.normal(size=12).repeat(3)
    table = pd.DataFrame({"id": np.arange(12).repeat(3), "x": x, "y": np.round(x, 3)})
    table.to_csv(tmp_path / "a.csv", index=False, sep=";", decimal=",")
    words = ["train", tmp_path / "a.csv", "--id", "id", "--label", "y", *task]
    out = run(capsys, *words, "--dry-run")[1]
    assert f"regression: a number per sequence, from {table.y.min():.6g} to {table.y.max():.6g}\n" in out


def test_classes_that_a_spreadsheet_would_run_are_text(capsys, tmp_path, rng):
    frame = pd.DataFrame({"=id": np.repeat([f"@{n}" for n in range(20)], 3), "x": rng.normal(size=60)})
    frame["y"] = np.repeat(["=1+1", "-2"], 30)
    frame.to_csv(tmp_path / "x.csv", index=False)
    words = ["train", tmp_path / "x.csv", "--id", "=id", "--label", "y", "-o", tmp_path / "net", *SMALL]
    assert run(capsys, *words)[0] == 0
    rows = list(csv.reader(io.StringIO(run(capsys, "run", tmp_path / "net", tmp_path / "x.csv")[1])))
    assert rows[0][:2] == ["'=id", "predicted"]
    assert [row[0] for row in rows[1:3]] == ["'@0", "'@1"]
    assert {row[1] for row in rows[1:]} <= {"'=1+1", "-2"}


def test_a_sample_that_a_spreadsheet_would_run_is_text(tmp_path):
    history.write(tmp_path / "h.csv", [{"epoch": 1, "loss": -0.5, "sample": '=1+"a"'}, {"epoch": 2, "sample": "\t+"}])
    rows = list(csv.reader(io.StringIO((tmp_path / "h.csv").read_text())))
    assert rows[1:] == [["1", "-0.5", '\'=1+"a"'], ["2", "", "'\t+"]]
