"""The row from which to forecast, named by its date in the format of the table."""

from datetime import datetime
from functools import cache

import numpy as np
import pandas as pd
import pytest

from cellstack.train import read_table
from cellstack.train.checks import UsageError
from cellstack.train.forecasting.predict import origins_at


def dated(times, **how):
    return read_table(pd.DataFrame({"t": times, "y": np.arange(len(times)) % 7.0}), **how)


@cache
def written(form, freq="D", periods=70, **how):
    return dated(pd.date_range("2024-01-01", periods=periods, freq=freq).strftime(form), **how)


@pytest.mark.parametrize(
    ("table", "origin", "row"),
    [
        (written("%d.%m.%Y"), "05.02.2024", 35),
        (written("%d.%m.%Y"), "2024-02-05", 35),
        (written("%d/%m/%Y", day_first=True), "05/02/2024", 35),
        (written("%m/%d/%Y"), "02/05/2024", 35),
        (written("%d %b %y", time="t", date_format="%d %b %y"), "05 Feb 24", 35),
        (written("%Y%m%d"), "20240205", 35),
        (written("%d.%m.%Y %H:%M", "h"), "02.01.2024 05:00", 29),
        (written("%d.%m.%Y %H:%M", "h"), "02.01.2024", 24),
        (written("%d.%m.%Y %H:%M", "h"), "2024-01-02T05", 29),
        (written("%Y-%m-%d %H:%M", "h"), "2024-01-02", 24),
        (written("%m/%Y", "MS"), "03/2024", 2),
        (written("%m/%Y", "MS"), "2024-03", 2),
        (dated([f"{2000 + n // 4}Q{n % 4 + 1}" for n in range(20)]), "2001Q3", 6),
        (dated([f"{1950 + n}" for n in range(20)]), "1955", 5),
        (dated(1704067200 + 3600 * np.arange(70)), "1704081600", 4),
        (dated(45292 + np.arange(70), time="t", date_format="excel"), "45300", 8),
        (written("%d.%m.%Y"), datetime(2024, 2, 5), 35),
        (written("%d.%m.%Y"), datetime(2024, 2, 5).date(), 35),
        (written("%d.%m.%Y"), np.datetime64("2024-02-05"), 35),
        (written("%d.%m.%Y"), pd.Timestamp("2024-02-05"), 35),
        (written("%d.%m.%Y"), 36, 35),
        (written("%d.%m.%Y"), np.int64(36), 35),
        (read_table(pd.DataFrame({"y": np.arange(9) % 7.0})), "3", 2),
        (read_table(pd.DataFrame({"y": np.arange(9) % 7.0})), 3, 2),
    ],
)
def test_a_date_in_the_format_of_the_table_names_its_row(table, origin, row):
    assert origins_at(table, origin).tolist() == [row]


def test_a_date_with_an_offset_names_one_of_two_equal_local_times():
    utc = pd.date_range("2024-10-26T22:00", periods=48, freq="h", tz="UTC")
    table = dated(utc.strftime("%Y-%m-%dT%H:%M%z"), zone="Europe/Berlin")
    assert table.times[2] == table.times[3]
    assert origins_at(table, "2024-10-27T02:00+02:00").tolist() == [2]
    assert origins_at(table, "2024-10-27T02:00+01:00").tolist() == [3]
    assert origins_at(table, "2024-10-27T01:00Z").tolist() == [3]
    assert origins_at(table, utc[3].to_pydatetime()).tolist() == [3]
    assert origins_at(table, "2024-10-27T03:00").tolist() == [4]
    with pytest.raises(
        UsageError, match="`origin=…` 2024-10-27 02:00 occurs twice, because the clock is set back then"
    ):
        origins_at(table, "2024-10-27 02:00")


def test_each_series_has_its_row_unless_it_ends_before():
    frame = pd.concat(
        [pd.DataFrame({"t": pd.date_range("2024-01-01", periods=n), "y": 1.0 * np.arange(n), "s": n}) for n in (9, 5)]
    )
    table = read_table(frame, id="s")
    assert origins_at(table, "2024-01-04").tolist() == [3, 12]
    assert origins_at(table, 4).tolist() == [3, 12]
    assert origins_at(table, "2024-01-07").tolist() == [6]


@pytest.mark.parametrize(
    ("table", "origin", "message"),
    [
        (
            written("%d.%m.%Y"),
            "05/02/2024",
            r"expected `origin=…` to be a date such as 10.03.2024 or 2024-03-10, got '05",
        ),
        (
            written("%d.%m.%Y"),
            "05.02.1999",
            r"expected `origin=…` to be a row of a data frame, which covers 2024-01-01 to ",
        ),
        (written("%d.%m.%Y"), "36", r"expected `origin=…` to be a date"),
        (written("%d.%m.%Y"), 0, r"expected `origin=…` to be a date"),
        (written("%d.%m.%Y"), 71, r"expected `origin=…` to be a row of"),
        (written("%d.%m.%Y"), pd.NaT, r"expected `origin=…` to be a date"),
        (written("%d.%m.%Y"), np.datetime64("NaT"), r"expected `origin=…` to be a date"),
        (written("%d.%m.%Y"), 3.5, r"expected `origin=…` to be a date"),
        (
            written("%d.%m.%Y"),
            "2024-02-05T00:00Z",
            r"expected `origin=…` without a UTC offset, because a data frame has no",
        ),
        (read_table(pd.DataFrame({"y": np.arange(9) % 7.0})), "2024-01-01", r"a row number from 1, because a data fr"),
        (read_table(pd.DataFrame({"y": np.arange(9) % 7.0})), "0", r"a row number from 1, because a data frame has no"),
        (
            read_table(pd.DataFrame({"y": np.arange(9) % 7.0})),
            10,
            r"expected `origin=…` to be a row of a data frame, got ",
        ),
    ],
)
def test_what_isn_t_a_row_of_the_table_is_refused(table, origin, message):
    with pytest.raises(UsageError, match=message):
        origins_at(table, origin)
