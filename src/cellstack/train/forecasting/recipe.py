"""The recipe of a forecast: targets, inputs and windows, saved in the network's metadata. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from cellstack.train.checks import MOST, UsageError, is_count
from cellstack.train.forecasting import calendar
from cellstack.train.forecasting.smoothing import Smoothing

CALENDAR = ("hour", "weekday", "year", "day", "holidays")
SCALES = ("spread", "level")
MOST_SEASONS = 3
LONGEST_WINDOW, SHORTEST_WINDOW = 168, 16  # limits of the default window


class Rule(NamedTuple):
    """A rule that forecasts without a network.

    Args:
        name: `"naive"`, the latest value; `"seasonal"`, the latest value at the same phase of a season; `"mean"`, the
            mean of the latest four of these; `"smoothing"`, exponential smoothing.
        season: for `"seasonal"` and `"mean"`, in steps; 1 for the others.
    """

    name: str
    season: int


NAIVE, SMOOTHED = Rule("naive", 1), Rule("smoothing", 1)


@dataclass(frozen=True)
class Category:
    """A one-hot column of text, with a channel per label; other labels are all zeros.

    Args:
        name: of the column.
        labels: in the order of their channels.
        known: whether its future values are known.
    """

    name: str
    labels: tuple[str, ...]
    known: bool = False


@dataclass(frozen=True)
class Recipe:
    """Targets, inputs and windows of a forecast, saved in the network's metadata.

    Args:
        targets: columns to forecast.
        horizon: steps to forecast.
        window: input steps.
        seasons: lengths of the seasons in steps, ascending; () for none.
        rule: the rule to which the network's output is added: smoothing, if there is one.
        scale: unit of the network's values: `"spread"`, the standard deviation of the window, or `"level"`, its mean,
            for series whose variations are proportional to it.
        smoothing: parameters of each target's smoothing; () if no series is long enough to determine them.
        floors: smallest unit of each target, for windows without variation.
        inputs: numeric columns known only up to the origin.
        known: numeric columns whose future values are known.
        categories: columns of text.
        calendar: calendar features, of `CALENDAR`.
        holidays: the country of the holidays; "" without holidays in `calendar`.
        quantiles: of the forecast's distribution, ascending; 0.5, the forecast itself, is one of them.

    Raises:
        UsageError: a value out of range, or values that don't fit each other.
    """

    targets: tuple[str, ...]
    horizon: int
    window: int
    seasons: tuple[int, ...] = ()
    rule: Rule = NAIVE
    scale: str = "spread"
    smoothing: tuple[Smoothing, ...] = ()
    floors: tuple[float, ...] = ()
    inputs: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    categories: tuple[Category, ...] = ()
    calendar: tuple[str, ...] = ()
    holidays: str = ""
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)

    def __post_init__(self) -> None:
        for name in ("targets", "inputs", "known"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(column, str) for column in value):
                raise UsageError(f"expected {name} to be a tuple of column names, got {value!r}")
        names = self.columns
        if not self.targets or len(set(names)) < len(names):
            raise UsageError(f"expected at least one target, and each column only once, got {', '.join(names)}")
        for name in ("horizon", "window"):
            if not is_count(getattr(self, name)):
                raise UsageError(f"expected {name} to be an integer from 1 to {MOST}, got {getattr(self, name)!r}")
        seasons = self.seasons
        if not all(is_count(season) and season > 1 for season in seasons) or list(seasons) != sorted(set(seasons)):
            raise UsageError(f"expected seasons to be ascending integers from 2 to {MOST}, got {seasons!r}")
        if len(seasons) > MOST_SEASONS:
            raise UsageError(f"expected at most {MOST_SEASONS} seasons, got {len(seasons)}")
        if self.rule not in self.rules:
            names = ", ".join(f"{rule.name} {rule.season}" for rule in self.rules)
            raise UsageError(f"expected rule to be one of {names}, got {self.rule}")
        if self.scale not in SCALES or not set(self.calendar) <= set(CALENDAR):
            raise UsageError(
                f"expected scale to be one of {', '.join(SCALES)} and calendar of {', '.join(CALENDAR)}, "
                f"got {self.scale!r} and {self.calendar!r}"
            )
        quantiles = self.quantiles
        if (
            0.5 not in quantiles
            or list(quantiles) != sorted(set(quantiles))
            or not 0 < quantiles[0] <= quantiles[-1] < 1
        ):
            raise UsageError(f"expected ascending quantiles between 0 and 1, including 0.5, got {quantiles!r}")
        if self.smoothing and len(self.smoothing) != len(self.targets):
            raise UsageError(f"expected one smoothing per target, got {self.smoothing!r}")
        if self.floors and (len(self.floors) != len(self.targets) or not min(self.floors) > 0):
            raise UsageError(f"expected floors above 0, one per target, got {self.floors!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that it uses."""
        return (*self.targets, *self.inputs, *self.known, *(category.name for category in self.categories))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules whose forecasts are inputs of the network."""
        seasonal = (Rule(name, season) for name in ("seasonal", "mean") for season in self.seasons)
        return (NAIVE, *seasonal, *((SMOOTHED,) if self.smoothing else ()))

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels of a window, see `windows`, in their order."""
        rules = [rule.name if rule.season == 1 else f"{rule.name} {rule.season}" for rule in self.rules]
        found = [name for target in self.targets for name in (target, *(f"{target} ({rule})" for rule in rules))]
        texts = {known: [each for each in self.categories if each.known is known] for known in (False, True)}
        past, ahead = ([f"{each.name}={label}" for each in texts[known] for label in each.labels] for known in texts)
        return (*found, *self.inputs, *past, *self.known, *ahead, *calendar.names(self.calendar), "steps ahead")

    @property
    def reach(self) -> int:
        """Rows up to an origin from which the network's inputs are computed, except the means of seasons."""
        return self.window + max(self.seasons, default=0)

    @property
    def span(self) -> int:
        """Rows up to an origin from which its unit is computed: a window and the shortest season."""
        return self.window + min(self.seasons, default=0)

    @property
    def needed(self) -> int:
        """Rows up to an origin that a forecast needs at least."""
        return max(self.seasons, default=1)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        lists = {"rule": list(self.rule), "smoothing": [list(how) for how in self.smoothing]}  # asdict keeps tuples
        return asdict(self) | lists

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe from the values of `to_json`.

        Raises:
            UsageError: a value out of range.
            TypeError: a missing or unknown entry, or no entries at all.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        values["rule"] = Rule(*values["rule"])
        values["smoothing"] = tuple(Smoothing(*how) for how in values["smoothing"])
        values["categories"] = tuple(
            Category(entry["name"], tuple(entry["labels"]), entry["known"]) for entry in values["categories"]
        )
        missing = {field.name for field in fields(cls)} - set(values)
        if missing:
            raise TypeError(f"missing {', '.join(sorted(missing))}")
        return cls(**values)
