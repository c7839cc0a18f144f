"""Watching a live torch model: what each cellstack layer computes during any forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from torch import nn


class Seen(NamedTuple):
    """One call of a layer."""

    y: Any
    """The layer's output, without the gates that the caller may have requested."""
    trace: Any
    """A `Trace`, `GRUTrace` or `RNNTrace`, each field `[B, T, H]`; for a stack, a tuple of these, one per cell; for a
    `Bidirectional`, the pair of its directions."""


class Watch(Mapping[str, Seen]):
    """What `watch` records: a mapping from the names of a model's layers to the last call of each.

    Attributes:
        calls: all calls since the watch began, in order, as pairs of a layer's name and its record.
    """

    def __init__(self, model: nn.Module, detach: bool) -> None:
        from cellstack.layers import RNN, Bidirectional

        if not hasattr(model, "named_modules"):
            raise TypeError(f"watch: expected a torch module, got {type(model).__name__}")
        found = {name: module for name, module in model.named_modules() if isinstance(module, (RNN, Bidirectional))}
        inner = {id(one) for module in found.values() for one in module.modules() if one is not module}
        self._layers = {name: module for name, module in found.items() if id(module) not in inner}
        if not self._layers:
            raise ValueError("watch: the model has no cellstack layers")
        self._detach, self._hooks = detach, []
        self._asked = threading.local()  # for each running layer, whether its caller requested gates
        self.calls: list[tuple[str, Seen]] = []

    def __enter__(self) -> Watch:
        if self._hooks:
            raise RuntimeError("watch: this watch is already active: call watch() for another")
        for name, module in self._layers.items():
            self._hooks += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                # within an enclosing watch
                module.register_forward_hook(self._after(name), prepend=True),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._hooks:  # a copy of the model made in the meantime
                return None
            setattr(self._asked, name, bool(args[4] if len(args) > 4 else kwargs.get("return_gates", False)))
            if len(args) > 4:
                return (*args[:4], True, *args[5:]), kwargs
            return args, {**kwargs, "return_gates": True}

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], results: Any) -> Any:
            asked = self._asked.__dict__.pop(name, None)
            if asked is None:
                return results
            *rest, trace = results
            y = rest[0] if len(rest) == 1 else tuple(rest)
            self.calls.append((name, Seen(*(map(_detached, (y, trace)) if self._detach else (y, trace)))))
            return results if asked else y

        return hook

    def __getitem__(self, name: str) -> Seen:
        for called, seen in reversed(self.calls):
            if called == name:
                return seen
        if name in self._layers:
            raise KeyError(f"{name!r} wasn't called since the watch began")
        raise KeyError(f"expected one of {', '.join(map(repr, self._layers))}, got {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.calls))

    def __len__(self) -> int:
        return len(dict(self.calls))

    def __repr__(self) -> str:
        return f"Watch of {len(self._layers)} layers, {len(self.calls)} calls: {', '.join(map(repr, self))}"


def _detached(value: Any) -> Any:
    """Return tensors, also in nested tuples, detached from their graph."""
    if hasattr(value, "detach"):
        return value.detach()
    if hasattr(value, "_fields"):
        return type(value)(*map(_detached, value))
    return tuple(map(_detached, value)) if isinstance(value, (tuple, list)) else value


def watch(model: nn.Module, detach: bool = True) -> Watch:
    """Return a context in which every cellstack layer of a model records its gates at each call of the model.

    The outputs don't change. Cells that are called step by step in a loop aren't layers, and aren't recorded.

    Args:
        model: any module; if the model is itself a layer, its name is `""`.
        detach: whether the records are detached from the graph; otherwise gradients flow through them.

    Raises:
        ValueError: the model has no cellstack layer.
        TypeError: not a torch module.

    >>> import torch
    >>> from cellstack import layers
    >>> model = torch.nn.Sequential(layers.LSTM(4, return_sequences=True), layers.GRU(3))
    >>> with watch(model) as seen:
    ...     y = model(torch.ones(2, 5, 3))
    >>> sorted(seen), tuple(seen["0"].trace.f.shape), tuple(seen["1"].trace.z.shape)
    (['0', '1'], (2, 5, 4), (2, 5, 3))
    """
    return Watch(model, detach)
