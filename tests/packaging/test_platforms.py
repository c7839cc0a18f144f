"""How the results of several systems are compared; `make check-platforms` compiles and runs the kernel for them."""

import sys

import platforms
import pytest

EXPECTED = {("avx2", "step"): (1.0, 2.0), ("avx2", "training"): (1.0, 2.0), ("baseline", "step"): (1.0, 2.5)}


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
    ],
)
def test_results_have_the_same_bits_except_gradients_of_another_processor(set_, case, sums, same_processor, agrees):
    found = platforms.problems({(set_, case): sums}, EXPECTED, same_processor)
    assert found == ([] if agrees else [f"{set_}, {case}: expected the sums (1.0, 2.0), got {sums}"])


def test_a_program_that_prints_nothing_is_a_problem():
    assert platforms.problems({}, EXPECTED, True) == ["the program printed no results"]


def test_what_the_program_prints(tmp_path):
    printing = tmp_path / "program.py"
    printing.write_text('print("avx2\\tlstm step\\t 0x1p+0 0x1.8p+1")')
    assert platforms.results(printing, sys.executable) == {("avx2", "lstm step"): (1.0, 3.0)}


def test_an_unknown_target_is_named(capsys):
    assert platforms.main(["riscv64-linux-musl"]) == 2
    assert "expected targets among x86_64-linux-musl, aarch64-linux-musl" in capsys.readouterr().err
