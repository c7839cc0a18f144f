"""The even grid of a table's rows: its spacing, and the position of each row. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

DAY = 86_400
NAMES = {1: "every second", 60: "every minute", 3600: "hourly", DAY: "daily", 7 * DAY: "weekly"}
UNITS = ((7 * DAY, "weeks"), (DAY, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class Spacing:
    """Distance between two rows: whole calendar months, or seconds, or one weekday.

    Args:
        months: whole months; 0 if the spacing is in seconds.
        seconds: seconds.
        end: rows are on the last days of months.
        weekdays: rows are the days from Monday to Friday (`seconds` is a day).
    """

    months: int = 0
    seconds: float = 0.0
    end: bool = False
    weekdays: bool = False

    @property
    def seasons(self) -> tuple[int, ...]:
        """Rows in each longer natural period, ascending: day and week for hourly rows, year for monthly rows."""
        if self.weekdays:
            return (5, 261)
        if self.months:
            return (12 // self.months,) if 12 % self.months == 0 and self.months < 12 else ()
        periods = (DAY, 7 * DAY) if self.seconds < DAY else (7 * DAY, 365 * DAY) if self.seconds == DAY else ()
        if self.seconds == 7 * DAY:
            return (52,)
        return tuple(round(period / self.seconds) for period in periods if period / self.seconds % 1 == 0)

    @property
    def season(self) -> int:
        """Rows in the next longer natural period: the day for hourly, the week for daily, else the year."""
        return next(iter(self.seasons), 1)

    def __str__(self) -> str:
        if self.weekdays:
            return "every weekday"
        if self.months:
            name = {1: "monthly", 3: "quarterly", 12: "yearly"}.get(self.months)
            return name or f"every {self.months} months"
        if name := NAMES.get(round(self.seconds, 6)):  # type: ignore[call-overload]
            return name
        size, unit = next(((size, unit) for size, unit in UNITS if self.seconds % size == 0), (1, "seconds"))
        return f"every {self.seconds / size:g} {unit}"

    @property
    def alias(self) -> str:
        """The spacing in pandas's notation, which `spacing_of` parses."""
        if self.weekdays:
            return "B"
        if self.months:
            return f"{self.months}{'ME' if self.end else 'MS'}"
        size, unit = next(
            (s for s in ((DAY, "D"), (3600, "h"), (60, "min"), (1, "s")) if self.seconds % s[0] == 0), (1e-6, "us")
        )
        return f"{round(self.seconds / size)}{unit}"

    def times(self, start: Any, steps: NDArray[np.int64]) -> NDArray[np.datetime64]:
        """Return the times `steps` rows after `start`, datetime64[us].

        Args:
            start: datetime64, one or as many as `steps`; wall-clock time or, if the spacing is below a day and there is
                a time zone, UTC.
            steps: int64, of any shape.
        """
        start = start.astype("datetime64[us]")
        if not self.months:
            if self.weekdays:
                day = start.astype("datetime64[D]")
                return np.busday_offset(day, steps).astype("datetime64[us]") + (start - day)
            return start + (steps * round(self.seconds * 1e6)).astype("timedelta64[us]")
        return self._months_after(start, self.months * steps)

    def after(self, start: datetime, rows: int) -> datetime:
        """Return the date `rows` rows after `start`."""
        after: Any = self.times(np.datetime64(start, "us"), np.array(rows)).item()
        return after

    def places(self, times: NDArray[np.datetime64], first: NDArray[np.datetime64]) -> NDArray[np.float64]:
        """Return the number of rows from its series' `first` to each of `times`; not an integer between two rows."""
        if self.weekdays:
            days, day = times.astype("datetime64[D]"), first.astype("datetime64[D]")
            places = np.busday_count(day, days).astype(np.float64)
            return places + 0.5 * (~np.is_busday(days) | (times - days != first - day))
        if not self.months:
            return (times - first).astype(np.int64) / round(self.seconds * 1e6)
        months = times.astype("datetime64[M]").astype(np.int64) - first.astype("datetime64[M]").astype(np.int64)
        places = months / self.months
        return np.where(self._months_after(first, months) == times, places, np.floor(places) + 0.5)

    def _months_after(self, start: Any, months: NDArray[np.int64]) -> NDArray[np.datetime64]:
        """Return the times `months` calendar months after `start`, on the last day if a month has fewer days."""
        month, day = start.astype("datetime64[M]"), start.astype("datetime64[D]")
        other = month + months
        last = ((other + 1).astype("datetime64[D]") - other.astype("datetime64[D]")).astype(np.int64) - 1
        days = last if self.end else np.minimum(last, (day - month.astype("datetime64[D]")).astype(np.int64))
        return (other.astype("datetime64[D]") + days).astype("datetime64[us]") + (start - day)


def spacing_of(text: str) -> Spacing:
    """Parse a spacing in pandas's notation: `h`, `30min`, `D`, `B`, `W`, `MS`, `ME`, `QS`, `YS`.

    Raises:
        ValueError: an unknown notation, or a step that isn't positive.
    """
    import pandas as pd

    offset: Any = pd.tseries.frequencies.to_offset(text)
    if offset.n < 1:
        raise ValueError(f"{text} isn't a positive step")
    name = type(offset).__name__
    if name == "BusinessDay" and offset.n == 1:
        return Spacing(seconds=DAY, weekdays=True)
    for unit, months in (("Month", 1), ("Quarter", 3), ("Year", 12)):
        if name in (f"{unit}Begin", f"{unit}End", f"B{unit}Begin", f"B{unit}End"):
            return Spacing(months=months * offset.n, end=name.endswith("End"))
    if name == "Week":
        return Spacing(seconds=7 * DAY * offset.n)
    if name == "Day":
        return Spacing(seconds=DAY * offset.n)
    return Spacing(seconds=pd.Timedelta(offset).total_seconds())


def inferred(times: NDArray[np.datetime64], codes: NDArray[np.int64]) -> Spacing | None:
    """Return the spacing of sorted times, series after series; None if no series has two.

    Whole months if all rows are on the same day of a month, or on its last day; weekdays if consecutive days skip at
    least two weekends and contain none; else the most frequent step.
    """
    same = codes[1:] == codes[:-1]
    if not same.any():
        return None
    days = times.astype("datetime64[D]")
    months = times.astype("datetime64[M]")
    gaps = np.diff(months.astype(np.int64))[same]
    clock = times - days
    if gaps.min() >= 1 and (clock == clock[0]).all():
        day = (days - months.astype("datetime64[D]")).astype(np.int64)
        ends = ((months + 1).astype("datetime64[D]") - days).astype(np.int64) == 1
        if (day == day[0]).all() or ends.all():
            return Spacing(months=int(gaps.min()), end=bool(ends.all()))
    steps = np.diff(times).astype(np.int64)[same]
    if steps.min() == steps.max():
        return Spacing(seconds=int(steps[0]) / 1e6)
    values, counts = np.unique(steps, return_counts=True)
    most = values[counts == counts.max()]
    step = int(most[len(most) // 2]) / 1e6
    if step == DAY and np.is_busday(days).all():
        crossed = (np.diff(days).astype(np.int64)[same] == 3).sum()
        if crossed >= 2:
            return Spacing(seconds=DAY, weekdays=True)
    return Spacing(seconds=step)


def even_share(times: NDArray[np.datetime64], codes: NDArray[np.int64]) -> float:
    """Return how even times are: the share of steps of the most frequent length or, if less, of occupied positions.

    Rows are compared in their order within series; 0 if they are neither ascending nor descending.
    """
    order = np.argsort(codes, kind="stable")
    times, codes = times[order], codes[order]
    same = codes[1:] == codes[:-1]
    steps = np.diff(times).astype(np.int64)[same]
    if not len(steps) or not ((steps > 0).all() or (steps < 0).all()):
        return 0.0

    def share(values: NDArray[np.int64]) -> float:
        values, counts = np.unique(values, return_counts=True)
        step = values[np.argmax(counts)]
        return min(counts.max() / counts.sum(), counts.sum() / max(1, (values * counts).sum() / step))

    shares = [share(np.abs(steps))]
    months = times.astype("datetime64[M]")
    if ((times - months) == (times - months)[0]).all():
        shares.append(share(np.abs(np.diff(months.astype(np.int64))[same])))
    return float(max(shares))
