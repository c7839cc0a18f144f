"""Sequences from frames in long form, with a row per step, and frames from columns: pandas and polars.

Neither is imported with this module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.data import rates as rates_of

PANDAS_DATES = re.compile(r"datetime64\[(\w+)")  # with or without a zone
ISO_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ].*)?)?)?$")
ALONE = "for a single sequence, add it with the same value in every row"
NUMBERED = re.compile(r"Unnamed: \d+|index(_0)?")  # names that an index column without a name gets


class Grouped(NamedTuple):
    """A frame's sequences, see `Sequences`; `y` has an entry per sequence or step, `weight` one per sequence."""

    x: list[NDArray[np.float64]]
    y: Any
    weight: Any
    ids: tuple[Any, ...]
    columns: tuple[str, ...]
    ignored: dict[str, str]
    label: str | None
    rates: str


def is_frame(value: Any) -> bool:
    """Return whether a value is a data frame."""
    return hasattr(value, "columns") and hasattr(value, "dtypes") and hasattr(value, "__getitem__")


def is_polars(value: Any) -> bool:
    """Return whether a value is a polars frame."""
    return type(value).__module__.partition(".")[0] == "polars"


def distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return columns by name; a name that occurs again gets an underscore at its end."""
    found: dict[str, Any] = {}
    for name, values in pairs:
        while name in found:
            name += "_"
        found[name] = values
    return found


def as_frame(columns: Mapping[str, Any], polars: bool) -> Any:
    """Return columns as a pandas frame, or as a polars frame.

    Raises:
        UsageError: pandas isn't installed.
    """
    if polars:
        import polars as pl

        return pl.DataFrame({name: _for_polars(values) for name, values in columns.items()})
    try:
        import pandas as pd
    except ModuleNotFoundError:
        raise UsageError(
            "to_frame needs pandas: pip install 'cellstack[table]', or use columns(), a dict of the same columns"
        ) from None
    return pd.DataFrame(dict(columns))


def _for_polars(values: Any) -> Any:
    """Return times in seconds in a unit that polars has."""
    return values.astype("datetime64[ms]") if getattr(values, "dtype", None) == "datetime64[s]" else values


def grouped(
    frame: Any,
    y: Any,
    *,
    id: str | None,
    time: str | None,
    features: Sequence[str] | None,
    weight: Any,
    per_step: bool | None,
    resample: float | None,
    name: str,
) -> Grouped:
    """Split a frame into its sequences: see `as_sequences` for the arguments.

    Raises:
        UsageError: a column that doesn't exist, missing ids or times, a time that occurs twice in a sequence, more than
            one class in a sequence, or no numeric column.
    """
    names = [str(column) for column in frame.columns]
    if isinstance(features, str):
        raise UsageError(f"{name}: expected features as a list of columns, got {features!r}")
    if not len(frame):
        raise UsageError(f"{name}: the frame has no rows")
    label, weighs = (given if isinstance(given, str) else None for given in (y, weight))
    if id is None:
        others = [column for column in names if column not in (label, weighs, time, *(features or ()))]
        named = [column for column in others if not _floats(frame, column)]
        fix = f", one of {', '.join(named)}" if named else f"; {ALONE}"
        raise UsageError(f"{name}: expected `id=…`, the column that identifies the sequence of a row{fix}")
    if id in (label, weighs, time):
        what = "y" if id == label else "time" if id == time else "sample_weight"
        raise UsageError(f"{name}: {id!r} can't be both id and {what}: id is the column that identifies the sequence")
    for what, column in (("id", id), ("time", time), ("y", label), ("sample_weight", weighs)):
        if column is not None and column not in names:
            alone = f"; {ALONE}" if what == "id" else ""
            raise UsageError(
                f"{name}: expected `{what}=…` to be a column, one of {', '.join(names)}, got {column!r}{alone}"
            )
    codes, ids = _coded(plain(frame, id), id, name)
    order, ticks = np.argsort(codes, kind="stable"), np.empty(0)
    if time is not None:
        ticks = ordered(frame, time, name)
        order = np.lexsort((ticks, codes))
        same = (np.diff(codes[order]) == 0) & (np.diff(ticks[order]) == ticks[:1] - ticks[:1])
        if same.any():
            row = order[int(np.argmax(same))]
            raise UsageError(
                f"{name}: {time!r} {plain(frame, time)[row]} occurs twice in the sequence with {id!r} "
                f"{ids[codes[row]]!r}"
            )
    cuts = np.cumsum(np.bincount(codes, minlength=len(ids)))[:-1]
    if resample is not None and time is None:
        raise UsageError("`resample=…` needs `time=…`, the column of times")
    used, ignored = {}, {}
    for column in features if features is not None else names:
        if column in (id, time, label, weighs) and features is None:
            continue
        if column not in names:
            raise UsageError(f"{name}: expected features among {', '.join(names)}, got {column!r}")
        numbers = numeric(frame, column)
        if features is None and numbers is not None and NUMBERED.fullmatch(column) and (np.diff(numbers) == 1).all():
            ignored[column] = "numbers the rows"  # the index that pandas wrote
        elif numbers is not None:
            used[column] = numbers
        elif features is not None:
            raise UsageError(f"{name}: expected numbers in column {column!r}, got {plain(frame, column)[0]!r:.40}")
        elif time is None and _dated(frame, column):
            ignored[column] = "contains dates: use `time=…` to order a sequence's rows by them"
        else:
            ignored[column] = f"isn't numeric: {plain(frame, column)[0]!r:.40}"
    if not used:
        raise UsageError(f"{name}: expected a numeric column in addition to {id!r}, found none")
    x = np.split(np.stack(list(used.values()), axis=1)[order], cuts)
    rates = ""
    if time is not None:
        times = np.split(rates_of.as_numbers(ticks[order]), cuts)
        if resample is not None:
            x, nearest = rates_of.resampled(x, times, resample)
            starts = np.concatenate([[0], cuts])
            order = order[np.concatenate([start + place for start, place in zip(starts, nearest, strict=True)])]
            cuts = np.cumsum([len(own) for own in x])[:-1]
        else:
            rates = rates_of.differing(times, time, " s" if ticks.dtype.kind == "M" else "")
    by_id = {value: n for n, value in enumerate(ids)}
    return Grouped(
        x,
        _of_each(frame, y, "y", id, by_id, order, cuts, per_step, name),
        _of_each(frame, weight, "sample_weight", id, by_id, order, cuts, False, name),
        ids,
        tuple(used),
        ignored,
        label,
        rates,
    )


def _floats(frame: Any, column: str) -> bool:
    """Return whether a column has a float dtype of pandas or polars: then it doesn't identify sequences."""
    return str(getattr(_series(frame, column), "dtype", "")).lower().startswith("float")


def _dated(frame: Any, column: str) -> bool:
    """Return whether a column has a date or time dtype of pandas or polars."""
    dtype = _series(frame, column).dtype
    return getattr(dtype, "kind", "") == "M" or str(dtype).startswith("Date")


def plain(frame: Any, column: str) -> NDArray:
    """Return a column's values, as objects unless they are numbers."""
    series = _series(frame, column)
    values = series.to_numpy()
    if values.dtype.kind in "mM":  # NumPy would convert nanoseconds to integers
        values = np.array([*series.to_list(), None], object)[:-1]
    return values if values.dtype.kind in "biuf" else values.astype(object)


def numeric(frame: Any, column: str) -> NDArray[np.float64] | None:
    """Return a column's numbers, NaN where missing; None if it isn't numeric."""
    series = _series(frame, column)
    if hasattr(series.dtype, "is_numeric"):  # polars
        if not (series.dtype.is_numeric() or str(series.dtype) == "Boolean"):
            return None
        values = series.to_numpy()
        if values.dtype == object:  # bools with gaps
            values = np.array([np.nan if value is None else float(value) for value in values])
        return values.astype(np.float64)
    if getattr(series.dtype, "kind", "O") not in "biuf":
        return None
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


def ordered(frame: Any, column: str, name: str) -> NDArray:
    """Return a column's times as numbers or dates that can be sorted.

    Raises:
        UsageError: a missing time, or one that is neither a number nor an ISO 8601 date.
    """
    series = _series(frame, column)
    numbers = numeric(frame, column)
    if numbers is None:
        unit = PANDAS_DATES.match(str(series.dtype))
        values = series.to_numpy(dtype=f"datetime64[{unit[1]}]") if unit else series.to_numpy()
        if values.dtype.kind not in "mM":
            try:
                if any(isinstance(value, str) and not ISO_DATE.match(value) for value in values):
                    raise ValueError("NumPy would read 20240131 as a year")
                values = np.array(
                    [np.datetime64("NaT") if value is None else value for value in values], "datetime64[us]"
                )
            except (TypeError, ValueError):
                raise UsageError(
                    f"{name}: expected numbers or dates such as 2024-05-31T12:00 in column {column!r}, got "
                    f"{series.to_numpy()[0]!r:.40}"
                ) from None
        numbers = values
        missing = np.isnat(values)
    else:
        missing = np.isnan(numbers)
    if missing.any():
        raise UsageError(f"{name}: column {column!r} has no value in row {int(np.argmax(missing))}")
    return numbers


def _series(frame: Any, column: str) -> Any:
    for given in frame.columns:
        if str(given) == column:
            return frame[given]
    raise KeyError(column)


def _coded(values: NDArray, column: str, name: str) -> tuple[NDArray[np.int64], tuple[Any, ...]]:
    """Return the index of each row's id, and the ids in order of first appearance."""
    places: dict[Any, int] = {}
    codes = np.array([places.setdefault(value, len(places)) for value in values.tolist()], np.int64)
    missing = [place for value, place in places.items() if value is None or value != value]
    if missing:
        row = int(np.argmax(np.isin(codes, missing)))
        raise UsageError(f"{name}: column {column!r} has no value in row {row}")
    return codes, tuple(places)


def _of_each(
    frame: Any,
    given: Any,
    what: str,
    id: str,
    by_id: Mapping[Any, int],
    order: NDArray[np.int64],
    cuts: NDArray[np.int64],
    per_step: bool | None,
    name: str,
) -> Any:
    """Return an entry for each sequence, or each step, from a column or from values by id."""
    if isinstance(given, str):
        parts = np.split(plain(frame, given)[order], cuts)
        if per_step:
            return parts
        for value, part in zip(by_id, parts, strict=True):
            first = part.tolist()[0]
            other = next((one for one in part.tolist() if one != first and one == one), first)
            if other != first and first == first:
                more = "; for one per step use `per_step=True`" if what == "y" else ""
                raise UsageError(
                    f"{name}: expected one {given!r} for each {id!r}, got {first!r} and {other!r} for {value!r}{more}"
                )
        found = np.empty(len(parts), object)
        found[:] = [part[0] for part in parts]
        return found
    if is_frame(given):
        others = [str(column) for column in given.columns if str(column) != id]
        if len(others) != 1 or len(others) == len(given.columns):
            raise UsageError(
                f"{what}: expected a frame with {id!r} and one other column, got {', '.join(given.columns)}"
            )
        given = dict(zip(plain(given, id).tolist(), plain(given, others[0]).tolist(), strict=True))
    series: Any = given
    if not isinstance(given, Mapping) and given is not None and len(given) == len(frame) != len(by_id):
        raise UsageError(
            f"{what}: expected one entry for each of {len(by_id)} {id!r}, got {len(given)}, one per row: pass the name "
            "of the column instead"
        )
    if hasattr(series, "index") and hasattr(series, "to_dict"):  # a Series by id
        if not series.index.is_unique:
            raise UsageError(f"{what}: expected each {id!r} once in the index of the Series, got one twice")
        given = series.to_dict()
    if isinstance(given, Mapping):
        missing = [value for value in by_id if value not in given]
        if missing:
            raise UsageError(
                f"{what}: expected an entry for every {id!r}, found none for {missing[0]!r} ({len(missing)} of "
                f"{len(by_id)} are missing)"
            )
        return [given[value] for value in by_id]
    return given
