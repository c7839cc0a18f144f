"""The step of an mLSTM's memory, over the operations that each view has for it.

An mLSTM isn't a `Kind`: its step multiplies by no weights, and its state is a matrix per head. Its projection is a
dense node before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from cellstack.cells.base import V

MEANINGS = {
    "q": "query: what is looked for in the memory",
    "k": "key: under what the value is stored",
    "v": "value: what is stored",
    "i": "input gate: how much of the key with its value is added, exp(z_i − m)",
    "f": "forget gate: how much of C and n is kept, σ(z_f)·exp(m_prev − m)",
    "o": "output gate: how much of what the query retrieves is output",
    "m": "stabiliser: the logarithm of the scale of C and n",
    "n": "normaliser: the sum of the keys with their weights, times exp(−m)",
    "C": "memory: the sum of k·vᵀ with their weights, times exp(−m)",
    "h": "output: what the query retrieves",
}


class MemorySizes(NamedTuple):
    """The widths of a head, and what is added to the divisor of h: see `cellstack.nodes.MLSTM`."""

    heads: int
    key_size: int
    value_size: int
    epsilon: float

    @property
    def core(self) -> int:
        """Width of q, k, v, ĩ and f̃ of all heads."""
        return self.heads * (2 * self.key_size + self.value_size + 2)

    @property
    def units(self) -> int:
        """Width of h."""
        return self.heads * self.value_size

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the state, by name, without the batch."""
        keys = self.heads, self.key_size
        return {"C": (*keys, self.value_size), "n": keys, "m": (self.heads,)}

    def parts(self, output_gate: bool = False) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parts of the input by name, in their order."""
        keys, values = (self.heads, self.key_size), (self.heads, self.value_size)
        shapes = {"q": keys, "k": keys, "v": values, "z_i": (self.heads,), "z_f": (self.heads,)}
        return shapes | ({"z_o": values} if output_gate else {})


class MemoryOps(Protocol[V]):
    """The operations of a memory's step. Every value has a part for each head: a number, a vector or a matrix."""

    def add(self, a: V, b: V) -> V:
        """Return `a + b`."""
        ...

    def sub(self, a: V, b: V) -> V:
        """Return `a - b`."""
        ...

    def mul(self, a: V, b: V) -> V:
        """Return `a⊙b`."""
        ...

    def exp(self, v: V) -> V:
        """Return `e^v`."""
        ...

    def log_sigmoid(self, v: V) -> V:
        """Return `log σ(v)`."""
        ...

    def maximum(self, a: V, b: V) -> V:
        """Return the larger of `a` and `b`, elementwise."""
        ...

    def absolute(self, v: V) -> V:
        """Return `|v|`."""
        ...

    def affine(self, v: V, factor: float = 1.0, offset: float = 0.0) -> V:
        """Return `factor·v + offset`."""
        ...

    def scaled(self, v: V, s: V) -> V:
        """Return the vector of each head times the head's number."""
        ...

    def scaled_matrix(self, M: V, s: V) -> V:
        """Return the matrix of each head times the head's number."""
        ...

    def divided(self, v: V, s: V) -> V:
        """Return the vector of each head divided by the head's number."""
        ...

    def dot(self, a: V, b: V) -> V:
        """Return the inner product of two vectors of each head, a number."""
        ...

    def outer(self, a: V, b: V) -> V:
        """Return `a·bᵀ` of two vectors of each head, a matrix."""
        ...

    def retrieved(self, M: V, q: V) -> V:
        """Return `Mᵀq` of each head."""
        ...

    def sigmoid(self, name: str, v: V) -> V:
        """Return `σ(v)`, the gate `name`. Views may trace and patch it."""
        ...

    def record(self, name: str, v: V) -> V:
        """Return `v`, a gate or the output. Views may trace and patch it."""
        ...


def step(ops: MemoryOps[V], sizes: MemorySizes, x: Mapping[str, V], C: V, n: V, m: V) -> tuple[V, tuple[V, V, V]]:
    """Return h, and C, n and m after the step; see `cellstack.reference.memory` for the equations.

    Args:
        ops: the operations of a view.
        sizes: those of the memory.
        x: the parts of the input, see `MemorySizes.parts`.
        C, n, m: the state before the step.
    """
    q, z_i = x["q"], x["z_i"]
    kept = ops.add(ops.log_sigmoid(x["z_f"]), m)
    m = ops.maximum(kept, z_i)
    i = ops.record("i", ops.exp(ops.sub(z_i, m)))
    f = ops.record("f", ops.exp(ops.sub(kept, m)))
    key = ops.scaled(x["k"], ops.affine(i, sizes.key_size**-0.5))
    C = ops.add(ops.scaled_matrix(C, f), ops.outer(key, x["v"]))
    n = ops.add(ops.scaled(n, f), key)
    size = ops.maximum(ops.absolute(ops.dot(n, q)), ops.exp(ops.affine(m, -1.0)))
    h = ops.divided(ops.retrieved(C, q), ops.affine(size, offset=sizes.epsilon))
    if "z_o" in x:
        h = ops.mul(ops.sigmoid("o", x["z_o"]), h)
    return ops.record("h", h), (C, n, m)
