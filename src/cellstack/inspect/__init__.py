"""Inspection: what every gate, cell and node computes at every step of a run."""

from cellstack.inspect.diagnostics import Report, Shares, spectral_radii
from cellstack.inspect.files import load
from cellstack.inspect.interventions import Ablation, ActivationPatching, TraceDifference, ablate, activation_patch
from cellstack.inspect.lightning import lightning_callback
from cellstack.inspect.monitor import TrainingMonitor
from cellstack.inspect.records import LayerRecord, TrainingRecord
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace
from cellstack.inspect.watch import Watch, watch

__all__ = [
    "Ablation",
    "ActivationPatching",
    "CellTrace",
    "LayerRecord",
    "NetworkTrace",
    "NodeTrace",
    "Report",
    "Shares",
    "TraceDifference",
    "TrainingMonitor",
    "TrainingRecord",
    "Watch",
    "ablate",
    "activation_patch",
    "lightning_callback",
    "load",
    "spectral_radii",
    "watch",
]


def __dir__() -> list[str]:
    return __all__
