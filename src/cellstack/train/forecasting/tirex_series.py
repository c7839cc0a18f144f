"""The series that `TiRexForecaster` takes: checked, and as rows of one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack.train.checks import UsageError, unmasked
from cellstack.train.forecasting.tirex_running import Ints
from cellstack.train.forecasting.tirex_scaling import (
    Floats,
    Scaling,
    ScalingSettings,
    differences,
    has_trend,
    last_observed,
)

LARGEST = float(np.finfo(np.float32).max)


class Group(NamedTuple):
    """Series that are forecast together.

    Attributes:
        targets: the variates that are forecast, `[V, T]`.
        past: covariates up to the forecast, `[P, T]`.
        known: covariates whose future is known, `[K, T + n]`.
    """

    targets: Floats
    past: Floats
    known: Floats

    @property
    def negated(self) -> Group:
        """The group with all signs changed."""
        return Group(*(-part for part in self))


def groups_of(series: Any, past: Any, known: Any, ahead: int | None) -> tuple[list[Group], int]:
    """Return groups, and the number of axes of the result before the horizon.

    Args:
        series: `[T]`, `[B, T]` or `[B, V, T]`, or a list of series `[T]` or of groups `[V, T]`.
        past: `[P, T]` for one series, else one per group, or None.
        known: `[K, T + n]` in the same way.
        ahead: the number of steps after the series that are used of `known`; None: all.

    Raises:
        UsageError: values that aren't numbers, infinite or too large for float32, or other shapes.
    """
    several = isinstance(series, (list, tuple)) and any(isinstance(row, list) or np.ndim(row) for row in series)
    given: Any = series if several else _floats("series", series)
    rows = [_floats("series", row) for row in given] if several else list(given) if np.ndim(given) > 1 else [given]
    axes = rows[0].ndim if several or np.ndim(given) > 1 else 0
    if not rows or axes > 2 or any(row.ndim != max(axes, 1) or not row.size for row in rows):
        raise UsageError(
            "TiRexForecaster: expected series [T], [B, T] or [B, V, T], or a list of series [T] or of groups of "
            "variates [V, T], with T >= 1"
        )
    of_past, of_known = (_covariates(name, given, rows, axes) for name, given in (("past", past), ("known", known)))
    groups = [Group(np.atleast_2d(row), *pair) for row, *pair in zip(rows, of_past, of_known, strict=True)]
    wrong = {group.past.shape[1] for group in groups if group.past.shape[1] != group.targets.shape[1]}
    if wrong:
        raise UsageError(f"TiRexForecaster: expected past with the steps of series, got {', '.join(map(str, wrong))}")
    counts = {group.known.shape[1] - group.targets.shape[1] for group in groups if len(group.known)}
    if counts and (min(counts) < (ahead or 1) or (ahead is None and len(counts) > 1)):
        wanted = f"at least {ahead} steps" if ahead else "the same number of steps for each group, 1 or more,"
        got = ", ".join(map(str, sorted(counts)))
        raise UsageError(f"TiRexForecaster: expected known to have {wanted} after those of series, got {got}")
    used = ahead or max(counts, default=0)
    return [group._replace(known=group.known[:, : group.targets.shape[1] + used]) for group in groups], axes


class Prepared:
    """Groups as rows of one array: the variates of all groups, then their past and their known covariates.

    Args:
        groups: the groups.
        scaling: says which rows are differenced; None: variates with a trend, if the model differences.
        settings: of the model.

    Attributes:
        groups: the rows of each group: its variates, its past and its known covariates.
        moving: the number of rows before those of known covariates.
        steps: the number of steps of the longest series.
        observed: the rows, `[rows, steps + …]`, NaN before the shorter ones.
        values: the rows or their differences.
        differenced: which of them are differenced, `[rows]`.
        last: the last observation of each variate.
    """

    def __init__(self, groups: Sequence[Group], scaling: Scaling | None, settings: ScalingSettings) -> None:
        self.groups: list[list[list[int]]] = [[] for _ in groups]
        rows: list[Floats] = []
        before: list[int] = []  # the missing steps before each row
        self.steps = max(group.targets.shape[1] for group in groups)
        for part in range(3):
            for group, numbers in zip(groups, self.groups, strict=True):
                own = list(group[part])
                numbers.append([*range(len(rows), len(rows) + len(own))])
                rows += own
                before += [self.steps - group.targets.shape[1]] * len(own)
            if part == 0:
                self.last = np.array([last_observed(row) for row in rows])
            if part == 1:
                self.moving = len(rows)
        if scaling is None:
            trends = [settings.difference and has_trend(row) for row in rows[: len(self.last)]]
            self.differenced = np.array([*trends, *[False] * (len(rows) - len(trends))])
        elif len(scaling.loc) == len(rows):
            self.differenced = scaling.differenced[:, 0]
        else:
            raise UsageError("TiRexForecaster: expected scaling to be that of a stream of as many series")
        longest = max(at + len(row) for at, row in zip(before, rows, strict=True))
        self.observed = np.full((len(rows), longest), np.nan)
        self.values = self.observed.copy()
        for number, (at, row) in enumerate(zip(before, rows, strict=True)):
            self.observed[number, at : at + len(row)] = row
            self.values[number, at : at + len(row)] = differences(row) if self.differenced[number] else row

    def alike(self) -> Iterator[tuple[Ints, Ints, int]]:
        """Yield the rows of groups of the same numbers of series: variates `[G, V]`, covariates `[G, C]`.

        The third is how many covariates, the last ones, have a known future; a covariate without any value after the
        last step hasn't.
        """
        future = ~np.isnan(self.values[:, self.steps :]).all(axis=1)
        found: dict[tuple[int, int, int], list[tuple[list[int], list[int]]]] = {}
        for targets, past, known in self.groups:
            covariates = sorted([*past, *known], key=lambda row: future[row])
            key = len(targets), len(covariates), int(future[known].sum())
            found.setdefault(key, []).append((targets, covariates))
        for (_, _, known), rows in found.items():
            targets, covariates = (np.array(part, np.int64) for part in zip(*rows, strict=True))
            yield targets, covariates, known


def shaped(values: Floats, groups: Sequence[Sequence[Sequence[int]]], axes: int) -> Any:
    """Return values of all variates `[R, …]` as `[…]`, `[R, …]` or `[B, V, …]`; a list if groups differ in V."""
    if axes < 2:
        return values if axes else values[0]
    parts = [values[group[0]] for group in groups]
    return np.stack(parts) if len({len(part) for part in parts}) == 1 else parts


def _covariates(name: str, given: Any, rows: Sequence[Floats], axes: int) -> list[Floats]:
    """Return the covariates of each group, `[C, T]`."""
    values = [given] * len(rows) if given is None or axes == 0 else given
    shape = "[C, T]" if axes == 0 else "[B, C, T], or a list of [C, T] or None"
    if not hasattr(values, "__len__") or len(values) != len(rows):
        raise UsageError(f"TiRexForecaster: expected {name} {shape}, for {len(rows)} series or groups")
    found = [
        np.empty((0, row.shape[-1])) if value is None else _floats(name, value)
        for row, value in zip(rows, values, strict=True)
    ]
    if any(value.ndim != 2 for value in found):
        raise UsageError(f"TiRexForecaster: expected {name} {shape}, got {' and '.join(str(v.shape) for v in found)}")
    return found


def _floats(name: str, values: Any) -> Floats:
    """Return numbers as float64, NaN where they are masked."""
    if hasattr(values, "columns"):
        raise UsageError(
            f"TiRexForecaster: expected {name} as an array, got a table: predict takes tables; or pass "
            "table.to_numpy().T, whose rows are the columns"
        )
    try:
        array = unmasked(values)
        if np.iscomplexobj(array):
            raise TypeError("complex numbers aren't supported")
        array = np.asarray(array, np.float64)
    except OverflowError:  # an integer beyond float64
        raise _too_large("more than 1e308") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"TiRexForecaster: expected {name} of numbers, got {values!r:.80}: {error}") from None
    if np.isinf(array).any():
        raise UsageError(f"TiRexForecaster: expected finite {name}, or NaN for missing ones, got infinite ones")
    largest = float(np.max(np.abs(array), where=~np.isnan(array), initial=0.0))
    if largest > LARGEST:
        raise _too_large(f"{largest:.3g}")
    return array


def _too_large(size: str) -> UsageError:
    return UsageError(
        f"TiRexForecaster: expected observations that float32 can hold, up to {LARGEST:.3g}, got one of size {size}: "
        "divide the series by a number"
    )
