"""Helpers on the values of a trace: single ones and several, and indices of rows, steps and units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellstack.nodes.base import Array

Index = slice | Sequence[int] | Array | int | None


def as_tuple(value: Any) -> tuple[Array, ...]:
    """Return the values of a node with one or several: always a tuple."""
    return value if isinstance(value, tuple) else (value,)


def alone(values: tuple[Array, ...]) -> Any:
    """Return several values as a tuple, a single one as itself."""
    return values[0] if len(values) == 1 else values


def places_of(what: str, index: Index, length: int) -> Any:
    """Return an index that keeps the axis: a slice, or an array of indices."""
    if index is None:
        return slice(None)
    if isinstance(index, slice):
        try:
            index.indices(length)
        except TypeError:
            raise IndexError(f"expected {what} as a slice of whole numbers, got {index}") from None
        return index
    try:
        places = np.asarray(index)
    except ValueError:
        places = np.empty((0, 0))
    if places.dtype == bool and places.shape == (length,):
        return np.flatnonzero(places)
    if places.ndim > 1 or (places.size and places.dtype.kind not in "iu"):
        raise IndexError(f"expected {what} as a slice, a number, numbers, or {length} flags, got {index!r:.80}")
    places = places.reshape(-1).astype(np.int64)
    beyond = places[(places < -length) | (places >= length)]
    if beyond.size:
        raise IndexError(f"expected {what} from 0 to {length - 1}, got {beyond[0]}")
    return places


def shape_text(value: Any) -> str:
    """Return the shapes of one value or several."""
    return ", ".join(str(list(one.shape)) for one in as_tuple(value))


def rows_of(array: Array, taken: Array) -> Array:
    """Return some rows of an array; for all rows, the array itself, so that duplicates are recognised."""
    return array if np.array_equal(taken, np.arange(len(array))) else array[taken]
