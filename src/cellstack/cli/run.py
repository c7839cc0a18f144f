"""`cellstack run`: what a network answers to a file."""

from __future__ import annotations

import argparse
import csv
import sys
from typing import Any

import numpy as np

from cellstack.cli.files import is_csv, load_model, run_any, show
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.table import read_table
from cellstack.train.ts import read_ts


def run(args: argparse.Namespace) -> int:
    """Predict what a file holds, or comes after it; or run any network."""
    net, path = load_model(args.model)
    if net.metadata.get("task") is None:
        return run_any(args, net)
    task = predict.trained(net, path)
    if task.recipe is not None:
        if not is_csv(args.file):
            raise UsageError(f"{args.file}: expected a .csv file, as {path} forecasts")
        result = predict.forecast(net, read_table(args.file), args.file, args.threads)
        count = range(1, task.recipe.horizon + 1)
        header, rows = ["date", task.recipe.target], zip(result["dates"] or count, result["forecast"], strict=True)
    else:
        if is_csv(args.file):
            raise UsageError(f"{args.file}: expected a .ts file, as {path} takes sequences")
        data = read_ts(args.file, task.labels or None)
        result = predict.sequences(net, data, args.file, args.threads)
        header = ["sequence", "predicted", *(f"p_{label}" for label in task.labels)]
        extra = result["answers"] if task.labels else np.empty((len(data.x), 0))
        rows = ((n, result["predicted"][n], *extra[n]) for n in range(len(data.x)))
    if args.json:
        show(args, result, [])
    else:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
        for name in ("accuracy", "mae", "rmse"):
            if name in result:
                print(f"{name} {result[name]:.4f}", file=sys.stderr)
    return 0


def _cell(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value
