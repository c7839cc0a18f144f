"""Tables: files and frames, several series, even grids, errors and descriptions."""

import argparse
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import polars as pl
import pytest

from cellstack import FormatError
from cellstack.cli.tables import add_table_options, given_options
from cellstack.train import read_table
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import merged
from cellstack.train.tables.table import READING, CategoryColumn, Spacing


def write(tmp_path, text, encoding="utf-8", name="a.csv"):
    file = tmp_path / name
    file.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return file


def days(count, start="2023-01-01", freq="D"):
    return pd.date_range(start, periods=count, freq=freq)


def rows(cells, between=","):
    return "".join(f"{day:%Y-%m-%d}{between}{cell}\n" for day, cell in zip(days(len(cells)), cells, strict=True))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("between", [",", ";", "\t", "|"])
def test_separators_blanks_and_quotation_marks(tmp_path, between):
    lines = [["time", ' "y, in; m|s"', "z"], ["2023-01-01", " 1.5", '"a ""b"""'], ["2023-01-02", "2.5 ", '"a ""b"""']]
    table = read_table(write(tmp_path, "\r\n".join(between.join(line) for line in lines) + "\r\n"))
    assert table.columns["y, in; m|s"].tolist() == [1.5, 2.5]
    assert table.categories["z"].labels == ('a "b"',)
    assert table.date == "time"


@pytest.mark.parametrize(
    ("encoding", "asked"),
    [("utf-8-sig", None), ("utf-16", None), ("utf-16-le", "utf-16-le"), ("latin-1", "latin-1"), ("cp1252", "cp1252")],
)
def test_encodings(tmp_path, encoding, asked):
    file = write(tmp_path, "zeit,größe\n" + rows([1, 2, 3]), encoding)
    assert read_table(file, encoding=asked).columns["größe"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("t,größe\n" + rows([1, 2]), "latin-1", r"line 1: expected UTF-8 text, found byte 0xf6: .* gives 't,größe'"),
        (
            "t,y,z\n1,2,a\n3,4,é\n",
            "latin-1",
            r"line 3: expected UTF-8 text, found byte 0xe9: use `encoding=…`, such as lat",
        ),
        ("t,y\n1,2\n", "utf-16-le", r"found NUL bytes: use `encoding=…`, such as utf-16-le"),
    ],
)
def test_other_encodings_are_named(tmp_path, text, encoding, message):
    with pytest.raises(FormatError, match=message):
        read_table(write(tmp_path, text, encoding))


def test_a_comma_in_a_name_and_lines_above_the_names(tmp_path):
    table = read_table(write(tmp_path, "time;y, in m\n" + rows(["1,5", "2,5"], ";")))
    assert table.columns["y, in m"].tolist() == [1.5, 2.5]
    with pytest.raises(FormatError, match="line 2: expected 1 cells, found 2: remove lines above"):
        read_table(write(tmp_path, "# from here\nt,y\n" + rows([1, 2])))
    with pytest.raises(
        FormatError,
        match=r"between cells, found spaces in 'time y': pandas reads such a file with "
        r"pd\.read_csv\(file, sep=r'\\s\+'\)",
    ):
        read_table(write(tmp_path, "time y\n" + rows([1, 2], " ")))


def test_a_spreadsheet_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FormatError, match="expected text, found a zip or Excel file: save it as CSV"):
        read_table(write(tmp_path, b"PK\x03\x04rest"))
    with pytest.raises(UsageError, match="found a spreadsheet: save it as CSV"):
        read_table(tmp_path / "a.xlsx")
    with pytest.raises(UsageError, match="expected an encoding such as utf-8, utf-16 or latin-1, got 'klingon'"):
        read_table(write(tmp_path, "a,b\n1,2\n3,4\n"), encoding="klingon")
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")


def test_lines_are_counted_over_blank_ones_and_cells_of_two_lines(tmp_path):
    text = '\n"a\nb",c\n1,"x\ny"\n\n2,z\n3\n'
    with pytest.raises(FormatError, match="line 8: expected 2 cells, found 1"):
        read_table(write(tmp_path, text))
    with pytest.raises(FormatError, match=re.escape("line 8: expected a number in column 'a b', found 'oops'")):
        read_table(write(tmp_path, text.replace("3\n", "oops,z\n")))


def test_what_pandas_writes(tmp_path):
    frame = pd.DataFrame({"time": days(5), "y": range(5)})
    frame.to_csv(tmp_path / "a.csv")
    table = read_table(tmp_path / "a.csv")
    assert (table.date, list(table.columns), table.ignored) == ("time", ["y"], {"index": "row numbers"})
    pd.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.csv")  # written, read and written again
    table = read_table(tmp_path / "b.csv")
    assert (list(table.columns), table.ignored) == (["y"], {"index": "row numbers", "Unnamed: 0": "row numbers"})
    frame.set_index(days(5)).drop(columns="time").to_csv(tmp_path / "c.csv")
    table = read_table(tmp_path / "c.csv")
    assert (table.date, list(table.columns)) == ("index", ["y"])
    with pytest.raises(FormatError, match=r"column names, found 't,2\.5', in which 2\.5 is a number"):
        read_table(write(tmp_path, "t,2.5\n" + rows([1, 2]), name="e.csv"))
    pd.DataFrame(np.ones((3, 2))).to_csv(tmp_path / "d.csv")
    assert list(read_table(tmp_path / "d.csv").columns) == ["0", "1"]


def test_empty_rows_at_the_end_are_reported(tmp_path):
    table = read_table(write(tmp_path, "t,y,z\n" + rows(["1,2", "2,", "3,4"]) + ",,\n,,\n"))
    assert len(table) == 3
    assert "2 empty rows at the end dropped" in table.notes
    with pytest.raises(FormatError, match="line 1: expected a name for each column, found none for column 3"):
        read_table(write(tmp_path, "t,y,\n" + rows(["1,2", "3,4"])))


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cells", "values", "said"),
    [
        (["1,5", "-2", "1e3"], [1.5, -2, 1000], "decimal commas"),
        (["1.234,5", "12", "-1.234.567,25"], [1234.5, 12, -1234567.25], "`y`: thousands separators, as in '1.234,5'"),
        (["1,234.5", "12", "1,234,567"], [1234.5, 12, 1234567], "`y`: thousands separators, as in '1,234.5'"),
        (["1 234.5", "12", "1 234 567"], [1234.5, 12, 1234567], "`y`: thousands separators, as in '1 234.5'"),
        (["1'234.5", "12", ""], [1234.5, 12, np.nan], '`y`: thousands separators, as in "1\'234.5"'),
    ],
)
def test_decimal_commas_and_thousands_separators(tmp_path, cells, values, said):
    table = read_table(write(tmp_path, "t;y\n" + rows(cells, ";")))
    np.testing.assert_array_equal(table.columns["y"], values)
    assert said in table.notes


def test_a_point_separates_thousands_in_a_file_with_decimal_commas(tmp_path):
    table = read_table(write(tmp_path, "t;y;z\n" + rows(["1,5;1.234", "2,5;10", "3,5;2.345"], ";")))
    assert table.columns["z"].tolist() == [1234, 10, 2345]
    with pytest.raises(FormatError, match=r"line 3: expected a number in column 'z', found '1\.5'"):
        read_table(write(tmp_path, "t;y;z\n" + rows(["1,5;1.234", "2,5;1.5", "3,5;2.345"], ";")))


def test_columns_with_different_decimal_separators_are_refused(tmp_path):
    cells = [f"{n},5;{n % 3}.25" for n in range(9)]
    with pytest.raises(
        FormatError, match=r"line 2: expected the decimal separator ',' in all columns, found '0\.25' in column 'z'"
    ):
        read_table(write(tmp_path, "t;y;z\n" + rows(cells, ";")))
    given = read_table(write(tmp_path, "t;y;z\n" + rows(cells, ";")), categories=["z"])
    assert given.categories["z"].labels == ("0.25", "1.25", "2.25")
    assert read_table(write(tmp_path, "t;y\n" + rows(["0,125", "1,125"], ";"))).columns["y"].tolist() == [0.125, 1.125]


def test_an_ambiguous_comma_is_refused(tmp_path):
    file = write(tmp_path, "t;y\n" + rows(["1,500", "2,500"], ";"))
    with pytest.raises(
        FormatError, match=r"line 2: '1,500' in column y is ambiguous: use `decimal=','` .* or `decimal='.'`"
    ):
        read_table(file)
    assert read_table(file, decimal=",").columns["y"].tolist() == [1.5, 2.5]
    assert read_table(file, decimal=".").columns["y"].tolist() == [1500, 2500]
    file = write(tmp_path, "t,y\n" + rows(['"1,5"', '"2,5"']))
    with pytest.raises(
        FormatError, match=r"line 2: expected a decimal point in column y, found '1,5': use `decimal=','` if"
    ):
        read_table(file)
    assert read_table(file, decimal=",").columns["y"].tolist() == [1.5, 2.5]
    with pytest.raises(
        FormatError, match=r"expected one decimal separator, found '1,5' in column y and '1,234\.5' in column z"
    ):
        read_table(write(tmp_path, "t;y;z\n" + rows(["1,5;1,234.5", "2,5;3"], ";")))
    with pytest.raises(UsageError, match=r"expected \. or , as the decimal separator, got ';'"):
        read_table(file, decimal=";")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["$1.50", "$2.50"],
            r"line 2: expected plain numbers in column 'y', found '\$1\.50': remove currency and percent signs",
        ),
        (["5 %", "7 %"], r"line 2: expected plain numbers in column 'y', found '5 %'"),
        (["1", "inf"], r"line 3: expected finite numbers in column 'y', found 'inf'"),
        (["1", "1e39"], r"line 3: expected a number in float32's range in column 'y', found '1e39'"),
        (["1", "2", "x3"], r"line 4: expected a number in column 'y', found 'x3': leave the column out, or"),
    ],
)
def test_a_cell_that_isn_t_a_number_is_quoted(tmp_path, cells, message):
    with pytest.raises(FormatError, match=rf"a\.csv: {message}"):
        read_table(write(tmp_path, "t,y\n" + rows(cells)))


@pytest.mark.parametrize(
    ("cells", "unit", "numbers"),
    [
        (["76.5 EUR", "1,080.25 EUR", "-3 EUR", "n/a", "free"], ".str.removesuffix(' EUR')", [76.5, 1080.25, -3]),
        (["USD 7", "USD 8.5", "USD -9"], ".str.removeprefix('USD ')", [7, 8.5, -9]),
        (["7°C", "8.5°C"], ".str.removesuffix('°C')", [7, 8.5]),
        (["CHF 1.5 Mio.", "CHF 2 Mio."], ".str.removeprefix('CHF ').str.removesuffix(' Mio.')", [1.5, 2]),
        (["it's 5 o'clock", "it's 6 o'clock"], """.str.removeprefix("it's ").str.removesuffix(" o'clock")""", [5, 6]),
    ],
)
def test_numbers_with_a_unit_say_how_to_remove_it(tmp_path, cells, unit, numbers):
    frame = pd.DataFrame({"price": cells, "y": range(len(cells))})
    path = tmp_path / "a.csv"
    frame.to_csv(path, index=False)
    (said,) = read_table(path).ignored.values()
    begin, how = said.split("; to use its numbers, in pandas ")
    assert begin.endswith(f", such as {cells[0]!r}")
    assert how == f"df['price']{unit}"
    plain = pd.to_numeric(eval(how, {"df": frame}).str.replace(",", ""), errors="coerce").dropna()
    assert plain.tolist() == numbers


@pytest.mark.parametrize("cells", [["ab", "cd"], ["a1b2", "c3"], ["7 m", "8 km", "9 cm"], ["2024-01-01 x", "1/2 x"]])
def test_text_without_one_unit_gets_no_such_advice(tmp_path, cells):
    frame = pd.DataFrame({"t": range(len(cells)), "note": cells})
    assert read_table(frame, time="").ignored["note"].endswith(f"rows, such as {cells[0]!r}")


def test_truth_values_and_names(tmp_path):
    cells = ["True,sun,a1,7,7", "False,rain,b2,7,8", ",sun,c3,8,9", "True,,d4,8,7"]
    table = read_table(write(tmp_path, "t,open,weather,note,road,y\n" + rows(cells)), categories=("road",))
    np.testing.assert_array_equal(table.columns["open"], [1, 0, np.nan, 1])
    assert table.categories["road"].labels == ("7", "8")
    assert table.ignored == {
        "weather": "text with 2 distinct values in 3 rows, such as 'sun'",
        "note": "text with 4 distinct values in 4 rows, such as 'a1'",
    }
    table = read_table(write(tmp_path, "t,weather,y\n" + rows(["sun,1", "rain,2", ",3", "sun,4", "rain,5"])))
    np.testing.assert_array_equal(table.categories["weather"].codes, [1, 0, -1, 1, 0])
    assert table.categories["weather"].labels == ("rain", "sun")
    short = read_table(write(tmp_path, "t,weather,y\n" + rows(["fog,1", "sun,2"])), **table.reading)
    assert short.categories["weather"].labels == ("fog", "sun")  # few rows, but a category according to `reading`


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_as_text_in_a_frame():
    table = read_table(pd.DataFrame({"t": days(3), "y": ["1,5", "2,25", None], "z": ["7", "8", "9"]}))
    np.testing.assert_array_equal(table.columns["y"], [1.5, 2.25, np.nan])
    np.testing.assert_array_equal(table.columns["z"], [7, 8, 9])
    with pytest.raises(FormatError, match=r"a data frame: row 1: expected finite numbers in column 'y', found '-inf'"):
        read_table(pd.DataFrame({"t": days(3), "y": [1.0, -np.inf, 2.0]}))


def test_frames_of_pandas_and_polars_and_parquet(tmp_path):
    frame = pd.DataFrame({"time": days(6), "y": [1.5, 2, None, 4, 5, 6], "kind": pd.Categorical(list("abbaba"))})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.set_index("time").to_parquet(tmp_path / "b.parquet")
    polars = pl.DataFrame({"time": days(6).to_numpy(), "y": [1.5, 2, None, 4, 5, 6], "kind": list("abbaba")})
    sources = [
        frame,
        frame.set_index("time"),
        frame.convert_dtypes(),
        polars,
        polars.lazy(),
        tmp_path / "a.parquet",
        tmp_path / "b.parquet",
    ]
    for source in sources:
        table = read_table(source)
        np.testing.assert_array_equal(table.times, days(6).to_numpy())
        np.testing.assert_array_equal(table.columns["y"], [1.5, 2, np.nan, 4, 5, 6])
        np.testing.assert_array_equal(table.categories["kind"].codes, [0, 1, 1, 0, 1, 0])
        assert (table.date, table.ids) == ("time", ("",))
    assert read_table(frame.set_index("time")["y"]).path == "a data frame"
    with pytest.raises(FormatError, match=r"c\.parquet: expected a Parquet file"):
        read_table(write(tmp_path, "time,y\n", name="c.parquet"))
    with pytest.raises(UsageError, match="expected a path, or a pandas or polars frame, got list"):
        read_table([1, 2])


def test_indices_and_names_of_frames():
    frame = pd.DataFrame({"y": range(6)}, index=days(6).to_period("D"))
    np.testing.assert_array_equal(read_table(frame).times, days(6).to_numpy())
    index = pd.MultiIndex.from_product([["b", "a"], days(3)], names=["shop", None])
    table = read_table(pd.DataFrame({"y": range(6)}, index=index))
    assert (table.ids, table.id, table.starts.tolist()) == (("b", "a"), "shop", [0, 3, 6])
    assert table.notes[0] == "series by `shop`, from the frame's index"
    both = pd.DataFrame(np.ones((3, 2)), columns=pd.MultiIndex.from_tuples([("y", "mean"), ("y", "max")]))
    with pytest.raises(FormatError, match=re.escape("expected one name per column, found ('y', 'mean')")):
        read_table(both)
    with pytest.raises(FormatError, match=r"a data frame: expected distinct names, found 'y' 2 times \(columns 1, 2\)"):
        read_table(pd.DataFrame(np.ones((3, 2)), columns=["y", "y"]))
    with pytest.raises(FormatError, match=r"a data frame: row 1: expected a date in column time, found 'NaT'"):
        read_table(pd.DataFrame({"time": [days(1)[0], pd.NaT, days(3)[2]], "y": range(3)}))


def test_kinds_of_columns_that_aren_t_numeric():
    frame = pd.DataFrame({"y": range(4), "wait": pd.to_timedelta(range(4), "s"), "z": [1j] * 4, "l": [[1]] * 4})
    frame["since"] = frame["until"] = days(4)
    table = read_table(frame, time="")
    assert list(table.columns) == ["y"]
    assert table.ignored["wait"] == "durations: convert them to numbers, for example with .dt.total_seconds()"
    assert table.ignored["z"] == "complex numbers"
    assert table.ignored["l"] == "objects of list"
    assert table.ignored["since"] == "dates in addition to those of the rows"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def panel():
    """Shop b of 10 days with one left out, and a of 5 that begin later; rows in no order."""
    frame = pd.DataFrame({"day": [*days(10), *days(5, "2023-01-04")], "shop": [*"b" * 10, *"a" * 5], "y": range(15)})
    frame["weather"] = np.where(frame.y % 2, "sun", "rain")
    return frame.drop(index=[6, 7]).sample(frac=1, random_state=1).sort_values("shop", ascending=False, kind="stable")


def test_several_series_with_gaps_and_starts_of_their_own(tmp_path):
    table = read_table(panel(), id="shop")
    assert (table.ids, table.id, table.starts.tolist()) == (("b", "a"), "shop", [0, 10, 15])
    np.testing.assert_array_equal(table.columns["y"], [0, 1, 2, 3, 4, 5, np.nan, np.nan, 8, 9, 10, 11, 12, 13, 14])
    np.testing.assert_array_equal(table.categories["weather"].codes[:9], [0, 1, 0, 1, 0, 1, -1, -1, 0])
    np.testing.assert_array_equal(table.times[table.rows(1)], days(5, "2023-01-04").to_numpy())
    assert (table.filled.gaps.tolist(), table.filled.rows.tolist()) == ([1, 0], [2, 0])
    assert (table.date_after(1, 0), table.date_after(2, 1)) == ("2023-01-11", "2023-01-10")
    assert table.understood() == [
        "13 rows of 2 series by `shop` (5 to 10 steps each), daily from 2023-01-01 to 2023-01-10 by `day`",
        "1 gap filled with masked rows (2 rows)",
        "rows sorted by time",
        "`weather` as 2 categories",
    ]


def test_ids_of_numbers_and_of_several_columns(tmp_path):
    text = "t,shop,item,y\n" + "".join(
        f"{day:%Y-%m-%d},{a},0{b},1\n" for a in (1, 2) for b in (1, 2) for day in days(3)
    )
    table = read_table(write(tmp_path, text), id=("shop", "item"))
    assert (table.ids, table.id) == (("1/01", "1/02", "2/01", "2/02"), "shop,item")
    with pytest.raises(
        FormatError,
        match=r"line 5: expected each time only once, .*: use `id=\['shop', 'item'\]`, if that identifies",
    ):
        read_table(
            write(
                tmp_path, text.replace(",1,", ",x,").replace(",2,", ",z,").replace(",01,", ",i,").replace(",02,", ",j,")
            )
        )
    frame = pd.DataFrame({"t": [*days(2), *days(2)], "shop": [7.0, 7.0, 8.0, 8.0], "y": range(4)})
    assert read_table(frame, id="shop").ids == ("7", "8")
    with pytest.raises(UsageError, match="expected a column 'store', found t, shop, item, y"):
        read_table(write(tmp_path, text), id="store")
    with pytest.raises(FormatError, match="line 2: expected a series name in column shop, found ''"):
        read_table(write(tmp_path, text.replace(",1,01,", ",,01,", 1)), id="shop")


def test_times_that_stand_twice(tmp_path):
    file = write(tmp_path, "t,shop,y\n" + "".join(f"{day:%Y-%m-%d},{shop},1\n" for day in days(4) for shop in "ab"))
    with pytest.raises(
        FormatError,
        match=r"line 3: .* found '2023-01-01' in column t again, as in line 2: use `id='shop'`, if",
    ):
        read_table(file)
    same = rows([1, 2, 3]) + rows([1, 2])
    table = read_table(write(tmp_path, "t,y\n" + same))
    assert table.columns["y"].tolist() == [1, 2, 3]
    assert "2 duplicate rows dropped" in table.notes
    with pytest.raises(FormatError, match=r"line 6: .* again, as in line 3: .*keep one row, or their mean"):
        read_table(write(tmp_path, "t,y\n" + same.replace("02,2\n", "02,9\n", 1)))
    with pytest.raises(FormatError, match=r"use `id=…` for the column that identifies series, or `time=…`"):
        read_table(pd.DataFrame({"t": [*days(9), *days(9)], "y": range(18)}))
    with pytest.raises(FormatError, match=r"line 7: expected a number in column 'y', found 'x'"):  # lines stay right
        read_table(write(tmp_path, "t,y\n" + same + "2023-01-04,x\n2023-01-05,2\n"))


def test_weekdays(tmp_path):
    workdays = pd.bdate_range("2023-01-02", periods=30).delete([4, 12])
    table = read_table(pd.DataFrame({"t": workdays, "y": range(28)}))
    assert (str(table.spacing), table.spacing.seasons, len(table)) == ("every weekday", (5, 261), 30)
    assert table.filled.rows.tolist() == [2]
    np.testing.assert_array_equal(table.times, pd.bdate_range("2023-01-02", periods=30).to_numpy())
    assert table.date_after(1) == "2023-02-13"
    week = read_table(pd.DataFrame({"t": workdays[:9], "y": range(9)}))  # too short to distinguish a weekend from a gap
    assert str(week.spacing) == "daily"
    assert str(read_table(pd.DataFrame({"t": workdays[:9], "y": range(9)}), freq="B").spacing) == "every weekday"


@pytest.mark.parametrize(
    ("freq", "start", "said", "alias"),
    [
        ("ME", "2020-01-31", "monthly", "1ME"),
        ("MS", "2020-01-01", "monthly", "1MS"),
        ("QE", "2020-03-31", "quarterly", "3ME"),
        ("YE", "2020-12-31", "yearly", "12ME"),
        ("2MS", "2020-01-01", "every 2 months", "2MS"),
        ("W-SAT", "2020-01-04", "weekly", "7D"),
        ("10min", "2020-01-01", "every 10 minutes", "10min"),
        ("250ms", "2020-01-01", "every 0.25 seconds", "250000us"),
    ],
)
def test_spacings_go_on_and_are_read_again(freq, start, said, alias):
    times = pd.date_range(start, periods=40, freq=freq)
    table = read_table(pd.DataFrame({"t": times[:30].delete([7, 8]), "y": range(28)}))
    assert (str(table.spacing), table.spacing.alias, len(table)) == (said, alias, 30)
    np.testing.assert_array_equal(table.times, times[:30].to_numpy())
    np.testing.assert_array_equal(table.times_after(10), times[30:].to_numpy())
    again = read_table(pd.DataFrame({"t": times[[0, 3]], "y": [1, 2]}), **table.reading)
    assert (again.spacing, len(again)) == (table.spacing, 4)


def test_seasons():
    assert Spacing(seconds=1800).seasons == (48, 336)
    assert Spacing(seconds=86_400).seasons == (7, 365)
    assert (Spacing(months=1).season, Spacing(months=12).season, Spacing(seconds=7 * 86_400).season) == (12, 1, 52)
    assert Spacing(seconds=660).season == 1  # neither a day nor a week is a whole number of these


def test_rows_that_are_not_even(tmp_path):
    text = "t,y\n" + rows([1, 2, 3]) + "2023-01-04 07:30,4\n2023-01-05,5\n"
    mean = "df = df.groupby([pd.Grouper(key='t', freq='{}')]).mean(numeric_only=True).reset_index()"
    remedy = re.escape(
        f"average them, in pandas df['t'] = pd.to_datetime(df['t'], format='ISO8601'); {mean.format('1D')}"
    )
    with pytest.raises(FormatError, match=rf"line 5: .* \(daily\), found '2023-01-04 07:30', .*: {remedy}"):
        read_table(write(tmp_path, text))
    thirtieth = [pd.Timestamp(2022, month, 28 if month == 2 else 30) for month in range(1, 13)]
    with pytest.raises(FormatError, match=re.escape(f"in pandas {mean.format('1MS')}")):
        read_table(pd.DataFrame({"t": thirtieth, "y": range(12)}))
    weekly = pd.DataFrame({"t": [*days(30), *days(9, freq="7D")], "id": [*"a" * 30, *"b" * 9], "y": range(39)})
    with pytest.raises(
        FormatError, match=r"row 30: expected the same spacing in all series \(daily\), .* 7 times as long"
    ):
        read_table(weekly, id="id")
    with pytest.raises(FormatError, match="the spacing can't be inferred from one row per series: use `freq=…`"):
        read_table(weekly.iloc[[0, 30]], id="id")
    with pytest.raises(UsageError, match="expected a spacing such as h, 30min, D, B or MS, got 'often'"):
        read_table(weekly, id="id", freq="often")


def even(seconds, count, form=None):
    times = pd.date_range("2024-01-01", periods=count, freq=f"{seconds}s")
    if form == "excel":
        return 45292 + seconds * np.arange(count) / 86_400
    if form in ("s", "ms"):
        return times.astype(f"datetime64[{form}]").astype("int64")
    return times if form is None else times.strftime(form)


@pytest.mark.parametrize(
    ("steps", "form", "ids", "spacing"),
    [
        ((1800, 3600), None, ["shop"], "hourly"),  # a multiple
        ((3600, 1800), "%Y-%m-%d %H:%M", ["shop"], "hourly"),
        ((600, 900), "%d.%m.%Y %H:%M", ["shop"], "every 15 minutes"),
        ((600, 900, 600), "%Y-%m-%dT%H:%M:%S+01:00", ["shop"], "every 15 minutes"),
        ((86_400, 7 * 86_400), "%Y-%m-%d", ["shop", "item"], "weekly"),
        ((3600, 7200), "ms", ["shop"], "every 2 hours"),
        ((3600, 7200), "excel", ["shop"], "every 2 hours"),
        ((3600, 5400), "index", ["shop"], "every 90 minutes"),
    ],
)
def test_series_of_different_spacing_say_how_to_bring_them_to_one(tmp_path, steps, form, ids, spacing):
    parts = []
    for n, step in enumerate(steps):
        part = pd.DataFrame({"date": even(step, 60 + n, None if form == "index" else form), "shop": f"s{n}"})
        part["item"], part["sales"] = f"i{n}", np.arange(len(part)) * step / 3600
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    how = {"id": ids, "time": "date"} | ({"date_format": form} if form in ("ms", "excel") else {})
    path = tmp_path / "a.csv"
    frame.to_csv(path, index=False)
    if form == "index":
        frame = frame.set_index("date")
    source = path if form not in (None, "index") else frame
    with pytest.raises(FormatError, match="train separately on series of each spacing, or average them") as caught:
        read_table(source, **how)
    names = {"df": pd.read_csv(path) if source is path else frame, "pd": pd}
    exec(str(caught.value).rpartition("in pandas ")[2], names)
    table = read_table(names["df"], id=ids, time="date")
    assert (str(table.spacing), len(table.ids), int(table.filled.rows.sum())) == (spacing, len(steps), 0)
    coarse = int(np.argmax(steps))  # whose values stay as they are
    values = table.columns["sales"][table.rows(coarse)]
    np.testing.assert_array_equal(values, np.arange(60 + coarse) * max(steps) / 3600)


def test_dates_in_several_columns_say_to_join_them_before_they_are_averaged():
    hours = [*range(0, 24, 2), *range(1, 24, 4)]
    frame = pd.DataFrame({"day": "2024-01-01", "hour": hours, "id": [*"a" * 12, *"b" * 6], "y": range(18)})
    with pytest.raises(FormatError, match=r"with the dates of day,hour in one column, 'date': .*key='date', freq='4h'"):
        read_table(frame, id="id", time=["day", "hour"])


@pytest.mark.long
def test_tables_are_read_without_torch_and_pandas_comes_with_the_first(tmp_path):
    file = write(tmp_path, "t,y\n" + rows([1, 2]))
    code = (
        "import sys; from cellstack.train import read_table; print('pandas' in sys.modules); "
        "read_table(sys.argv[1]); print('pandas' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_the_description_of_a_table(tmp_path):
    frame = pd.DataFrame({"time": days(400, freq="h"), "rentals": np.arange(400.0), "c": 5, "e": np.nan})
    frame["weather"], frame["note"] = np.where(frame.rentals % 3, "sun", "rain"), [f"n{n}" for n in range(400)]
    frame.loc[7, "rentals"] = np.nan
    frame.drop(index=[*range(20, 40), 100]).to_csv(tmp_path / "a.csv", index=False)
    table = read_table(tmp_path / "a.csv")
    assert table.understood() == [
        "379 rows, hourly from 2023-01-01 00:00 to 2023-01-17 15:00 by `time`",
        "2 gaps filled with masked rows (21 rows)",
        "missing values in `rentals` (1)",
        "`weather` as 2 categories",
        "constant or empty, not used: `c` (always 5), `e` (no value)",
        "ignored: `note` (text with 379 distinct values in 379 rows, such as 'n0')",
    ]
    many = pd.DataFrame({f"x{n}": ["a"] * 4 for n in range(30)} | {"y": range(4)})
    assert read_table(many).understood()[1].endswith("`x7` (always 'a') and 22 more")


def test_the_options_of_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    add_table_options(parser)
    file = write(
        tmp_path, "a;b;c;kind;y\n" + "".join(f"01.{month:02}.2022;7;1;{month};1,250\n" for month in range(1, 13))
    )
    words = ["--time", "a", "--day-first", "--id", "b,c", "--decimal", ",", "--categories", "kind", "--zone", "UTC"]
    table = read_table(str(file), **given_options(parser.parse_args(words), READING))
    assert (table.ids, str(table.spacing), table.columns["y"][0], table.zone) == (("7/1",), "monthly", 1.25, "UTC")
    assert isinstance(table.categories["kind"], CategoryColumn)
    again = read_table(str(file), **merged(table.reading, given_options(parser.parse_args([]), READING)))
    np.testing.assert_array_equal(again.times, table.times)
    words = ["--month-first", "--freq", "D"]
    other = read_table(str(file), **merged(table.reading, given_options(parser.parse_args(words), READING)))
    assert str(other.times[-1]) == "2022-01-12T00:00:00"
    with pytest.raises(SystemExit):
        parser.parse_args(["--day-first", "--month-first"])


@pytest.mark.slow
def test_a_million_rows_of_a_thousand_series(tmp_path, rng):
    hours = days(1000, freq="h")
    frame = pd.DataFrame({"time": np.tile(hours, 1000), "shop": np.repeat([f"s{n}" for n in range(1000)], 1000)})
    frame["y"] = rng.normal(size=10**6)
    frame.to_csv(tmp_path / "a.csv", index=False)
    start = time.process_time()
    table = read_table(tmp_path / "a.csv", id="shop")
    took = time.process_time() - start
    assert (len(table), len(table.ids)) == (10**6, 1000)
    assert took < 60, f"{took:.1f} s"  # 4 s on an idle machine
