"""Outputs and states of a graph, whose axes may be in any order, in a Network's layout."""

from __future__ import annotations

from cellstack.nodes.base import Array


def ordered(array: Array, axes: str, batch: int) -> Array:
    """Return an output in a Network's layout: rows, steps, then features with the directions concatenated.

    Args:
        array: the runtime's output.
        axes: a letter for each of its axes, as our reader records them; `N` is rows and steps merged. If features come
            before steps, or an axis of length 1 is next to the features, the network's output has that layout too.
        batch: the number of rows.
    """
    if len(axes) != array.ndim or not axes or not set(axes) <= set("BTFD1N"):
        return array
    if "N" in axes and array.shape[at := axes.index("N")] % batch == 0:
        array = array.reshape(*array.shape[:at], batch, -1, *array.shape[at + 1 :])
        axes = axes.replace("N", "BT")
    if axes in ("B1F", "BF1") or "N" in axes:
        return array
    if axes.replace("1", "") in ("BFT", "FT"):
        array = array.reshape([size for size, axis in zip(array.shape, axes, strict=True) if axis != "1"])
        return array if "B" in axes else array[None]
    order = sorted(range(array.ndim), key=lambda n: "BT1DF".index(axes[n]))
    array = array.transpose(order)
    kept = sum(axis in "BT" for axis in axes)
    if "1" in axes or "D" in axes or axes == "B":  # one number per row is one feature in a Network
        array = array.reshape(*array.shape[:kept], -1)
    return array if "B" in axes else array[None]


def parted(array: Array, axes: str) -> Array:
    """Return the states `[S, B, H]` in an output whose axes are given by letters; without a B there is one row."""
    array = array.transpose(sorted(range(array.ndim), key=lambda n: "SBF".index(axes[n])))
    array = array if "B" in axes else array[..., None, :]
    return array.reshape(-1, *array.shape[-2:])
