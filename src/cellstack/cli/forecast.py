"""Forecasts on the command line: what `train` and `run` do with a table."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cli.tables import names, table_from
from cellstack.formats.files import check_replaceable, replacing
from cellstack.network import Network
from cellstack.train.checks import UsageError
from cellstack.train.forecast import predict
from cellstack.train.forecast.plan import Request
from cellstack.train.forecast.recipe import SCALES
from cellstack.train.table import Table, iso


def _numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(",") if part.strip())
    if min(found, default=1) < 1:
        raise ValueError
    return tuple(number for number in found if number > 1)  # 1 is none


def _levels(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in text.split(","))
    if not all(0.0 < level < 1.0 for level in found):
        raise ValueError
    return found


_numbers.__name__, _levels.__name__ = "steps", "quantiles"  # what argparse calls them


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train` that are for forecasts alone."""
    group = parser.add_argument_group("forecasts", "of a table's columns; what isn't given is told by the table")
    group.add_argument("--target", type=names, metavar="A,B", help="columns to forecast (the only one of numbers)")
    group.add_argument("--horizon", type=int, metavar="N", help="steps to forecast (one season)")
    group.add_argument(
        "--inputs", type=names, metavar="A,B", help="columns to look at up to now (all others; '' for none)"
    )
    group.add_argument("--known", type=names, metavar="A,B", help="columns that are known in advance: plans, prices")
    group.add_argument("--season", type=_numbers, metavar="N,N", help="steps in each season (found; 1 for none)")
    group.add_argument("--window", type=int, metavar="N", help="steps to look back (two seasons, from 16 to 168)")
    group.add_argument("--holidays", metavar="CC", default="", help="look at a country's holidays: US, or DE-BY")
    group.add_argument("--scale", choices=SCALES, help="unit of the values: their spread, or their level (tried out)")
    group.add_argument("--quantiles", type=_levels, metavar="Q,Q", default=(0.1, 0.9), help="to forecast (0.1,0.9)")
    group.add_argument(
        "--members", type=int, metavar="N", help="networks whose forecasts are averaged (3; 2 for many rows)"
    )
    group.add_argument(
        "--test-share", type=float, default=0.2, metavar="P", help="last rows to measure on (%(default)s)"
    )
    group.add_argument(
        "--forecasts", metavar="FILE", help="CSV that gets the forecasts of the test part beside what came"
    )


def request(args: argparse.Namespace) -> Request:
    """Return what the options of `add_options` ask for."""
    return Request(
        targets=args.target or (),
        horizon=args.horizon,
        window=args.window,
        seasons=args.season,
        inputs=args.inputs,
        known=args.known or (),
        country=args.holidays,
        scale=args.scale,
        quantiles=args.quantiles,
    )


def text_of(scores: dict[str, Any]) -> list[str]:
    """Return the errors of a model and its rivals as a table, best first, and a sentence that says who won."""
    lines: list[str] = []
    for target, found in scores["targets"].items():
        order = sorted(found, key=lambda name: (np.isnan(found[name]["mae"]), found[name]["mae"]))
        width = max(len("this model"), *map(len, order)) + 2
        head = f"test of {target}, {scores['origins']:,} forecasts"
        lines.append(f"{head:<{width + 2}} {'MAE':>10} {'RMSE':>10} {'MASE':>8}")
        for name in order:
            errors = found[name]
            shown = "this model" if name == "model" else name
            lines.append(f"  {shown:<{width}} {errors['mae']:>10.4g} {errors['rmse']:>10.4g} {errors['mase']:>8.3f}")
        ours = found["model"]
        rival = next((name for name in order if name != "model"), None)
        if rival is not None and found[rival]["mae"] > 0:
            share = ours["mae"] / found[rival]["mae"] - 1
            won = f"{-share:.1%} less than" if share < 0 else f"{share:.1%} more than"
            lines.append(
                f"  this model's mean absolute error is {won} that of the best of the others, {rival}"
                + ("" if share < 0 else ": the simpler way serves better here")
            )
        if "coverage" in ours:
            lines.append(
                f"  of what came, {ours['coverage']:.0%} lies within the interval that should hold {ours['interval']:.0%}"
            )
    return lines


def write_backtest(path: str, backtest: Any) -> None:
    """Write the forecasts of a backtest as CSV: a line for each step of each origin."""
    check_replaceable(path)
    with replacing(path) as file:
        import io

        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        write(text, backtest.forecasts, backtest)
        text.detach()


def write(file: IO[str], forecasts: predict.Forecasts, table: Table, actual: NDArray | None = None) -> None:
    """Write forecasts as CSV: series, date or step, each target and its quantiles, and what came where it is known."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header(forecasts, table, actual is not None))
    writer.writerows(rows(forecasts, table, actual))


def header(forecasts: predict.Forecasts, table: Table, actual: bool) -> list[str]:
    """Return the columns' names."""
    recipe = forecasts.recipe
    found = [*([table.id] if table.id else []), *(["origin"] if actual else []), table.date or "step"]
    for target in recipe.targets:
        found += [f"{target}_actual"] * actual + [target]
        found += [f"{target}_{level:g}" for level in recipe.quantiles if level != 0.5]
    return found


def rows(forecasts: predict.Forecasts, table: Table, actual: NDArray | None) -> Iterator[list[Any]]:
    """Return a line for each step of each origin."""
    recipe = forecasts.recipe
    outer = [n for n, level in enumerate(recipe.quantiles) if level != 0.5]
    for n, origin in enumerate(forecasts.origins):
        for k in range(recipe.horizon):
            row: list[Any] = [forecasts.ids[n]] if table.id else []
            if actual is not None:
                row.append(int(origin) if table.times is None else iso(table.times[origin]))
            row.append(k + 1 if forecasts.times is None else iso(forecasts.times[n, k]))
            for target in range(len(recipe.targets)):
                if actual is not None:
                    row.append(shown(actual[n, k, target]))
                row.append(shown(forecasts.median[n, k, target]))
                row += [shown(forecasts.values[n, k, target, q]) for q in outer]
            yield row


def shown(value: float) -> str:
    """Return a number as a cell, empty where it is missing."""
    return "" if np.isnan(value) else f"{value:.6g}"


def run(args: argparse.Namespace, net: Network, path: str) -> tuple[predict.Forecasts, Table]:
    """Forecast what comes after a table's last rows, or after `--origin`.

    Raises:
        UsageError: see `predict.forecast`; an origin that isn't in the table.
    """
    reading = net.metadata.get("reading")
    table = table_from(args, args.file, reading if isinstance(reading, dict) else None)
    recipe, _ = predict.trained(net, path)
    origins = None if args.origin is None else origins_at(table, args.origin, recipe.horizon)
    return predict.forecast(net, table, path, origins, args.threads), table


def origins_at(table: Table, text: str, horizon: int) -> NDArray[np.int64]:
    """Return the row at a date, or of a number, of each series that has it.

    Raises:
        UsageError: no series does, or it isn't a date.
    """
    found = []
    if table.times is None:
        if not text.isdecimal() or not int(text) >= 1:
            raise UsageError(f"expected --origin to be the number of a row, as {table.path} has no dates, got {text!r}")
        for series in range(len(table.ids)):
            rows = table.rows(series)
            if rows.start + int(text) <= rows.stop:
                found.append(rows.start + int(text) - 1)
    else:
        try:
            time = np.datetime64(text).astype(table.times.dtype)
        except ValueError:
            raise UsageError(
                f"expected --origin to be a date such as 2020-01-31 or 2020-01-31T12:00, got {text!r}"
            ) from None
        found = np.flatnonzero(table.times == time).tolist()
    if not found:
        span = (
            f", which is from {iso(table.times.min())} to {iso(table.times.max())}" if table.times is not None else ""
        )
        raise UsageError(f"expected --origin to be a row of {table.path}{span}, got {text}")
    return np.array(found, np.int64)
