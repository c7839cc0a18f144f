"""What a date says: hour, weekday, day of the year, holidays, as numbers. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError

DAY, YEAR = 86_400.0, 365.2425
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
HARMONICS = {"hour": 3, "weekday": 3, "year": 2, "day": 8}  # three of a week tell all its days apart


def usual(step: float, span: float, country: str) -> tuple[str, ...]:
    """Return what of the date is worth seeing.

    Args:
        step: seconds from row to row.
        span: seconds from the first row to the last that is trained on.
        country: whose holidays; "" for none.
    """
    within_day, within_week, years = step < DAY, step <= DAY, span / (YEAR * DAY)
    kinds = {
        "hour": within_day,
        "weekday": within_week,
        "year": step < 300 * DAY and years > 1.5 and not (within_week and years > 4),
        "day": within_week and years > 4,  # of fewer years, it would learn each day's fortune by heart
    }
    return (*(name for name, used in kinds.items() if used), *(("holidays",) if country and within_week else ()))


def features(times: NDArray[np.datetime64], kinds: tuple[str, ...], country: str = "") -> NDArray[np.float32]:
    """Return what dates say, `[N, channels]`.

    An hour, a weekday and a day of the year are sines and cosines of their place in the day, the week and the year and
    of multiples of it: near in time is near in value, and midnight has no step. `"year"` has two multiples, the
    seasons, `"day"` eight, about a fortnight. A holiday is three flags: this day, the day before, and the day after.

    Args:
        times: `[N]`, wall-clock time to the second.
        kinds: of `CALENDAR`, see `recipe`, in the order of their channels.
        country: whose holidays, an ISO 3166 code, with a subdivision after a hyphen: `"DE-BY"`.

    Raises:
        UsageError: a country whose holidays aren't known, or the package `holidays` isn't installed.
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
        UsageError: they aren't known, or the package `holidays` isn't installed.
    """
    try:
        from holidays import country_holidays
    except ModuleNotFoundError:
        raise UsageError("holidays need the package holidays: install cellstack[holidays]") from None
    years = days.astype("datetime64[Y]").astype(np.int64) + 1970
    code, _, subdivision = country.partition("-")
    try:
        known = country_holidays(code, subdivision or None, years=range(int(years.min()), int(years.max()) + 2))
    except NotImplementedError as error:
        raise UsageError(
            f"expected a country whose holidays are known, such as US or DE-BY, got {country!r}: {error}"
        ) from None
    return np.array(sorted(known), "datetime64[D]")
