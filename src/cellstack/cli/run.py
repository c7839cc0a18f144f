"""`cellstack run`: run a network over a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cellstack import Network
from cellstack.cli.arguments import as_flags
from cellstack.cli.files import load_model, load_options, run_any, show, with_weights, write_csv
from cellstack.cli.tables import given_options, only_one
from cellstack.cli.text import measure
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES_ONLY
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.predict import forecasts_after
from cellstack.train.forecasting.tirex import TiRexForecaster
from cellstack.train.forecasting.tirex_tables import forecasts_of_table
from cellstack.train.history import PICTURES, check, save
from cellstack.train.predict import as_trained, sequences
from cellstack.train.predictions import Predictions
from cellstack.train.tables.table import READING

TIREX = ("target", "inputs", "known", "horizon")
MOST_CLASSES = 10  # for which the confusion matrix is printed


def run(args: argparse.Namespace) -> int:
    """Classify, predict or forecast with a network trained by cellstack; run any other network."""
    if args.file == "-" and sys.stdin is None:  # closed by the shell
        raise UsageError("expected standard input to be open")
    net, path = load_model(args.model, load_options(args))
    net = with_weights(net, args.weights)
    tirex = args.target is not None and "tirex" in net.metadata
    others = {"origin": "forecasts", "picture": "forecasts", **dict.fromkeys(TIREX, "a TiRex, with --target")}
    for option, what in others.items():
        applies = tirex or (net.task == "forecast" and option not in TIREX)
        if not applies and getattr(args, option) is not None:
            raise UsageError(f"--{option} applies only to {what}: {path} wasn't trained to forecast")
    if tirex and args.horizon is None:
        raise UsageError("expected --horizon, the number of steps to forecast, with --target")
    if net.metadata.get("task") is None and not tirex:
        return run_any(args, net)
    if args.columns is not None:
        raise UsageError(f"--columns has no effect: {path} uses the columns that it was trained on, by name")
    if args.file == "-":
        with TemporaryDirectory() as folder:
            args.file = str(Path(folder) / f"standard-input{'.txt' if net.task == 'text' else '.csv'}")
            Path(args.file).write_bytes(sys.stdin.buffer.read())
            return _as_trained(args, net, path)
    return _as_trained(args, net, path)


def _as_trained(args: argparse.Namespace, net: Network, path: str) -> int:
    """Predict with a network trained by cellstack."""
    if net.task == "text":
        return measure(args, net, path)
    if net.task == "forecast" or args.target is not None:
        if args.picture is not None:
            check(args.picture, PICTURES, "--picture")
        how = given_options(args, READING)
        if args.target is None:
            found, notes = forecasts_after(net, args.file, path, args.origin, args.threads, **how)
        else:
            how |= given_options(args, ("target", "horizon", "inputs", "known", "origin", "threads"))
            found, notes = forecasts_of_table(TiRexForecaster(net), args.file, **how)
        for note in notes:
            print(f"cellstack run: warning: {as_flags(note, args)}", file=sys.stderr)
        if args.picture is not None:
            save(args.picture, found.plot())
        return _show(args, found.columns(), _forecasts(found))
    how = {name: only_one(name, getattr(args, name)) for name in ("id", "time")} | given_options(args, TABLES_ONLY)
    found = sequences(net, as_trained(net, args.file, args.y, path, **how), args.file, args.threads)
    report: dict[str, Any] = {"ids": list(found.ids)} if found.ids else {}
    report["predicted"] = found.predicted
    if found.labels:
        report |= {"probabilities": found.probabilities, "labels": list(found.labels)}
    _show(args, found.columns(), report | found.scores)
    for name in ("accuracy", "mae", "rmse"):
        if name in found.scores and not args.json:
            print(f"{name} {found.scores[name]:.4f}", file=sys.stderr)
    if "confusion" in found.scores and len(found.labels) <= MOST_CLASSES and not args.json:
        print("\n".join(_confusion(found)), file=sys.stderr)
    return 0


def _confusion(found: Predictions) -> list[str]:
    """Return the confusion matrix as lines, with the classes' names."""
    names, counts = [str(label) for label in found.labels], found.scores["confusion"]
    width = max(*map(len, names), len(str(counts.max())))
    rows = zip(names, counts.tolist(), strict=True)
    lines = ["  ".join(str(cell).rjust(width) for cell in (name, *row)) for name, row in rows]
    return [
        "confusion: rows are true classes, columns predicted ones",
        "  ".join(n.rjust(width) for n in ("", *names)),
        *lines,
    ]


def _show(args: argparse.Namespace, columns: dict[str, Any], report: dict[str, Any]) -> int:
    """Print columns as CSV, or with --json the report."""
    if args.json:
        show(args, report, [])
    else:
        write_csv(sys.stdout, columns)
    return 0


def _forecasts(found: Forecasts) -> dict[str, Any]:
    """Return forecasts as the report of --json."""
    recipe, dates, every = found.recipe, found.dates, []
    actual, scores = found.actual, found.scores
    for n in range(len(found.origins)):
        one = {"series": found.ids[n]} if found.table.id else {}
        if dates is not None:
            one |= {name: np.datetime_as_string(part[n]) for name, part in zip(("origin", "dates"), dates, strict=True)}
        for k, target in enumerate(recipe.targets):
            levels = {f"{level:g}": found.values[n, :, k, q] for q, level in enumerate(recipe.quantiles)}
            one |= {target: {"forecast": found.median[n, :, k], "quantiles": levels}}
            if target in scores:
                one[target]["actual"] = actual[n, :, k]
        every.append(one)
    return {"targets": recipe.targets, "horizon": recipe.horizon, "forecasts": every, "scores": scores}
