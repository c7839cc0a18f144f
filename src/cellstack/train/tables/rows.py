"""Assign the rows of a table to series, and to positions on an even grid of times. Needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.tables import grid
from cellstack.train.tables.clock import wall_clock, zoned
from cellstack.train.tables.dates import EXCEL, HOURS, UNITS, Dates
from cellstack.train.tables.grid import Spacing
from cellstack.train.tables.source import Frame, TableCells

LATEST = np.datetime64("9999-01-01")  # the calendar ends a year later


class Filled(NamedTuple):
    """Number of filled `gaps`, and of inserted `rows`, in each series, int64 `[S]` each."""

    gaps: NDArray[np.int64]
    rows: NDArray[np.int64]


class Placed(NamedTuple):
    """Rows on their grid.

    `place` int64 `[R]` is the position of each row of the source; series s has positions `starts[s]:starts[s+1]`.
    `times` `[N]`, `spacing`, `zone` and `form` (the format of the dates) are None without dates.
    """

    place: NDArray[np.int64]
    starts: NDArray[np.int64]
    filled: Filled
    times: NDArray[np.datetime64] | None = None
    spacing: Spacing | None = None
    zone: str | None = None
    form: str | None = None


def series_of(given: TableCells, ids: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the number of each row's series, int64 `[R]`, and the series' names, in order of first appearance.

    Raises:
        FormatError: a row without a name.
    """
    import pandas as pd

    if not ids:
        return np.zeros(len(given.frame), np.int64), ("",)
    joined: Any = None
    for name in ids:
        cells = given.frame[name]
        if cells.isna().any():
            row = int(np.argmax(cells.isna().to_numpy()))
            raise FormatError(
                f"{given.at(row)}: expected a series name in column {name}, found {given.quote(row, name)}"
            )
        if cells.dtype.kind == "f" and (cells % 1 == 0).all():
            cells = cells.astype("int64")  # named 7, not 7.0, as in a file
        codes, labels = pd.factorize(cells)
        labels = pd.Index([str(label) for label in labels])
        joined = (codes, labels) if joined is None else _joined(joined, (codes, labels))
    codes, labels = joined
    return codes.astype(np.int64), tuple(labels)


def _joined(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    import pandas as pd

    codes, pairs = pd.factorize(one[0] * len(other[1]) + other[0])
    return codes, [f"{one[1][pair // len(other[1])]}/{other[1][pair % len(other[1])]}" for pair in pairs]


def in_order(codes: NDArray[np.int64], count: int) -> Placed:
    """Place rows without dates: series after series, in row order.

    Args:
        codes: number of each row's series, `[R]`.
        count: number of series S.
    """
    order = np.argsort(codes, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    starts = np.searchsorted(codes[order], np.arange(count + 1)).astype(np.int64)
    return Placed(place, starts, Filled(*np.zeros((2, count), np.int64)))


def by_dates(
    given: TableCells,
    found: Dates,
    codes: NDArray[np.int64],
    ids: tuple[str, ...],
    zone: str | None,
    freq: str | None,
) -> Placed:
    """Place rows with dates on an even grid; exact duplicates of rows are removed from `given`.

    Args:
        given: the table; assumptions are added to its notes.
        found: its dates.
        codes: number of each row's series, `[R]`.
        ids: the columns that identify the series, for messages.
        zone: time zone of the local times; None = without daylight saving.
        freq: spacing, in pandas's notation; None = inferred.

    Raises:
        FormatError: a time that occurs twice, or dates that aren't evenly spaced.
        UsageError: an unknown zone or spacing.
    """
    utc, zone = zoned(given, found, codes, zone)
    wall: Any = found.times.to_numpy() if utc is None else wall_clock(utc, zone)
    of_day = wall - wall.astype("datetime64[D]")
    absolute = utc is not None and not (of_day == of_day[0]).all()  # hours are counted in UTC, days by the calendar
    times: Any = utc if absolute else wall
    kept = _untwinned(given, found, times, codes, zone)
    times, codes = times[kept], codes[kept]
    if _falls(times, codes):
        given.notes.append("rows sorted by time")
    order = np.lexsort((times, codes))
    placed = _on_grid(given, found, times[order], codes[order], ids, order, freq)
    if absolute:
        placed = placed._replace(times=wall_clock(placed.times, zone))
    whole = placed.spacing.months or placed.spacing.seconds % 1 == 0
    return placed._replace(times=placed.times.astype("datetime64[s]" if whole else "datetime64[us]"), zone=zone)


def _on_grid(
    given: TableCells,
    found: Dates,
    times: NDArray[np.datetime64],
    codes: NDArray[np.int64],
    ids: tuple[str, ...],
    order: NDArray[np.int64],
    freq: str | None,
) -> Any:
    """Place sorted times on a grid, series after series; `order` has the row of each of them."""
    try:
        spacing = grid.spacing_of(freq) if freq is not None else grid.inferred(times, codes)
    except ValueError:
        raise UsageError(f"expected a spacing such as h, 30min, D, B or MS, got {freq!r}") from None
    if spacing is None:
        raise FormatError(
            f"{given.path}: the spacing can't be inferred from one row per series: use `freq=…`, such as D for days"
        )
    if times.max() >= LATEST:
        raise FormatError(f"{given.path}: expected dates before the year 9999, found {times.max()}")
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    last = np.append(first[1:], len(codes)) - 1
    at = spacing.places(times, times[first][codes])
    steps = np.rint(at).astype(np.int64)
    uneven = np.flatnonzero(np.abs(at - steps) > 1e-6)
    if len(uneven):
        row = int(order[uneven[0]])
        zone = "" if len(found.offsets) < 2 else "use `zone=…`, if they are even in local time; or "
        raise FormatError(
            f"{given.at(row)}: expected evenly spaced dates ({spacing}), found {found.shown(given, row)}, which is "
            f"between two steps: {zone}{_averaged(given, found, times, codes, ids, spacing)}"
        )
    lengths = steps[last] + 1
    if lengths.sum() >= 20 * len(codes):
        raise FormatError(
            f"{given.path}: expected dates without long gaps, found {lengths.sum():,} steps ({spacing}) for "
            f"{len(codes):,} rows"
        )
    if problem := _other_steps(given, spacing, steps, codes, order):
        raise FormatError(f"{problem}: {_averaged(given, found, times, codes, ids, spacing)}")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.empty(len(order), np.int64)
    place[order] = starts[codes] + steps
    missing = np.ones(starts[-1], bool)
    missing[place] = False
    begins = missing & ~np.append(False, missing[:-1])
    series = np.repeat(np.arange(len(lengths)), lengths)
    filled = Filled(*(np.bincount(series[what], minlength=len(lengths)) for what in (begins, missing)))
    rows = np.arange(starts[-1]) - starts[series]
    return Placed(place, starts, filled, spacing.times(times[first][series], rows), spacing, form=found.form or None)


def _other_steps(
    given: TableCells, spacing: Spacing, steps: NDArray[np.int64], codes: NDArray[np.int64], order: NDArray[np.int64]
) -> str:
    """Return an error if a series of at least 5 rows never has a step of the common spacing; else ""."""
    same = np.diff(codes) == 0
    small = np.full(int(codes[-1]) + 1, np.iinfo(np.int64).max)
    np.minimum.at(small, codes[1:][same], np.diff(steps)[same])
    other = np.flatnonzero((small > 1) & (np.bincount(codes) >= 5))
    if not len(other):
        return ""
    row = order[np.argmax(codes == other[0])]
    return (
        f"{given.at(row)}: expected the same spacing in all series ({spacing}), found steps at least "
        f"{small[other[0]]} times as long in the series of this row"
    )


def _averaged(
    given: TableCells,
    found: Dates,
    times: NDArray[np.datetime64],
    codes: NDArray[np.int64],
    ids: tuple[str, ...],
    spacing: Spacing,
) -> str:
    """Return how pandas averages the rows of each series over the longest spacing, for messages."""
    ends = np.flatnonzero(np.diff(codes)) + 1
    each = [spacing, *filter(None, map(grid.inferred, np.split(times, ends), np.split(codes, ends)))]
    months = np.diff(times.astype("datetime64[M]").astype(np.int64))[np.diff(codes) == 0]
    if months.min() >= 1 and not spacing.months:  # one row per month, on irregular days
        each = [Spacing(months=1)]
    longest = max(each, key=lambda one: one.months * 28 * grid.DAY + one.seconds)
    name, lines = found.name, []
    said = "train separately on series of each spacing, or " * (len(set(each)) > 1) + "average them, in pandas "
    if name not in given.frame:
        said, name = f"with the dates of {name} in one column, 'date': {said}", "date"
    elif given.lines is None and {name, *ids} & set(given.index):
        lines.append("df = df.reset_index()")
    if found.form and name == found.name:
        how = f"unit={found.form!r}" if found.form in UNITS else f"format={found.form!r}"
        how = "format='ISO8601'" if found.form.startswith("%Y-%m-%d") else how
        how = f"unit='D', origin={EXCEL!r}).dt.round('ms'" if found.form == "excel" else how
        lines.append(f"df[{name!r}] = pd.to_datetime(df[{name!r}], {how}{', utc=True' * (len(found.offsets) > 1)})")
    keys = ", ".join([*map(repr, ids), f"pd.Grouper(key={name!r}, freq={longest.alias!r})"])
    lines.append(f"df = df.groupby([{keys}]).mean(numeric_only=True).reset_index()")
    return said + "; ".join(lines)


def _falls(times: NDArray[np.datetime64], codes: NDArray[np.int64]) -> bool:
    """Return whether the rows of any series aren't in chronological order."""
    order = np.argsort(codes, kind="stable")
    same = np.diff(codes[order]) == 0
    return bool((np.diff(times[order])[same] < np.timedelta64(0)).any())


def _untwinned(
    given: TableCells, found: Dates, times: NDArray[np.datetime64], codes: NDArray[np.int64], zone: str | None
) -> NDArray[np.bool_]:
    """Return which rows to keep: exact duplicates are dropped, with a note.

    Raises:
        FormatError: a time occurs twice in a series, in rows that differ; the message says how to fix it.
    """
    import pandas as pd

    keys = pd.DataFrame({"c": codes, "t": times})
    twin = keys.duplicated().to_numpy()
    if not twin.any():
        return ~twin
    repeated = given.frame.duplicated().to_numpy()
    if (repeated | ~twin).all():
        given.keep(~repeated)
        given.notes.append(f"{repeated.sum():,} duplicate rows dropped")
        return ~repeated
    row = int(np.argmax(twin & ~repeated))
    before = int(np.argmax((codes == codes[row]) & (times == times[row])))
    if apart := _apart(given.frame, keys, found.name):
        names = apart.split(",")
        fix = f"use `id={names if len(names) > 1 else apart!r}`, if that identifies the series"
    else:
        fix = f"keep one row, or their mean, in pandas df.groupby({found.name!r}).mean()"
        if 10 * twin.sum() > len(twin):
            by_id = "use `id=…` for the column that identifies series"
            fix = f"{by_id}, or `time=…` with a column of hours too; or {fix}"
        if zone is None and times[row] != times[row].astype("datetime64[D]"):
            fix = f"use `zone=…`, if the clock is set back then; else {fix}"
    where = "" if codes.max() == 0 else " in each series"
    raise FormatError(
        f"{given.at(row)}: expected each time only once{where}, found {found.shown(given, row)} in column {found.name} "
        f"again, as in {given.at(before).removeprefix(given.path + ': ')}: {fix}"
    )


def _apart(frame: Frame, keys: Frame, date: str) -> str:
    """Return a column, or two of text, with few distinct values, for each of which every time is unique; else ""."""
    of_text = []
    for name in frame.columns:
        if frame[name].dtype.kind == "f" or name in date.split(",") or HOURS.match(name):
            continue
        if 2 * frame[name].nunique() <= len(frame):
            if not keys.assign(o=frame[name]).duplicated().any():
                return name
            if frame[name].dtype.kind not in "iub":
                of_text.append(name)
    pairs = ((a, b) for n, a in enumerate(of_text) for b in of_text[n + 1 :])
    return next((f"{a},{b}" for a, b in pairs if not keys.assign(a=frame[a], b=frame[b]).duplicated().any()), "")
