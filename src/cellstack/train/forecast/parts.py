"""The parts of a table in the order of time, and the windows that a fit takes from them. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.examples import VALIDATED, Batch, Inputs, digest
from cellstack.train.forecast.recipe import Recipe
from cellstack.train.forecast.windows import Windows
from cellstack.train.measures import seasonal_error
from cellstack.train.tables.table import Table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_STEPS, MOST_STEPS = 20, 50  # of an epoch


class Parts(NamedTuple):
    """Rows of the origins to train, to validate and to test on; and where each series' first two parts end, `[S]`."""

    training: Ints
    validation: Ints
    test: Ints
    ends: Ints
    validation_ends: Ints


def parts(table: Table, recipe: Recipe, validation: float, test: float) -> Parts:
    """Return the origins to train on, to validate on and to test on, in that order of time in each series.

    The last `test` of a series' rows are its test part, the `validation` before them its validation part. An origin
    belongs to the part that holds all of its targets; windows may reach back into the part before. A series that is
    too short for a part has no origin there.

    Raises:
        UsageError: shares that leave nothing to train on, or no series is long enough for a part; the message says how
            many rows it takes.
    """
    if not (test >= 0.0 and validation >= 0.0 and test + validation < 1.0):
        raise UsageError(
            f"expected shares to validate and test on that leave rows to train on, got {validation} and {test}"
        )
    starts, ends = _bounds(table, recipe, validation, test)
    first, rows = table.starts[:-1], np.diff(table.starts)
    found: list[Ints] = []
    for name, share, start, end in zip(
        ("training", "validation", "test"), (1.0, validation, test), starts, ends, strict=True
    ):
        stop = end - recipe.horizon  # origins before it have all targets in the part
        pieces = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        origins = np.concatenate(pieces) if share > 0 else np.empty(0, np.int64)
        if share > 0 and not len(origins):
            raise UsageError(
                f"{table.path}: expected more rows for the {name} part: a season of {recipe.needed} and a horizon of "
                f"{recipe.horizon} don't fit, as it ends at row {int((end - first).max())} of {int(rows.max())}: "
                "ask for a shorter horizon or season, or for other shares to validate and test on"
            )
        found.append(origins)
    return Parts(found[0], found[1], found[2], ends[0], ends[1])


def can_validate(table: Table, recipe: Recipe, validation: float, test: float) -> bool:
    """Return whether a series is long enough to train on where another, or the same, is to validate on."""
    (training, held, _), (end, held_end, _) = _bounds(table, recipe, validation, test)
    return bool((training < end - recipe.horizon).any() and (held < held_end - recipe.horizon).any())


def _bounds(table: Table, recipe: Recipe, validation: float, test: float) -> tuple[list[Ints], list[Ints]]:
    """Return, for the three parts, each series' first origin and the row at which the part ends, `[S]` each."""
    first, rows = table.starts[:-1], np.diff(table.starts)
    ends = [first + np.rint(rows * share).astype(np.int64) for share in (1 - test - validation, 1 - test, 1.0)]
    begin = first + recipe.needed - 1
    return [begin, np.maximum(ends[0] - 1, begin), np.maximum(ends[1] - 1, begin)], ends


def typical_errors(table: Table, recipe: Recipe, ends: Ints) -> Floats:
    """Return the mean absolute error of the value one season before, in each series' training part, `[S, targets]`.

    It's what errors are measured by, so that series of all sizes count alike; where it isn't above 0, as in a series
    that never changes, the median of the others, else 1.

    Ref: Hyndman and Koehler 2006, "Another look at measures of forecast accuracy", section 2.4.
    """
    season = min(recipe.seasons, default=1)
    out = np.full((len(ends), len(recipe.targets)), np.nan)
    for s, (first, end) in enumerate(zip(table.starts[:-1], ends, strict=True)):
        for n, name in enumerate(recipe.targets):
            error = seasonal_error(table.columns[name][first:end], season)
            out[s, n] = error if error > 0 else np.nan
    for n in range(out.shape[1]):
        column = out[:, n]
        known = column[~np.isnan(column)]
        column[np.isnan(column)] = np.median(known) if len(known) else 1.0
    return out


def floors(windows: Windows, indices: Ints) -> tuple[float, ...]:
    """Return the smallest unit of each target: a hundredth of the median one of some windows, 1 where all are 0."""
    units = windows.units(spread_out(indices, 2048)).unit
    medians = np.array([np.median(column[column > 1e-300]) if (column > 1e-300).any() else 100.0 for column in units.T])
    return tuple(float(median) for median in medians / 100)


def spread_out(indices: Ints, most: int) -> Ints:
    """Return `most` of the indices, evenly spread; all where there are no more."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(np.int64)]


def epoch_steps(windows: int, batch: int) -> int:
    """Return the steps of an epoch: enough to train on a short series as well, and not all windows of a long one."""
    return min(MOST_STEPS, max(LEAST_STEPS, -(-windows // batch)))


class WindowData:
    """Windows as `Data` of the fit loop: as many as are wanted, drawn anew in each epoch.

    Args:
        windows: of the training and the validation part.
        inputs: fills gaps; measured on the training part.
        training, validation: positions in `windows`; the latter may be empty.
        batch: windows in a step.
        seed: fixes the draws.
        held: windows that are validated on, at most, evenly spread.
    """

    def __init__(
        self,
        windows: Windows,
        inputs: Inputs,
        training: Ints,
        validation: Ints,
        batch: int,
        seed: int,
        held: int = 1024,
    ):
        self.windows, self.inputs, self.training, self.batch, self.seed = windows, inputs, training, batch, seed
        self.validation = spread_out(validation, held)
        self.size = min(batch, len(training))
        self.steps = epoch_steps(len(training), batch)
        self.validates = bool(len(validation))

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """See `Data`."""
        count = self.steps * self.size
        rounds = range(-(-count // len(self.training)))
        rng = np.random.default_rng([self.seed, number])
        order = np.concatenate([rng.permutation(self.training) for _ in rounds])[:count].reshape(self.steps, self.size)
        for indices in order[first:]:
            yield self.filled(indices)

    def held(self) -> Iterator[Batch]:
        """See `Data`."""
        for start in range(0, len(self.validation), VALIDATED):
            yield self.filled(self.validation[start : start + VALIDATED])

    def filled(self, indices: Ints) -> Batch:
        """Return windows as the network takes them."""
        batch = self.windows.fetch(indices)
        x, mask = self.inputs(batch.x)
        return batch._replace(x=x, mask=mask)

    def describe(self) -> dict[str, Any]:
        """See `Data`."""
        windows, table = self.windows, self.windows.table
        codes = [category.codes for category in table.categories.values()]
        return {
            "recipe": windows.recipe.to_json(),
            "inputs": digest([self.inputs.mean, self.inputs.scale, np.array(self.inputs.observed, np.int64)]),
            "table": digest([table.starts, *table.columns.values(), *codes]),
            "origins": digest([windows.origins[self.training], windows.origins[self.validation]]),
            "batch": self.batch,
        }
