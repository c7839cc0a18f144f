"""Tables, read as evenly spaced time series, with a description of how they were read. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.tables import dates, grid
from cellstack.train.tables.clock import utc_of, wall_clock
from cellstack.train.tables.columns import CategoryColumn, convert, decimal_sign
from cellstack.train.tables.grid import Spacing
from cellstack.train.tables.rows import Filled, by_dates, in_order, series_of
from cellstack.train.tables.source import listed, read_source

__all__ = ["CategoryColumn", "Filled", "Spacing", "Table", "read_table"]


@dataclass(frozen=True, repr=False)
class Table:
    """One or more series, each on an even grid, with one row per time step.

    Args:
        path: the file, or "a data frame".
        ids: names of the series, in order of first appearance; `("",)` for one series without a name.
        starts: int64 `[S+1]`; series s is in rows `starts[s]:starts[s+1]` of every column.
        columns: float64 `[N]` by name, NaN where missing. Rows that are missing in the table are all NaN.
        categories: columns of text with few distinct values, by name; codes are -1 where missing.
        times: datetime64[s] `[N]` (datetime64[us] if the spacing isn't in whole seconds), wall-clock time of each row;
            None without dates.
        date: name of the date column, or of several, separated by commas.
        id: likewise, of the columns that identify the series; None if there is one series.
        spacing: between two rows, the same in all series; None without dates.
        zone: time zone of `times`, if given or in the dates.
        ignored: unused columns, and why.
        filled: gaps that were filled with rows, by series.
        notes: assumptions made in reading, a sentence each.
        reading: arguments of `read_table` that read another file of this kind in the same way; plain values.
    """

    path: str
    ids: tuple[str, ...]
    starts: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    categories: dict[str, CategoryColumn]
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
        """Rows N of all series together, including filled gaps."""
        return int(self.starts[-1])

    def __repr__(self) -> str:
        """Describe it in three or four lines."""
        lines = [f"Table of {self.path}: {self.understood()[0]}"]
        lines.append(f"numbers: {listed([f'`{name}`' for name in self.columns])}")
        if self.categories:
            lines.append(f"categories: {listed([f'`{name}`' for name in self.categories])}")
        if self.ignored:
            lines.append(f"ignored: {listed([f'`{name}`' for name in self.ignored])}")
        return "\n  ".join(lines)

    def rows(self, series: int) -> slice:
        """Return the rows of a series."""
        return slice(int(self.starts[series]), int(self.starts[series + 1]))

    def times_after(self, steps: int, series: int = 0) -> NDArray[np.datetime64] | None:
        """Return the wall-clock times of the `steps` rows after a series' last one; None without dates.

        Raises:
            FormatError: they are after the year 9999.
        """
        if self.times is None or self.spacing is None:
            return None
        last, ahead = self.times[self.rows(series)][-1], np.arange(1, steps + 1)
        absolute = self.zone is not None and self.spacing.seconds % grid.DAY != 0
        first = utc_of(self.times[self.rows(series)], self.zone)[-1] if absolute else last
        times = self.spacing.times(first, ahead)
        if times[-1] >= np.datetime64("10000-01-01") or times[-1] < first:
            raise FormatError(
                f"{self.path}: expected dates up to the year 9999, found {steps} steps after "
                f"{last.astype('datetime64[D]')}"
            )
        return (wall_clock(times, self.zone) if absolute else times).astype(self.times.dtype)

    def date_after(self, rows: int, series: int = 0) -> str | None:
        """Return the date `rows` rows after a series' last one, in ISO form; None without dates.

        Raises:
            FormatError: it is after the year 9999.
        """
        times = self.times_after(rows, series)
        return None if times is None else iso(times[-1])

    def unchanging(self) -> dict[str, str]:
        """Return a description of the columns with only one value or none, by name."""
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

    def shown(self, time: np.datetime64) -> str:
        """Return a time for readers, without the time of day if the spacing is in whole days."""
        whole = self.spacing is not None and not self.spacing.seconds % grid.DAY
        return iso(time) if whole else str(time).replace("T", " ").removesuffix(":00")

    def understood(self, leave_out: Sequence[str] = ()) -> list[str]:
        """Describe how the table was read, in sentences, the most important first.

        Args:
            leave_out: columns that aren't reported as constant.
        """
        count = len(self) - int(self.filled.rows.sum())
        said = f"{count:,} rows"
        if self.id is not None:
            lengths = np.diff(self.starts)
            span = f"{lengths.min():,}" + (f" to {lengths.max():,}" if lengths.min() != lengths.max() else "")
            said += f" of {len(self.ids):,} series by `{self.id}` ({span} steps each)"
        if self.times is None:
            sentences = [f"{said}, in row order: no column of dates"]
        else:
            span = f"from {self.shown(self.times.min())} to {self.shown(self.times.max())}"
            sentences = [f"{said}, {self.spacing} {span} by `{self.date}`" + (f", in {self.zone}" if self.zone else "")]
            gaps, rows = int(self.filled.gaps.sum()), int(self.filled.rows.sum())
            if gaps:
                sentences.append(
                    f"{gaps:,} {_plural('gap', gaps)} filled with masked rows ({rows:,} {_plural('row', rows)})"
                )
        sentences += self.notes
        holes = {
            name: int(np.isnan(values).sum()) - int(self.filled.rows.sum()) for name, values in self.columns.items()
        }
        holes |= {name: int((c.codes < 0).sum()) - int(self.filled.rows.sum()) for name, c in self.categories.items()}
        still = {name: why for name, why in self.unchanging().items() if name not in leave_out}
        missing = [f"`{name}` ({count:,})" for name, count in holes.items() if count and name not in still]
        if missing:
            sentences.append(f"missing values in {listed(missing)}")
        if self.categories:
            named = [
                f"`{name}` as {len(c.labels):,} categories" for name, c in self.categories.items() if name not in still
            ]
            sentences += [listed(named)] if named else []
        if still:
            sentences.append(
                "constant or empty, not used: " + listed([f"`{name}` ({why})" for name, why in still.items()])
            )
        if self.ignored:
            sentences.append("ignored: " + listed([f"`{name}` ({why})" for name, why in self.ignored.items()]))
        return sentences


def iso(time: Any) -> str:
    """Return a datetime64 in ISO form, only the day if it is midnight."""
    return str(time.astype("datetime64[us]").item().isoformat()).removesuffix("T00:00:00")


def date_unit(*times: NDArray[np.datetime64]) -> str:
    """Return the coarsest unit, D, s or us, that represents all of the times, in which to write a column of them."""
    for unit in ("D", "s"):
        if all((some.astype(f"datetime64[{unit}]") == some).all() for some in times):
            return unit
    return "us"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def read_table(
    source: Any,
    *,
    time: str | Sequence[str] | None = None,
    day_first: bool | None = None,
    date_format: str | None = None,
    zone: str | None = None,
    id: str | Sequence[str] | None = None,
    freq: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    categories: Sequence[str] = (),
) -> Table:
    """Read a table as time series on an even grid.

    Args:
        source: path of a `.csv` or `.parquet` file, a pandas or a polars frame.
        time: name of the date column, or of several that form the dates together (a day and its hour; year and month),
            or `""` for none; None = detected by names and cells.
        day_first: whether the day comes before the month in dates such as 01/02/2023; None = detected.
        date_format: format of the dates: strptime's, `s`, `ms`, `us` or `ns` for Unix times, `excel` for Excel's day
            numbers; None = detected.
        zone: time zone, such as `Europe/Berlin`, of dates without an offset, or to which to convert those with one.
        id: column that identifies the series, or several; None = one series.
        freq: spacing of the rows, in pandas's notation: `h`, `30min`, `D`, `B`, `MS`; None = inferred.
        decimal: decimal separator, `.` or `,`; None = detected.
        encoding: of a text file; None = UTF-8, or according to the byte order mark.
        categories: columns to read as categories regardless of their content.

    Raises:
        FormatError: a cell that can't be read, or is ambiguous; the message names file, line, column and cell.
        UsageError: a column that doesn't exist, an argument out of range, or a package that isn't installed.
        OSError: the file can't be read.
    """
    ids = (id,) if isinstance(id, str) else tuple(id or ())
    how = {"day_first": day_first, "date_format": date_format, "zone": zone, "freq": freq}
    given = read_source(source, encoding, (*ids, *categories))
    if len(given.frame) < 2:
        below = " below the header" if given.lines is not None else ""
        raise FormatError(f"{given.path}: expected at least two rows{below}, found {len(given.frame)}")
    date = ",".join(time) if time is not None and not isinstance(time, str) else time
    for name in (*ids, *categories):
        if name not in given.frame:
            raise UsageError(f"{given.path}: expected a column {name!r}, found {listed(list(given.frame))}")
    if date is None:
        date = dates.find(given, ids, series_of(given, ids)[0])
        if date is None and (asked := [name for name, value in how.items() if value is not None]):
            raise UsageError(
                f"{given.path}: `{asked[0]}=…` needs a column of dates, found none in {listed(list(given.frame))}: "
                "name it with `time=…`"
            )
    if not ids and len(given.index) > 1 and date in given.index:
        ids = tuple(name for name in given.index if name != date)
        given.notes.append(f"series by {listed([f'`{name}`' for name in ids])}, from the frame's index")
    codes, names = series_of(given, ids)
    if date:
        found = dates.read(given, date, codes, day_first, date_format)
        if found.note:
            given.notes.append(f"`{date}`: {found.note}")
        placed = by_dates(given, found, codes, ids, zone, freq)
    else:
        placed = in_order(codes, len(names))
    used = {*ids, *(() if not date else [date] if date in given.frame else [part.strip() for part in date.split(",")])}
    others = [name for name in given.frame if name not in used or name in categories]
    ignored = {name: "row numbers" for name in others if given.numbers_rows(name)}
    others = [name for name in others if name not in ignored]
    asked, decimal = decimal, decimal_sign(given, others, decimal)
    columns, labels = {}, {}
    rows = int(placed.starts[-1])
    for name in others:
        value, said = convert(given, name, decimal, name in categories)
        if said:
            given.notes.append(f"`{name}`: {said}")
        if isinstance(value, str):
            ignored[name] = value
        elif isinstance(value, CategoryColumn):
            codes_there = np.full(rows, -1, np.int64)
            codes_there[placed.place] = value.codes
            labels[name] = CategoryColumn(codes_there, value.labels)
        else:
            columns[name] = np.full(rows, np.nan)
            columns[name][placed.place] = value
    if not columns:
        raise FormatError(f"{given.path}: expected a numeric column, found none in {listed(list(given.frame))}")
    if decimal == ",":
        given.notes.append("decimal commas")
    reading = {
        "time": date or "",
        "date_format": placed.form,
        "zone": placed.zone,
        "id": list(ids),
        "freq": None if placed.spacing is None else placed.spacing.alias,
        "decimal": "," if decimal == "," else asked,
        "encoding": encoding,
        "categories": list(labels),
    }
    return Table(
        path=given.path,
        ids=names,
        starts=placed.starts,
        columns=columns,
        categories=labels,
        times=placed.times,
        date=date or None,
        id=",".join(ids) or None,
        spacing=placed.spacing,
        zone=placed.zone,
        ignored=ignored,
        filled=placed.filled,
        notes=tuple(given.notes),
        reading=reading,
    )


READING = tuple(name for name in signature(read_table).parameters if name != "source")
"""The options of reading a table."""
