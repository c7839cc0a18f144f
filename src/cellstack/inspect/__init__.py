"""Looking inside: what every gate, cell and node did at every step of a run."""

from cellstack.inspect.diagnostics import Report, Shares, spectral_radii
from cellstack.inspect.files import load
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace
from cellstack.inspect.watch import Watch, watch

__all__ = ["CellTrace", "NetworkTrace", "NodeTrace", "Report", "Shares", "Watch", "load", "spectral_radii", "watch"]
