"""ONNX's recurrent operators, and cells that it has as Scan, as nodes: where they start, and what they end with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import INPUTS, KINDS, Operator, nodes_of, read_operator
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import Broadcast
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.values import Final, Flowing, Lengths, Run, States
from cellstack.formats.onnx.written_out.scans import read_scan


def recurrent(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a recurrent operator of the outermost graph."""
    operator = read_operator(reader.scope, node)
    first, ways = operator.cells[0].spec, len(operator.cells)
    x = reader.flowing(values[0], "X")
    wanted = "BTF" if operator.batch_first else "TBF"
    if not x.has(wanted):
        raise Refused(f"expected X with axes {' '.join(wanted)}, found {' '.join(x.axes)}")
    if operator.lengths and not isinstance(reader.value(operator.lengths), Lengths):
        raise Refused("expected sequence_lens to be an input, found what the graph computes, or a constant")
    starts: dict[str, Any] = dict(zip(INPUTS[5:7], values[5:7], strict=False))
    number = len(reader.runs)
    for key in operator.started:
        _start(reader, starts[key], key, "BSF" if operator.batch_first else "SBF", (number, ways, key[-1]))
    sequences = bool(node.output[0]) and reader.uses.get(node.output[0], 0) > 0
    zeros = bool(operator.lengths) or label(node) in reader.model.said.get("zeros", ())
    y = _put(reader, node, operator, x, sequences, zeros)
    batch = x.axes[0 if operator.batch_first else 1]
    way = "D" if ways == 2 else "1"
    axes = (batch, "T", way, "F") if operator.batch_first else ("T", way, batch, "F")
    given: list[Any] = [replace(y, axes=axes)]
    for part in first.state_sizes:
        refs = np.empty((ways, 1), object)
        for n in range(ways):
            refs[n, 0] = Final(number, n, part)
        if batch == "B":
            refs = refs[:, 0]
        elif operator.batch_first:
            refs = refs.T
        stacked = ("S", "B" if batch == "B" else "S", "F")
        given.append(States((stacked[1], stacked[0], "F") if operator.batch_first else stacked, refs))
    return given


def _put(reader: Reader, node: Any, operator: Operator, x: Flowing, sequences: bool, zeros: bool) -> Flowing:
    """Put an operator's nodes in, and return what it gives, in the order of `x`."""
    made, *reversal = nodes_of(operator, sequences, zeros)
    run = y = reader.put(node, made, x)
    for step in reversal:
        y = reader.put(f"{label(node)}.in_order", step, y)
    reader.runs.append(Run(operator.cells, run.wire, y.wire, sequences))
    return y


def _start(reader: Reader, value: Any, what: str, wanted: str, states: tuple[int, int, str]) -> None:
    """Note which states of the inputs an operator starts from; zeros need no note.

    Args:
        reader: of the graph.
        value: what it starts from.
        what: what the operator calls it.
        wanted: its axes.
        states: the operator's number, how many directions it has, and "h" or "c".
    """
    operator, ways, part = states
    if isinstance(value, Broadcast) and not value.array.any():
        return
    if not isinstance(value, States) or not value.initial:
        raise Refused(f"expected {what} to be an input, zeros or a constant, found what the graph computes")
    axes, refs = list(value.axes), value.refs
    at = wanted.index("B")
    if "B" not in axes and at < len(axes) and axes[at] == "S":  # a state of one row
        stacked = axes[:at].count("S")
        if refs.shape[stacked] != 1:
            raise Refused(f"expected {what} of one row, found {refs.shape[stacked]}")
        axes[at], refs = "B", refs.reshape([n for axis, n in enumerate(refs.shape) if axis != stacked])
    if "".join(axes) != wanted:
        raise Refused(f"expected {what} with axes {' '.join(wanted)}, found {' '.join(value.axes)}")
    refs = refs.reshape(-1) if value.counted else refs.reshape(-1)[:ways]
    if len(refs) != ways:
        raise Refused(f"expected {what} to hold {ways} states, found {len(refs)}")
    for way, initial in enumerate(refs):
        if reader.starts.setdefault(initial, Final(operator, way, part)) != Final(operator, way, part):
            raise Refused(f"expected {what} to be a state of its own, found one that another starts from, too")


def scanned(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a Scan that is a cell."""
    operator, number = read_scan(reader.scope, node), len(reader.runs)
    for part, value in zip("hc", values[:-1], strict=False):
        if f"initial_{part}" in operator.started:
            _start(reader, value, f"the {part} to start from", "BF", (number, 1, part))
    flow = reader.flowing(values[-1], "its steps")
    if not flow.has("TBF"):
        raise Refused(f"expected steps with axes T B F, found {' '.join(flow.axes)}")
    sequences = reader.uses.get(node.output[-1], 0) > 0
    zeros = label(node) in reader.model.said.get("zeros", ())
    y = _put(reader, node, operator, flow, sequences, zeros)
    axes = ("B", "F") if "B" in flow.axes else ("S", "F")
    ends = []
    for part in operator.cells[0].spec.state_sizes:
        refs = np.empty((1,), object)
        refs[0] = Final(number, 0, part)
        ends.append(States(axes, refs if axes[0] == "S" else refs.reshape(())))
    return [*ends, y]


HANDLERS: dict[str, Handler] = {**dict.fromkeys(KINDS, recurrent), "Scan": scanned}
