"""Decide which of PyTorch's recurrent modules, and which of their calls, the kernel runs."""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from cellstack import cells
from cellstack.cells.spec import STATES
from cellstack.layers import op
from cellstack.layers.base import exporting

_MODES = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}  # the mode of an nn.RNNCell depends on its nonlinearity
_MODULES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
# The methods that PyTorch's forward calls; a class that overrides one stays with PyTorch.
_METHODS = (
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
)
_DTYPES = (torch.float32, torch.float64)


class Limits(NamedTuple):
    """The sizes from which the kernel is faster than PyTorch's module, measured with benchmarks/accelerated.py."""

    inference: int  # steps without gradients
    training: int  # steps with gradients
    packed: int  # steps without gradients within packed_weights()
    units: int = 0  # units from which it is faster in training at any number of steps; 0: no number is enough
    rows: int = 0  # rows × steps from which it is, too


LIMITS = {
    "LSTM": Limits(1, 16, 1, units=128, rows=512),
    "GRU": Limits(8, 4, 1),
    "RNN_TANH": Limits(16, 16, 4),
    "RNN_RELU": Limits(16, 16, 4),
}
"""By the `mode` of PyTorch's modules."""

# Units from which the kernel is faster for one step of a cell without gates, within packed_weights().
WIDE_RNN_CELL = 128

_BY_NAME = {kind.names["torch"].name: name for name, kind in cells.KINDS.items() if "torch" in kind.names}
KINDS = {mode: _BY_NAME[mode.partition("_")[0]] for mode in LIMITS}
"""The name of the kind of cell of each mode."""


def is_narrow(module: nn.Module) -> bool:
    """Whether PyTorch runs a step of this module as fast as the kernel, even within packed_weights()."""
    return isinstance(module, nn.RNNCell) and module.hidden_size < WIDE_RNN_CELL


def original_of(kind: type) -> type:
    """Return the class that a module had before `accelerate`; a class that isn't ours unchanged."""
    return getattr(kind, "_class_before", kind)


def base_of(kind: type) -> type | None:
    """Return PyTorch's recurrent class that `kind` is or derives from; None for other classes."""
    return next((base for base in _MODULES if issubclass(kind, base)), None)


def overrides_forward(kind: type) -> bool:
    """Whether a class that derives from one of PyTorch's recurrent classes has a forward of its own."""
    return getattr(kind, "forward", None) is not getattr(base_of(kind), "forward", None)


def _codes(owner: type) -> Iterator[tuple[str, CodeType]]:
    """Yield the code of each function in a class, and of the functions within it, with the function's name."""
    for name, value in vars(owner).items():
        function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
        found = [function.__code__] if inspect.isfunction(function) else []
        while found:
            code = found.pop()
            yield name, code
            found += [part for part in code.co_consts if isinstance(part, CodeType)]


def _passes_own_type(code: CodeType) -> bool:
    """Whether a function calls `super(type(self), self)` or `super(self.__class__, self)`."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "PUSH_NULL")]
    return any(
        step.argval == "super" and (after.argval == "type" or after.opname.startswith("LOAD_FAST"))
        for step, after in itertools.pairwise(steps)
    )


@lru_cache(maxsize=256)
def _obstacle_in_class(kind: type) -> str | None:
    """Return why modules of a class stay with PyTorch; None if the kernel can run them."""
    base = base_of(kind)
    method = next((name for name in _METHODS if getattr(kind, name, None) is not getattr(base, name, None)), None)
    if method is not None:
        return f"{kind.__name__} overrides {method}"
    for owner in kind.__mro__[: kind.__mro__.index(base)]:  # type: ignore[arg-type]
        codes = list(_codes(owner))
        named = next((name for name, code in codes if name != "__init__" and _passes_own_type(code)), None)
        if named is not None:
            return f"{owner.__name__}.{named} calls super(type(self), self), which fails in every subclass"
        # Judged by the bytecode, as the source may be missing. A mistake here only makes a line of the plan wrong.
        if "forward" in vars(owner) and not any({"super", "forward"} <= set(code.co_names) for _, code in codes):
            return f"{owner.__name__}.forward doesn't call super().forward"
    return None


def why_unsupported(module: nn.Module) -> str | None:
    """Return why `accelerate` leaves the class of a recurrent module as it is; None if it can replace the class."""
    in_class = _obstacle_in_class(original_of(type(module)))
    if in_class is not None:
        return in_class
    if parametrize.is_parametrized(module) and not hasattr(type(module), "_class_before"):
        return "its weights are parametrised"
    if any(map(is_lazy, module.parameters(recurse=False))):
        return "its weights aren't initialised yet"
    return None


def obstacle(module: nn.Module) -> str | None:
    """Return why PyTorch runs every call of a module in its current state; None if the kernel can run some."""
    unsupported = why_unsupported(module)
    if unsupported is not None:
        return unsupported
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


def _traced() -> bool:
    """Whether a tracer, an exporter or a transform is active: these support only PyTorch's operators."""
    return exporting() or op.transformed()


def is_ready(x: Any, width: int, weights: Sequence[Any], states: Sequence[Any]) -> bool:
    """Whether the kernel supports these tensors; otherwise PyTorch runs the call, or refuses it."""
    if not isinstance(x, Tensor) or _traced():
        return False
    exported = torch.compiler.is_exporting()  # its tensors wrap others, and have open sizes
    if (not exported and (op.wraps(x) or not x.numel())) or x.shape[-1] != width:
        return False
    for array in (*weights, *states):  # first, as a subclass may intercept reading an attribute
        if type(array) not in op.PLAIN and not (exported and op.symbolic(array)):
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
    """Return the arrays of a state in the form of PyTorch's modules: a tuple if there are several, otherwise one array.

    An empty tuple isn't equivalent to None: PyTorch refuses it, so it is returned as if it were an array.
    """
    several = len(STATES[KINDS[mode]]._fields) > 1
    return () if hx is None else hx if several and isinstance(hx, (tuple, list)) and hx else (hx,)


def mode_of(cell: Any) -> str:
    """Return the `mode` that an `nn.RNNBase` of this cell has."""
    return (
        next((mode for kind, mode in _MODES.items() if isinstance(cell, kind)), None)
        or f"RNN_{cell.nonlinearity.upper()}"
    )


def name_of(module: nn.Module) -> str:
    """Return the name of a module in messages: that of its class before `accelerate`."""
    return original_of(type(module)).__name__


def why_not(module: nn.Module) -> str:
    """Return why PyTorch has to run a call that asks for something only the kernel supports."""
    return obstacle(module) or "a transform or tracer is active, or the input is invalid"
