"""`StackedRNNCells`: a stack of cells as one cell, and the call that runs a stack over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellstack.layers import eager, op
from cellstack.layers.base import EXPORT_HINT, Layer, as_input, last_axis
from cellstack.layers.cell import Cell, Masks, as_drops, needs_grad
from cellstack.layers.foreign import as_cell, initial_state, output_width, state_counts, takes_training
from cellstack.spec import GATES, TRACES, ShapeError, as_nested, check_step


class StackedRNNCells(Layer):
    """A stack of cells as one cell: the output of each is the input of the next.

    Args:
        cells: bottom first; ours, of any kind and width, or any objects with `state_size` and a call
            `(x, states) -> (y, states)`.
        residual: add the input to the output of each cell but the first, if they have the same width: `y = h + x`. The
            state remains h.
        input_size: width I of the first cell's input, to create the weights immediately.
        name: the stack's name in error messages.

    Raises:
        TypeError: an entry of `cells` isn't a cell, or `residual` isn't a bool.
        ValueError: no cells.

    >>> from cellstack.layers import LSTMCell
    >>> StackedRNNCells([LSTMCell(4), LSTMCell(5)]).state_size
    [[4, 4], [5, 5]]

    Ref: residual connections between layers: Wu et al. 2016, "Google's Neural Machine Translation System", eq. 6.
    """

    def __init__(
        self,
        cells: Iterable[Any],
        residual: bool = False,
        *,
        input_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        given = list(cells)
        if not given:
            raise ValueError(f"{self._owner}: expected at least one cell, got none")
        if any(isinstance(cell, StackedRNNCells) for cell in given):
            raise TypeError(f"{self._owner}: expected one flat list of cells, got a nested StackedRNNCells")
        if not isinstance(residual, bool):
            raise TypeError(f"{self._owner}: expected residual to be True or False, got {residual!r}")
        self._config = {"cells": given, "residual": residual, "input_size": input_size, "name": name}
        self.residual = residual
        self.cells = nn.ModuleList(as_cell(self._owner, cell) for cell in given)
        self._check_widths()
        if input_size is not None:
            self.build(input_size)

    @property
    def built(self) -> bool:
        """Whether the weights of all our cells exist, each for the output of the cell below it."""
        if not all(cell.built for cell in self.cells if isinstance(cell, Cell)):
            return False
        self._check_widths()  # a cell may have got its weights after it was put into the stack
        return True

    def _check_widths(self) -> None:
        """Raise a ShapeError if a cell has weights for another width than the cell below it returns."""
        below = None
        for n, cell in enumerate(self.cells):
            if below is not None and isinstance(cell, Cell) and cell.input_size not in (None, below):
                raise ShapeError(
                    f"{self._owner}: cell {n} has weights for input_size {cell.input_size}, "
                    f"but the cell below it returns {below} values"
                )
            below = output_width(cell)

    @property
    def state_size(self) -> list[Any]:
        """State sizes, nested: one entry per cell."""
        return [cell.state_size for cell in self.cells]

    @property
    def output_size(self) -> int:
        """Width of the top cell's output."""
        return output_width(self.cells[-1])

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights of all our cells for inputs of width `input_size`."""
        width = last_axis(self._owner, input_size)
        self._check_widths()
        for cell in self.cells:
            if isinstance(cell, Cell):
                cell.build(width)
            width = output_width(cell)

    def get_initial_state(self, batch_size: int) -> list[Any]:
        """Return the initial state of each cell."""
        return [initial_state(cell, batch_size, next(self.parameters(), torch.empty(0))) for cell in self.cells]

    def forward(self, inputs: Any, states: Any, training: bool | None = None) -> tuple[Tensor, list[Any]]:
        """Run one step of each cell.

        Args:
            inputs: `[B, I]`.
            states: one entry per cell, bottom first, or a flat list of their arrays.
            training: whether dropout is active; None: whether the module is in training mode.

        Returns:
            The top cell's output, and the new states, one entry per cell.

        Raises:
            ShapeError, TypeError, ValueError: see `cellstack.layers`.
        """
        states = as_nested(self._owner, "states", states, state_counts(self.cells))
        cells: Any = self.cells
        if all(isinstance(cell, Cell) for cell in cells):
            x = as_input(self._owner, "inputs", inputs, cells[0].like)
            check_step(self._owner, tuple(x.shape), cells[0].input_size, "inputs")
            self.build(x.shape[1])
            begin = [
                c.as_state(self._owner, s, x.shape[0], n) for n, (c, s) in enumerate(zip(cells, states, strict=True))
            ]
            flags = self._trains(training), False, False, False, self.residual
            _, last, ends, _ = run_cells(cells, x.unsqueeze(1), begin, None, None, *flags)
            return last, [list(state) for state in ends]
        new_states = []
        y = inputs
        for n, (cell, state) in enumerate(zip(self.cells, states, strict=True)):
            kwargs = {"training": training} if takes_training(cell) else {}
            x = y
            y, state = cell(x, state, **kwargs)
            if self.residual and n and y.shape == x.shape:
                y = y + x
            new_states.append(state)
        return y, new_states


class Call(NamedTuple):
    """Arguments, random masks and results of a call of `run_cells`, for observers."""

    cells: Sequence[Cell]
    arrays: list[list[Tensor]]  # one list per cell, in the op's order
    masks: list[Masks]
    x: Tensor  # [B, T, I]
    states: Sequence[Any] | None
    used: Tensor | None  # [B, T]
    reset: Tensor | None  # [B, T], in the order processed
    reverse: bool
    residual: bool
    y: Tensor  # [B, T, P] of the top cell, if requested or needed for gradients
    finals: list[Any]
    traces: list[Any]


def run_cells(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[Any] | None,
    used: Tensor | None,
    reset: Tensor | None,
    training: bool,
    traced: bool,
    reverse: bool,
    sequences: bool,
    residual: bool,
    observers: Sequence[Callable[[Call], None]] = (),
    remat: bool = False,
) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
    """Run built cells over a sequence, as many as possible in one call of the op.

    Args:
        cells: bottom first.
        x: `[B, T, I]`.
        states: one entry per cell; None: their initial states.
        used: the mask, bool `[B, T]`.
        reset: bool `[B, T]`, True where the state before a step, in the order processed, is the initial one.
        training: whether dropout and zoneout are active.
        traced: whether to return traces.
        reverse: run from the last step to the first; y has the order of x.
        sequences: whether to return y, not only the last output.
        residual: see `StackedRNNCells`.
        observers: are called with the `Call`.
        remat: whether the backward pass recomputes the gates, unless they are traced.

    Returns:
        y `[B, T, P]` (with `sequences`), the last output `[B, P]`, one state per cell, one trace per cell (with
        `traced`).
    """
    cells = list(cells)  # slicing a ModuleList takes as long as a short step
    for cell in cells:
        if cell._forward_pre_hooks or cell._forward_hooks:
            raise TypeError(
                f"{cell._owner}: forward hooks of a cell aren't supported, as a run over a sequence doesn't call them "
                "(pruning sets one): use torch.nn.utils.parametrize, or make pruning permanent with prune.remove"
            )
    batch, steps, _ = x.shape
    count = len(cells)
    arrays = [cell.arrays() for cell in cells]
    masks = [cell.masks(batch, steps, training) for cell in cells]
    routes = [cell.route(weight[0])[0] for cell, weight in zip(cells, arrays, strict=True)]
    adds = [residual and n > 0 and cell.input_size == cell.output_size for n, cell in enumerate(cells)]
    finals: list[Any] = []
    traces: list[Any] = []
    y, last = x, x
    start = 0
    while start < count:
        stop = start + 1
        while (
            stop < count
            and routes[start] == routes[stop] == "fused"
            and masks[stop].input is None
            and not (adds[stop] or adds[stop - 1])
        ):
            stop += 1
        part, below, drop = slice(start, stop), y, masks[start].input
        if drop is not None:
            y = y * drop.unsqueeze(1)
        flat = [array for group in arrays[part] for array in group]
        starts = [] if states is None else [array for state in states[part] for array in state]
        drops = as_drops(masks[part], cells[start]._like)
        wanted = sequences or stop < count or adds[start]
        save = traced or needs_grad(y, *starts, *flat)
        if routes[start] == "fused":
            again = remat and save and not traced
            calls = [cell._call.recomputing if again else cell._call for cell in cells[part]]
            out = op.run(op.Call(y, starts, flat, drops, used, reset, calls, reverse, wanted, save))
        elif routes[start] == "torch":
            if not eager.torch_kind(cells[start]._spec) or traced or drops or used is not None or reset is not None:
                raise TypeError(
                    f"{cells[start]._owner}: torch.jit.trace and torch.onnx.export support only what torch's LSTM, GRU "
                    f"and RNN compute, without a mask, reset, dropout or return_gates; {EXPORT_HINT}"
                )
            out, save, wanted = [*eager.by_torch(cells[start]._spec, y, starts, flat, reverse)], False, True
        elif routes[start] == "cudnn" and used is reset is None and not drops and not traced and batch * steps:
            out, save, wanted = [*eager.cudnn_lstm(y, starts, flat, reverse)], False, True
        else:
            save, wanted = traced, True
            specs, functions = [cells[start]._spec], [cells[start]._functions]
            out = eager.run(y, starts, flat, drops, used, reset, specs, functions, reverse, wanted, save)
        if save:
            ends, saved = op.by_layer([cell._spec for cell in cells[part]], out)
            y = saved[-1].y
            if traced:
                traces += [trace_of(cell.kind, of) for cell, of in zip(cells[part], saved, strict=True)]
        else:
            results = iter(out)
            ends = [tuple(islice(results, len(cell._sizes))) for cell in cells[part]]
            y = next(results) if wanted else y
        finals += [cell.State(*end) for cell, end in zip(cells[part], ends, strict=True)]
        last = finals[-1].h
        if adds[start] and steps:
            y = y + (below if used is None else at_last_used(below, used, reset, reverse))
            last = y[:, 0 if reverse else -1]
        start = stop
    for observer in observers:
        observer(Call(cells, arrays, masks, x, states, used, reset, reverse, residual, y, finals, traces))
    return y, last, finals, traces


def trace_of(kind: str, saved: op.Saved) -> Any:
    """Return the trace of a cell from the values that the op saves."""
    planes = saved.gates.unbind(2)[: len(GATES[kind])]  # without planes for the kernel only
    return TRACES[kind](*planes, *saved.states, saved.y)


def at_last_used(x: Tensor, used: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """Return, for each step, x of the last unmasked step since the last reset; zeros if there is none."""
    if reverse:
        flipped = None if reset is None else reset.flip(1)
        return at_last_used(x.flip(1), used.flip(1), flipped, False).flip(1)
    count = torch.arange(1, x.shape[1] + 1, device=x.device)
    last = torch.where(used, count, 0).cummax(1).values  # 0: none
    if reset is not None:
        last = torch.where(last >= torch.where(reset, count, 0).cummax(1).values, last, 0)
    padded = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
    return padded.gather(1, last.unsqueeze(2).expand(x.shape))
