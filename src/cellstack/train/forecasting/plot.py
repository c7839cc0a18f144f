"""Plots of forecasts: the history, the median, the intervals and the actual values; and the error by horizon.

Needs no torch. matplotlib is imported at the first plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.forecasting.forecasts import Forecasts, interval
from cellstack.train.forecasting.parts import spread_out
from cellstack.train.history import COLORS, Panel, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.train.forecasting.backtest import Backtest

Ints = NDArray[np.int64]
ACTUAL, FORECAST, BASELINES = "#3c3c3a", COLORS[0], COLORS[1:]
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "parse_math": False}  # names may contain $
MOST = 6  # panels of forecasts
PIECES = 8  # forecasts in a panel of the test part
SHORTEST = 16  # steps of the history
FEW_POINTS = 100  # in a panel; up to here, points are marked


def plot(forecasts: Forecasts, which: int | Sequence[int] | None, history: int | None) -> Figure:
    """Return a figure of forecasts: see `Forecasts.plot`."""
    count, recipe = len(forecasts.origins), forecasts.recipe
    chosen = spread_out(np.arange(count), MOST) if which is None else np.atleast_1d(np.asarray(which))
    if chosen.dtype.kind not in "iu" or not ((chosen >= -count) & (chosen < count)).all() or not chosen.size:
        raise UsageError(f"plot: expected which forecasts as numbers below {count}, got {which!r:.80}")
    if history is None:
        history = max(SHORTEST, 2 * recipe.horizon, min(recipe.window, 6 * recipe.horizon))
    elif not isinstance(history, (int, np.integer)) or isinstance(history, bool) or history < 0:
        raise UsageError(f"plot: expected history as a number of steps, got {history!r}")
    targets = range(len(recipe.targets))
    drawn = [
        partial(_series, forecasts=forecasts, at=np.array([n]), target=target, history=int(history))
        for n in chosen % count
        for target in targets
    ]
    drawn[0].keywords["legend"] = True
    return panels(drawn, columns=len(targets) if 1 < len(targets) <= 3 else 1 if len(drawn) <= 3 else 2)


def backtest_panels(test: Backtest) -> list[Panel]:
    """Return, for each target, functions that draw the test part with forecasts, and the error by horizon."""
    found: list[Panel] = []
    for n in range(len(test.forecasts.recipe.targets)):
        look = {"target": n, "title": "end of the test part: ", "legend": True}
        found += [
            partial(_series, forecasts=test.forecasts, at=_apart(test, series), **look)
            for series in spread_out(np.unique(test.series), 2)
        ]
        found.append(partial(_by_horizon, test=test, target=n))
    return found


def _apart(test: Backtest, series: int) -> Ints:
    """Return the last forecasts of a series that don't overlap, at most `PIECES`, in order of time."""
    every = np.flatnonzero(test.series == series)
    found: list[int] = []
    for n in every[np.argsort(-test.forecasts.origins[every])]:
        if not found or test.forecasts.origins[n] + test.forecasts.recipe.horizon <= test.forecasts.origins[found[-1]]:
            found.append(int(n))
    return np.array(found[:PIECES][::-1])


def _series(
    axis: Any, forecasts: Forecasts, at: Ints, target: int, *, history: int = 0, title: str = "", legend: bool = False
) -> None:
    """Draw forecasts `at` of one series, the actual values, and `history` rows before the first origin."""
    table, recipe = forecasts.table, forecasts.recipe
    name = recipe.targets[target]
    rows = table.rows(int(np.searchsorted(table.starts, forecasts.origins[at[0]], side="right")) - 1)
    first, last = forecasts.origins[at[0]], forecasts.origins[at[-1]]
    past = np.arange(max(rows.start, first + 1 - history), first + 1)
    times = np.arange(len(table)) - rows.start + 1 if table.times is None else table.times
    values = table.columns[name]
    end = past[~np.isnan(values[past])][-1:]  # lines and intervals begin at the last value of the history
    joined = len(end)
    later = np.append(end, np.arange(first + 1, min(rows.stop, last + 1 + recipe.horizon)))
    marker = "." if len(past) + len(later) + recipe.horizon <= FEW_POINTS else ""
    if len(past):
        axis.plot(times[past], values[past], color=ACTUAL, linewidth=1.2, label="history")
    if not np.isnan(values[later[joined:]]).all():
        look = {"linestyle": (0, (2, 1)), "marker": marker} if len(past) else {}
        axis.plot(times[later], values[later], color=ACTUAL, linewidth=1.2, label="actual", zorder=3, **look)
    for n in at:
        ahead = forecasts.origins[n] + np.arange(1, recipe.horizon + 1)
        x = ahead - rows.start + 1 if forecasts.times is None else forecasts.times[n]
        label = {"label": "forecast"} if n == at[0] else {}
        x = np.append(times[end], x)
        median = np.append(values[end], forecasts.median[n, :, target])
        bands = np.concatenate([values[end, None].repeat(len(recipe.quantiles), 1), forecasts.values[n, :, target]])
        look = {"color": FORECAST, "linewidth": 1.8, "marker": marker, "markevery": slice(joined, None)}
        axis.plot(x, median, **look, **label)
        _intervals(axis, x, bands, recipe.quantiles, labelled=bool(label))
    said = title + ", ".join(part for part in (str(forecasts.ids[at[0]]), name) if part)
    axis.set_title(said, **TITLE)
    axis.set_ylabel(name, parse_math=False)
    if table.times is None:
        axis.set_xlabel("row")
    else:
        _date_ticks(axis)
    if legend:  # above the curves
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.15 * (high - low))
        axis.legend(loc="upper left", ncols=6, frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.2)


def _date_ticks(axis: Any) -> None:
    """Label the ticks of a time axis, see `date_labels`."""
    from matplotlib.dates import AutoDateLocator, num2date
    from matplotlib.ticker import Formatter

    class Labels(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{num2date(x):%Y-%m-%d %H:%M}"  # where the pointer is

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            low, high = sorted(axis.get_xlim())
            seen = [low <= value <= high for value in values]  # the locator also returns ticks outside the axis
            labels = iter(date_labels([num2date(value) for value, inside in zip(values, seen, strict=True) if inside]))
            return [next(labels) if inside else "" for inside in seen]

    axis.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=8))
    axis.xaxis.set_major_formatter(Labels())


def date_labels(times: Sequence[datetime]) -> list[str]:
    """Return the labels of ticks: the first one and those where a day or a year begins also name it, in a second line.

    >>> date_labels([datetime(2024, 12, 24), datetime(2024, 12, 31), datetime(2025, 1, 7)])
    ['24 Dec\\n2024', '31 Dec', '7 Jan\\n2025']
    >>> date_labels([datetime(2024, 12, 31, 12), datetime(2024, 12, 31, 18), datetime(2025, 1, 1)])
    ['12:00\\n31 Dec 2024', '18:00', '00:00\\n1 Jan 2025']
    """
    clock = "" if all(one.time() == time.min for one in times) else "%H:%M"
    if any(one.second or one.microsecond for one in times):
        clock = "%H:%M:%S"
    monthly = all(one.day == 1 for one in times) and not clock
    if monthly and all(one.month == 1 for one in times):
        return [f"{one:%Y}" for one in times]
    labels = []
    for before, one in zip([None, *times], times, strict=False):
        day = f"{one:%b}" if monthly else f"{one.day} {one:%b}"
        year = f"{one:%Y}" if before is None or before.year != one.year else ""
        if not clock:
            labels.append("\n".join(part for part in (day, year) if part))
        elif before is None or before.date() != one.date():
            labels.append(f"{one:{clock}}\n{day} {year}".strip())
        else:
            labels.append(f"{one:{clock}}")
    return labels


def _intervals(axis: Any, x: Any, values: NDArray, levels: tuple[float, ...], labelled: bool) -> None:
    """Fill the intervals between quantiles, `[steps, quantiles]`, from the outermost pair to the innermost."""
    for n in range(len(levels) // 2):
        low, high = levels[n], levels[-1 - n]
        label = {"label": interval(low, high)} if labelled else {}
        look = {"color": FORECAST, "alpha": min(0.2 + 0.15 * n, 0.5), "zorder": 1}
        if len(values) == 1:  # one step without a history has no area
            axis.vlines(x, values[:, n], values[:, -1 - n], linewidth=5, **look, **label)
        else:
            axis.fill_between(x, values[:, n], values[:, -1 - n], linewidth=0, **look, **label)


def _by_horizon(axis: Any, test: Backtest, target: int) -> None:
    """Draw the mean absolute error of each step ahead, of the model and of the best baselines."""
    every, actual = test.compared(target)
    seen = ~np.isnan(actual)
    count = np.where(seen.any(axis=0), seen.sum(axis=0), np.nan)
    errors = {name: np.where(seen, np.abs(values - actual), 0.0).sum(axis=0) / count for name, values in every.items()}
    order = sorted((name for name in errors if name != "model"), key=lambda name: np.nansum(errors[name] * count))
    steps = np.arange(1, test.forecasts.recipe.horizon + 1)
    marker = "." if len(steps) <= 50 else ""
    look = {"marker": "o"} if len(steps) == 1 else {}
    axis.plot(steps, errors["model"], color=FORECAST, linewidth=3.0, label="this model", **look)
    for name, color in zip(order, BASELINES, strict=False):
        axis.plot(steps, errors[name], color=color, linewidth=1.2, marker=marker, label=name)
    name = test.forecasts.recipe.targets[target]
    axis.set_title(f"error of {name} by horizon, with the best baselines", **TITLE)
    axis.set_ylabel(f"mean absolute error, {name}", parse_math=False)
    axis.set_xlabel("steps ahead")
    lines = -(-len(axis.get_lines()) // 2)  # of the legend, above the curves
    axis.set_ylim(0.0, axis.get_ylim()[1] * (1 + 0.12 * lines))
    axis.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
