"""What is forecast from what, as plain values that travel in a model's metadata. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from cellstack.train.checks import MOST, UsageError, is_count
from cellstack.train.forecast.smoothing import Smoothing

CALENDAR = ("hour", "weekday", "year", "day", "holidays")
SCALES = ("spread", "level")
MOST_SEASONS = 3
LONGEST_WINDOW, SHORTEST_WINDOW = 168, 16  # that are taken where none is asked for


class Rule(NamedTuple):
    """A rule that forecasts without a network.

    Args:
        name: `"naive"`, the latest value; `"seasonal"`, the latest value at the same place in a season; `"mean"`, the
            mean of the latest four of these; `"smoothing"`, exponential smoothing.
        season: of `"seasonal"` and `"mean"`, in steps; 1 for the others.
    """

    name: str
    season: int


NAIVE, SMOOTHED = Rule("naive", 1), Rule("smoothing", 1)


@dataclass(frozen=True)
class Category:
    """A column of text, as the network takes it: one channel a label; a label that training didn't see has none.

    Args:
        name: of the column.
        labels: in the order of their channels.
        known: known in advance, over the horizon too.
    """

    name: str
    labels: tuple[str, ...]
    known: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is forecast from what: it travels in the model's metadata.

    Args:
        targets: columns to forecast.
        horizon: steps to forecast.
        window: steps that the network sees.
        seasons: steps after which the series repeats itself, rising; none where it doesn't.
        rule: what the network's output is added to: smoothing, where there is one.
        scale: unit of the network's values: `"spread"`, the standard deviation of what it looks back at, or `"level"`,
            its mean, for series whose swings grow with it.
        smoothing: how each target is smoothed; none where no series is long enough to say.
        floors: smallest unit of each target, so that a stretch without change has one.
        inputs: columns of numbers that are known up to now.
        known: columns of numbers that are known in advance, over the horizon too.
        categories: columns of text.
        calendar: what of the date the network sees, of `CALENDAR`.
        country: whose holidays; "" where `calendar` doesn't have them.
        quantiles: of the forecast's distribution, rising; the middle one is 0.5, the forecast.

    Raises:
        UsageError: a value out of its range, or one that doesn't fit another.
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
    country: str = ""
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)

    def __post_init__(self) -> None:
        for name in ("targets", "inputs", "known"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(column, str) for column in value):
                raise UsageError(f"expected {name} to be a tuple of columns' names, got {value!r}")
        names = self.columns
        if not self.targets or len(set(names)) < len(names):
            raise UsageError(f"expected at least one target, and each column in one place, got {', '.join(names)}")
        for name in ("horizon", "window"):
            if not is_count(getattr(self, name)):
                raise UsageError(f"expected {name} to be a whole number from 1 to {MOST}, got {getattr(self, name)!r}")
        seasons = self.seasons
        if not all(is_count(season) and season > 1 for season in seasons) or list(seasons) != sorted(set(seasons)):
            raise UsageError(f"expected seasons to be rising whole numbers from 2 to {MOST}, got {seasons!r}")
        if len(seasons) > MOST_SEASONS:
            raise UsageError(f"expected at most {MOST_SEASONS} seasons, got {len(seasons)}")
        if self.rule not in self.rules:
            raise UsageError(f"expected a rule of these seasons, got {self.rule}")
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
            raise UsageError(f"expected quantiles that rise between 0 and 1, 0.5 among them, got {quantiles!r}")
        if self.smoothing and len(self.smoothing) != len(self.targets):
            raise UsageError(f"expected one smoothing a target, got {self.smoothing!r}")
        if self.floors and (len(self.floors) != len(self.targets) or not min(self.floors) > 0):
            raise UsageError(f"expected floors above 0, one a target, got {self.floors!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it takes."""
        return (*self.targets, *self.inputs, *self.known, *(category.name for category in self.categories))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules whose forecasts the network sees."""
        seasonal = (Rule(name, season) for name in ("seasonal", "mean") for season in self.seasons)
        return (NAIVE, *seasonal, *((SMOOTHED,) if self.smoothing else ()))

    @property
    def reach(self) -> int:
        """Rows before an origin, itself included, that what the network sees is made of, the means of seasons aside."""
        return self.window + max(self.seasons, default=0)

    @property
    def span(self) -> int:
        """Rows up to an origin that its unit is measured on: a window and the shortest season."""
        return self.window + min(self.seasons, default=0)

    @property
    def needed(self) -> int:
        """Fewest rows up to an origin for a forecast."""
        return max(self.seasons, default=1)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        lists = {"rule": list(self.rule), "smoothing": [list(how) for how in self.smoothing]}  # asdict leaves them
        return asdict(self) | lists

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_json` wrote.

        Raises:
            UsageError: a value out of its range.
            TypeError: an entry too few or too many, or no entries at all.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        values["rule"] = Rule(*values["rule"])
        values["smoothing"] = tuple(Smoothing(*how) for how in values["smoothing"])
        values["categories"] = tuple(
            Category(entry["name"], tuple(entry["labels"]), entry["known"]) for entry in values["categories"]
        )
        missing = {field.name for field in fields(cls)} - set(values)
        if missing:
            raise TypeError(f"{', '.join(sorted(missing))} not there")
        return cls(**values)
