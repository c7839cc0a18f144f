"""How the guard finds instructions that a processor may not have; `make guard` disassembles the whole kernel."""

import json
import subprocess

import foreign
import pytest
import tools
from elftools.elf.elffile import ELFFile

SUM = """
extern const char needs[] = "avx2,fma";
typedef float V __attribute__((vector_size(32)));
extern "C" void add(V* to, V a, V b) { *to = a * b + *to; }
"""
SHARED = "inline int shared(int x) { return x ? shared(x - 1) + 2 : 1; } int (*used)(int) = shared;"


def built(folder, needs, source=SUM, flags=("-mavx2", "-mfma")):
    """Compile a source as an instruction set's object, and link it; return the build's folder and its module."""
    tools.need("g++")
    name = "simd_avx2.dir/kernel.o"
    (folder / "simd_avx2.dir").mkdir()
    (folder / "kernel.cpp").write_text(source)
    command = ["g++", "-O2", "-Wno-psabi", "-fPIC", *flags, "-c", str(folder / "kernel.cpp"), "-o", str(folder / name)]
    subprocess.run(command, check=True)
    module = folder / "_kernel.so"
    subprocess.run(["g++", "-shared", str(folder / name), "-o", str(module)], check=True)
    entry = {"output": name, "command": f'c++ -DCELLSTACK_NEEDS=\\"{needs}\\" kernel.cpp'}
    (folder / "compile_commands.json").write_text(json.dumps([entry]))
    return foreign.objects(folder), module


def test_an_instruction_of_a_feature_that_is_checked_is_permitted(tmp_path):
    found, module = built(tmp_path, "avx2,fma")
    assert foreign.problems(found, foreign.code_of(module, "")) == []
    assert "FMA 1" in foreign.table(found)


@pytest.mark.parametrize(("needs", "feature"), [("avx2", "FMA"), ("", "AVX")])
def test_an_instruction_that_nothing_checks_is_named_with_its_place(tmp_path, needs, feature):
    found, module = built(tmp_path, needs)
    lines = foreign.problems(found, foreign.code_of(module, ""))
    (line,) = [line for line in lines if f"need {feature}," in line]
    assert line.startswith("simd_avx2.dir/kernel.o: ")
    assert " at .text" in line
    assert line.endswith(f"{needs or 'no feature'} is checked before they run")


def test_a_function_that_the_linker_would_share_is_a_problem(tmp_path):
    found, module = built(tmp_path, "avx2,fma", SHARED)
    (line,) = foreign.problems(found, foreign.code_of(module, ""))
    assert "the linker may keep its copy of _Z6sharedi for all processors" in line


def test_code_that_only_the_module_has_is_a_problem(tmp_path):
    found, module = built(tmp_path, "avx2,fma")
    code = foreign.code_of(module, "")
    code.features["AVX512F"] = 2
    assert foreign.problems(found, code) == ["the module has 2 instructions that need AVX512F, and its objects 0"]


def test_a_trapped_copy_has_no_instruction_of_other_processors_and_hides_their_sets(tmp_path):
    found, module = built(tmp_path, "avx2,fma")
    sets = foreign.sets_of(found) | {"baseline": ""}
    assert sets == {"avx2": "avx2,fma", "baseline": ""}
    copy = tmp_path / "copy.so"
    copy.write_bytes(foreign.trapped(module, sets, "baseline"))
    with copy.open("rb") as file:
        found = [foreign.features_of(instruction) for _, _, instruction in foreign.instructions(ELFFile(file))]
    assert set().union(*found) <= foreign.EVERYWHERE
    assert b"?vx2,fma\0" in copy.read_bytes()
    assert b"avx2,fma\0" not in copy.read_bytes()
    assert foreign.trapped(module, sets, "avx2") == module.read_bytes()
