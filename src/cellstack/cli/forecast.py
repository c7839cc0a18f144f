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
from cellstack.formats.files import check_replaceable, replacing
from cellstack.train.checks import UsageError
from cellstack.train.forecasting.backtest import Backtest
from cellstack.train.forecasting.parts import OriginParts
from cellstack.train.forecasting.plan import planned, takes_long, understood
from cellstack.train.forecasting.plot import backtest_panels
from cellstack.train.forecasting.prepare import describe, prepared, refit_epochs
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.windows import Windows
from cellstack.train.history import Panel
from cellstack.train.options import Architecture, FitOptions, ForecastOptions, record_of
from cellstack.train.tables.table import READING, Table, read_table


@dataclass
class ForecastJob(Job):
    """A table to forecast."""

    table: Table
    request: ForecastOptions
    recipe: Recipe
    forecasts: str | None
    understood: list[str]
    described: dict[str, Any]
    given: dict[str, Any]
    test: Backtest | None = None
    ready: tuple[Windows, OriginParts] | None = None

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come; prepares the data for it, and measures how long that takes."""
        started = time.perf_counter()
        self.ready = prepared(self.table, self.recipe, self.request, options.validation, self.given["test"])
        self.others = 2 * (time.perf_counter() - started)  # smoothing is fitted again with the validation part
        return describe(*self.ready, architecture, options)

    @property
    def validates(self) -> bool:
        """See `Job`."""
        return self.ready is not None and len(self.ready[1].validation) > 0

    def fits(self, options: FitOptions) -> list[tuple[int, int, bool]]:
        """See `Job`. If the networks don't improve on the rule, there is no second fit."""
        assert self.ready is not None
        windows, cut = self.ready
        most = refit_epochs(options.epochs, takes_long(len(cut.training), int(windows.lengths[0])))
        return [*super().fits(options), *[(0, most, False)] * self.validates] * self.given["members"]

    def checkpoints(self, path: str) -> list[str]:
        """See `Job`."""
        return [f"{path}.1"]

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train on the table."""
        from cellstack.train.forecasting.training import train_forecast

        trained = train_forecast(self.table, self.request, architecture, options, self.given["test"], ready=self.ready)
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


def read(args: argparse.Namespace, given: dict[str, Any]) -> ForecastJob:
    """Read a table, and choose targets, inputs and windows.

    Raises:
        UsageError: a second file, or several numeric columns without --target.
        FormatError: the file can't be read as a table.
    """
    if args.test_file is not None:
        raise UsageError("expected one table: forecasts are tested on its last rows, see `test=…`")
    if args.forecasts is not None:
        check_replaceable(args.forecasts)
    table = read_table(args.file, **{name: given[name] for name in READING})
    request = record_of(ForecastOptions, {name: value for name, value in given.items() if value is not None})
    recipe, cut, usual, given["validation"] = planned(table, request, given["validation"], given["test"])
    given |= {name: value for name, value in usual.items() if given[name] is None}
    said = [as_flags(line, args) for line in understood(table, recipe, request, cut)]
    described = {"said": said, "rows": len(table), "series": len(table.ids), "recipe": recipe.to_json()}
    described |= {"ignored": table.ignored, "origins": [len(cut.training), len(cut.validation), len(cut.test)]}
    return ForecastJob(table, request, recipe, args.forecasts, said, described, given)


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
