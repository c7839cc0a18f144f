"""`LSTM`, `GRU` and `SimpleRNN`: each an `RNN` of one cell that takes the arguments of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cellstack.layers import weights
from cellstack.layers.base import of_cell, own
from cellstack.layers.cell import Cell
from cellstack.layers.cells import GRUCell, LSTMCell, SimpleRNNCell
from cellstack.layers.rnn import RNN
from cellstack.spec import Plan

OF_LAYER = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask", "remat")


class _OfOneCell(RNN):
    """Base class: passes each argument to the cell or the layer, and returns all in `get_config`."""

    def __init__(self, cell: Callable[..., Cell], arguments: Mapping[str, Any]) -> None:
        given = {key: own(value) for key, value in arguments.items() if key not in ("self", "__class__")}
        of_layer = {key: given[key] for key in (*OF_LAYER, "activity_regularizer", "name")}
        # The cell has the layer's name, so that its error messages name the layer.
        of_the_cell = {key: value for key, value in given.items() if key not in (*of_layer, "use_cudnn")}
        made = cell(**of_the_cell, name=given["name"])
        use_cudnn = given.get("use_cudnn", "auto")
        if use_cudnn not in ("auto", True, False):
            raise ValueError(f"{made._owner}: expected use_cudnn to be 'auto', True or False, got {use_cudnn!r}")
        super().__init__(made, **of_layer)
        self._config = {**given, "units": made.units, "seed": made.seed}

    def plan(self) -> Plan:
        """See `RNN.plan`. The lines also name arguments that have no effect."""
        usual = {"use_cudnn": "auto", "implementation": 2}
        idle = [f"{key}={self._config[key]!r}" for key, value in usual.items() if self._config.get(key, value) != value]
        lines = super().plan()
        return Plan([f"{line}; no effect: {', '.join(idle)}" for line in lines]) if idle else lines

    units = of_cell("units")
    input_size = of_cell("input_size")
    activation = of_cell("activation")
    use_bias = of_cell("use_bias")
    dropout = of_cell("dropout")
    recurrent_dropout = of_cell("recurrent_dropout")
    spec = of_cell("spec")


class LSTM(_OfOneCell):
    """A long short-term memory over a sequence: an RNN of one `LSTMCell`.

    Args:
        units, activation, recurrent_activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer,
        unit_forget_bias, kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint,
        recurrent_constraint, bias_constraint, dropout, recurrent_dropout, seed, peepholes, coupled, proj_size,
        layer_norm, norm_epsilon, clip, cell_clip, zoneout, zoneout_cell, gate_activations, forget_bias,
        learn_initial_state, implementation, input_size, dtype, device: see `LSTMCell`.
        use_cudnn: "auto", True or False, for compatibility with Keras; it has no effect. Device, dtype and flags
            determine the implementation, see `plan`.
        activity_regularizer, return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask,
        remat, name: see `RNN`.

    Raises:
        ShapeError: a width below 1.
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, or a value out of range.

    >>> lstm = LSTM(4, return_sequences=True, return_state=True)
    >>> y, h, c = lstm([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape), tuple(c.shape)
    ((1, 1, 4), (1, 4), (1, 4))
    """

    cell: LSTMCell

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
        activity_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        *,
        peepholes: bool = False,
        coupled: bool = False,
        proj_size: int = 0,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        cell_clip: float | None = None,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        gate_activations: Any = (),
        forget_bias: float | None = None,
        learn_initial_state: bool = False,
        implementation: int = 2,
        use_cudnn: bool | str = "auto",
        remat: bool = False,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(LSTMCell, locals())

    recurrent_activation = of_cell("recurrent_activation")


class GRU(_OfOneCell):
    """Gated recurrent units over a sequence: an RNN of one `GRUCell`.

    Args:
        units, activation, recurrent_activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer,
        kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint,
        bias_constraint, dropout, recurrent_dropout, seed, reset_after, layer_norm, norm_epsilon, clip, zoneout,
        gate_activations, learn_initial_state, implementation, input_size, dtype, device: see `GRUCell`.
        use_cudnn: see `LSTM`.
        activity_regularizer, return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask,
        remat, name: see `RNN`.

    Raises:
        ShapeError: a width below 1.
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, or a value out of range.

    >>> y, h = GRU(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell: GRUCell

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
        activity_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        reset_after: bool = True,
        zero_output_for_mask: bool = False,
        *,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        gate_activations: Any = (),
        learn_initial_state: bool = False,
        implementation: int = 2,
        use_cudnn: bool | str = "auto",
        remat: bool = False,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(GRUCell, locals())

    recurrent_activation = of_cell("recurrent_activation")


class SimpleRNN(_OfOneCell):
    """A fully connected recurrence over a sequence: an RNN of one `SimpleRNNCell`.

    Args:
        units, activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer,
        recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dropout,
        recurrent_dropout, seed, layer_norm, norm_epsilon, clip, zoneout, gate_activations, learn_initial_state,
        input_size, dtype, device: see `SimpleRNNCell`.
        activity_regularizer, return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask,
        remat, name: see `RNN`.

    Raises:
        ShapeError: a width below 1.
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, or a value out of range.

    >>> y, h = SimpleRNN(4, return_sequences=True, return_state=True)([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape)
    ((1, 1, 4), (1, 4))
    """

    cell: SimpleRNNCell

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
        activity_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        seed: int | None = None,
        zero_output_for_mask: bool = False,
        *,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        gate_activations: Any = (),
        learn_initial_state: bool = False,
        remat: bool = False,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(SimpleRNNCell, locals())
