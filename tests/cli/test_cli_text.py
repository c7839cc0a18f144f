"""`cellstack generate`, and `cellstack train` on a text."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from cellstack import Network, load
from cellstack.cli import main as cli
from cellstack.nodes import Activation, Embedding
from cellstack.train import generate

LETTERS = "ab c\né"
ALICE = files("cellstack_demo") / "data" / "alice.txt"
SMALL = ["--units", 8, "--embedding", 5, "--steps", 16, "--batch", 4, "--epochs", 2, "--threads", 1]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ran(*words):
        status = cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        return status, out, err

    return ran


@pytest.fixture
def model(tmp_path, rng):
    net = Network([Embedding(rng.normal(size=(6, 6))), Activation("softmax")], metadata={"characters": LETTERS})
    net.save(tmp_path / "model.safetensors")
    return net


def test_generate_writes_what_the_library_does(run, model):
    options = ["--length", 80, "--temperature", 0.7, "--top-k", 4, "--top-p", 0.9, "--seed", 5]
    text = "".join(generate(model, "ab ", length=80, temperature=0.7, top_k=4, top_p=0.9, seed=5))
    assert run("generate", "model", "--prompt", "ab ", *options) == (0, f"ab {text}\n", "")
    status, out, _ = run("generate", "model", "--prompt", "ab ", *options, "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["text"], report["prompt"], report["seed"], report["characters"]) == (text, "ab ", 5, 80)
    ended = run("generate", "model", "--stop", "b", "--length", 1000)[1]
    assert ended.endswith("b\n")
    assert ended.count("b") == 1
    report = json.loads(
        run("generate", "model", "--json")[1]
    )  # the random seed is reported, and gives the same text again
    assert report["text"] == json.loads(run("generate", "model", "--json", "--seed", report["seed"])[1])["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "aXb"], r"the prompt: the model doesn't know 'X' (U+0058): its alphabet has 6 characters"),
        (["--temperature", "-1"], "expected a temperature of at least 0"),
        (["--top-p", "2"], "expected top_p above 0"),
        (["--seed", "-1"], "expected a seed of at least 0, got -1"),
    ],
)
def test_generate_refuses_in_one_line(run, model, words, message):
    status, out, err = run("generate", "model", *words)
    assert (status, out) == (2, "")
    assert err.startswith("cellstack generate: error: ")
    assert message in err


def test_generate_streams_without_torch_and_stops_when_the_reader_closes_the_pipe(tmp_path, model):
    code = (
        "import sys; from cellstack.cli import main\n"
        "status = main.main(['generate', 'model', '--length', '100000000', '--seed', '0'])\n"
        "print('torch' in sys.modules, status, file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        first = process.stdout.read(50)  # long before all is written
        process.stdout.close()
        assert process.stderr.read().decode().split() == ["False", "0"]
    assert first.decode(errors="ignore")[:40] == "".join(generate(model, length=40, seed=0))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(ALICE.read_text(encoding="utf-8")[:2400], encoding="utf-8")
    return path


@pytest.mark.long
def test_a_dry_run_describes_the_text(run, tmp_path):
    status, out, err = run("train", ALICE, "--dry-run")
    assert (status, err, list(tmp_path.iterdir())) == (0, "", [])
    first, parts, network, time = out.splitlines()
    assert "147,815 characters, 68 distinct; 133,033 to train on" in first
    assert parts.endswith(", 133,034 to 140,424 to validate on, 140,425 to 147,815 to test on")
    layers = "LSTM 64 -> 256 -> 256, 875,844 weights; at most 30 epochs of 130 steps"
    assert network == f"1 network: {layers}, batches of 8 streams, 128 characters each"
    assert re.fullmatch(r"expected time: \d.* on this machine, depending on early stopping", time)
    report = json.loads(run("train", ALICE, "--dry-run", "--json", "--bytes", "--batch", 32)[1])
    assert report["plan"]["networks"] == 1
    assert 0 < report["plan"]["seconds"][0] < report["plan"]["seconds"][1]
    report = report["understood"]
    assert (report["unit"], report["length"], report["streams"], report["test"]) == ("bytes", 147815, 32, 7391)


@pytest.mark.long
def test_from_a_book_to_characters(run, book, tmp_path):
    status, out, err = run("train", book, "-o", "model", *SMALL)
    assert status == 0
    assert out.splitlines()[0].startswith(f"{book}: 2,400 characters, ")
    assert "on the test part: bits per character" in out
    assert [line.split("  ")[0] for line in err.replace("\r", "\n").splitlines() if "bits per" in line] == [
        "epoch 1",
        "epoch 2",
    ]
    status, out, _ = run("train", book, "-o", "again", *SMALL, "--quiet", "--json", "--inspect")
    report = json.loads(out)
    assert (status, report["task"], report["epochs"]) == (0, "text", 2)
    assert report["test"].keys() == {"bits_per_character", "validation_bits_per_character"}
    assert len(report["history"][1]["sample"]) == 80
    assert "nats" in (tmp_path / "again-inspect" / "report.html").read_text(encoding="utf-8")
    first, second = load(tmp_path / "model.safetensors"), load(tmp_path / "again.safetensors")
    assert np.array_equal(first.nodes[-1].kernel, second.nodes[-1].kernel)
    written = "".join(generate(first, "Alice", length=30, seed=2))
    assert run("generate", "model", "--prompt", "Alice", "--length", 30, "--seed", 2)[1] == f"Alice{written}\n"
    status, out, _ = run("inspect", "model", book)
    assert (status, out.splitlines()[0]) == (0, f"model.safetensors: the 2,400 characters of {book}")
    status, out, _ = run("run", "model", book)
    assert status == 0
    assert out.startswith("2,400 characters, ")


def test_a_test_text(run, book, tmp_path):
    other = tmp_path / "other.md"
    other.write_text(book.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    report = json.loads(run("train", book, other, "-o", "model", *SMALL, "--quiet", "--json")[1])
    assert report["understood"]["training"] == 2280
    measured = json.loads(run("run", "model", other, "--json")[1])
    assert measured["bits_per_character"] == report["test"]["bits_per_character"]
    other.write_text("ß" * 300, encoding="utf-8")
    assert "the model doesn't know 'ß' (U+00DF): its alphabet" in run("train", book, other, "-o", "model", *SMALL)[2]


def test_a_checkpoint_is_resumed(run, book):
    saved = ["--checkpoint", "book.checkpoint", "--quiet", "--json"]
    run("train", book, "-o", "part", *SMALL, "--epochs", 3, *saved)
    assert run("train", book, "-o", "part", *SMALL, "--epochs", 3, *saved)[0] == 2
    report = json.loads(run("train", book, "-o", "more", *SMALL, "--epochs", 4, *saved, "--resume")[1])
    assert [entry["epoch"] for entry in report["history"]] == [1, 2, 3, 4]
    book.write_text(book.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    assert "expected a checkpoint with text " in run("train", book, "-o", "x", *SMALL, *saved, "--resume")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "a"], "--target doesn't apply to texts, only to forecasts"),
        (["--noise", "1"], "--noise doesn't apply to texts"),
        (["--bidirectional"], "--bidirectional doesn't apply to texts"),
        (["--steps", "0"], "expected steps >= 1, got 0"),
        (["--embedding", "-1"], "expected --embedding >= 0"),
        (["--validation", "0.9"], "together at most 0.5"),
    ],
)
def test_train_refuses_in_one_line(run, book, words, message):
    status, out, err = run("train", book, "-o", "model", *words)
    assert (status, out) == (2, "")
    assert message in err


def test_files_that_aren_t_text(run, tmp_path):
    for name, data, message in (
        ("empty.txt", b"", "at least 200 characters, found none"),
        ("latin.txt", b"caf\xe9" * 99, "expected UTF-8 text, found byte 0xe9 at 3"),
        ("wide.txt", "a text".encode("utf-16"), "found UTF-16"),
    ):
        (tmp_path / name).write_bytes(data)
        status, out, err = run("train", name, "-o", "model")
        assert (status, out) == (2, "")
        assert message in err
    assert run("train", "latin.txt", "-o", "model", *SMALL, "--quiet", "--bytes")[0] == 0
    (tmp_path / "odd.log").write_text("a b c " * 60)
    assert run("train", "odd.log", "-o", "model", *SMALL, "--quiet", "--task", "text")[0] == 0


@pytest.mark.parametrize("characters", ["ACGT", "的一是不了人我在有他"])
def test_a_text_without_spaces_and_line_ends(run, tmp_path, rng, characters):
    text = "".join(rng.choice(list(characters), 600))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    status, out, err = run("train", "text.txt", "-o", "model", *SMALL, "--json", "--quiet", "--checkpoint", "run.ckpt")
    assert (status, err) == (0, "")
    report, net = json.loads(out), load(tmp_path / "model.safetensors")
    assert [len(entry["sample"]) for entry in report["history"]] == [80, 80]
    expected = generate(net, text[0], length=80, temperature=0.8, seed=report["best"]["epoch"])
    assert report["best"]["sample"] == "".join(expected)
    assert (tmp_path / "run.ckpt").exists()
    status, _, err = run("generate", "model")
    assert (status, err.count("\n")) == (2, 1)
    assert "a prompt is required, because the model has neither a line end nor a space" in err
    assert run("generate", "model", "--prompt", text[:3], "--length", 5)[0] == 0
