"""ONNX's recurrent operators, and cells written as Scan, as nodes: their initial and final states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import KIND_OF, Operator, nodes_of, read_operator
from cellstack.formats.onnx.decomposed.memories import memory_of
from cellstack.formats.onnx.decomposed.scans import read_scan
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Broadcast, numbers
from cellstack.formats.onnx.frame_cells import recurrent_over_frames
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.values import Final, FinalMemory, Flowing, Lengths, Run, States
from cellstack.nodes import MLSTM, Reshape, Scale, Select


def recurrent(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a recurrent operator of the outermost graph."""
    if reader.frames is not None:
        return recurrent_over_frames(reader, node, attributes, values)
    operator = read_operator(reader.scope, node)
    first, ways = operator.cells[0].spec, len(operator.cells)
    x = reader.flowing(values[0], "X")
    wanted = "BTF" if operator.batch_first else "TBF"
    rolled = node.output[0] in reader.model.rolled
    if rolled and x.axes == tuple(wanted.replace("T", "1")):  # a step of a loop that feeds its output back
        x = reader.put(f"{label(node)}.step", Reshape((1, -1)), x, axes=wanted)
    if not x.has(wanted):
        raise Refused(f"expected X with axes {' '.join(wanted)}, found {' '.join(x.axes)}")
    if operator.lengths and not isinstance(reader.value(operator.lengths), Lengths):
        raise Refused("sequence_lens must be an input, neither computed nor constant")
    given = {
        part: (f"initial_{part}", value)
        for part, value in zip(first.state_sizes, values[5:], strict=False)
        if f"initial_{part}" in operator.started
    }
    number, wanted = len(reader.runs), "BSF" if operator.batch_first else "SBF"
    starts = _started(reader, node, operator, given, wanted)
    sequences = bool(node.output[0]) and reader.uses.get(node.output[0], 0) > 0
    zeros = bool(operator.lengths) or label(node) in reader.model.said.get("zeros", ())
    y = _put(reader, node, operator, x, sequences, zeros, starts)
    batch = x.axes[0 if operator.batch_first else 1]
    way = "D" if ways == 2 else "1"
    axes = (batch, "T", way, "F") if operator.batch_first else ("T", way, batch, "F")
    ends: list[Any] = [replace(y, axes=axes)]
    for part in first.state_sizes:
        refs = np.empty((ways, 1), object)
        for n in range(ways):
            refs[n, 0] = Final(number, n, part)
        if batch == "B":
            refs = refs[:, 0]
        elif operator.batch_first:
            refs = refs.T
        stacked = ("S", "B" if batch == "B" else "S", "F")
        ends.append(States((stacked[1], stacked[0], "F") if operator.batch_first else stacked, refs))
    return ends


def _put(
    reader: Reader, node: Any, operator: Operator, x: Flowing, sequences: bool, zeros: bool, starts: list[Flowing]
) -> Flowing:
    """Add an operator's nodes, and return the output, with steps in the order of `x`."""
    made, *reversal = nodes_of(operator, sequences, zeros)
    run = y = reader.put(node, made, x, *starts)
    for step in reversal:
        y = reader.put(f"{label(node)}.in_order", step, y)
    reader.runs.append(Run(operator.cells, run.wire, y.wire, sequences))
    return y


def _started(
    reader: Reader, node: Any, operator: Operator, given: dict[str, tuple[str, Any]], wanted: str
) -> list[Flowing]:
    """Return the initial states of an operator's cells as values; none where they are the network's state.

    Args:
        reader: the reader of the graph.
        node: the operator.
        operator: the same as cells.
        given: by state: the operator's name for it, and the value, which isn't constant.
        wanted: the axes of these values.
    """
    ways, flows, noted = len(operator.cells), dict[str, list[Flowing]](), []
    for part, (what, value) in given.items():
        if isinstance(value, Broadcast) and not value.array.any():
            continue
        if isinstance(value, States) and value.initial:
            _note(reader, value, what, wanted, (len(reader.runs), ways, part))
            noted.append(what)
        else:
            flows[part] = _vectors(reader, value, what, wanted, ways)
    if not flows:
        return []
    if noted:
        raise Refused(f"its initial states must be either all computed or all inputs, but {noted[0]} is an input")
    first = next(iter(flows.values()))
    starts = []
    for way, cell in enumerate(operator.cells):
        for part, initial in cell.initial.items():
            if part in flows:
                starts.append(flows[part][way])
            else:  # zeros or a constant: the same for all rows
                name, like = f"{label(node)}.{part}", first[way]
                if like.width != len(initial):
                    raise Refused(f"expected states of the same width, found {like.width} and {len(initial)}")
                starts.append(reader.put(name, Scale(np.zeros_like(initial), initial), like))
    return starts


def _vectors(reader: Reader, value: Any, what: str, wanted: str, ways: int) -> list[Flowing]:
    """Return initial states that the graph computes, one per direction."""
    if isinstance(value, States):
        refs = _in_order(value, what, wanted, ways)
        return [reader.state(ref) for ref in refs]
    flow = reader.flowing(value, what)
    labels = [axis for axis in flow.axes if axis != "1"]
    rows = ["B"] if "B" in labels else []
    if ways == 1 and labels == [*rows, "F"]:
        return [flow]
    turned = ["D", *rows, "F"] if wanted.startswith("S") else [*rows, "D", "F"]
    if ways == 2 and labels == turned and flow.width is not None:
        middle = flow.width // 2
        cuts = (Select(0, middle, axis=-1), Select(middle, None, axis=-1))
        return [reader.put(f"{flow.wire}.{what}", cut, flow, axes=("B", "F")) for cut in cuts]
    raise Refused(f"expected {what} with axes {' '.join(wanted)}, found {' '.join(flow.axes)}")


def _note(reader: Reader, value: States, what: str, wanted: str, states: tuple[int, int, str]) -> None:
    """Record which input states are an operator's initial states.

    Args:
        reader: the reader of the graph.
        value: the initial states.
        what: the operator's name for them.
        wanted: the expected axes.
        states: the operator's index, its number of directions, and the state.
    """
    operator, ways, part = states
    for way, initial in enumerate(_in_order(value, what, wanted, ways)):
        if reader.starts.setdefault(initial, Final(operator, way, part)) != Final(operator, way, part):
            raise Refused(f"{what} is also the initial state of another operator")


def _in_order(value: States, what: str, wanted: str, ways: int) -> list[Any]:
    """Return the state of each direction, with the expected axes checked."""
    axes, refs = list(value.axes), value.refs
    at = wanted.index("B")
    if "B" not in axes and at < len(axes) and axes[at] == "S":  # a state of one row
        stacked = axes[:at].count("S")
        if refs.shape[stacked] != 1:
            raise Refused(f"expected {what} with one row, found {refs.shape[stacked]}")
        axes[at], refs = "B", refs.reshape([n for axis, n in enumerate(refs.shape) if axis != stacked])
    if "".join(axes) != wanted:
        raise Refused(f"expected {what} with axes {' '.join(wanted)}, found {' '.join(value.axes)}")
    refs = refs.reshape(-1) if value.counted else refs.reshape(-1)[:ways]
    if len(refs) != ways:
        raise Refused(f"expected {what} to hold {ways} states, found {len(refs)}")
    return list(refs)


def scanned(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Scan that is a cell, or the memory of an mLSTM."""
    memory = memory_of(reader.scope, node)
    if memory is not None:
        return _add_memory(reader, node, memory, values)
    operator, number = read_scan(reader.scope, node), len(reader.runs)
    given = {
        part: (f"the initial {part}", value)
        for part, value in zip(operator.cells[0].spec.state_sizes, values[:-1], strict=True)
        if f"initial_{part}" in operator.started
    }
    starts = _started(reader, node, operator, given, "BF")
    flow = reader.flowing(values[-1], "its steps")
    if not flow.has("TBF"):
        raise Refused(f"expected steps with axes T B F, found {' '.join(flow.axes)}")
    sequences = reader.uses.get(node.output[-1], 0) > 0
    zeros = label(node) in reader.model.said.get("zeros", ())
    y = _put(reader, node, operator, flow, sequences, zeros, starts)
    axes = ("B", "F") if "B" in flow.axes else ("S", "F")
    ends = []
    for part in operator.cells[0].spec.state_sizes:
        refs = np.empty((1,), object)
        refs[0] = Final(number, 0, part)
        ends.append(States(axes, refs if axes[0] == "S" else refs.reshape(())))
    return [*ends, y]


def _add_memory(reader: Reader, node: Any, made: MLSTM, values: list[Any]) -> list[Any]:
    """Add a memory, and return the states after it and its output."""
    *starts, x = values
    for name, start in zip(made.memory.state_shapes, starts, strict=True):
        array = numbers(start)
        if not isinstance(array, np.ndarray) or array.any():
            raise Refused(f"expected the initial {name} to be zeros")
    flow = reader.flowing(x, "its steps")
    if not flow.has("TBF"):
        raise Refused(f"expected steps with axes T B F, found {' '.join(flow.axes)}")
    y = reader.put(node, made, flow)
    return [*(FinalMemory(y.wire, name) for name in made.memory.state_shapes), y]


HANDLERS: dict[str, Handler] = {**dict.fromkeys(KIND_OF, recurrent), "Scan": scanned}
