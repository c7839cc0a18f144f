"""The C code on Cortex-M processors, emulated by QEMU: `make test-devices`."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from networks import make_cell
from tools import need

from cellstack import Network, native
from cellstack.formats.c import sizes
from cellstack.nodes import Dense, Recurrent

EXAMPLE = Path(__file__).parents[2] / "examples" / "devices"
PROCESSORS = {
    "cortex-m3": ("mps2-an385", "-mfloat-abi=soft"),
    "cortex-m4": ("mps2-an386", "-mfpu=fpv4-sp-d16 -mfloat-abi=hard"),
    "cortex-m7": ("mps2-an500", "-mfpu=fpv5-sp-d16 -mfloat-abi=hard"),
}
WEIGHTS = ("float32", "bfloat16", "int8")
STEPS = 30

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module", autouse=True)
def _tools():
    need("arm-none-eabi-gcc", "qemu-system-arm")


def done(command, folder):
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, ""), (command, ran.returncode, ran.stderr)
    return ran.stdout


def network(kind="lstm"):
    rng = np.random.default_rng(0)
    cells = make_cell(rng, 16, 32, kind=kind), make_cell(rng, 32, 24, kind=kind)
    return Network([Recurrent(cells), Dense(rng.normal(size=(24, 4)).astype("f4"))])


def build(net, weights, processor, folder):
    """Build the example with a network and return the sizes of the program's sections."""
    for path in EXAMPLE.iterdir():
        shutil.copy(path, folder)
    net.export_c(folder, "tagger", weights)
    flags = ["-std=c99", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-mcpu={processor}"]
    flags += [*PROCESSORS[processor][1].split(), "-nostartfiles", "-ffunction-sections", "-Wl,--gc-sections"]
    sources = ["main.c", "board.c", "tagger.c"]
    done(["arm-none-eabi-gcc", *flags, "-T", "mps2.ld", *sources, "-lm", "-o", "tagger.elf"], folder)
    listed = done(["arm-none-eabi-size", "-A", "tagger.elf"], folder)
    return {name: int(size) for name, size in re.findall(r"^\.(text|data|bss) +(\d+)", listed, re.MULTILINE)}


def run(folder, processor, x):
    """Run the program on an emulated board; return y, and the number of instructions of a step."""
    x.tofile(folder / "x.bin")
    board = ["-M", PROCESSORS[processor][0], "-nographic", "-semihosting-config", "enable=on,target=native"]
    done(["qemu-system-arm", *board, "-icount", "shift=0", "-kernel", "tagger.elf"], folder)
    nanoseconds = int(np.fromfile(folder / "ticks.bin", np.uint64)[0]) * 40  # at 25 MHz; an instruction takes 1 ns
    return np.fromfile(folder / "y.bin", np.float32).reshape(len(x), -1), nanoseconds / len(x)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_board_computes_what_a_stream_does(tmp_path, processor, weights, kind):
    net = network(kind)
    sections = build(net, weights, processor, tmp_path)
    x = np.random.default_rng(1).normal(size=(STEPS, 16)).astype("f4")
    y, instructions = run(tmp_path, processor, x)
    stream = net.stream(weights=weights)
    expected = np.concatenate([stream.step(frame[None]) for frame in x])
    if weights == "float32":
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    else:
        assert native.isa() != "baseline"  # without fused multiply-add the stream has other bits
        assert np.array_equal(y, expected)
    said = sizes(net, weights)
    print(f"\n{processor} {kind} {weights}: {instructions:,.0f} instructions a step, {said}, sections {sections}")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sections_of_the_program(tmp_path, weights):
    """Flash and RAM are what `sizes` says, except for the code; nothing allocates memory."""
    net, said = network(), sizes(network(), weights)
    build(net, weights, "cortex-m4", tmp_path)
    listed = done(["arm-none-eabi-nm", "-S", "tagger.elf"], tmp_path)
    symbols = {name: (int(size, 16), kind) for size, kind, name in re.findall(r"^\w+ (\w+) (\w) (\w+)$", listed, re.M)}
    constants = [size for name, (size, kind) in symbols.items() if re.fullmatch(r"tagger_layer_\w+(?<!weights)", name)]
    assert sum(constants) == said.constants
    assert symbols["state"][0] == said.ram
    assert not {"malloc", "_malloc_r", "_sbrk", "free"} & set(re.findall(r" (\w+)$", listed, re.MULTILINE))
    if weights != "float32":  # <math.h> has variables of its own, such as errno
        writable = {name for name, (_, kind) in symbols.items() if kind in "bBdD"}
        assert writable == {"state", "x", "y"}


def test_the_example_fails_without_its_input(tmp_path):
    build(network(), "int8", "cortex-m4", tmp_path)
    board = ["-M", "mps2-an386", "-nographic", "-semihosting-config", "enable=on,target=native"]
    ran = subprocess.run(["qemu-system-arm", *board, "-kernel", "tagger.elf"], cwd=tmp_path, timeout=60, check=False)
    assert ran.returncode == 1
