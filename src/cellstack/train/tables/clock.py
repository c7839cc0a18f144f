"""Local times with daylight saving: the hours that occur twice or are skipped. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.tables.dates import Dates
from cellstack.train.tables.source import Series, TableCells


def zoned(
    given: TableCells, found: Dates, codes: NDArray[np.int64], zone: str | None
) -> tuple[NDArray[np.datetime64] | None, str | None]:
    """Return the times in UTC, None if no zone is known, and the wall clock's zone; add assumptions to the notes.

    Raises:
        UsageError: there is no such zone.
    """
    if zone is not None:
        try:
            _twice(found.times.iloc[:1], zone)
        except (KeyError, ValueError, ModuleNotFoundError):
            raise UsageError(f"expected a time zone's name such as Europe/Berlin, got {zone!r}") from None
    if found.offsets:
        if zone is None and found.zone is None:
            same = len(found.offsets) == 1
            zone = _offset(found.offsets[0]) if same else "UTC"
            if not same:
                given.notes.append(
                    f"`{found.name}` has {len(found.offsets)} UTC offsets ({', '.join(found.offsets[:3])}): converted "
                    f"to UTC; `zone=…` converts to local time"
                )
        return found.times.to_numpy(), zone or found.zone
    if zone is None:
        return None, None
    utc, said = to_utc(given, found.times, codes, zone)
    if said:
        given.notes.append(f"`{found.name}`: {said}")
    return utc.to_numpy(), zone


def _offset(text: str) -> str:
    """Return pandas's name of a fixed offset: `UTC+01:00`."""
    if text in ("Z", "UTC", "GMT"):
        return "UTC"
    digits = text[1:].replace(":", "").ljust(4, "0")
    return "UTC" if digits == "0000" else f"UTC{text[0]}{digits[:2]}:{digits[2:]}"


def wall_clock(utc: NDArray[np.datetime64], zone: str | None) -> NDArray[np.datetime64]:
    """Convert times in UTC to the local time of a zone, datetime64[us]."""
    import pandas as pd

    return (
        pd.Series(utc)
        .dt.tz_localize("UTC")
        .dt.tz_convert(zone)
        .dt.tz_localize(None)
        .to_numpy()
        .astype("datetime64[us]")
    )


def utc_of(wall: NDArray[np.datetime64], zone: str | None) -> NDArray[np.datetime64]:
    """Convert one series' local times to UTC; of two equal times, the first is before the clock is set back."""
    import pandas as pd

    times = pd.Series(wall.astype("datetime64[us]"))
    return (
        times.dt.tz_localize(zone, ambiguous=~times.duplicated().to_numpy())
        .dt.tz_convert("UTC")
        .dt.tz_localize(None)
        .to_numpy()
    )


def to_utc(source: TableCells, times: Series, codes: NDArray[np.int64], zone: str) -> tuple[Series, str]:
    """Convert local times to UTC; return them and a note on what was assumed.

    In an hour that occurs twice, the earlier rows are taken as those before the clock is set back.

    Raises:
        FormatError: a time that doesn't exist in the zone, because the clock is set forward.
    """
    import pandas as pd

    twice = _twice(times, zone)
    before = _before(times, codes)
    utc = times.dt.tz_localize(zone, ambiguous=before, nonexistent="NaT")
    gone = utc.isna().to_numpy()
    if gone.any():
        row = int(np.argmax(gone))
        raise FormatError(
            f"{source.at(row)}: {times.iloc[row]} doesn't exist in {zone}, because the clock is set forward then: omit "
            f"`zone=…`, or set it to UTC, if the file's times have no daylight saving"
        )
    changes = np.unique(times[twice].to_numpy().astype("datetime64[D]"))
    said = ""
    if len(changes):
        days = ", ".join(map(str, changes[:3])) + (" …" if len(changes) > 3 else "")
        said = f"in the hour that occurs twice ({days}), the earlier rows are those before the clock is set back"
        single = int((~pd.DataFrame({"c": codes[twice], "t": times[twice]}).duplicated(keep=False)).sum())
        said += f"; so are {single} rows whose time occurs only once" if single else ""
    return utc.dt.tz_convert("UTC").dt.tz_localize(None), said


def _before(times: Series, codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each row whether it is the earlier of two with the same time, or the only one."""
    import pandas as pd

    rising = np.diff(times.to_numpy()).astype(np.int64)
    newest_first = (rising < 0).sum() > (rising > 0).sum()
    return ~pd.DataFrame({"c": codes, "t": times}).duplicated(keep="last" if newest_first else "first").to_numpy()


def _twice(times: Series, zone: str) -> NDArray[np.bool_]:
    """Return for each row whether its local time occurs twice in the zone."""
    return times.dt.tz_localize(zone, ambiguous="NaT", nonexistent="shift_forward").isna().to_numpy()
