"""Dates of a table: formats, ambiguous ones, time zones and daylight saving."""

import re

import numpy as np
import pandas as pd
import pytest

from cellstack import FormatError
from cellstack.train import read_table
from cellstack.train.checks import UsageError


def series(tmp_path, times, header="time,y", between=","):
    """Write a file with these dates and the numbers 0, 1, 2 …"""
    file = tmp_path / "a.csv"
    file.write_text(header + "\n" + "".join(f"{time}{between}{n}\n" for n, time in enumerate(times)))
    return file


HOURS = pd.date_range("2023-01-30 20:00", periods=60, freq="h")
DAYS = pd.date_range("2023-01-01", periods=60, freq="D")
MONTHS = pd.date_range("2019-01-01", periods=40, freq="MS")
QUARTERS = pd.period_range("2000Q1", periods=9, freq="Q")


@pytest.mark.parametrize(
    "form",
    [
        *("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "%Y/%m/%d %H:%M", "%d.%m.%Y %H:%M", "%d/%m/%y %H:%M:%S", "%Y%m%d%H"),
        *("%m/%d/%Y %I:%M %p", "%-m/%-d/%Y %-I:%M:%S %p", "%d %b %Y %H:%M", "%d-%b-%Y %I:%M%p", "%Y%m%d %H%M"),
        *("%Y-%m-%d %H", "%Y%m%dT%H%M%S", "%B %d %Y %H:%M", "%Y-%m-%d %H:%M:%S.%f"),
    ],
)
def test_hours_in_any_usual_form(tmp_path, form):
    table = read_table(series(tmp_path, [form and time.strftime(form) for time in HOURS]))
    np.testing.assert_array_equal(table.times, HOURS.to_numpy())
    assert table.columns["y"].tolist() == list(range(60))
    assert (str(table.spacing), table.spacing.seasons, table.zone) == ("hourly", (24, 168), None)
    assert table.understood()[0] == "60 rows, hourly from 2023-01-30 20:00 to 2023-02-02 07:00 by `time`"


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y%m%d", "%d/%m/%Y", "%m/%d/%Y", "%d. %B %Y", "%b %d %Y", "%m-%d-%y"])
def test_days_in_any_usual_form(tmp_path, form):
    table = read_table(series(tmp_path, [time.strftime(form) for time in DAYS]))
    np.testing.assert_array_equal(table.times, DAYS.to_numpy())
    assert table.date_after(1) == "2023-03-02"


@pytest.mark.parametrize("form", ["%Y-%m", "%Y%m", "%m/%Y", "%b %Y", "%B %Y", "%b-%y", "%Y-%m-%d"])
def test_months_in_any_usual_form(tmp_path, form):
    table = read_table(series(tmp_path, [time.strftime(form) for time in MONTHS], "month,y"))
    np.testing.assert_array_equal(table.times, MONTHS.to_numpy())
    assert str(table.spacing) == "monthly"


@pytest.mark.parametrize("write", [str, lambda q: f"Q{q.quarter} {q.year}", lambda q: f"{q.year}-Q{q.quarter}"])
def test_quarters(tmp_path, write):
    table = read_table(series(tmp_path, map(write, QUARTERS)))
    np.testing.assert_array_equal(table.times, QUARTERS.start_time.to_numpy())
    assert (str(table.spacing), table.spacing.season) == ("quarterly", 4)


def test_weeks_and_years(tmp_path):
    mondays = pd.date_range("2020-12-07", periods=9, freq="7D")  # over the end of a year of 53 weeks
    weeks = [f"{year}-W{week:02}" for year, week, _ in map(pd.Timestamp.isocalendar, mondays)]
    table = read_table(series(tmp_path, weeks))
    np.testing.assert_array_equal(table.times, mondays.to_numpy())
    assert (str(table.spacing), table.spacing.season) == ("weekly", 52)
    table = read_table(series(tmp_path, range(1990, 2000), "Year,y"))
    assert (str(table.spacing), str(table.times[0]), table.date_after(1)) == (
        "yearly",
        "1990-01-01T00:00:00",
        "2000-01-01",
    )


@pytest.mark.parametrize("name", ["timestamp", "a"])
@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_unix_times(tmp_path, name, unit, scale):
    table = read_table(series(tmp_path, [int(time.timestamp()) * scale for time in HOURS], f"{name},y"))
    np.testing.assert_array_equal(table.times, HOURS.to_numpy())
    assert table.zone == "UTC"
    assert f"`{name}`: Unix time in {unit}, in UTC" in table.notes


def test_a_cell_that_isn_t_a_unix_time(tmp_path):
    seconds = [int(time.timestamp()) for time in HOURS]
    with pytest.raises(FormatError, match=f"line 7: expected a date such as {seconds[0]} in column time, found 'soon'"):
        read_table(series(tmp_path, [*seconds[:5], "soon", *seconds[6:]]))
    with pytest.raises(FormatError, match="line 7: expected a date in column time, found ''"):
        read_table(series(tmp_path, [*seconds[:5], "", *seconds[6:]]))
    with pytest.raises(
        FormatError, match=f"line 2: expected a date in the format excel in column time, found '{seconds[0]}'"
    ):
        read_table(series(tmp_path, seconds), date_format="excel")


def test_numbers_that_aren_t_times_stay_numbers(tmp_path):
    counter = 1_600_000_000 + np.array([0, 5, 5, 90, 17, 300])
    table = read_table(series(tmp_path, counter, "total,y"))
    assert (table.date, list(table.columns)) == (None, ["total", "y"])
    assert table.understood()[0] == "6 rows, in row order: no column of dates"
    table = read_table(series(tmp_path, range(6), "time,y"))
    assert "`time` read as numbers, not dates: use `time=…` and `date_format=…` if it has dates" in table.notes


def test_excel_s_numbers_are_dates_where_asked(tmp_path):
    serial = [(time - pd.Timestamp("1899-12-30")) / pd.Timedelta("1D") for time in HOURS]
    file = series(tmp_path, serial, "date,y")
    with pytest.raises(
        FormatError, match=r"line 2: expected dates .*found '44956.83.*`date_format=…` to their format \(excel"
    ):
        read_table(file)
    np.testing.assert_array_equal(read_table(file, time="date", date_format="excel").times, HOURS.to_numpy())


# ── day or month first ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_order_of_day_and_month_is_detected_from_even_steps(tmp_path):
    for form, order in (("%d/%m/%Y", "day"), ("%m/%d/%Y", "month")):
        table = read_table(series(tmp_path, [time.strftime(form) for time in MONTHS]))
        np.testing.assert_array_equal(table.times, MONTHS.to_numpy())
        assert f"`time`: {order} first, detected from their even steps" in table.notes


def test_an_ambiguous_order_of_day_and_month_is_refused(tmp_path):
    file = series(tmp_path, [f"01/{month:02}/2022" for month in range(1, 13)])
    ways = re.escape(
        "'01/02/2022' in column time is ambiguous, it may be 2022-02-01 or 2022-01-02: use `day_first=True` or"
    )
    with pytest.raises(FormatError, match=f"a.csv: line 3: {ways}"):
        read_table(file)
    assert str(read_table(file, day_first=True).spacing) == "monthly"
    table = read_table(file, day_first=False)
    assert (str(table.spacing), str(table.times[-1])) == ("daily", "2022-01-12T00:00:00")
    again = read_table(file, **table.reading)  # as a trained model reads the next file
    np.testing.assert_array_equal(again.times, table.times)


def test_an_order_that_the_dates_contradict(tmp_path):
    file = series(tmp_path, ["01/02/2022", "02/02/2022", "13/02/2022"])
    with pytest.raises(FormatError, match=r"line 4: expected a date such as 01/02/2022 in column time, found '13/02"):
        read_table(file, day_first=False)
    with pytest.raises(FormatError, match=r"line 4: expected a date .*found '02/13/2022'"):
        read_table(series(tmp_path, ["13/02/2022", "14/02/2022", "02/13/2022"]))


# ── which column ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_column_with_a_name_for_dates_that_has_none(tmp_path):
    with pytest.raises(FormatError, match=r"line 2: expected dates such as 2020-01-31 in column date, found 'soon'"):
        read_table(series(tmp_path, ["soon", "later", "never"], "date,y"))
    table = read_table(series(tmp_path, ["soon", "later", "never"], "date,y"), time="")
    assert table.ignored == {"date": "text with 3 distinct values in 3 rows, such as 'soon'"}


def test_names_that_contain_a_name_for_dates(tmp_path):
    table = read_table(series(tmp_path, [5, 1, 7, 2], "updates,y"))
    assert (table.date, list(table.columns)) == (None, ["updates", "y"])
    with pytest.raises(FormatError, match="expected dates such as 2020-01-31 in column InvoiceDate, found 'soon'"):
        read_table(series(tmp_path, ["soon", "x", "soon", "x"], "InvoiceDate,y"))


def test_a_format_that_the_dates_don_t_have(tmp_path):
    file = series(tmp_path, [f"{time:%Y-%m-%d}" for time in DAYS])
    with pytest.raises(FormatError, match="a date such as 31/01/2020 in column time, found '2023-01-01'"):
        read_table(file, date_format="%d/%m/%Y")
    with pytest.raises(UsageError, match=r"expected a date format such as .*, got '%J'"):
        read_table(file, date_format="%J")
    whole = read_table(series(tmp_path, [f"{time:%j %Y}" for time in DAYS]), date_format="%j %Y", time="time")
    np.testing.assert_array_equal(whole.times, DAYS.to_numpy())


def test_any_column_can_be_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a,b,y\n2020-01-01,2021-01-01,1\n2020-01-02,2021-01-08,2\n2020-01-03,2021-01-15,3\n")
    assert (read_table(file).date, read_table(file, time="b").date) == ("a", "b")
    assert str(read_table(file, time="b").spacing) == "weekly"
    with pytest.raises(UsageError, match="expected a column of dates 'c', found a, b, y"):
        read_table(file, time="c")
    file.write_text("a,y\n1.5,2\n2.5,3\n")
    with pytest.raises(UsageError, match="`zone=…` needs a column of dates, found none in a, y"):
        read_table(file, zone="UTC")


@pytest.mark.parametrize(
    ("header", "form", "date"),
    [
        ("day,hour,y", "%Y-%m-%d,%-H", "day,hour"),
        ("dteday,hr,y", "%d.%m.%Y,%H", "dteday,hr"),
        ("date,time,y", "%m/%d/%Y,%I:%M %p", "date,time"),
        ("Year,Month,Day,Hour,y", "%Y,%-m,%-d,%-H", "Year,Month,Day,Hour"),
    ],
)
def test_a_day_and_its_hour_in_separate_columns(tmp_path, header, form, date):
    file = series(tmp_path, [time.strftime(form) for time in HOURS], header)
    for table in (read_table(file), read_table(file, time=date), read_table(file, time=date.split(","))):
        np.testing.assert_array_equal(table.times, HOURS.to_numpy())
        assert (table.date, list(table.columns)) == (date, ["y"])
    assert read_table(file).notes[0] == "dates from " + ", ".join(f"`{name}`" for name in date.split(",")) + " together"


def test_hours_from_1_to_24(tmp_path):
    file = series(tmp_path, [f"{day:%Y-%m-%d},{hour}" for day in DAYS for hour in range(1, 25)], "day,hour,y")
    with pytest.raises(FormatError, match=r"line 3: .* use `id=…` for the column that identifies series, or `time=…`"):
        read_table(file)
    with pytest.raises(FormatError, match=r"line 25: expected a date such as .*, found '2023-01-01 24:00'"):
        read_table(file, time="day,hour")


def test_a_year_and_its_quarter_or_month(tmp_path):
    table = read_table(series(tmp_path, [f"{q.year}.0,{q.quarter}.0" for q in QUARTERS], "year,quarter,y"))
    np.testing.assert_array_equal(table.times, QUARTERS.start_time.to_numpy())
    table = read_table(series(tmp_path, [time.strftime("%Y,%-m") for time in MONTHS], "year,month,y"))
    np.testing.assert_array_equal(table.times, MONTHS.to_numpy())


# ── time zones ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_offsets(tmp_path):
    for end, zone in (("Z", "UTC"), ("+01:00", "UTC+01:00"), (" -0530", "UTC-05:30"), (" UTC", "UTC")):
        table = read_table(series(tmp_path, [f"{time:%Y-%m-%d %H:%M:%S}{end}" for time in HOURS]))
        np.testing.assert_array_equal(table.times, HOURS.to_numpy())
        assert table.zone == zone
    local = HOURS.tz_localize("UTC").tz_convert("Asia/Tokyo").tz_localize(None)
    table = read_table(series(tmp_path, [f"{time:%Y-%m-%dT%H:%M:%S}Z" for time in HOURS]), zone="Asia/Tokyo")
    np.testing.assert_array_equal(table.times, local.to_numpy())
    with pytest.raises(UsageError, match="expected a time zone's name such as Europe/Berlin, got 'Europe/Nowhere'"):
        read_table(series(tmp_path, HOURS), zone="Europe/Nowhere")
    with pytest.raises(UsageError, match="expected a time zone's name such as Europe/Berlin, got 'Europe/Nowhere'"):
        read_table(series(tmp_path, [f"{time:%Y-%m-%dT%H:%M:%S}Z" for time in HOURS]), zone="Europe/Nowhere")


@pytest.mark.parametrize("ends", [("", "Z"), ("+01:00", "")])
def test_an_offset_with_some_dates_only(tmp_path, ends):
    times = [f"{time:%Y-%m-%d %H:%M:%S}{ends[n > 20]}" for n, time in enumerate(HOURS)]
    with pytest.raises(FormatError, match="line 23: expected a time zone with all dates of column time or with none"):
        read_table(series(tmp_path, times))
    table = read_table(series(tmp_path, [time.replace(" 00:00:00", "") for time in map(str, HOURS)]))
    np.testing.assert_array_equal(table.times, HOURS.to_numpy())  # days and times of day, without offsets


def test_days_of_local_time_whose_offset_changes(tmp_path):
    days = pd.date_range("2022-01-01", periods=400, freq="D", tz="Europe/Berlin")
    file = series(tmp_path, [day.isoformat() for day in days])
    with pytest.raises(FormatError, match=r"line 88: expected evenly spaced dates \(daily\), .* use `zone=…`, if they"):
        read_table(file)
    table = read_table(file, zone="Europe/Berlin")
    np.testing.assert_array_equal(table.times, days.tz_localize(None).to_numpy())
    frame = pd.DataFrame({"y": range(400)}, index=days)
    np.testing.assert_array_equal(read_table(frame).times, table.times)


def local(zone, start="2013-01-01", hours=8760, freq="h"):
    return pd.date_range(start, periods=hours, freq=freq, tz=zone).tz_localize(None)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("zone", "twice"),
    [
        ("America/Chicago", "2013-11-03T01:00"),
        ("Europe/Berlin", "2013-10-27T02:00"),
        ("Australia/Sydney", "2013-04-07T02:00"),
    ],
)
def test_daylight_saving_of_a_zone(tmp_path, zone, twice, order):
    times = local(zone)
    table = read_table(series(tmp_path, times[::order]), zone=zone)
    np.testing.assert_array_equal(table.times, times.to_numpy())
    assert (str(table.spacing), table.zone, int(table.filled.rows[0])) == ("hourly", zone, 0)
    assert table.columns["y"].tolist() == list(range(8760))[::order]
    assert (table.times == np.datetime64(twice)).sum() == 2
    assert twice[:10] in next(note for note in table.notes if "clock" in note)
    with pytest.raises(FormatError, match=r"use `zone=…`, if the clock is set back then"):
        read_table(series(tmp_path, times[::order]))


def test_an_hour_in_its_own_column_with_daylight_saving(tmp_path):
    times = local("Europe/Berlin")
    table = read_table(series(tmp_path, times.strftime("%Y-%m-%d,%-H"), "day,hour,y"), zone="Europe/Berlin")
    np.testing.assert_array_equal(table.times, times.to_numpy())
    assert (table.date, table.zone) == ("day,hour", "Europe/Berlin")


def test_times_after_a_clock_change(tmp_path):
    times = local("Europe/Berlin", "2013-10-01", 26 * 24)
    table = read_table(series(tmp_path, times), zone="Europe/Berlin")
    whole = local("Europe/Berlin", "2013-10-01", 26 * 24 + 48).to_numpy()
    np.testing.assert_array_equal(table.times_after(48), whole[-48:])


def test_a_spring_alone_and_series_with_gaps(tmp_path):
    times = local("America/New_York", hours=2000)
    table = read_table(series(tmp_path, times), zone="America/New_York")
    assert (table.zone, int(table.filled.rows[0])) == ("America/New_York", 0)
    times = local("America/New_York")
    frame = pd.DataFrame({"t": [*times, *times], "shop": [*"a" * 8760, *"b" * 8760], "y": range(17520)})
    frame = frame.drop(index=[40, 41, 8760 + 7345])  # the last one is in an hour that occurs twice
    table = read_table(frame, id="shop", zone="America/New_York")
    assert table.zone == "America/New_York"
    assert table.filled.rows.tolist() == [2, 1]
    assert "so are 1 rows whose time occurs only once" in " ".join(table.notes)


def test_duplicate_times_without_daylight_saving(tmp_path):
    times = local("Europe/Berlin").to_numpy().copy()
    times[4000] = times[3999]
    with pytest.raises(
        FormatError, match=r"line 4002: expected each time only once, .* again, as in line 4001: keep one row"
    ):
        read_table(series(tmp_path, times), zone="Europe/Berlin")
    fixed = pd.date_range("2013-01-01", periods=8760, freq="h")
    with pytest.raises(FormatError, match=r"line 2140: 2013-03-31 02:00:00 doesn't exist in Europe/Berlin"):
        read_table(series(tmp_path, fixed), zone="Europe/Berlin")
