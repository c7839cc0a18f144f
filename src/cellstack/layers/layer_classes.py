"""The layers of one cell, one for each kind: each an `RNN` of one cell that takes the arguments of both."""

from __future__ import annotations

import re
from typing import Any

from cellstack.cells import KINDS, Kind
from cellstack.layers import cell_classes
from cellstack.layers.rnn import SingleCellRNN


def _layer(kind: Kind) -> Any:
    name, first = kind.title, re.split(r"[,:]", kind.doc, maxsplit=1)[0]
    doc = f"""{first[0].upper()}{first[1:]} over a sequence: an RNN of one `{name}Cell`.

>>> layer = {name}(6, return_sequences=True, return_state=True)
>>> y, *state = layer([[[3, 2, 2, 2, 2, 2]]])
>>> tuple(y.shape), [tuple(of.shape) for of in state]
((1, 1, 6), {[(1, 6)] * len(kind.state._fields)})
"""
    made = {"__module__": __name__, "__doc__": doc, "cell_type": getattr(cell_classes, f"{name}Cell")}
    return type(name, (SingleCellRNN,), made)


_MADE = {kind.title: _layer(kind) for kind in KINDS.values()}
globals().update(_MADE)
__all__ = list(_MADE)  # pyright: ignore[reportUnsupportedDunderAll]
