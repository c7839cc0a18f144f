"""Nodes that weigh the steps of a whole sequence: softmax over time, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import Array, CellState, Flow, Node, NodeRun, Shape, StateGradients, shown
from cellstack.nodes.checks import check_flag, check_integer, check_number

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks

Steps = NDArray[np.bool_] | None


def masked_softmax(z: Array, used: Steps, axis: int) -> Array:
    """Return the softmax of `z` along an axis over the used entries, with 0 for unused ones, even if none is used."""
    if not z.shape[axis]:
        return z
    z = z if used is None else np.where(used, z, -np.inf)
    most = z.max(axis=axis, keepdims=True)
    e = np.exp(z - np.where(np.isneginf(most), 0, most))
    total = e.sum(axis=axis, keepdims=True)
    return e / np.where(total == 0, 1, total)


def softmax_gradient(y: Array, dy: Array, axis: int) -> Array:
    """Return the gradient of the input of a softmax with the output `y`."""
    return y * (dy - (dy * y).sum(axis=axis, keepdims=True))


@dataclass(frozen=True, eq=False)
class TimeSoftmax(Node):
    """Softmax over time, for each feature: the weights of attention pooling. Masked steps have the weight 0.

    >>> TimeSoftmax().apply(np.array([[[0.0], [0.0]]]))
    array([[[0.5],
            [0.5]]])
    """

    file_type = "time_softmax"
    why_whole = "softmax over time needs the whole sequence, which a stream doesn't have"
    about = "over time"
    axes = (2, 2)
    keeps_width = True
    mixes_steps = True
    heeds_mask = True

    def apply(self, x: Array, mask: Steps = None) -> Array:
        """Return the weights for `x [B, T, W]`."""
        return masked_softmax(x, None if mask is None else mask[..., None], 1)

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        return Flow(self.apply(flow.x, flow.mask), flow.mask)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [softmax_gradient(run.y, dy, 1)]


@dataclass(frozen=True, eq=False)
class Attention(Node):
    """Scaled dot-product attention: `queries [B, S, H·D]`, `keys [B, T, H·D]`, `values [B, T, H·E]` to `[B, S, H·E]`::

        y[s] = sum over t of softmax over t (scale·queries[s]·keys[t])·values[t]      for each head

    A mask of the keys or the values excludes their steps.

    Args:
        heads: the number of heads H; the features are split into H equal blocks.
        scale: the factor of the scores; None: 1/sqrt(D).
        causal: whether step s only uses steps up to s.

    Raises:
        ValueError: heads that aren't from 1 up, or a scale that isn't a finite number.
        TypeError: a flag that isn't a bool.

    Ref: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """

    heads: int = 1
    scale: float | None = None
    causal: bool = False
    file_type = "attention"
    why_whole = "attention needs the whole sequence, which a stream doesn't have"
    inputs = 3
    axes = (2, 2)
    mixes_steps = True
    heeds_mask = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", check_integer("Attention", "heads", self.heads))
        if self.scale is not None:
            object.__setattr__(self, "scale", check_number("Attention", "scale", self.scale))
        check_flag("Attention", "causal", self.causal)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        text = ", ".join(map(shown, shapes))
        if len(shapes) != 3 or any(len(shape) != 2 for shape in shapes):
            raise ShapeError(f"{owner}: Attention expected queries, keys and values [B, T, W], got {text}")
        (_, wide), (steps, width), (count, values) = shapes
        if None not in (wide, width) and wide != width:
            raise ShapeError(f"{owner}: Attention expected queries and keys of the same width, got {text}")
        if None not in (steps, count) and steps != count:
            raise ShapeError(f"{owner}: Attention expected keys and values with the same number of steps, got {text}")
        if any(size is not None and size % self.heads for size in (wide, width, values)):
            raise ShapeError(f"{owner}: Attention expected widths divisible by heads={self.heads}, got {text}")
        return (shapes[0][0], values)

    def _split(self, x: Array) -> Array:
        """Return `[B, H, T, W/H]` for `x [B, T, W]`."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

    def _joined(self, x: Array) -> Array:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(len(x), x.shape[2], -1)

    def _factor(self, queries: Array) -> Any:
        width = queries.shape[-1] // self.heads
        return queries.dtype.type(1 / np.sqrt(max(1, width)) if self.scale is None else self.scale)

    def _weights(self, queries: Array, keys: Array, mask: Steps) -> Array:
        """Return the weights `[B, H, S, T]`."""
        scores = np.matmul(self._split(queries * self._factor(queries)), self._split(keys).transpose(0, 1, 3, 2))
        used = None if mask is None else mask[:, None, None]
        if self.causal:
            past = np.tri(*scores.shape[2:], dtype=bool)
            used = past if used is None else used & past
        return masked_softmax(scores, used, -1)

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        queries, keys, values = (flow.x for flow in flows)
        weights = self._weights(queries, keys, self._used(flows))
        return Flow(self._joined(np.matmul(weights, self._split(values))), flows[0].mask)

    def _used(self, flows: Sequence[Flow]) -> Steps:
        masks = [flow.mask for flow in flows[1:] if flow.mask is not None]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        queries, keys, values = (flow.x for flow in run.inputs)
        weights, dy = self._weights(queries, keys, self._used(run.inputs)), self._split(dy)
        dscores = softmax_gradient(weights, np.matmul(dy, self._split(values).transpose(0, 1, 3, 2)), -1)
        dscores *= self._factor(queries)
        dqueries = np.matmul(dscores, self._split(keys))
        dkeys = np.matmul(dscores.transpose(0, 1, 3, 2), self._split(queries))
        dvalues = np.matmul(weights.transpose(0, 1, 3, 2), dy)
        return [self._joined(found) for found in (dqueries, dkeys, dvalues)]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        return masks[0]

    @property
    def summary(self) -> str:
        words = [f"{self.heads} head{'s' if self.heads > 1 else ''}"]
        words += [] if self.scale is None else [f"scale {self.scale:g}"]
        return ", ".join([*words, *(["causal"] if self.causal else [])])
