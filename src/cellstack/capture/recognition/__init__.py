"""Finds hand-written recurrent modules in a PyTorch model, and makes the fused kernel run them.

1. A module is traced, and its graph is compared with the step of each kind of cell (`formats/onnx/decomposed`).
2. In the trace, the parameters are distinct random numbers, so each number in an array of the cell shows which element
   of a parameter it comes from (`origins`).
3. Comparing values also shows which arguments and results are x, y and the states (`calls`).
4. The module and the kernel run on random inputs, and their results are compared (`comparison`).
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstack.capture.copied import duplicate
from cellstack.capture.exported import export
from cellstack.capture.nested import flattened, tensors_in
from cellstack.capture.recognition.calls import ModuleCall, accepted, guesses, protocol_of, shortened
from cellstack.capture.recognition.comparison import compare, effect_of, is_steady, verify
from cellstack.capture.recognition.origins import Origins, layer_of
from cellstack.capture.recognition.values import NotReplaced, as_float64, copy_of, experiments, fill, put
from cellstack.cells.errors import FormatError
from cellstack.formats.onnx.decomposed.found import cells_of_module
from cellstack.layers import accelerate as integration
from cellstack.layers.accelerated import subclass_of
from cellstack.layers.eligibility import base_of, name_of, original_of
from cellstack.layers.handwritten import (
    HandWritten,
    Known,
    Protocol,
    Recognised,
    arguments_of,
    names_of,
    refused,
    settings_of,
)
from cellstack.layers.known import ADAPTERS, Adapter
from cellstack.nodes.cell_arrays import Cell

MOST_CALLS = 400  # calls that are tried
MOST_TRACES = 4  # calls that are traced
MOST_NUMBERS = 1 << 26  # elements of a module's parameters
NAMED = re.compile("lstm|gru|rnn|cell|recurrent", re.IGNORECASE)  # classes that the plan lists even if not replaced


def recognise(module: nn.Module, calls: Sequence[tuple[Any, ...]] = ()) -> Known:
    """Return what a hand-written module computes.

    Args:
        module: the module.
        calls: the arguments of known calls; if there are none, they are guessed.

    Raises:
        NotReplaced: it isn't recognised as the step of a cell, or a loop of steps.
    """
    if sum(array.numel() for array in module.parameters()) > MOST_NUMBERS:
        raise NotReplaced(f"it has more than {MOST_NUMBERS} weights")
    with experiments():
        copied = copy_of(module)
        one, other = (fill(copied, 0.1, 1.0, seed) for seed in (1, 2))
        recorded = [short for args in calls for short in shortened(as_float64(args))]
        seen = accepted(copied, recorded or islice(guesses(copied, 1), MOST_CALLS))
        if not seen:
            raise NotReplaced("it rejects all arguments that were tried: pass an input of the model as example=")
        known = _traced(copied, seen, one, other)
        if len(known.layers) > 1 and not recorded:
            seen += accepted(copied, islice(guesses(copied, len(known.layers)), MOST_CALLS))
        fill(copied, -0.4, 0.4, 3)
        chosen, refused = dict[Any, ModuleCall](), NotReplaced("")
        protocols: dict[Any, Protocol] = {}
        for call in seen:
            if call.form not in protocols:
                try:
                    effect = effect_of(copied, call.args)
                    if effect:
                        raise NotReplaced(effect)
                    protocols[call.form] = protocol_of(copied, known, call)
                    chosen[call.form] = call
                except NotReplaced as error:
                    refused = error
        if not protocols:
            raise refused
        known = replace(known, protocols=protocols, training=is_steady(copied, chosen, protocols))
        verify(copied, known, chosen)
        return known


def _traced(
    module: nn.Module, calls: Sequence[ModuleCall], one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> Known:
    """Return what a module computes, without protocols: its cells in the trace of the first call that has some.

    Args:
        module: the module.
        calls: the calls to trace.
        one, other: values of the parameters for two traces, by name.
    """
    why: Exception | None = None
    tried = set[Any]()
    for call in calls:
        key = call.form
        if key in tried or len(tried) == MOST_TRACES:
            continue
        tried.add(key)
        try:
            found = [_exported(module, call, values) for values in (one, other)]
            if len(found[0]) != len(found[1]):
                raise NotReplaced("its equations depend on the values of its parameters")
            origins = Origins(one, other)
            layers = tuple(layer_of(origins, *pair) for pair in zip(*found, strict=True))
            return Known(layers, {}, names_of(module), False, settings_of(module))
        except (NotReplaced, FormatError) as error:
            why = why or error
    assert why is not None
    raise NotReplaced(str(why)) from why


def _exported(module: nn.Module, call: ModuleCall, values: Mapping[str, np.ndarray]) -> list[Cell]:
    """Return the cells in the graph of a call of a module whose parameters have these values."""
    put(module, values)
    flat, inputs = flattened(duplicate(module), call.args), tuple(tensors_in(call.args))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "module.onnx")
        try:
            export(flat, inputs, [[]] * len(inputs), path, [f"input_{n}" for n in range(len(inputs))])
            return cells_of_module(path, len(inputs) - 1)
        except FormatError as error:
            raise FormatError(str(error).replace(f"{path}: ", "").replace(path, "its graph")) from error


def _adapted(module: nn.Module, adapter: Adapter) -> type:
    """Return the subclass with which the kernel runs a module of a known class, compared with the module.

    Raises:
        NotReplaced: the kernel doesn't support it as it is configured, or computes something else.
    """
    try:
        text = adapter.describe(module)
    except ValueError as error:
        raise NotReplaced(str(error)) from None
    kind = original_of(type(module))
    made = subclass_of(kind, (adapter.base, kind), cells_text=text)
    with experiments():
        for training in (False, True):
            theirs = copy_of(module).train(training)
            fill(theirs, -0.4, 0.4, 3)
            ours = copy.deepcopy(theirs)
            ours.__class__ = made
            weights = dict(theirs.named_parameters())
            for args in adapter.examples(theirs):
                compare(theirs, theirs, _with_parameters(ours, weights), args, text, adapter.growth)
    return made


def _with_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """Return a function that calls a module with these parameters instead of its own."""
    return lambda *args: torch.func.functional_call(module, dict(weights), args)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that may be hand-written cells or loops, outer ones first."""
    for name, part in model.named_modules():
        own = type(part).__module__
        if own.startswith(("torch.nn.modules.", "cellstack.")) or base_of(type(part)) is not None:
            continue
        if any(array.ndim > 1 for array in part.parameters()):
            yield name, part


def _recorded(model: nn.Module, example: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Run a copy of a model, and return the arguments of the first calls of the modules in it, by the module's name."""
    found: dict[str, list[tuple[Any, ...]]] = {}

    def note(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, calls = arguments_of(names_of(part), args, kwargs), found.setdefault(name, [])
        if values is not None and len(calls) < MOST_TRACES:
            calls.append(values)

    copied = duplicate(model)  # a module may keep something of a call, such as its batch size
    for name, part in _candidates(copied):
        part.register_forward_pre_hook(partial(note, name), with_kwargs=True)
    with torch.no_grad():
        copied(*(example if isinstance(example, tuple) else (example,)))
    return found


def accelerate(model: nn.Module, example: Any = None) -> nn.Module:
    """Replace the classes of the hand-written recurrent modules in a model: see `cellstack.accelerate`.

    Raises:
        TypeError: `model` isn't a torch module.
        ValueError: it contains no recurrent module that the kernel can run.
    """
    recorded = {} if example is None else _recorded(model, example)
    inside, why = set[int](), dict[str, tuple[nn.Module, NotReplaced]]()
    for name, part in _candidates(model):
        if id(part) in inside:
            continue
        if not isinstance(part, HandWritten):
            try:
                part.__class__ = _class_of(part, recorded.get(name, ()))
            except NotReplaced as error:
                why[name] = part, error
                continue
        refused.pop(part, None)
        inside |= {id(inner) for inner in part.modules()}
    differing = [f"{name or type(part).__name__}: {error}" for name, (part, error) in why.items() if error.differs]
    if differing:
        warnings.warn(f"accelerate: not replaced: {'; '.join(differing)}", stacklevel=3)
    for part, error in why.values():
        replaced = any(isinstance(inner, HandWritten) for inner in part.modules())
        if not replaced and (error.differs or NAMED.search(type(part).__name__) or _adapter_of(part)):
            refused[part] = str(error)
    try:
        return integration.accelerate(model)
    except ValueError as error:
        if any(isinstance(part, HandWritten) for part in model.modules()):
            return model
        listed = "; ".join(f"{name_of(part)}: {text}" for part in model.modules() if (text := refused.get(part)))
        if not listed and "" in why:  # whatever its name is, it was passed as one
            listed = f"{name_of(model)}: {why[''][1]}"
        raise ValueError(f"{error}{f'; hand-written modules: {listed}' if listed else ''}") from None


def _adapter_of(module: nn.Module) -> Adapter | None:
    return ADAPTERS.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _class_of(module: nn.Module, calls: Sequence[tuple[Any, ...]]) -> type:
    """Return the subclass with which the kernel runs a hand-written module; `NotReplaced` if there is none."""
    adapter = _adapter_of(module)
    if adapter is not None:
        return _adapted(module, adapter)
    known = recognise(module, calls)
    kind = type(module)
    return subclass_of(kind, (Recognised, kind), known=known, cells_text=known.text())
