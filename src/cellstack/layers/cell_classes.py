"""The cells: one step of each kind. They are made from the declarations in `cellstack.cells`."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from cellstack.cells import KINDS, Kind
from cellstack.layers.cell_base import Cell


def _cell(kind: Kind) -> Any:
    name, columns = f"{kind.title}Cell", 6 * len(kind.gates)
    text, _, ref = cleandoc(kind.doc).partition("\n\nRef: ")
    example = f"""
>>> import torch
>>> cell = {name}(6)
>>> h, state = cell(torch.zeros(2, 6), cell.get_initial_state(2))
>>> tuple(h.shape), tuple(cell.kernel.shape), len(state)
((2, 6), (6, {columns}), {len(kind.state._fields)})
"""
    doc = f"One step of {text}\n{example}\nRef: {ref}"
    return type(name, (Cell,), {"__module__": __name__, "__doc__": doc, "kind": kind.name})


_MADE = {f"{kind.title}Cell": _cell(kind) for kind in KINDS.values()}
globals().update(_MADE)
__all__ = list(_MADE)  # pyright: ignore[reportUnsupportedDunderAll]
