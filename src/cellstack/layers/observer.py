"""Observe one training call of a layer: its forward pass, and the gradients of the loss in each past state.

The call, its results and its gradients don't change. The fused kernel doesn't return the gradients of the states at
each step, so some rows and the last steps of the call run again as a torch loop.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellstack.layers import eager, forward, op
from cellstack.layers.cell_base import Cell, Masks, op_masks
from cellstack.layers.forward import CellRun, Results, trace_of
from cellstack.layers.rnn import RNN
from cellstack.layers.sequences import at_last_used, shifted
from cellstack.layers.stack import StackCall


class Lags(NamedTuple):
    """Gradients of the loss in one array of a cell's states, by their distance in steps from the output.

    In each row, lag 0 is the last unmasked step at which the loss depends on the state. A row's lags are the unmasked
    steps before it, back to the last reset, among the steps that were run again.
    """

    rows: Tensor  # [L], number of rows that have the lag
    squares: Tensor  # [L, H], sums over these rows of the squared gradient
    carried: Tensor  # [L, H], the same for the part of the gradient that enters at lag 0
    start: Tensor  # [L], squared norm at lag 0 over these rows, to which `carried` is relative


class CellObservation(NamedTuple):
    """The observations of one cell."""

    cell: Cell
    arrays: dict[str, Tensor]  # their values in the call
    trace: Any  # [R, S, H], a trace in time order, of the rows and steps that were run again
    used: Tensor | None  # [R, S]
    gradients: dict[str, Tensor]  # norm of the gradient of each trained array, before clipping
    lags: dict[str, Lags]  # of each state


class Observer:
    """Observes one call of a layer: the last one before a gradient reaches the layer's results.

    Args:
        layer: the layer.
        rows: maximum number of rows of the batch to run again: those that end last.
        steps: maximum number of steps to run again: the last in the order processed.
    """

    def __init__(self, layer: RNN, rows: int, steps: int) -> None:
        self.layer, self.rows, self.steps = layer, rows, steps
        self.calls = 0  # until the first gradient
        self.through_gates = False  # whether the loss also depends on gates or c of every step, which isn't traced back
        self._lock = threading.Lock()
        self._hooks: list[Any] = []
        self._call: StackCall | None = None
        self._first = 0
        self._given: dict[int, Tensor] = {}  # gradients of the call's results, by position
        self._norms: dict[tuple[int, str], Tensor] = {}

    def start(self) -> None:
        """Start observing."""
        self.stop()
        self.calls, self._call, self.through_gates = 0, None, False
        self._given, self._norms = {}, {}
        self.layer._observers += (self,)

    def stop(self) -> None:
        """Stop observing; keep the observations."""
        self._leave()
        self._unhook()

    def _leave(self) -> None:
        self.layer._observers = tuple(other for other in self.layer._observers if other is not self)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __call__(self, call: StackCall) -> None:
        """Record a call: copy its arguments, and set hooks for the gradients of its results."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not min(call.x.shape[:2]):
            return
        results = _results(call.results.states, call.results.y)
        if not any(result.requires_grad for result in results):
            return
        with self._lock:
            if self._given:  # an earlier call has received a gradient already
                return
            self._unhook()
            self.calls += 1
            rows, self._first = self._part(call)
            self._call = _copied(call, rows)
            # In a backward direction, the last steps processed are the first in time.
            part = slice(self._first, None) if not call.reverse else slice(0, call.x.shape[1] - self._first)
            for place, result in enumerate(results):
                if result.requires_grad:
                    cut = part if place == len(results) - 1 else None
                    self._hooks.append(result.register_hook(self._result_hook(place, rows, cut)))
            for field in (
                field for trace in call.results.traces for name, field in trace._asdict().items() if name != "h"
            ):
                if field.requires_grad:
                    self._hooks.append(field.register_hook(self._note_gates))
            for n, (cell, run) in enumerate(zip(call.cells, call.runs, strict=True)):
                for name, array in zip(cell._names, run.arrays, strict=True):
                    if array.requires_grad:
                        self._hooks.append(array.register_hook(self._array_hook(n, name)))

    def _part(self, call: StackCall) -> tuple[Tensor, int]:
        """Return which rows to run again, and from which step on, in the order processed."""
        batch, steps = call.x.shape[:2]
        if call.used is None:
            return torch.arange(min(batch, self.rows), device=call.x.device), max(0, steps - self.steps)
        used = call.used.flip(1) if call.reverse else call.used
        ends = (used * torch.arange(1, steps + 1, device=used.device)).amax(1)  # steps up to the last unmasked one
        rows = ends.argsort(descending=True, stable=True)[: self.rows].sort().values
        return rows, max(0, int(ends.max()) - self.steps)

    def _result_hook(self, place: int, rows: Tensor, part: slice | None) -> Any:
        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # the loss doesn't depend on this result
                return
            if place not in self._given:
                of_rows = gradient.detach()[rows]
                self._given[place] = (of_rows if part is None else of_rows[:, part]).clone()
            self._leave()  # one call is enough

        return hook

    def _note_gates(self, gradient: Tensor | None) -> None:
        self.through_gates |= gradient is not None

    def _array_hook(self, n: int, name: str) -> Any:
        def hook(gradient: Tensor | None) -> None:
            if gradient is not None:
                self._norms.setdefault((n, name), gradient.detach().double().norm())

        return hook

    def looked(self) -> list[CellObservation] | None:
        """Stop observing, and return the observations of each cell; None if no gradient has reached a call."""
        self.stop()
        call, gradients, self._call, self._given = self._call, self._given, None, {}
        if call is None or not gradients:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            return _run_again(call, self._first, gradients, self._norms)


def _results(finals: Sequence[Any], y: Tensor) -> list[Tensor]:
    """Return the results of a call without its traces: the final states, then y."""
    return [*(part for state in finals for part in state), y]


def _copied(call: StackCall, rows: Tensor) -> StackCall:
    """Copy the arguments of a call for some rows, so that it can be run again after the originals change."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[rows].clone()

    def of_mask(mask: Tensor | None) -> Tensor | None:
        copied = of(mask)
        return None if copied is None else copied.to(wide)

    wide = torch.float64 if call.x.dtype == torch.float64 else torch.float32  # float16, bfloat16 are too coarse
    x = call.x.detach()[rows].to(wide, copy=True)
    runs = [
        run._replace(
            arrays=[array.detach().to(wide, copy=True) for array in run.arrays],
            state=[part.detach()[rows].to(wide, copy=True) for part in run.state],
            masks=Masks(of_mask(run.masks.input), of_mask(run.masks.recurrent), tuple(map(of_mask, run.masks.zoneout))),
        )
        for run in call.runs
    ]
    return call._replace(
        runs=runs, x=x, used=of(call.used), reset=of(call.reset), results=Results(x[:0], x[:0], [], [])
    )


def _run_again(
    call: StackCall, first: int, of_results: dict[int, Tensor], norms: dict[tuple[int, str], Tensor]
) -> list[CellObservation]:
    """Run a call's last steps again, cell by cell, and compute the gradients of its states at each step.

    Args:
        call: the result of `_copied`.
        first: the first step to run again, in the order processed.
        of_results: the gradients of the call's results, for these rows and steps, by their position in `_results`.
        norms: the norms of the arrays' gradients, by cell and name.
    """

    def ordered(tensor: Tensor | None) -> Tensor | None:  # from here on, steps are in the order processed
        return tensor.flip(1) if call.reverse and tensor is not None else tensor

    reset = call.reset if call.reset is None or not call.reverse else shifted(call.reset)
    x, used, reset = ordered(call.x), ordered(call.used), ordered(reset)
    assert x is not None
    late = None if used is None else used[:, first:]
    begun = None if reset is None else reset[:, first:]
    every: list[list[list[Tensor]]] = []
    finals, traces, y = [], [], x
    for cell, run in zip(call.cells, call.runs, strict=True):
        masks = run.masks.with_each(lambda mask: mask.flip(1)) if call.reverse else run.masks
        below, y = y, y if masks.input is None else y * masks.input.unsqueeze(1)
        state, early = run.state, None
        if first:
            state, early = _early(run, cell, y[:, :first], masks, used, reset, first)
        dropped = op_masks([masks.at(slice(first, None))], [run.call], y)
        seen: list[list[Tensor]] = []
        # Without an array that requires a gradient, autograd would build no graph.
        arrays = [array.requires_grad_() for array in run.arrays]
        specs, functions = [cell._spec], [cell._functions]
        arguments = y[:, first:], state, arrays, dropped, late, begun
        (ends,), (saved,) = op.by_layer(specs, eager.run_eagerly(*arguments, specs, functions, False, True, True, seen))
        output = saved.y
        finals.append(cell.State(*ends))
        traces.append(trace_of(cell.kind, saved))
        every.append(seen)
        y = output if early is None else torch.cat([early, output], dim=1)
        if run.residual:
            y = y + (below if used is None else at_last_used(below, used, reset, False))
    results = _results(finals, y[:, first:])
    places = sorted(of_results)
    outputs = [results[place] for place in places]
    timed = len(results) - 1
    gradients = [
        (of_results[place].flip(1) if call.reverse and place == timed else of_results[place]).to(results[place])
        for place in places
    ]
    states = [part for seen in every for state in seen for part in state]
    whole = _gradients(outputs, states, gradients)
    steps = _by_cell(whole, every, call.cells)
    there, at = _last(steps, late)
    if timed in places:  # only the gradients of the outputs from lag 0 on
        numbers = torch.arange(outputs[-1].shape[1], device=at.device)
        gradients[-1] = torch.where((numbers >= at[:, None])[:, :, None], gradients[-1], 0.0)
    carried = _gradients(outputs, states, gradients)
    entering = _by_cell(carried, every, call.cells)
    lag = _lag_of_step(late, begun, at, there, x.shape[1] - first)
    observations = []
    for n, (cell, run) in enumerate(zip(call.cells, call.runs, strict=True)):
        lags = {name: _lags(gradients, entering[n][name], lag) for name, gradients in steps[n].items()}
        arrays = dict(zip(cell._names, (array.detach() for array in run.arrays), strict=True))
        mine = {name: norm for (number, name), norm in norms.items() if number == n}
        trace = type(traces[n])(*(ordered(field.detach()) for field in traces[n]))
        observations.append(CellObservation(cell, arrays, trace, ordered(late), mine, lags))
    return observations


@torch.no_grad()
def _early(
    run: CellRun, cell: Cell, x: Tensor, masks: Masks, used: Tensor | None, reset: Tensor | None, first: int
) -> tuple[Sequence[Tensor], Tensor]:
    """Run the steps before the observed ones, on the kernel if possible; return the final state, and y."""
    masks = masks.at(slice(0, first))._replace(input=None)
    used, reset = (None if flag is None else flag[:, :first] for flag in (used, reset))
    route = "fused" if cell.route(run.arrays[0])[0] == "fused" else "loop"
    results = forward.run_layers([run._replace(masks=masks, route=route, residual=False)], x, used, reset)
    return results.states[0], results.y


def _gradients(outputs: list[Tensor], states: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    computed = torch.autograd.grad(outputs, states, gradients, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(state) if gradient is None else gradient
        for state, gradient in zip(states, computed, strict=True)
    ]


def _by_cell(
    gradients: list[Tensor], every: list[list[list[Tensor]]], cells: Sequence[Cell]
) -> list[dict[str, Tensor]]:
    """Return the gradients of each cell's states by name, `[R, S, H]` each."""
    queue, of_cells = iter(gradients), []
    for cell, seen in zip(cells, every, strict=True):
        steps = [list(islice(queue, len(state))) for state in seen]
        columns = zip(cell._sizes, zip(*steps, strict=True), strict=True)
        of_cells.append({name: torch.stack(column, dim=1) for name, column in columns})
    return of_cells


def _last(steps: list[dict[str, Tensor]], used: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return whether each row has a gradient, `[R]`, and the last unmasked step at which it has one, `[R]`."""
    every = [gradient for cell in steps for gradient in cell.values()]
    there = torch.stack([(gradient != 0.0).any(2) for gradient in every]).any(0)  # [R, S]; a NaN counts as a gradient
    if used is not None:
        there = there & used
    numbers = torch.arange(1, there.shape[1] + 1, device=there.device)
    last = (there * numbers).amax(1)
    return last > 0, (last - 1).clamp(min=0)


def _lag_of_step(used: Tensor | None, reset: Tensor | None, at: Tensor, there: Tensor, steps: int) -> Tensor:
    """Return the lag of each step, `[R, S]`; -1 for steps without a lag."""
    numbers = torch.arange(steps, device=at.device)
    counts = torch.ones(len(at), steps, dtype=torch.bool, device=at.device) if used is None else used
    counted = counts.cumsum(1)
    lags = counted.gather(1, at[:, None]) - counted
    fits = counts & (numbers <= at[:, None]) & there[:, None]
    if reset is not None:  # lags end where the piece of the output begins
        begins = torch.where(reset & (numbers <= at[:, None]), numbers, 0).amax(1, keepdim=True)
        fits = fits & (numbers >= begins)
    return torch.where(fits, lags, -1)


def _lags(gradients: Tensor, carried: Tensor, lag: Tensor) -> Lags:
    """Return the gradients `[R, S, H]` by lag."""
    fits = lag >= 0
    lags, count = lag[fits], int(lag.max()) + 1
    width = gradients.shape[2]
    empty = torch.zeros(count, width, dtype=torch.float64, device=gradients.device)
    squares = empty.index_add(0, lags, gradients[fits].double().square())
    entered = carried.double().square()
    sums = empty.index_add(0, lags, entered[fits])
    first = torch.where((lag == 0)[:, :, None], entered, 0.0).sum((1, 2))  # [R]
    start = empty.new_zeros(count).index_add(0, lags, first[:, None].expand(lag.shape)[fits])
    return Lags(torch.bincount(lags, minlength=count), squares, sums, start)
