"""bfloat16 for NumPy, which lacks it: the upper 16 bits of a float32, that is sign, exponent and 7 bits of fraction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Convert bfloat16 values, given as bits, to float32. This is exact.

    Args:
        bits: any shape, uint16 of either byte order.

    >>> widened(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 values to the nearest bfloat16, ties to even, and return the bits.

    Values above the largest bfloat16, 3.39e38, become infinity; NaN stays NaN; exact bfloat16 values keep their bits.

    Args:
        array: any shape, float32.

    >>> widened(rounded(np.array([1.0, 1.001, 3.14159], np.float32))).tolist()
    [1.0, 1.0, 3.140625]
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    made = bits >> 16
    made &= 1
    made += 0x7FFF
    made += bits
    made >>= 16
    nan = np.isnan(array)
    if nan.any():
        lost = (bits[nan] & 0xFFFF) != 0  # the fraction may be in the lower 16 bits only
        made[nan] = (bits[nan] >> 16) | np.where(lost, np.uint32(0x40), np.uint32(0))
    return made.astype(np.uint16)


def exact(array: NDArray[np.float32]) -> bool:
    """Return whether all values are exact in bfloat16, so that rounding changes none.

    Args:
        array: any shape, float32.
    """
    return not (np.ascontiguousarray(array, np.float32).view(np.uint32) & 0xFFFF).any()


class BFloat16Array:
    """An array of bfloat16 values, two bytes each; `np.asarray` converts it to float32.

    Args:
        bits: uint16, any shape.

    >>> matrix = BFloat16Array(rounded(np.full((2, 3), 0.1, np.float32)))
    >>> matrix
    BFloat16Array of shape (2, 3)
    >>> float(np.asarray(matrix)[0, 0])
    0.10009765625
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self.bits = bits
        self.shape, self.size, self.nbytes = bits.shape, bits.size, bits.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("BFloat16Array: conversion to float32 needs a copy, got copy=False")
        return np.asarray(widened(self.bits), dtype)

    def __repr__(self) -> str:
        return f"BFloat16Array of shape {self.shape}"
