"""The training, validation and test parts of a table, and the windows of a fit. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.examples import VALIDATED, Batch, Inputs, digest
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.windows import Windows
from cellstack.train.measures import seasonal_error
from cellstack.train.tables.table import Table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_STEPS, MOST_STEPS = 20, 50  # training steps of an epoch


class OriginParts(NamedTuple):
    """Rows of the origins to train, validate and test on, and the ends of each series' first two parts, `[S]`."""

    training: Ints
    validation: Ints
    test: Ints
    ends: Ints
    validation_ends: Ints


def parts(table: Table, recipe: Recipe, validation: float, test: float) -> OriginParts:
    """Return the origins to train on, to validate on and to test on, in chronological order in each series.

    The last `test` share of a series' rows is its test part, the `validation` share before it its validation part. An
    origin belongs to the part that contains all of its targets; windows may extend back into the previous part. A
    series that is too short for a part has no origin in it.

    Raises:
        UsageError: shares that leave no training part, or no series is long enough for a part.
    """
    if not (test >= 0.0 and validation >= 0.0 and test + validation < 1.0):
        raise UsageError(f"the validation share {validation} and the test share {test} leave no rows to train on")
    starts, ends = _bounds(table, recipe, validation, test)
    first, rows = table.starts[:-1], np.diff(table.starts)
    shares = (1.0, validation, test)
    longest = min(int((end - start).max()) - 1 for share, start, end in zip(shares, starts, ends, strict=True) if share)
    found: list[Ints] = []
    for name, share, start, end in zip(("training", "validation", "test"), shares, starts, ends, strict=True):
        stop = end - recipe.horizon  # all targets of the origins before it are in the part
        pieces = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        origins = np.concatenate(pieces) if share > 0 else np.empty(0, np.int64)
        if share > 0 and not len(origins):
            raise UsageError(
                f"{table.path}: too few rows for the {name} part, which ends at row {int((end - first).max())} of "
                f"{int(rows.max())}: a season of {recipe.needed} and a horizon of {recipe.horizon} don't fit: choose a "
                f"{f'horizon of at most {longest}' if longest > 0 else 'shorter season'}, or other validation and test "
                "shares"
            )
        found.append(origins)
    return OriginParts(found[0], found[1], found[2], ends[0], ends[1])


def can_validate(table: Table, recipe: Recipe, validation: float, test: float) -> bool:
    """Return whether at least one series is long enough to train on, and one to validate on."""
    (training, held, _), (end, held_end, _) = _bounds(table, recipe, validation, test)
    return bool((training < end - recipe.horizon).any() and (held < held_end - recipe.horizon).any())


def _bounds(table: Table, recipe: Recipe, validation: float, test: float) -> tuple[list[Ints], list[Ints]]:
    """Return, for the three parts, each series' first origin and the row at which the part ends, `[S]` each."""
    first, rows = table.starts[:-1], np.diff(table.starts)
    ends = [first + np.rint(rows * share).astype(np.int64) for share in (1 - test - validation, 1 - test, 1.0)]
    begin = first + recipe.needed - 1
    return [begin, np.maximum(ends[0] - 1, begin), np.maximum(ends[1] - 1, begin)], ends


def typical_errors(table: Table, recipe: Recipe, ends: Ints) -> Floats:
    """Return the mean absolute error of the seasonal naive forecast in each series' training part, `[S, targets]`.

    Errors are divided by it, so that series of all magnitudes have the same weight. Where it is 0, as for a constant
    series, it is the median of the others, else 1.

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
    """Return the smallest unit of each target: a hundredth of the median unit of some windows, 1 if all are 0."""
    units = windows.units(spread_out(indices, 2048)).unit
    medians = np.array([np.median(column[column > 1e-300]) if (column > 1e-300).any() else 100.0 for column in units.T])
    return tuple(float(median) for median in medians / 100)


def spread_out(indices: Ints, most: int) -> Ints:
    """Return at most `most` of the indices, evenly spread."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(np.int64)]


def epoch_steps(windows: int, batch: int) -> int:
    """Return the training steps of an epoch: at least `LEAST_STEPS` for short series, at most `MOST_STEPS`."""
    return min(MOST_STEPS, max(LEAST_STEPS, -(-windows // batch)))


class WindowData:
    """Windows as `Data` of the fit loop, drawn at random in each epoch.

    Args:
        windows: of the training and the validation part.
        inputs: fills gaps; measured on the training part.
        training, validation: indices into `windows`; the latter may be empty.
        batch: batch size.
        seed: of the random choice.
        held: maximum number of windows to validate on, evenly spread.
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
        """Return windows as the network's input."""
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
