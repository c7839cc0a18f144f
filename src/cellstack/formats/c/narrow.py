"""Matrices in int8 or bfloat16 in C: their numbers, and functions that compute the bits of the kernel's streams.

The order of sums, the roundings and the fused multiply-adds are those of kernel/narrow.h and kernel/vec.h: two chains
per unit and gate, over x and over h. Other arrays remain float32, as in a stream.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import rounded
from cellstack.network import Network
from cellstack.nodes.base import Array
from cellstack.nodes.cell_arrays import WEIGHTS, check_narrow
from cellstack.nodes.checks import check_choice
from cellstack.nodes.dense import Dense


class Narrow(NamedTuple):
    """A format: the C types of its weights and of a vector that is multiplied by them, and its functions."""

    name: str
    weights: str
    row: str
    bytes_each: int  # of a weight
    scaled: bool  # whether each column has a scale; then a row has as many bytes as numbers
    helpers: dict[str, str]

    def members(self, name: str) -> list[tuple[str, str]]:
        """Return the arrays of a matrix: the C type and the name of each."""
        return [(self.weights, name), *([("float", f"{name}_scales")] if self.scaled else [])]

    def columns(self, matrix: Array) -> tuple[list[list[str]], Array | None]:
        """Return the numbers of each column of a matrix `[m, n]` as C, and the scales `[n]` if the format has them."""
        if self.scaled:
            numbers, scales = quantised(matrix)
            return [[str(number) for number in column] for column in numbers.T.tolist()], scales
        bits = rounded(np.ascontiguousarray(matrix.T, np.float32))
        return [[f"0x{number:04x}" for number in column] for column in bits.tolist()], None


def quantised(matrix: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a matrix as integers from -127 to 127, and the scale of each column; NaN if a number in it isn't finite.

    Args:
        matrix: `[m, n]`, float32.

    Returns:
        `[m, n]` and `[n]`.

    >>> quantised(np.array([[1, 0], [-2, 0]], np.float32))[0].tolist()
    [[64, 0], [-127, 0]]
    """
    with np.errstate(all="ignore"):
        scales = np.abs(matrix).max(axis=0, initial=0.0) / np.float32(127)
        check = (matrix * np.float32(0)).sum(axis=0)
        some = (scales > 0) & (check == 0)
        steps = np.rint(matrix / np.where(some, scales, np.float32(1)))
    return np.where(some, steps, 0).astype(np.int8), np.where(check == 0, scales, np.float32(np.nan))


def format_of(network: Network, weights: str | None) -> Narrow | None:
    """Return the format of the matrices; None: that of the other arrays.

    Args:
        network: the network.
        weights: one of `WEIGHTS`; None: as the network stores them.

    Raises:
        ValueError: an unknown format; int8 with so many features or units that integer sums could overflow.
        TypeError: a narrow format for a float64 network.
    """
    if weights is None:
        weights = network.weights if network.weights == "bfloat16" else "float32"
    check_choice("export_c", "weights", weights, WEIGHTS)
    if weights == "float32":
        return None
    if network.dtype != np.float32:
        raise TypeError(f"export_c: expected a float32 network for weights={weights!r}, got {network.dtype}")
    depths = [max(cell.spec.input_size, cell.spec.units) for cell in network.cells]
    depths += [node.kernel.shape[0] for node in network.nodes if isinstance(node, Dense)]
    for depth in depths:
        check_narrow("export_c", weights, network.dtype, depth)
    return FORMATS[weights]


def functions(file: str) -> dict[str, str]:
    """Return the C functions in a file of this folder by name, each with the empty line before it."""
    parts = resources.files("cellstack.formats.c").joinpath(file).read_text("ascii").rstrip().split("\n\n")[1:]
    return {re.findall(r"^static .*\$\{name\}_(\w+)\(", part, re.MULTILINE)[0]: f"\n{part}\n" for part in parts}


FORMATS = {
    "bfloat16": Narrow("bfloat16", "uint16_t", "float", 2, False, functions("bfloat16.c") | functions("exact.c")),
    "int8": Narrow("int8", "int8_t", "int8_t", 1, True, functions("int8.c") | functions("exact.c")),
}
