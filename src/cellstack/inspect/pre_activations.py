"""The pre-activations of a cell's gates in a recorded run, from the reference implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import reference

if TYPE_CHECKING:
    from cellstack.nodes.base import Array
    from cellstack.nodes.cell_arrays import Cell
    from cellstack.nodes.recording import Record


def pre_activations(cell: Cell, record: Record) -> dict[str, Array]:
    """Return the full sums over x and h by gate, `[B, T, H]` each, zero at masked steps: see `CellTrace.pre`."""
    spec, (batch, steps, width) = cell.spec, record.x.shape
    order = slice(None, None, -1) if record.reverse else slice(None)
    before = []
    for name, fresh in cell.initial.items():
        array = getattr(record.states, name)
        start = fresh if record.before is None else getattr(record.before, name)
        begun = np.broadcast_to(start, (batch, array.shape[2]))[:, None]
        previous = np.concatenate([begun, array[:, order][:, :-1]], axis=1) if steps else array
        if record.reset is not None:
            previous = np.where(record.reset[:, order, None], fresh, previous)
        before.append(previous[:, order].reshape(batch * steps, array.shape[2]))
    patched = None if record.patches is None else _as_it_ran(record)
    with np.errstate(all="ignore"):
        sums = reference.pre_activations(
            spec, cell.stored_arrays, record.x.reshape(batch * steps, width), before, patched
        )
    made = {gate: array.reshape(batch, steps, spec.units).astype(cell.dtype) for gate, array in sums.items()}
    if record.mask is not None:
        made = {gate: np.where(record.mask[:, :, None], array, 0) for gate, array in made.items()}
    return made


def _as_it_ran(record: Record) -> Callable[[str, Array, Any], Array]:
    """Return a function that replaces gates and states from the equations by those of the patched run."""
    assert record.patches is not None
    batch, steps, _ = record.x.shape
    planes = dict(zip(record.patches.spec.of_kind.gates, np.moveaxis(record.gates, 2, 0), strict=False))

    def patched(name: str, value: Array, before: Any) -> Array:
        if name in planes:
            return planes[name].reshape(batch * steps, -1).astype(np.float64)
        assert record.patches is not None
        return record.patches.changed(name, batch, steps, value, before)

    return patched
