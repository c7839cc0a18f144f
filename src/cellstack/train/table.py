"""Tables as people have them, read as evenly spaced time series; what was understood is said. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.spec import FormatError
from cellstack.train import clock, dates, grid
from cellstack.train.checks import UsageError
from cellstack.train.columns import Category, convert, decimal_sign
from cellstack.train.grid import Spacing
from cellstack.train.source import Series, Source, read_source

__all__ = ["Category", "Filled", "Spacing", "Table", "read_table"]

SHOWN = 8  # names in a sentence


class Filled(NamedTuple):
    """What was put in by series: `gaps` and `rows` in them, int64 `[S]` each."""

    gaps: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """One or more series, each on an even grid, one row a step of time.

    Args:
        path: the file, or "a data frame".
        ids: names of the series, in order of first appearance; `("",)` where the table holds one without a name.
        starts: int64 `[S+1]`; series s stands in rows `starts[s]:starts[s+1]` of every column.
        columns: float64 `[N]` by name, NaN where a value is missing. Rows that the table leaves out are there, all NaN.
        categories: columns of text with few different values, by name; codes are -1 where missing.
        times: datetime64[s] `[N]` (datetime64[us] where the spacing isn't of whole seconds), wall-clock time of each
            row; None where the table has no dates.
        date: name of the column of dates; with commas between, where several make them up.
        id: name of the column that names the series, likewise; None where the table holds one.
        spacing: between two rows, the same in all series; None without dates.
        zone: time zone of `times`, where one was given or told.
        ignored: why a column isn't used, by its name.
        filled: gaps that were filled with rows, by series.
        notes: what was assumed in reading, a sentence each.
        reading: arguments of `read_table` that read another file of this kind in the same way; plain values.
    """

    path: str
    ids: tuple[str, ...]
    starts: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    categories: dict[str, Category]
    times: NDArray[np.datetime64] | None
    date: str | None
    id: str | None
    spacing: Spacing | None
    zone: str | None
    ignored: dict[str, str]
    filled: Filled
    notes: tuple[str, ...]
    reading: dict[str, Any]

    def __len__(self) -> int:
        """Rows N, of all series together, with those that were filled in."""
        return int(self.starts[-1])

    def rows(self, series: int) -> slice:
        """Return the rows of a series."""
        return slice(int(self.starts[series]), int(self.starts[series + 1]))

    def times_after(self, steps: int, series: int = 0) -> NDArray[np.datetime64] | None:
        """Return the wall-clock times of the `steps` rows that follow a series' last one; None without dates.

        Raises:
            FormatError: they lie beyond what a date can be.
        """
        if self.times is None or self.spacing is None:
            return None
        last, ahead = self.times[self.rows(series)][-1], np.arange(1, steps + 1)
        absolute = self.zone is not None and self.spacing.seconds % grid.DAY != 0
        first = _utc(self.times[self.rows(series)], self.zone)[-1] if absolute else last
        times = self.spacing.times(first, ahead)
        if times[-1] >= np.datetime64("10000-01-01") or times[-1] < first:
            raise FormatError(
                f"{self.path}: expected dates up to the year 9999, found {steps} steps after "
                f"{last.astype('datetime64[D]')}"
            )
        return (_wall(times, self.zone) if absolute else times).astype(self.times.dtype)

    def date_after(self, rows: int, series: int = 0) -> str | None:
        """Return the date of the row that stands `rows` after a series' last one, in ISO form; None without dates.

        Raises:
            FormatError: it lies beyond what a date can be.
        """
        times = self.times_after(rows, series)
        return None if times is None else iso(times[-1])

    def unchanging(self) -> dict[str, str]:
        """Return what there is to say of columns that hold one value or none, by name."""
        said = {}
        for name, values in self.columns.items():
            present = values[~np.isnan(values)]
            if not len(present):
                said[name] = "no value"
            elif (present == present[0]).all():
                said[name] = f"always {present[0]:g}"
        for name, category in self.categories.items():
            if len(category.labels) < 2:
                said[name] = f"always {category.labels[0]!r}" if category.labels else "no value"
        return said

    def understood(self) -> list[str]:
        """Return what was understood of the table, a sentence each, what matters first."""
        count = len(self) - int(self.filled.rows.sum())
        said = f"{count:,} rows"
        if self.id is not None:
            lengths = np.diff(self.starts)
            span = f"{lengths.min():,}" + (f" to {lengths.max():,}" if lengths.min() != lengths.max() else "")
            said += f" of {len(self.ids):,} series by `{self.id}` ({span} steps each)"
        if self.times is None:
            sentences = [f"{said}, in their order: no column of dates"]
        else:
            span = f"from {iso(self.times.min(), ' ')} to {iso(self.times.max(), ' ')}"
            sentences = [f"{said}, {self.spacing} {span} by `{self.date}`" + (f", in {self.zone}" if self.zone else "")]
            gaps, rows = int(self.filled.gaps.sum()), int(self.filled.rows.sum())
            if gaps:
                sentences.append(f"{gaps:,} {_plural('gap', gaps)} filled by mask ({rows:,} {_plural('row', rows)})")
        sentences += self.notes
        holes = {
            name: int(np.isnan(values).sum()) - int(self.filled.rows.sum()) for name, values in self.columns.items()
        }
        holes |= {name: int((c.codes < 0).sum()) - int(self.filled.rows.sum()) for name, c in self.categories.items()}
        still = self.unchanging()
        missing = [f"`{name}` ({count:,})" for name, count in holes.items() if count and name not in still]
        if missing:
            sentences.append(f"cells missing in {listed(missing)}")
        if self.categories:
            named = [f"`{name}` as {len(category.labels):,} categories" for name, category in self.categories.items()]
            sentences.append(listed(named))
        if still:
            sentences.append("of no use: " + listed([f"`{name}` ({why})" for name, why in still.items()]))
        if self.ignored:
            sentences.append("ignored: " + listed([f"`{name}` ({why})" for name, why in self.ignored.items()]))
        return sentences


def iso(time: np.datetime64, between: str = "T") -> str:
    """Return a time in ISO form, the day alone at midnight."""
    day, clock = str(time.astype("datetime64[us]").item().isoformat()).split("T")
    return day if clock == "00:00:00" else f"{day}{between}{clock}"


def listed(names: Sequence[str]) -> str:
    """Return names with commas between, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def read_table(
    source: Any,
    *,
    date: str | Sequence[str] | None = None,
    day_first: bool | None = None,
    date_format: str | None = None,
    zone: str | None = None,
    ids: str | Sequence[str] = (),
    freq: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    categories: Sequence[str] = (),
) -> Table:
    """Read a table as time series on an even grid.

    Args:
        source: path of a `.csv` or `.parquet` file, a pandas or a polars frame.
        date: name of the column of dates, several where these together make them up (a day and its hour; year and
            month), or `""` for none; found by names and cells where None.
        day_first: whether the day stands before the month in dates such as 01/02/2023; told by the cells where None.
        date_format: how dates are written: a form of strptime's, `s`, `ms`, `us` or `ns` for Unix times, `excel` for
            serial numbers; told by the cells where None.
        zone: time zone, such as `Europe/Berlin`, of dates without an offset, or to turn those with one into.
        ids: names of the columns that tell series apart.
        freq: spacing of the rows, as pandas writes it: `h`, `30min`, `D`, `B`, `MS`; told by the dates where None.
        decimal: sign before decimals, `.` or `,`.
        encoding: of a text file; UTF-8, or what its first bytes say, where None.
        categories: columns to take as categories whatever they hold.

    Raises:
        FormatError: what can't be read, or only in more than one way; the message names file, line, column and cell.
        UsageError: a column that isn't there, an argument out of its range, or a package that isn't installed.
        OSError: the file can't be read.
    """
    ids = (ids,) if isinstance(ids, str) else tuple(ids)
    given = read_source(source, encoding, (*ids, *categories))
    date = ",".join(date) if date is not None and not isinstance(date, str) else date
    for name in (*ids, *categories):
        if name not in given.frame:
            raise UsageError(f"{given.path}: expected a column {name!r}, found {', '.join(given.frame)}")
    if date is None:
        date = dates.find(given, ids)
    if not ids and len(given.index) > 1 and date in given.index:
        ids = tuple(name for name in given.index if name != date)
        given.notes.append(f"series by {listed([f'`{name}`' for name in ids])}, which the frame's index holds")
    codes, names = _series(given, ids)
    if date:
        place, starts, times, spacing, zone, filled, form = _placed(
            given, date, codes, day_first, date_format, zone, freq
        )
    else:
        order = np.argsort(codes, kind="stable")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        starts = np.searchsorted(codes[order], np.arange(len(names) + 1)).astype(np.int64)
        times = spacing = form = None
        filled = Filled(*np.zeros((2, len(names)), np.int64))
    used = {*ids, *(() if not date else [date] if date in given.frame else [part.strip() for part in date.split(",")])}
    others = [name for name in given.frame if name not in used or name in categories]
    ignored = {name: "row numbers" for name in others if name in given.index and _row_numbers(given.frame[name])}
    others = [name for name in others if name not in ignored]
    decimal = decimal_sign(given, others, decimal)
    columns, labels = {}, {}
    rows = int(starts[-1])
    for name in others:
        value, said = convert(given, name, decimal, name in categories)
        if said:
            given.notes.append(f"`{name}`: {said}")
        if isinstance(value, str):
            ignored[name] = value
        elif isinstance(value, Category):
            codes_there = np.full(rows, -1, np.int64)
            codes_there[place] = value.codes[: len(place)]
            labels[name] = Category(codes_there, value.labels)
        else:
            columns[name] = np.full(rows, np.nan)
            columns[name][place] = value
    if not columns:
        raise FormatError(f"{given.path}: expected a column of numbers, found none in {', '.join(given.frame)}")
    if decimal == "," and given.lines is not None:
        given.notes.append("decimal commas")
    reading = {
        "date": date or "",
        "date_format": form,
        "zone": zone,
        "ids": list(ids),
        "freq": None if spacing is None else spacing.alias,
        "decimal": decimal,
        "encoding": encoding,
        "categories": list(labels),
    }
    return Table(
        given.path,
        names,
        starts,
        columns,
        labels,
        times,
        date or None,
        ",".join(ids) or None,
        spacing,
        zone,
        ignored,
        filled,
        tuple(given.notes),
        reading,
    )


def _row_numbers(cells: Series) -> bool:
    return cells.dtype.kind == "i" and bool((np.diff(cells.to_numpy()) == 1).all())


def _series(given: Source, ids: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the number of each row's series, and the series' names, in order of first appearance."""
    import pandas as pd

    if not ids:
        return np.zeros(len(given.frame), np.int64), ("",)
    joined: Any = None
    for name in ids:
        cells = given.frame[name]
        if cells.isna().any():
            row = int(np.argmax(cells.isna().to_numpy()))
            raise FormatError(
                f"{given.at(row)}: expected the name of a series in column {name}, found {given.quote(row, name)}"
            )
        codes, labels = pd.factorize(cells)
        labels = pd.Index([str(label) for label in labels])
        joined = (codes, labels) if joined is None else _joined(joined, (codes, labels))
    codes, labels = joined
    return codes.astype(np.int64), tuple(labels)


def _joined(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    import pandas as pd

    codes, pairs = pd.factorize(one[0] * len(other[1]) + other[0])
    return codes, [f"{one[1][pair // len(other[1])]}/{other[1][pair % len(other[1])]}" for pair in pairs]


def _placed(
    given: Source,
    date: str,
    codes: NDArray[np.int64],
    day_first: bool | None,
    date_format: str | None,
    zone: str | None,
    freq: str | None,
) -> tuple[Any, ...]:
    """Return each row's place on the grid, its starts, times, spacing, zone, what was filled, and the dates' form."""
    found = dates.read(given, date, codes, day_first, date_format)
    if found.told:
        given.notes.append(f"`{date}`: {found.told}")
    utc, zone = _zoned(given, found, codes, zone)
    wall: Any = found.times.to_numpy() if utc is None else _wall(utc, zone)
    absolute = utc is not None and len(np.unique(wall - wall.astype("datetime64[D]"))) > 1
    along: Any = utc if absolute else wall
    order = np.lexsort((along, codes))
    if _falls(along, codes):
        given.notes.append("rows sorted by time")
    _refuse_twins(given, date, along, codes, order, zone)
    times, series = along[order], codes[order]
    try:
        spacing = grid.spacing_of(freq) if freq is not None else grid.told(times, series)
    except ValueError:
        raise UsageError(f"expected a spacing such as h, 30min, D, B or MS, got {freq!r}") from None
    if spacing is None:
        raise FormatError(f"{given.path}: expected a series of at least two dates, found one row for each")
    if times.max() >= np.datetime64("9999-01-01"):  # the calendar ends there
        raise FormatError(f"{given.path}: expected dates before the year 9999, found {iso(times.max())}")
    first = np.flatnonzero(np.diff(series, prepend=-1))
    at = spacing.places(times, times[first][series])
    steps = np.rint(at).astype(np.int64)
    uneven = np.flatnonzero(np.abs(at - steps) > 1e-6)
    if len(uneven):
        row = order[uneven[0]]
        raise FormatError(
            f"{given.at(row)}: expected dates spaced evenly ({spacing}), found {given.quote(row, date.split(',')[0])}, "
            f"which lies between two steps: resample them first, in pandas "
            f"df.set_index({date!r}).resample({spacing.alias!r}).mean()"
        )
    last = np.append(first[1:], len(series)) - 1
    lengths = steps[last] + 1
    if lengths.sum() >= 20 * len(series):
        raise FormatError(
            f"{given.path}: expected dates without long gaps, found {lengths.sum():,} steps ({spacing}) for "
            f"{len(series):,} rows"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.empty(len(order), np.int64)
    place[order] = starts[series] + steps
    there = np.zeros(starts[-1], bool)
    there[place] = True
    missing = ~there
    begins = missing & np.append(True, there[:-1])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    filled = Filled(*(np.bincount(owner[what], minlength=len(lengths)) for what in (begins, missing)))
    rows = np.arange(starts[-1]) - starts[owner]
    all_times = spacing.times(times[first][owner], rows)
    if absolute:
        all_times = _wall(all_times, zone)
    whole = spacing.months or spacing.seconds % 1 == 0
    return (
        place,
        starts,
        all_times.astype("datetime64[s]" if whole else "datetime64[us]"),
        spacing,
        zone,
        filled,
        found.form or None,
    )


def _zoned(
    given: Source, found: dates.Dates, codes: NDArray[np.int64], zone: str | None
) -> tuple[NDArray[np.datetime64] | None, str | None]:
    """Return the times in UTC, None where no time zone is known, and the zone of the wall clock."""
    if found.offsets:
        if zone is None and found.zone is None:
            same = len(found.offsets) == 1
            zone = _offset(found.offsets[0]) if same else "UTC"
            if not same:
                given.notes.append(
                    f"`{found.name}` names {len(found.offsets)} offsets ({listed(found.offsets)}): taken in UTC, "
                    f"--zone gives local time"
                )
        return found.times.to_numpy(), zone or found.zone
    told = zone is None
    if told:
        zone = clock.told(found.times, codes)
        if zone is None:
            return None, None
    utc, said = clock.to_utc(given, found.times, codes, zone)
    if told:
        said = (
            f"local time whose clock is changed as in {zone}, told by the hours that stand twice or are missing "
            f"(--zone names another)" + (f"; {said}" if said else "")
        )
    if said:
        given.notes.append(f"`{found.name}`: {said}")
    return utc.to_numpy(), zone


def _offset(text: str) -> str:
    """Return an offset as pandas names its zone: `UTC+01:00`."""
    if text in ("Z", "UTC", "GMT"):
        return "UTC"
    digits = text[1:].replace(":", "").ljust(4, "0")
    return "UTC" if digits == "0000" else f"UTC{text[0]}{digits[:2]}:{digits[2:]}"


def _wall(utc: NDArray[np.datetime64], zone: str | None) -> NDArray[np.datetime64]:
    import pandas as pd

    return (
        pd.Series(utc)
        .dt.tz_localize("UTC")
        .dt.tz_convert(zone)
        .dt.tz_localize(None)
        .to_numpy()
        .astype("datetime64[us]")
    )


def _utc(wall: NDArray[np.datetime64], zone: str | None) -> NDArray[np.datetime64]:
    """Return one series' wall-clock times in UTC; of two that are alike, the first is before the clock is put back."""
    import pandas as pd

    times = pd.Series(wall.astype("datetime64[us]"))
    return (
        times.dt.tz_localize(zone, ambiguous=~times.duplicated().to_numpy())
        .dt.tz_convert("UTC")
        .dt.tz_localize(None)
        .to_numpy()
    )


def _falls(times: NDArray[np.datetime64], codes: NDArray[np.int64]) -> bool:
    """Return whether rows of a series stand out of the order of time."""
    order = np.argsort(codes, kind="stable")
    same = np.diff(codes[order]) == 0
    return bool((np.diff(times[order])[same] < np.timedelta64(0)).any())


def _refuse_twins(
    given: Source,
    date: str,
    times: NDArray[np.datetime64],
    codes: NDArray[np.int64],
    order: NDArray[np.int64],
    zone: str | None,
) -> None:
    """Raise `FormatError` where a time stands twice in a series; the message names what would tell the rows apart."""
    import pandas as pd

    twin = (np.diff(times[order]) == np.timedelta64(0)) & (np.diff(codes[order]) == 0)
    if not twin.any():
        return
    n = int(np.argmax(twin)) + 1
    row, before = max(order[n], order[n - 1]), min(order[n], order[n - 1])
    name = date.split(",")[0].strip()
    keys = pd.DataFrame({"c": codes, "t": times})
    for other in given.frame:
        if (
            given.frame[other].dtype.kind != "f"
            and other != name
            and not keys.assign(o=given.frame[other]).duplicated().any()
        ):
            mend = f"say --id {other}, if that column names the series"
            break
    else:
        mend = "keep one, or their mean, as by df.groupby('" + name + "').mean() in pandas"
        if zone is None and (like := clock.near_a_change(pd.Series(times[order][1:][twin]))):
            mend = f"if the clock is put back then, as in {like}, give --zone; else {mend}"
    where = "in order of time" if len(np.unique(codes)) == 1 else "in each series"
    raise FormatError(
        f"{given.at(row)}: expected each time once {where}, found {given.quote(row, name)} in column {name} again, as "
        f"in {given.at(before).removeprefix(given.path + ': ')}: {mend}"
    )
