"""The cells that can be trained, by name: every kind of cell, and the mLSTM, which is a node. Needs no torch."""

from __future__ import annotations

import math
from numbers import Integral

from cellstack import nodes
from cellstack.cells import KINDS
from cellstack.cells.spec import CellSpec
from cellstack.train.checks import OptionError, UsageError

MLSTM = "mlstm"
NOT_INSPECTED = "cell mlstm can't be inspected in training: expected inspect to be off, or another cell"
CELLS = (*KINDS, MLSTM)
WITH_HEADS = tuple(name for name in CELLS if name == MLSTM or "heads" in KINDS[name].settings)


def heads_of(cell: str, heads: int | None) -> int:
    """Return the number of heads, by default that of the cell's layer."""
    return heads if heads is not None else 4 if cell == MLSTM else 1


def check_cell(units: tuple[int, ...], cell: str, heads: int | None, bidirectional: bool) -> None:
    """Raise `UsageError` if there are no layers of this cell with these units, heads and directions."""
    if cell not in CELLS:
        raise OptionError("cell", f"to be one of {', '.join(CELLS)}, got {cell!r}")
    if cell == MLSTM and bidirectional:
        raise UsageError("cell mlstm runs forward only: expected bidirectional to be off, or another cell")
    if heads is None and cell != MLSTM:
        return
    if cell not in WITH_HEADS:
        raise UsageError(f"cell {cell} has no heads: expected none, or one of the cells {', '.join(WITH_HEADS)}")
    count = heads_of(cell, heads)
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise OptionError("heads", f"to be an integer of at least 1, got {heads!r}")
    for size in units:
        if size % count:
            said = f"{count}, the default of {cell}," if heads is None else count
            fits = math.gcd(*units)
            choices = [n for n in range(1, fits + 1) if fits % n == 0]
            raise OptionError(
                "heads",
                f"to divide the units of every layer, got heads {said} and units {size}: choose heads from "
                f"{', '.join(map(str, choices))}, or other units",
            )


def title_of(cell: str, heads: int | None) -> str:
    """Return a cell's name in reports, such as `SLSTM of 4 heads`."""
    count = heads_of(cell, heads)
    title = "MLSTM" if cell == MLSTM else KINDS[cell].title
    return f"{title} of {count} heads" if count > 1 else title


def weights_of(cell: str, heads: int | None, width: int, units: int) -> int:
    """Return the number of weights of a layer on an input of `width`."""
    count = heads_of(cell, heads)
    if cell == MLSTM:
        memory = nodes.MLSTM(count, units // count, units // count)
        return (width + 1) * (memory.core_size + units)
    shapes = CellSpec(width, units, kind=cell, heads=count).shapes.values()
    return sum(map(math.prod, shapes))
