"""Forecasts of a table by `TiRexForecaster`."""

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
    columns = tuple((name,) if isinstance(name, str) else tuple(name) for name in (target, inputs, known))
    targets, inputs, known = columns
    settings = forecaster.settings
    recipe = Recipe(targets, horizon, settings.context, inputs=inputs, known=known, quantiles=settings.quantiles)
    origins = last_origins(table, recipe) if origin is None else origins_at(table, origin)
    windows = Windows(recipe, table, origins)
    groups: list[list[Floats]] = [[], [], []]
    for number, last in zip(windows.series, origins, strict=True):
        first, end = table.starts[number : number + 2]
        for names, found, stop in zip(columns, groups, (last + 1, last + 1, last + 1 + horizon), strict=True):
            rows = np.full((len(names), stop - first), np.nan)
            for row, name in zip(rows, names, strict=True):
                there = table.columns[name][first : min(stop, end)]
                row[: len(there)] = there
            found.append(rows)
    series, past, ahead = groups
    values = forecaster.forecast(series, horizon, past=past, known=ahead, pad=pad, threads=threads)
    ids = own_ids(data, table, [table.ids[number] for number in windows.series])
    reference = windows.reference(np.arange(len(origins)))
    found = recipe, table, ids, origins, times(windows), values.swapaxes(1, 2), reference, is_polars(data)
    return Forecasts(*found), unknown(recipe, table, origins)
