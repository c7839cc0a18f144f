"""From a table and what is asked for to a recipe; and what was understood, in sentences. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cellstack.train.checks import UsageError
from cellstack.train.forecast import calendar
from cellstack.train.forecast.parts import Parts, can_validate, epoch_steps, parts
from cellstack.train.forecast.recipe import (
    LONGEST_WINDOW,
    NAIVE,
    SCALES,
    SHORTEST_WINDOW,
    Category,
    Recipe,
)
from cellstack.train.forecast.seasons import find
from cellstack.train.settings import RunOptions
from cellstack.train.tables.table import Table, listed

MANY, LONG = 3000, 100  # windows, and steps of a window and its horizon, beyond which training takes long
MOST_WORK = 15_000_000  # steps of windows that all networks together are trained on: of all epochs, windows and rows
FEWEST_EPOCHS = 8
WITHOUT_SEASON = 12  # steps of the horizon where none is given and there is no season


@dataclass(frozen=True)
class Request:
    """What is asked for of a forecast; what is None is told by the table.

    Args:
        targets: columns to forecast; the only column of numbers where none is named.
        horizon: steps to forecast; one season, the shortest.
        window: steps that the network sees; two seasons, from 16 to 168.
        seasons: steps after which the series repeats itself; found in the training part.
        inputs: further columns that the network sees up to now; every one that isn't named elsewhere.
        known: columns that are known in advance, over the horizon too.
        country: whose holidays the network sees, `"US"` or `"DE-BY"`; "" for none.
        scale: unit of the values, see `Recipe`; the level where the logarithm is smoothed.
        quantiles: of the forecast's distribution; 0.5 is added where it isn't there.
    """

    targets: tuple[str, ...] = ()
    horizon: int | None = None
    window: int | None = None
    seasons: tuple[int, ...] | None = None
    inputs: tuple[str, ...] | None = None
    known: tuple[str, ...] = ()
    country: str = ""
    scale: str | None = None
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)


class Plan(NamedTuple):
    """What is forecast from what, the table's parts, and how networks are built and fitted where nothing is said.

    `validation` is the share of the rows to choose by.
    """

    recipe: Recipe
    parts: Parts
    defaults: dict[str, Any]
    validation: float


def planned(table: Table, request: Request, validation: float | None, test: float) -> Plan:
    """Return how a table is gone about.

    Args:
        table: the series.
        request: what is asked for.
        validation, test: shares of each series' rows to choose and to measure by; the first is 0.15 where None, and 0
            where the series are too short for that.

    Raises:
        UsageError: see `plan` and `parts`.
    """
    share = RunOptions.validation if validation is None else validation
    recipe = plan(table, request, share + test)
    if validation is None and not can_validate(table, recipe, share, test):
        share = 0.0
    cut = parts(table, recipe, share, test)
    return Plan(recipe, cut, defaults(len(cut.training), recipe.window + recipe.horizon), share)


def defaults(windows: int, length: int) -> dict[str, Any]:
    """Return what networks are built of and fitted by where nothing is said.

    They were chosen on real series, see docs/forecasting.md: few windows are learned by heart at a high rate or in many
    epochs; of many, one network learns nearly what several do. All of it is to be done in a minute, so that batches of
    many windows, or of long ones, are small, and very long ones are gone through less often.

    Args:
        windows: how many there are to train on.
        length: of each, its horizon included.
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
    """Return whether a network is trained for so long that steps are to be saved: on many windows, or long ones."""
    return windows > MANY or length > LONG


def plan(table: Table, request: Request, held: float) -> Recipe:
    """Return what is forecast from what; rule, scale and floors are left to what the data show.

    Args:
        table: the series.
        request: what is asked for.
        held: share of each series' rows that isn't trained on, from which no season is told.

    Raises:
        UsageError: a column that isn't there or has no value, or what doesn't fit together.
    """
    targets = request.targets or _only_target(table, request)
    asked = {"target": targets, "column known in advance": request.known, "input": request.inputs or ()}
    for what, name in ((what, name) for what, named in asked.items() for name in named):
        if name not in table.columns and name not in table.categories:
            why = f", which was ignored: {table.ignored[name]}" if name in table.ignored else ""
            have = listed([*table.columns, *table.categories])
            raise UsageError(f"{table.path}: expected {what} to be one of {have}, got {name!r}{why}")
    for name in targets:
        if name in table.categories:
            raise UsageError(f"{table.path}: expected a target of numbers, found text in column {name!r}")
        if np.isnan(table.columns[name]).all():
            raise UsageError(f"{table.path}: expected numbers in column {name!r}, found none")
    still = table.unchanging()
    taken = {*targets, *request.known}
    others = [name for name in (*table.columns, *table.categories) if name not in taken and name not in still]
    inputs = tuple(others) if request.inputs is None else request.inputs
    if both := taken & set(inputs):
        raise UsageError(f"expected each column in one place, got {listed(sorted(both))} in two")
    seasons = request.seasons
    if seasons is None:
        seasons = find_seasons(table, targets[0], held)
    horizon = request.horizon or usual_horizon(table, seasons)
    window = request.window or int(np.clip(2 * min(seasons, default=1), SHORTEST_WINDOW, LONGEST_WINDOW))
    if request.scale is not None and request.scale not in SCALES:
        raise UsageError(f"expected scale to be one of {', '.join(SCALES)}, got {request.scale!r}")
    dates: tuple[str, ...] = ()
    if table.times is not None and table.spacing is not None:
        span = float((table.times.max() - table.times.min()) / np.timedelta64(1, "s"))
        dates = calendar.usual(step_seconds(table), span, request.country)
    elif request.country:
        raise UsageError(f"{table.path}: expected dates to tell holidays by, found none")
    if request.country:
        calendar.holidays(request.country, np.array(["2020-01-01"], "datetime64[D]"))  # now, not after a while
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
        country=request.country if "holidays" in dates else "",
        quantiles=tuple(sorted({*request.quantiles, 0.5})),
    )


def usual_horizon(table: Table, seasons: tuple[int, ...]) -> int:
    """Return the steps that are forecast where none are asked for: the shortest season that is natural to the table.

    A day of hours, a week of days, a year of months; without dates the shortest that was found, else `WITHOUT_SEASON`.
    """
    if table.spacing is not None and table.spacing.seasons:
        return table.spacing.season
    return min(seasons, default=WITHOUT_SEASON)


def _only_target(table: Table, request: Request) -> tuple[str, ...]:
    names = [name for name in table.columns if name not in request.known]
    if len(names) != 1:
        raise UsageError(f"{table.path}: expected a target, one or more of {listed(names) or 'no column of numbers'}")
    return (names[0],)


def find_seasons(table: Table, target: str, held: float) -> tuple[int, ...]:
    """Return the seasons of a column, told by the part of each series that is trained on."""
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
    """Return the seconds from a row to the next, of months the mean."""
    assert table.spacing is not None
    return table.spacing.months * calendar.YEAR * calendar.DAY / 12 or table.spacing.seconds


def understood(table: Table, recipe: Recipe, asked: Request, cut: Parts) -> list[str]:
    """Return what was understood, a sentence each, what matters first; `cut` are the parts of the table."""
    seasons = " and ".join(f"{season:,}" for season in recipe.seasons)
    told = "as asked" if asked.seasons is not None else "told by the series"
    said = [
        f"forecasting {listed([f'`{name}`' for name in recipe.targets])} {recipe.horizon:,} "
        f"{'step' if recipe.horizon == 1 else 'steps'} ahead from a window of {recipe.window:,}; "
        + (
            f"{'seasons' if len(recipe.seasons) > 1 else 'season'} {seasons}, {told}"
            if seasons
            else f"no season, {told}"
        )
    ]
    looked: list[str] = []
    if recipe.inputs or any(not category.known for category in recipe.categories):
        names = [*recipe.inputs, *(category.name for category in recipe.categories if not category.known)]
        looked.append("inputs up to now " + listed([f"`{name}`" for name in names]))
    if recipe.known or any(category.known for category in recipe.categories):
        names = [*recipe.known, *(category.name for category in recipe.categories if category.known)]
        looked.append("known in advance " + listed([f"`{name}`" for name in names]))
    if recipe.calendar:
        words = {
            "hour": "the hour",
            "weekday": "the weekday",
            "year": "the season of the year",
            "day": "the day of the year",
        }
        looked.append(
            "the calendar: " + ", ".join(words.get(kind, f"holidays of {recipe.country}") for kind in recipe.calendar)
        )
    said.append("; ".join(looked) or "inputs: none but the target")
    still = table.unchanging()
    said += [f"the target `{name}` is {still[name]}: so is its forecast" for name in recipe.targets if name in still]
    if not len(cut.validation):
        said.append("no rows held out to choose by: all are trained on, in all epochs")
    return [*table.understood(leave_out=recipe.targets), *said, *_too_short(table, cut)]


def _too_short(table: Table, cut: Parts) -> list[str]:
    """Return how many series have no origin to train on, or none to measure on, and the first of them."""
    sentences = []
    for what, origins in (("trained on", cut.training), ("measured on", cut.test)):
        held = np.zeros(len(table.ids), bool)
        held[np.searchsorted(table.starts, origins, side="right") - 1] = True
        short = np.flatnonzero(~held)
        if len(origins) and len(short):
            rows = np.diff(table.starts)[short]
            named = [f"`{table.ids[n]}` ({count:,} rows)" for n, count in zip(short, rows, strict=True)]
            sentences.append(f"too short to be {what}: {listed(named)}")
    return sentences
