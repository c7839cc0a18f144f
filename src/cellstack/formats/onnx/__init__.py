"""The ONNX adapter: networks out of `.onnx` files and into them. It needs the package onnx, for its protobuf alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np

from cellstack.formats.build import HINT, Names
from cellstack.formats.files import check_unedited
from cellstack.formats.onnx import activations, norms, ops, quantised, recurrent, shapes, windows
from cellstack.formats.onnx.cells import Operator, is_recurrent, network_of, read_operator
from cellstack.formats.onnx.file import Model, Scope, label, read, short, unused_tensors
from cellstack.formats.onnx.graph import load_graph
from cellstack.formats.onnx.writer import write
from cellstack.formats.onnx.written_out.found import find_written_out
from cellstack.formats.onnx.written_out.loops import roll
from cellstack.formats.onnx.written_out.products import name_activations
from cellstack.formats.onnx.written_out.scans import is_scan, read_scan
from cellstack.network import Network
from cellstack.spec import FormatError

NAME = "ONNX"
SUFFIXES = (".onnx",)
FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # what may follow the version in a ModelProto
PARTS = (ops, windows, activations, norms, shapes, quantised, recurrent)
HANDLERS = {name: handler for part in PARTS for name, handler in part.HANDLERS.items()}
HANDLERS |= {name: quantised.quantised(HANDLERS[name]) for name in ("Mul", "Cast")}
ODD = (ValueError, TypeError, LookupError, ArithmeticError)  # what attributes of another type than usual lead to


def _odd(path: str, error: Exception) -> FormatError:
    return FormatError(f"{path}: expected a graph as ONNX has it, found {type(error).__name__}: {str(error)[:200]}")


def recognises(head: bytes) -> bool:
    """Return whether a file that begins with `head` looks like ONNX: protobuf, the version of its format first."""
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] < 0x80 and head[2] in FIELDS


def _parts(scope: Scope) -> Iterator[tuple[str, Callable[[], Operator]]]:
    """Give the recurrent parts of a graph and of the graphs within, by name, each with what reads it."""
    within: list[Scope] = []
    whole: set[int] = set()  # ids of the Scans that are a cell
    for node, graph in scope.inner():
        if graph is not None:
            within += [graph] if id(node) not in whole else []
        elif is_recurrent(node):
            yield label(node), partial(read_operator, scope, node)
        elif is_scan(node):
            operator = None
            with suppress(*ODD):  # of one that is no cell, the body is looked into
                operator = read_scan(scope, node)
            if operator is not None:
                whole.add(id(node))
                yield label(node), partial(_same, operator)
    for name, operator in find_written_out(scope):
        yield name, partial(_same, operator)
    for graph in within:
        yield from _parts(graph)


def _same(operator: Operator) -> Operator:
    return operator


def _has_parts(model: Model) -> bool:
    """Whether a file has recurrent parts, or what would be some."""
    try:
        return any(True for _ in _parts(Scope(model, model.proto.graph)))
    except ODD:  # what is wrong with it is being said
        return False


@np.errstate(all="ignore")  # infinities and NaN in weights are the file's affair
def extract(path: str) -> dict[str, Network]:
    """Return the recurrent parts of an ONNX file: each LSTM, GRU and RNN, whatever else the graphs hold.

    LSTMs that a graph writes out, products, gates and all, are found too, and go by the name of their weights.

    Args:
        path: the file.

    Returns:
        Networks by the operators' names, each `[B, T, I]` to `[B, T, W]`, both directions of a bidirectional one in
        one; those in the graphs of an If, a Loop or a Scan too. A name that comes twice has a number after it.

    Raises:
        FormatError: the file is damaged, or an operator can't be run; all of them are named.
        OSError: the file can't be read.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    model = read(path)
    parts: dict[str, Network] = {}
    problems: list[str] = []
    names, budget = Names(), model.budget.again()
    try:
        for own, reads in _parts(Scope(model, model.proto.graph)):
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
        raise FormatError(f"{path}: expected recurrent operators that can be run, found: {'; '.join(problems)}")
    return parts


@np.errstate(all="ignore")
def load(path: str) -> Network:
    """Return the whole of an ONNX file as a Network.

    Args:
        path: the file.

    Returns:
        The network. Its inputs are `[B, T, I]` or `[B, I]` in whatever order the file has their axes; inputs that hold
        states to start from are the network's state, and so are outputs that hold states after the last step. What was
        where is in `metadata["onnx"]`.

    Raises:
        FormatError: the file is damaged, or holds something that a Network can't run; all of it is named.
        OSError: the file can't be read.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    model = read(path)
    try:
        unused = unused_tensors(Scope(model, model.proto.graph))
        roll(model)
        name_activations(model)
        return load_graph(model, HANDLERS, unused)
    except FormatError as error:
        hint = f"; {HINT}" if _has_parts(model) else ""
        raise FormatError(f"{error}{hint}") from None
    except ODD as error:
        raise _odd(path, error) from None


def save(network: Network, path: str, lengths: bool = False) -> None:
    """Write a network as an ONNX file, whole or not at all: opset 17, batch and time of any length.

    Every cell's h and c are inputs, `name.h` and `name.c`, each `[B, H]`, and outputs, `name.h.after`; an input may be
    left out, and the cell's own initial state then takes its place. A cell of a stack goes by `name.0`, and so on, one
    of a Bidirectional by `name.forward` and `name.backward`. Cells that ONNX's LSTM, GRU and RNN can't hold, those of
    float64 and those under a mask are Scans.

    Args:
        network: what to write.
        path: where to.
        lengths: whether to put in an input `lengths` `[B]`, int64, of how many steps of each row are used; left out,
            all are. Such a file isn't read again.

    Raises:
        ValueError: lengths for a network without time, a LayerNorm whose width isn't known, or more than protobuf
            holds, 2 GiB.
        OSError: the file can't be written.
        ModuleNotFoundError: the package onnx isn't installed.
    """
    check_unedited(network, NAME)
    write(network, path, lengths)
