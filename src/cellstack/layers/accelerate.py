"""PyTorch's own recurrent modules on the fused kernel: their class changes in place, and all else stays as it was.

`accelerate` gives each `nn.LSTM`, `nn.GRU`, `nn.RNN` and each of their cells in a module a subclass of its class.
Parameters, their names, buffers and hooks are the module's own, and the kernel reads the weights in the rows in which
PyTorch keeps them. A call that the kernel can't serve, or not faster, goes to PyTorch's own `forward`, which also says
what is wrong with a call that no one can serve; `plan` says which calls these are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cellstack.layers import op
from cellstack.layers.accelerated import PASSING, Accelerated, class_of, copied
from cellstack.layers.bidirectional import Bidirectional
from cellstack.layers.rnn import RNN
from cellstack.layers.served import (
    LEAST_STEPS,
    WIDE_LSTM,
    WIDE_RNN_CELL,
    base_of,
    is_narrow,
    obstacle,
    original_of,
    own_way,
)
from cellstack.spec import Plan


def _recurrent(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each of PyTorch's recurrent modules in `module`, with its name; a module that is there twice, once."""
    for name, part in module.named_modules():
        if base_of(type(part)) is not None:
            yield name, part


def accelerate(module: nn.Module) -> nn.Module:
    """Let the fused kernel run the recurrent modules of PyTorch in `module`, in place.

    Each `nn.LSTM`, `nn.GRU`, `nn.RNN`, `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`, and each module of a class that
    derives from one of these and has no forward of its own, becomes one of a subclass of its class. Its parameters are
    the very same, so that optimisers, state dicts, hooks, `isinstance` and checkpoints go on as they were; what is
    pickled is PyTorch's own module. Calls that the kernel can't serve run as before: `plan` tells which.

    Args:
        module: any module; one that was accelerated before stays as it is.

    Returns:
        The same module.

    Raises:
        TypeError: it is no module.
        ValueError: there is no recurrent module of PyTorch in it that the kernel could run.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.LSTM(8, 16, batch_first=True))
    >>> accelerate(model)[1](torch.zeros(2, 5, 8))[0].shape
    torch.Size([2, 5, 16])
    """
    found = list(_recurrent(_checked(module, "accelerate")))
    if all(not isinstance(part, Accelerated) and own_way(part) is not None for _, part in found):
        what = ", ".join(f"{name or 'it'}: {obstacle(part)}" for name, part in found[:3])
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            "accelerate: expected a module with an nn.LSTM, nn.GRU or nn.RNN, or a cell of theirs, in it, got "
            f"{type(module).__name__} without one{f' that the kernel could run ({what}{more})' if found else ''}"
        )
    for _, part in found:
        if not isinstance(part, Accelerated) and own_way(part) is None:
            part.__class__ = class_of(type(part))
    return module


_freezing = threading.Lock()  # contexts of several threads may hold one module
_packing: dict[int, Any] = {}  # modules of all contexts that are open, by id
_hooks: list[Any] = []  # the one on optimisers' steps, while a context is open


def _pack_again(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Discard what was packed from an optimiser's weights, after its step: fused optimisers change no version."""
    written = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _freezing:
        for part in _packing.values():
            if any(id(weight) in written for weight in part.parameters()):
                part.__dict__.get("_packed", {}).clear()


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Say that the weights of an accelerated module stay as they are, for as long as the context lasts.

    A call without gradients then packs them once, at the first call, which is most of what a step of a cell, or of a
    sequence of length 1, costs: in a loop that acts, generates or listens, step by step.

    Weights that change within the context are packed again after each of these changes: a step of any
    `torch.optim.Optimizer`, fused ones included, `load_state_dict`, an operation in place, `vector_to_parameters`, and
    another tensor in place of one. Where another tensor or process shares the memory of a weight as it is packed, as
    after `vector_to_parameters`, `share_memory` or with a `state_dict()` that is still referenced, every call packs
    that layer's weights: such a call is correct, and as slow as outside the context. Writes that PyTorch's version
    counter doesn't record aren't noticed otherwise: those through `.data` or a NumPy array, and those of a fused
    operator that is called without its optimiser.

    Args:
        module: a module that `accelerate` was given, or one with such modules inside.

    Raises:
        TypeError: it is no module.
        ValueError: there is no accelerated module in it.

    >>> import torch
    >>> cell = accelerate(nn.LSTMCell(3, 4))
    >>> with torch.no_grad(), packed_weights(cell):
    ...     state = cell(torch.zeros(1, 3))
    ...     state = cell(torch.zeros(1, 3), state)
    """
    parts = [part for _, part in _recurrent(_checked(module, "packed_weights")) if isinstance(part, Accelerated)]
    if not parts:
        raise ValueError(f"packed_weights: expected a module that accelerate() was given, got {type(module).__name__}")
    with _freezing:
        for part in parts:
            own = part.__dict__  # a class of one's own may let nothing be set
            own["_holders"] = own.get("_holders", 0) + 1
            own.setdefault("_packed", {})
            _packing[id(part)] = part
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_pack_again))
    try:
        yield module
    finally:
        with _freezing:
            for part in parts:
                own = part.__dict__
                own["_holders"] = own.get("_holders", 1) - 1
                if own["_holders"] < 1:
                    _packing.pop(id(part), None)
                    for name in PASSING:
                        own.pop(name, None)
            if not _packing and _hooks:
                _hooks.pop().remove()


def restore(module: nn.Module) -> nn.Module:
    """Give the modules that `accelerate` changed their own classes back, in place, and return `module`.

    Raises:
        TypeError: it is no module.

    >>> type(restore(accelerate(nn.LSTM(8, 16)))) is nn.LSTM
    True
    """
    for _, part in _recurrent(_checked(module, "restore")):
        part.__class__ = _restored(type(part))
        for name in PASSING:
            part.__dict__.pop(name, None)
    return module


def _restored(kind: type) -> type:
    """Return `kind` without ours; one that derives from ours, as `parametrize` makes them, on what ours was made of."""
    if not issubclass(kind, Accelerated):
        return kind
    if "_class_before" in vars(kind):
        return kind._class_before
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    if "__getstate__" in own:  # that of `parametrize`, which copies by what ours had
        own.setdefault("__deepcopy__", copied)
    make: Any = type(kind)
    return make(kind.__name__, tuple(map(_restored, kind.__bases__)), own)


def plan(module: nn.Module) -> Plan:
    """Say for each recurrent module in `module` what runs it, and why: one line each.

    The layers of `cellstack.layers` say what their own `plan` says.

    Raises:
        TypeError: it is no module.

    >>> plan(accelerate(nn.Sequential(nn.LSTM(8, 16, num_layers=2))))  # doctest: +SKIP
    0: LSTM 8 -> 16, 2 layers: fused cpu kernel (avx512)
    """
    lines: list[str] = []
    inside: set[int] = set()
    for name, part in _checked(module, "plan").named_modules():
        if id(part) in inside:
            continue
        head = f"{name}: " if name else ""
        if base_of(type(part)) is not None:
            lines.append(f"{head}{_described(part)}: {_how(part)}")
        elif isinstance(part, (RNN, Bidirectional)):
            lines += [head + line for line in part.plan()]
            inside |= {id(inner) for inner in part.modules()}
    return Plan(lines or [f"{type(module).__name__}: no recurrent module"])


def _checked(module: Any, owner: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{owner}: expected a module of PyTorch, got {type(module).__name__}")
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
        return f"PyTorch's own: {why}"
    if not isinstance(module, Accelerated):
        return "PyTorch's own: accelerate() would let the fused kernel run it"
    return f"fused cpu kernel ({op.isa()}){op.autocast()}{_small(module)}"


def _small(module: Any) -> str:
    """Say which calls of a module PyTorch runs because it is faster there."""
    if is_narrow(module):
        return f" with return_gates=; else PyTorch's own, as fast below {WIDE_RNN_CELL} units"
    if isinstance(module, nn.RNNCellBase):
        return " within packed_weights() and without gradients; else PyTorch's own, as fast for one step"
    least, trained, _ = LEAST_STEPS[module.mode]
    if module.mode == "LSTM" and module.hidden_size >= WIDE_LSTM:
        return ""
    small = " of a small batch" if module.mode == "LSTM" else ""
    parts = [f"{trained} steps{small} in training"] + ([f"{least} otherwise"] if least > 1 else [])
    return f"; PyTorch's own, as fast there, below {' and '.join(parts)}"
