"""Reads values from JSON with checks: lists of numbers as arrays, and values of a given type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.formats.files import short


def array_of(where: str, value: Any, *shape: int | None) -> Array:
    """Return nested lists of numbers as an array of float64.

    Args:
        where: the place in the file, for messages.
        value: the lists.
        *shape: the shape that it must have, None for an axis of any length; left out = any shape.

    Raises:
        FormatError: other values, lists of unequal length, or another shape.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf" or not isinstance(value, list):
        raise FormatError(f"{where}: expected lists of numbers of equal length, found {short(value)}")
    fits = len(shape) == array.ndim and all(want in (None, got) for want, got in zip(shape, array.shape, strict=False))
    if shape and not fits:
        wanted = ["any" if axis is None else axis for axis in shape]
        raise FormatError(f"{where}: expected numbers {wanted}, found {list(array.shape)}")
    return array.astype(np.float64)


def value_of(where: str, found: Mapping[str, Any], key: str, kind: type | tuple[type, ...], *usual: Any) -> Any:
    """Return the value of a key after checking its type; a missing key gives the default `usual`, if there is one.

    Raises:
        FormatError: the key is missing, or its value is of another type.
    """
    if key not in found and usual:
        return usual[0]
    value = found.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join({list: "a list", dict: "an object", str: "text"}.get(one, "a number") for one in kinds)
        raise FormatError(f"{where}: expected {key} to be {names}, found {short(value) if key in found else 'none'}")
    return value
