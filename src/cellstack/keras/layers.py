"""All kinds of cell as Keras layers, with all flags of our cells, some of which Keras's own layers lack.

They work with functional models, `fit`, `summary`, masks, `Bidirectional`, and files, which need `import
cellstack.keras` before they are loaded. They need the torch backend.
"""

from __future__ import annotations

import re
from typing import Any

from cellstack.cells import KINDS, Kind
from cellstack.keras.recurrent import Recurrent


def _layer(kind: Kind) -> Any:
    first = re.split(r"[,:]", kind.doc, maxsplit=1)[0]
    doc = f"""{first[0].upper()}{first[1:]} for Keras.

>>> import keras
>>> y = {kind.title}(4, return_sequences=True)(keras.ops.ones((2, 5, 6)))
>>> tuple(y.shape)
(2, 5, 4)
"""
    return type(kind.title, (Recurrent,), {"__module__": __name__, "__doc__": doc, "kind": kind.name})


_MADE = {kind.title: _layer(kind) for kind in KINDS.values()}
globals().update(_MADE)
__all__ = list(_MADE)  # pyright: ignore[reportUnsupportedDunderAll]
