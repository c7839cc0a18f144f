"""The loop over layers and directions, which torch layers, accelerated modules and the Keras integration share.

It decides which layers run in one call of the op, and applies dropout, residual connections and the merging of
directions between the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellstack.cells.spec import GATES, TRACES
from cellstack.layers import eager, op
from cellstack.layers.cell_base import NO_MASKS, Masks, needs_grad, op_masks
from cellstack.layers.cell_call import saved_by_layer
from cellstack.layers.kernel_calls import Kept
from cellstack.layers.sequences import at_last_used, shifted


class CellRun(NamedTuple):
    """A cell in a run over a sequence: its description, weights, initial state and dropout masks."""

    call: op.CellCall
    arrays: Sequence[Tensor]  # the weights, in the op's order
    state: Sequence[Tensor] = ()  # the arrays of the initial state; empty: the cell's own
    masks: Masks = NO_MASKS
    route: str = "fused"  # what runs it, see `Cell.route`
    residual: bool = False  # whether its input is added to its output
    functions: Sequence[eager.Function] = ()  # its activations, for the route "loop"


class Results(NamedTuple):
    """Results of a run. States and traces are listed layer by layer, for each layer in the order of the directions."""

    y: Tensor  # [B, T, ·] of the top layer in the order of x, with `time_major` [T, B, ·]; only if `sequences`
    last: Tensor  # [B, P], the last output
    states: list[Any]  # one `State` or the like per cell
    traces: list[Any]  # one trace per cell; empty unless `traced`


def run_layers(
    cells: Sequence[CellRun],
    x: Tensor,
    used: Tensor | None,
    reset: Tensor | None,
    *,
    directions: Sequence[bool] = (False,),
    sequences: bool = True,
    traced: bool = False,
    recompute: bool = False,
    time_major: bool = False,
    between: Callable[[Tensor], Tensor] | None = None,
    packed: dict[int, Kept] | None = None,
) -> Results:
    """Run layers over a sequence, as many as possible in one call of the op.

    Args:
        cells: bottom first; for each layer one per direction.
        x: `[B, T, I]`.
        used: the mask, bool `[B, T]`.
        reset: bool `[B, T]`, True where a piece begins, in time order.
        directions: of each layer, True for backward in time; their outputs are concatenated.
        sequences: whether to return y, not only the last output.
        traced: whether to return traces.
        recompute: whether the backward pass recomputes the gates, unless they are traced.
        time_major: whether y is `[T, B, ·]`.
        between: is applied to the output `[B, T, ·]` of each layer but the top one.
        packed: the caller's store of packed weights, if these don't change between calls.
    """
    width, count = len(directions), len(cells)
    resets = [shifted(reset) if reverse and reset is not None else reset for reverse in directions]
    states: list[Any] = []
    traces: list[Any] = []
    y = last = x
    start = 0
    while start < count:
        stop = start + width
        bottom, below = cells[start], y
        if between is not None:
            y = between(y) if start else y
        elif width == 1:
            while stop < count and _share_call(cells[stop - 1], cells[stop]):
                stop += 1
        if bottom.masks.input is not None:
            y = y * bottom.masks.input.unsqueeze(1)
        wanted = sequences or stop < count or bottom.residual
        calls, keeps, outputs = [], [], []
        for n, reverse in enumerate(directions):
            part = cells[start + n : stop : width]
            calls.append(_call(part, y, used, resets[n], reverse, wanted, traced, recompute, time_major))
            keeps.append(None if packed is None else packed.setdefault(start + n, {}))
        if bottom.route == "fused":
            made = zip(calls, op.run_each(calls, keeps), strict=True)
        else:
            made = [_elsewhere(cells[start + n], call, traced) for n, call in enumerate(calls)]
        for call, out in made:
            ends, every, output = _results(call, out, traced)
            states += ends
            traces += every
            outputs.append(output)
        y = outputs[0] if width == 1 else torch.cat(outputs, 2)
        last = states[-1].h
        if bottom.residual and x.shape[1]:
            backward, begins = directions[0], resets[0]
            y = y + (below if used is None else at_last_used(below, used, begins, backward))
            last = y[:, 0 if backward else -1]
        if time_major and stop < count:
            y = y.transpose(0, 1)
        start = stop
    return Results(y, last, states, traces)


def _share_call(below: CellRun, above: CellRun) -> bool:
    """Whether the op runs two layers in one call."""
    return (
        below.route == above.route == "fused" and above.masks.input is None and not (below.residual or above.residual)
    )


def _call(
    cells: Sequence[CellRun],
    x: Tensor,
    used: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    wanted: bool,
    traced: bool,
    recompute: bool,
    time_major: bool,
) -> op.OpCall:
    """Return the call of the op for some cells; without `wanted`, it doesn't return y."""
    calls, begin, weights, masks = [], [], [], []
    for cell in cells:  # faster than four comprehensions
        calls.append(cell.call)
        begin.extend(cell.state)
        weights += cell.arrays
        masks.append(cell.masks)
    dropped = op_masks(masks, calls, x)
    save = traced or needs_grad(x, *begin, *weights)
    if recompute and save and not traced:
        calls = [call.recomputing for call in calls]
    return op.OpCall(x, begin, weights, dropped, used, reset, calls, reverse, wanted, save, 0, time_major)


def _elsewhere(cell: CellRun, call: op.OpCall, traced: bool) -> tuple[op.OpCall, list[Tensor]]:
    """Run the call of one cell without the fused kernel; return it, changed to match its results, and these."""
    x, begin, weights, dropped, used, reset, reverse = *call[:6], call.reverse
    spec, save = cell.call.spec, False
    if cell.route == "torch":
        out = [*eager.by_torch(spec, x, begin, weights, reverse)]
    elif cell.route == "cudnn" and used is reset is None and not dropped and not traced and x.shape[0] * x.shape[1]:
        out = [*eager.cudnn_lstm(x, begin, weights, reverse)]
    else:
        save = traced
        out = eager.run_eagerly(x, begin, weights, dropped, used, reset, [spec], [cell.functions], reverse, True, save)
    return call._replace(cells=[cell.call], sequences=True, save=save), out


def _results(call: op.OpCall, out: Sequence[Tensor], traced: bool) -> tuple[list[Any], Sequence[Any], Tensor]:
    """Return the final states, the traces, and y of the top cell; x instead of a y that the call doesn't return."""
    calls, time_major = call.cells, call.time_major
    ends, stop = [], 0
    for cell in calls:
        start, stop = stop, stop + len(cell.state._fields)
        ends.append(cell.state(*out[start:stop]))
    if not call.save:
        return ends, (), out[stop] if call.sequences else call.x
    specs = [cell.spec for cell in calls]
    saved = saved_by_layer(specs, out[stop:])
    y = saved[-1].y
    if not traced:
        return ends, (), y
    if time_major:
        saved = [of._replace(y=of.y.transpose(0, 1)) for of in saved]
    return ends, [trace_of(spec.kind, of) for spec, of in zip(specs, saved, strict=True)], y


def trace_of(kind: str, saved: op.Saved) -> Any:
    """Return the trace of a cell from the values that the op saves."""
    planes = saved.gates.unbind(2)[: len(GATES[kind])]  # without planes for the kernel only
    return TRACES[kind](*planes, *saved.states, saved.y)
