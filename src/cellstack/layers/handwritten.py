"""Runs hand-written recurrent modules on the kernel: what one computes, as data, and the subclass that runs it.

`capture.recognition` finds out what a module computes. The module keeps its parameters: a `Weight` describes an array
of a cell as parts of them. The array is assembled in every call, by differentiable operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cellstack.layers import forward, op
from cellstack.layers.accelerated import CONTEXT_ATTRIBUTES, Accelerated
from cellstack.layers.eligibility import is_ready, original_of
from cellstack.layers.forward import CellRun

# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ParameterPart(NamedTuple):
    """A block `[units, inputs]` of a matrix, a range `[units]` of a vector, or a constant vector.

    Args:
        name: the parameter's name in the module; "" for a constant.
        rows: start and stop of the units; for a constant, 0 and their number.
        columns: start and stop of the inputs; None for a vector.
        transposed: whether the parameter is `[inputs, units]`.
        value: the constant.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    transposed: bool = False
    value: float = 0.0

    def of(self, module: nn.Module, like: Tensor) -> Tensor:
        """Return the part of the module's parameter, `[rows, columns]` or `[rows]`."""
        if not self.name:
            return like.new_full((self.rows[1],), self.value)
        whole = parameter(module, self.name)
        if self.columns is None:
            flat = whole if whole.ndim == 1 else whole.reshape(-1)
            return _narrowed(flat, 0, self.rows)
        first, second = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        part = _narrowed(_narrowed(whole, 0, first), 1, second)
        return part.t() if self.transposed else part

    def joined(self, other: ParameterPart) -> ParameterPart | None:
        """Return this part followed by the rows of another one as one part; None if they aren't adjacent."""
        if not self.name and not other.name and self.value == other.value:
            return self._replace(rows=(0, self.rows[1] + other.rows[1]))
        if self.name and self._replace(rows=other.rows) == other and self.rows[1] == other.rows[0]:
            return self._replace(rows=(self.rows[0], other.rows[1]))
        return None


def _narrowed(tensor: Tensor, axis: int, part: tuple[int, int]) -> Tensor:
    start, stop = part
    return tensor if stop - start == tensor.shape[axis] else tensor.narrow(axis, start, stop - start)


def parameter(module: nn.Module, name: str) -> Any:
    """Return a module's parameter by its name."""
    direct = module._parameters.get(name)
    return reduce(getattr, name.split("."), module) if direct is None else direct


class Weight(NamedTuple):
    """An array of a cell: a sum of vectors or matrices, each a concatenation of parts along the units.

    Args:
        terms: the parts of each summand.
        shape: the shape that the op takes; a matrix `[units, inputs]` is transposed if this is `[inputs, units]`.
    """

    terms: tuple[tuple[ParameterPart, ...], ...]
    shape: tuple[int, ...]

    def of(self, module: nn.Module, like: Tensor) -> Tensor:
        """Return the array, made of the module's parameters; a whole parameter is returned as it is."""
        if len(self.terms) == 1 and len(self.terms[0]) == 1 and self.terms[0][0].name:
            whole = parameter(module, self.terms[0][0].name)
            if whole.shape == self.shape and not self.terms[0][0].transposed:
                return whole
        total: Any = None
        for parts in self.terms:
            pieces = [part.of(module, like) for part in parts]
            term = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            total = term if total is None else total + term
        if total.shape == self.shape:
            return total
        return total.t() if total.shape == self.shape[::-1] else total.view(self.shape)


def weight(terms: Sequence[Sequence[ParameterPart]], shape: tuple[int, ...]) -> Weight:
    """Return a weight of this shape; adjacent parts are joined."""
    joined_terms = []
    for parts in terms:
        joined: list[ParameterPart] = []
        for part in parts:
            both = joined[-1].joined(part) if joined else None
            joined[-1:] = [both] if both is not None else [*joined[-1:], part]
        joined_terms.append(tuple(joined))
    return Weight(tuple(joined_terms), shape)


class Layer(NamedTuple):
    """A cell, and its weights in the op's order."""

    call: op.CellCall
    weights: tuple[Weight, ...]


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """What a tensor in a module's arguments or results is: y, or a state.

    Args:
        state: the index of the state; -1 for y.
        layer: the index of the layer; -1 for all layers, `[L, B, H]`.
        axis: an axis of length 1 in addition to `[B, H]`, -1 for none; for y, the axis of time.
    """

    state: int
    layer: int = 0
    axis: int = -1


class Protocol(NamedTuple):
    """A form in which a module is called.

    Args:
        time: the axis of time of x; -1 where x is a single step `[B, I]`.
        states: what each tensor after x is.
        result: the result, with a `Place` for each tensor.
    """

    time: int
    states: tuple[Place, ...]
    result: Any


_PLAIN = (bool, int, float, str, type(None))
_SETTINGS = {*_PLAIN, FunctionType, BuiltinFunctionType}
_CHANGING = {"training", "_is_full_backward_hook", "_compiled_call_impl", *CONTEXT_ATTRIBUTES}  # of any module


def form_of(value: Any, tensors: list[Tensor]) -> Any:
    """Return the form of an argument, and append its tensors to a list; NotImplemented for unsupported types.

    Two forms are equal if the tensors have the same ranks and everything else is equal.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, value.ndim
    if type(value) in (tuple, list):
        return type(value), *[form_of(part, tensors) for part in value]
    return (type(value), value) if type(value) in _PLAIN else NotImplemented


def filled(template: Any, value: Callable[[Place], Any]) -> Any:
    """Return a result: a template with `value(place)` instead of each `Place`."""
    if isinstance(template, Place):
        return value(template)
    if type(template) in (tuple, list):
        return type(template)(filled(part, value) for part in template)
    return template


@dataclass(frozen=True, eq=False)
class Known:
    """What a hand-written module computes.

    Args:
        layers: its cells, bottom first.
        protocols: the supported forms of a call, by the form of the arguments, see `form_of`.
        names: the names of its forward's arguments, and their defaults.
        training: whether it computes the same in training as in evaluation.
        settings: the settings with which it computes this.
    """

    layers: tuple[Layer, ...]
    protocols: Mapping[Any, Protocol]
    names: Mapping[str, Any]
    training: bool
    settings: ModuleSettings

    @cached_property
    def steps(self) -> bool:
        """Whether it runs single steps only."""
        return all(protocol.time < 0 for protocol in self.protocols.values())

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters that the arrays consist of."""
        parts = [part for layer in self.layers for one in layer.weights for term in one.terms for part in term]
        return list(dict.fromkeys(part.name for part in parts if part.name))

    def text(self) -> str:
        """Return the cells in words."""
        first, count = self.layers[0].call.spec, len(self.layers)
        text = f"{first.of_kind.title} {first.input_size} -> {first.units}"
        return text + (f", {count} layers" if count > 1 else "")

    def form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
        """Return the form of a call without trailing defaults, and its tensors."""
        tensors: list[Tensor] = []
        values = arguments_of(self.names, args, kwargs)
        return (NotImplemented if values is None else form_of(values, tensors)), tensors


class ModuleSettings(NamedTuple):
    """What a module's computation depends on in addition to its parameters.

    Args:
        kind: its class, before `accelerate`.
        values: its attributes, such as `batch_first` or `activation`.
        methods: the names of its methods; an attribute of the module with such a name would replace the method.
        absent: the parameters that are None.
        inner: the settings of the modules in it, by name.
    """

    kind: type
    values: dict[str, Any]
    methods: frozenset[str]
    absent: list[str]
    inner: dict[str, ModuleSettings]

    def hold(self, module: nn.Module) -> bool:
        """Whether a module has these settings; its own class isn't compared."""
        attributes, inner = module.__dict__, module._modules
        return (
            attributes.items() >= self.values.items()
            and attributes.keys().isdisjoint(self.methods)
            and _absent(module) == self.absent
            and inner.keys() == self.inner.keys()
            and all(
                part is not None and original_of(type(part)) is settings.kind and settings.hold(part)
                for part, settings in zip(inner.values(), self.inner.values(), strict=True)
            )
        )


def _absent(module: nn.Module) -> list[str]:
    return [name for name, array in module._parameters.items() if array is None]


def settings_of(module: nn.Module) -> ModuleSettings:
    """Return the settings of a module."""
    kind, attributes = original_of(type(module)), vars(module)
    return ModuleSettings(
        kind,
        {name: value for name, value in attributes.items() if type(value) in _SETTINGS and name not in _CHANGING},
        frozenset(name for name in dir(kind) if name not in attributes and callable(getattr(kind, name, None))),
        _absent(module),
        {name: settings_of(part) for name, part in module._modules.items() if part is not None},
    )


def names_of(module: nn.Module) -> dict[str, Any]:
    """Return the names of the arguments of a module's forward, with their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {one.name: one.default for one in parameters if one.kind in kinds}


def arguments_of(names: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the arguments of a call by position, without trailing defaults; None where that isn't possible."""
    if not kwargs and args and isinstance(args[-1], (Tensor, tuple)):
        return tuple(args) if len(args) <= len(names) else None
    values, defaults, left = list(args), list(names.values()), dict(kwargs)
    if left:
        values += [left.pop(name, default) for name, default in list(names.items())[len(args) :]]
    if left or len(values) > len(defaults):
        return None
    while values and type(values[-1]) in _PLAIN and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return tuple(values)


def arrays_of(known: Known, module: nn.Module, like: Tensor) -> list[list[Tensor]]:
    """Return the arrays of each layer."""
    return [[one.of(module, like) for one in layer.weights] for layer in known.layers]


def states_of(known: Known, protocol: Protocol, x: Tensor, tensors: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Return the initial state of each layer, `[B, ·]`; None where the tensors after x have other shapes."""
    if not tensors:
        return [[] for _ in known.layers]
    by_layer: list[list[Any]] = [[None] * len(layer.call.sizes) for layer in known.layers]
    for place, tensor in zip(protocol.states, tensors, strict=True):
        if place.layer < 0:
            if tensor.shape[0] != len(by_layer):
                return None
            for states, part in zip(by_layer, tensor.unbind(0), strict=True):
                states[place.state] = part
        else:
            if place.axis >= 0 and tensor.shape[place.axis] != 1:
                return None
            by_layer[place.layer][place.state] = tensor if place.axis < 0 else tensor.squeeze(place.axis)
    for layer, states in zip(known.layers, by_layer, strict=True):
        shapes = [(x.shape[1 if protocol.time == 0 else 0], size) for size in layer.call.sizes]
        if [None if state is None else tuple(state.shape) for state in states] != shapes:
            return None
    return by_layer


def run_layers(
    known: Known,
    protocol: Protocol,
    x: Tensor,
    arrays: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    packed: Any = None,
) -> tuple[Tensor, Sequence[Sequence[Tensor]]]:
    """Run the cells over a sequence; return y, whose axis of time is that of x, and the final states of each layer."""
    time_major = protocol.time == 0
    cells = zip(known.layers, arrays, states, strict=True)
    runs = [CellRun(layer.call, of_layer, state) for layer, of_layer, state in cells]
    sequence = x.transpose(0, 1) if time_major else x
    y, _, ends, _ = forward.run_layers(runs, sequence, None, None, time_major=time_major, packed=packed)
    return y, ends


def result_of(protocol: Protocol, y: Tensor, states: Sequence[Sequence[Tensor]], writable: bool) -> Any:
    """Return a module's result from y, whose axis of time is that of x, and the final states of each layer."""

    def value(place: Place) -> Tensor:
        if place.state < 0:
            time = max(protocol.time, 0)
            return y if place.axis in (-1, time) else y.transpose(0, 1)
        if place.layer < 0:
            return torch.stack([state[place.state] for state in states])
        final = states[place.layer][place.state]
        return final if place.axis < 0 else final.unsqueeze(place.axis)

    if writable and y.requires_grad:  # callers may write to a result, and the backward pass needs y
        y = y.clone()
    return filled(protocol.result, value)


# ── the module ────────────────────────────────────────────────────────────────────────────────────────────────────────

refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The reasons for which modules that may be hand-written cells weren't replaced, for `cellstack.plan`."""


LEAST = 4  # steps; below, packing the weights takes longer than the kernel saves


class HandWritten(Accelerated):
    """A hand-written recurrent module that runs on the kernel.

    Attributes:
        cells_text: its cells in words.
    """

    cells_text = ""

    def limits(self) -> str:
        """Return in which calls PyTorch runs the module, as an addition to a line of the plan."""
        return ""

    def runs(self, tensors: Sequence[Any], width: int, weights: Sequence[Any]) -> bool:
        """Whether the kernel supports a call.

        Args:
            tensors: x and the states.
            width: the width that x must have.
            weights: the arrays of the cells.
        """
        exported = torch.compiler.is_exporting()  # see is_ready
        if (torch.compiler.is_compiling() and not exported) or torch.is_autocast_enabled("cpu"):
            return False
        x, *states = tensors
        if self._modules:
            inner = [part for part in self.modules() if part is not self]
            if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in inner):
                return False
        return (exported or type(x) in op.PLAIN) and is_ready(x, width, weights, states)


class Recognised(HandWritten):
    """A module that was recognised by its equations."""

    known: Known

    def limits(self) -> str:
        """Return in which calls PyTorch runs the module, as an addition to a line of the plan."""
        if self.known.steps:
            return " within packed_weights() and without gradients; otherwise PyTorch"
        return (
            "" if self.known.training else " in evaluation mode; PyTorch in training, where it computes something else"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run like the module's own forward, which runs the calls that the kernel doesn't support."""
        known = self.known
        if known.steps and (self._packed is None or torch.is_grad_enabled()):  # the kernel would be no faster
            return super().forward(*args, **kwargs)
        form, tensors = known.form(args, kwargs)
        protocol = known.protocols.get(form)
        if protocol is None or (self.training and not known.training) or not known.settings.hold(self):
            return super().forward(*args, **kwargs)
        x, *initial = tensors
        exported = torch.compiler.is_exporting()  # with an open number of steps
        if protocol.time >= 0 and self._packed is None and not exported and x.shape[protocol.time] < LEAST:
            return super().forward(*args, **kwargs)
        arrays = self._arrays(x)
        weights = [array for each in arrays for array in each]
        states = states_of(known, protocol, x, initial)
        if states is None or not self.runs(tensors, known.layers[0].call.spec.input_size, weights):
            return super().forward(*args, **kwargs)
        if protocol.time < 0:
            if not known.steps or not op.direct(x):
                return super().forward(*args, **kwargs)
            keep: Any = self._packed
            ends = op.step(x, states[0], arrays[0], known.layers[0].call, keep.setdefault(0, {}))
            return result_of(protocol, ends[0], [ends], False)
        return result_of(protocol, *run_layers(known, protocol, x, arrays, states, self._packed), True)

    def _arrays(self, like: Tensor) -> list[list[Tensor]]:
        """Return the arrays of each layer; within `packed_weights`, those of the last call if nothing has changed."""
        known, packed = self.known, self._packed
        if packed is None or torch.is_grad_enabled():
            return arrays_of(known, self, like)
        try:
            key = [(one.data_ptr(), one._version) for one in (parameter(self, name) for name in known.parameters)]
        except RuntimeError:  # tensors created in inference mode have no version
            return arrays_of(known, self, like)
        cached = packed.get("arrays")
        if cached is None or cached[0] != key:
            own_parameters = {id(parameter(self, name)) for name in known.parameters}
            # Packed weights are kept for tensors that share their memory with no other one.
            arrays = [
                [one if id(one) in own_parameters else one.clone(memory_format=torch.contiguous_format) for one in each]
                for each in arrays_of(known, self, like)
            ]
            cached = packed["arrays"] = key, arrays
        return cached[1]
