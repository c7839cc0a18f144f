"""Finds the recurrent parts of a module that can be compiled where the whole can't."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from cellstack.capture.attempts import attempt
from cellstack.capture.nested import fresh, tensors_in
from cellstack.capture.prepared import Prepared, copied_for
from cellstack.cells.errors import FormatError
from cellstack.network import Network

MOST_TRIED = 12  # parts, the outermost first
MOST_NAMED = 3


def compilable(ready: Prepared, tolerance: float) -> str:
    """Return the end of an error message, with the largest parts of a module that can be compiled; "" if none can."""
    kinds = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    layers = [f"{path}." if path else "" for path, part in ready.module.named_modules() if _is_layer(part)]
    parts = {
        path: part
        for path, part in ready.module.named_modules()
        # A layer of ours doesn't call its cells, and hooks can't observe the calls of scripted parts.
        if path and not path.startswith(tuple(layers)) and not isinstance(part, torch.jit.ScriptModule)
    }
    recurrent = {
        path
        for path, part in parts.items()
        if any(isinstance(inner, kinds) or _is_layer(inner) for inner in part.modules())
    }
    calls, sources = _calls(ready, parts, recurrent)
    found: dict[str, Network] = {}
    tried = 0
    for path in sorted(calls, key=lambda path: path.count(".")):
        within = any(path.startswith(f"{outer}.") for outer in found)
        if within or tried == MOST_TRIED:
            continue
        tried += 1
        try:
            found[path] = attempt(copied_for(ready.module.get_submodule(path), calls[path]), tolerance)[0]
        except (TypeError, ValueError, FormatError):  # a smaller part may be possible
            continue
    named = [_described(path, network, calls[path], sources) for path, network in list(found.items())[:MOST_NAMED]]
    more = len(found) - len(named)
    if not named:
        return ""
    return f"; parts that can be compiled: {'; '.join(named)}" + (f"; and {more} more" if more else "")


def _described(path: str, network: Network, inputs: tuple[Any, ...], sources: dict[int, tuple[Any, str]]) -> str:
    shapes = repr(network).splitlines()[0].split(": ", 1)[1].rsplit(", ", 1)[0]
    computed = None, "a tensor computed in forward"
    given = " and ".join(dict.fromkeys(sources.get(id(value), computed)[1] for value in tensors_in(inputs)))
    return f"module.{path}, {shapes}, applied to {given}"


def _is_layer(part: Any) -> bool:
    """Whether a part of a module is one of `cellstack.layers`."""
    return any(kind.__module__.startswith("cellstack.layers.") for kind in type(part).__mro__)


def _calls(
    ready: Prepared, parts: dict[str, Any], recurrent: set[str]
) -> tuple[dict[str, tuple[Any, ...]], dict[int, tuple[Any, str]]]:
    """Run a module; return the inputs of each recurrent part's first call, and tensors with their origin, by id."""
    calls: dict[str, tuple[Any, ...]] = {}
    inputs = fresh(ready.inputs)
    # The tensors are kept, so that no other object gets the id of one of them.
    sources = {
        id(value): (value, f"input {n} of the module" if len(inputs) > 1 else "the module's input")
        for n, value in enumerate(inputs)
    }

    def before(path: str, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = inspect.signature(part.forward).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        if path not in calls and not bound.kwargs:
            calls[path] = bound.args

    def after(path: str, made: Any) -> None:
        for value in tensors_in(made):
            sources[id(value)] = value, f"the output of module.{path}"

    hooks = []
    for path, part in parts.items():
        if path in recurrent:
            hooks.append(
                part.register_forward_pre_hook(
                    lambda part, args, kwargs, path=path: before(path, part, args, kwargs), with_kwargs=True
                )
            )
        hooks.append(part.register_forward_hook(lambda _, __, made, path=path: after(path, made)))
    try:
        with torch.no_grad():
            ready.module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, sources
