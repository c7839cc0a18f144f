"""The one place where gates are put in order: from other formats' layouts to ours, and back.

Ours: columns `[n, 4H]`, blocks in the order i, f, g, o, one bias `[4H]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.spec import GATES, ShapeError

Array = NDArray[Any]
OURS = "".join(GATES)


class CellArrays(NamedTuple):
    """A cell's arrays in our layout: `[I, 4H]`, `[H, 4H]`, `[4H]` or None."""

    kernel: Array
    recurrent_kernel: Array
    bias: Array | None


def reorder(array: Array, source: str, target: str = OURS, axis: int = -1) -> Array:
    """Return `array` with its four gate blocks along `axis` in another order.

    Args:
        array: an axis of it holds 4H numbers, a block of H a gate.
        source: the order it comes in, a permutation of "ifgo".
        target: the order wanted.
        axis: which axis.

    Returns:
        A new array of the same shape and dtype.

    Raises:
        ShapeError: the axis doesn't hold four equal blocks.
        ValueError: an order that isn't a permutation of "ifgo".

    >>> reorder(np.array([0, 1, 2, 3]), source="iofg").tolist()
    [0, 2, 3, 1]
    """
    for order in (source, target):
        if sorted(order) != sorted(OURS):
            raise ValueError(f"reorder: expected a permutation of {OURS}, got {order!r}")
    if array.shape[axis] % 4:
        raise ShapeError(f"reorder: expected four equal blocks along axis {axis}, got {array.shape}")
    blocks = np.split(array, 4, axis=axis)
    return np.concatenate([blocks[source.index(gate)] for gate in target], axis=axis)


def from_rows(weight: Array, recurrent: Array, biases: tuple[Array, ...], order: str) -> CellArrays:
    """Return our arrays for a cell held as rows: `[4H, I]`, `[4H, H]`, and biases `[4H]` that add up.

    Args:
        weight: `[4H, I]`, what the input is multiplied by.
        recurrent: `[4H, H]`, what h_prev is multiplied by.
        biases: each `[4H]`; none where the cell has no bias.
        order: of the gate blocks, a permutation of "ifgo".

    Returns:
        The arrays in our layout, of the same dtype.

    Raises:
        ShapeError: an axis that doesn't hold four equal blocks.
    """
    bias = reorder(sum(biases[1:], start=biases[0]), order) if biases else None
    return CellArrays(reorder(weight, order, axis=0).T, reorder(recurrent, order, axis=0).T, bias)


def to_rows(arrays: CellArrays, order: str) -> tuple[Array, Array, Array | None]:
    """Return a cell's arrays as rows: the inverse of `from_rows` for one bias.

    Args:
        arrays: in our layout.
        order: wanted of the gate blocks, a permutation of "ifgo".

    Returns:
        `(weight [4H, I], recurrent [4H, H], bias [4H] or None)`.
    """
    bias = None if arrays.bias is None else reorder(arrays.bias, OURS, order)
    return reorder(arrays.kernel, OURS, order).T, reorder(arrays.recurrent_kernel, OURS, order).T, bias
