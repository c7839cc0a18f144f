"""States of a graph, whose axes may be in any order, in a Network's layout."""

from __future__ import annotations

from cellstack.nodes.base import Array


def parted(array: Array, axes: str) -> Array:
    """Return the states `[S, B, H]` in an output whose axes are given by letters; without a B there is one row."""
    array = array.transpose(sorted(range(array.ndim), key=lambda n: "SBF".index(axes[n])))
    array = array if "B" in axes else array[..., None, :]
    return array.reshape(-1, *array.shape[-2:])
