"""How the results of several systems and processors are compared; `make check-platforms` runs the kernel on them."""

import sys
from pathlib import Path

import bochs
import platforms
import pytest

EXPECTED = {("avx2", case): (1.0, 2.0) for case in ("step", "training", "nodes", "training bfloat16")}
EXPECTED["baseline", "step"] = (1.0, 2.5)


@pytest.mark.parametrize(
    ("set_", "case", "sums", "same_processor", "agrees"),
    [
        ("avx2", "step", (1.0, 2.0), True, True),
        ("avx2", "step", (1.0, 2.0000001), True, False),
        ("avx2", "training", (1.0, 2.0000001), True, False),
        ("baseline", "step", (1.0, 2.0), False, True),  # Arm's baseline
        ("baseline", "step", (1.0, 2.0000001), False, False),
        ("baseline", "training", (1.0, 2.0000001), False, True),
        ("baseline", "training", (1.0, 2.001), False, False),
        ("baseline", "training", (1.0, float("nan")), False, False),
        ("avx512", "step", (1.0, 2.0), True, True),  # a set that the first target doesn't have
        ("avx512", "step", (1.0, 2.0000001), True, False),
        ("avx512", "training", (1.0, 2.0000001), True, True),
        ("avx512", "nodes", (1.0, 2.0000001), True, True),
        ("avx512", "training bfloat16", (1.0, 2.001), True, False),
        ("avx512bf16", "training bfloat16", (1.0, 2.001), True, True),
        ("avx512bf16", "training bfloat16", (1.0, 2.02), True, False),
        ("avx512bf16", "training", (1.0, 2.001), True, False),
    ],
)
def test_results_have_the_same_bits_except_gradients_of_another_width(set_, case, sums, same_processor, agrees):
    found = platforms.problems({(set_, case): sums}, EXPECTED, same_processor)
    assert found == ([] if agrees else [f"{set_}, {case}: expected the sums (1.0, 2.0), got {sums}"])


def test_a_program_that_prints_nothing_is_a_problem():
    assert platforms.problems({}, EXPECTED, True) == ["the program printed no results"]


def test_what_the_program_prints(tmp_path):
    printing = tmp_path / "program.py"
    printing.write_text('print("avx2\\tlstm step\\t 0x1p+0 0x1.8p+1")')
    found = platforms.results(printing, [sys.executable], tmp_path)
    assert found == {("avx2", "lstm step"): (1.0, 3.0)}


def test_a_program_that_crashes_names_the_case_that_it_ran(tmp_path):
    crashing = tmp_path / "program.py"
    crashing.write_text(
        "import os, signal\n"
        'print("avx2\\tlstm step\\t 0x1p+0\\navx2\\tgru step\\t", end="", flush=True)\n'
        "os.kill(os.getpid(), signal.SIGILL)"
    )
    with pytest.raises(platforms.RunError, match="avx2, gru step: Illegal instruction"):
        platforms.results(crashing, [sys.executable], tmp_path)


def test_an_instruction_set_that_the_kernel_should_find(monkeypatch):
    expected = {("baseline", "step"): (1.0,), ("avx2", "step"): (1.0,)}
    found = {("baseline", "step"): (1.0,)}
    monkeypatch.setattr(platforms, "results", lambda *_: found)
    assert platforms.run("nehalem", Path("guard"), (), expected) == (found, [])
    assert platforms.run("haswell", Path("guard"), (), expected) == (
        found,
        ["expected the instruction sets avx2, baseline, got baseline"],
    )


def test_what_is_missing_fails_and_is_named(monkeypatch, capsys):
    monkeypatch.setattr(platforms, "TARGETS", {"first": platforms.Target(()), "ice-lake": platforms.Target(("bochs",))})
    monkeypatch.setattr(platforms, "compiled", lambda _: Path("guard"))
    monkeypatch.setattr(platforms, "results", lambda *_: EXPECTED)
    monkeypatch.setattr(bochs, "missing", lambda: ["bochs", "xorriso"])
    assert platforms.main(["ice-lake"]) == 1
    printed = capsys.readouterr()
    assert "ice-lake: compiled; not run: without bochs xorriso" in printed.out
    assert "apt-get install --no-install-recommends bochs xorriso" in printed.err


def test_what_an_emulated_machine_prints(tmp_path):
    printed = "avx512\tlstm step\t 0x1p+0\r\navx512\tgru step\t"
    assert bochs.ended(printed + "\r\nstatus 4\r\n", tmp_path)[1] == -4  # SIGILL
    text, code = bochs.ended(printed + " 0x1p+1\r\n\r\nstatus 0\r\n", tmp_path)
    assert platforms.parsed(text, code) == {("avx512", "lstm step"): (1.0,), ("avx512", "gru step"): (2.0,)}
    with pytest.raises(bochs.BochsError, match="the emulated machine stopped; see"):
        bochs.ended("Kernel panic", tmp_path)


def test_an_unknown_target_is_named(capsys):
    assert platforms.main(["riscv64-linux-musl"]) == 2
    assert "expected names among x86_64-linux-musl, aarch64-linux-musl" in capsys.readouterr().err
