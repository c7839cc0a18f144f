"""`cellstack train` on a table whose rows are steps: what comes after them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from cellstack.train.checks import UsageError
from cellstack.train.forecast import Recipe
from cellstack.train.settings import Architecture, Own, RunOptions, Settings
from cellstack.train.table import Table, read_csv

DEFAULTS = {"units": (32,), "lr": 1e-3, "pooling": "last"}
UNUSED = ("init", "id")
TEST_SHARE = 0.2


def add_arguments(train: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the options for forecasts to the parser, and return them."""
    data = train.add_argument_group("forecasts")
    return [
        data.add_argument("--target", help="column to forecast (default: the only column of numbers)"),
        data.add_argument(
            "--inputs", metavar="A,B", help="further columns to look at (default: all of numbers; '' for none)"
        ),
        data.add_argument("--horizon", type=int, metavar="N", help="steps to forecast (default: one season)"),
        data.add_argument(
            "--window", type=int, metavar="N", help="steps to look back (default: two seasons, at least 16)"
        ),
        data.add_argument(
            "--season", type=int, metavar="N", help="steps in a season (default: told by the dates; 1 for none)"
        ),
        data.add_argument("--test-share", type=float, metavar="P", help=f"last rows to measure on ({TEST_SHARE})"),
    ]


@dataclass
class Job:
    """A table that was read: see `cli.train.Job`."""

    table: Table
    recipe: Recipe
    share: float
    understood: list[str]
    described: dict[str, Any]

    def fit(self, architecture: Architecture, settings: Settings, options: RunOptions, own: Own) -> Any:
        """Train on it."""
        from cellstack.train.workflow import train_forecast

        return train_forecast(self.table, self.recipe, architecture, settings, options, self.share)

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the errors of forecasts of the last rows, beside those of two rules."""
        scores = result.scores
        ours, naive = scores["model"], scores["seasonal_naive"]
        lines = [f"{'test, ' + str(scores['origins']) + ' forecasts':<24} {'MAE':>9} {'RMSE':>9}"]
        rows = {"seasonal-naive": naive, "seasonal-naive + drift": scores["seasonal_drift"], "this model": ours}
        lines += [f"  {name:<22} {errors['mae']:>9.4f} {errors['rmse']:>9.4f}" for name, errors in rows.items()]
        less = [1 - ours[name] / naive[name] if naive[name] else 0.0 for name in ("mae", "rmse")]
        return scores, [*lines, f"  {'less than naive by':<22} {less[0]:>9.1%} {less[1]:>9.1%}"]


def read(args: argparse.Namespace) -> Job:
    """Read a table, and decide what is forecast from what.

    Raises:
        UsageError: a second file, or no target among several columns.
        FormatError: it can't be read as a table.
    """
    if args.test is not None:
        raise UsageError("expected one CSV file: its last rows are what is measured on, see --test-share")
    table = read_csv(args.file)
    recipe = _recipe(args, table)
    lines = [f"{args.file}: {len(table):,} rows, forecasting {recipe.target} {recipe.horizon} ahead"]
    if table.texts:
        lines.append(f"left out, as they hold no numbers: {', '.join(table.texts)}")
    described = {"rows": len(table), "recipe": recipe.to_json(), "left_out": table.texts}
    return Job(table, recipe, TEST_SHARE if args.test_share is None else args.test_share, lines, described)


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
