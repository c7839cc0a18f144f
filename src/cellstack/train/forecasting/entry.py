"""`train.fit_forecast`: train a network to forecast a table in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from typing import Any

import numpy as np

from cellstack.train.checks import UsageError
from cellstack.train.forecasting.plan import Request, planned
from cellstack.train.forecasting.training import Build, Trained, train_forecast
from cellstack.train.settings import FitOptions, record_of, widths_of
from cellstack.train.tables.table import Table, read_table, reading_of

SEVERAL = ("seasons", "inputs", "known", "quantiles")  # of `Request`; one alone is accepted too
READING = tuple(name for name in signature(read_table).parameters if name not in ("source", "id"))


def fit_forecast(
    data: Any,
    target: str | Sequence[str] | None = None,
    horizon: int | None = None,
    *,
    id: str | Sequence[str] | None = None,
    time: str | Sequence[str] | None = None,
    test: float = 0.2,
    validation: float | None = FitOptions.validation,
    units: int | Sequence[int] | None = None,
    cell: str = "lstm",
    heads: int | None = None,
    dropout: float | None = None,
    members: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    clip: float = FitOptions.clip,
    patience: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Trained:
    """Train a network to forecast columns of a table, as `cellstack train` does, with the same defaults.

    Args:
        data: a pandas or polars frame, the name of a CSV or Parquet file, or a `Table` from `read_table`.
        target: column to forecast, or several; None = the only numeric column.
        horizon: steps to forecast; None = one season.
        id: column that identifies the series, or several; None = one series.
        time: column of dates, or several that form them together, as `date` of `read_table`; None = detected.
        test: share of each series' last rows to test on; 0 for none.
        validation: share of the rows before the test part, for model selection; None = 0.15, or 0 if the series are
            too short.
        units, cell, heads, dropout, members: how the networks are built, see `train.forecasting.training.Build`.
        epochs, batch, lr, clip, patience, seed: how each is fitted, see `train.Settings`.
        threads, device, progress, checkpoint, resume: how the training is run, see `train.fit`.
        options: `window`, `seasons`, `inputs`, `known`, `holidays`, `scale`, `quantiles`: see `Request`; one column or
            number alone is accepted where it has several. And the options of `read_table`: `zone`, `freq`, `day_first`,
            `decimal` and more.

    Arguments that are None depend on the table and on the number of training windows.

    Returns:
        `result`, with the network and its errors, `recipe`, `test` and `understood`.

    Raises:
        UsageError: a column that doesn't exist or is empty, too few rows, or arguments that don't fit each other.
        TypeError: an unknown option.

    Example:
        >>> import numpy as np, pandas as pd
        >>> from cellstack import train
        >>> n = np.arange(120)
        >>> frame = pd.DataFrame({"y": 5 + np.sin(n * np.pi / 6)})
        >>> quick = {"units": 4, "members": 1, "epochs": 1}
        >>> done = train.fit_forecast(frame, "y", horizon=4, seasons=12, **quick)
        >>> done.recipe.horizon, done.result.network.metadata["task"]
        (4, 'forecast')
    """
    given = locals()
    _check(options)
    reading = reading_of(id, time, {name: options.pop(name) for name in READING if name in options})
    table = _table(data, reading)
    asked: dict[str, Any] = {name: _several(value) if name in SEVERAL else value for name, value in options.items()}
    request = Request(_several(target) or (), horizon, **asked)
    recipe, _, usual, validation = planned(table, request, validation, test)
    chosen = {name: usual[name] for name in usual if given[name] is None}
    build = record_of(Build, given | chosen, units=widths_of((given | chosen)["units"]))
    fitting = record_of(FitOptions, given | chosen, validation=validation)
    return train_forecast(table, request, build, fitting, test, recipe)


def _check(options: dict[str, Any]) -> None:
    """Refuse unknown options.

    Raises:
        TypeError: names the closest option.
    """
    known = [field.name for field in fields(Request) if field.name not in ("targets", "horizon")]
    own = [name for name in signature(fit_forecast).parameters if name not in ("data", "options")]
    for name in options:
        if name not in (*known, *READING):
            names = [*own, *known, *READING]
            close = get_close_matches(name, names, 1)
            fix = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
            raise TypeError(f"fit_forecast: there is no option {name!r}: {fix}")


def _table(data: Any, reading: dict[str, Any]) -> Table:
    if not isinstance(data, Table):
        return read_table(data, **reading)
    for name in reading:
        raise UsageError(f"fit_forecast: {name} has no effect for a Table, which has been read already")
    return data


def _several(value: Any) -> tuple[Any, ...] | None:
    """Return one name or number, or several, as a tuple; None for None."""
    return value if value is None else (value,) if isinstance(value, (str, int, float, np.number)) else tuple(value)
