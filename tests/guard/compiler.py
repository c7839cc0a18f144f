"""Compile the kernel from scratch, and fail if a compiler process uses more memory than a small machine has.

    python tests/guard/compiler.py              # as `make guard` does; CXX=clang++ selects another compiler
    python tests/guard/compiler.py -- g++ …     # one compiler process, as CMake runs it for each file

The table lists the CPU seconds and the peak memory of each file. Seconds depend on the machine, so only memory has a
limit.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "compiler"
LOG = "compiler.jsonl"
MOST = 800  # MB


def compiled(command: Sequence[str]) -> int:
    """Run one compiler process, log its time and memory, and return its exit status."""
    status = subprocess.run(command).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    source = next((word for word in command if word.endswith((".cpp", ".c"))), command[-1])
    words = [word.removeprefix("-DCELLSTACK_ISA=") for word in command if word.startswith("-DCELLSTACK_ISA=")]
    record = {
        "file": " ".join([Path(source).name, *words]),
        "seconds": used.ru_utime + used.ru_stime,
        "megabytes": used.ru_maxrss / 1024,
    }
    with Path(LOG).open("a", encoding="utf-8") as log:  # in the build folder, where CMake's generators run the compiler
        log.write(json.dumps(record) + "\n")
    return status


def measured(build: Path) -> list[dict[str, float | str]]:
    """Compile everything in a fresh folder, and return the time and memory of each file."""
    shutil.rmtree(build, ignore_errors=True)
    launcher = f"{sys.executable};{Path(__file__).resolve()};--"
    options = [f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-Werror"]
    options += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # for foreign.py
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["cmake", "--build", build, "--parallel", str(os.cpu_count())], check=True, stdout=subprocess.DEVNULL
    )
    logs = [log.read_text(encoding="utf-8").splitlines() for log in build.rglob(LOG)]
    return [json.loads(line) for lines in logs for line in lines]


def problems(records: Sequence[dict]) -> list[str]:
    """Return a line for each file that needs too much memory."""
    return [
        f"{record['file']}: its compiler process uses {record['megabytes']:.0f} MB, more than {MOST}: split the file"
        for record in records
        if record["megabytes"] > MOST
    ]


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--"]:
        return compiled(arguments[1:])
    records = sorted(measured(BUILD), key=lambda record: -record["seconds"])
    print(f"{'file':28}{'seconds':>9}{'MB':>7}")
    for record in records:
        print(f"{record['file']:28}{record['seconds']:9.1f}{record['megabytes']:7.0f}")
    print(f"{'all':28}{sum(record['seconds'] for record in records):9.1f}")
    found = problems(records)
    for line in found:
        print(f"guard: {line}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
