"""The cells: one step of each kind."""

from __future__ import annotations

from cellstack.layers.cell_base import Cell

__all__ = ["CfCCell", "GRUCell", "LSTMCell", "LiGRUCell", "MinGRUCell", "MinLSTMCell", "SLSTMCell", "SimpleRNNCell"]


class LSTMCell(Cell):
    """One step of a long short-term memory::

        z = x·kernel + h_prev·recurrent_kernel + bias        i, f, o = σ(z_i, z_f, z_o)    g = φ(z_g)
        c = f·c_prev + i·g                                   h = o·φ(c)

    >>> import torch
    >>> cell = LSTMCell(4)
    >>> h, (h, c) = cell(torch.zeros(2, 6), cell.get_initial_state(2))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 16))

    Ref: Hochreiter and Schmidhuber 1997; the forget gate: Gers, Schmidhuber and Cummins 2000, sec. 3;
    peepholes: Gers and Schmidhuber 2000; coupled gates: Greff et al. 2017; projection: Sak, Senior and Beaufays 2014;
    layer normalisation: Ba, Kiros and Hinton 2016, eq. 20 to 22; zoneout: Krueger et al. 2017; dropout on the state:
    Gal and Ghahramani 2016.
    """

    kind = "lstm"


class GRUCell(Cell):
    """One step of a gated recurrent unit::

        a = x·kernel + bias[0]        q = h_prev·recurrent_kernel + bias[1]
        z, r = σ(a_z + q_z, a_r + q_r)        g = φ(a_g + r·q_g)        h = z·h_prev + (1 - z)·g

    With `reset_after=False` there is one bias `[3H]`, and `g = φ(a_g + (r·h_prev)·recurrent_kernel_g)`. With
    `attention` the last column of x scales the update of h.

    >>> import torch
    >>> cell = GRUCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape), tuple(cell.bias.shape)
    ((2, 4), (6, 12), (2, 12))

    Ref: Cho et al. 2014, eq. 5 to 8, with z and 1 - z exchanged, as in all libraries; attention: Zhou et al. 2019,
    "Deep Interest Evolution Network for Click-Through Rate Prediction", AUGRU.
    """

    kind = "gru"


class SimpleRNNCell(Cell):
    """One step of a simple recurrent network::

        h = φ(x·kernel + h_prev·recurrent_kernel + bias)

    >>> import torch
    >>> cell = SimpleRNNCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 4))

    Ref: Elman 1990.
    """

    kind = "rnn"


class MinGRUCell(Cell):
    """One step of a minimal gated recurrent unit, whose gates depend on x alone::

        z = σ(a_z)    g = φ(a_g)    with a = x·kernel + bias        h = (1 - z)·h_prev + z·g

    The default φ is "positive", v + 1/2 where v >= 0, else sigmoid(v).

    >>> import torch
    >>> cell = MinGRUCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 8))

    Ref: Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.1; φ: appendix B.3.
    """

    kind = "mingru"


class MinLSTMCell(Cell):
    """One step of a minimal long short-term memory, whose gates depend on x alone, and whose only state is h::

        i, f = σ(a_i, a_f)    g = φ(a_g)    with a = x·kernel + bias        h = (f·h_prev + i·g)/(f + i)

    The default φ is "positive", v + 1/2 where v >= 0, else sigmoid(v).

    >>> import torch
    >>> cell = MinLSTMCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 12))

    Ref: Feng et al. 2024, "Were RNNs All We Needed?", sec. 3.2; φ: appendix B.3.
    """

    kind = "minlstm"


class LiGRUCell(Cell):
    """One step of a light gated recurrent unit, which has no reset gate::

        a = x·kernel + h_prev·recurrent_kernel + bias        z = σ(a_z)    g = φ(a_g)        h = z·h_prev + (1 - z)·g

    The default φ is ReLU. Recurrent dropout applies to g, not to h_prev.

    >>> import torch
    >>> cell = LiGRUCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 8))

    Ref: Ravanelli et al. 2018, "Light Gated Recurrent Units for Speech Recognition", sec. III.
    """

    kind = "ligru"


class SLSTMCell(Cell):
    """One step of an sLSTM, the LSTM of the xLSTM whose input gate is exponential; n normalises c, m scales both::

        z = x·kernel + h_prev·recurrent_kernel + bias        g = φ(z_g)    o = σ(z_o)
        m = max(log σ(z_f) + m_prev, z_i)        i = exp(z_i - m)        f = exp(log σ(z_f) + m_prev - m)
        c = f·c_prev + i·g        n = f·n_prev + i        h = o·c/n

    Where n_prev is 0, as in the initial state, nothing is stored: m is z_i, and f is 0.

    >>> import torch
    >>> cell = SLSTMCell(4)
    >>> h, (h, c, n, m) = cell(torch.zeros(2, 6), cell.get_initial_state(2))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 16))

    Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", sec. 2.2; stabilised: appendix A.2.
    """

    kind = "slstm"


class CfCCell(Cell):
    """One step of a closed-form continuous-time network: h depends on the time τ since the previous step::

        z = x·kernel + h_prev·recurrent_kernel + bias        g, k = φ(z_g, z_k)    s = z_s
        t = σ(z_t + s·τ)                                     h = (1 - t)·g + t·k

    With `timespans` τ is the last column of x, else 1. With `backbone_units` the sums are computed from a dense layer::

        b = φ_b(x·kernel + h_prev·recurrent_kernel + bias)   z = b·gate_kernel + gate_bias

    >>> import torch
    >>> cell = CfCCell(4, timespans=True)
    >>> h, (h,) = cell(torch.ones(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (5, 16))

    Ref: Hasani et al. 2022, "Closed-form continuous-time neural networks". Without a backbone it is the cell of the
    package ncps's networks with wirings; ncps's own default is a backbone of 128 units.
    """

    kind = "cfc"
