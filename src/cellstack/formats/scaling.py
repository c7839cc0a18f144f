"""Rules of `simplify` that fold a scaling of the features into the weights of the node before or after it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import nodes
from cellstack.cells import activations
from cellstack.formats.draft import Draft
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.nodes.base import Array


def scaling(node: nodes.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the scale and the shift of a node that computes x·scale + shift; None for any other node.

    Both are `[W]`, or `[1]` if they are the same for all features.
    """
    if isinstance(node, nodes.Scale):
        return node.scale.astype(np.float64), node.shift.astype(np.float64)
    if isinstance(node, nodes.Standardise) and not node.mean.any():
        return 1.0 / node.scale.astype(np.float64), np.zeros(len(node.scale))
    if isinstance(node, nodes.Activation) and node.activation not in MORE_ACTIVATIONS:
        kind, alpha, beta = activations.activation(node.activation)
        if kind == "affine":
            return np.array([alpha]), np.array([beta])
    return None


def scaled_after(draft: Draft, name: str) -> bool:
    """Fold a scale and shift, such as a batch normalisation, into the weights of the node before it.

    This is a Dense or Conv1D without activation, or a GroupedDense.
    """
    before, found = draft.before(name), scaling(draft.nodes[name])
    if before is None or found is None:
        return False
    product = draft.nodes[before]
    if not isinstance(product, (nodes.Dense, nodes.Conv1D, nodes.GroupedDense)):
        return False
    if not isinstance(product, nodes.GroupedDense) and product.activation != "linear":
        return False
    if draft.nodes[name].dtype not in (None, product.dtype):
        return False
    scale, shift = found
    parts = (len(product.kernel), 1) if isinstance(product, nodes.GroupedDense) else ()

    def make() -> nodes.Node | None:
        width = (prod(parts) * product.kernel.shape[-1],)
        bias = np.broadcast_to(shift if product.bias is None else product.bias * scale + shift, width)
        keeps = product.bias is not None or bias.any() or (scale == 1.0).all()  # a shift by zeros is a bias too
        kernel = product.kernel * np.broadcast_to(scale, width).reshape(*parts, -1)
        made = _finite(product.kernel.dtype, kernel, bias)
        return None if made is None else replace(product, kernel=made[0], bias=made[1] if keeps else None)

    made = draft.rewritten(product, "after", draft.nodes[name], make=make)
    return made is not None and draft.fuse(before, name, made)


def scaled_before(draft: Draft, name: str) -> bool:
    """Fold a scale and shift into the weights of the Dense, the Recurrent or the Conv1D without padding after it.

    A shift without a scale stays: it may centre large numbers, which nearly cancel, and is more exact by itself.
    """
    before, node = draft.before(name), draft.nodes[name]
    found = None if before is None else scaling(draft.nodes[before])
    if before is None or found is None or draft.nodes[before].dtype not in (None, node.dtype):
        return False
    scale, shift = found
    if (scale == 1.0).all():
        return False
    fits = isinstance(node, (nodes.Dense, nodes.Recurrent, nodes.Bidirectional)) or (
        isinstance(node, nodes.Conv1D) and node.padding == "valid" and node.groups == 1
    )
    if not fits:
        return False
    made = draft.rewritten(node, "before", draft.nodes[before], make=lambda: _with_input(node, scale, shift))
    return made is not None and draft.fold(before, name, made)


def _with_input(node: nodes.Node, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> nodes.Node | None:
    """Return a node whose output for `x` is that of `node` for `x·scale + shift`; None if there is none."""
    if isinstance(node, nodes.Bidirectional):
        parts = [_with_input(part, scale, shift) for part in (node.forward, node.backward)]
        return None if None in parts else replace(node, forward=parts[0], backward=parts[1])
    if isinstance(node, nodes.Recurrent):
        cell = _cell_with_input(node.cells[0], scale, shift)
        return None if cell is None else replace(node, cells=(cell, *node.cells[1:]))
    assert isinstance(node, (nodes.Dense, nodes.Conv1D))
    sums = np.broadcast_to(shift, node.kernel.shape[-2:-1]) @ node.kernel.reshape(-1, *node.kernel.shape[-2:]).sum(0)
    bias = sums if node.bias is None else node.bias + sums
    made = _finite(node.kernel.dtype, node.kernel * scale[:, None], bias)
    keeps = node.bias is not None or shift.any()
    return None if made is None else replace(node, kernel=made[0], bias=made[1] if keeps else None)


def _cell_with_input(cell: nodes.Cell, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> nodes.Cell | None:
    if cell.spec.layer_norm or cell.spec.scalar or not cell.spec.use_kernel:
        return None  # normalises the kernel's product; isn't multiplied by the kernel; there is no kernel
    made = {"kernel": cell.kernel * scale[:, None]}
    description = cell.spec
    if shift.any():
        description = replace(cell.spec, use_bias=True)
        bias = np.zeros(description.shapes["bias"]) if cell.bias is None else cell.bias.astype(np.float64)
        bias[(0, ...) if bias.ndim == 2 else ...] += np.broadcast_to(shift, len(cell.kernel)) @ cell.kernel
        made["bias"] = bias
    found = _finite(cell.kernel.dtype, *made.values())
    return None if found is None else nodes.Cell(description, **{**cell.arrays, **dict(zip(made, found, strict=True))})


def _finite(dtype: np.dtype[Any], *arrays: NDArray[Any]) -> list[Array] | None:
    """Return arrays in a dtype; None if one overflows, as infinity times zero is NaN."""
    made = [array.astype(dtype) for array in arrays]
    return made if all(np.isfinite(array).all() for array in made) else None


def scaled_twice(draft: Draft, name: str) -> bool:
    """Combine two consecutive scales and shifts. A shift before a division becomes a Standardise."""
    before, second = draft.before(name), draft.nodes[name]
    if (
        before is None
        or not isinstance(draft.nodes[before], nodes.Scale)
        or not isinstance(second, (nodes.Scale, nodes.Standardise))
    ):
        return False
    first, found = draft.nodes[before], scaling(second)
    assert isinstance(first, nodes.Scale)
    if found is None or first.dtype != second.dtype:
        return False
    if (first.scale == 1.0).all() and first.shift.any():  # a shift may centre large numbers: see `scaled_before`
        if isinstance(second, nodes.Standardise):
            return draft.fuse(before, name, nodes.Standardise(-first.shift, second.scale))
        if not (second.scale == 1.0).all():
            return False
    scale, shift = found
    made = _finite(first.scale.dtype, first.scale * scale, first.shift * scale + shift)
    return made is not None and draft.fuse(before, name, nodes.Scale(*made))


def scaled_norm(draft: Draft, name: str) -> bool:
    """Fold a scale and shift after a layer normalisation into its gain and bias."""
    before, second = draft.before(name), draft.nodes[name]
    norm = None if before is None else draft.nodes[before]
    if before is None or not isinstance(norm, nodes.LayerNorm) or not isinstance(second, nodes.Scale):
        return False
    if norm.dtype not in (None, second.dtype):
        return False
    gain = second.scale if norm.gain is None else norm.gain * second.scale
    bias = second.shift if norm.bias is None else norm.bias * second.scale + second.shift
    made = _finite(second.scale.dtype, gain, bias)
    return made is not None and draft.fuse(before, name, nodes.LayerNorm(made[0], made[1], norm.epsilon))
