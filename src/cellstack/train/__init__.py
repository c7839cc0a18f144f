"""Training on real data: readers, batches of similar lengths, the model, the fit loop, checkpoints.

The readers don't need torch, so that a trained model can be run without it; the rest is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cellstack.cells.errors import check_installed
from cellstack.train import history
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import read_sequences
from cellstack.train.data.sequences import Sequences, as_sequences
from cellstack.train.data.ts import read_ts
from cellstack.train.examples import Batch, Data, Examples, Indexed, Inputs, Labelled, batches, split
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.tirex import TiRexForecaster
from cellstack.train.forecasting.windows import Windows
from cellstack.train.predictions import Predictions
from cellstack.train.settings import Settings
from cellstack.train.tables.table import CategoryColumn, Spacing, Table, read_table
from cellstack.train.text.sampling import generate

if TYPE_CHECKING:
    from cellstack.train.entry import fit
    from cellstack.train.fitting import Result
    from cellstack.train.forecasting.entry import fit_forecast
    from cellstack.train.learner import Epoch, Fit, Learner
    from cellstack.train.loop import learn
    from cellstack.train.model import Model
    from cellstack.train.text.workflow import fit_text

_LATER = {
    "Epoch": "learner",
    "Fit": "learner",
    "Learner": "learner",
    "Model": "model",
    "Result": "fitting",
    "fit": "entry",
    "learn": "loop",
    "fit_forecast": "forecasting.entry",
    "fit_text": "text.workflow",
}

# Names that users may guess but that don't exist, with advice for the error message.
_ADVICE = dict.fromkeys(("forecast", "run"), "use network.predict(data), or predict(data) of what fit returns")

__all__ = [
    "Batch",
    "CategoryColumn",
    "Data",
    "Epoch",
    "Examples",
    "Fit",
    "Indexed",
    "Inputs",
    "Labelled",
    "Learner",
    "Model",
    "Predictions",
    "Recipe",
    "Result",
    "Sequences",
    "Settings",
    "Spacing",
    "Table",
    "TiRexForecaster",
    "UsageError",
    "Windows",
    "as_sequences",
    "batches",
    "fit",
    "fit_forecast",
    "fit_text",
    "generate",
    "history",
    "learn",
    "read_sequences",
    "read_table",
    "read_ts",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        advice = f": {_ADVICE[name]}" if name in _ADVICE else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice}")
    for package in ("torch", "tqdm"):
        check_installed(f"cellstack.train.{name}", package, "torch")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return [name for name in __all__ if name not in _LATER or find_spec("torch")]  # help() reads every name
