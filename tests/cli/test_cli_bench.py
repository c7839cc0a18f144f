"""`cellstack bench`: its comparisons, missing engines, and output files."""

import doctest
import importlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from cellstack.cli import main as cli
from cellstack.network import processors
from cellstack_bench import command as verb
from cellstack_bench import engines, machine, picture, surface, turns
from cellstack_bench.surface import Shape

LIMITS = {"gflops_core": None, "gflops_threads": None, "threads": 1, "reading": [], "caches": {}}
TINY = ("--units", "5", "--batch", "1,3", "--steps", "4")


class NoMachine:
    """A machine without measured limits."""

    def __init__(self, threads):
        how = dict.fromkeys(("gflops", "reading", "barrier"), "not measured here")
        self.limits = lambda: {**LIMITS, "how": how}

    def round(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass


@pytest.fixture
def light(monkeypatch):
    """Measure no limits of the machine, and one round of one call."""
    monkeypatch.setattr(surface, "Machine", NoMachine)
    monkeypatch.setattr(verb, "ROUNDS", 1)
    monkeypatch.setattr(verb, "SECONDS", 0.0)
    monkeypatch.setattr(turns, "PATIENCE", 0.0)


def run(capsys, *words):
    status = cli.main(["bench", *words])
    done = capsys.readouterr()
    return status, done.out, done.err


def test_the_call_before_a_timed_call_is_not_timed():
    now, order = [0.0], []

    def takes(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    clock = lambda: now[0]  # noqa: E731
    assert turns.timed(takes("call", 2.0), 3, clock, takes("before", 5.0)) == 2.0
    assert order == ["before", "call"] * 3


@pytest.mark.parametrize("before", ["rest", "torch"])
def test_the_option_before(before, light, capsys):
    words = ("--what", "inference", *TINY, "--before", before)
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert f"each call {surface.BEFORE[before]}" in out
    status, out, _ = run(capsys, *words, "--json")
    assert json.loads(out)["before"] == before


@pytest.mark.long
def test_a_report_has_every_engine_the_machine_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verb, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(verb, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(surface, "MACHINE_ROUNDS", 1)
    status, out, _ = run(capsys, "--quick", *TINY, "--json", "-o", str(tmp_path / "to"))
    report = json.loads(out)
    assert status == 0
    assert json.loads((tmp_path / "to" / "bench.json").read_text()) == report
    drawn = {f"{what}.png" for what in engines.SURFACES}
    assert {Path(name).name for name in report["files"]} == {"bench.json", *drawn}
    assert all(Path(name).stat().st_size > 1000 for name in report["files"])
    assert not report["stopped"]
    assert report["threads"] == 1
    assert set(report["versions"]) | set(report["missing"]) == {"cellstack", *engines.NEEDS, "numpy", "python"}
    limits = report["limits"]
    assert limits["gflops_core"] > 0.5
    assert limits["gflops_threads"] == limits["gflops_core"]
    assert [one["level"] for one in limits["reading"]] == [*machine.caches(), "memory"]
    assert {len(records) for records in report["surfaces"].values()} == {2, 1}
    for what, records in report["surfaces"].items():
        present = [name for name in engines.SURFACES[what] if name not in report["missing"]]
        for record in records:
            assert list(record["milliseconds"]) == present
            assert record["differs"] == {}
            for time in record["milliseconds"].values():
                assert 0 < time["least"] <= time["median"]
            least = {name: time["least"] for name, time in record["milliseconds"].items()}
            ours = least.pop("cellstack")
            assert record["ratio"]["least"] == pytest.approx(min(least.values()) / ours)
            assert least[record["ratio"]["peer"]] == min(least.values())


def test_a_swapped_gate_is_found_and_not_timed(light, monkeypatch, capsys):
    def swapped(x, cells, threads):
        (cell,) = cells
        parts = [np.split(array, 4, axis=-1) for array in cell]
        return engines.cellstack(x, [tuple(np.concatenate([p[1], p[0], *p[2:]], axis=-1) for p in parts)], threads)

    makers = {"cellstack": engines.cellstack, "torch": swapped}
    monkeypatch.setattr(engines, "SURFACES", {**engines.SURFACES, "inference": makers})
    status, out, _ = run(capsys, "--what", "inference", *TINY)
    assert status == 1
    assert "torch: y differs by" in out
    assert "differs" in out.splitlines()[-3]
    makers = {
        "cellstack": swapped,
        "torch": engines.pytorch,
    }  # cellstack is compared with the reference, not with itself
    monkeypatch.setattr(engines, "SURFACES", {**engines.SURFACES, "inference": makers})
    record = surface.measure("inference", Shape(2, 4, 3, 5), ["torch"], 1, 1)
    assert set(record["differs"]) == {"cellstack", "torch"}
    assert record["ratio"] is None
    assert record["milliseconds"] == {}


@pytest.mark.parametrize("what", ["inference", "bfloat16", "training"])
def test_engines_agree_on_bidirectional_layers(what):
    record = surface.measure(what, Shape(2, 4, 3, 5, 2, 2), engines.installed()[0], 1, 1)
    assert record["differs"] == {}
    assert record["directions"] == 2


def test_a_swapped_direction_is_found(monkeypatch):
    def swapped(x, cells, threads, directions):
        pairs = zip(cells[1::2], cells[::2], strict=True)
        return engines.pytorch(x, [cell for pair in pairs for cell in pair], threads, directions=directions)

    makers = {"cellstack": engines.cellstack, "torch": swapped}
    monkeypatch.setattr(engines, "SURFACES", {"inference": makers})
    record = surface.measure("inference", Shape(2, 4, 3, 5, 2, 2), ["torch"], 1, 1)
    assert set(record["differs"]) == {"torch"}


@pytest.mark.long
def test_the_option_bidirectional(light, capsys, tmp_path):
    status, out, _ = run(capsys, "--bidirectional", "--units", "5", "--batch", "2", "--steps", "4", "-o", str(tmp_path))
    assert status == 0
    assert out.count("    2    4    5    5  1  2 ") == 4
    names = {f"{name}.png" for name in ("inference", "bfloat16", "layers", "training")}
    assert {path.name for path in tmp_path.glob("*.png")} == names


@pytest.mark.parametrize("what", engines.SURFACES)
def test_a_wrong_state_or_gradient_is_found(what):
    x = np.random.default_rng(0).normal(size=(1, 1, 5)).astype("f4")
    cells = engines.weights(5, 5, 1)
    found = engines.SURFACES[what]["cellstack"](x, cells, 1).outputs()
    allowed, off = (3e-2, 0.04) if what == "bfloat16" else (5e-5, 0.01)
    for name, array in found.items():
        assert surface.excess(name, array, array, allowed) == 0.0
        assert surface.excess(name, array + off * max(1.0, float(np.abs(array).max())), array, allowed) > 1.0
        assert surface.excess(name, array * np.nan, array, allowed) == np.inf


def test_missing_engines_are_reported(light, monkeypatch, capsys):
    real = importlib.import_module

    def without(name, *rest):
        if name in ("openvino", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "torch":
            raise OSError("libtorch.so:\nno such file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    status, out, _ = run(capsys, "--what", "inference", *TINY)
    assert status == 0
    assert "not measured: openvino, as openvino isn't installed" in out
    assert "not measured: onnxruntime, as onnx" in out
    assert "not measured: torch, as it can't be imported: libtorch.so: no such file" in out
    assert "ratio: smallest" not in out


def test_without_torch_there_is_no_training_and_without_matplotlib_no_plot(light, monkeypatch, capsys, tmp_path):
    for name in ("torch", "matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run(capsys, *TINY, "-o", str(tmp_path))
    assert status == 0
    assert "layers and training weren't measured, because torch isn't installed" in out
    assert "no plots were written, because matplotlib isn't installed: pip install 'cellstack[torch]'" in out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert err == ""
    status, _, err = run(capsys, "--what", "training", *TINY)
    assert status == 2
    assert (
        err
        == "cellstack bench: error: training needs torch, and torch isn't installed: pip install 'cellstack[torch]'\n"
    )


def test_ctrl_c_reports_what_was_measured(light, monkeypatch, capsys, tmp_path):
    real, calls = surface.measure, iter([None])

    def once(*words):
        if next(calls, "no more") == "no more":
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(surface, "measure", once)
    status, out, _ = run(capsys, *TINY, "-o", str(tmp_path))
    assert status == 130
    assert "stopped: these are the results so far" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {what: len(records) for what, records in report["surfaces"].items()} == {
        "inference": 1,
        "bfloat16": 0,
        "layers": 0,
        "training": 0,
        "step": 0,
    }
    assert report["stopped"]
    assert (tmp_path / "inference.png").exists()
    assert not (tmp_path / "step.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--units", "8,0"], "expected positive integers separated by commas, got '8,0'"),
        (["--batch", "few"], "expected positive integers separated by commas, got 'few'"),
        (
            ["--what", "inference,flight"],
            "expected one or more of inference, bfloat16, layers, training, step, got 'flight'",
        ),
        (
            ["--what", "step", "--batch", "4"],
            "--batch has no effect: the surface 'step' always measures one step at batch 1",
        ),
        (["--what", "step", "--steps", "4"], "--steps has no effect: the surface 'step'"),
        (["--what", "step", "--bidirectional"], "--bidirectional can't be combined with the surface 'step'"),
        (["--threads", "1000"], f"expected --threads of at most {processors()}, the processors"),
        (["--threads", "0"], "expected --threads from 1"),
        (["-o", ""], "expected --output to name a folder, got ''"),
        (["-o", __file__], "expected --output to name a folder, got "),
    ],
)
def test_bad_options_are_one_line(words, message, capsys):
    try:
        status = cli.main(["bench", *words])
    except SystemExit as left:
        status = left.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_operations_and_bytes_of_a_shape():
    two = Shape(3, 5, 7, 11, 2)
    assert two.flop("inference") == 3 * 5 * 2 * (7 * 44 + 11 * 44 + 11 * 44 + 11 * 44)
    assert two.flop("training") == 3 * two.flop("inference")
    assert two.bytes("inference") == 4 * (5 * 2 * 11 * 44 + 7 * 44 + 11 * 44 + 3 * 5 * (7 + 11))
    both = two._replace(directions=2)
    assert both.flop("inference") == 2 * 3 * 5 * 2 * (7 * 44 + 11 * 44 + 22 * 44 + 11 * 44)
    assert both.bytes("inference") == 4 * (2 * (5 * 2 * 11 * 44 + 7 * 44 + 22 * 44) + 3 * 5 * (7 + 22))


def test_the_grid_of_the_benchmark_has_the_shapes_that_it_names():
    grid = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "surface.py"))["WORK"]
    assert {what: len(set(some)) for what, some in grid.items()} == {
        "inference": 140 + 16,
        "bfloat16": 48,
        "layers": 40,
        "training": 59 + 8,
        "step": 7,
    }
    both = [shape for what in ("inference", "training") for shape in grid[what] if shape.directions == 2]
    assert len(both) == 16 + 8


def test_rounds_alternate_between_engines_after_a_warm_up():
    called = []
    times = turns.alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert "".join(called) == "aabb" * 3
    assert all(0 <= least <= middle for least, middle in times.values())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system offers no such thing")
def test_the_process_is_pinned_to_its_processors_and_released():
    before = os.sched_getaffinity(0)
    with turns.kept_on(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert processors() == 1
    assert os.sched_getaffinity(0) == before
    assert sorted(turns.apart(before)) == sorted(before)


def test_a_limit_that_a_call_hides_is_left_out(monkeypatch):
    times = iter([1e-6] * 1000)
    monkeypatch.setattr(machine, "timed", lambda run, calls: next(times))
    best = {}
    machine.reading(best, {"L1": np.ones(64, "f4")}, {})
    assert best == {}


def test_a_plot_without_baselines_or_limits(tmp_path):
    record = {**Shape(1, 2, 3, 4)._asdict(), "flop": 10, "bytes": 5, "ratio": None, "differs": {}}
    record["milliseconds"] = {"cellstack": {"least": 1.0, "median": 2.0}}
    report = {"threads": 1, "processor": "one", "rounds": 1, "limits": LIMITS}
    picture.draw("inference", [record], report, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_results_have_a_line_each(monkeypatch, capsys):
    monkeypatch.setattr(machine, "SIZES", (16,))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    machine.answer("product")
    first, second = (json.loads(line)["gflops"] for line in capsys.readouterr().out.splitlines())
    assert 0 < first <= second


def test_the_examples_in_its_docstrings():
    tried = [doctest.testmod(module) for module in (engines, machine, picture, surface, turns, verb)]
    assert sum(one.failed for one in tried) == 0
    assert sum(one.attempted for one in tried) > 0
