"""Windows over a table, and the way from a network's output back to the target's units. Needs no torch.

The network sees and predicts differences to the value one season before, so that a trend and the season's shape don't
have to be learned, and levels never seen in training do no harm:

    ref(t, k) = latest observed target at t + k - season·j, with the smallest whole j that keeps it at or before t
    forecast(t + k) = ref(t, k) + network(window that ends at t)[k]                                   k = 1 … horizon

The seasonal-naive forecast is `ref` alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import MOST, UsageError, is_count
from cellstack.train.examples import Batch
from cellstack.train.table import Table


@dataclass(frozen=True)
class Recipe:
    """What is forecast from what: it travels in the model's metadata.

    Args:
        target: column to forecast.
        inputs: further columns that the network sees.
        horizon: steps to forecast.
        window: steps that the network sees.
        season: steps after which the series repeats itself, 1 for none.

    Raises:
        UsageError: a column that isn't named by text, or a number of steps that isn't from 1 to 2^31 - 1.
    """

    target: str
    inputs: tuple[str, ...]
    horizon: int
    window: int
    season: int

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise UsageError(f"expected target to be a column's name, got {self.target!r}")
        if not isinstance(self.inputs, tuple) or not all(isinstance(name, str) for name in self.inputs):
            raise UsageError(f"expected inputs to be a tuple of columns' names, got {self.inputs!r}")
        for name in ("season", "window", "horizon"):
            value = getattr(self, name)
            if not is_count(value):
                raise UsageError(f"expected {name} to be a whole number from 1 to {MOST}, got {value!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_json` wrote.

        Raises:
            UsageError: a value out of its range.
            TypeError: an entry too few or too many, or no entries at all.
        """
        inputs = values["inputs"]
        return cls(**{**values, "inputs": tuple(inputs) if isinstance(inputs, list) else inputs})


class Windows:
    """Windows of a table that end at `origins`, as `Examples`.

    A step's channels are: the target less that one season before; the target less its latest value in the window; each
    further input. Targets are differences to `ref`. Nothing after an origin enters its window.

    Args:
        recipe: what is forecast from what.
        table: holds the columns.
        origins: row of the last step of each window, `[N]`.

    Raises:
        UsageError: a column isn't there; the message names those that are.
    """

    def __init__(self, recipe: Recipe, table: Table, origins: NDArray[np.int64]):
        for name in (recipe.target, *recipe.inputs):
            if name not in table.columns:
                have = ", ".join(table.columns)
                raise UsageError(f"{table.path}: expected a column of numbers {name!r}, found {have}")
        self.recipe = recipe
        self.origins = origins
        self.lengths = np.minimum(origins + 1, recipe.window)
        self.target = table.columns[recipe.target]
        self.latest = _carry(self.target, 1)
        self.seasonal = _carry(self.target, recipe.season)
        self.others = np.array([table.columns[name] for name in recipe.inputs])  # [J, N]
        before = np.full(len(self.target), np.nan)
        before[recipe.season :] = self.seasonal[: -recipe.season or None][: len(before) - recipe.season]
        self.difference = self.target - before

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """See `Examples`."""
        steps = int(self.lengths[indices[0]])
        origins = self.origins[indices]
        rows = origins[:, None] + np.arange(1 - steps, 1)  # [B, T]
        level = self.target[rows] - self.latest[origins][:, None]
        x = np.stack([self.difference[rows], level, *(other[rows] for other in self.others)], axis=-1)
        y = self.actual(indices) - self.reference(indices)
        weight = ~np.isnan(y)
        return Batch(x.astype(np.float32), np.where(weight, y, 0.0).astype(np.float32), weight.astype(np.float32))

    def reference(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the seasonal-naive forecasts, `[B, horizon]`, NaN where nothing was observed at that phase."""
        ahead = np.arange(1, self.recipe.horizon + 1)
        back = ahead - self.recipe.season * -(-ahead // self.recipe.season)  # in (-season, 0]
        rows = self.origins[indices][:, None] + back
        return np.where(rows >= 0, self.seasonal[np.maximum(rows, 0)], np.nan)

    def actual(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what came, `[B, horizon]`, NaN where missing or beyond the table."""
        rows = self.origins[indices][:, None] + np.arange(1, self.recipe.horizon + 1)
        inside = rows < len(self.target)
        return np.where(inside, self.target[np.where(inside, rows, 0)], np.nan)


def parts(rows: int, recipe: Recipe, validation: float, test: float) -> tuple[NDArray[np.int64], ...]:
    """Return the origins to train on, to validate on and to test on, in that order of time.

    The last `test` of the rows are the test part, the `validation` before them the validation part. An origin belongs
    to the part that holds all of its targets; windows may reach back into the part before.

    Raises:
        UsageError: a part is too short; the message says how many rows it takes.
    """
    ends = [round(rows * (1 - test - validation)), round(rows * (1 - test)), rows]
    first = recipe.season + recipe.window - 1
    origins = []
    for name, start, end in zip(("training", "validation", "test"), [first + 1, *ends[:2]], ends, strict=True):
        wanted = (validation, test)[len(origins) - 1] if origins else 1.0
        part = np.arange(max(start - 1, first), end - recipe.horizon)
        if wanted > 0 and not len(part):
            raise UsageError(
                f"expected more rows for the {name} part: a season of {recipe.season}, a window of {recipe.window} and "
                f"a horizon of {recipe.horizon} don't fit, as it ends at row {end} of {rows}"
            )
        origins.append(part if wanted > 0 else part[:0])
    return tuple(origins)


def errors(forecast: NDArray[np.float64], actual: NDArray[np.float64]) -> dict[str, float]:
    """Return the mean absolute error and the root of the mean squared error, in the target's units; NaN of nothing."""
    difference = (forecast - actual)[~np.isnan(actual)]
    if not difference.size:
        return {"mae": np.nan, "rmse": np.nan}
    return {"mae": float(np.abs(difference).mean()), "rmse": float(np.sqrt(np.square(difference).mean()))}


def _carry(values: NDArray[np.float64], period: int) -> NDArray[np.float64]:
    """Return the latest value that isn't NaN at each row or whole periods before it, NaN where there is none."""
    period = min(period, len(values))  # a longer one looks back at as little, and would take more memory
    rows = -(-len(values) // period)
    grid = np.full(rows * period, np.nan)
    grid[: len(values)] = values
    grid = grid.reshape(rows, period)
    at = np.where(np.isnan(grid), -1, np.arange(rows)[:, None])
    at = np.maximum.accumulate(at, axis=0)
    return np.where(at < 0, np.nan, np.take_along_axis(grid, np.maximum(at, 0), axis=0)).reshape(-1)[: len(values)]
