"""Find the column of a table's dates, detect their format, and parse them. Needs no torch.

The format is detected from some cells; pandas then parses every cell strictly with it. If the cells are ambiguous, for
example in whether the day or the month comes first, the user is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.tables.forms import OFFSET, forms, parsed, says_day_first
from cellstack.train.tables.grid import even_share
from cellstack.train.tables.source import Frame, Series, TableCells, listed

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNIX = (datetime(1971, 1, 1).timestamp(), datetime(2100, 1, 1).timestamp())
EXCEL = "1899-12-30"  # day 0 of its day numbers, which count a 29 February 1900 that didn't exist
MOST_DAYS = 2_900_000  # from either epoch to the end of the calendar
NAMED = re.compile(r"(?:^|.*[_\W])(?:date|datetime|timestamp|ds)(?:$|[_\W].*)|.*[a-z](?-i:Date)$", re.IGNORECASE)
MAY_BE_NAMED = re.compile(
    r"(?:^|.*[_\W])(?:time|year|month|week|quarter|period|day|unix|epoch|ts)(?:$|[_\W].*)", re.IGNORECASE
)
HOURS = re.compile(r"(?:^|.*[_\W])(?:hour|hr|h|time|hour_of_day)(?:$|[_\W].*)", re.IGNORECASE)
TIME_OF_DAY = r"\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?(?: ?[AaPp][Mm])?"
CLOCK_FORM = re.compile(r"(T|,? +)%[HI].*")  # the part of a format for the time of day
PARTS = ("year", "quarter", "month", "day", "hour", "minute", "second")


@dataclass
class Dates:
    """The dates of a table.

    Args:
        name: of the column, or of several, separated by commas.
        times: datetime64[us], one per row; in UTC if there are `offsets`.
        offsets: UTC offsets in the cells, in order of appearance; () for none.
        form: their format: one of strptime's, or `quarter`, `week`, `s`, `ms`, `us`, `ns`, `excel`.
        note: an assumption, for example on the order of day and month; "" for none.
        zone: of a frame's times.
    """

    name: str
    times: Series
    offsets: tuple[str, ...] = ()
    form: str = ""
    note: str = ""
    zone: str | None = None

    def shown(self, source: TableCells, row: int) -> str:
        """Return the cells of a row's date as written in the table."""
        names = [self.name] if self.name in source.frame else self.name.split(",")
        return " ".join(source.quote(row, name.strip()) for name in names)


def find(source: TableCells, ids: Sequence[str], codes: NDArray[np.int64]) -> str | None:
    """Return the name of the date column, or of several that form the dates together; None if none looks like dates.

    Text that looks like dates has priority, then columns for the year and its parts, then numbers that are dates
    according to the column's name or to their even steps. A column of hours or times of day is added if a series has
    several rows per day.

    Args:
        source: the table; assumptions are added to its notes.
        ids: names of the columns that identify series.
        codes: number of each row's series.

    Raises:
        FormatError: a column with a name for dates doesn't contain any.
    """
    import pandas as pd

    frame = source.frame
    names = [name for name in frame.columns if name not in ids]
    numbers = [name for name in names if frame[name].dtype.kind in "iuf"]
    typed = [
        name for name in names if pd.api.types.is_datetime64_any_dtype(frame[name].dtype) or _is_period(frame[name])
    ]
    like = [name for name in names if name not in (*numbers, *typed) and _look_like(frame[name])]
    parts = _parts(names)
    counted = [name for name in numbers if _numbers_like(frame[name], named=_named(name) or name in source.index)]
    for some in (sorted(typed, key=lambda name: name not in source.index), like, [parts] if parts else [], counted):
        if some:
            column = some[0] if some[0] == parts else _best(frame, some)
            also = None if column == parts else _clock_column(frame, column, names, codes)
            if also is not None:
                column = f"{column},{also}"
            if "," in column and column not in frame:
                source.notes.append(f"dates from {', '.join(f'`{part}`' for part in column.split(','))} together")
            return column
    for name in names:
        text = frame[name].dropna()
        weak = MAY_BE_NAMED.match(name) and name not in numbers and 2 * text.nunique() > len(frame)
        if (NAMED.match(name) or weak) and len(text):
            row = int(np.argmax(frame[name].notna().to_numpy()))
            counted = cast(Any, pd.to_numeric(text, errors="coerce"))
            if 2 * counted.notna().sum() >= len(text) and _unix_unit(counted.dropna().to_numpy(np.float64)):
                bad = int(text.index[int(np.argmax(counted.isna().to_numpy()))])
                raise FormatError(
                    f"{source.at(bad)}: expected a date such as {text[row]} in column {name}, found "
                    f"{source.quote(bad, name)}"
                )
            raise FormatError(
                f"{source.at(row)}: expected dates such as 2020-01-31 in column {name}, found "
                f"{source.quote(row, name)}: set `date_format=…` to their format (excel for Excel's day numbers), "
                f"`time=…` to another column, or `time=''` for no dates"
            )
        if MAY_BE_NAMED.match(name) and name in numbers and len(text) == len(frame) and text.is_monotonic_increasing:
            source.notes.append(
                f"`{name}` read as numbers, not dates: use `time=…` and `date_format=…` if it has dates"
            )
    return None


def _best(frame: Frame, names: list[str]) -> str:
    """Return a column of complete, ascending dates, else one with a name for dates, else the first."""
    whole = [name for name in names if frame[name].notna().all()]
    rising = [name for name in whole if frame[name].is_monotonic_increasing]
    named = [name for name in names if NAMED.match(name)]
    return (rising or [name for name in named if name in whole] or whole or named or names)[0]


def _parts(names: list[str]) -> str | None:
    """Return the columns of a year and its parts, separated by commas; None if there are none."""
    called = {name.strip().lower(): name for name in reversed(names)}
    columns = ["year", "quarter"] if "quarter" in called and "month" not in called else ["year", "month"]
    for part in ("day", "hour", "minute", "second"):
        if columns[-1] == "quarter" or part not in called:
            break
        columns.append(part)
    return ",".join(called[part] for part in columns) if all(part in called for part in columns) else None


def _clock_column(frame: Frame, date: str, names: list[str], codes: NDArray[np.int64]) -> str | None:
    """Return a column of hours or times of day that makes the times of each series distinct; None if none does."""
    import pandas as pd

    if not pd.DataFrame({"c": codes, "d": frame[date]}).duplicated().any():
        return None
    for name in names:
        cells = frame[name]
        if name == date or not len(cells) or cells.isna().any():
            continue
        if cells.dtype.kind in "iu":
            hours = bool(HOURS.match(name)) and bool(cells.between(0, 23).all())
        else:
            hours = isinstance(cells.iloc[0], str) and bool(cells.str.fullmatch(TIME_OF_DAY).all())
        if hours and pd.DataFrame({"c": codes, "d": frame[date], "h": cells}).duplicated().mean() < 0.01:
            return name  # the tolerance is for the hour that occurs twice when the clock is set back
    return None


def _is_period(cells: Series) -> bool:
    import pandas as pd

    return isinstance(cells.dtype, pd.PeriodDtype)


def _look_like(cells: Series) -> bool:
    """Return whether at least half of the first distinct cells may be dates."""
    some = cells.dropna().iloc[:10_000].astype(str).drop_duplicates().iloc[:50]
    return len(some) > 0 and 2 * sum(bool(forms(cell)) for cell in some) >= len(some)


def _named(name: str) -> bool:
    return bool(NAMED.match(name) or MAY_BE_NAMED.match(name))


def _numbers_like(cells: Series, named: bool) -> bool:
    """Return whether integers are dates: by the column's name, by their digits, or by even steps of Unix time."""
    values = cells.dropna().to_numpy(np.float64)
    if not len(values) or not np.isfinite(values).all() or (values % 1 != 0).any():
        return False
    unit = _unix_unit(values)
    if named:
        return unit is not None or _look_like(cells.dropna().astype("int64"))
    if len(values) < len(cells):
        return False
    if unit is not None:
        steps = np.diff(values)
        return bool((steps >= UNITS[unit]).all() and (steps % steps.min() == 0).all())
    digits = cells.iloc[:10_000].astype("int64").astype(str)
    return any(
        (digits.str.len() == len(f"{values[0]:.0f}")).all() and not parsed(digits, form).isna().any()
        for form in forms(f"{values[0]:.0f}")
        if len(f"{values[0]:.0f}") >= 8
    )


def _unix_unit(values: NDArray[np.float64]) -> str | None:
    """Return the unit in which numbers are Unix times from 1971 to 2100; None for none, or for digits of dates."""
    digits = [f"{value:.0f}" for value in values[:: max(1, len(values) // 50)]]
    if all(forms(text) for text in digits):
        return None
    for unit, scale in UNITS.items():
        if UNIX[0] * scale <= values.min() and values.max() <= UNIX[1] * scale:
            return unit
    return None


def read(source: TableCells, name: str, codes: NDArray[np.int64], day_first: bool | None, form: str | None) -> Dates:
    """Return the dates of a column, or of several.

    Args:
        source: the table.
        name: of the column, or of several, separated by commas.
        codes: number of each row's series, `[N]`.
        day_first: whether the day comes before the month; None = detected.
        form: format of the dates, see `Dates`; None = detected.

    Raises:
        FormatError: a cell that isn't a date, or ambiguous dates.
        UsageError: a column that doesn't exist, or an invalid format.
    """
    import pandas as pd

    names = [name] if name in source.frame else [part.strip() for part in name.split(",")]
    for part in names:
        if part not in source.frame:
            raise UsageError(f"{source.path}: expected a column of dates {part!r}, found {listed(list(source.frame))}")
    if len(names) > 1:
        cells = _joined(source, names)
    else:
        cells = source.frame[name]
        if isinstance(cells.dtype, pd.DatetimeTZDtype):
            zone = str(cells.dt.tz)
            times = _complete(source, cells, name).dt.tz_convert("UTC").dt.tz_localize(None)
            return Dates(name, times.astype("datetime64[us]"), (zone,), zone=zone)
        if pd.api.types.is_datetime64_dtype(cells.dtype):
            return Dates(name, _complete(source, cells, name).astype("datetime64[us]"))
        if _is_period(cells):
            return Dates(name, _complete(source, cells, name).dt.to_timestamp().astype("datetime64[us]"))
        if pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
            if dates := _of_numbers(source, cells, name, form):
                return dates
            cells = cells.astype(str) if cells.dtype.kind in "iu" else source.text(name)
        else:
            cells = cells.astype(str).where(cells.notna()) if source.lines is None else cells
    return _of_text(source, cells, name, names, codes, day_first, form)


def _complete(source: TableCells, cells: Series, name: str) -> Series:
    if cells.isna().any():
        row = int(np.argmax(cells.isna().to_numpy()))
        raise FormatError(f"{source.at(row)}: expected a date in column {name}, found {source.quote(row, name)}")
    return cells


def _of_numbers(source: TableCells, cells: Series, name: str, form: str | None) -> Dates | None:
    """Return the dates of Unix times or Excel's day numbers; None for dates written in digits."""
    import pandas as pd

    if form is not None and form not in UNITS and form != "excel":
        return None
    unit = form or _unix_unit(cells.dropna().to_numpy(np.float64))
    if unit is None:
        return None
    values = _complete(source, cells, name).to_numpy(np.float64)
    days = values if unit == "excel" else values / UNITS[unit] / 86_400
    beyond = ~(np.abs(days) < MOST_DAYS)
    if beyond.any():
        row = int(np.argmax(beyond))
        raise FormatError(
            f"{source.at(row)}: expected a date in the format {unit} in column {name}, found {source.quote(row, name)}"
        )
    if unit == "excel":
        times = pd.Series(pd.to_datetime(values, unit="D", origin=EXCEL)).dt.round("ms")
        return Dates(name, times.astype("datetime64[us]"), form=unit)
    whole = pd.Series(
        np.rint(values / UNITS[unit] * 1e6).astype(np.int64) if unit != "ns" else cells.to_numpy() // 1000
    )
    note = f"Unix time in {unit}, in UTC"
    return Dates(name, whole.astype("int64").astype("datetime64[us]"), ("UTC",), unit, note)


def _joined(source: TableCells, names: list[str]) -> Series:
    """Join several columns to one of text: years, quarters, months, days; or a day and its hour or time of day."""
    import pandas as pd

    frame, kinds = source.frame, [name.strip().lower() for name in names]
    for name in names:
        _complete(source, frame[name], name)
    text = {}
    for name, kind in zip(names, kinds, strict=True):
        cells = frame[name]
        whole = pd.api.types.is_numeric_dtype(cells.dtype) and bool((cells % 1 == 0).all())
        text[kind] = (cells.astype("int64") if whole else cells).astype(str).str.strip()
        if whole and kind not in PARTS[:4] and kind != kinds[0]:  # hours, regardless of the name
            text[kind] = text[kind].str.zfill(2) + ("" if kind in PARTS else ":00")
    if kinds[0] != "year":
        rest = [text[kind] for kind in kinds[1:]]
        out = text[kinds[0]]
        for n, part in enumerate(rest):
            out = out + (" " if n == 0 else ":") + part
        if len(rest) == 1 and rest[0].str.fullmatch(r"\d\d").all():
            out = out + ":00"
        return out
    if kinds == ["year", "quarter"]:
        return text["year"] + "Q" + text["quarter"]
    out = text["year"]
    for kind, before in zip(PARTS[2:], ("-", "-", " ", ":", ":"), strict=True):
        if kind in text:
            out = out + before + text[kind].str.zfill(2)
    return out + ":00" if kinds[-1] == "hour" else out


def _of_text(
    source: TableCells,
    cells: Series,
    name: str,
    names: list[str],
    codes: NDArray[np.int64],
    day_first: bool | None,
    form: str | None,
) -> Dates:
    import pandas as pd

    numbers, unique = pd.factorize(cells)  # a panel's dates occur many times
    unique = pd.Series(unique, dtype=object).astype(str)
    sample = unique.iloc[:: max(1, len(unique) // 50)].iloc[:60]
    choices = [form] if form is not None else list(dict.fromkeys(form for cell in sample for form in forms(cell)))
    if day_first is not None:
        choices = [form for form in choices if says_day_first(form) in (None, day_first)]
    read = {form: parsed(unique, form) for form in choices}
    if not read:
        shown = repr(str(sample.iloc[0])[:40]) if len(sample) else "''"
        raise FormatError(f"{source.at(0)}: expected dates such as 2020-01-31 in column {name}, found {shown}")
    read = dict(sorted(read.items(), key=lambda item: int(item[1].isna().sum())))
    best = next(iter(read))
    bad = read[best].isna().to_numpy()[numbers] | (numbers < 0)
    if bad.any():
        row = int(np.argmax(bad))
        good = int(np.argmin(bad))
        quoted = source.quote(row, names[0]) if len(names) == 1 else repr(str(cells.iloc[row])[:40])
        like = str(cells.iloc[good]) if not bad.all() else f"{datetime(2020, 1, 31):{form or '%Y-%m-%d'}}"
        raise FormatError(f"{source.at(row)}: expected a date such as {like} in column {name}, found {quoted}")
    whole = {form: times for form, times in read.items() if not times.isna().any()}
    best, note = _chosen(source, cells, name, whole, numbers, codes)
    if len(whole) == 1 and day_first is None and form is None and says_day_first(best) is not None:
        note = f"{_order(best)} first, detected from the dates"
    offsets = ()
    if "%z" in best or best.startswith("%Y-%m-%d"):  # pandas reads the latter with an offset and without
        named = unique.str.extract(OFFSET)[0]
        offsets = tuple(named.dropna().drop_duplicates())
        some = named.notna().to_numpy()[numbers]
        if some.any() and not some.all():
            row = int(np.argmax(some != some[0]))
            raise FormatError(
                f"{source.at(row)}: expected a time zone with all dates of column {name} or with none, "
                f"found {cells.iloc[row]!r} after {cells.iloc[row - 1]!r}"
            )
    times = pd.Series(whole[best].to_numpy()[numbers])
    return Dates(name, times, offsets, best, note)


def _order(form: str) -> str:
    return "day" if says_day_first(form) else "month"


def _chosen(
    source: TableCells,
    cells: Series,
    name: str,
    read: dict[str, Series],
    numbers: NDArray[np.int64],
    codes: NDArray[np.int64],
) -> tuple[str, str]:
    """Return the format, of those that parse every cell, whose dates are evenly spaced, and a note on that."""
    best = next(iter(read))
    differ = [form for form, times in read.items() if not times.equals(read[best])]
    if not differ:
        return best, ""
    shares = {form: even_share(read[form].to_numpy()[numbers], codes) for form in (best, *differ)}
    even = [form for form, share in shares.items() if share >= 0.9]
    if len(even) == 1 and all(share < 0.5 for form, share in shares.items() if form != even[0]):
        return even[0], f"{_order(even[0])} first, detected from their even steps"
    row = int(np.argmax((read[best] != read[differ[0]]).to_numpy()[numbers]))
    ways = [read[form].to_numpy()[numbers[row]].astype("datetime64[D]") for form in (best, differ[0])]
    raise FormatError(
        f"{source.at(row)}: {cells.iloc[row]!r} in column {name} is ambiguous, it may be {ways[0]} or {ways[1]}: use "
        f"`day_first=True` or `day_first=False`"
    )


def in_form(text: str, form: str) -> tuple[np.datetime64, bool] | None:
    """Parse one date in a format of `Dates`, or the day alone in it.

    Returns:
        The date as datetime64[us], and whether it is in UTC; None if it isn't in the format.
    """
    import pandas as pd

    if form in UNITS or form == "excel":
        try:
            number = float(text)
        except ValueError:
            return None
        days = number if form == "excel" else number / UNITS[form] / 86_400
        if not abs(days) < MOST_DAYS:
            return None
        if form == "excel":
            return pd.to_datetime(number, unit="D", origin=EXCEL).round("ms").to_datetime64().astype(
                "datetime64[us]"
            ), False
        return np.datetime64(round(number / UNITS[form] * 1e6), "us"), True
    for how in (form, CLOCK_FORM.sub("", form)):
        time = parsed(pd.Series([text]), how).iloc[0]
        if time is not pd.NaT:
            return time.to_datetime64().astype("datetime64[us]"), re.search(OFFSET, text) is not None
    return None


def written_as(time: np.datetime64, form: str | None) -> str:
    """Return a date in one of strptime's formats; in ISO form for others."""
    when = time.astype("datetime64[s]").item()
    return f"{when:{form}}".strip() if form is not None and "%" in form else when.isoformat().removesuffix("T00:00:00")
