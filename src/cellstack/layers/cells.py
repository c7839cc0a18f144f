"""The cells: one step of an LSTM, a GRU or a SimpleRNN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cellstack.layers import weights
from cellstack.layers.cell import Cell
from cellstack.spec import HiddenState, State


class LSTMCell(Cell):
    """One step of a long short-term memory.

        z = x·kernel + h_prev·recurrent_kernel + bias        i, f, o = σ(z_i, z_f, z_o)    g = φ(z_g)
        c = f·c_prev + i·g                                   h = o·φ(c)

    Args:
        units: width H of the gates, and of the state.
        activation: φ, by Keras's name or as a callable; None means linear.
        recurrent_activation: σ, likewise.
        use_bias: whether the cell has a bias.
        kernel_initializer, recurrent_initializer, bias_initializer: see `cellstack.layers.weights`.
        unit_forget_bias: initialise the forget gate's bias with 1. It is part of the bias, never added at run time.
        kernel_regularizer, recurrent_regularizer, bias_regularizer: their terms are in `losses`.
        kernel_constraint, recurrent_constraint, bias_constraint: applied by `apply_constraints`.
        dropout: share of x that is dropped in training, in [0, 1); the rest is scaled by 1/(1-dropout). All gates use
            the same mask.
        recurrent_dropout: the same for h_prev. A layer draws both masks once per call and uses them at every step; a
            cell that is called by itself draws them at each call.
        seed: makes the masks of dropout and zoneout repeatable: the n-th draw depends only on the seed and n. The
            count is saved with the weights. None: torch's own generator.
        peepholes: connect c to the gates: i and f use c_prev (`z_i += p_i·c_prev`), o uses the new c.
        coupled: f is 1 - i, and has no weights.
        proj_size: width P of h, `h = (o·φ(c))·projection`. 0: no projection.
        cell_clip: clip c to ±cell_clip. None: no clipping.
        zoneout_cell: share of units of c that keep their value in a training step; see `zoneout`.
        forget_bias: initial value of the forget gate's bias. None: `unit_forget_bias` determines it.
        gate_activations: other activations by gate, such as `{"o": "hard_sigmoid"}`; the key of φ(c) is "cell".
        layer_norm: normalise x·kernel, h_prev·recurrent_kernel, and c before its activation, each times a gain.
        norm_epsilon: constant that layer normalisation adds to a variance.
        clip: clip pre-activations to ±clip. None: no clipping.
        zoneout: share of units of h that keep their value in a training step, in [0, 1); at inference each unit keeps
            that share of its value.
        learn_initial_state: use parameters, initially zeros, as the initial state and after a reset.
        implementation: 1 or 2, for compatibility with Keras; it has no effect.
        input_size: width I, to create the weights immediately; None: at the first call.
        dtype, device: of the weights; None: torch's default and the CPU.
        name: the cell's name in error messages.

    Raises:
        ShapeError: a width below 1, or a projection that isn't narrower than the units.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

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
    State = State

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: weights.Given = "glorot_uniform",
        recurrent_initializer: weights.Given = "orthogonal",
        bias_initializer: weights.Given = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        *,
        peepholes: bool = False,
        coupled: bool = False,
        proj_size: int = 0,
        cell_clip: float | None = None,
        zoneout_cell: float = 0.0,
        forget_bias: float | None = None,
        gate_activations: Any = (),
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        implementation: int = 2,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        if forget_bias is not None and not (isinstance(forget_bias, (int, float)) and math.isfinite(forget_bias)):
            raise ValueError(f"LSTMCell: expected forget_bias to be a finite number, got {forget_bias!r}")
        super().__init__({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        if forget_bias is not None and (coupled or not use_bias):
            raise ValueError(f"{self._owner}: forget_bias needs a forget gate with a bias")

    def _fill(self, name: str, values: Tensor, initializer: Any) -> None:
        forget_bias = self.forget_bias
        if name != "bias" or forget_bias is None:
            super()._fill(name, values, initializer)
            return
        i, f, g_o = values.split([self.units, self.units, 2 * self.units])
        super()._fill(name, i, initializer)
        super()._fill(name, g_o, initializer)
        f.fill_(forget_bias)

    @property
    def unit_forget_bias(self) -> bool:
        """Whether the forget gate's bias is initialised with 1, unless `forget_bias` is given."""
        return self._config["unit_forget_bias"]

    @property
    def forget_bias(self) -> float | None:
        """Initial value of the forget gate's bias; None: `bias_initializer` determines it."""
        if "f" not in self._spec.gates:
            return None
        given = self._config["forget_bias"]
        return 1.0 if given is None and self.unit_forget_bias else given


class GRUCell(Cell):
    """One step of a gated recurrent unit.

        a = x·kernel + bias[0]        q = h_prev·recurrent_kernel + bias[1]
        z, r = σ(a_z + q_z, a_r + q_r)        g = φ(a_g + r·q_g)        h = z·h_prev + (1 - z)·g

    With `reset_after=False` there is one bias `[3H]`, and `g = φ(a_g + (r·h_prev)·recurrent_kernel_g)`.

    Args:
        units: width H of the gates, and of the state.
        activation: φ, by Keras's name or as a callable; None means linear.
        recurrent_activation: σ, likewise.
        use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer,
        recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dropout,
        recurrent_dropout, seed, gate_activations, norm_epsilon, clip, zoneout, learn_initial_state, implementation,
        input_size, dtype, device, name: see `LSTMCell`.
        reset_after: whether the reset gate acts after the recurrent product, as in PyTorch and cuDNN.
        layer_norm: normalise x·kernel and h_prev·recurrent_kernel, gates and candidate separately, each times a gain.

    Raises:
        ShapeError: a width below 1.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

    >>> cell = GRUCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6), torch.zeros(2, 4))
    >>> tuple(h.shape), tuple(cell.kernel.shape), tuple(cell.bias.shape)
    ((2, 4), (6, 12), (2, 12))

    Ref: Cho et al. 2014, eq. 5 to 8, with z and 1 - z exchanged, as in all libraries.
    """

    kind = "gru"
    State = HiddenState

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: weights.Given = "glorot_uniform",
        recurrent_initializer: weights.Given = "orthogonal",
        bias_initializer: weights.Given = "zeros",
        kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        reset_after: bool = True,
        seed: int | None = None,
        *,
        gate_activations: Any = (),
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        implementation: int = 2,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__({key: value for key, value in locals().items() if key not in ("self", "__class__")})


class SimpleRNNCell(Cell):
    """One step of a simple recurrent network.

        h = φ(x·kernel + h_prev·recurrent_kernel + bias)

    Args:
        units: width H of the state.
        activation: φ, by Keras's name or as a callable; None means linear.
        use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer,
        recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dropout,
        recurrent_dropout, seed, gate_activations, norm_epsilon, clip, zoneout, learn_initial_state, input_size, dtype,
        device, name: see `LSTMCell`.
        layer_norm: normalise x·kernel and h_prev·recurrent_kernel, each times a gain.

    Raises:
        ShapeError: a width below 1.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

    >>> cell = SimpleRNNCell(4)
    >>> h, (h,) = cell(torch.zeros(2, 6))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 4))

    Ref: Elman 1990.
    """

    kind = "rnn"
    State = HiddenState

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        use_bias: bool = True,
        kernel_initializer: weights.Given = "glorot_uniform",
        recurrent_initializer: weights.Given = "orthogonal",
        bias_initializer: weights.Given = "zeros",
        kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        *,
        gate_activations: Any = (),
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__({key: value for key, value in locals().items() if key not in ("self", "__class__")})
