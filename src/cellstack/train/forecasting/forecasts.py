"""`Forecasts`: what a network forecasts for the series of a table. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.tables.table import Table, iso

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class Forecasts:
    """Forecasts from several origins.

    Args:
        recipe: targets, inputs and windows.
        table: the series.
        ids: name of the series of each origin, `[N]`; `""` for a table with one series without a name.
        origins: last row that each forecast uses, `[N]`.
        times: wall-clock time of each forecast step, `[N, horizon]`; None without dates.
        values: `[N, horizon, targets, quantiles]` in the targets' units, NaN without values to start from.
        reference: forecasts of the rule to which the network's output is added, `[N, horizon, targets]`.
    """

    recipe: Recipe
    table: Table
    ids: list[str]
    origins: Ints
    times: NDArray[np.datetime64] | None
    values: Floats
    reference: Floats

    def __repr__(self) -> str:
        count, recipe = len(self.origins), self.recipe
        said = f"{count:,} forecast{'s' * (count != 1)} of {', '.join(recipe.targets)}"
        when = "" if self.times is None else f" from {iso(self.times.min())} to {iso(self.times.max())}"
        levels = ", ".join(f"{level:g}" for level in recipe.quantiles)
        return f"<{said}, {recipe.horizon} step{'s' * (recipe.horizon != 1)} each{when}, quantiles {levels}>"

    def _repr_png_(self) -> bytes | None:
        """Return the plot, which notebooks show; None without matplotlib: they show the text."""
        if find_spec("matplotlib") is None:
            return None
        picture = BytesIO()
        self.plot().savefig(picture, format="png", dpi=100)
        return picture.getvalue()

    @property
    def median(self) -> Floats:
        """The forecast, `[N, horizon, targets]`."""
        return self.values[..., self.recipe.quantiles.index(0.5)]

    def at(self, levels: Sequence[float]) -> Floats:
        """Return any quantiles, `[N, horizon, targets, levels]`.

        Between two of the recipe's quantiles they are interpolated linearly over the quantiles of the normal
        distribution: exact if forecasts are normally distributed, and otherwise still between the two.

        Args:
            levels: from the lowest of the recipe's quantiles to the highest.

        Raises:
            UsageError: a level outside this range, for which the network wasn't trained.
        """
        known = np.array(self.recipe.quantiles)
        at = np.array(levels, np.float64)
        nearest = known[np.abs(at[:, None] - known).argmin(axis=1)]
        at = np.where(np.abs(at - nearest) < 1e-9, nearest, at)  # 0.5 - 0.9 / 2 is 0.05
        beyond = ~((at >= known[0]) & (at <= known[-1]))
        if beyond.any():
            raise UsageError(
                f"expected quantiles from {known[0]:g} to {known[-1]:g}, the range that the network was trained for, "
                f"got {at[beyond][0]:g}: train it with a wider range of quantiles"
            )
        normal = np.array([NormalDist().inv_cdf(level) for level in known])
        wanted = np.array([NormalDist().inv_cdf(level) for level in at])
        above = np.clip(np.searchsorted(known, at), 1, None) if len(known) > 1 else np.zeros(len(at), np.int64)
        below = np.maximum(above - 1, 0)  # the same if there is only one
        share = (wanted - normal[below]) / np.where(above > below, normal[above] - normal[below], 1.0)
        return self.values[..., below] * (1 - share) + self.values[..., above] * share

    def plot(self, which: int | Sequence[int] | None = None, *, history: int | None = None) -> Figure:
        """Return a matplotlib figure: the last values of the history, the median, and the intervals of the quantiles.

        Each forecast and target has its own panel. Actual values after the origin are drawn where the table has them.

        Args:
            which: numbers of the forecasts, of N; None = all, or six of them, evenly spread.
            history: steps before the origin; None = twice the horizon or a window, and at least 16.

        Raises:
            UsageError: matplotlib isn't installed, or there is no such forecast.
        """
        from cellstack.train.forecasting.plot import plot

        return plot(self, which, history)
