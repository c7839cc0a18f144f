"""A cell's step in torch, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cellstack.cells.spec import Spec


def clipped(z: Tensor, low: float, high: float) -> Tensor:
    """Clip `z` to `low` and `high`; the gradient at the ends is 0, as beyond them (that of torch.clamp is 1)."""
    return torch.where((z > low) & (z < high), z, z.detach().clamp(low, high))


class TorchOps:
    """See `cellstack.cells.base.Ops`; vectors are tensors `[B, …]`, or `[B, T, …]` for all steps at once.

    Args:
        spec: the cell.
        arrays: its arrays by name.
        activations: the function of each of `spec.slots`.
        drop: `[B, P]`, the mask of recurrent dropout; None for none.
    """

    def __init__(
        self,
        spec: Spec,
        arrays: Mapping[str, Tensor],
        activations: Sequence[Callable[[Tensor], Tensor]],
        drop: Tensor | None,
    ) -> None:
        self.spec: Any = spec
        self.arrays, self.drop = arrays, drop
        self.activations = dict(zip(spec.slots, activations, strict=True))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a + b`."""
        return a + b

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a - b`."""
        return a - b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a⊙b`."""
        return a * b

    def exp(self, v: Tensor) -> Tensor:
        """Return `e^v`."""
        return torch.exp(v)

    def log_sigmoid(self, v: Tensor) -> Tensor:
        """Return `log σ(v)`."""
        return functional.logsigmoid(v)

    def maximum(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the larger of `a` and `b`."""
        return torch.maximum(a, b)

    def record(self, name: str, v: Tensor) -> Tensor:
        """Return `v`."""
        return v

    def product(self, v: Tensor, name: str, part: slice | int | None = None) -> Tensor:
        """Return the matrix product."""
        matrix = self.arrays[name]
        if isinstance(part, int):
            return v @ matrix[part]
        if matrix.ndim == 3:
            return self._by_heads(v, matrix, part)
        if part is not None:
            matrix = matrix[:, part.start * self.spec.units : part.stop * self.spec.units]
        return v @ matrix

    def _by_heads(self, v: Tensor, matrix: Tensor, gates: slice | None) -> Tensor:
        heads, rows, _ = matrix.shape
        matrices = matrix.reshape(heads, rows, len(self.spec.gates), -1)[:, :, gates or slice(None)]
        return torch.einsum("...jk,jkgu->...gju", v.unflatten(-1, (heads, rows)), matrices).flatten(-3)

    def weight(self, name: str, row: int | None = None) -> Tensor:
        """Return a vector of weights."""
        return self.arrays[name] if row is None else self.arrays[name][row]

    def split(self, v: Tensor, count: int) -> Sequence[Tensor]:
        """Return the blocks of a vector."""
        return v.chunk(count, dim=-1)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a / b`."""
        return a / b

    def one_minus(self, v: Tensor) -> Tensor:
        """Return `1 - v`."""
        return 1.0 - v

    def select(self, test: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Return `a` where `test` isn't 0, else `b` or 0."""
        return torch.where(test != 0.0, a, 0.0 if b is None else b)

    def clip(self, v: Tensor, bound: float | None) -> Tensor:
        """Return `v` clipped to ±bound."""
        return v if bound is None else clipped(v, -bound, bound)

    def norm(self, v: Tensor, blocks: Sequence[int] = (1,)) -> Tensor:
        """Return `v` normalised, block by block."""
        widths = [count * self.spec.units for count in blocks]
        parts = v.split(widths, dim=-1) if len(widths) > 1 else (v,)
        return torch.cat([functional.layer_norm(p, p.shape[-1:], eps=self.spec.norm_epsilon) for p in parts], dim=-1)

    def gate(self, name: str, z: Tensor) -> Tensor:
        """Return a gate."""
        return self.activations[name](self.clip(z, self.spec.clip))

    def activation(self, slot: str, v: Tensor) -> Tensor:
        """Return an activation."""
        return self.activations[slot](v)

    def dropped(self, v: Tensor) -> Tensor:
        """Return h or the candidate after recurrent dropout."""
        return v if self.drop is None else v * self.drop

    def features(self, x: Tensor) -> Tensor:
        """Return the columns of x that the kernel multiplies."""
        return x[..., :-1]

    def scalar(self, x: Tensor) -> Tensor:
        """Return the last column of x."""
        return x[..., -1:]

    def absolute(self, v: Tensor) -> Tensor:
        """Return `|v|`."""
        return v.abs()

    def affine(self, v: Tensor, factor: float = 1.0, offset: float = 0.0) -> Tensor:
        """Return `factor·v + offset`."""
        return v * factor + offset

    def parts(self, x: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[Tensor]:
        """Return parts of x by head."""
        parts = x.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes.values(), strict=True)]

    def joined(self, v: Tensor) -> Tensor:
        """Return the vectors of all heads as one."""
        return v.flatten(-2)

    def scaled(self, v: Tensor, s: Tensor, axes: int = 1) -> Tensor:
        """Return vectors or matrices times numbers."""
        return v * s[(..., *[None] * axes)]

    def divided(self, v: Tensor, s: Tensor) -> Tensor:
        """Return vectors divided by numbers."""
        return v / s[..., None]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return inner products."""
        return (a * b).sum(-1)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a·bᵀ`."""
        return a[..., None] * b[..., None, :]

    def retrieved(self, M: Tensor, q: Tensor) -> Tensor:
        """Return `Mᵀq`."""
        return (M * q[..., None]).sum(-2)
