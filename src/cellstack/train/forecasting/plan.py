"""Make a recipe from a table and a request, and describe it in sentences. Needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cellstack.train.checks import UsageError
from cellstack.train.forecasting import calendar
from cellstack.train.forecasting.parts import OriginParts, can_validate, epoch_steps, parts
from cellstack.train.forecasting.recipe import LONGEST_WINDOW, NAIVE, SCALES, SHORTEST_WINDOW, Category, Recipe
from cellstack.train.forecasting.seasons import find
from cellstack.train.options import FitOptions, ForecastOptions
from cellstack.train.tables.columns import such_as
from cellstack.train.tables.table import Table, listed

MANY, LONG = 3000, 100  # more windows, or more steps of a window with its horizon, make training slow
MOST_WORK = 15_000_000  # sequence steps to train on, over all networks, epochs and windows
FEWEST_EPOCHS = 8
WITHOUT_SEASON = 12  # default horizon without a season


class Plan(NamedTuple):
    """The recipe, the table's parts, the default options of the networks and the fit, and the validation share."""

    recipe: Recipe
    parts: OriginParts
    defaults: dict[str, Any]
    validation: float


def planned(table: Table, request: ForecastOptions, validation: float | None, test: float) -> Plan:
    """Plan the training on a table.

    Args:
        table: the series.
        request: what to forecast.
        validation, test: shares of each series' rows for model selection and for the test; `validation` None = 0.15, or
            0 if the series are too short.

    Raises:
        UsageError: see `plan` and `parts`.
    """
    share = FitOptions.validation if validation is None else validation
    recipe = plan(table, request, share + test)
    if validation is None and not can_validate(table, recipe, share, test):
        share = 0.0
    cut = parts(table, recipe, share, test)
    return Plan(recipe, cut, defaults(len(cut.training), recipe.window + recipe.horizon), share)


def defaults(windows: int, length: int) -> dict[str, Any]:
    """Return the default options of the networks and the fit.

    They were chosen on real series, see docs/forecasting.md: a high learning rate or many epochs overfit to few
    windows; with many windows, one network is nearly as good as several. Training should take about a minute, so
    batches are smaller for many or long windows, and there are fewer epochs for very long ones.

    Args:
        windows: number of training windows.
        length: steps of each, including its horizon.
    """
    few, many = windows < 1500, windows > MANY
    members = 2 if many else 3
    batch = 32 if takes_long(windows, length) else 64
    afford = MOST_WORK / (members * epoch_steps(windows, batch) * batch * length)
    return {
        "units": (48,),
        "dropout": 0.1,
        "lr": 1e-3 if few else 3e-3,
        "batch": batch,
        "epochs": max(FEWEST_EPOCHS, min(60 if many else 16, round(afford))),
        "patience": 8 if many else 6,
        "members": members,
    }


def takes_long(windows: int, length: int) -> bool:
    """Return whether training is slow, so that its steps should be limited: with many windows, or long ones."""
    return windows > MANY or length > LONG


def plan(table: Table, request: ForecastOptions, held: float) -> Recipe:
    """Return a recipe; its rule, scale and floors are determined later, see `training.prepared`.

    Args:
        table: the series.
        request: what to forecast.
        held: share of each series' rows that isn't trained on, and is not used to detect seasons.

    Raises:
        UsageError: a column that doesn't exist or is empty, or arguments that don't fit each other.
    """
    targets = tuple(request.target) or _only_target(table, request)
    asked = {"target": targets, "column known in advance": request.known, "input": request.inputs or ()}
    for what, name in ((what, name) for what, named in asked.items() for name in named):
        have = [*table.columns, *(() if what == "target" else table.categories)]
        if name not in have:
            why = f", which is ignored: {table.ignored[name]}" if name in table.ignored else ""
            if name in table.categories:
                why = f", which is text{such_as(name, table.categories[name].labels)}"
            raise UsageError(f"{table.path}: expected {what} to be one of {listed(have)}, got {name!r}{why}")
    for name in targets:
        if np.isnan(table.columns[name]).all():
            raise UsageError(f"{table.path}: column {name!r} has no values")
    still = table.unchanging()
    taken = {*targets, *request.known}
    others = [name for name in (*table.columns, *table.categories) if name not in taken and name not in still]
    inputs = tuple(others) if request.inputs is None else request.inputs
    if both := taken & set(inputs):
        raise UsageError(
            f"each column can have one role only: {listed(sorted(both))} can't be an input and also a target or known "
            "in advance"
        )
    asked = request.seasons
    seasons = find_seasons(table, targets[0], held) if asked is None else tuple(asked)
    horizon = usual_horizon(table, seasons) if request.horizon is None else request.horizon
    window = request.window
    if window is None:
        window = int(np.clip(2 * min(seasons, default=1), SHORTEST_WINDOW, LONGEST_WINDOW))
    dates: tuple[str, ...] = ()
    if table.times is not None and table.spacing is not None:
        span = float((table.times.max() - table.times.min()) / np.timedelta64(1, "s"))
        dates = calendar.usual(step_seconds(table), span, request.holidays)
    elif request.holidays:
        raise UsageError(f"{table.path}: holidays need a column of dates, found none")
    if request.holidays:
        calendar.holidays(request.holidays, np.array(["2020-01-01"], "datetime64[D]"))  # an error now, not later
    categories = tuple(
        Category(name, table.categories[name].labels, name in request.known)
        for name in (*inputs, *request.known)
        if name in table.categories
    )
    return Recipe(
        targets=targets,
        horizon=horizon,
        window=window,
        seasons=seasons,
        rule=NAIVE,
        scale=request.scale or SCALES[0],
        inputs=tuple(name for name in inputs if name in table.columns),
        known=tuple(name for name in request.known if name in table.columns),
        categories=categories,
        calendar=dates,
        holidays=request.holidays if "holidays" in dates else "",
        quantiles=tuple(sorted({*request.quantiles, 0.5})),
    )


def usual_horizon(table: Table, seasons: tuple[int, ...]) -> int:
    """Return the default horizon: the shortest natural season of the table.

    A day for hourly rows, a week for daily, a year for monthly rows; without dates the shortest season that was
    detected, else `WITHOUT_SEASON`.
    """
    if table.spacing is not None and table.spacing.seasons:
        return table.spacing.season
    return min(seasons, default=WITHOUT_SEASON)


def _only_target(table: Table, request: ForecastOptions) -> tuple[str, ...]:
    names = [name for name in table.columns if name not in request.known]
    if len(names) != 1:
        raise UsageError(f"{table.path}: expected `target=…`, one or more of {listed(names) or 'no numeric columns'}")
    return (names[0],)


def find_seasons(table: Table, target: str, held: float) -> tuple[int, ...]:
    """Detect the seasons of a column, in the training part of each series."""
    pieces, starts = [], [0]
    for series in range(len(table.ids)):
        rows = table.rows(series)
        values = table.columns[target][rows]
        pieces.append(values[: max(1, round(len(values) * (1 - held)))])
        starts.append(starts[-1] + len(pieces[-1]))
    longest = max(len(piece) for piece in pieces)
    natural = table.spacing.seasons if table.spacing is not None else ()
    found = find(np.concatenate(pieces), np.array(starts), natural)
    return tuple(season for season in found if 2 * season <= longest)


def step_seconds(table: Table) -> float:
    """Return the seconds between rows; for months, their mean."""
    assert table.spacing is not None
    return table.spacing.months * calendar.YEAR * calendar.DAY / 12 or table.spacing.seconds


def understood(table: Table, recipe: Recipe, asked: ForecastOptions, cut: OriginParts) -> list[str]:
    """Describe a table and a recipe, in sentences, the most important first; `cut` are the parts of the table."""
    seasons = " and ".join(f"{season:,}" for season in recipe.seasons)
    source = "as requested" if asked.seasons is not None else "detected in the series"
    said = [
        f"forecasting {listed([f'`{name}`' for name in recipe.targets])} {recipe.horizon:,} "
        f"{'step' if recipe.horizon == 1 else 'steps'} ahead from a window of {recipe.window:,}; "
        + (
            f"{'seasons' if len(recipe.seasons) > 1 else 'season'} {seasons}, {source}"
            if seasons
            else f"no season{', as requested' if asked.seasons is not None else ' detected'}"
        )
    ]
    looked: list[str] = []
    if recipe.inputs or any(not category.known for category in recipe.categories):
        names = [*recipe.inputs, *(category.name for category in recipe.categories if not category.known)]
        looked.append("inputs known up to the origin: " + listed([f"`{name}`" for name in names]))
    if recipe.known or any(category.known for category in recipe.categories):
        names = [*recipe.known, *(category.name for category in recipe.categories if category.known)]
        looked.append("inputs known in advance: " + listed([f"`{name}`" for name in names]))
    if recipe.calendar:
        words = {
            "hour": "the hour",
            "weekday": "the weekday",
            "year": "the season of the year",
            "day": "the day of the year",
        }
        looked.append(
            "calendar: " + ", ".join(words.get(kind, f"holidays of {recipe.holidays}") for kind in recipe.calendar)
        )
    said.append("; ".join(looked) or "no inputs other than the target")
    still = table.unchanging()
    said += [
        f"the target `{name}` is {still[name]}, and so is its forecast" for name in recipe.targets if name in still
    ]
    if not len(cut.validation):
        said.append("no validation part: the networks are trained on all rows before the test part, for all epochs")
    return [*table.understood(leave_out=recipe.targets), *said, *_too_short(table, cut)]


def _too_short(table: Table, cut: OriginParts) -> list[str]:
    """Name the series that are too short to train on, or to test on."""
    sentences = []
    for what, origins in (("train on", cut.training), ("test on", cut.test)):
        used = np.zeros(len(table.ids), bool)
        used[np.searchsorted(table.starts, origins, side="right") - 1] = True
        short = np.flatnonzero(~used)
        if len(origins) and len(short):
            rows = np.diff(table.starts)[short]
            named = [f"`{table.ids[n]}` ({count:,} rows)" for n, count in zip(short, rows, strict=True)]
            sentences.append(f"too short to {what}: {listed(named)}")
    return sentences
