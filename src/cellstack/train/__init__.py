"""Train on real data: readers, batches without padding, the model, the fit loop, checkpoints.

The readers need no torch, so that a trained model can be run without it; the rest is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cellstack.train.examples import Examples, Inputs, Labelled, batches, split
from cellstack.train.forecast import Recipe, Windows
from cellstack.train.table import Table, read_csv
from cellstack.train.text.sampling import generate
from cellstack.train.ts import Sequences, read_ts

if TYPE_CHECKING:
    from cellstack.train.loop import Fit, Settings, fit
    from cellstack.train.model import Model

_LATER = {"Fit": "loop", "Settings": "loop", "fit": "loop", "Model": "model"}

__all__ = [
    "Examples",
    "Fit",
    "Inputs",
    "Labelled",
    "Model",
    "Recipe",
    "Sequences",
    "Settings",
    "Table",
    "Windows",
    "batches",
    "fit",
    "generate",
    "read_csv",
    "read_ts",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
