"""Windows over the series of a table: their channels, units, and the inverse scaling."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellstack.train.checks import UsageError
from cellstack.train.forecasting import calendar
from cellstack.train.forecasting.recipe import SMOOTHED, Category, Recipe, Rule
from cellstack.train.forecasting.rules import seasonal, seasonal_mean
from cellstack.train.forecasting.smoothing import Smoothed, Smoothing
from cellstack.train.forecasting.windows import Windows
from cellstack.train.tables.table import read_table

HOURS = pd.date_range("2024-01-01", periods=400, freq="h")


def frame(seed=0, rows=400, **columns):
    rng = np.random.default_rng(seed)
    y = 10 + np.sin(np.arange(rows) * 2 * np.pi / 24) + rng.normal(0, 0.2, rows)
    made = {"time": HOURS[:rows], "y": y, "other": rng.normal(size=rows), "plan": rng.normal(size=rows)}
    return pd.DataFrame(made | columns)


RECIPE = Recipe(
    ("y",),
    horizon=12,
    window=30,
    seasons=(24, 168),
    rule=Rule("seasonal", 24),
    smoothing=(Smoothing(False, 0.1, 0.2, 0.5, 0.05, 0.9, 0.5),),
    inputs=("other",),
    known=("plan",),
    calendar=("hour", "weekday"),
)


def fetched(table, origin, recipe=RECIPE):
    return Windows(recipe, table, np.array([origin])).fetch(np.array([0]))


def test_a_window_doesn_t_depend_on_rows_after_its_origin():
    before, after = frame(), frame()
    after.loc[201:, ["y", "other"]] = 1e6
    a, b = (fetched(read_table(one, id=()), 200) for one in (before, after))
    np.testing.assert_array_equal(a.x, b.x)
    assert not np.array_equal(a.y, b.y)  # the targets did change


def test_inputs_known_in_advance_are_used_up_to_the_horizon():
    tables = [frame(), frame(), frame()]
    tables[1].loc[212, "plan"] = 7.0  # the last step of the horizon
    tables[2].loc[213, "plan"] = 7.0
    x = [fetched(read_table(one), 200).x for one in tables]
    changed = np.argwhere((x[0] != x[1]) & ~np.isnan(x[0]))
    assert changed.tolist() == [[0, 41, 8]]  # y, six rules, other, and then plan
    np.testing.assert_array_equal(x[0], x[2])


def test_the_order_of_channels():
    table = read_table(frame())
    windows = Windows(RECIPE, table, np.array([200]))
    x = windows.fetch(np.array([0])).x[0]
    units = windows.units(np.array([0]))
    base, unit = units.base[0, 0], units.unit[0, 0]
    y = table.columns["y"]
    np.testing.assert_allclose(x[:30, 0], (y[171:201] - base) / unit, rtol=1e-5)
    assert np.isnan(x[30:, 0]).all()
    for channel, rule in enumerate(RECIPE.rules, 1):
        before = y[171 - rule.season : 201 - rule.season]
        if rule == SMOOTHED:
            fitted = Smoothed(y, table.starts, RECIPE.seasons, RECIPE.smoothing[0]).fitted
            np.testing.assert_allclose(x[:30, channel], (fitted[171:201] - base) / unit, rtol=1e-4, atol=1e-5)
        if rule.name == "seasonal":
            np.testing.assert_allclose(x[:30, channel], (before - base) / unit, rtol=1e-5)
        ahead = windows.rule(rule, 0, np.array([0]))[0]
        np.testing.assert_allclose(x[30:, channel], (ahead - base) / unit, rtol=1e-5)
    at = 1 + len(RECIPE.rules)
    np.testing.assert_allclose(x[:30, at], table.columns["other"][171:201], rtol=1e-6)
    assert np.isnan(x[30:, at]).all()
    np.testing.assert_allclose(x[:, at + 1], table.columns["plan"][171:213], rtol=1e-6)
    np.testing.assert_allclose(x[:, at + 2 : -1], calendar.features(table.times[171:213], RECIPE.calendar))
    np.testing.assert_allclose(x[:, -1], [0.0] * 30 + [k / 12 for k in range(1, 13)], rtol=1e-6)
    assert windows.channels == x.shape[1] == at + 2 + 6 + 6 + 1  # three harmonics each of the day and of the week


def test_rules_are_those_of_the_baselines():
    values = frame()
    values.loc[[150, 151, 199], "y"] = np.nan
    table = read_table(values)
    origins = np.array([180, 200, 250])
    windows = Windows(RECIPE, table, origins)
    y = table.columns["y"]
    for rule in RECIPE.rules:
        ours = windows.rule(rule, 0, np.arange(3))
        if rule.name == "mean":
            theirs = seasonal_mean(y, origins, 12, season=rule.season)
        elif rule == SMOOTHED:
            theirs = Smoothed(y, table.starts, RECIPE.seasons, RECIPE.smoothing[0]).ahead(origins, 12)
        else:
            theirs = seasonal(y, origins, 12, season=rule.season)
        np.testing.assert_allclose(ours, theirs)


def test_targets_are_differences_from_the_rule_and_forecasts_invert_them():
    table = read_table(frame())
    windows, every = Windows(RECIPE, table, np.array([190, 200])), np.arange(2)
    y = windows.fetch(every).y
    out = np.repeat(y.reshape(2, 12, 1, 1), 3, axis=-1)
    np.testing.assert_allclose(windows.forecasts(every, out)[..., 1], windows.actual(every), rtol=1e-6)
    np.testing.assert_allclose(windows.forecasts(every, 0 * out)[..., 0], windows.reference(every))


def test_the_latest_value_replaces_a_rule_without_values():
    values = frame()
    values.loc[values["time"].dt.hour == 3, "y"] = np.nan  # closed at night, all days
    windows = Windows(RECIPE, read_table(values), np.array([200]))
    hours = (200 + np.arange(1, 13)) % 24
    reference, seasonal_ = windows.reference(np.array([0]))[0, :, 0], windows.rule(RECIPE.rule, 0, np.array([0]))[0]
    assert np.isnan(seasonal_).tolist() == (hours == 3).tolist()
    np.testing.assert_array_equal(reference[hours == 3], values["y"][200])
    np.testing.assert_array_equal(reference[hours != 3], seasonal_[hours != 3])


def test_crossed_quantiles_are_sorted():
    windows = Windows(RECIPE, read_table(frame()), np.array([200]))
    out = np.zeros((1, 12, 1, 3))
    out[..., 0] = 1.0  # the lowest quantile above the others
    values = windows.forecasts(np.array([0]), out)
    assert (np.diff(values, axis=-1) >= 0).all()


@pytest.mark.parametrize(("scale", "shift"), [("spread", 500.0), ("level", 0.0)])
def test_inputs_don_t_depend_on_the_units(scale, shift):
    recipe = replace(RECIPE, scale=scale)
    other = frame()
    other["y"] = 1000 * other["y"] + shift
    a, b = (fetched(read_table(one), 200, recipe) for one in (frame(), other))
    np.testing.assert_allclose(a.x, b.x, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(a.y, b.y, rtol=2e-3, atol=2e-3)


def test_a_series_without_change_has_the_smallest_unit():
    recipe = replace(RECIPE, floors=(0.5,))
    table = read_table(frame(y=np.full(400, 3.0)))
    windows = Windows(recipe, table, np.array([200]))
    assert windows.units(np.array([0])).unit == 0.5
    assert np.nanmax(np.abs(windows.fetch(np.array([0])).x[..., 0])) == 0.0


def test_series_of_a_panel_have_separate_windows():
    a, b = frame(1), frame(2, rows=300)
    b["y"] *= 50
    whole = pd.concat([a.assign(shop="a"), b.assign(shop="b")])
    panel = read_table(whole, id="shop")
    for number, (one, origin) in enumerate([(a, 399), (b, 250), (b, 299), (b, 170)]):
        alone = fetched(read_table(one), origin)
        together = fetched(panel, origin + (400 if number else 0))
        for x, y in zip(alone[:3], together[:3], strict=True):
            np.testing.assert_array_equal(x, y)


def test_steps_before_a_series_are_masked():
    x = fetched(read_table(frame()), 12).x[0]
    assert np.isnan(x[:17]).all()
    assert not np.isnan(x[17:, -1]).any()


def test_a_missing_target_has_weight_0():
    values = frame()
    values.loc[[195, 205], "y"] = np.nan
    batch = fetched(read_table(values), 200)
    assert np.isnan(batch.x[0, 24, 0])
    assert batch.weight[0, 4] == 0.0
    assert batch.weight[0].sum() > 0.0


def test_several_targets():
    recipe = replace(RECIPE, targets=("y", "other"), inputs=(), smoothing=RECIPE.smoothing * 2)
    table = read_table(frame())
    windows, every = Windows(recipe, table, np.array([200])), np.array([0])
    batch = windows.fetch(every)
    assert batch.y.shape == (1, 24)
    for n, name in enumerate(recipe.targets):
        alone = replace(RECIPE, targets=(name,), inputs=())
        np.testing.assert_array_equal(batch.y[0].reshape(12, 2)[:, n], fetched(table, 200, alone).y[0])


def test_a_category_has_a_channel_per_label_and_none_for_new_labels():
    values = frame(sky=np.where(np.arange(400) % 3 == 0, "sun", "rain"))
    recipe = replace(RECIPE, categories=(Category("sky", ("rain", "sun")),), calendar=())
    x = fetched(read_table(values), 200, recipe).x[0]
    labels = x[:, 8:10]
    np.testing.assert_array_equal(labels[:30, 1], (np.arange(171, 201) % 3 == 0).astype(np.float32))
    assert np.isnan(labels[30:]).all()  # it isn't known in advance
    values.loc[200, "sky"] = "snow"
    np.testing.assert_array_equal(fetched(read_table(values), 200, recipe).x[0, 29, 8:10], [0.0, 0.0])
    known = replace(recipe, categories=(Category("sky", ("rain", "sun"), known=True),))
    assert not np.isnan(fetched(read_table(values), 200, known).x[0]).any(axis=0)[9:11].any()


def test_a_missing_column_is_named():
    with pytest.raises(UsageError, match=r"expected a numeric column 'plan', found y, other"):
        Windows(RECIPE, read_table(frame().drop(columns="plan")), np.array([200]))
    with pytest.raises(UsageError, match="the model needs dates for its input 'hour', found none"):
        Windows(RECIPE, read_table(frame().drop(columns="time")), np.array([200]))


def test_calendar_midnight_and_weekday_and_year():
    times = np.array(["2024-01-01T00:00", "2024-01-01T06:00", "2024-01-07T00:00", "2024-07-01T00:00"], "datetime64[s]")
    hour = calendar.features(times, ("hour",))
    np.testing.assert_allclose(hour[0, :2], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(hour[1, :2], [1.0, 0.0], atol=1e-6)  # a quarter of the day
    weekday = calendar.features(times, ("weekday",))
    np.testing.assert_allclose(weekday[0], weekday[3], atol=1e-6)  # both are Mondays
    np.testing.assert_allclose(weekday[2, :2], [np.sin(2 * np.pi * 6 / 7), np.cos(2 * np.pi * 6 / 7)], atol=1e-6)
    year = calendar.features(times, ("year",))
    np.testing.assert_allclose(year[3, 1], -1.0, atol=1e-3)  # half a year later


def test_holidays_flag_the_day_and_its_neighbours():
    days = np.array(["2024-07-03", "2024-07-04", "2024-07-05", "2024-07-09"], "datetime64[s]")
    np.testing.assert_array_equal(
        calendar.features(days, ("holidays",), "US"), [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    )
    with pytest.raises(UsageError, match="holidays: expected a supported country, such as US or DE-BY, got 'XX'"):
        calendar.features(days, ("holidays",), "XX")


def test_a_recipe_is_unchanged_by_json():
    recipe = replace(RECIPE, categories=(Category("sky", ("rain", "sun"), known=True),), floors=(0.25,))
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(TypeError, match="missing window"):
        Recipe.from_json({key: value for key, value in recipe.to_json().items() if key != "window"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "expected horizon to be an integer from 1"),
        ({"seasons": (7, 7)}, "expected seasons to be ascending integers"),
        ({"inputs": ("y",)}, "each column only once"),
        ({"rule": Rule("seasonal", 5)}, "expected rule to be one of"),
        ({"scale": "log"}, "expected scale to be one of spread, level"),
        ({"quantiles": (0.1, 0.9)}, "including 0.5"),
        ({"floors": (0.0,)}, "expected floors above 0"),
        ({"smoothing": RECIPE.smoothing * 2}, "expected one smoothing per target"),
        ({"smoothing": (), "rule": Rule("smoothing", 1)}, "expected rule to be one of"),
    ],
)
def test_invalid_recipes_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(RECIPE, **change)
