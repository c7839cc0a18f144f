# Written by `make stubs`.
# fmt: off
# ruff: noqa: I001
from typing import Any
import torch
from cellstack.layers import weights
from cellstack.layers.cell_base import Cell

__all__ = [
    "CfCCell",
    "CfSCell",
    "GRUCell",
    "LSTMCell",
    "LiGRUCell",
    "MinGRUCell",
    "MinLSTMCell",
    "SLSTMCell",
    "SRUCell",
    "SimpleRNNCell"
]

class LSTMCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', unit_forget_bias: bool = True,
        kernel_regularizer: weights.Given = None, recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None, kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        recurrent_dropout: float = 0.0, seed: int | None = None, *, peepholes: bool = False, coupled: bool = False,
        proj_size: int = 0, cell_clip: float | None = None, zoneout_cell: float = 0.0,
        forget_bias: float | weights.Given = None, implementation: int = 2, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class GRUCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        reset_after: bool = True, seed: int | None = None, *, attention: bool = False, implementation: int = 2,
        gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05,
        clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class SimpleRNNCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'tanh', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, *, gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class MinGRUCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        seed: int | None = None, *, gate_activations: Any = (), layer_norm: bool | str = False,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class MinLSTMCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'positive', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        seed: int | None = None, *, gate_activations: Any = (), layer_norm: bool | str = False,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class LiGRUCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'relu', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, *, gate_activations: Any = (), layer_norm: bool | str = False, heads: int = 1,
        norm_epsilon: float = 1e-05, clip: float | None = None, zoneout: float = 0.0, learn_initial_state: bool = False,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class SLSTMCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, *, exponential_forget: bool = False, unit_forget_bias: bool = True,
        forget_bias: float | weights.Given = None, gate_activations: Any = (), heads: int = 1, zoneout: float = 0.0,
        input_size: int | None = None, dtype: str | torch.dtype | None = None, device: Any = None,
        name: str | None = None
    ) -> None: ...

class CfCCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'tanh', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, *, timespans: bool = False, mode: str = 'default', backbone_units: int = 0,
        backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)', backbone_layers: int = 1, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...

class SRUCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'linear', recurrent_activation: Any = 'sigmoid', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', bias_initializer: weights.Given = 'zeros',
        kernel_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, bias_constraint: weights.Given = None, dropout: float = 0.0,
        seed: int | None = None, *, gate_activations: Any = (), clip: float | None = None, zoneout: float = 0.0,
        learn_initial_state: bool = False, input_size: int | None = None, dtype: str | torch.dtype | None = None,
        device: Any = None, name: str | None = None
    ) -> None: ...

class CfSCell(Cell):
    def __init__(
        self, units: int, activation: Any = 'linear', use_bias: bool = True,
        kernel_initializer: weights.Given = 'glorot_uniform', recurrent_initializer: weights.Given = 'orthogonal',
        bias_initializer: weights.Given = 'zeros', kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None, bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None, recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None, dropout: float = 0.0, recurrent_dropout: float = 0.0,
        seed: int | None = None, *, timespans: bool = False, backbone_units: int = 0,
        backbone_activation: Any = 'scaled_tanh(1.7159, 0.666)', backbone_layers: int = 1, gate_activations: Any = (),
        layer_norm: bool | str = False, heads: int = 1, norm_epsilon: float = 1e-05, clip: float | None = None,
        zoneout: float = 0.0, learn_initial_state: bool = False, input_size: int | None = None,
        dtype: str | torch.dtype | None = None, device: Any = None, name: str | None = None
    ) -> None: ...
