"""Count the instructions of fixed pieces of the kernel's work under callgrind, and compare them with recorded ones.

`make guard` runs this, `make guard RECORD=1` with `--record`. Times vary on a machine that others use too; the counts
are the same each time, to the instruction. They are for AVX2, the best instruction set that valgrind supports, and for
one compiler: with a different one nothing is compared, and a message says so.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "instructions.json"
BUILD = ROOT / "build" / "guard"
TOLERANCE = 0.03
NO_AVX2 = 3  # exit status of cases.cpp
RECORDING = "`make guard RECORD=1` records new counts"


class GuardError(Exception):
    """The guard can't run; the message says why."""


def configure(build: Path) -> str:
    """Configure the build without compiling, and return the compiler's name and version."""
    for tool, package in (("cmake", "cmake"), ("valgrind", "valgrind")):
        if shutil.which(tool) is None:
            raise GuardError(f"expected {tool} in the PATH: apt-get install {package}")
    options = ["-DCELLSTACK_GUARD=ON", "-DCELLSTACK_SETS=baseline;avx2", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, stdout=subprocess.DEVNULL)
    return (build / "compiler").read_text(encoding="utf-8").strip()


def compiled(build: Path) -> Path:
    """Compile the driver on all cores and return its path."""
    subprocess.run(["cmake", "--build", build, "--parallel"], check=True, stdout=subprocess.DEVNULL)
    return build / "guard"


def cases(driver: Path) -> list[str] | None:
    """Return the names of the driver's cases; None if the processor doesn't support AVX2."""
    listed = subprocess.run([driver], capture_output=True, text=True)
    if listed.returncode == NO_AVX2:
        return None
    listed.check_returncode()
    return listed.stdout.splitlines()


def count(driver: Path, case: str) -> int:
    """Return the number of instructions of a case."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        options = ["--tool=callgrind", "--toggle-collect=counted", f"--callgrind-out-file={out}"]
        ran = subprocess.run(["valgrind", *options, driver, case], capture_output=True, text=True)
        if ran.returncode:
            raise GuardError(f"{case}: valgrind ended with {ran.returncode}\n{ran.stderr}")
        return instructions(out.read_text(encoding="utf-8"), case)


def instructions(profile: str, case: str) -> int:
    """Return the total at the end of a callgrind file."""
    total = re.search(r"^totals: (\d+)", profile, re.MULTILINE)
    if total is None or not int(total[1]):
        raise GuardError(f"{case}: callgrind counted nothing in the function `counted`")
    return int(total[1])


def family(compiler: str) -> str:
    """Return the parts of a compiler that must match: its name and its major version."""
    return compiler.split(".")[0]


def problems(recorded: dict[str, int], counted: dict[str, int]) -> list[str]:
    """Return a line for each difference from the recorded counts."""
    found = [f"{case}: is recorded but is no longer a case" for case in recorded if case not in counted]
    for case, now in counted.items():
        before = recorded.get(case)
        if before is None:
            found.append(f"{case}: has no recorded count")
        elif abs(now - before) > TOLERANCE * before:
            found.append(
                f"{case}: expected {before:,} instructions within {TOLERANCE:.0%}, got {now:,}, {now / before - 1:+.1%}"
            )
    return found


def table(recorded: dict[str, int], counted: dict[str, int]) -> str:
    """Return all counts as text, with their change from the recorded ones."""
    lines = []
    for case, now in counted.items():
        change = f"{now / recorded[case] - 1:+8.2%}" if case in recorded else "     new"
        lines.append(f"{case:36}{now:>12,}{change}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help="record the counts instead of comparing them")
    parser.add_argument("--figures", type=Path, default=RECORD, help="the file with the recorded counts")
    options = parser.parse_args(arguments)
    if platform.machine() not in ("x86_64", "AMD64"):
        print(
            f"guard: instructions are counted for AVX2, and this machine is {platform.machine()}: nothing was compared"
        )
        return 0
    try:
        return guard(options.figures, options.record)
    except GuardError as error:
        print(f"guard: {error}", file=sys.stderr)
        return 1


def guard(figures: Path, record: bool) -> int:
    """Count and compare, or record; return the exit status."""
    compiler = configure(BUILD)
    known = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {"compiler": "", "counts": {}}
    if not record and family(compiler) != family(known["compiler"]):
        why = (
            f"the recorded counts are for {known['compiler']}, and this compiler is {compiler}"
            if known["counts"]
            else "no counts are recorded"
        )
        print(f"guard: {why}: nothing was compared. {RECORDING}")
        return 0
    driver = compiled(BUILD)
    names = cases(driver)
    if names is None:
        print("guard: instructions are counted for AVX2, which this processor doesn't support: nothing was compared")
        return 0
    counted = {case: count(driver, case) for case in names}
    print(table(known["counts"], counted))
    if record:
        text = json.dumps({"compiler": compiler, "counts": counted}, indent=2)
        figures.write_text(text + "\n", encoding="utf-8")
        print(f"guard: recorded the counts of {len(counted)} cases for {compiler}")
        return 0
    found = problems(known["counts"], counted)
    for line in found:
        print(f"guard: {line}", file=sys.stderr)
    if found:
        print(f"guard: if this is intended, {RECORDING}; give the reason in the commit message", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
