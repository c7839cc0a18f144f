"""`bench`: speed on this machine, compared with the installed baselines and with the machine's limits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cellstack.cli.arguments import sizes
from cellstack.cli.files import plain, show
from cellstack.network import processors
from cellstack.train.checks import UsageError
from cellstack_bench.engines import SURFACES
from cellstack_bench.surface import BEFORE, Shape, lines, run, shapes, step_shapes

UNITS, BATCH, STEPS = (16, 64, 128, 256), (1, 8, 32), (100,)
QUICK_UNITS, QUICK_BATCH, QUICK_STEPS = (32, 128), (1, 16), (50,)
ROUNDS, QUICK_ROUNDS = 7, 3
SECONDS, QUICK_SECONDS = 0.01, 0.004  # least time of a round
JSON_FILE = "bench.json"


def distinct(text: str) -> tuple[int, ...]:
    """Parse distinct positive integers, separated by commas."""
    return tuple(dict.fromkeys(sizes(text)))


def surfaces(text: str) -> tuple[str, ...]:
    """Parse the names of surfaces, separated by commas."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if wrong := [part for part in found if part not in SURFACES]:
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(SURFACES)}, got {wrong[0]!r}")
    return found


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to its parser."""
    listed = lambda numbers: ",".join(map(str, numbers))  # noqa: E731
    text = f"what to measure: one or more of {', '.join(SURFACES)} (default: all)"
    bench.add_argument("--what", type=surfaces, metavar="A,B", help=text)
    bench.add_argument("--units", type=distinct, metavar="N,N", help=f"units of the LSTM (default: {listed(UNITS)})")
    bench.add_argument("--batch", type=distinct, metavar="N,N", help=f"batch sizes (default: {listed(BATCH)})")
    bench.add_argument("--steps", type=distinct, metavar="N,N", help=f"steps per sequence (default: {listed(STEPS)})")
    bench.add_argument("--bidirectional", action="store_true", help="layers with both directions; not for 'step'")
    text = "threads of every engine (default: %(default)s)"
    bench.add_argument("--threads", type=int, default=1, metavar="N", help=text)
    bench.add_argument(
        "--before",
        choices=BEFORE,
        default="nothing",
        help="what runs before each timed call: a PyTorch product, whose threads spin afterwards, or 10 ms of rest "
        "(default: %(default)s)",
    )
    bench.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    bench.add_argument("-o", "--output", metavar="FOLDER", help=f"write {JSON_FILE} and a plot of each surface to it")


def bench(args: argparse.Namespace) -> int:
    """Measure and report the results.

    Returns:
        0; 1 if an engine's outputs differ from the reference; 130 if Ctrl-C stopped it, after reporting what was
        measured until then.
    """
    if args.threads > processors():
        raise UsageError(f"expected --threads of at most {processors()}, the processors available to this process")
    what = args.what or tuple(name for name in SURFACES if not (args.bidirectional and name == "step"))
    if args.bidirectional and "step" in what:
        raise UsageError("--bidirectional can't be combined with the surface 'step': a stream only runs forwards")
    for name in ("batch", "steps"):
        if what == ("step",) and getattr(args, name) is not None:
            raise UsageError(f"--{name} has no effect: the surface 'step' always measures one step at batch 1")
    if args.output is not None and (not args.output or (Path(args.output).exists() and not Path(args.output).is_dir())):
        raise UsageError(f"expected --output to name a folder, got {args.output!r}")
    said = []
    if (needy := [name for name in what if name in ("layers", "training")]) and (reason := _without_torch()):
        if args.what:
            raise UsageError(f"{needy[0]} needs torch, and {reason}: pip install 'cellstack[torch]'")
        what = tuple(name for name in what if name not in needy)
        said.append(f"{' and '.join(needy)} weren't measured, because {reason}")
    if args.before == "torch" and (reason := _without_torch()):
        raise UsageError(f"--before torch needs torch, and {reason}: pip install 'cellstack[torch]'")
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    report = run({name: _shapes(name, args) for name in what}, args.threads, rounds, seconds, _progress, args.before)
    said = [*lines(report), *said]
    if args.output is not None:
        said += write(report, args.output)
    show(args, report, said)
    if report["stopped"]:
        return 130
    return int(any(record["differs"] for records in report["surfaces"].values() for record in records))


def _without_torch() -> str | None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} isn't installed"
    return None


def _shapes(what: str, args: argparse.Namespace) -> list[Shape]:
    units = args.units or (QUICK_UNITS if args.quick else UNITS)
    if what == "step":
        return step_shapes(units)
    batch = args.batch or (QUICK_BATCH if args.quick else BATCH)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    return shapes(batch, steps, units, directions=2 if args.bidirectional else 1)


def _progress(work: Sequence[Any]) -> Iterable[Any]:
    """Show a progress bar for `work` on standard error, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return work
    return tqdm(work, unit="shape", file=sys.stderr, dynamic_ncols=True)


def write(report: dict[str, Any], output: str) -> list[str]:
    """Write a report and its plots to a folder, add their names to the report, and return the lines to print."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    done = {what: records for what, records in report["surfaces"].items() if records}
    pictures, said = {what: str(folder / f"{what}.png") for what in done}, []
    try:
        from cellstack_bench.picture import draw

        for what, records in done.items():
            draw(what, records, report, Path(pictures[what]))
    except ModuleNotFoundError as error:
        package = (error.name or "matplotlib").partition(".")[0]
        pictures = {}
        said = [f"no plots were written, because {package} isn't installed: pip install 'cellstack[torch]'"]
    file = folder / JSON_FILE
    report["files"] = [str(file), *pictures.values()]
    file.write_text(json.dumps(plain(report), allow_nan=False, indent=1) + "\n", encoding="utf-8")
    return ["", *said, *(f"wrote {name}" for name in report["files"])]
