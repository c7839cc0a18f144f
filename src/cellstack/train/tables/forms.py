"""Formats of dates: those that a cell may have, and strict parsing with one of them. Needs no torch."""

from __future__ import annotations

import re
from datetime import datetime

from cellstack.train.checks import UsageError
from cellstack.train.tables.source import Series

DAYS = (  # ambiguous formats, with the day or the month first, are in pairs
    *("%Y%m%d%H", "%Y%m%d%H%M", "%Y%m%d%H%M%S", "%Y%m%d %H%M", "%Y%m%dT%H%M", "%Y%m%dT%H%M%S", "%Y%m%dT%H%M%S%z"),
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%Y-%m", "%Y/%m", "%Y%m", "%m/%Y", "%m.%Y", "%m-%Y", "%Y"),
    *(f"{a}{sign}{b}{sign}{year}" for sign in "./-" for year in ("%Y", "%y") for a, b in (("%d", "%m"), ("%m", "%d"))),
    *(
        "%d %b %Y",
        "%d-%b-%Y",
        "%d-%b-%y",
        "%d %B %Y",
        "%d. %B %Y",
        "%d/%b/%Y",
        "%b %d, %Y",
        "%B %d, %Y",
        "%b %d %Y",
        "%B %d %Y",
    ),
    *(
        "%b %Y",
        "%B %Y",
        "%b-%Y",
        "%b-%y",
        "%b %y",
        "%Y-%b",
        "%Y %b",
        "%Y-%b-%d",
        "%Y %B",
        "%a %d %b %Y",
        "%a, %d %b %Y",
    ),
)
CLOCK = re.compile(
    r"(?P<day>.*?\d)(?P<between>T|,? +)(?P<clock>\d{1,2}(?P<minutes>:\d\d)?(?P<seconds>:\d\d)?(?P<part>\.\d+)?"
    r"(?P<half> ?[AaPp][Mm])?)(?P<zone> ?(?:Z|UTC|GMT|[+-]\d\d(?::?\d\d)?))?"
)
OFFSET = r"(?:[T ]\d{1,2}(?::?\d\d)*(?:\.\d+)?|[AaPp][Mm]) ?(Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)$"
WIDTHS = {  # strptime would accept fewer digits
    "%Y": 4,
    "%Y%m": 6,
    "%Y%m%d": 8,
    "%Y%m%d%H": 10,
    "%Y%m%d%H%M": 12,
    "%Y%m%d%H%M%S": 14,
    "%Y%m%d %H%M": 13,
    "%Y%m%dT%H%M": 13,
    "%Y%m%dT%H%M%S": 15,
    "%Y%m%dT%H%M%S%z": 16,
}
PATTERNS = {  # formats that strptime doesn't have
    "quarter": re.compile(r"(?P<y>\d{4})[-: /]?Q(?P<q>[1-4])|Q(?P<q2>[1-4])[-: /]?(?P<y2>\d{4})", re.IGNORECASE),
    "week": re.compile(r"(?P<y>\d{4})-?W(?P<w>\d\d)(?:-?(?P<d>[1-7]))?", re.IGNORECASE),
}


def forms(cell: str) -> list[str]:
    """Return all formats in which a cell may be a date: strptime's, or `quarter` or `week`.

    >>> forms("31.01.2023 05:00"), forms("01.02.2023")
    (['%d.%m.%Y %H:%M'], ['%d.%m.%Y', '%m.%d.%Y'])
    """
    for name, pattern in PATTERNS.items():
        if pattern.fullmatch(cell):
            return [name]
    day, clock = cell, ""
    if (found := CLOCK.fullmatch(cell)) and (found["minutes"] or found["half"] or not _days(cell)):
        day = found["day"]
        hour = "%I" if found["half"] else "%H"
        clock = found["between"] + hour + (":%M" if found["minutes"] else "") + (":%S" if found["seconds"] else "")
        clock += (".%f" if found["part"] else "") + (" " * found["half"].count(" ") + "%p" if found["half"] else "")
        if zone := found["zone"]:
            clock += (" " if re.match(r" [+-]", zone) else "") + "%z"
    return [form + clock for form in _days(day)]


def _days(text: str) -> list[str]:
    found = []
    if len(text) > 30 or not any(sign.isdigit() for sign in text):
        return found
    for form in DAYS:
        if WIDTHS.get(form, len(text)) == len(text):
            try:
                datetime.strptime(text, form)
            except ValueError:
                continue
            found.append(form)
    return found


def says_day_first(form: str) -> bool | None:
    """Return whether a numeric format has the day before the month; None if it isn't ambiguous."""
    return {"%d": True, "%m": False}.get(form[:2]) if re.match(r"%[dm][./-]%[dm]", form) else None


def parsed(cells: Series, form: str) -> Series:
    """Parse text strictly with one format; NaT where it doesn't match. Times with an offset are converted to UTC."""
    import pandas as pd

    if form == "quarter":
        parts = cells.str.extract(PATTERNS[form])
        year, quarter = parts["y"].fillna(parts["y2"]), parts["q"].fillna(parts["q2"])
        month = quarter.map({"1": "01", "2": "04", "3": "07", "4": "10"})
        cells, form = year + "-" + month, "%Y-%m"
    elif form == "week":
        parts = cells.str.extract(PATTERNS[form])
        cells, form = parts["y"] + "-" + parts["w"] + "-" + parts["d"].fillna("1"), "%G-%V-%u"
    if "%z" in form:  # names of the zero offset
        cells = cells.str.replace(r" ?(?:UTC|GMT|Z)$", "Z", regex=True)
    if form.startswith("%Y-%m-%d"):  # with and without a time of day, with and without parts of a second
        cells = cells.where(cells.str.match(r"\d{4}-\d{1,2}-\d{1,2}(?:\D|$)"))
        form = "ISO8601"
    elif form in WIDTHS:
        cells = cells.where(cells.str.len() == WIDTHS[form])
    try:
        times = pd.to_datetime(cells, format=form, errors="coerce", utc=True)
    except ValueError as error:
        raise UsageError(f"expected a date format such as %d.%m.%Y, got {form!r} ({error})") from None
    return times.dt.tz_localize(None).astype("datetime64[us]")
