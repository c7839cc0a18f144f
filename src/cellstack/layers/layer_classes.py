"""The layers of one cell, one for each kind: each an `RNN` of one cell that takes the arguments of both."""

from __future__ import annotations

from cellstack.layers.cell_classes import (
    CfCCell,
    GRUCell,
    LiGRUCell,
    LSTMCell,
    MinGRUCell,
    MinLSTMCell,
    SimpleRNNCell,
    SLSTMCell,
)
from cellstack.layers.rnn import SingleCellRNN

__all__ = ["GRU", "LSTM", "SLSTM", "CfC", "LiGRU", "MinGRU", "MinLSTM", "SimpleRNN"]


class LSTM(SingleCellRNN):
    """A long short-term memory over a sequence: an RNN of one `LSTMCell`.

    >>> lstm = LSTM(4, return_sequences=True, return_state=True)
    >>> y, h, c = lstm([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape), tuple(c.shape)
    ((1, 1, 4), (1, 4), (1, 4))
    """

    cell_type = LSTMCell


class GRU(SingleCellRNN):
    """Gated recurrent units over a sequence: an RNN of one `GRUCell`.

    >>> y, h = GRU(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = GRUCell


class SimpleRNN(SingleCellRNN):
    """A fully connected recurrence over a sequence: an RNN of one `SimpleRNNCell`.

    >>> y, h = SimpleRNN(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = SimpleRNNCell


class MinGRU(SingleCellRNN):
    """Minimal gated recurrent units over a sequence: an RNN of one `MinGRUCell`, without a product with h.

    >>> y, h = MinGRU(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = MinGRUCell


class MinLSTM(SingleCellRNN):
    """A minimal long short-term memory over a sequence: an RNN of one `MinLSTMCell`, without a product with h.

    >>> y, h = MinLSTM(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = MinLSTMCell


class LiGRU(SingleCellRNN):
    """Light gated recurrent units over a sequence: an RNN of one `LiGRUCell`.

    >>> y, h = LiGRU(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = LiGRUCell


class SLSTM(SingleCellRNN):
    """The sLSTM of the xLSTM over a sequence: an RNN of one `SLSTMCell`, with the states h, c, n and m.

    >>> y, h, c, n, m = SLSTM(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape), tuple(m.shape)
    ((1, 1, 4), (1, 4), (1, 4))
    """

    cell_type = SLSTMCell


class CfC(SingleCellRNN):
    """Closed-form continuous-time networks over a sequence: an RNN of one `CfCCell`.

    >>> y, h = CfC(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell_type = CfCCell
