"""The rates of sampled sequences, by their times, and resampling to one rate. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError

Floats = NDArray[np.float64]
SAME = 1.05  # ratio up to which two rates count as one
NEAR = 1e-6  # of a step: as near, a new step is an old one, with its exact values
MOST = 100  # new steps for each old one
SHOWN = 3  # rates that are listed


def as_numbers(times: NDArray) -> Floats:
    """Return times as numbers; those of dates in seconds since the first one."""
    return (times - times.min()) / np.timedelta64(1, "s") if times.dtype.kind == "M" else times.astype(np.float64)


def differing(times: Sequence[Floats], column: str, unit: str) -> str:
    """Return a sentence on the time between the steps of sequences if it isn't the same in all; else "".

    Args:
        times: of each sequence, ascending.
        column: their name.
        unit: " s" for dates.
    """
    steps = [float(np.median(np.diff(own))) for own in times if len(own) > 1]
    if not steps or max(steps) <= SAME * min(steps):
        return ""
    counts = Counter(f"{step:.2g}{unit}" for step in sorted(steps))
    each = f"from {min(steps):.2g} to {max(steps):.2g}{unit}"
    if len(counts) <= SHOWN:
        each = " and ".join(f"{step} in {count:,} sequence{'s' * (count != 1)}" for step, count in counts.items())
    return f"the median time between steps, by {column!r}, differs: {each}; `resample=…` interpolates at one rate"


def resampled(
    x: Sequence[Floats], times: Sequence[Floats], step: float
) -> tuple[list[Floats], list[NDArray[np.int64]]]:
    """Interpolate sequences linearly, with `step` between the new times, from the first one of each.

    Args:
        x: `[T, C]` each; between a missing value and another one, NaN, new values are missing too.
        times: `[T]` each, ascending.
        step: in the unit of the times.

    Returns:
        The new sequences, and the nearest old step of each new one.

    Raises:
        UsageError: `step` isn't a positive number, or far too small.
    """
    if isinstance(step, bool) or not isinstance(step, (int, float, np.number)) or not 0 < step < np.inf:
        raise UsageError(f"expected `resample=…` to be the time between steps, a number above 0, got {step!r}")
    counts = [int((own[-1] - own[0]) / step + NEAR) + 1 for own in times]
    rows = sum(map(len, times))
    if sum(counts) > MOST * rows:
        raise UsageError(
            f"expected `resample=…` in the unit of the times (dates: seconds), got {step}, which makes {sum(counts):,} "
            f"steps of {rows:,}"
        )
    found, places = [], []
    for values, own, count in zip(x, times, counts, strict=True):
        grid = own[0] + step * np.arange(count)
        after = np.searchsorted(own, grid).clip(max=len(own) - 1)
        before = (after - 1).clip(min=0)
        nearest = np.where(grid - own[before] <= own[after] - grid, before, after)
        grid = np.where(np.abs(grid - own[nearest]) <= NEAR * step, own[nearest], grid)
        found.append(np.stack([np.interp(grid, own, channel) for channel in values.T], axis=1))
        places.append(nearest)
    return found, places
