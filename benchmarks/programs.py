"""Real programs before and after `accelerate`, and what `compile` makes of them: a table, one row per program.

    python benchmarks/programs.py [--site FOLDER] [--json FILE] [NAME ...]

The programs are declared in tests/programs; their packages are looked for in `--site` too. Each program is measured in
a process of its own, on one thread; names select programs by prefix. Times are minima in milliseconds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))  # before this folder, which has a `programs` too

from programs.harness import all_programs  # noqa: E402

LIMIT = 600  # seconds per program
LONGEST = 170  # characters of the reason for a refusal


def measured(name: str, site: str) -> dict:
    """Return the results of one program; its key `failed` holds the end of the error output."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *([site] if site else [])]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "programs.harness", name]
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"no result within {LIMIT} s"}
    if run.returncode:
        return {"name": name, "failed": run.stderr[-2000:]}
    return json.loads(run.stdout.splitlines()[-1])


def reason(refused: str) -> str:
    """Return the first reason of a message of `compile`, shortened."""
    text = " ".join(refused.split())
    for start in ("can't be a Network: ", "exported to ONNX: ", "the graph can't be read as a Network, found: "):
        text = text.partition(start)[2] or text
    text = text.split("; ")[0].replace("|", "\\|")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def row(found: dict) -> str:
    """Return a row of the table."""
    if "failed" in found:
        return f"| {found['name']} | failed: {found['failed'].strip().splitlines()[-1][:150]} | | | | | |"

    def times(pair: list[float] | None) -> str:
        return f"{pair[0]:.2f} → {pair[1]:.2f} ({pair[0] / pair[1]:.2f}×)" if pair else ""

    served = f"{found['served'] - found['written']}/{found['modules']}"
    served += f", {found['written']} hand-written" if found["written"] else ""
    off = f"{found['off']:.0e}, {found['off_gradients']:.0e}" if found["served"] else ""
    if found["refused"] is not None:
        compiled = f"refused: {reason(found['refused'])} | "
    else:
        streams = f"streams, {found['off_stream']:.0e}" if found["streams"] else "no stream"
        made = f"native: {found['cells']} cells, {found['nodes']} nodes, {streams}"
        if found["runtime"]:
            made = f"with ONNX Runtime: {found['cells']} operator{'s' * (found['cells'] != 1)} on the kernel"
        compiled = f"{made} | {found['off_compiled']:.0e} at {found['sizes']} sizes"
    times_before = f"{times(found['inference'])} | {times(found['training'])}"
    return f"| {found['name']} | {served} | {off} | {times_before} | {compiled} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--site", default="")
    parser.add_argument("--json", default="", help="a file for all results, one JSON object per line")
    args = parser.parse_args()
    print("| program | served | difference: outputs, gradients | inference | training | compile | difference |")
    print("|---|---|---|---|---|---|---|")
    for name in all_programs():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        found = measured(name, args.site)
        print(row(found), flush=True)
        if args.json:
            with Path(args.json).open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
