"""The trace of an `MLSTM`: its gates and states at every step, and what a query retrieves from its memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from cellstack.cells.base import MatrixState
from cellstack.cells.errors import ShapeError
from cellstack.inspect.trace import CellTrace, NodeTrace
from cellstack.nodes.base import Array
from cellstack.nodes.mlstm import MLSTM
from cellstack.nodes.recording import MemoryRecord
from cellstack.reference import memory as reference
from cellstack.reference.memory import MatrixGates, MatrixInputs


class MemoryTrace(NodeTrace):
    """The input and output of an `MLSTM`, and its gates and states at every step.

    `q k v i f m n h` are attributes: q, k and n `[B, T, heads, key_size]`, v and h `[B, T, heads, value_size]`, the
    gates i and f, and m, `[B, T, heads]`. They are computed from the recorded input in NumPy when they are first used.
    At masked steps i is 0 and f is 1.

    Attributes:
        record: the state before the run, the mask and the resets; None in a trace of some rows or steps.
        mask: `[B, T]`, True at used steps; None = all.
    """

    node: MLSTM

    def __init__(
        self,
        node: MLSTM,
        x: Array,
        y: Array,
        record: MemoryRecord | None,
        known: tuple[MatrixGates, Array] | None = None,
        mask: Array | None = None,
    ) -> None:
        super().__init__(node, x, y, ())
        self.record, self._known = record, known
        self.mask = mask if record is None else record.mask

    @property
    def records(self) -> list[Any]:
        """What the run recorded of its memory."""
        return [self.record]

    @property
    def _inputs(self) -> MatrixInputs:
        return reference.split(
            self.x[..., : self.node.core_size], self.node.heads, self.node.key_size, self.node.value_size
        )

    @cached_property
    def _values(self) -> tuple[MatrixGates, Array]:
        """The gates, and n at every step."""
        if self._known is not None:
            return self._known
        inputs, record = self._inputs, self._record
        before = self._before
        gates = reference.gates_of(inputs, before.m, record.mask, record.reset)
        n, found = before.n, np.empty_like(inputs.k)
        for t in range(found.shape[1]):
            kept = n if record.reset is None else np.where(record.reset[:, t, None, None], 0, n)
            n = gates.f[:, t, :, None] * kept + gates.i[:, t, :, None] * inputs.k[:, t] * self._scale
            found[:, t] = n
        return gates, found

    @property
    def known(self) -> bool:
        """Whether the gates and states can be computed: not in a trace from a file."""
        return self.record is not None or self._known is not None

    @property
    def _scale(self) -> Any:
        return self.x.dtype.type(self.node.key_size**-0.5)

    @property
    def _record(self) -> MemoryRecord:
        if self.record is None:
            raise ValueError("this trace of an mLSTM covers only part of a run, or comes from a file: trace it again")
        return self.record

    @property
    def _before(self) -> MatrixState:
        return self._record.before or self.node.memory_in(self.x.dtype).zeros(len(self.x))

    q = property(lambda self: self._inputs.q)
    k = property(lambda self: self._inputs.k)
    v = property(lambda self: self._inputs.v)
    i = property(lambda self: self._values[0].i)
    f = property(lambda self: self._values[0].f)
    m = property(lambda self: self._values[0].m)
    n = property(lambda self: self._values[1])

    @property
    def h(self) -> Array:
        """The output by head, `[B, T, heads, value_size]`, times the output gate if there is one."""
        return self.y.reshape(*self.y.shape[:2], self.node.heads, self.node.value_size)

    @cached_property
    def fields(self) -> dict[str, Array]:
        """q k v i f m n h, and o with an output gate, by name, `[B, T, W]` each: heads one after the other.

        At masked steps all but m and n are 0, as the gates of cells are.
        """
        found = {name: array.reshape(*self.x.shape[:2], -1) for name, array in self._inputs._asdict().items()}
        found |= {"i": self.i, "f": self.f}
        if self.node.output_gate:
            found["o"] = self.node.output_gate_of(self.x)
        if self.mask is not None:
            found = {name: np.where(self.mask[..., None], array, 0) for name, array in found.items()}
        return found | {"m": self.m, "n": self.n.reshape(*self.x.shape[:2], -1), "h": self.y}

    def weights(self, step: int = -1) -> Array:
        """Return the weight of every step's v in h of a step, before an output gate: `[B, heads, T]`.

        What the query of the step retrieves is the sum of the values with these weights, and of what is left of the
        state before the run.

        Args:
            step: the step; -1 = the last.

        Raises:
            IndexError: a step that doesn't exist.
            ValueError: a trace of some rows or steps.
        """
        step = self._step(step)
        q = self.q[:, step]
        products = self.shares(step) * np.einsum("bshk,bhk->bhs", self.k * self._scale, q)
        found = products / self._divisor(q, step)[..., None]
        return found if self.mask is None else np.where(self.mask[:, step, None, None], found, 0)

    def _divisor(self, q: Array, step: int) -> Array:
        size = np.maximum(np.abs((self.n[:, step] * q).sum(-1)), np.exp(-self.m[:, step]))
        return size + self.node.epsilon

    def shares(self, step: int = -1) -> Array:
        """Return the share of every step in the memory after a step, `[B, heads, T]`: C is their sum, times k·vᵀ.

        Args:
            step: the step; -1 = the last.

        Returns:
            The input gate of each step times the forget gates since, divided by `e^m`; 0 after `step`, before a reset,
            and at masked steps.
        """
        gates, reset = self._values[0], self._record.reset
        step = self._step(step)
        found = np.zeros((len(self.x), self.node.heads, self.x.shape[1]), self.x.dtype)
        kept = np.ones(found.shape[:2], self.x.dtype)
        for t in range(step, -1, -1):
            found[:, :, t] = kept * gates.i[:, t]
            kept = kept * gates.f[:, t]
            if reset is not None:
                kept = np.where(reset[:, t, None], 0, kept)
        return found

    def memory(self, step: int = -1) -> Array:
        """Return C after a step, `[B, heads, key_size, value_size]`, computed again from the state before the run."""
        step = self._step(step)
        part, record = slice(0, step + 1), self._record
        mask, reset = (None if flags is None else flags[:, part] for flags in (record.mask, record.reset))
        inputs = MatrixInputs(*(array[:, part] for array in self._inputs))
        return reference.steps(inputs, self._before, self.node.epsilon, mask, reset)[1].C

    def retrieve(self, query: Any, step: int = -1) -> Array:
        """Return what a query retrieves from the memory after a step: `Cᵀq / max(|nᵀq|, exp(-m))`.

        A key that the memory holds retrieves its value, mixed with those of keys that aren't orthogonal to it.

        Args:
            query: `[key_size]`, or one per head, `[heads, key_size]`.
            step: the step; -1 = the last.

        Returns:
            `[B, heads, value_size]`.

        Raises:
            ShapeError: a query of another shape.
            IndexError: a step that doesn't exist.
            ValueError: a trace of some rows or steps.
        """
        heads, width = self.node.heads, self.node.key_size
        q = np.asarray(query, self.x.dtype)
        if q.shape not in ((width,), (heads, width)):
            raise ShapeError(f"retrieve: expected query [{width}] or [{heads}, {width}], got {q.shape}")
        q, step = np.broadcast_to(q, (heads, width)), self._step(step)
        return np.einsum("bhkv,hk->bhv", self.memory(step), q) / self._divisor(q, step)[..., None]

    def _step(self, step: int) -> int:
        count = self.x.shape[1]
        if not -count <= step < count:
            raise IndexError(f"expected a step below {count}, got {step}")
        return step % count

    def _part(self, x: Any, y: Array, cells: tuple[CellTrace, ...], take: Callable[[Array], Array]) -> MemoryTrace:
        gates, n = self._values
        mask = None if self.mask is None else take(self.mask)
        return MemoryTrace(self.node, x, y, None, (MatrixGates(*map(take, gates)), take(n)), mask)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n  {self.node.summary}: q k v i f m n h"
