"""On Linux x86-64, run the kernel on other systems and processors, as far as they can be emulated here.

    python tests/packaging/platforms.py         # as `make check-platforms` does
    python tests/packaging/platforms.py NAME …  # some of the systems and processors only

For other systems, Zig's Clang compiles every file, with all instruction sets of the target's processor and with
warnings as errors; on Linux, the Python bindings too. Emulated x86-64 processors run what this system's compiler makes.

The program of tests/guard/cases.cpp runs every kind of cell, forward and backward, with each instruction set that the
kernel finds. QEMU, Bochs and Wine run it where the system or the processor isn't this one, and an instruction that the
processor lacks ends it. The results must have the same bits everywhere, except sums whose order depends on the width of
a vector, such as gradients.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import bochs
import nanobind
import numpy

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "platforms"
ZIG = f"{sys.executable} -m ziglang"
ORDERED_BY_WIDTH = ("training", "nodes")  # cases with gradients or norms: the width of a vector orders their sums
TOLERANCE = 1e-5  # relative, of a sum of magnitudes, for these
ROUNDED = 5e-3  # for gradients whose factors are rounded to bfloat16, which has 8 bits; measured: 6e-4


@dataclass(frozen=True)
class Target:
    """A system or a processor.

    Attributes:
        runner: The command that runs a program there; ("bochs", model) for Bochs; () if this system can, and None if
            nothing here can.
        system: CMake's name of the system that Zig compiles for; empty: this system, with its own compiler.
        processor: CMake's name of its processor.
        sets: The instruction sets that the kernel must find there; empty: any.
    """

    runner: tuple[str, ...] | None
    system: str = ""
    processor: str = ""
    sets: tuple[str, ...] = ()


TARGETS = {
    "x86_64-linux-musl": Target((), "Linux", "x86_64"),
    # without -cpu, QEMU supports all instructions that it knows; this is one of the first 64-bit processors
    "aarch64-linux-musl": Target(("qemu-aarch64", "-cpu", "cortex-a53"), "Linux", "aarch64"),
    "x86_64-windows-gnu": Target(("wine",), "Windows", "AMD64"),
    "aarch64-macos": Target(None, "Darwin", "arm64"),
    "nehalem": Target(("qemu-x86_64", "-cpu", "Nehalem"), sets=("baseline",)),
    "haswell": Target(("qemu-x86_64", "-cpu", "Haswell-noTSX"), sets=("avx2", "baseline")),
    # QEMU has no AVX-512
    "skylake-x": Target(("bochs", "corei7_skylake_x"), sets=("avx512", "avx2", "baseline")),
    "ice-lake": Target(("bochs", "corei7_icelake_u"), sets=("avx512vnni", "avx512", "avx2", "baseline")),
    "sapphire-rapids": Target(
        ("bochs", "sapphire_rapids"), sets=("avx512bf16", "avx512vnni", "avx512", "avx2", "baseline")
    ),
}
PACKAGES = {"qemu-aarch64": ["qemu-user"], "qemu-x86_64": ["qemu-user"], "wine": ["wine64", "wine"]}  # of Debian
Results = dict[tuple[str, str], tuple[float, ...]]  # of an instruction set and a case


class RunError(Exception):
    """The program didn't run to its end; the message says where it ended."""


def build(name: str, options: dict[str, str], environment: dict[str, str]) -> Path:
    """Compile the program of the guard, which contains the whole kernel, and return the folder that contains it."""
    folder = BUILD / name
    defined = [f"-D{key}={value}" for key, value in {**options, "CELLSTACK_GUARD": "ON"}.items()]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command = ["cmake", "-S", ROOT, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release", *defined]
    subprocess.run(command, check=True, env=os.environ | environment)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count())], check=True)
    return folder


@cache
def compiled_here() -> Path:
    """Compile the program with this system's compiler, without shared libraries, and return its path."""
    return build("here", {"CMAKE_EXE_LINKER_FLAGS": "-static"}, {}) / "guard"


def compiled(name: str) -> Path:
    """Compile the program for a target, and return its path."""
    target = TARGETS[name]
    if not target.system:
        return compiled_here()
    options = {
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_CXX_FLAGS": "-Werror",
        # this system's archiver doesn't know the others' object files
        "CMAKE_CXX_ARCHIVE_CREATE": f"{ZIG} ar qcs <TARGET> <OBJECTS>",
        "CMAKE_CXX_ARCHIVE_FINISH": "",
    }
    folder = build(name, options, {"CXX": f"{ZIG} c++ -target {name}"})
    if target.system == "Linux":
        compile_bindings(name)
    return folder / ("guard.exe" if target.system == "Windows" else "guard")


def compile_bindings(name: str) -> None:
    """Compile the Python bindings with the headers of this system's Python, which fit every Linux of 64 bits."""
    folders = [sysconfig.get_path("include"), numpy.get_include(), nanobind.include_dir()]
    includes = [word for folder in folders for word in ("-isystem", folder)]
    flags = ["-target", name, "-std=c++17", "-fvisibility=hidden", *includes]
    source, out = ROOT / "kernel" / "bind.cpp", BUILD / name / "bind.o"
    subprocess.run([*ZIG.split(), "c++", *flags, "-c", source, "-o", out], check=True)


def results(program: Path, runner: Sequence[str], folder: Path) -> Results:
    """Run the program, and return the sums of each case. Wine and Bochs write to the folder."""
    if runner and runner[0] == "bochs":
        return parsed(*bochs.run(program, runner[1], folder))
    environment = os.environ | {"WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    ran = subprocess.run([*runner, program, "--results"], stdout=subprocess.PIPE, text=True, env=environment)
    return parsed(ran.stdout, ran.returncode)


def parsed(printed: str, code: int) -> Results:
    """Return the sums of each case that the program printed before it ended with this exit code."""
    lines = [line.split("\t") for line in printed.splitlines() if line]
    if code:
        how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        set_, case = lines[-1][:2] if lines else ("", "before the first case")
        raise RunError(f"{set_}, {case}: {how}")
    return {(set_, case): tuple(float.fromhex(word) for word in sums.split()) for set_, case, sums in lines}


def problems(got: Results, expected: Results, same_processor: bool) -> list[str]:
    """Return a line for each result that differs from the expected one.

    An instruction set has the same bits on every system. Sets that aren't among the expected results, or are another
    processor's, have those of AVX2, which fuses multiplications and additions as they do, except in sums whose order
    depends on the width of a vector. With AVX512-BF16, the backward pass rounds the factors of products to bfloat16.
    """
    found = [] if got else ["the program printed no results"]
    for (set_, case), sums in got.items():
        same_set = same_processor and (set_, case) in expected
        wanted = expected[set_ if same_set else "avx2", case]
        most = 0.0
        if not same_set and any(word in case for word in ORDERED_BY_WIDTH):
            most = ROUNDED if set_ == "avx512bf16" and "bfloat16" in case else TOLERANCE
        if not all(abs(one - other) <= most * abs(other) for one, other in zip(sums, wanted, strict=True)):
            found.append(f"{set_}, {case}: expected the sums {wanted}, got {sums}")
    return found


def sets_of(got: Results) -> list[str]:
    """Return the instruction sets, in their order."""
    return list(dict.fromkeys(set_ for set_, _ in got))


def missing(runner: Sequence[str]) -> list[str]:
    """Return the packages of Debian that a runner needs and that aren't installed."""
    if not runner or runner[0] == "bochs":
        return bochs.missing() if runner else []
    return [] if shutil.which(runner[0]) else PACKAGES[runner[0]]


def run(name: str, program: Path, runner: Sequence[str], expected: Results) -> tuple[Results, list[str]]:
    """Run the program for a target; return its results, and a line for each problem."""
    try:
        got = results(program, runner, BUILD / name)
    except (RunError, bochs.BochsError) as error:
        return {}, [str(error)]
    found = problems(got, expected or got, not name.startswith("aarch64"))
    sets = TARGETS[name].sets
    if sets and set(sets_of(got)) != set(sets):
        found.append(f"expected the instruction sets {', '.join(sets)}, got {', '.join(sets_of(got))}")
    return got, found


def main(names: Sequence[str]) -> int:
    unknown = set(names) - set(TARGETS)
    if unknown:
        print(f"expected names among {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    first = next(iter(TARGETS))
    expected: Results = {}
    failed: list[str] = []
    needed: list[str] = []
    for name in [first, *(name for name in TARGETS if name != first and (not names or name in names))]:
        runner, program = TARGETS[name].runner, compiled(name)
        lacking = [] if runner is None else missing(runner)
        if runner is None or lacking:
            print(f"{name}: compiled; not run: " + (f"without {' '.join(lacking)}" if lacking else "nothing here can"))
            needed += lacking
            continue
        got, found = run(name, program, runner, expected)
        for line in found:
            print(f"{name}: {line}", file=sys.stderr)
        if found:
            failed.append(name)
            continue
        print(f"{name}: compiled, and its results agree ({', '.join(sets_of(got))})")
        if not name.startswith("aarch64"):
            expected = got | expected  # further sets, with which the next processors are compared
    if needed:
        packages = " ".join(dict.fromkeys(needed))
        print(f"expected all to run: apt-get install --no-install-recommends {packages}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed or needed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
