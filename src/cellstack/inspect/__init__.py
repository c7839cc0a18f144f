"""Looking inside: what every gate, cell and node did at every step of a run."""

from cellstack.inspect.diagnostics import Report, Shares, spectral_radii
from cellstack.inspect.files import load
from cellstack.inspect.interventions import Ablation, ActivationPatching, TraceDifference, ablate, activation_patch
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace
from cellstack.inspect.watch import Watch, watch

__all__ = [
    "Ablation",
    "ActivationPatching",
    "CellTrace",
    "NetworkTrace",
    "NodeTrace",
    "Report",
    "Shares",
    "TraceDifference",
    "Watch",
    "ablate",
    "activation_patch",
    "load",
    "spectral_radii",
    "watch",
]
