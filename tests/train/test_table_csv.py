"""CSV files: dates, gaps, other separators, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cellstack import FormatError
from cellstack.train import read_table


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("dates", "season", "after"),
    [
        (["20200104", "20200111", "20200118"], 52, "2020-01-25"),
        (["2020-01-04", "2020-01-05", "2020-01-06"], 7, "2020-01-07"),
        (["2020-01-31", "2020-02-29", "2020-03-31"], 12, "2020-04-30"),
        (["2020-01", "2020-04", "2020-07"], 4, "2020-10-01"),
        (["2020-01-01T00:00", "2020-01-01T01:00", "2020-01-01T02:00"], 24, "2020-01-01T03:00:00"),
        (["2020-01-01", "2021-01-01", "2022-01-01"], 1, "2023-01-01"),
    ],
)
def test_dates_give_the_season_and_go_on(tmp_path, dates, season, after):
    rows = "\n".join(f"{date},{n}" for n, date in enumerate(dates))
    table = read_table(write(tmp_path / "a.csv", f"when,y\n{rows}\n"))
    assert table.date == "when"
    assert table.spacing.season == season
    assert table.date_after(1) == after
    assert table.columns["y"].tolist() == [0, 1, 2]


def test_dates_left_out_are_missing_rows(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "d,y\n2020-01-01,1\n2020-01-02,2\n2020-01-03,3\n2020-01-06,6\n"))
    np.testing.assert_array_equal(table.columns["y"], [1, 2, 3, np.nan, np.nan, 6])


def test_text_columns_are_named_and_other_separators_read(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "y;place;z\n1;north;\n2;south;4\n"))
    assert table.ignored == {"place": "text with 2 distinct values in 2 rows, such as 'north'"}
    assert table.times is None
    assert table.date_after(1) is None
    np.testing.assert_array_equal(table.columns["z"], [np.nan, 4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: expected column names"),
        ("1,2\n3,4\n5,6\n", r"line 1: expected column names"),
        (f"{'a' * 200_000},b\n1,2\n3,4\n", r"line 1: field larger than field limit"),
        (f"a,b\n1,{'2' * 200_000}\n3,4\n", r"line 2: field larger than field limit"),
        (
            "d,y\n9999-12-29,1\n9999-12-30,2\n9999-12-31,3\n",
            r"(dates before the year 9999|expected a date such as 2020-01-31 .*), found .?9999-12-",
        ),
        ("a,a\n1,2\n3,4\n", r"expected distinct names, found 'a' 2 times"),
        ("a,b\n1,2\n3\n", r"line 3: expected 2 cells, found 1"),
        ("a,b\n1,2\n3,oops\n", r"line 3: expected a number in column 'b', found 'oops'"),
        ("a,b\n1,2\n", r"at least two rows"),
        ("a\nx\ny\n", r"expected a numeric column, found none"),
        (
            "d,y\n2020-01-01,1\n2020-01-03,2\n2020-01-05,3\n2020-01-06,3\n",
            r"evenly spaced dates .every 2 days., found .2020-01-06",
        ),
        ("d,y\n2020-01-01,1\n2020-01-02,2\n2020-01-03,3\n2022-01-05,3\n", r"without long gaps"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(FormatError, match=message) as error:
        read_table(write(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_forecast_beyond_the_calendar(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "d,y\n1996-01,1\n1997-01,2\n1998-01,3\n"))
    assert table.times is not None
    late = np.datetime64("9998-01-01", "s") - (table.times[-1] - table.times)  # pandas 2 reads no such dates
    table = replace(table, times=late)
    assert table.date_after(1) == "9999-01-01"
    with pytest.raises(
        FormatError, match=r"a\.csv: expected dates up to the year 9999, found 2 steps after 9998-01-01"
    ):
        table.date_after(2)


FORMS = ["2024-01-{:02}", "2024/01/{:02}", "202401{:02}", "2024-01-{:02}T06:00:00+01:00", "2024/01/{:02} 06:00"]


@pytest.mark.parametrize("form", FORMS)
def test_a_time_that_occurs_twice_is_refused(tmp_path, form):
    file = write(
        tmp_path / "a.csv", "date,y\n" + "".join(f"{form.format(day)},{n}.5\n" for n, day in enumerate((1, 3, 2, 3)))
    )
    found = re.escape(f"found {form.format(3)!r} in column date again, as in line 3")
    with pytest.raises(FormatError, match=f"line 5: expected each time only once, {found}"):
        read_table(file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("days", [(1, 3, 2, 4), (4, 3, 2, 1), (1, 2, 3, 4)])
def test_rows_are_sorted_by_time(tmp_path, form, days):
    table = read_table(write(tmp_path / "a.csv", "date,y\n" + "".join(f"{form.format(day)},{day}.5\n" for day in days)))
    assert table.date == "date"
    assert table.columns["y"].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert ("rows sorted by time" in table.notes) == (days != (1, 2, 3, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", ["", "n/a", "soon", "2024-02-31", "2024/13/01", "20240231", "2024-1"])
def test_a_cell_that_isn_t_a_date_is_refused(tmp_path, form, bad):
    cells = [form.format(1), form.format(2), bad, form.format(4)]
    file = write(tmp_path / "a.csv", "date,y\n" + "".join(f"{cell},1.5\n" for cell in cells))
    with pytest.raises(FormatError, match=re.escape(f"line 4: expected a date such as {cells[0]} in column date")) as e:
        read_table(file)
    assert repr(bad) in str(e.value)


def test_a_time_zone_with_some_dates_only(tmp_path):
    file = write(tmp_path / "a.csv", "date,y\n2024-01-01T00:00:00+01:00,1\n2024-01-02T00:00:00,2\n")
    with pytest.raises(FormatError, match="line 3: expected a time zone with all dates of column date or with none"):
        read_table(file)


def test_other_columns_that_look_like_dates(tmp_path):
    rows = "2024-01-01,31.12.23,20240105,1.5\n2024-01-02,,20240101,2.5\n2024-01-03,31.10.22,20240103,3.5\n"
    table = read_table(write(tmp_path / "a.csv", "date,since,code,y\n" + rows))
    assert (table.date, list(table.ignored), list(table.columns)) == ("date", ["since"], ["code", "y"])


def test_numbers_of_eight_digits_aren_t_dates(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "id,y\n20209901,1\n20208702,2\n20200101,3\n10200101,4\n"))
    assert list(table.columns) == ["id", "y"]
    assert table.date is None


@pytest.mark.parametrize("value", ["1e39", "-3.5e38"])
def test_a_number_beyond_float32_is_named(tmp_path, value):
    with pytest.raises(FormatError, match=rf"bad\.csv: line 3: .*in float32's range in column 'y', found '{value}'"):
        read_table(write(tmp_path / "bad.csv", f"y\n1\n{value}\n2\n"))
