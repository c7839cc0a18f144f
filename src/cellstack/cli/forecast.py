"""Forecasts on the command line: `train` and `run` on a table."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cli.tables import names, table_from
from cellstack.formats.files import check_replaceable, replacing
from cellstack.network import Network
from cellstack.train.checks import UsageError
from cellstack.train.forecasting import predict
from cellstack.train.forecasting.backtest import Backtest
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.plan import Request, planned, understood
from cellstack.train.forecasting.recipe import SCALES, Recipe
from cellstack.train.history import cell
from cellstack.train.settings import Architecture, Own, RunOptions, Settings
from cellstack.train.tables.table import Table, date_texts, date_unit, iso

UNUSED = ("init", "bidirectional", "pooling", "every_step", "noise", "offset")
TEST_SHARE, QUANTILES = 0.2, (0.1, 0.9)


def _numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(",") if part.strip())
    if min(found, default=1) < 1:
        raise ValueError
    return tuple(number for number in found if number > 1)  # 1 means no season


def _levels(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in text.split(","))
    if not all(0.0 < level < 1.0 for level in found):
        raise ValueError
    return found


_numbers.__name__, _levels.__name__ = "steps", "quantiles"  # the names in argparse's messages


def add_arguments(train: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the options of `train` that apply to forecasts only, and return them."""
    group = train.add_argument_group("forecasts")
    return [
        train.add_argument(
            "--target", type=names, metavar="A,B", help="forecasts: columns to forecast (default: the only numeric one)"
        ),
        train.add_argument(
            "--horizon", type=int, metavar="N", help="forecasts: steps to forecast (default: one season)"
        ),
        group.add_argument(
            "--inputs", type=names, metavar="A,B", help="input columns; '' for none (default: all others)"
        ),
        group.add_argument(
            "--known", type=names, metavar="A,B", help="columns whose future values are known, such as prices"
        ),
        group.add_argument(
            "--season", type=_numbers, metavar="N,N", help="steps in each season; 1 for none (default: detected)"
        ),
        group.add_argument(
            "--window", type=int, metavar="N", help="input steps (default: two seasons, from 16 to 168)"
        ),
        group.add_argument(
            "--holidays", metavar="CC", help="use a country's holidays as an input, such as US or DE-BY"
        ),
        group.add_argument(
            "--scale",
            choices=SCALES,
            help="divide values by their spread or by their level (default: the one with which smoothing fits better)",
        ),
        group.add_argument(
            "--quantiles", type=_levels, metavar="Q,Q", help="quantiles in addition to the median (default: 0.1,0.9)"
        ),
        group.add_argument(
            "--members", type=int, metavar="N", help="networks to average (default: 3; for many rows 2)"
        ),
        group.add_argument(
            "--test-share", type=float, metavar="P", help=f"share of last rows to test on (default: {TEST_SHARE})"
        ),
        group.add_argument(
            "--forecasts",
            metavar="FILE",
            help="write forecasts and actual values of the test part to a CSV; names that a spreadsheet would run as a "
            "formula are prefixed with '",
        ),
    ]


@dataclass
class Job:
    """A table to forecast: see `cli.train.Job`."""

    table: Table
    request: Request
    recipe: Recipe
    members: int
    share: float
    forecasts: str | None
    understood: list[str]
    described: dict[str, Any]
    defaults: dict[str, Any]
    test: Backtest | None = None

    def fit(self, architecture: Architecture, settings: Settings, options: RunOptions, own: Own) -> Any:
        """Train on the table."""
        from cellstack.train.forecasting.training import Build, train_forecast

        build = Build(architecture.units, architecture.cell, architecture.dropout, self.members)
        trained = train_forecast(self.table, self.request, build, settings, options, self.share, recipe=self.recipe)
        self.test = trained.test
        return trained.result

    def write(self) -> None:
        """Write the forecasts of the test part if --forecasts is given."""
        if self.forecasts is not None and self.test is not None:
            with replacing(self.forecasts) as file:
                text = io.StringIO(newline="")
                write(text, self.test.forecasts, self.table, self.test.actual)
                file.write(text.getvalue().encode())

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the errors of the model and of its baselines on the test part."""
        return result.scores, text_of(result.scores) if result.scores else []


def read(args: argparse.Namespace) -> Job:
    """Read a table, and choose targets, inputs and windows.

    Raises:
        UsageError: a second file, or several numeric columns without --target.
        FormatError: the file can't be read as a table.
    """
    if args.test is not None:
        raise UsageError("expected one table: forecasts are tested on its last rows, see --test-share")
    if args.forecasts is not None:
        check_replaceable(args.forecasts)
    share = TEST_SHARE if args.test_share is None else args.test_share
    table = table_from(args, args.file)
    request = Request(
        targets=args.target or (),
        horizon=args.horizon,
        window=args.window,
        seasons=args.season,
        inputs=args.inputs,
        known=args.known or (),
        country=args.holidays or "",
        scale=args.scale,
        quantiles=args.quantiles or QUANTILES,
    )
    validation = RunOptions.validation if args.validation is None else args.validation
    recipe, cut, usual, _ = planned(table, request, validation, share)
    said = understood(table, recipe, request, cut)
    described = {"said": said, "rows": len(table), "series": len(table.ids), "recipe": recipe.to_json()}
    described |= {"ignored": table.ignored, "origins": [len(cut.training), len(cut.validation), len(cut.test)]}
    members = usual.pop("members") if args.members is None else args.members
    return Job(table, request, recipe, members, share, args.forecasts, said, described, usual)


def text_of(scores: dict[str, Any]) -> list[str]:
    """Return the errors of a model and its baselines as a table, best first, and a sentence that compares them."""
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
        baseline = next((name for name in order if name != "model"), None)
        if baseline is not None and found[baseline]["mae"] > 0:
            share = ours["mae"] / found[baseline]["mae"] - 1
            compared, advice = f"{share:.1%} higher than", ": the baseline is better on this table"
            if abs(share) < 0.0005:  # 0.0% when rounded to a tenth of a percent
                compared, advice = "equal to", ": the baseline is as good on this table"
            elif share < 0:
                compared, advice = f"{-share:.1%} lower than", ""
            lines.append(
                f"  this model's mean absolute error is {compared} that of the best baseline, {baseline}{advice}"
            )
        if "coverage" in ours:
            lines.append(
                f"  {ours['coverage']:.0%} of the actual values are in the {ours['interval']:.0%} prediction interval"
            )
    return lines


def write(file: IO[str], forecasts: Forecasts, table: Table, actual: NDArray | None = None) -> None:
    """Write forecasts as CSV: series, date or step, each target and its quantiles, and actual values where known.

    All dates have one form. Names that a spreadsheet would run as a formula are written as text, see `history.cell`.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header(forecasts, table, actual is not None))
    writer.writerows(rows(forecasts, table, actual))


def header(forecasts: Forecasts, table: Table, actual: bool) -> list[str]:
    """Return the columns' names."""
    recipe = forecasts.recipe
    found = [*([table.id] if table.id else []), *(["origin"] if actual else []), table.date or "step"]
    for target in recipe.targets:
        found += [f"{target}_actual"] * actual + [target]
        found += [f"{target}_{level:g}" for level in recipe.quantiles if level != 0.5]
    return list(map(cell, found))


def rows(forecasts: Forecasts, table: Table, actual: NDArray | None) -> Iterator[list[Any]]:
    """Return a line for each step of each origin."""
    recipe = forecasts.recipe
    outer = [n for n, level in enumerate(recipe.quantiles) if level != 0.5]
    begun, steps = dates_of(forecasts, table) or (forecasts.origins.tolist(), None)
    for n, origin in enumerate(begun):
        for k in range(recipe.horizon):
            row: list[Any] = [cell(forecasts.ids[n])] if table.id else []
            if actual is not None:
                row.append(origin)
            row.append(k + 1 if steps is None else steps[n][k])
            for target in range(len(recipe.targets)):
                if actual is not None:
                    row.append(shown(actual[n, k, target]))
                row.append(shown(forecasts.median[n, k, target]))
                row += [shown(forecasts.values[n, k, target, q]) for q in outer]
            yield row


def dates_of(forecasts: Forecasts, table: Table) -> tuple[list[str], list[list[str]]] | None:
    """Return the dates of the origins, and of the steps of each, all in one form; None without dates."""
    if table.times is None or forecasts.times is None:
        return None
    unit = date_unit(table.times, forecasts.times)
    return date_texts(table.times[forecasts.origins], unit), [date_texts(times, unit) for times in forecasts.times]


def shown(value: float) -> str:
    """Return a number as a cell, empty where it is missing."""
    return "" if np.isnan(value) else f"{value:.6g}"


def run(args: argparse.Namespace, net: Network, path: str) -> tuple[Forecasts, Table]:
    """Forecast the steps after a table's last rows, or after `--origin`.

    Raises:
        UsageError: see `predict.forecast`; or an origin that isn't in the table.
    """
    recipe, _ = predict.trained(net, path)
    table = table_from(args, args.file, predict.reading(net, path))
    origins = None if args.origin is None else origins_at(table, args.origin)
    found = predict.forecast(net, table, path, origins, args.threads)
    for line in predict.unknown(recipe, table, found.origins):
        print(f"cellstack run: warning: {line}", file=sys.stderr)
    return found, table


def origins_at(table: Table, text: str) -> NDArray[np.int64]:
    """Return the row with a date, or with a number from 1, in each series that has it.

    Raises:
        UsageError: no series has it, or `text` isn't a date.
    """
    found = []
    if table.times is None:
        if not text.isdecimal() or not int(text) >= 1:
            raise UsageError(f"expected --origin to be a row number, because {table.path} has no dates, got {text!r}")
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
        span = f", which covers {iso(table.times.min())} to {iso(table.times.max())}" if table.times is not None else ""
        raise UsageError(f"expected --origin to be a row of {table.path}{span}, got {text}")
    return np.array(found, np.int64)
