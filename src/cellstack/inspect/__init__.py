"""Inspection: what every gate, cell and node computes at every step of a run.

The names for torch models, such as `watch` and `TrainingMonitor`, are those of `cellstack.inspect.monitoring`.
"""

from typing import TYPE_CHECKING, Any

from cellstack.inspect.diagnostics import Report, Shares, spectral_radii
from cellstack.inspect.differences import TraceDifference
from cellstack.inspect.interventions import Ablation, ablate
from cellstack.inspect.memories import MemoryTrace
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace

if TYPE_CHECKING:
    from cellstack.inspect.monitoring import (
        LayerRecord,
        TrainingMonitor,
        TrainingRecord,
        Watch,
        watch,
    )

__all__ = [
    "Ablation",
    "CellTrace",
    "LayerRecord",
    "MemoryTrace",
    "NetworkTrace",
    "NodeTrace",
    "Report",
    "Shares",
    "TraceDifference",
    "TrainingMonitor",
    "TrainingRecord",
    "Watch",
    "ablate",
    "spectral_radii",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cellstack.inspect import monitoring  # which uses this package

    return getattr(monitoring, name)


def __dir__() -> list[str]:
    return __all__
