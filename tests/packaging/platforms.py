"""On Linux x86-64, compile the kernel for other systems with Zig's Clang, run it if possible, and compare its results.

    python tests/packaging/platforms.py             # as `make check-platforms` does
    python tests/packaging/platforms.py TARGET …    # some of the targets only

Every file is compiled, with all instruction sets of the target's processor and with warnings as errors; on Linux, the
Python bindings too. The program of tests/guard/cases.cpp runs the LSTM and the GRU, forward and backward, with each
instruction set: emulated by `qemu-aarch64` (apt-get install qemu-user) or under `wine`, if these are in the PATH. The
results must have the same bits on all systems, except Arm's gradients.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nanobind
import numpy

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "platforms"
ZIG = f"{sys.executable} -m ziglang"
TOLERANCE = 1e-5  # relative, of a sum of magnitudes, for gradients


@dataclass(frozen=True)
class Target:
    """A system: its name in CMake, its processor, and the program that runs its programs here.

    `runner` is None if nothing does. Linux x86-64 needs none, and has the name "".
    """

    system: str
    processor: str
    runner: str | None


TARGETS = {
    "x86_64-linux-musl": Target("Linux", "x86_64", ""),
    "aarch64-linux-musl": Target("Linux", "aarch64", "qemu-aarch64"),
    "x86_64-windows-gnu": Target("Windows", "AMD64", "wine"),
    "aarch64-macos": Target("Darwin", "arm64", None),
}
Results = dict[tuple[str, str], tuple[float, ...]]  # of an instruction set and a case


def compiled(name: str) -> Path:
    """Compile the program of the guard, which contains the whole kernel, and return its path."""
    target, build = TARGETS[name], BUILD / name
    options = {
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": "-Werror",
        # this system's archiver doesn't know the others' object files
        "CMAKE_CXX_ARCHIVE_CREATE": f"{ZIG} ar qcs <TARGET> <OBJECTS>",
        "CMAKE_CXX_ARCHIVE_FINISH": "",
        "CELLSTACK_GUARD": "ON",
    }
    defined = [f"-D{key}={value}" for key, value in options.items()]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    environment = os.environ | {"CXX": f"{ZIG} c++ -target {name}"}
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *defined], check=True, env=environment)
    subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count())], check=True)
    return build / ("guard.exe" if target.system == "Windows" else "guard")


def compile_bindings(name: str) -> None:
    """Compile the Python bindings with the headers of this system's Python, which fit every Linux of 64 bits."""
    folders = [sysconfig.get_path("include"), numpy.get_include(), nanobind.include_dir()]
    includes = [word for folder in folders for word in ("-isystem", folder)]
    flags = ["-target", name, "-std=c++17", "-fvisibility=hidden", *includes]
    source, out = ROOT / "kernel" / "bind.cpp", BUILD / name / "bind.o"
    subprocess.run([*ZIG.split(), "c++", *flags, "-c", source, "-o", out], check=True)


def results(program: Path, runner: str) -> Results:
    """Run the program, and return the sums of each case."""
    command = [*([runner] if runner else []), str(program), "--results"]
    environment = os.environ | {"WINEPREFIX": str(BUILD / "wine"), "WINEDEBUG": "-all"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found = {}
    for line in printed.splitlines():
        set_, case, sums = line.split("\t")
        found[set_, case] = tuple(float.fromhex(word) for word in sums.split())
    return found


def problems(got: Results, expected: Results, same_processor: bool) -> list[str]:
    """Return a line for each result that differs from the expected one of the first target.

    An instruction set has the same bits on every system. Arm's fuses multiplications and additions as AVX2 does, and
    gives the same bits too, except in gradients, whose order of summation depends on the width of a vector.
    """
    found = [] if got else ["the program printed no results"]
    for (set_, case), sums in got.items():
        wanted = expected[set_ if same_processor else "avx2", case]
        most = 0 if same_processor or "training" not in case else TOLERANCE
        if not all(abs(one - other) <= most * abs(other) for one, other in zip(sums, wanted, strict=True)):
            found.append(f"{set_}, {case}: expected the sums {wanted}, got {sums}")
    return found


def main(names: Sequence[str]) -> int:
    unknown = set(names) - set(TARGETS)
    if unknown:
        print(f"expected targets among {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    first = next(iter(TARGETS))
    expected = {}
    failed = False
    for name in [first, *(name for name in TARGETS if name != first and (not names or name in names))]:
        target = TARGETS[name]
        program = compiled(name)
        if target.system == "Linux":
            compile_bindings(name)
        if target.runner is None or (target.runner and not shutil.which(target.runner)):
            print(f"{name}: compiled; not run, {f'without {target.runner}' if target.runner else 'nothing here can'}")
            continue
        got = results(program, target.runner)
        expected = expected or got
        found = problems(got, expected, name.split("-")[0] == first.split("-")[0])
        for line in found:
            print(f"{name}: {line}", file=sys.stderr)
        sets = ", ".join(dict.fromkeys(set_ for set_, _ in got))
        print(f"{name}: {'differs' if found else 'compiled, and its results agree'} ({sets})")
        failed = failed or bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
