"""`cellstack score`: what it prints and returns."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from data import expected, make_net, make_rows, outputs, same, write

from cellstack.cli.main import main

COLUMNS = ["--id", "meter", "--time", "hour", "--columns", "load,heat,wind"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_net().save("model.safetensors")
    write(tmp_path / "data/a.parquet", make_rows(0, names="a-{}")[0])
    write(tmp_path / "data/b.parquet", make_rows(1, names="b-{}")[0])
    return tmp_path


def test_files_are_scored_and_complete_ones_are_kept(folder, capsys):
    assert main(["score", "model", "data/*.parquet", "-o", "out", *COLUMNS]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 files, 38 rows, ")
    assert err == ""
    same(outputs(pq.read_table(folder / "out/a.parquet")), expected(make_net(), make_rows(0, names="a-{}")[1]))
    assert main(["score", "model", "data/*.parquet", "-o", "out", "--json", *COLUMNS]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") > 0
    assert report == {"files": 0, "rows": 0, "earlier": 2, "failed": {}, "waiting": []}


def test_files_that_fail_are_named_and_the_exit_code_is_1(folder, capsys):
    for n in range(12):
        (folder / f"data/c{n:02}.parquet").write_bytes(b"PAR1")
    assert main(["score", "model", "data", "-o", "out", *COLUMNS]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("2 files, 38 rows")
    lines = err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"cellstack score: error: {folder}/data/c00.parquet: expected a complete Parquet file")
    assert lines[-1] == "cellstack score: error: and 2 more files"


def test_files_after_one_that_fails(folder, capsys):
    (folder / "data/a.parquet").write_bytes(b"PAR1")
    assert main(["score", "model", "data", "-o", "out", "--across-files", "continue", *COLUMNS]) == 1
    assert "1 files weren't scored, because they follow one of these" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--id", "meter,site"], "expected --id to name one column for sequences, got meter, site"),
        (["--columns", "load"], "model.safetensors: expected 3 features, as the network has, got 1: load"),
        (["--batch-rows", "0"], "expected batch_rows of at least 1, got 0"),
    ],
)
def test_errors_are_one_line(folder, capsys, more, message):
    assert main(["score", "model", "data", "-o", "out", *COLUMNS, *more]) == 2
    assert capsys.readouterr().err == f"cellstack score: error: {message}\n"


def test_the_progress_bar_counts_rows(folder, capsys, monkeypatch):
    monkeypatch.setattr("cellstack.scale.run.is_shown", lambda progress: True)
    assert main(["score", "model", "data", "-o", "out", *COLUMNS]) == 0
    assert "38.0/38.0" in capsys.readouterr().err


def test_a_package_that_ray_needs_is_named_if_it_is_missing(folder, capsys, monkeypatch):
    (folder / "fake/ray").mkdir(parents=True)
    (folder / "fake/ray/__init__.py").write_text("import needed_by_ray.part")
    monkeypatch.syspath_prepend(folder / "fake")
    assert main(["score", "model", "data", "-o", "out", *COLUMNS, "--ray", "local"]) == 2
    said = "Ray needs needed_by_ray, which isn't installed: pip install needed_by_ray"
    assert capsys.readouterr().err == f"cellstack score: error: {said}\n"


def test_without_a_cluster_a_local_ray_is_suggested(folder, capsys, monkeypatch):
    def init(*_, **__):
        raise ConnectionError("Could not find any running Ray instance: set the --address flag")

    for name, entries in {
        "ray": {"is_initialized": lambda: False, "init": init, "__path__": []},
        "ray.data": {},
        "ray.exceptions": {"RayError": RuntimeError},
    }.items():
        fake = ModuleType(name)
        fake.__spec__ = ModuleSpec(name, None)
        vars(fake).update(entries)
        monkeypatch.setitem(sys.modules, name, fake)
    assert main(["score", "model", "data", "-o", "out", *COLUMNS, "--ray", "auto"]) == 2
    said = "--ray auto: no Ray cluster is running on this machine: use --ray local to start Ray here"
    assert capsys.readouterr().err == f"cellstack score: error: {said}\n"
