"""Recurrent operators of files where a call is one step: see `frames`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import INPUTS, read_operator
from cellstack.formats.onnx.fold import Broadcast
from cellstack.formats.onnx.frames import Step
from cellstack.formats.onnx.graph import Reader
from cellstack.formats.onnx.values import Final, Run, States
from cellstack.nodes import GlobalPool, Recurrent


def recurrent_over_frames(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a recurrent operator whose steps are frames: the rows, or one step per row."""
    operator = read_operator(reader.scope, node)
    if len(operator.cells) != 1 or operator.direction != "forward" or operator.lengths:
        raise ValueError("where a call is one step, only forward operators without lengths are supported")
    x = reader.flowing(values[0], "X")
    if x.axes[-1:] != ("F",) or len(x.axes) != 3:
        raise ValueError(f"expected X [T, B, F], found axes {' '.join(x.axes)}")
    for n, axis in enumerate(x.axes):
        if axis == "T":
            if x.steps != 1:
                raise ValueError(f"expected one step per frame, found {x.steps if x.steps else 'an unknown number'}")
            pooled = reader.put(f"{x.wire}.step", GlobalPool("last"), x)
            x = replace(pooled, axes=tuple("1" if m == n else other for m, other in enumerate(x.axes)))
    number, cell = len(reader.runs), operator.cells[0]
    starts: dict[str, Any] = dict(zip(INPUTS[5:7], values[5:7], strict=False))
    for key in operator.started:
        _start(reader, starts[key], key, Final(number, 0, key[-1]))
    y = reader.put(node, Step(Recurrent((cell,))), x)
    reader.runs.append(Run(operator.cells, y.wire, y.wire, True))
    one, other = x.axes[:2]
    axes = (one, other, "1", "F") if operator.batch_first else (one, "1", other, "F")
    given: list[Any] = [replace(y, axes=axes)]
    by_rows = (other if operator.batch_first else one) == "B"  # the rows are the steps: states are of one row
    for part in cell.spec.state_sizes:
        refs = np.empty((1, 1) if by_rows or "B" not in x.axes else (1,), object)
        refs.reshape(-1)[0] = Final(number, 0, part)
        stacked = ("S", "S", "F") if refs.ndim == 2 else ("B", "S", "F") if operator.batch_first else ("S", "B", "F")
        given.append(States(stacked, refs))
    return given


def _start(reader: Reader, value: Any, what: str, final: Final) -> None:
    """Record which input holds an operator's initial state; zeros need no record."""
    if isinstance(value, Broadcast) and not value.array.any():
        return
    if not isinstance(value, States) or not value.initial or value.refs.size != 1:
        raise ValueError(f"{what} must be an input, zeros or a constant, but the graph computes it")
    (initial,) = value.refs.reshape(-1)
    if reader.starts.setdefault(initial, final) != final:
        raise ValueError(f"{what} is also the initial state of another operator")
