"""Plots of forecasts, of the test part, and of each network's training."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cellstack.train import history, read_table
from cellstack.train.checks import UsageError
from cellstack.train.forecasting.backtest import Backtest
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.predict import times
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.training import Trained
from cellstack.train.forecasting.windows import Windows

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def forecasts(origins, horizon=4, targets=("y",), shops=("a", "b"), dates=True, quantiles=LEVELS):
    """Forecasts that are the row number of each step, of 60 rows per series whose values are twice the row number."""
    parts = []
    for shop in shops:
        frame = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=60), "shop": shop})
        parts.append(frame.assign(**{name: 2.0 * np.arange(60) for name in targets}))
    frame = pd.concat(parts).drop(columns=[] if dates else ["day"])
    table = read_table(frame, id="shop", time=None if dates else "")
    recipe = Recipe(targets, horizon, 16, quantiles=quantiles)
    windows = Windows(recipe, table, np.array(origins))
    ahead = windows.origins[:, None] + np.arange(1, horizon + 1)
    spread = np.array(quantiles) - 0.5
    values = np.broadcast_to(ahead[:, :, None, None] + spread, (*ahead.shape, len(targets), len(quantiles)))
    ids = [table.ids[n] for n in windows.series]
    return Forecasts(recipe, table, ids, windows.origins, times(windows), values, values[..., 0])


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_history_forecast_intervals_and_what_the_table_has_after_the_origin():
    (axis,) = forecasts([49]).plot(history=10).axes
    found = lines(axis)
    assert list(found) == ["history", "actual", "forecast"]
    np.testing.assert_array_equal(found["history"].get_ydata(), 2.0 * np.arange(40, 50))
    np.testing.assert_array_equal(found["actual"].get_ydata(), 2.0 * np.arange(49, 54))  # from the end of the history
    np.testing.assert_array_equal(found["forecast"].get_ydata(), [98, *range(50, 54)])
    assert found["forecast"].get_xdata()[1] == np.datetime64("2024-02-20")
    assert found["forecast"].get_xdata()[0] == found["actual"].get_xdata()[0] == found["history"].get_xdata()[-1]
    assert found["forecast"].get_markevery() == slice(1, None)  # the row of the history isn't a forecast
    assert [area.get_label() for area in axis.collections] == ["90% interval", "50% interval"]
    for area, spread in zip(axis.collections, (0.45, 0.25), strict=True):
        (path,) = area.get_paths()
        begin = path.vertices[path.vertices[:, 0] == path.vertices[:, 0].min()]
        assert set(begin[:, 1]) == {98}  # a point: the last value of the history
        following = path.vertices[path.vertices[:, 0] == begin[0, 0] + 1]
        assert {following[:, 1].min(), following[:, 1].max()} == {50 - spread, 50 + spread}
    assert (axis.get_title("left"), axis.get_ylabel()) == ("a, y", "y")


def test_a_forecast_after_missing_values_begins_at_the_last_one_that_is_known():
    one = forecasts([49])
    one.table.columns["y"][46:50] = np.nan
    (axis,) = one.plot(history=10).axes
    found = lines(axis)
    for name in ("forecast", "actual"):
        assert (found[name].get_xdata()[0], found[name].get_ydata()[0]) == (np.datetime64("2024-02-15"), 90)
    assert not np.isnan(found["forecast"].get_ydata()).any()
    for area in axis.collections:
        assert area.get_paths()[0].vertices[:, 0].min() == found["forecast"].get_xdata(orig=False)[0]
    one.table.columns["y"][:50] = np.nan
    (axis,) = one.plot(history=10).axes
    np.testing.assert_array_equal(lines(axis)["forecast"].get_ydata(), range(50, 54))


def test_after_the_last_row_there_is_only_the_forecast():
    (axis,) = forecasts([59]).plot().axes
    assert list(lines(axis)) == ["history", "forecast"]
    assert len(lines(axis)["history"].get_ydata()) == 16


def test_a_panel_for_each_series_and_target():
    figure = forecasts([59, 119], targets=("y", "z")).plot()
    assert [axis.get_title("left") for axis in figure.axes] == ["a, y", "a, z", "b, y", "b, z"]
    assert [axis.get_legend() is not None for axis in figure.axes] == [True, False, False, False]
    figure = forecasts([59, 119], targets=("y", "z")).plot(-1)
    assert [axis.get_title("left") for axis in figure.axes] == ["b, y", "b, z"]
    np.testing.assert_array_equal(lines(figure.axes[0])["history"].get_ydata(), 2.0 * np.arange(44, 60))


def test_names_are_not_read_as_math():
    one = forecasts([59], targets=("in $, not $_x",), shops=("$^", "b"))
    assert one.plot().axes[0].get_title("left") == "$^, in $, not $_x"
    assert one._repr_png_().startswith(b"\x89PNG")


def test_many_forecasts_are_six_panels():
    figure = forecasts(list(range(20, 50))).plot()
    assert [lines(axis)["forecast"].get_ydata()[1] for axis in figure.axes] == [21, 26, 32, 38, 44, 50]


def test_without_dates_rows_are_counted_from_1_in_each_series():
    (axis,) = forecasts([109], dates=False).plot().axes
    assert axis.get_xlabel() == "row"
    np.testing.assert_array_equal(lines(axis)["forecast"].get_xdata(), [50, 51, 52, 53, 54])
    np.testing.assert_array_equal(lines(axis)["actual"].get_xdata(), [50, 51, 52, 53, 54])


def test_one_step_and_one_quantile():
    (axis,) = forecasts([49], horizon=1).plot().axes
    np.testing.assert_allclose(axis.collections[0].get_datalim(axis.transData).intervaly, [49.55, 98])
    (axis,) = forecasts([49], horizon=1).plot(history=0).axes
    np.testing.assert_allclose(axis.collections[0].get_segments()[0][:, 1], [49.55, 50.45])
    (axis,) = forecasts([49], quantiles=(0.5,)).plot().axes
    assert not axis.collections
    (axis,) = forecasts([49], quantiles=(0.1, 0.5)).plot().axes
    assert axis.collections[0].get_label() == "quantiles 0.1 to 0.5"


@pytest.mark.parametrize(
    ("which", "history", "message"),
    [
        (2, None, "expected which forecasts as numbers below 2, got 2"),
        ([0, -3], None, "expected which forecasts as numbers below 2"),
        ([], None, "expected which forecasts as numbers below 2"),
        ("a", None, "expected which forecasts as numbers below 2, got 'a'"),
        (0, -1, "expected history as a number of steps, got -1"),
        (0, 2.5, "expected history as a number of steps, got 2.5"),
    ],
)
def test_forecasts_that_don_t_exist_are_refused(which, history, message):
    with pytest.raises(UsageError, match=message):
        forecasts([59, 119]).plot(which, history=history)


def test_a_notebook_shows_the_plot_and_a_terminal_the_first_steps(monkeypatch):
    one = forecasts([59, 119])
    assert one._repr_png_().startswith(b"\x89PNG")
    assert repr(one).splitlines() == [
        "Forecasts of y: 4 steps from each of 2 origins, 2024-03-01 to 2024-03-04; median (90% interval)",
        *("  a, 2024-03-01: 60 (59.55 to 60.45)", "  a, 2024-03-02: 61 (60.55 to 61.45)"),
        *("  a, 2024-03-03: 62 (61.55 to 62.45)", "  a, 2024-03-04: 63 (62.55 to 63.45)"),
        *("  b, 2024-03-01: 120 (119.5 to 120.5)", "  … 8 rows, see to_frame()"),
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert one._repr_png_() is None
    with pytest.raises(UsageError, match=r"a plot needs matplotlib: pip install 'cellstack\[torch\]'"):
        one.plot()
    with pytest.raises(UsageError, match="a plot needs matplotlib"):
        history.check("a.png", history.PICTURES, "--picture")


def over_new_year(freq, rows, horizon, end):
    """A forecast whose last step is at `end`."""
    times_ = pd.date_range(end=end, periods=rows, freq=freq)
    table = read_table(pd.DataFrame({"time": times_, "y": np.arange(rows) % 7.0}))
    recipe = Recipe(("y",), horizon, 16)
    windows = Windows(recipe, table, np.array([rows - 1 - horizon]))
    values = np.zeros((1, horizon, 1, 3))
    return Forecasts(recipe, table, [""], windows.origins, times(windows), values, values[..., 0])


@pytest.mark.parametrize(
    ("freq", "horizon", "end", "labels"),
    [
        ("D", 14, "2025-01-07", ["1 Dec\n2024", "8 Dec", "15 Dec", "22 Dec", "1 Jan\n2025", "8 Jan"]),
        ("h", 24, "2024-12-31T05", ["29 Dec\n2024", "30 Dec", "31 Dec"]),
        (
            "15min",
            24,
            "2025-01-01T04:30",
            ["12:00\n31 Dec 2024", "15:00", "18:00", "21:00", "00:00\n1 Jan 2025", "03:00"],
        ),
        ("W", 10, "2025-02-09", ["Aug\n2024", "Sep", "Oct", "Nov", "Dec", "Jan\n2025", "Feb"]),
        ("MS", 12, "2025-05-01", ["2023", "2024", "2025"]),
    ],
)
def test_the_labels_of_dates_are_right_over_the_end_of_a_year(freq, horizon, end, labels):
    figure = over_new_year(freq, 120, horizon, end).plot()
    figure.canvas.draw()
    (axis,) = figure.axes
    shown = [tick.get_text() for tick in axis.get_xticklabels() if tick.get_text()]
    assert shown == labels
    found = lines(axis)
    assert found["actual"].get_zorder() > found["forecast"].get_zorder()


def test_the_text_names_each_target_and_the_scores():
    lines = repr(forecasts([49], horizon=1, targets=("y", "z"), shops=("a",), dates=False, quantiles=(0.5,)))
    assert lines.splitlines() == [
        "Forecasts of y, z: 1 step",
        "  a, step 1: y 50, z 50",
        *("  compared with the later rows, y: mae 50, rmse 50", "  compared with the later rows, z: mae 50, rmse 50"),
    ]


def test_forecasts_are_compared_with_the_later_rows_of_the_table():
    one = forecasts([57, 117])  # two of four steps are in the table
    np.testing.assert_array_equal(one.actual[0, :, 0], [116, 118, np.nan, np.nan])
    columns = one.columns()
    assert list(columns)[:5] == ["shop", "origin", "day", "y_actual", "y"]
    np.testing.assert_array_equal(columns["y_actual"][:4], [116, 118, np.nan, np.nan])
    errors = np.array([116 - 58, 118 - 59, 116 - 118, 118 - 119])  # rows 58, 59 and, of series b, 118, 119
    assert one.scores == {
        "y": {
            "mae": np.abs(errors).mean(),
            "rmse": pytest.approx(np.sqrt(np.square(errors).mean())),
            "coverage": 0.0,
        }
    }
    assert one.to_frame()["y_actual"].notna().sum() == 4
    last = forecasts([59, 119])
    assert last.scores == {}
    assert "y_actual" not in last.columns()
    assert "origin" not in last.columns()
    one.table.columns["y"][58] = 58.0
    assert one.scores["y"]["coverage"] == 0.25


def backtest():
    """A test of both series, with baselines that are 1, 2 … too high, and two values that aren't compared."""
    found = forecasts([*range(30, 56), *range(90, 116)])
    actual = found.median.copy()
    actual[..., 1:, :] -= 0.5
    actual[3, 2] = np.nan
    baselines = {f"rule {n}": found.median + n for n in (5, 1, 4, 2, 3)}
    baselines["rule 1"][4, 3] = np.nan
    series = np.repeat([0, 1], 26)
    return Backtest(found, actual, baselines, np.ones((2, 1)), series)


def test_the_test_part_is_drawn_with_forecasts_that_don_t_overlap():
    first, last, _ = backtest().plot().axes
    assert [axis.get_title("left") for axis in (first, last)] == [
        "end of the test part: a, y",
        "end of the test part: b, y",
    ]
    pieces = [line.get_ydata() for line in first.get_lines() if line.get_label() != "actual"]
    assert [piece[0] for piece in pieces] == [32, 36, 40, 44, 48, 52, 56]
    np.testing.assert_array_equal(lines(first)["actual"].get_ydata(), 2.0 * np.arange(32, 60))
    assert sum(label == "forecast" for label in (line.get_label() for line in first.get_lines())) == 1


def test_the_error_by_horizon_is_compared_with_the_four_best_baselines():
    test = backtest()
    axis = test.plot().axes[-1]
    found = lines(axis)
    assert list(found) == ["this model", "rule 1", "rule 2", "rule 3", "rule 4"]
    np.testing.assert_allclose(found["this model"].get_ydata(), [0, 0.5, 0.5, 0.5])
    axis.figure.canvas.draw()
    legend = axis.get_legend().get_window_extent().transformed(axis.transData.inverted())
    assert legend.y0 > max(line.get_ydata().max() for line in found.values())
    np.testing.assert_allclose(found["rule 2"].get_ydata(), [2, 2.5, 2.5, 2.5])
    assert test.scores["targets"]["y"]["model"]["mae"] == pytest.approx(154 * 0.5 / 206)


def test_steps_without_actual_values_have_no_error():
    test = backtest()
    test.actual[:, 2] = np.nan
    drawn = lines(test.plot().axes[-1])["this model"].get_ydata()
    assert np.isnan(drawn).tolist() == [False, False, True, False]


MEMBERS = [
    {"member": member, "whole": whole, "epoch": epoch, "lr": 0.1, "loss": 1.0 / epoch + member}
    | ({} if whole else {"validation_loss": 2.0 + abs(epoch - member), "mase": 0.5 * member})
    for whole in (False, True)
    for member in (1, 2)
    for epoch in (1, 2, 3)
]


def test_each_network_has_its_own_curves():
    figure = history.panels(history.curves(MEMBERS))
    losses, mase = figure.axes
    assert (losses.get_ylabel(), mase.get_ylabel()) == ("loss", "validation MASE")
    assert losses.get_xticks().tolist() == [1, 2, 3]
    curves = [(line.get_color(), line.get_linestyle(), line.get_xdata()) for line in losses.get_lines()]
    assert [len(x) for *_, x in curves] == [3, 3, 1, 3, 3, 1, 3, 3]  # loss, validation loss, kept epoch; with all rows
    assert len({color for color, *_ in curves}) == 2
    assert [x[0] for *_, x in curves if len(x) == 1] == [1, 2]
    np.testing.assert_array_equal(losses.get_lines()[3].get_ydata(), [3.0, 2.5, 1.0 / 3 + 2])
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        *(
            "network 1",
            "network 2",
            "training loss",
            "validation loss",
            "kept epoch",
            "training loss, with the validation part",
        )
    ]
    assert len(mase.get_lines()) == 2


@pytest.mark.parametrize(("epochs", "ticks"), [(1, [1]), (12, [1, 5, 10]), (60, [1, 10, 20, 30, 40, 50, 60])])
def test_epochs_are_counted_from_1(epochs, ticks):
    entries = [{"epoch": n + 1, "lr": 0.1, "loss": 1.0} for n in range(epochs)]
    (axis,) = history.panels(history.curves(entries)).axes
    assert axis.get_xticks().tolist() == ticks


def test_a_training_is_drawn_with_its_test_part_if_there_is_one():
    result = SimpleNamespace(history=MEMBERS)
    assert len(Trained(result, None, backtest(), []).plot().axes) == 5
    assert len(Trained(result, None, None, []).plot().axes) == 2
