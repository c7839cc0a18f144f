"""Copies a module for `compile`, which runs, changes and exports the copy only."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import TorchFunctionMode

from cellstack.cells.errors import FormatError

MOST_SEARCHED = 100_000  # objects in which locks are looked for
NORMS = ("WeightNorm", "SpectralNorm")  # hooks of torch.nn.utils that compute a weight before each call


def copied(module: Any) -> Any:
    """Return a copy of a module in evaluation mode; the module isn't changed.

    Computed tensors that the module keeps, such as the weight of `torch.nn.utils.weight_norm` or an output of training,
    are copied without their gradients' history, which deepcopy refuses. Each lock becomes a new lock.

    Raises:
        FormatError: a part can't be copied; the message names it.
    """
    try:
        made = duplicate(module)
        made.eval()  # the eval of some modules returns None
        return made
    except Exception as error:  # a module may hold anything
        where = _uncopied(module)
        if where:
            where = f"set its attribute {where} to None before, or define __deepcopy__: "
        raise FormatError(
            f"compile: {type(module).__name__} can't be copied: {where}{type(error).__name__}: {error}"
        ) from error


def duplicate(value: Any) -> Any:
    """Return a deep copy, with computed tensors detached and new locks."""

    class Detaching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.__deepcopy__ and _is_computed(args[0]):
                tensor, memo = args
                memo[id(tensor)] = made = tensor.detach().clone()
                return made
            return func(*args, **(kwargs or {}))

    locks = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
    memo: dict[int, Any] = {}
    for one in _objects(value):
        if type(one) in locks:
            memo[id(one)] = locks[type(one)]()
        elif isinstance(one, torch._C.ScriptFunction):  # it has no state
            memo[id(one)] = one
    with Detaching():
        return copy.deepcopy(value, memo)


def _is_computed(tensor: Any) -> bool:
    """Return whether a tensor was computed from others with gradients.

    A view from `torch.no_grad()` has no history, and PyTorch refuses to look for it once the values have changed.
    """
    return tensor.requires_grad and ((tensor._is_view() and not isinstance(tensor, Parameter)) or not tensor.is_leaf)


def _objects(value: Any) -> Iterator[Any]:
    """Yield an object, its attributes and its entries, and theirs, at any depth."""
    seen, waiting = set[int](), [value]
    while waiting and len(seen) < MOST_SEARCHED:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        else:
            waiting += getattr(one, "__dict__", {}).values()


def _uncopied(module: Any) -> str:
    """Return the name of the first attribute of a module, or of a module in it, that can't be copied; "" if none."""
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name != "_modules"}
        kept = {
            f"{name}[{key!r}]": value for name in ("_buffers", "_parameters") for key, value in own.pop(name).items()
        }
        for name, value in (own | kept).items():
            if not _can_be_copied(value):
                return ".".join(filter(None, (path, name)))
    return ""


def _can_be_copied(value: Any) -> bool:
    try:
        duplicate(value)
    except Exception:  # a class may define how it is copied
        return False
    return True


def fold(module: Any) -> list[str]:
    """Replace weights that a module computes before each call by their values, and return their names.

    These are parametrizations, such as `torch.nn.utils.parametrizations.weight_norm` and `spectral_norm`, their
    older form, `torch.nn.utils.weight_norm` and `spectral_norm`, and pruned weights.
    """
    folded = []
    for path, part in module.named_modules():
        if parametrize.is_parametrized(part):
            kept = {key: value for key, value in vars(type(part)).items() if key not in ("__dict__", "__weakref__")}
            # Its own class, as removing a parametrization changes the class, which copies share.
            part.__class__ = type(type(part).__name__, type(part).__bases__, kept)
            for name in list(part.parametrizations):
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
                folded.append(f"{path}.{name}".strip("."))
        for key, hook in list(part._forward_pre_hooks.items()):
            pruned = isinstance(hook, BasePruningMethod)
            if pruned or (type(hook).__name__ in NORMS and type(hook).__module__.startswith("torch.nn.utils.")):
                name = hook._tensor_name if pruned else hook.name
                hook.remove(part)
                del part._forward_pre_hooks[key]
                folded.append(f"{path}.{name}".strip("."))
    return folded
