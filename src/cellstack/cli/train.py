"""`cellstack train`: the options that all kinds of data share, and what it says before and after the training.

A kind is a module of its own, of which this one asks:

- `add_arguments(train)`: adds its options to the parser and returns them; their default is None (False for a switch);
- `UNUSED`: options of this module that do nothing for it;
- `read(args)`: reads the data and returns a `Job`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from cellstack.cli import forecast, sequences, text
from cellstack.cli.files import SUFFIX, found, needs_torch, show, with_suffix
from cellstack.cli.tables import add_table_options
from cellstack.formats.files import check_replaceable, replacing
from cellstack.network import Network
from cellstack.train import history
from cellstack.train.checks import UsageError
from cellstack.train.locks import locked
from cellstack.train.settings import Architecture, Own, RunOptions, Settings

EVENTS = "events.out.tfevents.*"  # files of TensorBoard's
KINDS: dict[str, ModuleType] = {"sequences": sequences, "forecasts": forecast, "texts": text}
TASKS = {"classify": "sequences", "regress": "sequences", "forecast": "forecasts", "text": "texts"}
SUFFIXES = {".ts": "sequences", ".npz": "sequences", ".csv": "forecasts", ".tsv": "forecasts", ".parquet": "forecasts"}
SUFFIXES |= dict.fromkeys(text.SUFFIXES, "texts")
DEFAULTS = {
    "units": (48, 48),
    "lr": 5e-3,
    "pooling": "mean",
    "dropout": 0.3,
    "epochs": 60,
    "batch": 16,
    "patience": 20,
    "validation": 0.15,
    "noise": 0.0,
    "offset": 0.0,
}


class Job(Protocol):
    """Data that was read, and what is to be done with it.

    `understood` is what was made of the data, a line each; `described` is the same in plain values, for --json;
    `defaults` is what is taken for `units`, `lr`, `pooling` and the like where nothing is said.
    """

    understood: list[str]
    described: dict[str, Any]
    defaults: dict[str, Any]

    def fit(self, architecture: Architecture, settings: Settings, options: RunOptions, own: Own) -> Any:
        """Train; return a `Result`."""
        ...

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return what was measured on held-out data, in plain values and as lines."""
        ...

    def write(self) -> None:
        """Write what else was asked for, once the network is written."""
        ...


def _widths(text: str) -> tuple[int, ...]:
    widths = tuple(int(part) for part in text.split(","))
    if min(widths) < 1:
        raise ValueError
    return widths


_widths.__name__ = "widths"  # what argparse calls it: invalid widths value: '48,x'


def add_arguments(train: argparse.ArgumentParser) -> None:
    """Add the options of `train` to its parser."""
    train.add_argument(
        "file",
        metavar="FILE",
        help="sequences: .ts (the UEA and UCR archives' format: a sequence a line, its channels between colons, its "
        "class at the end), .npz (x [N, T, C], y, lengths), or with --task or --label a table, .csv, .tsv or .parquet, "
        "with a row a step; without these a table is a series to forecast; .txt or .md: a text to go on with",
    )
    train.add_argument("test", nargs="?", metavar="TEST", help="sequences, or a text, to measure on, never trained on")
    train.add_argument("-o", "--output", metavar="MODEL", help=f"where to ({SUFFIX} is added)")
    train.add_argument("--dry-run", action="store_true", help="say what is understood of the data, and train nothing")
    train.add_argument("--task", choices=tuple(TASKS), help="what to learn (told by the file and its labels)")
    add_table_options(train)
    train.set_defaults(owned={name: module.add_arguments(train) for name, module in KINDS.items()})
    model = train.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="of each layer (%(default)s)")
    model.add_argument(
        "--units", type=_widths, metavar="N,N", help="widths, bottom first (48,48; forecasts 48; texts 256,256)"
    )
    model.add_argument("--bidirectional", action="store_true", help="read sequences from both ends")
    model.add_argument("--pooling", choices=("mean", "max", "last"), help="over time (mean)")
    model.add_argument(
        "--every-step", action="store_true", help="learn to answer after every step; for streams, with --pooling last"
    )
    model.add_argument("--dropout", type=float, metavar="P", help="after each layer (0.3; forecasts 0.1)")
    model.add_argument("--init", metavar="MODEL", help="start from the weights of this network, of the same shapes")
    how = train.add_argument_group("training")
    how.add_argument(
        "--epochs", type=int, metavar="N", help="most passes over the data (60; forecasts 16 or 60; texts 30)"
    )
    how.add_argument("--lr", type=float, metavar="X", help="Adam's rate at the start (5e-3; forecasts 1e-3 or 3e-3)")
    how.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="examples in a step, all processes (16; forecasts 32 or 64; texts 8 to 32)",
    )
    how.add_argument("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm (%(default)s)")
    how.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="epochs without progress (20; forecasts 6 or 8; texts 5); 0: never stop early",
    )
    how.add_argument("--validation", type=float, metavar="P", help="share to validate on (0.15; texts 0.05)")
    how.add_argument("--noise", type=float, metavar="X", help="noise on inputs, in their scales (0)")
    how.add_argument("--offset", type=float, metavar="X", help="noise, one draw a sequence (0)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="fixes every draw (%(default)s)")
    how.add_argument("--checkpoint", metavar="FILE", help="written after each epoch and on Ctrl-C")
    how.add_argument(
        "--resume", action="store_true", help="go on from --checkpoint where there is one; --epochs may be more"
    )
    how.add_argument("--overwrite", action="store_true", help="begin anew where there is a --checkpoint")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to (%(default)s)")
    said = train.add_argument_group("what is said")
    said.add_argument(
        "--log", metavar="PATH", help="each epoch's figures as it ends: a .csv or .json, or a folder for TensorBoard"
    )
    said.add_argument("--history", metavar="FILE", help="all of them at the end: .csv or .json")
    said.add_argument("--picture", metavar="FILE", help="the same drawn: .png, .svg or .pdf")
    said.add_argument(
        "--inspect",
        action="store_true",
        help="look at the layers in a batch of each epoch (gates, norms, gradients by steps back): MODEL-inspect/ gets "
        "report.html, and events for TensorBoard where it is installed",
    )
    said.add_argument("--quiet", action="store_true", help="no progress bar")


def train(args: argparse.Namespace) -> int:
    """Train on a file, and write the network; or say what is understood of it."""
    name = kind_of(args)
    module = KINDS[name]
    _check_used(args, name)
    if args.dry_run:
        job = module.read(args)
        show(args, {"understood": job.described}, job.understood)
        return 0
    needs_torch(args)
    output = _checked_output(args)
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes
    with locked(output if first else None):
        return _train(args, module, output, first)


def _train(args: argparse.Namespace, module: ModuleType, output: Path, first: bool) -> int:
    """Train on a file, and write the network to `output`, as the `first` of several processes."""
    folder = _inspect_folder(output, args.resume) if args.inspect else None
    job = module.read(args)
    options = RunOptions(
        **_chosen(args, job, ("validation",)),
        checkpoint=args.checkpoint,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
        device=args.device,
        inspect=args.inspect,
        events=folder,
        threads=args.threads,
        log=args.log,
    )
    own = Own(init=None if args.init is None else found(args.init))
    settings, architecture = _settings(args, job), _architecture(args, job)
    if first and not args.json:
        print("\n".join(job.understood), flush=True)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        result = job.fit(architecture, settings, options, own)
    if result.rank:
        return 0
    _save(result.network, output)
    report, lines = _report(job, result, output)
    failed = None
    try:
        job.write()
        if args.history and result.history:
            history.write(args.history, result.history)
        if args.picture and result.history:
            history.draw(args.picture, result.history, result.fit.best)
        if folder is not None:
            report["inspect"] = _inspected(result, output, folder)
            lines += _inspect_text(report["inspect"])
    except OSError as error:  # what was learned is said all the same
        failed = error
    show(args, report, [*lines, f"written to {output}"])
    if failed is not None:
        raise failed
    return 130 if result.fit.interrupted else 0


def kind_of(args: argparse.Namespace) -> str:
    """Return which kind of data a file is: by what is asked for, else by its suffix.

    Raises:
        UsageError: a suffix that is none's, or not of what is asked for.
    """
    suffix = Path(args.file).suffix.lower()
    if suffix not in SUFFIXES and args.task != "text":
        raise UsageError(f"{args.file}: expected a file that ends in one of {', '.join(SUFFIXES)}")
    if args.task == "forecast" and SUFFIXES[suffix] != "forecasts":
        tables = ", ".join(ending for ending, kind in SUFFIXES.items() if kind == "forecasts")
        raise UsageError(f"{args.file}: expected a table to forecast, a file that ends in one of {tables}")
    if args.task is not None:
        return TASKS[args.task]
    return "sequences" if args.label is not None else SUFFIXES[suffix]


def _check_used(args: argparse.Namespace, name: str) -> None:
    """Raise `UsageError` where an option is given that does nothing for this kind of data."""
    given = {dest for dest, value in vars(args).items() if value not in (None, False)}
    unused = [(dest, "") for dest in KINDS[name].UNUSED]
    unused += [(action.dest, kind) for kind, actions in args.owned.items() if kind != name for action in actions]
    for dest, kind in unused:
        if dest in given:
            more = f": it is for {kind}" if kind else ""
            raise UsageError(f"{args.file}: --{dest.replace('_', '-')} does nothing with {name}{more}")


def _checked_output(args: argparse.Namespace) -> Path:
    """Return where the network goes; all that is written at the end is checked now, not after the training."""
    if args.output is None:
        raise UsageError("expected -o MODEL, where the network goes, or --dry-run")
    output = with_suffix(args.output)
    if not output.parent.is_dir():
        raise UsageError(f"expected a folder {output.parent} to write to, found none")
    check_replaceable(output)
    if args.history is not None:
        history.check(args.history, history.FILES, "--history")
    if args.picture is not None:
        history.check(args.picture, history.PICTURES, "--picture")
    for flag in ("resume", "overwrite"):
        if getattr(args, flag) and args.checkpoint is None:
            raise UsageError(f"expected --checkpoint FILE to --{flag}")
    if args.resume and args.overwrite:
        raise UsageError("expected --resume, to go on from the checkpoint, or --overwrite, to begin anew, got both")
    if args.checkpoint is not None and os.path.realpath(args.checkpoint) == os.path.realpath(output):
        raise UsageError(f"--checkpoint and -o name the same file, {output}: the network would replace the checkpoint")
    return output


def _chosen(args: argparse.Namespace, job: Job, names: Iterable[str]) -> dict[str, Any]:
    """Return options as they are given, as the kind of data has them, or as all have."""
    defaults = {**DEFAULTS, **job.defaults}
    return {name: value if (value := getattr(args, name)) is not None else defaults[name] for name in names}


def _settings(args: argparse.Namespace, job: Job) -> Settings:
    chosen = _chosen(args, job, ("epochs", "batch", "lr", "patience", "noise", "offset"))
    return Settings(**chosen, clip=args.clip, seed=args.seed)


def _architecture(args: argparse.Namespace, job: Job) -> Architecture:
    chosen = _chosen(args, job, ("units", "dropout", "pooling"))
    return Architecture(**chosen, bidirectional=args.bidirectional, every_step=args.every_step, cell=args.cell)


def _save(network: Network, output: Path) -> None:
    """Write a network; where there is no room for it, among the temporary files, so that what was learned isn't lost.

    Raises:
        UsageError: it was written there.
        OSError: there is no room there either.
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
    """Return the folder for what is seen in a training, made and without the events of another one."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"train --inspect needs {error.name}: install cellstack[torch]") from None
    folder = output.with_name(f"{output.stem}-inspect")
    folder.mkdir(exist_ok=True)
    check_replaceable(folder / "report.html")
    if not resume and int(os.environ.get("RANK", "0")) == 0:
        for old in folder.glob(EVENTS):
            old.unlink()
    return folder


def _inspected(result: Any, output: Path, folder: Path) -> dict[str, Any]:
    """Write the report of what was seen; return where it is, and what was seen."""
    records = result.fit.records
    report = None
    if records:
        from cellstack.train.report import training_page

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
        return ["the layers weren't looked at: no epoch came to its end"]
    last = inspected["records"][-1]
    findings = [f"  - {sentence}" for sentence in last["findings"]]
    lines = [f"layers in epoch {last['epoch']}: {'what stands out' if findings else 'nothing stands out'}", *findings]
    shown = f"tensorboard --logdir {inspected['tensorboard']}"
    if inspected["tensorboard"] is None:
        shown = "no events were written, as TensorBoard isn't installed: pip install tensorboard"
    return [*lines, f"  {inspected['report']}", f"  {shown}"]


def _warn(message: Warning | str, *_: Any) -> None:
    """Print a warning as errors are printed: what it says, and not where in our code it arose."""
    print(f"cellstack train: warning: {message}", file=sys.stderr)


def _report(job: Job, result: Any, output: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what is said at the end, in plain values and as lines."""
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
    }
    lines = [repr(result.network), f"{fit.steps} steps in {fit.seconds:.1f} s, {_threads(fit)}", *fit.notes, *scored]
    if fit.checkpoint_error:
        lines.append(f"the last checkpoint could not be written: {fit.checkpoint_error}")
    return report, [*lines, result.sentence]


def _threads(fit: Any) -> str:
    """Say how many threads were used, and why."""
    used = f"on {fit.threads} thread{'s' * (fit.threads != 1)}"
    if len(fit.timed) < 2:
        return used
    each = " and ".join(f"{1000 * seconds:.2g} ms on {n}" for n, seconds in sorted(fit.timed.items()))
    return f"{used}, as a step took {each}"
