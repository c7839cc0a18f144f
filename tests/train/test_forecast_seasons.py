"""Seasons found in real series, and none in noise."""

import csv
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cellstack.train.forecasting import seasons

AEON = Path(find_spec("aeon").origin).parent / "datasets/data"


def column(path, name):
    with open(path, encoding="utf-8") as file:
        return np.array([float(row[name] or "nan") for row in csv.DictReader(file)])


CO2 = column(files("cellstack_demo") / "data/co2.csv", "co2")
AIRLINE = column(AEON / "Airline/Airline.csv", "Passengers")
SOLAR = column(AEON / "solar/solar.csv", "solar_gen")
SCRIPTS = column(AEON / "PBS_dataset/PBS_dataset.csv", "Scripts")


@pytest.mark.parametrize(
    ("values", "natural", "expected"),
    [
        (CO2, (52,), (52,)),
        (CO2, (), (52,)),
        (AIRLINE, (12,), (12,)),
        (AIRLINE, (), (12,)),
        (SOLAR, (48, 336), (48,)),
        (SOLAR, (), (48,)),
        (SCRIPTS, (12,), (12,)),
    ],
    ids=["co2", "co2 searched", "airline", "airline searched", "solar", "solar searched", "prescriptions"],
)
def test_real_series(values, natural, expected):
    assert seasons.find(values, None, natural) == expected


def test_the_cycle_of_the_lynx_is_found_without_dates():
    (period,) = seasons.find(column(AEON / "Lynx/Lynx.csv", "0"))
    assert period in (9, 10)  # 9.6 years


def hourly(rng, days):
    """Two seasons, a random walk and noise."""
    hours = np.arange(24 * days)
    week = np.repeat(np.tile([1.0, 1, 1, 1, 1, 0.3, 0.2], days)[:days], 24)
    return 5 * np.sin(hours / 24 * 2 * np.pi) * week + rng.standard_normal((2, len(hours))).cumsum(1)[0] * 0.2


def test_a_day_and_a_week_of_hours_with_gaps_and_in_a_panel():
    rng = np.random.default_rng(0)
    values = hourly(rng, 70)
    values[rng.random(len(values)) < 0.3] = np.nan
    values[500:700] = np.nan
    assert seasons.find(values, None, (24, 168)) == (24, 168)
    panel = [scale * hourly(rng, days) for scale, days in ((1, 20), (1e6, 15), (1e-3, 30))]
    starts = np.cumsum([0, *(len(one) for one in panel)])
    assert seasons.find(np.concatenate(panel), starts, (24, 168)) == (24, 168)


def test_series_of_a_panel_that_are_too_short_alone_are_enough_together():
    rng = np.random.default_rng(1)
    shape = rng.standard_normal(12)
    panel = [np.tile(shape, 3)[:30] + rng.standard_normal(30) for _ in range(20)]
    alone = sum(seasons.find(one, None, (12,)) == (12,) for one in panel)
    assert alone < 10
    assert seasons.find(np.concatenate(panel), np.arange(21) * 30, (12,)) == (12,)


@pytest.mark.parametrize("kind", ["noise", "walk", "autoregressive"])
def test_no_season_in_series_without_one(kind):
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        values = rng.standard_normal(rng.integers(40, 800))
        if kind == "walk":
            values = values.cumsum()
        if kind == "autoregressive":
            values = np.convolve(values, 0.8 ** np.arange(30))[: len(values)]
        found += seasons.find(values, None, (7, 24)) != ()
    assert found <= 6


@pytest.mark.parametrize("values", [np.zeros(0), np.ones(3), np.full(50, np.nan), np.full(50, 1e9), np.arange(50.0)])
def test_series_that_are_too_short_or_empty(values):
    assert seasons.find(values, None, (7, 24)) == ()
