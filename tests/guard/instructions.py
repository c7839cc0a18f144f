"""Count the instructions of fixed pieces of the kernel's work under callgrind, and compare them with recorded ones.

`make guard` runs this, `make guard RECORD=1` with `--record`. A clock says little on a machine that others use too;
this count is the same each time, to the instruction. It is that of the code for AVX2, the best that valgrind knows, as
one compiler made it: with another one nothing is compared, and that is said.
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
MEND = "`make guard RECORD=1` writes new figures"


class GuardError(Exception):
    """The guard can't do its work; says what is missing."""


def configure(build: Path) -> str:
    """Set up the build, compile nothing yet, and return the compiler: its name and its version."""
    for tool, package in (("cmake", "cmake"), ("valgrind", "valgrind")):
        if shutil.which(tool) is None:
            raise GuardError(f"expected {tool} in the PATH: apt-get install {package}")
    options = ["-DCELLSTACK_GUARD=ON", "-DCELLSTACK_SETS=baseline;avx2", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, stdout=subprocess.DEVNULL)
    return (build / "compiler").read_text(encoding="utf-8").strip()


def compiled(build: Path) -> Path:
    """Compile the driver, for as many cores as there are, and return where it lies."""
    subprocess.run(["cmake", "--build", build, "--parallel"], check=True, stdout=subprocess.DEVNULL)
    return build / "guard"


def cases(driver: Path) -> list[str] | None:
    """Return the names of the driver's cases; None where the processor has no AVX2."""
    listed = subprocess.run([driver], capture_output=True, text=True)
    if listed.returncode == NO_AVX2:
        return None
    listed.check_returncode()
    return listed.stdout.splitlines()


def count(driver: Path, case: str) -> int:
    """Return how many instructions a case takes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        options = ["--tool=callgrind", "--toggle-collect=counted", f"--callgrind-out-file={out}"]
        ran = subprocess.run(["valgrind", *options, driver, case], capture_output=True, text=True)
        if ran.returncode:
            raise GuardError(f"{case}: valgrind ended with {ran.returncode}\n{ran.stderr}")
        return instructions(out.read_text(encoding="utf-8"), case)


def instructions(profile: str, case: str) -> int:
    """Return the sum that callgrind's file ends in."""
    total = re.search(r"^totals: (\d+)", profile, re.MULTILINE)
    if total is None or not int(total[1]):
        raise GuardError(f"{case}: callgrind counted nothing in the function `counted`")
    return int(total[1])


def family(compiler: str) -> str:
    """Return what of a compiler has to be as it was: its name and its major version."""
    return compiler.split(".")[0]


def problems(recorded: dict[str, int], counted: dict[str, int]) -> list[str]:
    """Return what isn't as it was recorded, a line each."""
    found = [f"{case}: is recorded, and isn't a case any more" for case in recorded if case not in counted]
    for case, now in counted.items():
        before = recorded.get(case)
        if before is None:
            found.append(f"{case}: isn't recorded")
        elif abs(now - before) > TOLERANCE * before:
            found.append(
                f"{case}: expected {before:,} instructions within {TOLERANCE:.0%}, got {now:,}, {now / before - 1:+.1%}"
            )
    return found


def table(recorded: dict[str, int], counted: dict[str, int]) -> str:
    """Return all counts as text, beside those recorded."""
    lines = []
    for case, now in counted.items():
        beside = f"{now / recorded[case] - 1:+8.2%}" if case in recorded else "     new"
        lines.append(f"{case:36}{now:>12,}{beside}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the counts as those to compare with")
    parser.add_argument("--figures", type=Path, default=RECORD, help="the file that holds them")
    options = parser.parse_args(arguments)
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"guard: it is AVX2 that is counted, and this is {platform.machine()}: nothing was compared")
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
        was = f"are of {known['compiler']}" if known["counts"] else "aren't there"
        print(f"guard: the figures {was}, this compiler is {compiler}: nothing was compared. {MEND}")
        return 0
    driver = compiled(BUILD)
    names = cases(driver)
    if names is None:
        print("guard: it is AVX2 that is counted, and this processor has none: nothing was compared")
        return 0
    counted = {case: count(driver, case) for case in names}
    print(table(known["counts"], counted))
    if record:
        text = json.dumps({"compiler": compiler, "counts": counted}, indent=2)
        figures.write_text(text + "\n", encoding="utf-8")
        print(f"guard: wrote the counts of {len(counted)} cases, {compiler}")
        return 0
    found = problems(known["counts"], counted)
    for line in found:
        print(f"guard: {line}", file=sys.stderr)
    if found:
        print(f"guard: where this is meant, {MEND}; say in the commit why", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
