"""How far two answers are apart: the measure of every comparison of a network with what it was read from."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack.nodes.base import Array


def apart(ours: Any, theirs: Any) -> tuple[Array, float]:
    """Return the differences of two arrays, and the largest finite magnitude of `theirs`.

    Where both are NaN, or the same infinity, they don't differ; where only one is, they differ infinitely.

    Args:
        ours, theirs: numbers of the same shape.

    Returns:
        The absolute differences in float64, of the same shape, and the magnitude; 0.0 without finite numbers.

    >>> differences, largest = apart(np.array([1.0, np.nan, 3.0]), np.array([1.5, np.nan, -4.0]))
    >>> differences.tolist(), largest
    ([0.5, 0.0, 7.0], 4.0)
    """
    a, b = np.asarray(ours), np.asarray(theirs)
    wide = np.result_type(a, b, np.float64)
    a, b = a.astype(wide), b.astype(wide)
    with np.errstate(invalid="ignore"):
        found = np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf)
    found = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, found)
    return found, float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
