# Written by `make stubs`.
# fmt: off
# ruff: noqa: I001
from typing import Any
import torch
from cellstack.layers import weights
from cellstack.layers.cell_classes import CfCCell
from cellstack.layers.cell_classes import CfSCell
from cellstack.layers.cell_classes import GRUCell
from cellstack.layers.cell_classes import LSTMCell
from cellstack.layers.cell_classes import LiGRUCell
from cellstack.layers.cell_classes import MinGRUCell
from cellstack.layers.cell_classes import MinLSTMCell
from cellstack.layers.cell_classes import SLSTMCell
from cellstack.layers.cell_classes import SRUCell
from cellstack.layers.cell_classes import SimpleRNNCell
from cellstack.layers.rnn import SingleCellRNN

__all__ = [
    "GRU",
    "LSTM",
    "SLSTM",
    "SRU",
    "CfC",
    "CfS",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "SimpleRNN"
]

class LSTM(SingleCellRNN):
    cell: LSTMCell
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', unit_forget_bias: bool = True,
        kernel_regularizer: weights.Given = None, recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None, activity_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, return_sequences: bool = False, return_state: bool = False, go_backwards: bool = False,
        stateful: bool = False, unroll: bool = False, zero_output_for_mask: bool = False, *, peepholes: bool = False,
        coupled: bool = False, proj_size: int = 0, cell_clip: float | None = None, zoneout_cell: float = 0.0,
        forget_bias: float | weights.Given = None, use_cudnn: bool | str = 'auto', implementation: int = 2,
        gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, remat: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class GRU(SingleCellRNN):
    cell: GRUCell
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, stateful: bool = False, unroll: bool = False,
        reset_after: bool = True, zero_output_for_mask: bool = False, *, attention: bool = False,
        use_cudnn: bool | str = 'auto', implementation: int = 2, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class SimpleRNN(SingleCellRNN):
    cell: SimpleRNNCell
    def __init__(
        self, units: int, activation: Any = 'tanh', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, return_sequences: bool = False, return_state: bool = False,
        go_backwards: bool = False, stateful: bool = False, unroll: bool = False, seed: int | None = None,
        zero_output_for_mask: bool = False, *, gate_activations: Any = (), layer_norm: bool | str = False,
        heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0,
        learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class MinGRU(SingleCellRNN):
    cell: MinGRUCell
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, seed: int | None = None,
        return_sequences: bool = False, return_state: bool = False, go_backwards: bool = False, stateful: bool = False,
        unroll: bool = False, zero_output_for_mask: bool = False, *, gate_activations: Any = (),
        layer_norm: bool | str = False, norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0,
        learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class MinLSTM(SingleCellRNN):
    cell: MinLSTMCell
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, seed: int | None = None,
        return_sequences: bool = False, return_state: bool = False, go_backwards: bool = False, stateful: bool = False,
        unroll: bool = False, zero_output_for_mask: bool = False, *, gate_activations: Any = (),
        layer_norm: bool | str = False, norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0,
        learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class LiGRU(SingleCellRNN):
    cell: LiGRUCell
    def __init__(
        self, units: int, activation: Any = 'relu', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, stateful: bool = False, unroll: bool = False,
        zero_output_for_mask: bool = False, *, gate_activations: Any = (), layer_norm: bool | str = False,
        heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0,
        learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class SLSTM(SingleCellRNN):
    cell: SLSTMCell
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, stateful: bool = False, unroll: bool = False,
        zero_output_for_mask: bool = False, *, exponential_forget: bool = False, unit_forget_bias: bool = True,
        forget_bias: float | weights.Given = None, gate_activations: Any = (), heads: int = 1, zoneout: float = 0.0,
        remat: bool = False, input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class CfC(SingleCellRNN):
    cell: CfCCell
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, stateful: bool = False, unroll: bool = False,
        zero_output_for_mask: bool = False, *, timespans: bool = False, mode: str = 'default', backbone_units: int = 0,
        backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)', backbone_layers: int = 1, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class SRU(SingleCellRNN):
    cell: SRUCell
    def __init__(
        self, units: int, activation: Any = 'linear', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, seed: int | None = None,
        return_sequences: bool = False, return_state: bool = False, go_backwards: bool = False, stateful: bool = False,
        unroll: bool = False, zero_output_for_mask: bool = False, *, gate_activations: Any = (),
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, remat: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class CfS(SingleCellRNN):
    cell: CfSCell
    def __init__(
        self, units: int, activation: Any = 'linear', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, stateful: bool = False, unroll: bool = False,
        zero_output_for_mask: bool = False, *, timespans: bool = False, backbone_units: int = 0,
        backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)', backbone_layers: int = 1, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, remat: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...
