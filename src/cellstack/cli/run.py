"""`cellstack run`: run a network over a file."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cellstack.cli import forecast
from cellstack.cli.files import load_model, load_options, run_any, show, with_weights
from cellstack.cli.tables import SEQUENCES, given, merged, only_one
from cellstack.cli.text import measure
from cellstack.network import Network
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES, read_sequences
from cellstack.train.data.sequences import Sequences
from cellstack.train.history import cell


def run(args: argparse.Namespace) -> int:
    """Classify, predict or forecast with a network trained here; run any other network."""
    net, path = load_model(args.model, load_options(args))
    net = with_weights(net, args.weights)
    if net.metadata.get("task") != "forecast":
        forecast.refuse_options(args, path)
    if net.metadata.get("task") is None:
        return run_any(args, net)
    if args.columns is not None:
        raise UsageError(f"--columns has no effect: {path} uses the columns that it was trained on, by name")
    if args.file == "-":
        with TemporaryDirectory() as folder:
            args.file = str(Path(folder) / f"standard-input{'.txt' if net.metadata['task'] == 'text' else '.csv'}")
            Path(args.file).write_bytes(sys.stdin.buffer.read())
            return _as_trained(args, net, path)
    return _as_trained(args, net, path)


def _as_trained(args: argparse.Namespace, net: Network, path: str) -> int:
    """Predict with a network that was trained here."""
    if net.metadata["task"] == "forecast":
        return _forecast(args, net, path)
    if net.metadata["task"] == "text":
        return measure(args, net, path)
    task = predict.trained(net, path)
    named = {"id": only_one(args.id), "time": args.time, "label": args.label}
    data = read_as_trained(args.file, net, path, task, **named, reading=given(args, SEQUENCES))
    result = predict.sequences(net, data, args.file, args.threads)
    if args.json:
        show(args, {"ids": list(data.ids), **result} if data.ids else result, [])
        return 0
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_header(task, result, data))
    writer.writerows([_cell(value) for value in row] for row in _rows(task, result, data))
    for name in ("accuracy", "mae", "rmse"):
        if name in result:
            print(f"{name} {result[name]:.4f}", file=sys.stderr)
    return 0


def _forecast(args: argparse.Namespace, net: Network, path: str) -> int:
    """Forecast the steps after a table's last rows."""
    found, table = forecast.run(args, net, path)
    if not args.json:
        forecast.write(sys.stdout, found, table)
        return 0
    names, quantiles = found.recipe.targets, found.recipe.quantiles
    when, every = forecast.dates_of(found, table), []
    for n in range(len(found.origins)):
        one = {"series": found.ids[n]} if table.id else {}
        if when is not None:
            one |= {"origin": when[0][n], "dates": when[1][n]}
        for k, target in enumerate(names):
            levels = {f"{level:g}": found.values[n, :, k, q] for q, level in enumerate(quantiles)}
            one |= {target: {"forecast": found.median[n, :, k], "quantiles": levels}}
        every.append(one)
    show(args, {"targets": names, "horizon": found.recipe.horizon, "forecasts": every}, [])
    return 0


def read_as_trained(
    file: str,
    net: Network,
    path: str,
    task: predict.Trained,
    id: str | None = None,
    time: str | None = None,
    label: str | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Sequences:
    """Read a file's sequences; a table with the columns that the network was trained on.

    Args:
        file: the file; a table may lack the column of the true values.
        net, path, task: the network, its file, and what it was trained for.
        id, time, label: columns of a table; None = as in training.
        reading: options of reading a table, of `SEQUENCES`; the others are as in training.

    Raises:
        UsageError: columns for a file that isn't a table, or a table for a network that wasn't trained on one.
        FormatError: the content doesn't match the suffix.
    """
    asked = {"id": id, "time": time, "label": label, **(reading or {})}
    known: dict[str, Any] = {"task": task.task, "labels": task.labels or None, "per_step": task.per_step or None}
    if Path(file).suffix.lower() not in TABLES:
        for name, column in asked.items():
            if column is not None:
                raise UsageError(f"{file}: --{name.replace('_', '-')} applies only to tables")
        return read_sequences(file, **known)
    table, columns = net.metadata.get("table") or {}, net.metadata.get("columns") or None
    if columns is None:
        raise UsageError(f"{file}: expected a .ts or .npz file, because {path} wasn't trained on a table")
    how = merged({name: table.get(name) for name in SEQUENCES}, reading or {})
    named = {name: asked[name] or table.get(name) for name in ("id", "time", "label")}
    y = named.pop("label")
    return read_sequences(file, y, features=columns, optional=label is None, **named, **known, **how)


def _header(task: predict.Trained, result: dict[str, Any], data: Sequences) -> list[str]:
    outputs = result["answers"][0].shape[-1]
    many = not task.labels and outputs > 1
    predicted = [f"predicted_{n}" for n in range(1, outputs + 1)] if many else ["predicted"]
    first = [str(data.table.get("id") or "sequence"), *(["step"] if task.per_step else [])]
    return [cell(name) for name in (*first, *predicted, *(f"p_{label}" for label in task.labels))]


def _rows(task: predict.Trained, result: dict[str, Any], data: Sequences) -> Iterator[list[Any]]:
    """Yield a line for each sequence, or for each step."""
    for n, (predicted, answers) in enumerate(zip(result["predicted"], result["answers"], strict=True)):
        steps = zip(predicted, answers, strict=True) if task.per_step else [(predicted, answers)]
        for step, (one, answer) in enumerate(steps):
            first = [data.ids[n] if data.ids else n, *([step] if task.per_step else [])]
            yield [*first, *(one if isinstance(one, list) else [one]), *(answer if task.labels else [])]


def _cell(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return forecast.shown(float(value))
    return cell(value)
