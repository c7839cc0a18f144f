# Written by `make stubs`.
# fmt: off
# ruff: noqa: I001
from typing import Any
from cellstack.keras.recurrent import Recurrent

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

class LSTM(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', recurrent_initializer: Any = 'orthogonal',
        bias_initializer: Any = 'zeros', unit_forget_bias: bool = True, kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None, bias_regularizer: Any = None, activity_regularizer: Any = None,
        kernel_constraint: Any = None, recurrent_constraint: Any = None, bias_constraint: Any = None,
        dropout: float = 0.0, recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        peepholes: bool = False, coupled: bool = False, proj_size: int = 0, cell_clip: float | None = None,
        zoneout_cell: float = 0.0, gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        return_gates: bool = False, **kwargs: Any
    ) -> None: ...

class GRU(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', recurrent_initializer: Any = 'orthogonal',
        bias_initializer: Any = 'zeros', kernel_regularizer: Any = None, recurrent_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        recurrent_constraint: Any = None, bias_constraint: Any = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, reset_after: bool = True,
        zero_output_for_mask: bool = False, *, attention: bool = False, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False, **kwargs: Any
    ) -> None: ...

class SimpleRNN(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'tanh', use_bias: bool = True, kernel_initializer: Any = 'glorot_uniform',
        recurrent_initializer: Any = 'orthogonal', bias_initializer: Any = 'zeros', kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None, bias_regularizer: Any = None, activity_regularizer: Any = None,
        kernel_constraint: Any = None, recurrent_constraint: Any = None, bias_constraint: Any = None,
        dropout: float = 0.0, recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False,
        **kwargs: Any
    ) -> None: ...

class MinGRU(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', bias_initializer: Any = 'zeros', kernel_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        bias_constraint: Any = None, dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        gate_activations: Any = (), layer_norm: bool | str = False, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False,
        **kwargs: Any
    ) -> None: ...

class MinLSTM(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', bias_initializer: Any = 'zeros', kernel_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        bias_constraint: Any = None, dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        gate_activations: Any = (), layer_norm: bool | str = False, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False,
        **kwargs: Any
    ) -> None: ...

class LiGRU(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'relu', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', recurrent_initializer: Any = 'orthogonal',
        bias_initializer: Any = 'zeros', kernel_regularizer: Any = None, recurrent_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        recurrent_constraint: Any = None, bias_constraint: Any = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False,
        **kwargs: Any
    ) -> None: ...

class SLSTM(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', recurrent_initializer: Any = 'orthogonal',
        bias_initializer: Any = 'zeros', kernel_regularizer: Any = None, recurrent_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        recurrent_constraint: Any = None, bias_constraint: Any = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        exponential_forget: bool = False, unit_forget_bias: bool = True, gate_activations: Any = (), heads: int = 1,
        zoneout: float = 0.0, return_gates: bool = False, **kwargs: Any
    ) -> None: ...

class CfC(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', recurrent_initializer: Any = 'orthogonal',
        bias_initializer: Any = 'zeros', kernel_regularizer: Any = None, recurrent_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        recurrent_constraint: Any = None, bias_constraint: Any = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        timespans: bool = False, mode: str = 'default', backbone_units: int = 0,
        backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)', backbone_layers: int = 1, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, return_gates: bool = False, **kwargs: Any
    ) -> None: ...

class SRU(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'linear', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: Any = 'glorot_uniform', bias_initializer: Any = 'zeros', kernel_regularizer: Any = None,
        bias_regularizer: Any = None, activity_regularizer: Any = None, kernel_constraint: Any = None,
        bias_constraint: Any = None, dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        gate_activations: Any = (), clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        return_gates: bool = False, **kwargs: Any
    ) -> None: ...

class CfS(Recurrent):
    def __init__(
        self, units: int, activation: Any = 'linear', use_bias: bool = True, kernel_initializer: Any = 'glorot_uniform',
        recurrent_initializer: Any = 'orthogonal', bias_initializer: Any = 'zeros', kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None, bias_regularizer: Any = None, activity_regularizer: Any = None,
        kernel_constraint: Any = None, recurrent_constraint: Any = None, bias_constraint: Any = None,
        dropout: float = 0.0, recurrent_dropout: float = 0.0, seed: int | None = None, return_sequences: bool = False,
        return_state: bool = False, go_backwards: bool = False, zero_output_for_mask: bool = False, *,
        timespans: bool = False, backbone_units: int = 0, backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)',
        backbone_layers: int = 1, gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        return_gates: bool = False, **kwargs: Any
    ) -> None: ...
