"""How the guard compares counts, without valgrind or a compiler; `make guard` counts."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import instructions
import pytest

COUNTS = {"lstm step": 10_000, "gru step": 8_000}


@pytest.fixture
def machine(monkeypatch):
    """A simulated machine whose compiler and counts a test chooses; `asked` lists the steps that were run."""

    machine = SimpleNamespace(compiler="GNU 12.4.0", counts=dict(COUNTS), has_avx2=True, asked=[])

    def compiled(build):
        machine.asked.append("compile")
        return build / "guard"

    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instructions, "configure", lambda build: machine.compiler)
    monkeypatch.setattr(instructions, "compiled", compiled)
    monkeypatch.setattr(instructions, "cases", lambda driver: list(machine.counts) if machine.has_avx2 else None)
    monkeypatch.setattr(instructions, "count", lambda driver, case: machine.counts[case])
    return machine


@pytest.fixture
def figures(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"compiler": "GNU 12.2.0", "counts": COUNTS}))
    return path


def guard(figures, *options):
    return instructions.main([*options, "--figures", str(figures)])


def test_counts_within_three_percent_pass(machine, figures, capsys):
    machine.counts = {"lstm step": 10_300, "gru step": 7_760}
    assert guard(figures) == 0
    out, err = capsys.readouterr()
    assert "+3.00%" in out
    assert "-3.00%" in out
    assert not err


@pytest.mark.parametrize(("now", "change"), [(10_301, "+3.0%"), (12_000, "+20.0%"), (9_699, "-3.0%")])
def test_larger_differences_fail_and_are_named(machine, figures, capsys, now, change):
    machine.counts["lstm step"] = now
    assert guard(figures) == 1
    err = capsys.readouterr().err
    assert f"lstm step: expected 10,000 instructions within 3%, got {now:,}, {change}" in err
    assert "gru step" not in err
    assert "make guard RECORD=1" in err


def test_an_added_or_removed_case_fails(machine, figures, capsys):
    machine.counts = {"lstm step": 10_000, "rnn step": 5}
    assert guard(figures) == 1
    err = capsys.readouterr().err
    assert "gru step: is recorded but is no longer a case" in err
    assert "rnn step: has no recorded count" in err


@pytest.mark.parametrize("compiler", ["GNU 13.2.0", "GNU 1.0", "Clang 12.4.0"])
def test_with_another_compiler_nothing_is_compared(machine, figures, capsys, compiler):
    machine.compiler, machine.counts["lstm step"] = compiler, 99_999
    assert guard(figures) == 0
    out = capsys.readouterr().out
    assert f"the recorded counts are for GNU 12.2.0, and this compiler is {compiler}: nothing was compared" in out
    assert "make guard RECORD=1" in out
    assert machine.asked == []  # not even compiled, which takes minutes


def test_without_figures_nothing_is_compared(machine, tmp_path, capsys):
    assert guard(tmp_path / "none.json") == 0
    assert "no counts are recorded: nothing was compared" in capsys.readouterr().out


def test_recorded_counts_are_used_by_the_next_comparison(machine, figures):
    machine.compiler, machine.counts = "Clang 19.1.0", {"lstm step": 7}
    assert guard(figures, "--record") == 0
    assert json.loads(figures.read_text()) == {"compiler": "Clang 19.1.0", "counts": {"lstm step": 7}}
    assert guard(figures) == 0
    machine.counts["lstm step"] = 8
    assert guard(figures) == 1


@pytest.mark.parametrize("options", [[], ["--record"]])
def test_a_processor_without_avx2_is_reported(machine, figures, capsys, options):
    machine.has_avx2, before = False, figures.read_text()
    assert guard(figures, *options) == 0
    assert "which this processor doesn't support" in capsys.readouterr().out
    assert figures.read_text() == before


@pytest.mark.parametrize("options", [[], ["--record"]])
def test_another_architecture_is_reported(machine, figures, monkeypatch, capsys, options):
    monkeypatch.setattr(instructions.platform, "machine", lambda: "aarch64")
    before = figures.read_text()
    assert guard(figures, *options) == 0
    assert "this machine is aarch64: nothing was compared" in capsys.readouterr().out
    assert figures.read_text() == before


@pytest.mark.parametrize("tool", ["cmake", "valgrind"])
def test_a_missing_tool_is_named(figures, monkeypatch, capsys, tool):
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None if name == tool else name)
    assert guard(figures) == 1
    assert f"expected {tool} in the PATH: apt-get install {tool}" in capsys.readouterr().err


def test_the_total_of_a_profile():
    assert instructions.instructions("events: Ir\nsummary: 12\n\n3 4\n\ntotals: 31789\n", "a case") == 31789


@pytest.mark.parametrize("profile", ["", "events: Ir\n", "totals: 0\n"])
def test_a_profile_that_counted_nothing_is_an_error(profile):
    with pytest.raises(instructions.GuardError, match="a case: callgrind counted nothing"):
        instructions.instructions(profile, "a case")


def test_a_driver_that_fails_is_an_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "a case: expected finite numbers")
    monkeypatch.setattr(instructions.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(instructions.GuardError, match=r"a case: valgrind ended with 1\na case: expected finite"):
        instructions.count(Path("guard"), "a case")


def test_the_recorded_counts_cover_all_cases():
    known = json.loads(instructions.RECORD.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", known["compiler"])
    assert all(count > 1000 for count in known["counts"].values())
    driver = (instructions.HERE / "cases.cpp").read_text(encoding="utf-8").split("further_cases()")[0]
    (kinds,) = re.findall(r"KindIndex kind : \{(.+?)\}", driver)
    kinds = re.findall(r"k(\w+)", kinds.lower())
    assert list(known["counts"]) == [
        *(f"{kind} {case}" for kind in kinds for case in re.findall(r' add\("(.+?)"', driver)),
        *re.findall(r'emplace_back\("(.+?)"', driver),
    ]
