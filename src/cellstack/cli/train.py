"""`cellstack train`: its flags, and the report before and after training.

Each kind of data is a separate module with `read(args, given)`, which reads the data and returns a `jobs.Job`; `given`
are the options.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from cellstack import Network
from cellstack.cli import forecast, sequences, text
from cellstack.cli.files import needs_torch, show, with_suffix
from cellstack.cli.jobs import Job
from cellstack.cli.options import ShowHelp, add_groups, options_of
from cellstack.formats import adapters
from cellstack.formats.files import NATIVE, check_replaceable, existing_file, replacing
from cellstack.train import history
from cellstack.train.cell_names import MLSTM, NOT_INSPECTED
from cellstack.train.checks import UsageError, refuse_existing
from cellstack.train.locks import locked
from cellstack.train.options import Architecture, FitOptions, declared, record_of

EVENTS = "events.out.tfevents.*"  # TensorBoard's files
KINDS: dict[str, ModuleType] = {"sequences": sequences, "forecasts": forecast, "texts": text}
TASKS = {"classify": "sequences", "regress": "sequences", "forecast": "forecasts", "text": "texts"}
SUFFIXES = {".ts": "sequences", ".npz": "sequences", ".csv": "forecasts", ".tsv": "forecasts", ".parquet": "forecasts"}
SUFFIXES |= dict.fromkeys(text.SUFFIXES, "texts")
ONLY = {"y": ("sequences",), "forecasts": ("forecasts",)}  # flags that aren't options, and what they apply to


def add_arguments(train: argparse.ArgumentParser) -> None:
    """Add the flags of `train` to its parser."""
    train.add_argument(
        "file",
        metavar="FILE",
        help="sequences: .ts (one sequence per line, channels separated by colons, the class last; the format of the "
        "UEA and UCR archives), .npz (x [N, T, C], y, lengths), or, with --label, a .csv, .tsv or .parquet table with "
        "one row per step; a series to forecast: such a table without --label; a text: .txt or .md",
    )
    train.add_argument(
        "test_file", nargs="?", metavar="TEST", help="sequences or text to test on, not used for training"
    )
    train.add_argument("-o", "--output", metavar="MODEL", help=f"file to write ({NATIVE} is added)")
    text = "what to learn (default: inferred from the file and its labels)"
    train.add_argument("--task", choices=tuple(TASKS), help=text)
    text = "sequences in a table: column of the classes or numbers to learn"
    train.add_argument("--label", dest="y", metavar="COLUMN", help=text)
    train.add_argument(
        "--dry-run", action="store_true", help="only report how the data is read and how long training takes"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    add_groups(train)
    said = train.add_argument_group("reports")
    said.add_argument("--history", metavar="FILE", help="write all epochs' metrics at the end: to .csv or .json")
    text = "plot the metrics, and the forecasts or the confusion matrix of the test part: to .png, .svg or .pdf"
    said.add_argument("--picture", metavar="FILE", help=text)
    text = "of a series: write the forecasts and actual values of the test part to a CSV"
    said.add_argument("--forecasts", metavar="FILE", help=text)


def add_help(group: Any) -> None:
    """Add `--help` and `--help-all`."""
    text = "show the main options, with FILE those for its data; --help-all shows all"
    group.add_argument("-h", "--help", action=ShowHelp, data_of=kind_of, others=ONLY, help=text)
    group.add_argument("--help-all", action=ShowHelp, const=True, data_of=kind_of, others=ONLY, help=argparse.SUPPRESS)


def train(args: argparse.Namespace) -> int:
    """Train on a file and write the network; or report how the file is read."""
    for path in (args.file, args.test_file):
        if path is not None:
            os.stat(path)  # raises FileNotFoundError
    name = kind_of(args)
    module = KINDS[name]
    _check_used(args, name)
    same = args.test_file is not None and os.path.realpath(args.test_file) == os.path.realpath(args.file)
    if same and name != "forecasts":  # which take only one file
        raise UsageError(f"{args.test_file}: the test file is the training file; test on other data")
    output = _checked_output(args)
    if args.dry_run:
        return _dry_run(args, module)
    needs_torch(args)
    assert output is not None
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes
    with locked(output if first else None):
        return _train(args, module, output, first)


def _train(args: argparse.Namespace, module: ModuleType, output: Path, first: bool) -> int:
    """Train on a file and write the network to `output`; `first` is whether this is process 0 of several."""
    if args.inspect and args.cell == MLSTM:
        raise UsageError(NOT_INSPECTED)
    job = module.read(args, options_of(args, kind_of(args)))
    folder = _inspect_folder(output, args.resume) if args.inspect else None
    architecture, options = _choices(args, job, folder)
    say = (lambda lines: print("\n".join(lines), flush=True)) if first and not args.json else lambda _: None
    say(job.understood)
    lines, planned = job.plan(architecture, options)
    say(lines)
    result = job.fit(architecture, options)
    if result.rank:
        return 0
    _save(result.network, output)
    report, lines = _report(job, result, output)
    report["plan"] = planned
    failed = None
    try:
        job.write()
        if args.history and result.history:
            history.write(args.history, result.history)
        if args.picture and result.history:
            history.draw(args.picture, result.history, result.fit.best, job.panels(result))
        if folder is not None:
            report["inspect"] = _inspected(result, output, folder)
            lines += _inspect_text(report["inspect"])
    except OSError as error:  # the report is printed all the same
        failed = error
    show(args, report, [*lines, f"wrote {output}"])
    if failed is not None:
        raise failed
    return 130 if result.fit.interrupted else 0


def _dry_run(args: argparse.Namespace, module: ModuleType) -> int:
    """Report how the data is read, what would be trained, and how long it would take."""
    job = module.read(args, options_of(args, kind_of(args)))
    architecture, options = _choices(args, job)
    lines, planned = job.plan(architecture, options)
    planned["seconds"] = _expected(args, job, architecture, options)
    lines.append(_expected_text(planned["seconds"]))
    show(args, {"understood": job.described, "plan": planned}, [*job.understood, *lines])
    return 0


def _expected(
    args: argparse.Namespace, job: Job, architecture: Architecture, options: FitOptions
) -> tuple[float, float] | None:
    """Return the seconds of a training on this machine, with the fewest and the most epochs; None without torch.

    Trains and times some steps.
    """
    try:
        needs_torch(args)
    except UsageError:
        return None
    from cellstack.train.learner import Timed

    try:
        job.fit(architecture, replace(options, progress=False, checkpoint=None, resume=False, timing=True))
    except Timed as done:
        fits = job.fits(options)
        few, most = (sum(done.cost.seconds(fit[n], fit[2]) for fit in fits) for n in (0, 1))
        return few + job.others, most + job.others
    raise AssertionError("timing ends before the first fit")


def _expected_text(seconds: tuple[float, float] | None) -> str:
    if seconds is None:
        return "expected time: not measured, because torch isn't installed"
    few, most = seconds
    if most < 1.5 * few or most < 2.0:
        return f"expected time: about {_duration(most)} on this machine"
    low, high = _duration(few), _duration(most)
    low = low.split()[0] if low.split()[1].rstrip("s") == high.split()[1].rstrip("s") else low
    return f"expected time: {low} to {high} on this machine, depending on early stopping"


def _duration(seconds: float) -> str:
    """Return a duration in words, with one or two digits.

    >>> [_duration(seconds) for seconds in (0.2, 1.2, 47, 130, 9000)]
    ['1 second', '1 second', '47 seconds', '2 minutes', '2.5 hours']
    """
    for name, size, least in (("hour", 3600, 5400), ("minute", 60, 90), ("second", 1, 0)):
        if seconds >= least:
            count = max(1.0, round(seconds / size, 1 if size == 3600 else 0))
            return f"{count:g} {name}{'s' * (count != 1)}"
    raise AssertionError


def kind_of(args: argparse.Namespace) -> str:
    """Return the kind of a file's data: determined by --task or --label, else by its suffix.

    Raises:
        UsageError: an unknown suffix, or one that doesn't match --task.
    """
    suffix = Path(args.file).suffix.lower()
    if suffix not in SUFFIXES and args.task != "text":
        raise UsageError(f"{args.file}: expected a file with one of the suffixes {', '.join(SUFFIXES)}")
    if args.task == "forecast" and SUFFIXES[suffix] != "forecasts":
        tables = ", ".join(ending for ending, kind in SUFFIXES.items() if kind == "forecasts")
        raise UsageError(f"{args.file}: expected a table to forecast, with one of the suffixes {tables}")
    if args.task is not None:
        return TASKS[args.task]
    return "sequences" if args.y is not None else SUFFIXES[suffix]


def _check_used(args: argparse.Namespace, name: str) -> None:
    """Raise `UsageError` if an option is given that doesn't apply to this kind of data."""
    applies = ONLY | {one.name: tuple(one.defaults) for one in declared().values() if one.flag}
    for dest, value in vars(args).items():
        if value is not None and name not in applies.get(dest, (name,)):
            raise UsageError(f"{args.file}: `{dest}=…` doesn't apply to {name}, only to {' and '.join(applies[dest])}")


def _checked_output(args: argparse.Namespace) -> Path | None:
    """Return the network's file, None for a dry run without one; check all output files now, before the training."""
    if args.output is None and not args.dry_run:
        raise UsageError("expected -o MODEL, the file to write, or --dry-run")
    output = None
    if args.output is not None:
        output = with_suffix(args.output)
        suffix = Path(args.output).suffix.lower()
        if suffix != NATIVE and suffix in {".c", *(one for adapter in adapters() for one in adapter.SUFFIXES)}:
            raise UsageError(
                f"-o {args.output}: train writes only {NATIVE} files, which store what `run` needs; afterwards, "
                f"`cellstack convert {Path(args.output).with_suffix(NATIVE)} {args.output}` writes {suffix}"
            )
        if not output.parent.is_dir():
            raise UsageError(f"the folder {output.parent} doesn't exist")
        check_replaceable(output)
    if args.log is not None and Path(args.log).suffix.lower() in history.FILES:
        check_replaceable(args.log)
    if args.history is not None:
        history.check(args.history, history.FILES, "--history")
    if args.picture is not None:
        history.check(args.picture, history.PICTURES, "--picture")
    if (
        args.checkpoint is not None
        and output is not None
        and os.path.realpath(args.checkpoint) == os.path.realpath(output)
    ):
        raise UsageError(f"--checkpoint and -o name the same file, {output}: the network would replace the checkpoint")
    return output


def _choices(args: argparse.Namespace, job: Job, events: Path | None = None) -> tuple[Architecture, FitOptions]:
    """Return how to train, checked as far as possible without training.

    Args:
        args: the options.
        job: the data.
        events: folder for the events of --inspect.

    Raises:
        UsageError: an option out of range, a checkpoint that exists without --resume or --overwrite, or --search
            without Optuna.
        FileNotFoundError: no network to start from.
    """
    values = job.given | {"progress": False if args.quiet else None, "events": events}
    if args.init is not None:
        values["init"] = existing_file(args.init)
    options, architecture = record_of(FitOptions, values), record_of(Architecture, values)
    if options.search and find_spec("optuna") is None:
        raise UsageError("train --search needs optuna: pip install 'cellstack[search]'")
    if args.checkpoint is not None and not (args.resume or args.overwrite):
        for path in job.checkpoints(args.checkpoint):
            check_replaceable(path)
            refuse_existing(path)
    return architecture, options


def _save(network: Network, output: Path) -> None:
    """Write a network; if that fails, write it to a temporary folder, so that the training isn't lost.

    Raises:
        UsageError: it was written to the temporary folder.
        OSError: that failed too.
    """
    try:
        network.save(output)
    except OSError as error:
        folder = tempfile.mkdtemp(prefix="cellstack-")
        other = Path(folder) / output.name
        try:
            network.save(other)
        except OSError:
            shutil.rmtree(folder)
            raise error from None
        raise UsageError(f"{output}: {error.strerror or error}: the network is in {other} instead") from None


def _inspect_folder(output: Path, resume: bool) -> Path:
    """Create the folder for --inspect, without the events of an earlier training; return it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"train --inspect needs {error.name}: pip install 'cellstack[torch]'") from None
    folder = output.with_name(f"{output.stem}-inspect")
    folder.mkdir(exist_ok=True)
    check_replaceable(folder / "report.html")
    if not resume and int(os.environ.get("RANK", "0")) == 0:
        for old in folder.glob(EVENTS):
            old.unlink()
    return folder


def _inspected(result: Any, output: Path, folder: Path) -> dict[str, Any]:
    """Write the report of --inspect; return its path and the records."""
    records = result.fit.records
    report = None
    if records:
        from cellstack_demo.pages import training_page

        nats = result.network.metadata["task"] in ("classify", "text")
        unit = "nats" if nats else "squared standard deviations"
        with replacing(folder / "report.html") as file:
            file.write(training_page(output.stem, result.history, records, unit).encode())
        report = str(folder / "report.html")
    return {
        "report": report,
        "tensorboard": str(folder) if any(folder.glob(EVENTS)) else None,
        "records": [record.to_json() for record in records],
    }


def _inspect_text(inspected: dict[str, Any]) -> list[str]:
    if not inspected["records"]:
        return ["nothing to inspect: no epoch was completed"]
    last = inspected["records"][-1]
    findings = [f"  - {sentence}" for sentence in last["findings"]]
    lines = [f"layers in epoch {last['epoch']}: {'findings' if findings else 'no findings'}", *findings]
    shown = f"tensorboard --logdir {inspected['tensorboard']}"
    if inspected["tensorboard"] is None:
        shown = "no events were written, because TensorBoard isn't installed: pip install tensorboard"
    return [*lines, f"  {inspected['report']}", f"  {shown}"]


def _report(job: Job, result: Any, output: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the report at the end, as plain values and as lines."""
    fit = result.fit
    scores, scored = job.scores(result)
    report = {
        "model": str(output),
        "task": result.network.metadata["task"],
        "understood": job.described,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "epochs": len(fit.history),
        "best": fit.best,
        "steps": fit.steps,
        "seconds": round(fit.seconds, 3),
        "stopped": fit.stopped,
        "interrupted": fit.interrupted,
        "threads": {"used": fit.threads, "seconds_a_step": fit.timed},
        "checkpoint_error": fit.checkpoint_error,
        "sentence": result.sentence,
        "notes": fit.notes,
        "test": scores,
        "history": fit.history,
        "trials": [trial._asdict() for trial in result.trials],
    }
    trials = [repr(result.trials)] if result.trials else []
    lines = [
        *trials,
        repr(result.network),
        f"{fit.steps} steps in {fit.seconds:.1f} s, {_threads(fit)}",
        *fit.notes,
        *scored,
    ]
    if fit.checkpoint_error:
        lines.append(f"the last checkpoint could not be written: {fit.checkpoint_error}")
    return report, [*lines, result.sentence]


def _threads(fit: Any) -> str:
    """Report how many threads were used, and why."""
    used = f"on {fit.threads} thread{'s' * (fit.threads != 1)}"
    if len(fit.timed) < 2:
        return used
    each = " and ".join(f"{1000 * seconds:.2g} ms on {n}" for n, seconds in sorted(fit.timed.items()))
    return f"{used}: a step took {each}"
