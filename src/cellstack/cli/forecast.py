"""Forecasts on the command line: `train` and `run` on a table."""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstack.cli.arguments import as_flags
from cellstack.cli.files import write_csv
from cellstack.cli.jobs import Job
from cellstack.cli.tables import names, table_from
from cellstack.formats.files import check_replaceable, replacing
from cellstack.train.checks import UsageError
from cellstack.train.forecasting.backtest import Backtest
from cellstack.train.forecasting.parts import Parts
from cellstack.train.forecasting.plan import Request, planned, takes_long, understood
from cellstack.train.forecasting.plot import backtest_panels
from cellstack.train.forecasting.prepare import Build, describe, prepared, refit_epochs
from cellstack.train.forecasting.recipe import SCALES, Recipe
from cellstack.train.forecasting.windows import Windows
from cellstack.train.history import Panel
from cellstack.train.settings import Architecture, FitOptions
from cellstack.train.tables.table import Table

UNUSED = ("init", "bidirectional", "pooling", "every_step", "noise", "offset")
TEST_SHARE, QUANTILES = 0.2, (0.1, 0.9)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0,)
    if min(found, default=1) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of steps such as 24,168, or 1 for no season, got {text!r}")
    return tuple(number for number in found if number > 1)  # 1 means no season


def _levels(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (0.0,)
    if not all(0.0 < level < 1.0 for level in found):
        raise argparse.ArgumentTypeError(f"expected numbers between 0 and 1 such as 0.1,0.9, got {text!r}")
    return found


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
            "--season",
            dest="seasons",
            type=_numbers,
            metavar="N,N",
            help="steps in each season; 1 for none (default: detected)",
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
            "--test-share", type=float, metavar="P", help=f"share of the last rows to test on (default: {TEST_SHARE})"
        ),
        group.add_argument(
            "--forecasts",
            metavar="FILE",
            help="write forecasts and actual values of the test part to a CSV; names that a spreadsheet would run as a "
            "formula are prefixed with '",
        ),
    ]


@dataclass
class ForecastJob(Job):
    """A table to forecast."""

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
    ready: tuple[Windows, Parts] | None = None

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come; prepares the data for it, and measures how long that takes."""
        started = time.perf_counter()
        self.ready = prepared(self.table, self.recipe, self.request, options.validation, self.share)
        self.others = 2 * (time.perf_counter() - started)  # smoothing is fitted again with the validation part
        return describe(*self.ready, self._build(architecture), options)

    @property
    def validates(self) -> bool:
        """See `Job`."""
        return self.ready is not None and len(self.ready[1].validation) > 0

    def fits(self, options: FitOptions) -> list[tuple[int, int, bool]]:
        """See `Job`. If the networks don't improve on the rule, there is no second fit."""
        assert self.ready is not None
        windows, cut = self.ready
        most = refit_epochs(options.epochs, takes_long(len(cut.training), int(windows.lengths[0])))
        return [*super().fits(options), *[(0, most, False)] * self.validates] * self.members

    def checkpoints(self, path: str) -> list[str]:
        """See `Job`."""
        return [f"{path}.1"]

    def _build(self, architecture: Architecture) -> Build:
        return Build(architecture.units, architecture.cell, architecture.dropout, self.members, architecture.heads)

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train on the table."""
        from cellstack.train.forecasting.training import train_forecast

        build = self._build(architecture)
        trained = train_forecast(self.table, self.request, build, options, self.share, ready=self.ready)
        self.test = trained.test
        return trained.result

    def panels(self, result: Any) -> list[Panel]:
        """Return functions that draw the test part, and the error by horizon, for --picture."""
        return [] if self.test is None else backtest_panels(self.test)

    def write(self) -> None:
        """Write the forecasts of the test part if --forecasts is given."""
        if self.forecasts is not None and self.test is not None:
            with replacing(self.forecasts) as file:
                text = io.StringIO(newline="")
                write_csv(text, self.test.forecasts.columns())
                file.write(text.getvalue().encode())

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the errors of the model and of its baselines on the test part."""
        return result.scores, text_of(result.scores) if result.scores else []


def read(args: argparse.Namespace) -> ForecastJob:
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
        seasons=args.seasons,
        inputs=args.inputs,
        known=args.known or (),
        holidays=args.holidays or "",
        scale=args.scale,
        quantiles=args.quantiles or QUANTILES,
    )
    validation = FitOptions.validation if args.validation is None else args.validation
    recipe, cut, usual, _ = planned(table, request, validation, share)
    said = [as_flags(line, args) for line in understood(table, recipe, request, cut)]
    described = {"said": said, "rows": len(table), "series": len(table.ids), "recipe": recipe.to_json()}
    described |= {"ignored": table.ignored, "origins": [len(cut.training), len(cut.validation), len(cut.test)]}
    members = usual.pop("members") if args.members is None else args.members
    return ForecastJob(table, request, recipe, members, share, args.forecasts, said, described, usual)


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
