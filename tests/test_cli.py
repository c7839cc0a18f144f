"""The command line: every verb, --json, --help, and bad input in one line with status 2."""

import csv
import io
import json
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from cellstack import cli, load

DATA = files("cellstack") / "data"
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
def co2(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "co2"
    assert cli.main(["train", CO2, "--target", "co2", "--horizon", "8", "--window", "20", "-o", str(path), *SMALL]) == 0
    return f"{path}.safetensors"


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


def test_run_answers_what_training_measured(capsys, vowels):
    status, out, err = run(capsys, "run", vowels, VOWELS_TEST)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert len(rows) == 370
    assert sum(float(rows[0][f"p_{n}"]) for n in range(1, 10)) == pytest.approx(1, abs=1e-4)
    status, out, _ = run(capsys, "run", vowels, VOWELS_TEST, "--json", "--threads", "1")
    report = json.loads(out)
    assert [row["predicted"] for row in rows] == report["predicted"]
    assert f"accuracy {report['accuracy']:.4f}" in err


def test_forecast(capsys, co2):
    status, out, _ = run(capsys, "run", co2, CO2)
    rows = list(csv.reader(io.StringIO(out)))
    assert status == 0
    assert rows[0] == ["date", "co2"]
    assert [row[0] for row in rows[1:3]] == ["2002-01-05", "2002-01-12"]
    assert len(rows) == 9
    status, out, _ = run(capsys, "run", co2[: -len(".safetensors")], CO2, "--json")
    report = json.loads(out)
    assert np.abs(np.array(report["forecast"]) - report["seasonal_naive"]).max() < 5
    assert load(co2).metadata["recipe"]["season"] == 52


def test_info(capsys, vowels):
    status, out, _ = run(capsys, "info", vowels)
    assert status == 0
    for part in ("Bidirectional", "12 -> 6", "plan", "kernel", "bytes", 'labels: ["1"'):
        assert part in out
    report = json.loads(run(capsys, "info", vowels, "--json")[1])
    assert report["input_size"] == 12
    assert [layer["kind"] for layer in report["layers"]] == ["Standardise", "Bidirectional", "Pool", "Dense"]
    assert report["parameters"] == sum(layer["parameters"] for layer in report["layers"])


@pytest.mark.parametrize("verb", ["demo", "train", "run", "info"])
def test_help_has_an_example_and_every_verb_json(capsys, verb):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  cellstack {verb}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.ts", "-o", "x"], r"nowhere.ts: No such file"),
        (["train", "series.txt", "-o", "x"], r"expected a file that ends in .ts or .csv"),
        (["train", VOWELS, "-o", "no/such/folder/x"], r"expected a folder no/such/folder"),
        (["train", VOWELS, "-o", "x", "--lr", "0"], r"expected lr > 0, got 0.0"),
        (["train", VOWELS, "-o", "x", "--dropout", "1"], r"expected dropout in \[0, 1\), got 1.0"),
        (["train", VOWELS, "-o", "x", "--validation", "1"], r"expected validation in \[0, 1\)"),
        (["train", VOWELS, "-o", "x", "--resume"], r"expected --checkpoint FILE"),
        (["train", VOWELS, "-o", "x", "--threads", "0"], r"expected --threads of at least 1"),
        (["train", CO2, CO2, "-o", "x"], r"expected one CSV file"),
        (["train", CO2, "-o", "x", "--target", "no2"], r"a column of numbers 'no2', found co2"),
        (["train", CO2, "-o", "x", "--horizon", "5000"], r"expected more rows for the training part"),
        (["train", CO2, "-o", "x", "--horizon", "-1"], r"expected --horizon of at least 1, got -1"),
        (["train", CO2, "-o", "x", "--test-share", "0.9"], r"expected a test share"),
        (["run", "nothing", CO2], r"nothing: no such file"),
        (["info", VOWELS], r"expected one of .* found a file that begins with"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"cellstack {words[0]}: error: ")
    import re

    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["train"], ["train", "a.ts", "-o", "x", "--units", "4,x"], ["run", "m"]]
)
def test_bad_usage_is_one_line_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_wrong_kind_of_file_or_model(capsys, vowels, co2, tmp_path):
    assert run(capsys, "run", vowels, CO2)[0] == 2
    assert run(capsys, "run", co2, VOWELS)[0] == 2
    narrow = tmp_path / "narrow.ts"
    narrow.write_text("@classLabel true 1\n@data\n1,2:3,4:1\n")
    status, _, err = run(capsys, "run", vowels, str(narrow))
    assert (status, "expected 12 channels, found 2" in err) == (2, True)
    from cellstack import Network, Pool

    cell = load(vowels).nodes[1].forward
    Network((cell, Pool("last"))).save(tmp_path / "bare.safetensors")
    status, _, err = run(capsys, "run", str(tmp_path / "bare"), VOWELS)
    assert (status, "expected the metadata of cellstack train" in err) == (2, True)
    damaged = tmp_path / "damaged.safetensors"
    with open(vowels, "rb") as file:
        damaged.write_bytes(file.read()[:-100])
    status, _, err = run(capsys, "info", str(damaged))
    assert (status, err.count("\n")) == (2, 1)


def test_run_and_info_need_no_torch(vowels, co2):
    code = (
        "import sys; from cellstack import cli; codes = [cli.main(words.split('|')) for words in sys.argv[1:]]; "
        "assert codes == [0] * len(codes), codes; "
        "assert not {'torch', 'matplotlib', 'tqdm'} & set(sys.modules)"
    )
    words = [f"info|{vowels}", f"run|{vowels}|{VOWELS_TEST}", f"run|{co2}|{CO2}"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early(vowels):
    command = f"{sys.executable} -m cellstack run {vowels} {VOWELS_TEST} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sequence,predicted")
    assert "Traceback" not in done.stderr


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


@pytest.mark.slow
def test_co2_beats_the_seasonal_naive_forecast(capsys, tmp_path):
    words = ["train", CO2, "--target", "co2", "--horizon", "52", "-o", str(tmp_path / "co2"), "--threads", "1"]
    scores = json.loads(run(capsys, *words, "--json", "--quiet")[1])["test"]
    assert scores["origins"] > 400
    assert scores["model"]["mae"] < 0.5 * scores["seasonal_naive"]["mae"]
    assert scores["model"]["rmse"] < 0.55 * scores["seasonal_naive"]["rmse"]
    assert scores["model"]["mae"] < scores["seasonal_drift"]["mae"]
