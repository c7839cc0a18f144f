"""Forecasts of a trained network over a table. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.network import Network
from cellstack.nodes import Select, Standardise
from cellstack.train.checks import TooFewRowsError, UsageError
from cellstack.train.data.frames import is_frame, is_polars, plain
from cellstack.train.data.reading import merged
from cellstack.train.examples import Inputs
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.windows import Windows, extended_times
from cellstack.train.tables.clock import utc_of
from cellstack.train.tables.dates import in_form, written_as
from cellstack.train.tables.table import READING, Table, iso, read_table
from cellstack.train.trained import raw_inputs

Ints = NDArray[np.int64]
TOGETHER = 512  # windows in a batch


def outputs(
    net: Network, inputs: Inputs, windows: Windows, indices: Ints, threads: int | None = None
) -> NDArray[np.float32]:
    """Return a network's outputs for the windows at `indices`, `[N, horizon, targets, quantiles]`, in their units."""
    recipe = windows.recipe
    out = np.empty((len(indices), recipe.horizon, len(recipe.targets), len(recipe.quantiles)), np.float32)
    for start in range(0, len(indices), TOGETHER):
        part = slice(start, start + TOGETHER)
        x, mask = inputs(windows.fetch(indices[part]).x)
        out[part] = net.run(x, mask=mask, threads=threads)[0].reshape(len(x), *out.shape[1:])
    return out


def forecasts_of(net: Network, inputs: Inputs, windows: Windows, threads: int | None = None) -> Forecasts:
    """Return a network's forecasts from the origins of all windows."""
    every = np.arange(len(windows.origins))
    parts = [every[start : start + TOGETHER] for start in range(0, len(every), TOGETHER)]
    return Forecasts(
        windows.recipe,
        windows.table,
        [windows.table.ids[series] for series in windows.series],
        windows.origins,
        times(windows),
        np.concatenate([windows.forecasts(part, outputs(net, inputs, windows, part, threads)) for part in parts]),
        windows.reference(every),
    )


def forecasts_after(
    net: Network,
    data: Any,
    path: str,
    origin: Any = None,
    threads: int | None = None,
    **given: Any,
) -> tuple[Forecasts, list[str]]:
    """Forecast the steps after the last rows of a table, or after another origin, and return warnings about the table.

    Args:
        net: a network that forecasts.
        data: a pandas or polars frame, the name of a CSV or Parquet file, or a `Table`.
        path: the network's file, for messages.
        origin: see `origins_at`; None = in each series the last row with an observed target.
        threads: number of the kernel's threads.
        given: arguments of `read_table`; as in training where not given.

    Raises:
        UsageError: an origin that isn't in the table, or options for a `Table`; and see `forecast`.
    """
    recipe, _ = trained(net, path)
    if isinstance(data, Table):
        for name in given:
            raise UsageError(f"predict: {name} has no effect for a Table, which has been read already")
        table = data
    else:
        table = read_table(data, **merged(reading(net, path), given))
    origins = None if origin is None else origins_at(table, origin)
    forecasts = forecast(net, table, path, origins, threads)
    ids = own_ids(data, table, forecasts.ids)
    return replace(forecasts, ids=ids, polars=is_polars(data)), unknown(recipe, table, forecasts.origins)


def own_ids(data: Any, table: Table, ids: list[Any]) -> list[Any]:
    """Return the ids of series with the type of the frame's column, so that results can be joined with the frame."""
    if table.id is None or not is_frame(data) or table.id not in map(str, data.columns):
        return ids
    values = plain(data, table.id).tolist()
    # Named 7, not 7.0.
    whole = [int(value) if isinstance(value, float) and value % 1 == 0 else value for value in values]
    named = {str(name).strip(): value for name, value in zip(whole, values, strict=True)}
    return [named.get(name, name) for name in ids]


def forecast(
    net: Network,
    table: Table,
    path: str,
    origins: Ints | None = None,
    threads: int | None = None,
) -> Forecasts:
    """Forecast the steps after the last rows of a table's series, or after other origins.

    Args:
        net: a network that `cellstack train` trained on a table.
        table: one or more series, which may differ from those in training.
        path: the network's file, for messages.
        origins: last rows to use, `[N]`; None = in each series the last row with an observed target. Later rows
            contain the inputs known in advance.
        threads: number of the kernel's threads.

    Raises:
        UsageError: a column of the recipe is missing, or a series has too few rows; the message says how many it needs.
        FormatError: the network's metadata doesn't fit it.
    """
    recipe, inputs = trained(net, path)
    if origins is None:
        origins = last_origins(table, recipe)
    windows = checked_windows(recipe, table, origins, inputs, path)
    return forecasts_of(net, inputs, windows, threads)


def unknown(recipe: Recipe, table: Table, origins: Ints) -> list[str]:
    """Return warnings about a table: categories that weren't in the training data, missing values known in advance."""
    said = []
    for category in recipe.categories:
        new = [label for label in table.categories[category.name].labels if label not in category.labels]
        if new:
            more = f" and {len(new) - 3} more" if len(new) > 3 else ""
            said.append(
                f"`{category.name}`: the training data didn't contain {', '.join(map(repr, new[:3]))}{more}: treated "
                "as no known category"
            )
    rows = origins[:, None] + np.arange(1, recipe.horizon + 1)
    beyond = rows >= table.starts[np.searchsorted(table.starts, origins, side="right")][:, None]
    at = np.minimum(rows, len(table) - 1)
    ahead = {name: np.isnan(table.columns[name]) for name in recipe.known}
    ahead |= {each.name: table.categories[each.name].codes < 0 for each in recipe.categories if each.known}
    for name, missing in ahead.items():
        count = int((missing[at] | beyond).sum())
        if count:
            said.append(
                f"`{name}`, known in advance, has no value at {count:,} of {rows.size:,} forecast steps: append these "
                "rows, without the target, to the table"
            )
    return said


def last_origins(table: Table, recipe: Recipe) -> Ints:
    """Return, for each series, the last row with an observed target.

    Raises:
        UsageError: a series without any.
    """
    for name in recipe.targets:
        if name not in table.columns:
            raise UsageError(f"{table.path}: expected a numeric column {name!r}, found {', '.join(table.columns)}")
    seen = np.any([~np.isnan(table.columns[name]) for name in recipe.targets], axis=0)
    origins = []
    for name, first, end in zip(table.ids, table.starts[:-1], table.starts[1:], strict=True):
        rows = np.flatnonzero(seen[first:end])
        if not len(rows):
            raise UsageError(f"{table.path}: {', '.join(recipe.targets)} has no values{_series(name)}")
        origins.append(int(first + rows[-1]))
    return np.array(origins, np.int64)


def origins_at(table: Table, origin: Any) -> Ints:
    """Return the row with a date, or with a row number, in each series that has it.

    Args:
        table: the series.
        origin: a date: text in the format of the table's dates or in ISO form, a `datetime` or a `datetime64`; or the
            number of a row in each series, from 1. Without a UTC offset, a date is in the table's time zone; without a
            time of day, it is midnight.

    Raises:
        UsageError: no series has it, it isn't a date, or it occurs twice because the clock is set back.
    """
    if table.times is None and isinstance(origin, str) and origin.strip().isdecimal():
        origin = int(origin)
    if isinstance(origin, (int, np.integer)) and not isinstance(origin, (bool, np.timedelta64)) and origin > 0:
        rows = table.starts[:-1] + int(origin) - 1
        rows = rows[rows < table.starts[1:]]
    elif table.times is None:
        raise UsageError(
            f"expected `origin=…` to be a row number from 1, because {table.path} has no dates, got {origin}"
        )
    else:
        rows = _rows_at(table, table.times, origin)
    if not len(rows):
        span = (
            f", which covers {table.shown(table.times.min())} to {table.shown(table.times.max())}"
            if table.times is not None
            else ""
        )
        raise UsageError(f"expected `origin=…` to be a row of {table.path}{span}, got {origin}")
    return rows.astype(np.int64)


def _rows_at(table: Table, times: NDArray[np.datetime64], origin: Any) -> Ints:
    """Return the rows of a table with a date."""
    form = table.reading.get("date_format")
    time = _time_of(origin, form)
    if time is None:
        like = dict.fromkeys([written_as(times[-1], form), iso(times[-1])])
        raise UsageError(f"expected `origin=…` to be a date such as {' or '.join(like)}, got {origin!r}")
    if time[1] and table.zone is None:
        raise UsageError(f"expected `origin=…` without a UTC offset, because {table.path} has none, got {origin}")
    if time[1]:
        times = np.concatenate([utc_of(times[table.rows(series)], table.zone) for series in range(len(table.ids))])
    rows = np.flatnonzero(times == time[0])
    series = np.searchsorted(table.starts, rows, side="right")
    if len(np.unique(series)) < len(series):
        raise UsageError(
            f"`origin=…` {origin} occurs twice, because the clock is set back then: add the UTC offset of one of them"
        )
    return rows


def _time_of(origin: Any, form: str | None) -> tuple[np.datetime64, bool] | None:
    """Return a date, and whether it is in UTC rather than local time; None if `origin` isn't a date."""
    if isinstance(origin, str):
        times = (in_form(origin.strip(), how) for how in (form, "%Y-%m-%d", "%Y-%m", "%Y") if how)
        return next((time for time in times if time is not None), None)
    if isinstance(origin, datetime) and origin.tzinfo is not None:
        return np.datetime64(origin.astimezone(timezone.utc).replace(tzinfo=None), "us"), True
    if isinstance(origin, (date, np.datetime64)) and origin == origin:  # NaT isn't
        return np.array([origin], "datetime64[us]")[0], False
    return None


def checked_windows(recipe: Recipe, table: Table, origins: Ints, inputs: Inputs, path: str) -> Windows:
    """Return the windows that end at `origins`, `[N]`.

    Raises:
        UsageError: a series has fewer rows up to an origin than a forecast needs, or the table lacks a column.
        FormatError: the recipe and the network differ in the number of channels.
    """
    windows = Windows(recipe, table, origins)
    if windows.channels != len(inputs.mean):
        raise FormatError(
            f"{path}: expected a network with {windows.channels} channels for its recipe, found {len(inputs.mean)}"
        )
    rows = windows.origins - table.starts[windows.series] + 1
    short = np.flatnonzero(rows < recipe.needed)
    if len(short):
        name = table.ids[windows.series[short[0]]]
        more = f" ({len(short)} series are too short)" if len(short) > 1 else ""
        raise TooFewRowsError(
            f"{table.path}: expected at least {recipe.needed} rows (one season) before a forecast, found "
            f"{rows[short[0]]}{_series(name)}{more}: {recipe.reach} rows are best"
        )
    return windows


def times(windows: Windows) -> NDArray[np.datetime64] | None:
    """Return the time of each forecast step, `[N, horizon]`, None without dates."""
    table, horizon = windows.table, windows.recipe.horizon
    if table.times is None:
        return None
    first = windows.origins + windows.series * horizon + 1
    return extended_times(table, horizon)[first[:, None] + np.arange(horizon)]


def trained(net: Network, path: str) -> tuple[Recipe, Inputs]:
    """Return a forecasting network's recipe, and the scaling of its inputs.

    Raises:
        FormatError: it wasn't written by `cellstack train`, or its metadata doesn't fit its nodes.
    """
    values, first = net.metadata.get("recipe"), net.nodes[0]
    if net.metadata.get("task") != "forecast" or not isinstance(first, Standardise):
        raise FormatError(
            f"{path}: expected a network that cellstack trained to forecast, found task {net.metadata.get('task')!r}"
        )
    try:
        recipe = Recipe.from_json(values)  # type: ignore[arg-type]
    except (UsageError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: the network's recipe isn't one of cellstack 0.2 or later ({error}): train it again"
        ) from None
    inputs = raw_inputs(first, net.metadata.get("observed"), path)
    answer = net.shapes[net.outputs[0]]
    numbers = len(recipe.targets) * len(recipe.quantiles)
    if len(net.inputs) != 1 or len(net.outputs) != 1 or len(answer) != 2 or answer[-1] != numbers:
        raise FormatError(
            f"{path}: expected one output [B, horizon, {numbers}], according to the recipe, found another"
        )
    ahead = [-node.start for node in net.nodes if isinstance(node, Select) and node.start is not None]
    if any(steps != recipe.horizon for steps in ahead):
        raise FormatError(
            f"{path}: expected a horizon of {ahead[0]}, as in the network's output, found {recipe.horizon}"
        )
    return recipe, inputs


def reading(net: Network, path: str) -> dict[str, Any]:
    """Return the arguments of `read_table` with which a network's training table was read.

    Raises:
        FormatError: the network's metadata has invalid ones.
    """
    values = net.metadata.get("reading")
    if not isinstance(values, dict) or not values.keys() <= {*READING}:
        raise FormatError(
            f"{path}: expected reading to have only keys of {', '.join(sorted(READING))}, found {values!r:.60}"
        )
    return values


def _series(name: str) -> str:
    return f" in series {name}" if name else ""
