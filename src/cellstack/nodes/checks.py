"""Checks of the arguments of nodes: arrays, flags and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import DTYPES

BLOCK = 128  # columns of a transposed matrix that are copied at once
MOST = 2**31 - 1  # the largest count, such as of steps: no machine holds more, and sums of lengths stay exact


def frozen_copy(owner: str, name: str, value: Any, shape: Sequence[int | str]) -> NDArray[Any]:
    """Return a private, contiguous, read-only copy of `value`, float32 or float64.

    Args:
        owner: the node, for error messages.
        name: the array's name, for error messages.
        value: array-like of floats.
        shape: for each axis its required length, or a letter for any length from 1.

    Returns:
        The copy, with the dtype of `value`.

    Raises:
        TypeError: the dtype isn't float32 or float64.
        ShapeError: the shape doesn't match `shape`.
    """
    array = np.asarray(value)
    if array.dtype.name not in DTYPES:
        raise TypeError(f"{owner}: expected {name} in {' or '.join(DTYPES)}, got {array.dtype}")
    return _frozen(owner, name, array, shape)


def frozen_bfloat16(owner: str, name: str, value: BFloat16Array, shape: Sequence[int | str]) -> BFloat16Array:
    """Return a private, read-only copy of an array of bfloat16; see `frozen_copy`."""
    if value.bits.dtype != np.uint16:
        raise TypeError(f"{owner}: expected the bits of {name} as uint16, got {value.bits.dtype}")
    return BFloat16Array(_frozen(owner, name, value.bits, shape))


def _frozen(owner: str, name: str, array: NDArray[Any], shape: Sequence[int | str]) -> NDArray[Any]:
    fits = len(shape) == array.ndim and all(
        got >= 1 if isinstance(want, str) else got == want for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{owner}: expected {name} [{', '.join(map(str, shape))}], got {array.shape}")
    made = np.empty(array.shape, array.dtype.newbyteorder("="))
    if array.ndim == 2 and array.flags.f_contiguous:  # five times as fast by blocks, which fit into the cache
        for start in range(0, array.shape[1], BLOCK):
            made[:, start : start + BLOCK] = array[:, start : start + BLOCK]
    else:
        made[...] = array
    made.setflags(write=False)
    return made


def one_dtype(owner: str, arrays: Mapping[str, NDArray[Any] | None]) -> np.dtype[Any]:
    """Return the common dtype of the arrays; the `TypeError` names the first one that differs."""
    (first, head), *rest = ((name, array) for name, array in arrays.items() if array is not None)
    for name, array in rest:
        if array.dtype != head.dtype:
            raise TypeError(f"{owner}: expected {name} in {head.dtype}, as {first} is, got {array.dtype}")
    return head.dtype


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: expected {name} to be True or False, got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: expected {name} to be one of {', '.join(choices)}, got {value!r}")


def check_integer(owner: str, name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; `ValueError` unless it is an integer from `least` to 2^31 - 1."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= MOST:
        raise ValueError(f"{owner}: expected {name} to be an integer from {least} to {MOST}, got {value!r:.80}")
    return int(value)


def check_number(owner: str, name: str, value: Any, above: float | None = None) -> float:
    """Return `value` as a float; `ValueError` unless it is a finite real number, greater than `above` if given."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not np.isfinite(value) or (above is not None and value <= above):
        bound = "" if above is None else f" above {above:g}"
        raise ValueError(f"{owner}: expected {name} to be a finite number{bound}, got {value!r:.80}")
    return float(value)
