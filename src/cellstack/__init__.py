"""cellstack: recurrent networks as data, run anywhere. This door imports NumPy and no framework; `layers` needs torch.

>>> import cellstack as cs
>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> spec = cs.CellSpec(input_size=3, units=4)
>>> cell = cs.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))
>>> net = cs.Network([cs.Recurrent((cell,)), cs.Pool("mean")])
>>> net(rng.normal(size=(2, 10, 3))).shape
(2, 4)
"""

from typing import Any

from cellstack.formats import load
from cellstack.formats.pytorch import from_torch
from cellstack.network import Network
from cellstack.nodes import Activation, Dense, Pool, Standardise
from cellstack.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import CellSpec, FormatError, GRUTrace, HiddenState, RNNTrace, ShapeError, State, Trace
from cellstack.stream import Stream

__version__: str

__all__ = [
    "Activation",
    "Bidirectional",
    "Cell",
    "CellSpec",
    "Dense",
    "FormatError",
    "GRUTrace",
    "HiddenState",
    "Network",
    "Pool",
    "RNNTrace",
    "Recurrent",
    "ShapeError",
    "Standardise",
    "State",
    "Stream",
    "Trace",
    "from_torch",
    "load",
]


def __getattr__(name: str) -> Any:
    """Look up `__version__` when it is asked for: the search through installed packages takes longer than the rest."""
    if name != "__version__":
        raise AttributeError(f"module 'cellstack' has no attribute {name!r}")
    from importlib.metadata import version

    return version("cellstack")
