"""Calendar features of dates: hour, weekday, day of the year, holidays. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError

DAY, YEAR = 86_400.0, 365.2425
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
HARMONICS = {"hour": 3, "weekday": 3, "year": 2, "day": 8}  # three distinguish all days of a week


def usual(step: float, span: float, country: str) -> tuple[str, ...]:
    """Return the calendar features that are useful for a table.

    Args:
        step: seconds between rows.
        span: seconds from the first to the last row of the training part.
        country: the country of the holidays; "" for none.
    """
    within_day, within_week, years = step < DAY, step <= DAY, span / (YEAR * DAY)
    kinds = {
        "hour": within_day,
        "weekday": within_week,
        "year": step < 300 * DAY and years > 1.5 and not (within_week and years > 4),
        "day": within_week and years > 4,  # with fewer years, it would memorise single days
    }
    return (*(name for name, used in kinds.items() if used), *(("holidays",) if country and within_week else ()))


def names(kinds: tuple[str, ...]) -> list[str]:
    """Return the names of the channels of `features`."""
    found = []
    for kind in kinds:
        if kind == "holidays":
            found += ["holiday", "holiday tomorrow", "holiday yesterday"]
        else:
            found += [f"{kind} {wave}{n}" for n in range(1, HARMONICS[kind] + 1) for wave in ("sin", "cos")]
    return found


def features(times: NDArray[np.datetime64], kinds: tuple[str, ...], country: str = "") -> NDArray[np.float32]:
    """Return the calendar features of dates, `[N, channels]`.

    The hour, the weekday and the day of the year are harmonics, sines and cosines of the phase in the day, the week and
    the year and of multiples of it: values are continuous, also at midnight. `"year"` has two harmonics, which resolve
    the seasons of the year, `"day"` eight, which resolve about two weeks. A holiday is three flags: this day is one,
    the next day is one, the previous day was one.

    Args:
        times: `[N]`, wall-clock time to the second.
        kinds: of `CALENDAR`, see `recipe`, in the order of their channels.
        country: the country of the holidays, an ISO 3166 code, with a subdivision after a hyphen: `"DE-BY"`.

    Raises:
        UsageError: an unsupported country, or the package `holidays` isn't installed.
    """
    seconds = times.astype("datetime64[s]").astype(np.int64)
    days = times.astype("datetime64[D]")
    channels = []
    for kind in kinds:
        if kind == "holidays":
            known = holidays(country, days)
            channels += [np.isin(days + shift, known).astype(np.float64) for shift in (0, 1, -1)]
            continue
        if kind in ("year", "day"):
            start = times.astype("datetime64[Y]")
            place = (times.astype("datetime64[s]") - start.astype("datetime64[s]")).astype(np.float64) / (YEAR * DAY)
        elif kind == "weekday":
            place = ((seconds // int(DAY) + EPOCH_WEEKDAY) % 7) / 7.0
        else:
            place = (seconds % int(DAY)) / DAY
        for harmonic in range(1, HARMONICS[kind] + 1):
            channels += [np.sin(2 * np.pi * harmonic * place), np.cos(2 * np.pi * harmonic * place)]
    return np.stack(channels, axis=-1).astype(np.float32) if channels else np.empty((len(times), 0), np.float32)


def holidays(country: str, days: NDArray[np.datetime64]) -> NDArray[np.datetime64]:
    """Return a country's public holidays in the years of `days`.

    Raises:
        UsageError: an unsupported country, or the package `holidays` isn't installed.
    """
    try:
        from holidays import country_holidays
    except ModuleNotFoundError:
        raise UsageError("holidays need the package holidays: pip install 'cellstack[holidays]'") from None
    years = days.astype("datetime64[Y]").astype(np.int64) + 1970
    code, _, subdivision = country.partition("-")
    try:
        known = country_holidays(code, subdivision or None, years=range(int(years.min()), int(years.max()) + 2))
    except NotImplementedError as error:
        raise UsageError(
            f"holidays: expected a supported country, such as US or DE-BY, got {country!r}: {error}"
        ) from None
    return np.array(sorted(known), "datetime64[D]")
