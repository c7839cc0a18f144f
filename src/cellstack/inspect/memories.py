"""The trace of an mLSTM's cell: what a query retrieves from its memory, and which steps that comes from."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import numpy as np

from cellstack.cells.base import MatrixState
from cellstack.cells.errors import ShapeError
from cellstack.inspect.trace import CellTrace
from cellstack.inspect.values import Index
from cellstack.nodes.base import Array
from cellstack.nodes.recording import MemoryRecord
from cellstack.nodes.values import MemoryCell
from cellstack.reference import ACTIVATIONS
from cellstack.reference import memory as reference
from cellstack.reference.memory import MatrixInputs


class MemoryTrace(CellTrace):
    """The cell of an `MLSTM` at every step, and what its memory holds.

    Its fields are `q k v i f m n h`, and o with an output gate: q, k and n `[B, T, heads, key_size]`, v, o and h
    `[B, T, heads, value_size]`, i, f and m `[B, T, heads]`. h is multiplied by the output gate. They are computed in
    NumPy, from what the run recorded, when they are first used. A selection of units leaves them whole.
    """

    cell: MemoryCell  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def of(cls, cell: MemoryCell, record: MemoryRecord, y: Array) -> MemoryTrace:
        """Return the trace of a whole run, whose output was `y`."""
        fields = partial(_fields, cell, record, y)
        return cls(cast(Any, cell), fields, np.arange(cell.spec.units), record.mask, None, record)

    def _pre_activations(self, record: Any) -> dict[str, Array]:
        parts = _parts(self.cell, record.x)
        return {gate: _used(record.mask, parts[f"z_{gate}"]) for gate in self.cell.spec.of_kind.gates}

    def _select(self, rows: Any, steps: Any, units: Index) -> CellTrace:
        return self._map(lambda array: array[rows][:, steps])

    @property
    def _whole(self) -> MemoryRecord:
        if not isinstance(self.record, MemoryRecord):
            raise ValueError("this trace of an mLSTM covers only part of a run: trace it again")
        return self.record

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
        products = self.shares(step) * np.einsum("bshk,bhk->bhs", self.k * _scale(self.cell), q)
        return _used(None if self.mask is None else self.mask[:, step], products / self._divisor(q, step)[..., None])

    def _divisor(self, q: Array, step: int) -> Array:
        size = np.maximum(np.abs((self.n[:, step] * q).sum(-1)), np.exp(-self.m[:, step]))
        return size + self.cell.spec.epsilon

    def shares(self, step: int = -1) -> Array:
        """Return the share of every step in the memory after a step, `[B, heads, T]`: C is their sum, times k·vᵀ.

        Args:
            step: the step; -1 = the last.

        Returns:
            The input gate of each step times the forget gates since, divided by `e^m`; 0 after `step`, before a reset,
            and at masked steps.

        Raises:
            IndexError: a step that doesn't exist.
            ValueError: a trace of some rows or steps.
        """
        reset, step = self._whole.reset, self._step(step)
        f = self.f if self.mask is None else np.where(self.mask[..., None], self.f, 1)
        shares = np.zeros(np.moveaxis(f, 1, 2).shape, f.dtype)
        left = np.ones(shares.shape[:2], f.dtype)
        for t in range(step, -1, -1):
            shares[:, :, t] = left * self.i[:, t]
            left = left * f[:, t]
            if reset is not None:
                left = np.where(reset[:, t, None], 0, left)
        return shares

    def memory(self, step: int = -1) -> Array:
        """Return C after a step, `[B, heads, key_size, value_size]`, computed again from the state before the run.

        Raises:
            IndexError: a step that doesn't exist.
            ValueError: a trace of some rows or steps.
        """
        step = self._step(step)
        part, record = slice(0, step + 1), self._whole
        mask, reset = (None if flags is None else flags[:, part] for flags in (record.mask, record.reset))
        inputs = MatrixInputs(*(array[:, part] for array in _inputs(self.cell, record)))
        state, changed = _before(self.cell, record), _patched(record)
        return reference.steps(inputs, state, self.cell.spec.epsilon, mask, reset, changed)[1].C

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
        heads, width = self.cell.spec.heads, self.cell.spec.key_size
        q = np.asarray(query, self.cell.dtype)
        if q.shape not in ((width,), (heads, width)):
            raise ShapeError(f"retrieve: expected query [{width}] or [{heads}, {width}], got {q.shape}")
        q, step = np.broadcast_to(q, (heads, width)), self._step(step)
        return np.einsum("bhkv,hk->bhv", self.memory(step), q) / self._divisor(q, step)[..., None]

    def _step(self, step: int) -> int:
        count = self.m.shape[1]
        if not -count <= step < count:
            raise IndexError(f"expected a step below {count}, got {step}")
        return step % count


def _fields(cell: MemoryCell, record: MemoryRecord, y: Array) -> Any:
    """Return the fields of a trace at every step: gates, queries, keys and values are zeros at masked ones."""
    changed = _patched(record)
    found = reference.fields_of(_inputs(cell, record), _before(cell, record), record.mask, record.reset, changed)
    fields = found._asdict() | {"h": y.reshape(*y.shape[:2], *cell.spec.trace_shapes["h"])}
    if cell.spec.output_gate:
        o = fields["o"] = ACTIVATIONS["sigmoid"][0](np.ascontiguousarray(_parts(cell, record.x)["z_o"]))
        if changed is not None:
            o[:] = np.stack([changed("o", t, o[:, t], None) for t in range(o.shape[1])], axis=1) if o.size else o
    held = cell.spec.state_shapes
    return cell.spec.of_kind.trace(
        **{name: array if name in held else _used(record.mask, array) for name, array in fields.items()}
    )


def _patched(record: MemoryRecord) -> reference.Patched | None:
    """Return the function that applies the patches of a run once more."""
    if record.patches is None:
        return None
    batch, steps, _ = record.x.shape
    return record.patches.changing(record.patches.of_run(batch, steps, record.mask, False, record.x.dtype), record.mask)


def _parts(cell: MemoryCell, x: Array) -> dict[str, Array]:
    """Return the parts of the input by name, each with its axes."""
    shapes = cell.spec.parts
    parts = np.split(x, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1], axis=-1)
    return {name: part.reshape(*x.shape[:2], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _inputs(cell: MemoryCell, record: MemoryRecord) -> MatrixInputs:
    return MatrixInputs(*list(_parts(cell, record.x).values())[: len(MatrixInputs._fields)])


def _before(cell: MemoryCell, record: MemoryRecord) -> MatrixState:
    return record.before or cell.zeros(len(record.x))


def _scale(cell: MemoryCell) -> Any:
    return cell.dtype.type(cell.spec.key_size**-0.5)


def _used(mask: Array | None, array: Array) -> Array:
    """Return an array with zeros at masked steps."""
    return array if mask is None else np.where(mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim)), array, 0)
