"""cellstack: recurrent networks as data, run anywhere. Importing it needs NumPy and no framework; `layers` needs torch.

>>> import cellstack as cs
>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> spec = cs.CellSpec(input_size=3, units=4)
>>> cell = cs.nodes.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))
>>> net = cs.Network([cs.nodes.Recurrent((cell,)), cs.nodes.GlobalPool("mean")])
>>> net(rng.normal(size=(2, 10, 3))).shape
(2, 4)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cellstack.cells.base import HiddenState, State
from cellstack.cells.errors import FormatError, ShapeError
from cellstack.cells.spec import CellSpec
from cellstack.formats import extract, load
from cellstack.network import Network
from cellstack.nodes.patches import Patch
from cellstack.streaming.sessions import Sessions
from cellstack.streaming.stream import Stream

if TYPE_CHECKING:
    from cellstack import inspect as inspect
    from cellstack import layers as layers
    from cellstack import nodes as nodes
    from cellstack import train as train
    from cellstack.adapters.frameworks import accelerate, packed_weights, plan, restore
    from cellstack.capture import compile
    from cellstack.formats.verify import verify
    from cellstack.inspect.interventions import ablate

__version__: str

__all__ = [
    "CellSpec",
    "FormatError",
    "HiddenState",
    "Network",
    "Patch",
    "Sessions",
    "ShapeError",
    "State",
    "Stream",
    "ablate",
    "accelerate",
    "compile",
    "extract",
    "load",
    "packed_weights",
    "plan",
    "restore",
    "verify",
]


# Names that are imported at their first use, and the module of each.
LATER = {
    "ablate": "inspect.interventions",
    "accelerate": "adapters.frameworks",
    "compile": "capture",
    "packed_weights": "adapters.frameworks",
    "plan": "adapters.frameworks",
    "restore": "adapters.frameworks",
    "verify": "formats.verify",
}


# Subpackages that are imported at their first use.
PACKAGES = ("adapters", "capture", "inspect", "keras", "layers", "sklearn", "train")


# Names of version 0.1.0, and what replaces each.
REPLACED = {
    "from_keras": "cellstack.load(model)",
    "from_torch": "cellstack.load(module)",
    **{
        name: f"cellstack.nodes.{name}"
        for name in ("Activation", "Bidirectional", "Cell", "Dense", "GlobalPool", "Recurrent", "Standardise")
    },
}


def __getattr__(name: str) -> Any:
    """Import what is slow to import at its first use: our packages, the readers of other formats, and `__version__`."""
    if name in PACKAGES:
        return import_module(f"cellstack.{name}")
    if name in LATER:
        value = getattr(import_module(f"cellstack.{LATER[name]}"), name)
        globals()[name] = value
        return value
    if name != "__version__":
        advice = f": use {REPLACED[name]}" if name in REPLACED else ""
        raise AttributeError(f"module 'cellstack' has no attribute {name!r}{advice}")
    from importlib.metadata import version

    return version("cellstack")


def __dir__() -> list[str]:
    """Return the public names, which `help()` reads: without packages that may be missing or select Keras's backend."""
    packages = ["inspect", "nodes", "train", *(["layers"] if find_spec("torch") else [])]
    return sorted({*__all__, "__version__", *packages, *(name for name in PACKAGES if name in globals())})
