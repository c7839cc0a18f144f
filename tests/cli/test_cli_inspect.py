"""`cellstack inspect`: files as a network's input, and the page of the run."""

import json
import wave
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from networks import make_cell

from cellstack import Network, Patch
from cellstack.cli import inspect
from cellstack.cli import main as cli
from cellstack.nodes import Dense, Embedding, GlobalPool, Merge, Recurrent


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ran(*words):
        status = cli.main(["inspect", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return ran


@pytest.fixture
def saved(tmp_path, rng):
    def made(width=3, ids=None, metadata=None, name="model.safetensors"):
        table = [] if ids is None else [Embedding(rng.normal(size=(ids, width)).astype("f4"))]
        cell = make_cell(rng, width, 4)
        net = Network([*table, Recurrent((cell,)), Dense(rng.normal(size=(4, 2)).astype("f4"))], metadata=metadata)
        net.save(tmp_path / name)
        return net

    return made


def description(path):
    text = Path(path).read_text(encoding="utf-8")
    begin = text.index('id="description">') + len('id="description">')
    return json.loads(text[begin : text.index("</script>", begin)])


def traced(monkeypatch):
    """Record the input of the run."""
    seen = []
    trace = Network.trace
    monkeypatch.setattr(Network, "trace", lambda net, x, **rest: seen.append((x, rest)) or trace(net, x, **rest))
    return seen


def test_without_a_file_the_input_is_random(run, saved):
    saved()
    status, out, err = run("model")
    assert (status, err) == (0, "")
    assert "random input, because no FILE was given" in out.splitlines()[0]
    assert out.splitlines()[1].startswith("model.html: 1 row, 24 steps, ")
    assert description("model.html")["title"] == "model.safetensors, random input"
    status, out, _ = run("model.safetensors", "-o", "other.html", "--json")
    assert json.loads(out)["page"] == "other.html"
    assert json.loads(out)["steps"] == 24


def test_a_network_of_ids_of_several_inputs_and_of_a_fixed_length(run, saved, tmp_path, rng):
    saved(ids=5)
    assert run("model")[0] == 0
    cell = make_cell(rng, 3, 4)
    nodes = [Recurrent((cell,), return_sequences=False), Merge("concat"), Dense(rng.normal(size=(6, 2)).astype("f4"))]
    wires = [("x",), ("layer_0", "speaker"), ("layer_1",)]
    Network(nodes, inputs={"x": (None, 3), "speaker": (2,)}, wires=wires).save(tmp_path / "two.safetensors")
    assert run("two")[0] == 0
    assert run("two", "text.txt")[:2] == (2, "")


def test_numbers(run, saved, tmp_path, monkeypatch, rng):
    saved()
    seen = traced(monkeypatch)
    x = rng.normal(size=(12, 7, 3)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    status, out, _ = run("model", "x.npy", "--rows", 2)
    assert (status, out.splitlines()[0]) == (0, "model.safetensors: 2 of 12 rows of x.npy")
    assert np.array_equal(seen[-1][0]["x"], x[:2])
    np.savez(tmp_path / "to train on.npz", x=x, y=np.arange(12), weight=np.ones(12))
    assert run("model", "to train on.npz")[0] == 0
    assert np.array_equal(seen[-1][0]["x"], x[:8])
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    assert run("model", "x.csv")[0] == 0
    assert seen[-1][0]["x"].tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert description("model.html")["steps"] == [0, 1]


def test_text(run, saved, tmp_path, monkeypatch):
    seen = traced(monkeypatch)
    (tmp_path / "a.txt").write_text("a<b", encoding="utf-8")
    saved(ids=4, metadata={"characters": "<ba"})
    assert run("model", "a.txt")[0] == 0
    assert seen[-1][0]["x"].tolist() == [[2, 0, 1]]
    assert description("model.html")["labels"]["values"] == ["a", "<", "b"]
    saved(width=4, metadata={"characters": ["a", "b", "<"]})
    assert run("model", "a.txt")[0] == 0
    assert seen[-1][0]["x"].argmax(axis=2).tolist() == [[0, 2, 1]]
    (tmp_path / "b.txt").write_text("é", encoding="utf-8")
    assert "doesn't know 'é'" in run("model", "b.txt")[2]
    saved(ids=256)
    assert run("model", "b.txt")[0] == 0
    assert seen[-1][0]["x"].tolist() == [[0xC3, 0xA9]]
    assert description("model.html")["labels"]["values"] == ["c3", "a9"]
    saved(ids=2, metadata={"characters": "abc"})
    assert "expected at most 2 characters" in run("model", "a.txt")[2]
    saved(ids=20)
    assert "with its characters in its metadata" in run("model", "a.txt")[2]
    (tmp_path / "empty.txt").write_text("")
    saved(ids=256)
    assert "the text is empty" in run("model", "empty.txt")[2]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sound(run, saved, tmp_path, monkeypatch, size):
    saved(width=80)
    seen = traced(monkeypatch)
    samples = np.sin(np.arange(8000) / 5.0)
    whole = np.round(samples * (2.0 ** (8 * size - 1) - 1)).astype(np.int64)
    data = (whole + 128).astype("u1") if size == 1 else whole.astype("<i8").view("u1").reshape(-1, 8)[:, :size]
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(size)
        file.setframerate(8000)
        file.writeframes(np.ascontiguousarray(data).tobytes())
    status, out, err = run("model", "s.wav")
    assert (status, err) == (0, "")
    assert "100 frames of 80 samples of s.wav, at 8,000 Hz" in out
    assert np.allclose(np.ravel(seen[-1][0]["x"]), samples, atol=2.0 / 2 ** (8 * size - 1))
    made = description("model.html")
    assert made["audio"]["samples"] == 8000
    assert made["labels"]["values"][:3] == [0.0, 0.01, 0.02]


def test_a_file_that_isn_t_a_wave(run, saved, tmp_path):
    saved(width=80)
    (tmp_path / "s.wav").write_bytes(b"RIFF....")
    assert "expected a wave file of PCM samples" in run("model", "s.wav")[2]
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0" * 4 * 79)
    assert "expected at least 80 samples" in run("model", "s.wav")[2]
    saved(ids=20)
    assert "doesn't take frames" in run("model", "s.wav")[2]


def test_a_damaged_wave(run, saved, tmp_path):
    saved(width=80)
    path = tmp_path / "s.wav"
    for size in (2, 3):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(size)
            file.setframerate(8000)
            file.writeframes(b"\1" * size * 800)
        whole = path.read_bytes()
        path.write_bytes(whole[: -100 - size // 2])
        status, _, err = run("model", "s.wav")
        assert status == 2
        assert "the file is truncated" in err
        path.write_bytes(whole[:24] + b"\0\0\0\0" + whole[28:])
        assert "expected a sample rate of at least 1 Hz" in run("model", "s.wav")[2]


def test_patches_of_steps_that_a_run_does_not_have(run, saved, tmp_path):
    saved().edit(Patch("layer_0", "f", steps=[40], value=1.0)).save(tmp_path / "far.safetensors")
    np.save(tmp_path / "x.npy", np.ones((1, 5, 3)))
    status, _, err = run("far", "x.npy")
    assert status == 2
    assert "expected steps from 0 to 4" in err
    saved().edit(Patch("layer_0", "f", rows=[1], value=1.0)).save(tmp_path / "far.safetensors")
    assert "expected rows from 0 to 0" in run("far")[2]
    assert cli.main(["run", "far", "x.npy"]) == 2


@pytest.mark.parametrize("characters", [5, {"a": 1}, True])
def test_invalid_characters_in_the_metadata(run, saved, tmp_path, characters):
    saved(ids=20, metadata={"characters": characters})
    (tmp_path / "t.txt").write_text("abc")
    assert "expected characters in the metadata as a string or a list of characters" in run("model", "t.txt")[2]


@pytest.mark.long
def test_files_of_the_kind_that_a_model_was_trained_on(run, tmp_path, monkeypatch, co2_table):
    data = files("cellstack_demo") / "data"
    words = ["train", data / "JapaneseVowels_TRAIN.ts", "--epochs", 1, "--units", 6, "--quiet", "-o", "vowels"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(list(map(str, words))) == 0
    seen = traced(monkeypatch)
    status, out, err = run("vowels", data / "JapaneseVowels_TEST.ts", "--rows", 3)
    assert (status, err) == (0, "")
    assert "3 of 370 sequences of" in out
    assert seen[-1][0].shape[0] == 3
    mask = seen[-1][1]["mask"]
    assert mask is None or mask.any(axis=1).all()
    said = description("vowels.html")
    assert said["answer"]["task"] == "classify"
    assert said["answer"]["truth"] == ["1", "1", "1"]  # the file begins with the first speaker
    assert said["nodes"][-1]["names"] == [str(speaker) for speaker in range(1, 10)]
    assert "expected a .ts or .npz file" in run("vowels", co2_table)[2]
    x = np.random.default_rng(0).normal(size=(5, 7, 12))
    np.savez(tmp_path / "spoken.npz", x=x, y=list("12345"), lengths=[7, 6, 5, 4, 3])
    assert run("vowels", "spoken.npz", "--rows", 2)[::2] == (0, "")
    assert np.allclose(seen[-1][0][0], x[0])
    assert seen[-1][1]["mask"].sum(axis=1).tolist() == [7, 6]
    assert description("vowels.html")["answer"]["truth"] == ["1", "2"]
    words = ["train", co2_table, "--target", "co2", "--members", 1, "--epochs", 1, "--units", 4]
    words += ["--quiet", "-o", "co2"]
    assert cli.main(list(map(str, words))) in (0, 130)
    status, out, err = run("co2", co2_table)
    assert (status, err) == (0, "")
    labels = description("co2.html")["labels"]
    assert labels["kind"] == "date"
    assert labels["values"][0] == "2000-01-08"  # without a time: they are all midnight
    inputs = description("co2.html")["inputs"][0]["names"]
    assert inputs[0] == "co2"
    assert inputs[-1].endswith(" observed")
    assert (
        "expected a table (.csv, .tsv, .parquet), because the model forecasts"
        in run("co2", data / "JapaneseVowels_TEST.ts")[2]
    )


def test_what_is_refused(run, saved, tmp_path, monkeypatch):
    saved()
    assert "with one of the suffixes .csv, .npy" in run("model", "x.png")[2]
    assert "no such file" in run("nowhere")[2]
    assert "expected --rows of at least 1" in run("model", "--rows", 0)[2]
    assert "expected --output to name a file" in run("model", "-o", "")[2]
    assert "there is no folder" in run("model", "-o", "nowhere/x.html")[2]
    monkeypatch.setattr("cellstack.inspect.contents.ROUNDED", ((10, np.float16),))
    status, out, err = run("model")
    assert (status, out) == (2, "")
    assert "select rows, rows=0" in err
    assert not (tmp_path / "model.html").exists()


def test_open_opens_the_browser(run, saved, tmp_path, monkeypatch):
    saved()
    opened = []
    monkeypatch.setattr(inspect.webbrowser, "open", opened.append)
    assert run("model", "--open")[0] == 0
    assert opened == [(tmp_path / "model.html").as_uri()]


def test_a_network_with_one_output_per_sequence(run, tmp_path, rng):
    Network([Recurrent((make_cell(rng, 2, 3),)), GlobalPool("mean")]).save(tmp_path / "pooled.safetensors")
    assert run("pooled")[0] == 0
    assert description("pooled.html")["nodes"][1]["timed"] is False
