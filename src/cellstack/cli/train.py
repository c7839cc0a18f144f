"""`cellstack train`: its options, and what it says at the end."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from cellstack.cli.files import SUFFIX, is_csv, needs_torch, show, with_suffix
from cellstack.formats.files import check_replaceable, replacing
from cellstack.train.checks import UsageError
from cellstack.train.forecast import Recipe
from cellstack.train.settings import Architecture, RunOptions, Settings
from cellstack.train.table import Table, read_csv
from cellstack.train.ts import read_ts

EVENTS = "events.out.tfevents.*"  # files of TensorBoard's


def _widths(text: str) -> tuple[int, ...]:
    widths = tuple(int(part) for part in text.split(","))
    if min(widths) < 1:
        raise ValueError
    return widths


_widths.__name__ = "widths"  # what argparse calls it: invalid widths value: '48,x'


def add_arguments(train: argparse.ArgumentParser) -> None:
    """Add the options of `train` to its parser."""
    train.add_argument("file", metavar="FILE", help=".ts to classify or regress, .csv to forecast")
    train.add_argument("test", nargs="?", metavar="TEST", help=".ts to measure on, never trained on")
    train.add_argument("-o", "--output", required=True, metavar="MODEL", help=f"where to ({SUFFIX} is added)")
    data = train.add_argument_group("forecasts")
    data.add_argument("--target", help="column to forecast (default: the only column of numbers)")
    data.add_argument(
        "--inputs", metavar="A,B", help="further columns to look at (default: all of numbers; '' for none)"
    )
    data.add_argument("--horizon", type=int, metavar="N", help="steps to forecast (default: one season)")
    data.add_argument("--window", type=int, metavar="N", help="steps to look back (default: two seasons, at least 16)")
    data.add_argument(
        "--season", type=int, metavar="N", help="steps in a season (default: told by the dates; 1 for none)"
    )
    data.add_argument(
        "--test-share", type=float, default=0.2, metavar="P", help="last rows to measure on (%(default)s)"
    )
    model = train.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="of each layer (%(default)s)")
    model.add_argument("--units", type=_widths, metavar="N,N", help="widths, bottom first (48,48; forecasts 32)")
    model.add_argument("--bidirectional", action="store_true", help="read sequences from both ends")
    model.add_argument("--pooling", choices=("mean", "max", "last"), help="over time (mean; forecasts last)")
    model.add_argument(
        "--every-step", action="store_true", help="learn to answer after every step; for streams, with --pooling last"
    )
    model.add_argument("--dropout", type=float, default=0.3, metavar="P", help="after each layer (%(default)s)")
    how = train.add_argument_group("training")
    how.add_argument("--epochs", type=int, default=60, metavar="N", help="most passes over the data (%(default)s)")
    how.add_argument("--lr", type=float, metavar="X", help="Adam's rate at the start (5e-3; forecasts 1e-3)")
    how.add_argument(
        "--batch", type=int, default=16, metavar="N", help="examples in a step, all processes (%(default)s)"
    )
    how.add_argument("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm (%(default)s)")
    how.add_argument(
        "--patience", type=int, default=20, metavar="N", help="epochs without progress; 0: never stop early"
    )
    how.add_argument("--validation", type=float, default=0.15, metavar="P", help="share to validate on (%(default)s)")
    how.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="noise on inputs, in their scales (%(default)s)"
    )
    how.add_argument("--offset", type=float, default=0.0, metavar="X", help="noise, one draw a sequence (%(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="fixes every draw (%(default)s)")
    how.add_argument("--checkpoint", metavar="FILE", help="written after each epoch and on Ctrl-C")
    how.add_argument("--resume", action="store_true", help="go on from --checkpoint where there is one")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to (%(default)s)")
    how.add_argument(
        "--inspect",
        action="store_true",
        help="look at the layers in a batch of each epoch (gates, norms, gradients by steps back): MODEL-inspect/ gets "
        "report.html, and events for TensorBoard where it is installed",
    )
    how.add_argument("--quiet", action="store_true", help="no progress bar")


def train(args: argparse.Namespace) -> int:
    """Train on a file, and write the network."""
    needs_torch(args)
    from cellstack.train import workflow

    output = with_suffix(args.output)
    if not output.parent.is_dir():
        raise UsageError(f"expected a folder {output.parent} to write to, found none")
    check_replaceable(output)  # now, not after the training
    if args.resume and args.checkpoint is None:
        raise UsageError("expected --checkpoint FILE to --resume from")
    forecast, texts = is_csv(args.file), ()
    settings = Settings(
        epochs=args.epochs,
        batch=args.batch,
        lr=args.lr if args.lr is not None else 1e-3 if forecast else 5e-3,
        clip=args.clip,
        patience=args.patience,
        noise=args.noise,
        offset=args.offset,
        seed=args.seed,
    )
    architecture = Architecture(
        units=args.units or ((32,) if forecast else (48, 48)),
        bidirectional=args.bidirectional,
        dropout=args.dropout,
        pooling=args.pooling or ("last" if forecast else "mean"),
        every_step=args.every_step,
        cell=args.cell,
    )
    folder = _inspect_folder(output, args.resume) if args.inspect else None
    options = RunOptions(
        args.validation, args.checkpoint, args.resume, not args.quiet, args.device, args.inspect, folder
    )
    if forecast:
        if args.test is not None:
            raise UsageError("expected one CSV file: its last rows are what is measured on, see --test-share")
        table = read_csv(args.file)
        texts = table.texts
        recipe = _recipe(args, table)
        fitted = partial(workflow.train_forecast, table, recipe, architecture, settings, options, args.test_share)
    else:
        for name in ("target", "inputs", "horizon", "window", "season"):
            if getattr(args, name) is not None:
                raise UsageError(f"{args.file}: expected --{name} with a .csv file alone: it is for forecasts")
        training = read_ts(args.file)
        test = None if args.test is None else read_ts(args.test, training.labels)
        fitted = partial(workflow.train_sequences, training, test, architecture, settings, options)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        outcome = fitted()
    if outcome.rank:
        return 0
    outcome.network.save(output)
    report = _report(outcome, output) | {"left_out": texts}
    if folder is not None:
        report["inspect"] = _inspected(outcome, output, folder)
    show(args, report, _train_text(outcome, report))
    return 130 if outcome.fit.interrupted else 0


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


def _inspected(outcome: Any, output: Path, folder: Path) -> dict[str, Any]:
    """Write the report of what was seen; return where it is, and what was seen."""
    records = outcome.fit.records
    report = None
    if records:
        from cellstack.train.report import training_page

        unit = "nats" if outcome.network.metadata["task"] == "classify" else "squared standard deviations"
        with replacing(folder / "report.html") as file:
            file.write(training_page(output.stem, outcome.fit.history, records, unit).encode())
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
    found = [f"  - {sentence}" for sentence in last["findings"]]
    lines = [f"layers in epoch {last['epoch']}: {'what stands out' if found else 'nothing stands out'}", *found]
    shown = f"tensorboard --logdir {inspected['tensorboard']}"
    if inspected["tensorboard"] is None:
        shown = "no events were written, as TensorBoard isn't installed: pip install tensorboard"
    return [*lines, f"  {inspected['report']}", f"  {shown}"]


def _warn(message: Warning | str, *_: Any) -> None:
    """Print a warning as errors are printed: what it says, and not where in our code it arose."""
    print(f"cellstack train: warning: {message}", file=sys.stderr)


def _recipe(args: argparse.Namespace, table: Table) -> Recipe:
    names = list(table.columns)
    if args.target is None and len(names) > 1:
        raise UsageError(f"expected --target, one of {', '.join(names)}")
    target = args.target or names[0]
    if args.inputs is None:
        inputs = tuple(name for name in names if name != target)
    else:
        inputs = tuple(name.strip() for name in args.inputs.split(",") if name.strip())
    season = args.season if args.season is not None else table.spacing.season if table.spacing else 1
    horizon = args.horizon if args.horizon is not None else season
    window = args.window if args.window is not None else max(2 * season, 16)
    return Recipe(target, inputs, horizon, window, season)


def _report(outcome: Any, output: Path) -> dict[str, Any]:
    fit = outcome.fit
    report = {
        "model": str(output),
        "task": outcome.network.metadata["task"],
        "parameters": sum(parameter.numel() for parameter in outcome.model.parameters()),
        "epochs": len(fit.history),
        "best": fit.best,
        "steps": fit.steps,
        "seconds": round(fit.seconds, 3),
        "interrupted": fit.interrupted,
        "checkpoint_error": fit.checkpoint_error,
    }
    scores = {name: value for name, value in outcome.scores.items() if name not in ("answers", "predicted")}
    return report | {"test": scores, "history": fit.history}


def _train_text(outcome: Any, report: dict[str, Any]) -> list[str]:
    lines = [repr(outcome.network)]
    ended = "stopped by Ctrl-C after" if report["interrupted"] else "trained for"
    lines.append(f"{ended} {report['epochs']} epochs, {report['steps']} steps, {report['seconds']:.1f} s")
    if report["best"]:
        lines.append("best " + "  ".join(f"{name} {value:.6g}" for name, value in report["best"].items()))
    scores = report["test"]
    if "seasonal_naive" in scores:
        ours, naive = scores["model"], scores["seasonal_naive"]
        lines.append(f"{'test, ' + str(scores['origins']) + ' forecasts':<24} {'MAE':>9} {'RMSE':>9}")
        rows = {"seasonal-naive": naive, "seasonal-naive + drift": scores["seasonal_drift"], "this model": ours}
        lines += [f"  {name:<22} {errors['mae']:>9.4f} {errors['rmse']:>9.4f}" for name, errors in rows.items()]
        less = [1 - ours[name] / naive[name] if naive[name] else 0.0 for name in ("mae", "rmse")]
        lines.append(f"  {'less than naive by':<22} {less[0]:>9.1%} {less[1]:>9.1%}")
    elif scores:
        lines += [f"test {name} {scores[name]:.4f}" for name in ("accuracy", "mae", "rmse") if name in scores]
    if report["checkpoint_error"]:
        lines.append(f"the last checkpoint could not be written: {report['checkpoint_error']}")
    if report["left_out"]:
        lines.append(f"left out, as they hold no numbers: {', '.join(report['left_out'])}")
    if "inspect" in report:
        lines += _inspect_text(report["inspect"])
    return [*lines, f"written to {report['model']}"]
