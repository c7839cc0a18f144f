"""bfloat16, which NumPy doesn't have: the upper half of a float32, sign, exponent and 7 bits of fraction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers of bfloat16, given by their bits, as float32: the same numbers.

    Args:
        bits: any shape, uint16 of either byte order.

    >>> widened(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the bfloat16 nearest to each number, ties to even; what is one already keeps its bits.

    Beyond the largest, 3.39e38, comes infinity; a NaN stays one.

    Args:
        array: any shape, float32.

    >>> widened(rounded(np.array([1.0, 1.001, 3.14159], np.float32))).tolist()
    [1.0, 1.0, 3.140625]
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    upper = bits >> 16
    nearest = (bits + np.uint32(0x7FFF) + (upper & 1)) >> 16
    lost = np.isnan(array) & ((bits & 0xFFFF) != 0)  # whose fraction may lie in the lower half alone
    return np.where(np.isnan(array), upper | np.where(lost, np.uint32(0x40), np.uint32(0)), nearest).astype(np.uint16)


def exact(array: NDArray[np.float32]) -> bool:
    """Return whether all numbers are of bfloat16, so that none would be rounded.

    Args:
        array: any shape, float32.
    """
    return not (np.ascontiguousarray(array, np.float32).view(np.uint32) & 0xFFFF).any()


class Halves:
    """An array of bfloat16, two bytes a number; `np.asarray` gives it as float32.

    Args:
        bits: uint16, any shape.

    >>> matrix = Halves(rounded(np.full((2, 3), 0.1, np.float32)))
    >>> matrix
    Halves of shape (2, 3)
    >>> float(np.asarray(matrix)[0, 0])
    0.10009765625
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self.bits = bits
        self.shape, self.size, self.nbytes = bits.shape, bits.size, bits.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("Halves: expected a copy to be allowed: float32 takes other memory than bfloat16")
        return np.asarray(widened(self.bits), dtype)

    def __repr__(self) -> str:
        return f"Halves of shape {self.shape}"
