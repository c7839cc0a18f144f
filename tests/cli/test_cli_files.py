"""`cellstack convert`, `info` and `run`: between all formats, compared with the other runtime."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import make_cell
from tools import need

import cellstack
from cellstack import Network, formats, load
from cellstack.cli import main as cli
from cellstack.cli.files import write_csv
from cellstack.nodes import Bidirectional, Dense, Embedding, GlobalPool, Merge, Recurrent, Reduce, Standardise


def make_net(bidirectional=False):
    rng = np.random.default_rng(0)
    ahead = Recurrent((make_cell(rng, 3, 4),))
    first = Bidirectional(ahead, Recurrent(ahead.cells, go_backwards=True), "sum") if bidirectional else ahead
    raw = Standardise(np.zeros(3, "f4"), np.ones(3, "f4"))
    return Network([raw, first, Dense(rng.normal(size=(4, 2)).astype("f4"))], ["raw", "lstm", "out"])


@pytest.fixture
def model(tmp_path):
    make_net().save(tmp_path / "net.safetensors")
    return str(tmp_path / "net.safetensors")


@pytest.fixture
def pytorch_files(monkeypatch):
    monkeypatch.setattr(formats, "ADAPTERS", tuple({*formats.ADAPTERS, "pytorch"}))


def run(capsys, *words):
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


# ── convert ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_to_the_native_format(capsys, tmp_path, model):
    target = str(tmp_path / "other.safetensors")
    status, out, err = run(capsys, "convert", model, target)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"{model} -> {target}"
    assert f"{target}: greatest difference from cellstack" in out
    x = np.ones((1, 2, 3))
    assert np.array_equal(load(target)(x), load(model)(x))


@pytest.mark.parametrize(
    ("target", "files"),
    [
        ("firmware/tagger.c", ["firmware/tagger.h", "firmware/tagger.c"]),
        ("firmware/", ["firmware/net.h", "firmware/net.c"]),
        (".", ["net.h", "net.c"]),
    ],
)
def test_to_c(capsys, tmp_path, model, monkeypatch, target, files):
    need("cc")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "convert", model, target, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["files"] == files
    assert all((tmp_path / file).exists() for file in files)
    found = report["parity"][files[1]]
    assert found["ok"] is True
    assert [one["name"] for one in found["differences"]] == ["out", "cell 0 h", "cell 0 c"]
    assert 0 < max(one["relative"] for one in found["differences"]) < 1e-5


@pytest.mark.parametrize(("name", "stem"), [("2-nets", "model_2_nets"), ("_", "model"), ("a__b c", "a_b_c")])
def test_names_that_aren_t_valid_in_c(capsys, tmp_path, model, name, stem):
    source = tmp_path / f"{name}.safetensors"
    source.write_bytes((tmp_path / "net.safetensors").read_bytes())
    (tmp_path / "out").mkdir()
    assert run(capsys, "convert", str(source), str(tmp_path / "out"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{stem}.c", f"{stem}.h"]


def test_a_difference_is_status_1(capsys, tmp_path, model):
    need("cc")
    status, out, err = run(capsys, "convert", model, str(tmp_path / "net.c"), "--tolerance", "1e-12")
    assert (status, err) == (1, "")
    assert "greatest difference from cc" in out


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_invalid_tolerances(capsys, tmp_path, model, tolerance):
    status, out, err = run(capsys, "convert", model, str(tmp_path / "net.c"), f"--tolerance={tolerance}")
    assert (status, out) == (2, "")
    assert err == f"cellstack convert: error: expected --tolerance >= 0 and finite, got {float(tolerance)}\n"
    assert not (tmp_path / "net.c").exists()


def test_without_a_compiler_c_is_written_but_not_verified(capsys, tmp_path, model, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    status, out, err = run(capsys, "convert", model, str(tmp_path / "net.c"))
    assert (status, err) == (0, "")
    assert "not verified" in out
    assert "install gcc or clang" in out
    assert (tmp_path / "net.c").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("net.txt", r"expected a target with the suffix of a format (safetensors (.safetensors), "),
        ("net", r"C (.c)), or a folder for C, ending in /, got '"),
        ("a-b.c", r"expected a name of letters"),
        ("no/folder/net.safetensors", r"there is no folder"),
    ],
)
def test_invalid_targets(capsys, tmp_path, model, target, message):
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "convert", model, str(tmp_path / target))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_without_a_name_writes_nothing(capsys, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "convert", model, "")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("C (.c)), or a folder for C, ending in /, got ''\n")
    with pytest.raises(ValueError, match="export_c: expected a folder, got ''"):
        load(model).export_c("")
    assert sorted(tmp_path.iterdir()) == before


def test_no_c_is_written_to_a_folder_with_the_suffix_of_a_format(capsys, tmp_path, model):
    target = tmp_path / "net.keras"
    target.mkdir()
    status, out, err = run(capsys, "convert", model, str(target))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{target}: it exists and isn't a regular file" in err
    assert list(target.iterdir()) == []


def test_a_node_that_the_format_doesn_t_support_is_named_once(capsys, tmp_path, pytorch_files):
    make_net(bidirectional=True).save(tmp_path / "net.safetensors")
    target = tmp_path / "net.pt"
    status, out, err = run(capsys, "convert", str(tmp_path / "net"), str(target))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"cellstack convert: error: {target}: raw (Standardise): ")
    assert "for a folder" not in err


def test_a_node_that_c_doesn_t_support_is_named(capsys, tmp_path):
    net = make_net(bidirectional=True)
    Network([*net.nodes, Reduce("sum", 1)]).save(tmp_path / "net.safetensors")
    status, _, err = run(capsys, "convert", str(tmp_path / "net"), str(tmp_path / "net.c"))
    assert (status, err.count("\n")) == (2, 1)
    assert "layer_3: Reduce isn't supported; these nodes are: " in err
    assert not (tmp_path / "net.c").exists()


@pytest.mark.long
def test_a_bidirectional_network_becomes_c_from_weights_in_an_order(capsys, tmp_path):
    need("cc")
    rnn = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True)
    torch.save(torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(8, 2)}).state_dict(), tmp_path / "net.pt")
    status, out, _ = run(
        capsys, "convert", str(tmp_path / "net.pt"), str(tmp_path / "net.c"), "--order", "rnn,final,head"
    )
    assert status == 0
    assert f"{tmp_path / 'net.c'}: pass" in out
    shapes, verdict = out.splitlines()[-2:]
    assert shapes == "[B, T, 3] -> [B, 2]: an output for the whole sequence"
    assert verdict == (
        f"not verified: {tmp_path / 'net.pt'}: a state dict doesn't say how its modules run (found rnn, head): compare "
        "with your module: cs.verify(cs.load(…), module)"
    )


@pytest.mark.long
def test_a_forgotten_final_state_does_not_end_in_pass(capsys, tmp_path, pytorch_files):
    rnn = torch.nn.LSTM(3, 4, batch_first=True)
    torch.save(torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(4, 3)}).state_dict(), tmp_path / "net.pt")
    words = ["convert", str(tmp_path / "net.pt"), str(tmp_path / "net.safetensors"), "--order", "rnn,head"]
    status, out, _ = run(capsys, *words)
    shapes, verdict = out.splitlines()[-2:]
    assert (status, shapes) == (0, "[B, T, 3] -> [B, T, 3]: an output at every step")
    assert verdict.startswith(f"not verified: {tmp_path / 'net.pt'}: a state dict doesn't say")
    report = json.loads(run(capsys, *words, "--json")[1])
    assert (report["verdict"], report["shapes"]) == ("not verified", shapes)
    assert report["not_verified"] == [verdict.removeprefix("not verified: ")]


def test_any_network_runs_on_numbers(capsys, tmp_path, model):
    net, x = load(model), np.random.default_rng(0).normal(size=(2, 3, 3)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    status, out, err = run(capsys, "run", model, str(tmp_path / "x.npy"))
    header, *lines = out.splitlines()
    assert (status, err, header) == (0, "", "row,step,y_0,y_1")
    numbers = np.array([[float(number) for number in line.split(",")] for line in lines])
    np.testing.assert_array_equal(numbers[:, :2], [[row, step] for row in range(2) for step in range(3)])
    np.testing.assert_array_equal(numbers[:, 2:].reshape(2, 3, 2).astype("f4"), net(x))
    status, out, _ = run(capsys, "run", model, str(tmp_path / "x.npy"), "--json")
    np.testing.assert_array_equal(np.array(json.loads(out)["out"], "f4"), net(x))
    last = Network([*net.nodes, GlobalPool("last")])
    last.save(tmp_path / "last.safetensors")
    np.savetxt(tmp_path / "x.csv", x[0], delimiter=",")
    status, out, _ = run(capsys, "run", str(tmp_path / "last"), str(tmp_path / "x.csv"))
    header, line = out.splitlines()
    assert header == "row,y_0,y_1"
    np.testing.assert_array_equal(np.array(line.split(","), "f8")[1:].astype("f4"), last(x[:1])[0])
    wires = [("x",), ("raw",), ("lstm",)]
    Network(net.nodes, net.names, wires=wires, outputs=("lstm", "out")).save(tmp_path / "two.safetensors")
    status, _, err = run(capsys, "run", str(tmp_path / "two"), str(tmp_path / "x.npy"))
    assert status == 2
    assert "CSV can't represent the outputs lstm [B, T, 4], out [B, T, 2]: use --json" in err
    status, _, err = run(capsys, "run", model, str(tmp_path / "no.ts"))
    assert status == 2


def test_a_file_is_never_converted_onto_itself(capsys, tmp_path, model):
    before = Path(model).read_bytes()
    other = tmp_path / "link.safetensors"
    other.symlink_to(model)
    for target in (model, str(other)):
        status, _, err = run(capsys, "convert", model, target)
        assert status == 2
        assert "the target is the source file, which would be overwritten" in err
    assert Path(model).read_bytes() == before
    status, _, err = run(capsys, "convert", model, str(tmp_path / "nowhere"))
    assert status == 2
    assert "C (.c)), or a folder for C, ending in /" in err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cellstack {cellstack.__version__}\n"


# ── convert --sample ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_a_user_s_sample(capsys, tmp_path, model, suffix):
    need("cc")
    rows = np.random.default_rng(0).normal(size=(9, 3))
    sample = str(tmp_path / f"sample{suffix}")
    if suffix == ".csv":
        np.savetxt(sample, rows, delimiter=",", header="a,b,c", comments="")
    elif suffix == ".npz":
        np.savez(sample, x=rows)
    else:
        np.save(sample, rows)
    words = ["convert", model, str(tmp_path / "net.c"), "--sample", sample]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "on x [1, 9, 3]\n" in out
    assert "drawn" not in out
    assert [line.split()[0] for line in out.splitlines()[-5:-3]] == ["bfloat16", "int8"]
    target = tmp_path / "net.c"
    assert out.splitlines()[-3] == f"{target}: pass: every relative difference is within 1.0e-04"
    assert out.splitlines()[-1] == f"pass: {model} -> {target.with_suffix('.h')}, {target}"
    report = json.loads(run(capsys, *words, "--json")[1])
    assert report["sample"] == sample
    (parity,) = report["parity"].values()
    assert (parity["drawn"], parity["inputs"]) == (False, {"x": [1, 9, 3]})
    net = load(model)
    apart = np.abs(net.stream(weights="int8").run(rows[None]).astype("f8") - net(rows[None]))
    assert parity["streams"][1]["greatest"] == pytest.approx(apart.max())
    assert parity["streams"][1]["mean"] == pytest.approx(apart.mean())


@pytest.mark.long
def test_a_sample_of_rows_ids_and_two_inputs(capsys, tmp_path):
    rng = np.random.default_rng(0)
    target = str(tmp_path / "net.onnx")
    table = Embedding(rng.normal(size=(5, 3)).astype("f4"))
    lstm = Recurrent((make_cell(rng, 3, 4),), return_sequences=False)
    Network([table, lstm]).save(tmp_path / "ids.safetensors")
    (tmp_path / "ids.csv").write_text("3\n0\n4\n")
    status, out, err = run(capsys, "convert", str(tmp_path / "ids"), target, "--sample", str(tmp_path / "ids.csv"))
    assert (status, err, out.count("on x [1, 3]\n")) == (0, "", 2)
    two = {"inputs": {"x": (None, 3), "speaker": (2,)}, "wires": [("x",), ("lstm", "speaker")]}
    Network([lstm, Merge("concat")], ["lstm", "both"], **two).save(tmp_path / "two.safetensors")
    np.savez(tmp_path / "two.npz", x=np.ones((2, 6, 3)), speaker=np.ones((2, 2)))
    words = ["convert", str(tmp_path / "two"), target, "--sample"]
    status, out, err = run(capsys, *words, str(tmp_path / "two.npz"))
    assert (status, err) == (0, "")
    assert "on x [2, 6, 3], speaker [2, 2]\n" in out
    assert "not measured: expected inputs with a time axis, got speaker [B, 2]" in out
    status, out, err = run(capsys, *words, str(tmp_path / "ids.csv"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "expected a .npz file with the inputs x, speaker" in err
    vector = Network([Dense(np.ones((2, 2), "f4"))], inputs={"x": (2,)})
    vector.save(tmp_path / "vector.safetensors")
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n5,6\n")
    status, out, err = run(capsys, "convert", str(tmp_path / "vector"), target, "--sample", str(tmp_path / "rows.csv"))
    assert (status, err) == (0, "")
    assert "on x [3, 2]\n" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1,2,3", "expected a .npy, .npz, .csv or .jsonl file"),
        ("a.npy", "zipped", "the content isn't .npy"),
        ("a.csv", b"1,2\n", "line 1: expected 3 numbers, found 2"),
        ("a.csv", b"", "the file contains no numbers"),
        ("a.npy", b"\x93NUMPY", "expected numeric arrays written by NumPy"),
        ("a.npz", b"nothing", "expected numeric arrays written by NumPy"),
        ("a.npy", None, "expected x [B, T, I=3], got (2, 2, 2)"),
        ("no.npy", None, "no.npy"),
    ],
)
def test_invalid_samples(capsys, tmp_path, model, name, content, message):
    path = tmp_path / name
    if content == "zipped":
        with path.open("wb") as file:
            np.savez(file, x=np.ones((1, 2, 3)))
    elif content is not None:
        path.write_bytes(content)
    elif name == "a.npy":
        np.save(path, np.ones((2, 2, 2)))
    status, out, err = run(capsys, "convert", model, str(tmp_path / "net.onnx"), "--sample", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "net.onnx").exists()


def test_pickled_objects_in_a_sample_aren_t_loaded(capsys, tmp_path, model):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    status, _, err = run(capsys, "convert", model, str(tmp_path / "net.onnx"), "--sample", str(tmp_path / "a.npy"))
    assert (status, err.count("\n")) == (2, 1)
    assert "allow_pickle=False" in err


# ── info ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_info_of_the_native_format(capsys, model):
    status, out, _ = run(capsys, "info", model)
    assert status == 0
    assert "  lstm   Recurrent" in out
    report = json.loads(run(capsys, "info", model, "--json")[1])
    assert report["inputs"] == {"x": "[B, T, 3]"}
    assert report["outputs"] == {"out": "[B, T, 2]"}


def test_info_of_a_network_that_can_t_be_run_as_a_whole(capsys, tmp_path, pytorch_files):
    """It lists the recurrent parts, and the reason."""
    module = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.Linear(4, 2))
    torch.save(module.state_dict(), tmp_path / "net.pt")
    status, out, err = run(capsys, "info", str(tmp_path / "net.pt"))
    assert (status, err) == (0, "")
    assert "can't be run as a whole: " in out
    assert "recurrent parts\n  0:\n" in out
    assert "LSTM 3 -> 4" in out
    report = json.loads(run(capsys, "info", str(tmp_path / "net.pt"), "--json")[1])
    assert list(report["parts"]) == ["0", "1"]
    assert report["parts"]["0"]["layers"][0]["summary"] == "LSTM 3 -> 4"
    assert "and 1 (weight [2, 4], bias [2])" in report["error"]


def test_info_without_a_recurrent_part_gives_the_reason(capsys, tmp_path, pytorch_files):
    torch.save(torch.nn.Linear(4, 2).state_dict(), tmp_path / "net.pt")
    status, out, err = run(capsys, "info", str(tmp_path / "net.pt"))
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_from_torch_to_the_others(capsys, tmp_path, pytorch_files):
    torch.save(torch.nn.GRU(3, 4, 2).state_dict(), tmp_path / "net.pt")
    status, out, err = run(capsys, "convert", str(tmp_path / "net.pt"), str(tmp_path / "net.safetensors"), "--json")
    assert (status, err) == (0, "")
    parity = json.loads(out)["parity"]
    assert [one["runtime"] for one in parity.values()] == ["torch", "cellstack"]
    assert all(one["ok"] for one in parity.values())


def test_a_missing_package_is_one_line(capsys, tmp_path, monkeypatch):
    from cellstack.cli import files as cli_files

    def needs(path, **options):
        raise ModuleNotFoundError("ONNX files need the package onnx: pip install 'cellstack[onnx]'")

    monkeypatch.setattr(cli_files, "load_network", needs)
    (tmp_path / "net.onnx").write_bytes(b"")
    for words in (["info"], ["convert", str(tmp_path / "b.c")], ["stream"]):
        verb, *rest = words
        status, out, err = run(capsys, verb, str(tmp_path / "net.onnx"), *rest)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "pip install 'cellstack[onnx]'" in err


def test_a_network_with_pooling_streams_after_the_conversion(tmp_path, monkeypatch, capfd):
    net = Network([*make_net().nodes, GlobalPool("last")])
    net.save(tmp_path / "net.safetensors")
    assert cli.main(["convert", str(tmp_path / "net"), str(tmp_path / "other.safetensors")]) == 0
    capfd.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1,2,3\n")))
    assert cli.main(["stream", str(tmp_path / "other")]) == 0
    answer = [float(value) for value in capfd.readouterr().out.split(",")]
    assert np.array_equal(np.array(answer, "f4"), net.stream().step([[1, 2, 3]])[0])


# ── lines on standard input, some of their columns, modules in an order ─────────────────────────────────────────────


@pytest.fixture
def standard_input(monkeypatch):
    """Return a function that sets the text on standard input."""

    def write(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return write


@pytest.fixture
def small(tmp_path):
    net = cellstack.load(torch.nn.Sequential(torch.nn.LSTM(2, 4, batch_first=True), torch.nn.Linear(4, 1)))
    net.save(tmp_path / "net.safetensors")
    return net, str(tmp_path / "net.safetensors")


X = np.array([[0.5, 1.0], [2.0, -1.0], [0.25, 3.0]], np.float32)
LINES = {
    "csv": ("0.5,1\n2,-1\n0.25,3\n", None),
    "named": ("a,b\n0.5,1\n\n2,-1\n0.25,3\n", None),
    "json": ("[0.5, 1]\n[2, -1]\n[0.25, 3]\n", None),
    "by name": ("b,when,a\n1,x,0.5\n-1,y,2\n3,z,0.25\n", "a,b"),
    "quoted": ('b,"when, and where",a\n1,"x,y",0.5\n-1,"y,",2\n3,z,0.25\n', "a,1"),
    "by number": ("1,9,0.5\n-1,9,2\n3,9,0.25\n", "3,1"),
    "json by number": ("[1, 9, 0.5]\n[-1, 9, 2]\n[3, 9, 0.25]\n", "3,1"),
    "objects": ('{"b": 1, "a": 0.5}\n{"a": 2, "b": -1}\n{"a": 0.25, "b": 3, "c": 1}\n', "a,b"),
}


@pytest.mark.parametrize("where", ["standard input", "file"])
@pytest.mark.parametrize("name", LINES)
def test_run_takes_lines_and_some_of_their_columns(capsys, tmp_path, small, standard_input, name, where):
    net, path = small
    text, columns = LINES[name]
    file = "-"
    if where == "file":
        file = str(tmp_path / f"lines.{'jsonl' if text[0] in '[{' else 'csv'}")
        Path(file).write_text(text)
    else:
        standard_input(text)
    status, out, err = run(capsys, "run", path, file, "--json", *(["--columns", columns] if columns else []))
    assert (status, err) == (0, "")
    np.testing.assert_allclose(json.loads(out)[net.outputs[0]], net(X[None]), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "a,b\n1,2\n",
            "a,c",
            r"standard input, line 1: expected a column 'c', by name or by number from 1, found a, b",
        ),
        ("1,2\n3,4\n", "1,3", r"line 1: expected a column '3'.* found 2 without names"),
        ("a,b,c\n1,2,3\n1,2\n", "a,c", r"line 3: expected at least 3 columns, found 2"),
        ('{"a": 1}\n', "a,b", r"line 1: expected a column 'b'.* found a"),
        ("a,b,c\n1,2,3\n", "a", r"line 1: expected 2 numbers, or 2 names, found 1"),
    ],
)
def test_columns_that_don_t_exist(capsys, small, standard_input, text, columns, message):
    standard_input(text)
    status, out, err = run(capsys, "run", small[1], "-", "--columns", columns)
    assert (status, out) == (2, "")
    assert re.search(message, err)


class Own(torch.nn.Module):
    """A class that no reader knows."""


def test_modules_in_a_given_order(capsys, tmp_path, pytorch_files):
    module = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(2, 4, batch_first=True), "head": torch.nn.Linear(4, 1)})
    torch.save(module.state_dict(), tmp_path / "net.pt")
    np.save(tmp_path / "x.npy", X[None])
    order = ("--order", "rnn,last,head")
    status, out, err = run(capsys, "run", str(tmp_path / "net.pt"), str(tmp_path / "x.npy"), *order, "--json")
    assert (status, err) == (0, "")
    wanted = module["head"](module["rnn"](torch.from_numpy(X[None]))[0][:, -1]).detach().numpy()
    np.testing.assert_allclose(next(iter(json.loads(out).values())), wanted, atol=1e-6)
    status, out, err = run(capsys, "info", str(tmp_path / "net.pt"), *order)
    assert (status, err) == (0, "")
    assert "LSTM 2 -> 4" in out
    target = str(tmp_path / "net.safetensors")
    assert run(capsys, "convert", str(tmp_path / "net.pt"), target, *order)[0] == 0
    np.testing.assert_allclose(load(target)(X[None]), wanted, atol=1e-6)
    status, out, err = run(capsys, "info", target, *order)
    assert (status, out) == (2, "")
    assert "--order: order isn't used for" in err
    assert run(capsys, "info", str(tmp_path / "net.pt"), "--order", "rnn,tail")[0] == 2
    status, _, err = run(capsys, "run", str(tmp_path / "net.pt"), str(tmp_path / "x.npy"))
    assert status == 2
    assert "as a state dict doesn't specify the order of modules" in err
    assert "pass --order, the names of modules in the order in which they run" in err
    assert "(or `cellstack info FILE`) gives its recurrent parts" in err
    own = Own()
    own.rnn, own.head = module["rnn"], module["head"]
    torch.save(own, tmp_path / "whole.pt")
    status, _, err = run(capsys, "run", str(tmp_path / "whole.pt"), str(tmp_path / "x.npy"))
    assert status == 2
    assert "as the file of a pickled class doesn't contain its code" in err
    status, out, err = run(capsys, "run", str(tmp_path / "whole.pt"), str(tmp_path / "x.npy"), *order, "--json")
    assert (status, err) == (0, "")
    np.testing.assert_allclose(next(iter(json.loads(out).values())), wanted, atol=1e-6)


def test_formats_that_cannot_be_written_or_cannot_represent_the_network_are_refused(capsys, tmp_path, small):
    """The message of Python and that of the command line."""
    status, _, err = run(capsys, "convert", small[1], str(tmp_path / "net.nam"))
    assert (status, ".nam" in err.split("got")[0], ".json" in err) == (2, False, False)
    status, _, err = run(capsys, "convert", small[1], str(tmp_path / "net.pt"))
    words = "PyTorch files only hold one recurrent module; .safetensors supports every network"
    assert (status, words in err) == (2, True)
    with pytest.raises(ValueError, match=words):
        load(small[1]).save(tmp_path / "net.pt")


def test_a_target_of_no_format_is_one_sentence(capsys, tmp_path, small):
    status, _, err = run(capsys, "convert", small[1], str(tmp_path / "net.foo"))
    assert status == 2
    assert "expected a target with the suffix of a format (safetensors (.safetensors), " in err
    assert "C (.c)), or a folder for C, ending in /, got " in err


def test_large_numbers_of_a_csv_keep_their_decimals():
    text = io.StringIO()
    write_csv(text, {"y": np.array([0.123456789, 12345.678, 30_000_109.74, np.inf])})
    assert text.getvalue().splitlines() == ["y", "0.123457", "12345.678", "30000109.74", "inf"]
