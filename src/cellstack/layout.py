"""The one place where gates are put in order: from other formats' layouts to ours, and back.

Ours: columns `[n, G·H]`, a block of H a gate, in the order of `cellstack.spec.GATES`; one bias `[G·H]`, but for a GRU
whose reset gate acts after the recurrent product two, `[2, 3H]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.spec import GATES, ShapeError

Array = NDArray[Any]
OURS = {kind: "".join(gates) for kind, gates in GATES.items()}


class CellArrays(NamedTuple):
    """A cell's arrays in our layout: `[I, G·H]`, `[P, G·H]`, and `[G·H]`, `[2, G·H]` or None."""

    kernel: Array
    recurrent_kernel: Array
    bias: Array | None


def reorder(array: Array, source: str, target: str, axis: int = -1) -> Array:
    """Return `array` with its gate blocks along `axis` in another order.

    Args:
        array: an axis of it holds a block of H numbers a gate.
        source: the order it comes in, a letter a gate.
        target: the order wanted, a permutation of `source`.
        axis: which axis.

    Returns:
        A new array of the same shape and dtype.

    Raises:
        ShapeError: the axis doesn't hold a block a gate, all equal.
        ValueError: orders that aren't permutations of each other.

    >>> reorder(np.array([0, 1, 2, 3]), source="iofg", target="ifgo").tolist()
    [0, 2, 3, 1]
    """
    if sorted(source) != sorted(target) or len(set(source)) != len(source):
        raise ValueError(f"reorder: expected a permutation of {target}, got {source!r}")
    if array.shape[axis] % len(source):
        raise ShapeError(f"reorder: expected {len(source)} equal blocks along axis {axis}, got {array.shape}")
    blocks = np.split(array, len(source), axis=axis)
    return np.concatenate([blocks[source.index(gate)] for gate in target], axis=axis)


def from_rows(
    kind: str, weight: Array, recurrent: Array, biases: tuple[Array, ...], order: str, reset_after: bool = True
) -> CellArrays:
    """Return our arrays for a cell held as rows: `[G·H, I]`, `[G·H, P]`, and biases `[G·H]`.

    Args:
        kind: "lstm", "gru" or "rnn".
        weight: `[G·H, I]`, what the input is multiplied by.
        recurrent: `[G·H, P]`, what h_prev is multiplied by.
        biases: each `[G·H]`; none where the cell has no bias. They add up, but for a GRU with `reset_after`: that has
            two, of the input's product and of the recurrent one, and keeps them apart.
        order: of the gate blocks, a permutation of the kind's gates.
        reset_after: whether a GRU's reset gate acts after the recurrent product.

    Returns:
        The arrays in our layout, of the same dtype.

    Raises:
        ShapeError: an axis that doesn't hold a block a gate, all equal.
        ValueError: another order.
    """
    ours, bias = OURS[kind], None
    if biases:
        together = np.stack(biases) if kind == "gru" and reset_after else sum(biases[1:], start=biases[0])
        bias = reorder(together, order, ours)
    return CellArrays(reorder(weight, order, ours, axis=0).T, reorder(recurrent, order, ours, axis=0).T, bias)


def to_rows(kind: str, arrays: CellArrays, order: str) -> tuple[Array, Array, Array | None]:
    """Return a cell's arrays as rows: the inverse of `from_rows`, biases as we have them.

    Args:
        kind: "lstm", "gru" or "rnn".
        arrays: in our layout.
        order: wanted of the gate blocks, a permutation of the kind's gates.

    Returns:
        `(weight [G·H, I], recurrent [G·H, P], bias [G·H], [2, G·H] or None)`.
    """
    ours = OURS[kind]
    bias = None if arrays.bias is None else reorder(arrays.bias, ours, order)
    return reorder(arrays.kernel, ours, order).T, reorder(arrays.recurrent_kernel, ours, order).T, bias


def from_cudnn(kind: str, kernel: Array, recurrent: Array, bias: Array) -> CellArrays:
    """Return our arrays for a cell of Keras's CuDNNLSTM or CuDNNGRU.

    Its gates stand in our order. Each gate's block of a kernel is kept as cuDNN has it, `[H, n]`, row by row: of the
    input's kernel under the shape `[n, H]`. The two biases lie one after the other.

    Args:
        kind: "lstm" or "gru"; the GRU's reset gate acts after the recurrent product.
        kernel: `[I, G·H]`.
        recurrent: `[H, G·H]`.
        bias: `[2·G·H]`.

    Returns:
        The arrays in our layout.

    Raises:
        ShapeError: an axis that doesn't hold a block a gate, all equal.
    """
    gates = len(OURS[kind])
    if kernel.shape[1] % gates or recurrent.shape != (kernel.shape[1] // gates, kernel.shape[1]) or bias.ndim != 1:
        raise ShapeError(f"from_cudnn: expected {gates} equal blocks, got {kernel.shape} and {recurrent.shape}")
    turned = [block.reshape(block.shape[::-1]).T for block in np.split(kernel, gates, axis=1)]
    crossed = [block.T for block in np.split(recurrent, gates, axis=1)]
    biases = bias.reshape(2, -1)
    together = biases if kind == "gru" else biases[0] + biases[1]
    return CellArrays(np.concatenate(turned, axis=1), np.concatenate(crossed, axis=1), together)
