"""The ONNX adapter: reads and writes networks as `.onnx` files. It uses only the protobuf of the package onnx."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats.build import HINT, Names
from cellstack.formats.files import check_unedited
from cellstack.formats.onnx import activations, norms, ops, quantised, recurrent, shapes, slices, windows
from cellstack.formats.onnx.cells import Operator, is_recurrent, network_of, read_operator
from cellstack.formats.onnx.decomposed.found import find_decomposed, takes_states
from cellstack.formats.onnx.decomposed.lengths import fix_lengths
from cellstack.formats.onnx.decomposed.loops import roll_steps
from cellstack.formats.onnx.decomposed.scans import is_scan, read_scan
from cellstack.formats.onnx.file import ODD, Model, Scope, label, read, short
from cellstack.formats.onnx.frames import frames_of, makes_steps
from cellstack.formats.onnx.inputs import data_inputs
from cellstack.formats.onnx.networks import load_graph
from cellstack.formats.onnx.passes import passes
from cellstack.formats.onnx.runtime import runtime_model as runtime_model
from cellstack.formats.onnx.writer import write
from cellstack.network import Network, layouts
from cellstack.network.layouts import Layout

NAME = "ONNX"
SUFFIXES = (".onnx",)
OPTIONS = ("constants", "weights", "frames", "context")  # of `load`
FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # tags that may follow the version in a ModelProto
PARTS = (ops, windows, activations, norms, shapes, slices, quantised, recurrent)
HANDLERS = {name: handler for part in PARTS for name, handler in part.HANDLERS.items()}
HANDLERS |= {name: quantised.quantised(HANDLERS[name]) for name in ("Mul", "Cast")}


def _odd(path: str, error: Exception) -> FormatError:
    return FormatError(f"{path}: the graph isn't valid ONNX: {type(error).__name__}: {str(error)[:200]}")


def recognises(head: bytes) -> bool:
    """Return whether a file that begins with `head` looks like ONNX: protobuf that begins with the format's version."""
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] < 0x80 and head[2] in FIELDS


def _parts(scope: Scope) -> Iterator[tuple[str, Callable[[], Operator]]]:
    """Yield the recurrent operators of a graph and its subgraphs: the name of each, and a function that reads it."""
    within: list[Scope] = []
    whole: set[int] = set()  # ids of the Scans that are cells
    for node, graph in scope.inner():
        if graph is not None:
            within += [graph] if id(node) not in whole else []
        elif is_recurrent(node):
            yield label(node), partial(read_operator, scope, node)
        elif is_scan(node):
            operator = None
            with suppress(*ODD):  # a Scan that isn't a cell: its body is searched
                operator = read_scan(scope, node)
            if operator is not None:
                whole.add(id(node))
                yield label(node), partial(_same, operator)
    for name, operator in find_decomposed(scope):
        yield name, partial(_same, operator)
    for graph in within:
        yield from _parts(graph)


def _same(operator: Operator) -> Operator:
    return operator


def _has_parts(model: Model) -> bool:
    """Whether a file has recurrent operators, readable or not."""
    try:
        return any(True for _ in _parts(model.scope()))
    except ODD:  # the caller is already reporting the error
        return False


@np.errstate(all="ignore")  # weights may hold infinities and NaN
def extract(path: str) -> dict[str, Network]:
    """Return the recurrent parts of an ONNX file: each LSTM, GRU and RNN, regardless of what else the graphs contain.

    LSTMs that a graph spells out as products and gates are found too, and are named after their weights.

    Args:
        path: the file.

    Returns:
        Networks by the operators' names, each from `[B, T, I]` to `[B, T, W]`; a bidirectional operator is one network.
        Those in the subgraphs of an If, a Loop or a Scan are included. Repeated names get a number.

    Raises:
        FormatError: the file is damaged, or operators aren't supported; all of them are named.
        OSError: the file can't be read.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    model = read(path)
    parts: dict[str, Network] = {}
    problems: list[str] = []
    names, budget = Names(), model.budget.again()
    try:
        for own, reads in _parts(fix_lengths(model).scope()):
            name = names.fresh(own)
            try:
                part = network_of(reads(), name, model.source)
                budget.take(sum(node.parameters for node in part.nodes))
                parts[name] = part
            except FormatError as error:
                problems.append(str(error).removeprefix(f"{path}: "))
            except ODD as error:
                problems.append(f"node {short(name)}: {type(error).__name__}: {str(error)[:200]}")
    except FormatError:
        raise
    except ODD as error:
        raise _odd(path, error) from None
    if problems:
        raise FormatError(f"{path}: these recurrent operators aren't supported: {'; '.join(problems)}")
    return parts


def _options(
    constants: Mapping[str, Any] | None,
    weights: Mapping[str, Any] | None,
    frames: Mapping[str, int] | None,
    context: Mapping[str, int] | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Check that load's options are dicts by name; return constants and weights, frames, contexts."""
    given = {"constants": constants, "weights": weights, "frames": frames, "context": context}
    for what, values in given.items():
        named = isinstance(values, Mapping) and all(isinstance(name, str) for name in values)
        if values is not None and not named:
            raise TypeError(f"load: expected {what} to be a dict by names of inputs, got {type(values).__name__}")
    return {**(weights or {}), **(constants or {})}, dict(frames or {}), dict(context or {})


def load(path: str, **options: Any) -> Network:
    """Return the whole of an ONNX file as a Network, and warn if its inputs or outputs have other axes in the file.

    Args:
        path: the file.
        **options: see `read_whole`.

    Raises:
        FormatError, OSError, ModuleNotFoundError: see `read_whole`.
    """
    network = read_whole(path, **options)
    if others(network):
        warnings.warn(f"load: {path} {layouts.warning(network)}", stacklevel=4)  # the call of cellstack.load
    return network


def others(network: Network) -> bool:
    """Return whether the file of a network has other axes.

    A file that cellstack wrote has the network's axes; its metadata may keep the layout of an earlier file.
    """
    ends = network.metadata["onnx"]
    moved = any(Layout.of(axes).moved for what in ("inputs", "outputs") for axes in ends[what].values())
    return moved and bool(layouts.warning(network))


@np.errstate(all="ignore")
def read_whole(
    path: str,
    *,
    constants: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    frames: Mapping[str, int] | None = None,
    context: Mapping[str, int] | None = None,
    whole_loops: bool = False,
    example: Mapping[str, list[int]] | None = None,
) -> Network:
    """Return a whole ONNX file as a Network.

    Where a call of the file is one step, with states as inputs and outputs, the network runs over any number of steps:
    the file's input `[B, n]` is one step, a frame, and the network's input is `[B, T, n]`.

    Args:
        path: the file.
        constants: values of inputs, by name, that the network fixes: `{"sr": 16000}`. Branches that depend on them are
            resolved.
        weights: the same for weights: values of inputs or of tensors of the file.
        frames: the size of a frame, by input, where the file leaves it open.
        context: the number of values at the end of a frame that the file expects again before the next frame, by input.
            The network, and a stream of it, keep them.
        whole_loops: whether loops that an exporter unrolled run over all steps of a sequence, which only the author of
            the file can know; by default they run over as many steps as the file unrolls.
        example: the shape of each input of an example. Branches that depend on lengths are resolved for it, and noted.

    Returns:
        The network. Its inputs are `[B, T, I]` or `[B, I]`, whatever order of axes the file uses. Inputs that hold
        initial states become the network's state, and so do outputs that hold final states. `metadata["onnx"]` records
        where each was.

    Raises:
        FormatError: the file is damaged, or parts of it aren't supported; all of them are named.
        OSError: the file can't be read.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    model = read(path)
    fixed, sizes, contexts = _options(constants, weights, frames, context)
    try:
        for run in passes(fixed, sizes, contexts, whole_loops, example):
            model = run(model)
        return _loaded(model, sizes, contexts)
    except FormatError as error:
        hint = f"; {HINT}" if _has_parts(model) else ""
        if model.lost:
            text = str(error).removeprefix(f"{path}: ")
            raise FormatError(f"{path}: {model.lost[0]}: {text}{hint}") from None
        raise FormatError(f"{error}{hint}") from None
    except ODD as error:
        raise _odd(path, error) from None


def _loaded(model: Model, sizes: dict[str, Any], contexts: dict[str, Any]) -> Network:
    """Return a graph as a Network: over time where it has a time axis, else with one step per call.

    Args:
        model: the file.
        sizes: sizes of frames, by input; with sizes or contexts, a call is one step.
        contexts: sizes of contexts, by input.
    """
    problem: FormatError | None = None
    if not sizes and not contexts and not takes_states(model.scope()):
        try:
            return load_graph(model, HANDLERS)
        except FormatError as error:
            problem = error
    data = [value.name for value in model.graph.input]
    if problem is not None and all(isinstance(frame, str) for frame in frames_of(model, data, {}, {}).values()):
        raise problem  # no input holds frames
    try:
        model = roll_steps(model)
        return load_graph(model, HANDLERS, frames_of(model, data_inputs(model.scope()), sizes, contexts))
    except FormatError as error:
        if problem is None or makes_steps(model):
            raise
        raise problem from error


def save(network: Network, path: str, lengths: bool = False, states: bool = False) -> None:
    """Write a network as an ONNX file, whole or not at all: opset 17, any batch size and any number of steps.

    Every state of a cell is an output, such as `name.h.after` and `name.c.after` `[B, H]`. The cells of a stack are
    named `name.0` and so on, those of a Bidirectional `name.forward` and `name.backward`. Cells that ONNX's LSTM, GRU
    and RNN can't express, float64 cells and masked cells are written as Scans.

    Args:
        network: what to write.
        path: the path of the file.
        lengths: whether to add an input `lengths` `[B]`, int64: the number of valid steps of each row; if omitted, all
            steps are. cellstack can't read such a file back.
        states: whether to add an input for every state, `name.h` and `name.c`, with which a later call continues an
            earlier one; if omitted, it is the cell's own initial state. ONNX Runtime warns about each when it loads the
            file, because the input is optional.

    Raises:
        ValueError: lengths for a network without time, a LayerNorm of unknown width, or more data than protobuf
            allows, 2 GiB.
        OSError: the file can't be written.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    check_unedited(network, NAME)
    write(network, path, lengths, states)
