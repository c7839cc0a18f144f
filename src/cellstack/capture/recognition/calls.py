"""Finds how a module is called: which arguments it accepts, and which of these and its results are x, y and states."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellstack.capture.recognition.values import NotReplaced, same
from cellstack.layers.handwritten import (
    Known,
    Place,
    Protocol,
    arguments_of,
    arrays_of,
    form_of,
    names_of,
    run_layers,
    states_of,
)

BATCH, STEPS = 2, 3  # of the traced call


def guesses(module: nn.Module, layers: int) -> Iterator[tuple[Any, ...]]:
    """Yield arguments that a module with this number of layers may accept: x, and states where it takes some."""
    defaults = list(names_of(module).values())
    least, most = defaults.count(inspect.Parameter.empty), len(defaults)
    sizes = {size for array in module.parameters() for size in array.shape}
    own = {value for value in vars(module).values() if type(value) is int}  # such as self.hidden_size
    units = [size for size in sizes if any(size * n in sizes for n in (1, 2, 3, 4))]
    ordered = [sorted(each, key=lambda size: (size not in own, size)) for each in (units, sizes)]
    for hidden, width in product(*ordered):
        for shape in ((BATCH, STEPS, width), (BATCH, width)):
            x = torch.randn(shape)
            for args in _with_states(x, hidden, layers):
                if least <= len(args) <= most:
                    yield args


def _with_states(x: Tensor, hidden: int, layers: int) -> Iterator[tuple[Any, ...]]:
    """Yield x with states of `hidden` units, in several forms."""
    batches = (BATCH, STEPS) if x.ndim == 3 else (BATCH,)
    shapes = [shape for n in batches for shape in ((n, hidden), (1, n, hidden), (layers, n, hidden))]
    for shape in dict.fromkeys(shapes):
        h, c = torch.randn(shape), torch.randn(shape)
        yield x, h
        yield x, (h, c)
        yield x, [h, c]
        yield x, h, c
    yield (x,)
    yield x, None


class ModuleCall(NamedTuple):
    """A call of a module: its arguments, their form, and the tensors: x and the states."""

    args: tuple[Any, ...]
    form: Any
    tensors: list[Tensor]


def call_of(module: nn.Module, args: tuple[Any, ...]) -> ModuleCall | None:
    """Return a call with these arguments; None if the module rejects them, or they aren't x and states as floats."""
    tensors: list[Tensor] = []
    given = arguments_of(names_of(module), args, {})
    form = form_of(given, tensors)
    if (
        given is None
        or not tensors
        or not all(tensor.is_floating_point() for tensor in tensors)
        or tensors[0].ndim not in (2, 3)
    ):
        return None
    try:
        with torch.no_grad():
            module(*args)
    except Exception:  # the module takes other arguments
        return None
    return ModuleCall(given, form, tensors)


def shortened(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return recorded arguments with fewer steps along axis 1, along axis 0, and unchanged."""
    x = args[0]
    if not isinstance(x, Tensor) or x.ndim != 3:
        return [args]
    return [(x[:, :STEPS], *args[1:]), (x[:STEPS], *args[1:]), args]


def accepted(module: nn.Module, calls: Iterable[tuple[Any, ...]]) -> list[ModuleCall]:
    """Return the calls that a module accepts, one for each combination of shapes; those with the most states first."""
    found: dict[Any, ModuleCall] = {}
    for args in calls:
        call = call_of(module, args)
        if call is not None:
            found.setdefault((call.form, *(tensor.shape for tensor in call.tensors)), call)
    return sorted(found.values(), key=lambda call: -len(call.tensors))


def protocol_of(module: nn.Module, known: Known, call: ModuleCall) -> Protocol:
    """Return how the arguments and results of a call correspond to x, y and the states."""
    x, *given = call.tensors
    with torch.no_grad():
        result = module(*call.args)
    count, layers = len(known.layers[0].call.sizes), len(known.layers)
    times = (-1,) if x.ndim == 2 else (1, 0)
    if x.ndim == 2 and layers > 1:
        raise NotReplaced("it computes one step of several layers, which isn't supported")
    for time in times:
        for places in _arrangements(given, count, layers):
            protocol = Protocol(time, places, None)
            ran = outputs_of(known, protocol, module, call.tensors)
            if ran is None:
                continue
            template = _template(result, time, *ran)
            if template is not None:
                return protocol._replace(result=template)
    raise NotReplaced("its results aren't the outputs and states of its cells: it computes something else from them")


def _arrangements(given: Sequence[Tensor], count: int, layers: int) -> Iterator[tuple[Place, ...]]:
    """Yield the possible meanings of the tensors after x.

    Args:
        given: the tensors.
        count: the number of states of a layer.
        layers: the number of layers.
    """
    if not given:
        yield ()
        return
    single = [0 if tensor.ndim == 3 else -1 for tensor in given]
    if len(given) == count:
        for order in permutations(range(count)):
            if layers == 1:
                yield tuple(Place(n, 0, axis) for n, axis in zip(order, single, strict=True))
            if all(tensor.ndim == 3 for tensor in given):
                yield tuple(Place(n, -1) for n in order)
    if layers > 1 and len(given) == count * layers:
        for order in permutations(range(count)):
            by_layer = [(n, layer) for layer in range(layers) for n in order]
            by_state = [(n, layer) for n in order for layer in range(layers)]
            for way in (by_layer, by_state):
                yield tuple(Place(n, layer, axis) for (n, layer), axis in zip(way, single, strict=True))


def outputs_of(
    known: Known, protocol: Protocol, module: nn.Module, tensors: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Sequence[Tensor]]] | None:
    """Run a module's cells; return y with the axes of x, and each layer's final states; None if shapes don't fit."""
    x, *given = tensors
    if x.shape[-1] != known.layers[0].call.spec.input_size:
        return None
    states = states_of(known, protocol, x, given)
    if states is None:
        return None
    sequence = x.unsqueeze(1) if protocol.time < 0 else x
    y, ends = run_layers(known, protocol, sequence, arrays_of(known, module, x), states)
    return y.squeeze(1) if protocol.time < 0 else y, ends


def _template(result: Any, time: int, y: Tensor, ends: Sequence[Sequence[Tensor]]) -> Any:
    """Return a result with a `Place` for each tensor; None if a tensor is neither y nor a state.

    Args:
        result: the module's result.
        time: the axis of time of x, see `Protocol`.
        y: what the cells return.
        ends: the final states of each layer.
    """
    if isinstance(result, Tensor):
        found = _places(time, y, ends)
        return next((place for place, value in found if same(value, result)), None)
    if type(result) in (tuple, list) and result:
        parts = [_template(part, time, y, ends) for part in result]
        return None if any(part is None for part in parts) else type(result)(parts)
    return None


def _places(time: int, y: Tensor, ends: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Place, Tensor]]:
    """Yield each possible meaning of a tensor in a result, with the value it would have."""
    if time >= 0:
        yield Place(-1, axis=time), y
        yield Place(-1, axis=1 - time), y.transpose(0, 1)
    for layer, states in reversed([*enumerate(ends)]):
        for n, state in enumerate(states):
            for axis in (-1, 0, 1):
                yield Place(n, layer, axis), state if axis < 0 else state.unsqueeze(axis)
    if len(ends) > 1:
        for n in range(len(ends[0])):
            yield Place(n, -1), torch.stack([states[n] for states in ends])
