"""`cellstack generate`, and `cellstack train` on a text."""

import json
import subprocess
import sys

import pytest

from cellstack import Network
from cellstack.cli import main as cli
from cellstack.nodes import Activation, Embedding
from cellstack.train import generate

LETTERS = "ab c\né"


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
    report = json.loads(run("generate", "model", "--json")[1])  # a seed of its own is told, and repeats
    assert report["text"] == json.loads(run("generate", "model", "--json", "--seed", report["seed"])[1])["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "aXb"], r"the prompt: expected the network's 6 characters, found 'X' (U+0058)"),
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


def test_generate_streams_without_torch_and_a_reader_that_leaves_ends_it(tmp_path, model):
    code = (
        "import sys; from cellstack.cli import main\n"
        "status = main.main(['generate', 'model', '--length', '100000000', '--seed', '0'])\n"
        "print('torch' in sys.modules, status, file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        first = process.stdout.read(50)  # long before it could have written all
        process.stdout.close()
        assert process.stderr.read().decode().split() == ["False", "0"]
    assert first.decode(errors="ignore")[:40] == "".join(generate(model, length=40, seed=0))
