"""CSV series: dates, gaps, windows that see nothing of the future, the seasonal-naive rule."""

import re

import numpy as np
import pytest

from cellstack import FormatError
from cellstack.train import Inputs, Recipe, Windows, read_table
from cellstack.train.checks import UsageError
from cellstack.train.forecast import errors, parts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def table_of(tmp_path, values, **others):
    columns = {"y": values, **others}
    lines = [",".join(columns)] + [
        ",".join("" if np.isnan(value) else repr(float(value)) for value in row)
        for row in zip(*columns.values(), strict=True)
    ]
    return read_table(write(tmp_path / "series.csv", "\n".join(lines) + "\n"))


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
    assert table.ignored == {"place": "text, 2 different values in 2 rows"}
    assert table.times is None
    assert table.date_after(1) is None
    np.testing.assert_array_equal(table.columns["z"], [np.nan, 4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: expected the columns' names"),
        ("1,2\n3,4\n5,6\n", r"line 1: expected the columns' names"),
        (f"{'a' * 200_000},b\n1,2\n3,4\n", r"line 1: field larger than field limit"),
        (f"a,b\n1,{'2' * 200_000}\n3,4\n", r"line 2: field larger than field limit"),
        ("d,y\n9999-12-29,1\n9999-12-30,2\n9999-12-31,3\n", r"dates before the year 9999, found 9999-12-31"),
        ("a,a\n1,2\n3,4\n", r"expected a name once, found 'a' 2 times"),
        ("a,b\n1,2\n3\n", r"line 3: expected 2 cells, found 1"),
        ("a,b\n1,2\n3,oops\n", r"line 3: expected a number in column 'b', found 'oops'"),
        ("a,b\n1,2\n", r"at least two rows"),
        ("a\nx\ny\n", r"expected a column of numbers, found none"),
        (
            "d,y\n2020-01-01,1\n2020-01-03,2\n2020-01-05,3\n2020-01-06,3\n",
            r"spaced evenly .every 2 days., found .2020-01-06",
        ),
        ("d,y\n2020-01-01,1\n2020-01-02,2\n2020-01-03,3\n2022-01-05,3\n", r"without long gaps"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(FormatError, match=message) as error:
        read_table(write(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_by_hand(tmp_path):
    y = np.array([0.0, 10, 20, 1, 12, 23, 3, 15, 27])
    table = table_of(tmp_path, y, z=np.arange(9.0))
    windows = Windows(Recipe("y", ("z",), 4, 2, 3), table, np.array([5]))
    batch = windows.fetch(np.array([0]))
    # rows 4 and 5: less one season before, less the latest value in the window, the other column
    np.testing.assert_array_equal(batch.x, [[[2, -11, 4], [3, 0, 5]]])
    np.testing.assert_array_equal(windows.reference(np.array([0])), [[1, 12, 23, 1]])
    np.testing.assert_array_equal(batch.y, [[2, 3, 4, 0]])
    np.testing.assert_array_equal(batch.weight, [[1, 1, 1, 0]])  # the fourth lies beyond the table


def test_missing_values_are_not_zeros(tmp_path):
    y = np.array([0.0, 10, np.nan, 1, np.nan, 23, np.nan, 15, 27])
    windows = Windows(Recipe("y", (), 3, 4, 3), table_of(tmp_path, y), np.array([5]))
    batch = windows.fetch(np.array([0]))
    # at row 5 no value of its phase came before: the difference is missing though the value is not
    np.testing.assert_array_equal(batch.x, [[[np.nan, np.nan], [1, -22], [np.nan, np.nan], [np.nan, 0]]])
    np.testing.assert_array_equal(windows.reference(np.array([0])), [[1, 10, 23]])
    np.testing.assert_array_equal(batch.weight, [[0, 1, 1]])  # a missing target doesn't count


def test_nothing_after_an_origin_is_seen(tmp_path, rng):
    y, z = rng.normal(size=(2, 200)).cumsum(axis=1)
    y[rng.random(200) < 0.1] = np.nan
    recipe = Recipe("y", ("z",), 9, 12, 7)
    origins = np.arange(60, 120)
    before = Windows(recipe, table_of(tmp_path, y, z=z), origins)
    for place in (0, 25, 59):
        changed_y, changed_z = y.copy(), z.copy()
        changed_y[origins[place] + 1 :] = 1e6
        changed_z[origins[place] + 1 :] = -1e6
        after = Windows(recipe, table_of(tmp_path, changed_y, z=changed_z), origins)
        one = np.array([place])
        np.testing.assert_array_equal(before.fetch(one).x, after.fetch(one).x)
        np.testing.assert_array_equal(before.reference(one), after.reference(one))


def test_parts_don_t_share_targets_and_leave_room():
    recipe = Recipe("y", (), 10, 20, 7)
    training, validation, test = parts(400, recipe, 0.2, 0.25)
    assert training[0] >= recipe.season + recipe.window - 1
    assert training[-1] + recipe.horizon < validation[0] + 1
    assert validation[-1] + recipe.horizon < test[0] + 1
    assert (test[0], test[-1]) == (299, 389)
    with pytest.raises(ValueError, match="more rows for the training part"):
        parts(60, recipe, 0.2, 0.25)


def test_the_training_part_alone_is_measured(tmp_path, rng):
    y = rng.normal(size=300).cumsum()
    recipe = Recipe("y", (), 5, 10, 1)
    training = parts(300, recipe, 0.1, 0.2)[0]
    changed = y.copy()
    changed[training[-1] + recipe.horizon + 1 :] += 1e5
    measured = [
        Inputs.measure(Windows(recipe, table_of(tmp_path, values), training), np.arange(len(training)))
        for values in (y, changed)
    ]
    np.testing.assert_array_equal(measured[0].mean, measured[1].mean)
    np.testing.assert_array_equal(measured[0].scale, measured[1].scale)


def test_a_column_that_isn_t_there(tmp_path):
    with pytest.raises(ValueError, match="a column of numbers 'x', found y"):
        Windows(Recipe("x", (), 1, 1, 1), table_of(tmp_path, np.arange(5.0)), np.array([3]))


def test_errors_leave_out_what_is_missing():
    assert errors(np.array([1.0, 2, 5]), np.array([0.0, np.nan, 2])) == {"mae": 2.0, "rmse": np.sqrt(5)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("season", 0), ("window", -1), ("horizon", 2**31), ("season", "52"), ("window", 1.5), ("horizon", True)],
)
def test_a_recipe_out_of_range(name, value):
    values = {"target": "y", "inputs": (), "horizon": 1, "window": 1, "season": 1}
    with pytest.raises(UsageError, match=rf"expected {name} to be a whole number from 1 to 2147483647, got {value!r}"):
        Recipe(**{**values, name: value})


@pytest.mark.parametrize("values", [{"target": 3}, {"inputs": ("y", 3)}, {"inputs": "y"}])
def test_a_recipe_of_columns_without_names(values):
    with pytest.raises(UsageError, match=f"expected {next(iter(values))} to be "):
        Recipe(**{"target": "y", "inputs": (), "horizon": 1, "window": 1, "season": 1, **values})


def test_a_season_longer_than_the_table(tmp_path):
    windows = Windows(Recipe("y", (), 2, 4, 2**31 - 1), table_of(tmp_path, np.arange(5.0)), np.array([4]))
    assert np.isnan(windows.difference).all()
    assert np.isnan(windows.reference(np.array([0]))).all()
    np.testing.assert_array_equal(windows.latest, np.arange(5.0))


def test_a_forecast_beyond_the_calendar(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "d,y\n9996-01,1\n9997-01,2\n9998-01,3\n"))
    assert table.date_after(1) == "9999-01-01"
    with pytest.raises(
        FormatError, match=r"a\.csv: expected dates up to the year 9999, found 2 steps after 9998-01-01"
    ):
        table.date_after(2)


def test_errors_of_nothing_are_not_a_number():
    assert np.isnan(list(errors(np.ones(2), np.full(2, np.nan)).values())).all()


FORMS = ["2024-01-{:02}", "2024/01/{:02}", "202401{:02}", "2024-01-{:02}T06:00:00+01:00", "2024/01/{:02} 06:00"]


@pytest.mark.parametrize("form", FORMS)
def test_a_time_that_stands_twice_is_refused(tmp_path, form):
    file = write(
        tmp_path / "a.csv", "date,y\n" + "".join(f"{form.format(day)},{n}.5\n" for n, day in enumerate((1, 3, 2, 3)))
    )
    found = re.escape(f"found {form.format(3)!r} in column date again, as in line 3")
    with pytest.raises(FormatError, match=f"line 5: expected each time once in order of time, {found}"):
        read_table(file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("days", [(1, 3, 2, 4), (4, 3, 2, 1), (1, 2, 3, 4)])
def test_rows_are_put_in_order_of_time(tmp_path, form, days):
    table = read_table(write(tmp_path / "a.csv", "date,y\n" + "".join(f"{form.format(day)},{day}.5\n" for day in days)))
    assert table.date == "date"
    assert table.columns["y"].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert ("rows sorted by time" in table.notes) == (days != (1, 2, 3, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", ["", "n/a", "soon", "2024-02-31", "2024/13/01", "20240231", "2024-1"])
def test_a_cell_that_is_no_date_is_refused(tmp_path, form, bad):
    cells = [form.format(1), form.format(2), bad, form.format(4)]
    file = write(tmp_path / "a.csv", "date,y\n" + "".join(f"{cell},1.5\n" for cell in cells))
    with pytest.raises(FormatError, match=re.escape(f"line 4: expected a date such as {cells[0]} in column date")) as e:
        read_table(file)
    assert repr(bad) in str(e.value)


def test_a_time_zone_with_some_dates_only(tmp_path):
    file = write(tmp_path / "a.csv", "date,y\n2024-01-01T00:00:00+01:00,1\n2024-01-02T00:00:00,2\n")
    with pytest.raises(FormatError, match="line 3: expected a time zone with all dates of column date or with none"):
        read_table(file)


def test_columns_that_look_like_dates_beside_the_dates(tmp_path):
    rows = "2024-01-01,31.12.23,20240105,1.5\n2024-01-02,,20240101,2.5\n2024-01-03,31.10.22,20240103,3.5\n"
    table = read_table(write(tmp_path / "a.csv", "date,since,code,y\n" + rows))
    assert (table.date, list(table.ignored), list(table.columns)) == ("date", ["since"], ["code", "y"])


def test_numbers_of_eight_digits_are_no_dates(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "id,y\n20209901,1\n20208702,2\n20200101,3\n10200101,4\n"))
    assert list(table.columns) == ["id", "y"]
    assert table.date is None


@pytest.mark.parametrize("value", ["1e39", "-3.5e38"])
def test_a_number_beyond_float32_is_named(tmp_path, value):
    with pytest.raises(FormatError, match=rf"bad\.csv: line 3: .*that float32 holds in column 'y', found '{value}'"):
        read_table(write(tmp_path / "bad.csv", f"y\n1\n{value}\n2\n"))
