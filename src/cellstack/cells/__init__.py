"""The kinds of cell, one module each: gates, states, arrays, flags, and the equations of a step, written once.

To add a kind, add a module and its `Kind` to `KINDS`; `CellSpec` and the views take everything else from there.
"""

from cellstack.cells.base import Kind
from cellstack.cells.cfc import CFC
from cellstack.cells.cfs import CFS
from cellstack.cells.gru import GRU
from cellstack.cells.ligru import LI_GRU
from cellstack.cells.lstm import LSTM
from cellstack.cells.mingru import MIN_GRU
from cellstack.cells.minlstm import MIN_LSTM
from cellstack.cells.rnn import SIMPLE_RNN
from cellstack.cells.slstm import SLSTM
from cellstack.cells.sru import SRU

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (LSTM, GRU, SIMPLE_RNN, MIN_GRU, MIN_LSTM, LI_GRU, SLSTM, CFC, SRU, CFS)
}
"""Every kind of cell by its name in a `CellSpec`, which is also its name in the kernel."""


def orders(of: str) -> dict[str, str]:
    """Return the order of the gates of each kind that another format has; see `Kind.names`."""
    return {kind.name: kind.names[of].order for kind in KINDS.values() if of in kind.names}


def named(of: str) -> dict[str, str]:
    """Return the kinds that another format has, by its names for them; see `Kind.names`."""
    return {kind.names[of].name: kind.name for kind in KINDS.values() if of in kind.names}
