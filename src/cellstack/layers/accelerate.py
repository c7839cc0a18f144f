"""PyTorch's recurrent modules on the fused kernel: `accelerate` changes their class in place and nothing else.

`accelerate` replaces the class of each `nn.LSTM`, `nn.GRU`, `nn.RNN` and each of their cells in a module by a subclass.
Parameters, their names, buffers and hooks stay the same, and the kernel reads the weights in PyTorch's layout. Calls
that the kernel doesn't support, or doesn't run faster, go to PyTorch's `forward`, which also reports invalid calls;
`plan` says which calls these are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cellstack.cells.plan import Plan
from cellstack.layers import op
from cellstack.layers.accelerated import CONTEXT_ATTRIBUTES, Accelerated, class_of, copied
from cellstack.layers.bidirectional import Bidirectional
from cellstack.layers.eligibility import (
    LIMITS,
    WIDE_RNN_CELL,
    base_of,
    is_narrow,
    name_of,
    obstacle,
    original_of,
    overrides_forward,
    why_unsupported,
)
from cellstack.layers.handwritten import HandWritten, refused
from cellstack.layers.rnn import RNN


def _recurrent(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each of PyTorch's recurrent modules in `module` with its name; a shared module once."""
    for name, part in module.named_modules():
        if base_of(type(part)) is not None:
            yield name, part


def accelerate(module: nn.Module) -> nn.Module:
    """Make the fused kernel run PyTorch's recurrent modules in `module`; change their class in place.

    This applies to each `nn.LSTM`, `nn.GRU`, `nn.RNN`, `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`, and to each module
    of a class that derives from one of these. A class with its own `forward` keeps it; the kernel runs its calls of
    `super().forward`. The parameters remain the same objects, so optimisers, state dicts, hooks, `isinstance` and
    checkpoints work as before; pickling saves PyTorch's own module. Calls that the kernel doesn't support run in
    PyTorch: see `plan`.

    Args:
        module: any module; one that is already accelerated isn't changed.

    Returns:
        The same module.

    Raises:
        TypeError: `module` isn't a torch module.
        ValueError: it contains no recurrent module of PyTorch that the kernel can run.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.LSTM(8, 16, batch_first=True))
    >>> accelerate(model)[1](torch.zeros(2, 5, 8))[0].shape
    torch.Size([2, 5, 16])
    """
    found = list(_recurrent(_checked(module, "accelerate")))
    if all(not isinstance(part, Accelerated) and why_unsupported(part) is not None for _, part in found):
        what = ", ".join(f"{name or 'it'}: {obstacle(part)}" for name, part in found[:3])
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            "accelerate: expected a module that contains an nn.LSTM, nn.GRU or nn.RNN, or one of their cells, got "
            f"{type(module).__name__} without one{f' that the kernel can run ({what}{more})' if found else ''}"
        )
    for _, part in found:
        if not isinstance(part, Accelerated) and why_unsupported(part) is None:
            part.__class__ = class_of(type(part))
    return module


_lock = threading.Lock()  # several threads may open contexts for one module
_packing: dict[int, Any] = {}  # modules of all open contexts, by id
_hooks: list[Any] = []  # the hook on optimisers' steps, while a context is open


def _discard_packed(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Discard the packed copies of an optimiser's weights after its step: fused optimisers change no version."""
    written = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _lock:
        for part in _packing.values():
            if any(id(weight) in written for weight in part.parameters()):
                part.__dict__.get("_packed", {}).clear()


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Keep the packed weights of an accelerated module between calls, for weights that don't change in between.

    Within the context, calls without gradients pack the weights only at the first call. Packing is most of the cost of
    a single step, so this speeds up loops that run step by step, as when they act, generate or process a live signal.

    Weights that change within the context are packed again after each of these changes: a step of any
    `torch.optim.Optimizer`, fused ones included, `load_state_dict`, an in-place operation, `vector_to_parameters`, and
    replacing a parameter by another tensor. If another tensor or process shares the memory of a weight when it is
    packed, as after `vector_to_parameters`, `share_memory` or while a `state_dict()` is referenced, every call packs
    that layer's weights: it is correct, and as slow as outside the context. Other writes that PyTorch's version counter
    doesn't record go unnoticed: those through `.data` or a NumPy array, and those of a fused operator that is called
    without its optimiser.

    Args:
        module: an accelerated module, or a module that contains some.

    Raises:
        TypeError: `module` isn't a torch module.
        ValueError: it contains no accelerated module.

    >>> import torch
    >>> cell = accelerate(nn.LSTMCell(3, 4))
    >>> with torch.no_grad(), packed_weights(cell):
    ...     state = cell(torch.zeros(1, 3))
    ...     state = cell(torch.zeros(1, 3), state)
    """
    parts = [part for part in _checked(module, "packed_weights").modules() if isinstance(part, Accelerated)]
    if not parts:
        raise ValueError(f"packed_weights: {type(module).__name__} has no accelerated module: call accelerate() first")
    with _lock:
        for part in parts:
            own = part.__dict__  # a user's class may forbid setting attributes
            own["_contexts"] = own.get("_contexts", 0) + 1
            own.setdefault("_packed", {})
            _packing[id(part)] = part
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_discard_packed))
    try:
        yield module
    finally:
        with _lock:
            for part in parts:
                own = part.__dict__
                own["_contexts"] = own.get("_contexts", 1) - 1
                if own["_contexts"] < 1:
                    _packing.pop(id(part), None)
                    for name in CONTEXT_ATTRIBUTES:
                        own.pop(name, None)
            if not _packing and _hooks:
                _hooks.pop().remove()


def restore(module: nn.Module) -> nn.Module:
    """Undo `accelerate`: restore the classes of the modules in place, and return `module`.

    Raises:
        TypeError: `module` isn't a torch module.

    >>> type(restore(accelerate(nn.LSTM(8, 16)))) is nn.LSTM
    True
    """
    for part in _checked(module, "restore").modules():
        if not isinstance(part, Accelerated):
            continue
        part.__class__ = _restored(type(part))
        for name in CONTEXT_ATTRIBUTES:
            part.__dict__.pop(name, None)
    return module


def _restored(kind: type) -> type:
    """Return the class before `accelerate`; rebuild one that derives from ours, such as those of `parametrize`."""
    if not issubclass(kind, Accelerated):
        return kind
    if "_class_before" in vars(kind):
        return kind._class_before
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    if "__getstate__" in own:  # that of `parametrize`, whose copies relied on our __deepcopy__
        own.setdefault("__deepcopy__", copied)
    make: Any = type(kind)
    return make(kind.__name__, tuple(map(_restored, kind.__bases__)), own)


def plan(module: nn.Module) -> Plan:
    """Return which implementation runs each recurrent module in `module`, and why: one line per module.

    For the layers of `cellstack.layers` these are the lines of their own `plan`.

    Raises:
        TypeError: `module` isn't a torch module.

    >>> plan(accelerate(nn.Sequential(nn.LSTM(8, 16, num_layers=2))))  # doctest: +SKIP
    0: LSTM 8 -> 16, 2 layers: fused cpu kernel (avx512)
    """
    lines: list[str] = []
    inside: set[int] = set()
    for name, part in _checked(module, "plan").named_modules():
        if id(part) in inside:
            continue
        head = f"{name}: " if name else ""
        if isinstance(part, HandWritten):
            lines.append(f"{head}{name_of(part)}, {part.cells_text}: fused cpu kernel ({op.isa()}){part.limits()}")
            inside |= {id(inner) for inner in part.modules()}
        elif part in refused:
            lines.append(f"{head}{name_of(part)}: PyTorch: {refused[part]}")
        elif base_of(type(part)) is not None:
            lines.append(f"{head}{_described(part)}: {_how(part)}")
        elif isinstance(part, (RNN, Bidirectional)):
            lines += [head + line for line in part.plan()]
            inside |= {id(inner) for inner in part.modules()}
    return Plan(lines or [f"{type(module).__name__}: no recurrent module"])


def _checked(module: Any, owner: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{owner}: expected a PyTorch module, got {type(module).__name__}")
    return module


def _described(module: Any) -> str:
    text = f"{original_of(type(module)).__name__} {module.input_size} -> {module.hidden_size}"
    if isinstance(module, nn.RNNCellBase):
        return text
    text += f" -> {module.proj_size}" if module.proj_size else ""
    text += f", {module.num_layers} layers" if module.num_layers > 1 else ""
    return text + (", both directions" if module.bidirectional else "")


def _how(module: Any) -> str:
    why = obstacle(module)
    if why is not None:
        return f"PyTorch: {why}"
    if not isinstance(module, Accelerated):
        return "PyTorch: not accelerated; accelerate() makes the fused kernel run it"
    return f"fused cpu kernel ({op.isa()}){op.autocast()}{_through(module)}{_small(module)}"


def _through(module: Any) -> str:
    """Return how calls of a module reach the kernel if its forward isn't PyTorch's."""
    if "forward" in vars(module):
        return " if its attribute forward calls the forward of its class"
    return " through super().forward" if overrides_forward(original_of(type(module))) else ""


def _small(module: Any) -> str:
    """Return which calls of a module PyTorch runs because it is at least as fast for them."""
    if is_narrow(module):
        return f" with return_gates=; otherwise PyTorch, equally fast below {WIDE_RNN_CELL} units"
    if isinstance(module, nn.RNNCellBase):
        return " within packed_weights() and without gradients; otherwise PyTorch, equally fast for one step"
    limits = LIMITS[module.mode]
    if limits.units and module.hidden_size >= limits.units:
        return ""
    small = " of a small batch" if limits.rows else ""
    parts = [f"{limits.training} steps{small} in training"]
    parts += [f"{limits.inference} otherwise"] if limits.inference > 1 else []
    return f"; PyTorch, equally fast, below {' and '.join(parts)}"
