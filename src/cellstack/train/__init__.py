"""Training on real data, and predictions. `train.custom` has the parts of a training loop of your own.

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
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.ts import read_ts
from cellstack.train.forecasting.tirex import TiRexForecaster
from cellstack.train.predictions import Predictions
from cellstack.train.tables.table import Table, read_table
from cellstack.train.text.sampling import generate

if TYPE_CHECKING:
    from cellstack.train import custom
    from cellstack.train.entry import fit, fit_forecast, fit_text
    from cellstack.train.fitting import Result

_LATER = {"Result": "fitting", "custom": "custom", "fit": "entry", "fit_forecast": "entry", "fit_text": "entry"}

# Names that users may guess but that don't exist, with advice for the error message.
_ADVICE = dict.fromkeys(("forecast", "run"), "use network.predict(data), or predict(data) of what fit returns")

__all__ = [
    "Predictions",
    "Result",
    "Sequences",
    "Table",
    "TiRexForecaster",
    "UsageError",
    "custom",
    "fit",
    "fit_forecast",
    "fit_text",
    "generate",
    "history",
    "read_sequences",
    "read_table",
    "read_ts",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        advice = f": {_ADVICE[name]}" if name in _ADVICE else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice}")
    for package in ("torch", "tqdm"):
        check_installed(f"cellstack.train.{name}", package, "torch")
    module = import_module(f".{_LATER[name]}", __name__)
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return [name for name in __all__ if name not in _LATER or find_spec("torch")]  # help() reads every name
