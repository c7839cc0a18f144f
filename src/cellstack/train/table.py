"""Read a CSV file as an evenly spaced time series. Needs no torch."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellstack.spec import FormatError
from cellstack.train.checks import read_text

MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}
LARGEST = float(np.finfo(np.float32).max)
FORMS = ("%Y-%m-%d", "%Y%m%d", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y-%m", "%Y-%m-%dT%H:%M:%SZ")
DATES = (datetime.fromisoformat, *(lambda cell, form=form: datetime.strptime(cell, form) for form in FORMS))
LIKE_A_DATE = re.compile(
    r"\d{4}[-/]\d{1,2}([-/]\d{1,2}.*)?"  # year first: 2020-01-31, 2020/01/31 12:00, 2020-01
    r"|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}.*"  # year last: 31.12.2020, 1/31/20, which nothing here reads
    r"|(1[6-9]|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"  # 20200131
)


@dataclass(frozen=True)
class Spacing:
    """Distance between two rows: whole calendar months, or else seconds."""

    months: int = 0
    seconds: float = 0.0

    @property
    def season(self) -> int:
        """Rows in the next longer natural period: a day of hours, a week of days, a year of weeks or of months."""
        if self.months:
            return 12 // self.months if 12 % self.months == 0 else 1
        days = self.seconds / 86_400
        return max(1, round(1 / days) if days < 1 else {1: 7, 7: 52}.get(round(days), 1))

    def after(self, start: datetime, rows: int) -> datetime:
        """Date of the row that stands `rows` after the one at `start`."""
        if not self.months:
            return start + timedelta(seconds=self.seconds * rows)
        month = start.year * 12 + start.month - 1 + self.months * rows
        last = _days_in_month(month)
        at_end = start.day == _days_in_month(start.year * 12 + start.month - 1)
        return start.replace(year=month // 12, month=month % 12 + 1, day=last if at_end else min(start.day, last))


@dataclass(frozen=True)
class Table:
    """Columns of a series, one row a step of time.

    Args:
        columns: float64 `[N]` by name, NaN where a value is missing. Dates that the file leaves out are rows too,
            all NaN.
        texts: names of the columns that hold no numbers.
        dates: of each row; None where the file has no column of dates.
        date: name of the column of dates.
        spacing: between two rows; None without dates.
    """

    path: str
    columns: dict[str, NDArray[np.float64]]
    texts: tuple[str, ...]
    dates: list[datetime] | None
    date: str | None
    spacing: Spacing | None

    def __len__(self) -> int:
        """Rows N."""
        return len(next(iter(self.columns.values())))

    def date_after(self, rows: int) -> str | None:
        """Date of the row that stands `rows` after the last one, in ISO form; None without dates.

        Raises:
            FormatError: it lies beyond what a date can be.
        """
        if self.dates is None or self.spacing is None:
            return None
        try:
            date = self.spacing.after(self.dates[-1], rows)
        except (ValueError, OverflowError):
            last = self.dates[-1].date().isoformat()
            raise FormatError(
                f"{self.path}: expected dates up to the year 9999, found {rows} steps after {last}"
            ) from None
        return date.isoformat() if (date.hour, date.minute, date.second) != (0, 0, 0) else date.date().isoformat()


def read_csv(path: str | os.PathLike[str]) -> Table:
    """Read a CSV file with a line of names, separated by commas, semicolons or tabs.

    The first column whose cells are all dates in rising order gives the dates. Of the others, those of numbers are kept
    and the rest is named.

    Raises:
        FormatError: not such a file, or the dates in it don't rise or aren't all dates; the message names the line,
            what was expected and what was found.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    text = read_text(path)
    first = text.partition("\n")[0]
    lines = _lines(path, text, max(",;\t", key=first.count))
    names = [name.strip() for name in next(lines, (1, []))[1]]
    if not names or any(not name or _is_number(name) for name in names):
        raise FormatError(f"{path}: line 1: expected the columns' names, found {first.strip()[:60]!r}")
    for name, count in Counter(names).items():
        if count > 1:
            raise FormatError(f"{path}: line 1: expected a name once, found {name!r} {count} times")
    rows: list[list[str]] = []
    numbers: list[int] = []
    for number, row in lines:
        if not row and len(names) > 1:
            continue
        row = row or [""]  # in a file of one column, an empty line is a missing value
        if len(row) != len(names):
            raise FormatError(f"{path}: line {number}: expected {len(names)} cells, found {len(row)}")
        rows.append([cell.strip() for cell in row])
        numbers.append(number)
    if len(rows) < 2:
        raise FormatError(f"{path}: expected at least two rows below the names, found {len(rows)}")
    cells = dict(zip(names, zip(*rows, strict=True), strict=True))
    dates, date = None, None
    for name in names:
        if (dates := _dates(cells[name])) is not None:
            date = name
            break
    else:
        for name in names:
            _refuse_dates(path, name, cells[name], numbers)
    columns, texts = {}, []
    for name in names:
        if name == date:
            continue
        values = _numbers(path, name, cells[name], numbers)
        if values is None:
            texts.append(name)
        else:
            columns[name] = values
    if not columns:
        raise FormatError(f"{path}: expected a column of numbers, found none in {', '.join(names)}")
    spacing = None
    if dates is not None:
        spacing, at, dates = _grid(path, dates)
        columns = {name: _on_grid(values, at) for name, values in columns.items()}
    return Table(str(path), columns, tuple(texts), dates, date, spacing)


def _lines(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Give each row's cells with the number of its last line."""
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise FormatError(f"{path}: line {reader.line_num}: {error}") from None


def _numbers(path: Path, name: str, cells: tuple[str, ...], lines: list[int]) -> NDArray[np.float64] | None:
    """Return a column of numbers, or None where its first cell that isn't empty is none."""
    present = [cell for cell in cells if cell.lower() not in MISSING]
    if present and not _is_number(present[0]):
        return None
    values = np.full(len(cells), np.nan)
    for n, cell in enumerate(cells):
        if cell.lower() in MISSING:
            continue
        if not _is_number(cell):
            raise FormatError(f"{path}: line {lines[n]}: expected a number in column {name!r}, found {cell[:40]!r}")
        values[n] = float(cell)
        if abs(values[n]) > LARGEST:  # training is in float32
            raise FormatError(
                f"{path}: line {lines[n]}: expected a number that float32 holds in column {name!r}, found {cell[:40]!r}"
            )
    return values


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _parsed(cell: str, parse: Callable[[str], datetime]) -> datetime | None:
    try:
        return parse(cell)
    except ValueError:
        return None


def _dates(cells: Sequence[str]) -> list[datetime] | None:
    """Return the column's dates, None where a cell is no date or they don't rise."""
    for parse in DATES:
        try:
            dates = [parse(cell) for cell in cells]
        except ValueError:
            continue
        aware = {date.tzinfo is None for date in dates}
        if len(aware) == 1 and all(a < b for a, b in pairwise(dates)):
            return dates
    return None


def _refuse_dates(path: Path, name: str, cells: Sequence[str], lines: list[int]) -> None:
    """Raise `FormatError` where most of a column look like dates: one of them is none, or they don't rise.

    Else its rows would be taken for rows in the order of time, and the column for text or for numbers.
    """
    if 2 * sum(LIKE_A_DATE.fullmatch(cell) is not None for cell in cells) <= len(cells):
        return
    read = max(([_parsed(cell, parse) for cell in cells] for parse in DATES), key=lambda dates: -dates.count(None))
    dates = [date for date in read if date is not None]
    where = f"{path}: line {lines[read.index(None) if None in read else 0]}"
    if not dates:
        raise FormatError(f"{where}: expected dates such as 2020-01-31 in column {name}, found {cells[0][:40]!r}")
    if None in read:
        like, found = cells[read.index(dates[0])], cells[read.index(None)][:40]
        raise FormatError(f"{where}: expected a date such as {like} in column {name}, found {found!r}")
    for n, (a, b) in enumerate(pairwise(dates), 1):
        if (a.tzinfo is None) != (b.tzinfo is None):
            raise FormatError(
                f"{path}: line {lines[n]}: expected a time zone with all dates of column {name} or with none, "
                f"found {cells[n]!r} after {cells[n - 1]!r}"
            )
        if not a < b:
            raise FormatError(
                f"{path}: line {lines[n]}: expected dates that rise in column {name}, "
                f"found {cells[n]!r} after {cells[n - 1]!r}: sort the rows"
            )


def _grid(path: Path, dates: list[datetime]) -> tuple[Spacing, NDArray[np.int64], list[datetime]]:
    """Return the spacing, the place of each date on the even grid, and the grid's dates."""
    if dates[-1].year >= 9999:  # the calendar ends there, and a month's length is told by the next one
        raise FormatError(f"{path}: expected dates before the year 9999, found {dates[-1].date().isoformat()}")
    months = np.array([date.year * 12 + date.month - 1 for date in dates])
    ends = [date.day == _days_in_month(month) for date, month in zip(dates, months, strict=True)]
    same_day = len({(date.day, date.time()) for date in dates}) == 1
    gaps = np.diff(months)
    if gaps.min() >= 1 and (same_day or all(ends)):
        spacing = Spacing(months=int(gaps.min()))
        at = (months - months[0]) / spacing.months
    else:
        seconds = np.array([(date - dates[0]).total_seconds() for date in dates])
        spacing = Spacing(seconds=float(Counter(np.diff(seconds)).most_common(1)[0][0]))
        at = seconds / spacing.seconds
    places = np.rint(at).astype(np.int64)
    uneven = np.flatnonzero(np.abs(at - places) > 1e-6)
    if len(uneven):
        date = dates[uneven[0]].isoformat()
        unit = f"{spacing.months} months" if spacing.months else str(timedelta(seconds=spacing.seconds))
        raise FormatError(f"{path}: expected dates spaced evenly by {unit}, found {date}, which lies between two steps")
    if places[-1] >= 20 * len(dates):
        raise FormatError(
            f"{path}: expected dates without long gaps, found {places[-1] + 1} steps for {len(dates)} rows"
        )
    return spacing, places, [spacing.after(dates[0], n) for n in range(int(places[-1]) + 1)]


def _on_grid(values: NDArray[np.float64], at: NDArray[np.int64]) -> NDArray[np.float64]:
    out = np.full(int(at[-1]) + 1, np.nan)
    out[at] = values
    return out


def _days_in_month(month: int) -> int:
    start = datetime(month // 12, month % 12 + 1, 1)
    return ((start + timedelta(days=32)).replace(day=1) - start).days
