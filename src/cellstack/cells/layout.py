"""Conversion between our array layout and those of other formats: the only place where gates are reordered.

Our layout: columns `[n, G·H]`, a block of H per gate, in the order of `spec.GATES`; one bias `[G·H]`, or two,
`[2, 3H]`, for a GRU with `reset_after`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells import KINDS
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import GATES

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
        array: has a block of H numbers per gate along `axis`.
        source: its order of gates, one letter per gate.
        target: the new order, a permutation of `source`.
        axis: the axis of the gate blocks.

    Returns:
        A new array of the same shape and dtype.

    Raises:
        ShapeError: the axis can't be split into equal blocks, one per gate.
        ValueError: the orders aren't permutations of each other.

    >>> reorder(np.array([0, 1, 2, 3]), source="iofg", target="ifgo").tolist()
    [0, 2, 3, 1]
    """
    if sorted(source) != sorted(target) or len(set(source)) != len(source):
        raise ValueError(f"reorder: expected a permutation of {target}, got {source!r}")
    if array.shape[axis] % len(source):
        raise ShapeError(f"reorder: expected {len(source)} equal blocks along axis {axis}, got {array.shape}")
    blocks = np.split(array, len(source), axis=axis)
    return np.concatenate([blocks[source.index(gate)] for gate in target], axis=axis)


def block_diagonal(matrices: Array, gates: int) -> Array:
    """Return a recurrent kernel of several heads as one matrix, which is zero outside the heads' blocks.

    Args:
        matrices: `[heads, P/heads, G·H/heads]`, of any dtype.
        gates: the number of gates G.

    Returns:
        `[P, G·H]` of the same dtype.

    >>> block_diagonal(np.array([[[1, 2]], [[3, 4]]]), gates=2).tolist()
    [[1, 0, 2, 0], [0, 3, 0, 4]]
    """
    heads, rows, columns = matrices.shape
    whole = np.zeros((heads, rows, gates, heads, columns // gates), matrices.dtype)
    own = np.arange(heads)
    whole[own, :, :, own] = matrices.reshape(heads, rows, gates, -1)
    return whole.reshape(heads * rows, heads * columns)


def from_rows(
    kind: str, weight: Array, recurrent: Array, biases: tuple[Array, ...], order: str, reset_after: bool = True
) -> CellArrays:
    """Convert arrays with gates as rows, `[G·H, I]`, `[G·H, P]` and biases `[G·H]`, to our layout.

    Args:
        kind: a kind that the other format has too.
        weight: `[G·H, I]`, the kernel.
        recurrent: `[G·H, P]`, the recurrent kernel.
        biases: each `[G·H]`; empty if the cell has no bias. They are added, except for a GRU with `reset_after`, which
            has two biases, of the kernel and of the recurrent kernel.
        order: the order of the gate blocks, a permutation of the kind's gates.
        reset_after: whether a GRU's reset gate acts after the recurrent product.

    Returns:
        The arrays in our layout, of the same dtype.

    Raises:
        ShapeError: an axis can't be split into equal blocks, one per gate.
        ValueError: the order isn't a permutation of the kind's gates.
    """
    ours, bias = OURS[kind], None
    if biases:
        two = reset_after and "reset_after" in KINDS[kind].settings
        together = np.stack(biases) if two else sum(biases[1:], start=biases[0])
        bias = reorder(together, order, ours)
    return CellArrays(reorder(weight, order, ours, axis=0).T, reorder(recurrent, order, ours, axis=0).T, bias)


def to_rows(kind: str, arrays: CellArrays, order: str) -> tuple[Array, Array, Array | None]:
    """Convert arrays from our layout to gates as rows: the inverse of `from_rows`, except that biases stay added.

    Args:
        kind: a kind that the other format has too.
        arrays: in our layout.
        order: the order of the gate blocks in the result, a permutation of the kind's gates.

    Returns:
        `(weight [G·H, I], recurrent [G·H, P], bias [G·H], [2, G·H] or None)`.
    """
    ours = OURS[kind]
    bias = None if arrays.bias is None else reorder(arrays.bias, ours, order)
    return reorder(arrays.kernel, ours, order).T, reorder(arrays.recurrent_kernel, ours, order).T, bias


def from_cudnn(kind: str, kernel: Array, recurrent: Array, bias: Array) -> CellArrays:
    """Convert the arrays of Keras's CuDNNLSTM or CuDNNGRU to our layout.

    The gates are in our order. Each gate's block of a kernel is stored as in cuDNN, `[H, n]`, row by row; blocks of the
    input kernel are declared as `[n, H]`. The two biases are concatenated.

    Args:
        kind: "lstm" or "gru"; the GRU's reset gate acts after the recurrent product.
        kernel: `[I, G·H]`.
        recurrent: `[H, G·H]`.
        bias: `[2·G·H]`.

    Returns:
        The arrays in our layout.

    Raises:
        ShapeError: an axis can't be split into equal blocks, one per gate.
    """
    gates = len(OURS[kind])
    if kernel.shape[1] % gates or recurrent.shape != (kernel.shape[1] // gates, kernel.shape[1]) or bias.ndim != 1:
        raise ShapeError(f"from_cudnn: expected {gates} equal blocks, got {kernel.shape} and {recurrent.shape}")
    turned = [block.reshape(block.shape[::-1]).T for block in np.split(kernel, gates, axis=1)]
    crossed = [block.T for block in np.split(recurrent, gates, axis=1)]
    biases = bias.reshape(2, -1)
    together = biases if "reset_after" in KINDS[kind].settings else biases[0] + biases[1]
    return CellArrays(np.concatenate(turned, axis=1), np.concatenate(crossed, axis=1), together)
