"""Forecasts of a table by `TiRexForecaster`, and as a baseline of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellstack.train.checks import UsageError, collected
from cellstack.train.data.frames import is_polars
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.predict import last_origins, origins_at, own_ids, times, unknown
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.tirex_scaling import Floats
from cellstack.train.forecasting.windows import Windows
from cellstack.train.tables.table import Table, read_table

TOGETHER = 64  # origins, each with all rows of its series up to it


def forecasts_of_table(
    forecaster: Any,
    data: Any,
    target: str | Sequence[str],
    horizon: int,
    *,
    inputs: str | Sequence[str] = (),
    known: str | Sequence[str] = (),
    origin: Any = None,
    pad: bool = True,
    threads: int | None = None,
    **reading: Any,
) -> tuple[Forecasts, list[str]]:
    """Return forecasts, and warnings about the table: see `TiRexForecaster.predict`."""
    data = collected(data)
    if isinstance(data, Table) and reading:
        raise UsageError(f"predict: {next(iter(reading))} has no effect for a Table, which has been read already")
    table = data if isinstance(data, Table) else read_table(data, **reading)
    targets, inputs, known = ((name,) if isinstance(name, str) else tuple(name) for name in (target, inputs, known))
    settings = forecaster.settings
    recipe = Recipe(targets, horizon, settings.context, inputs=inputs, known=known, quantiles=settings.quantiles)
    origins = last_origins(table, recipe) if origin is None else origins_at(table, origin)
    windows = Windows(recipe, table, origins)
    values = quantiles(forecaster, windows, pad, threads)
    ids = own_ids(data, table, [table.ids[number] for number in windows.series])
    reference = windows.reference(np.arange(len(origins)))
    found = recipe, table, ids, origins, times(windows), values, reference, is_polars(data)
    return Forecasts(*found), unknown(recipe, table, origins)


def medians(forecaster: Any, windows: Windows, threads: int | None) -> Floats:
    """Return the medians of forecasts after all origins, `[N, horizon, targets]`, as a baseline for a training.

    The columns of a series are forecast together, with its numeric covariates; by a TiRex each target by itself.

    Raises:
        UsageError: a horizon that the model can't forecast.
    """
    recipe, middle = windows.recipe, forecaster.quantiles.index(0.5)
    together = [(recipe.targets, recipe.inputs, recipe.known)]
    alone = [((name,), (), ()) for name in recipe.targets]
    recipes = [
        Recipe(targets, recipe.horizon, forecaster.settings.context, inputs=inputs, known=known)
        for targets, inputs, known in (together if forecaster.settings.second else alone)
    ]
    parts = []
    for first in range(0, len(windows.origins), TOGETHER):
        some = windows.origins[first : first + TOGETHER]
        each = [quantiles(forecaster, Windows(one, windows.table, some), True, threads) for one in recipes]
        parts.append(np.concatenate(each, axis=2)[..., middle])
    return np.concatenate(parts)


def quantiles(forecaster: Any, windows: Windows, pad: bool, threads: int | None) -> Floats:
    """Return the forecasts after all origins, `[N, horizon, targets, Q]`; see `TiRexForecaster.forecast`."""
    recipe, table = windows.recipe, windows.table
    columns = recipe.targets, recipe.inputs, recipe.known
    groups: list[list[Floats]] = [[], [], []]
    for number, last in zip(windows.series, windows.origins, strict=True):
        first, end = table.starts[number : number + 2]
        stops = last + 1, last + 1, last + 1 + recipe.horizon
        for names, found, stop in zip(columns, groups, stops, strict=True):
            rows = np.full((len(names), stop - first), np.nan)
            for row, name in zip(rows, names, strict=True):
                there = table.columns[name][first : min(stop, end)]
                row[: len(there)] = there
            found.append(rows)
    series, past, known = groups
    values = forecaster.forecast(series, recipe.horizon, past=past, known=known, pad=pad, threads=threads)
    return values.swapaxes(1, 2)
