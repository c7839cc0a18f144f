"""Which of PyTorch's recurrent modules the kernel runs, and which of their calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from cellstack.layers import op

KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn", "RNN_RELU": "rnn"}
_MODES = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}  # that of an nn.RNNCell is told by its nonlinearity
_MODULES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
# By which they run; a class that has one of its own runs by that.
_METHODS = (
    "forward",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
)
_DTYPES = (torch.float32, torch.float64)
# Steps from which the kernel is the faster one, in a call without gradients, with them, and with frozen weights;
# measured (benchmarks/accelerate.py).
LEAST_STEPS = {"LSTM": (1, 16, 1), "GRU": (8, 4, 1), "RNN_TANH": (16, 16, 4), "RNN_RELU": (16, 16, 4)}
# Units from which a cell without gates is the faster one for a step with frozen weights.
WIDE_RNN_CELL = 128
# Units, or rows × steps, from which an LSTM's training step is the faster one whatever its steps.
WIDE_LSTM, BIG_LSTM = 128, 512


def is_narrow(module: nn.Module) -> bool:
    """Return whether PyTorch runs a step of a module as fast with frozen weights too."""
    return isinstance(module, nn.RNNCell) and module.hidden_size < WIDE_RNN_CELL


def original_of(kind: type) -> type:
    """Return the class of PyTorch's, or that derives from it, that one of ours was made of; another as it is."""
    return getattr(kind, "_class_before", kind)


def base_of(kind: type) -> type | None:
    """Return which of PyTorch's recurrent classes `kind` is or derives from; None for another class."""
    return next((base for base in _MODULES if issubclass(kind, base)), None)


def _own_part(kind: type) -> str | None:
    """Return the name of a method of `kind` that isn't the one by which PyTorch's own class runs; None: all are."""
    base = base_of(kind)
    return next((name for name in _METHODS if getattr(kind, name, None) is not getattr(base, name, None)), None)


def own_way(module: nn.Module) -> str | None:
    """Return by what of its own a recurrent module runs, so that it keeps its class; None: by what PyTorch's has."""
    kind = original_of(type(module))
    own = _own_part(kind)
    if own is not None:
        return f"{kind.__name__} has a {own} of its own"
    if parametrize.is_parametrized(module) and not hasattr(type(module), "_class_before"):
        return "its weights are parametrised"
    if any(map(is_lazy, module.parameters(recurse=False))):
        return "its weights aren't there yet"
    return None


def obstacle(module: nn.Module) -> str | None:
    """Return why PyTorch runs every call of a recurrent module as it is now; None where the kernel can run some."""
    own = own_way(module)
    if own is not None:
        return own
    weights = list(module.parameters(recurse=False))
    subclasses = sorted({type(weight).__name__ for weight in weights if type(weight) not in op.PLAIN})
    if subclasses:
        return f"its weights are of a subclass of torch.Tensor ({', '.join(subclasses)})"
    if any(weight.layout is not torch.strided for weight in weights):
        return "its weights are sparse"
    devices = sorted({weight.device.type for weight in weights})
    if devices != ["cpu"]:
        return f"its weights are on {' and '.join(devices)}"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        named = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its weights are {' and '.join(named)}, not float32 or float64"
    return None


def _watched() -> bool:
    """Whether something looks on that knows PyTorch's operations alone: a tracer, an exporter, a transform."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None or op.transformed()


def is_ready(x: Any, width: int, weights: Sequence[Any], states: Sequence[Any]) -> bool:
    """Whether these are the tensors that the kernel takes; where it is no, PyTorch runs the call, or refuses it."""
    if not isinstance(x, Tensor) or op.wraps(x) or _watched() or not x.numel() or x.shape[-1] != width:
        return False
    for array in (*weights, *states):  # first, since a subclass may intercept the reading of an attribute
        if type(array) not in op.PLAIN:
            return False
    dtype = weights[0].dtype
    mixed = torch.is_autocast_enabled("cpu")
    if dtype is not torch.float32 and (mixed or dtype is not torch.float64):
        return False
    for weight in weights:
        if weight.dtype is not dtype or not weight.is_cpu or weight.layout is not torch.strided:
            return False
    for given in (x, *states):
        if not given.is_cpu or given.layout is not torch.strided:
            return False
        if given.dtype is not dtype and not (mixed and given.is_floating_point()):
            return False
    return True


def arrays_of(hx: Any, mode: str) -> Sequence[Any]:
    """Return the arrays of a state as PyTorch's modules take it: a pair of an LSTM, else the array itself.

    An empty tuple isn't the same as None: PyTorch refuses it, so it is returned as if it were an array.
    """
    return () if hx is None else hx if mode == "LSTM" and isinstance(hx, (tuple, list)) and hx else (hx,)


def mode_of(cell: Any) -> str:
    """Return what a cell would be called as the mode of an `nn.RNNBase`."""
    return (
        next((mode for kind, mode in _MODES.items() if isinstance(cell, kind)), None)
        or f"RNN_{cell.nonlinearity.upper()}"
    )


def name_of(module: nn.Module) -> str:
    """Return what messages call a module: the name of its own class."""
    return original_of(type(module)).__name__


def why_not(module: nn.Module) -> str:
    """Say why PyTorch has to run a call, which one that only the kernel could give was asked of."""
    return obstacle(module) or "under a transform or a tracer, or with an input that it refuses"
