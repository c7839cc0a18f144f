"""`StackedRNNCells`: several cells as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellstack.layers import eager, op
from cellstack.layers.base import Layer, as_input, last_axis
from cellstack.layers.cells import Cell, LSTMCell, needs_grad
from cellstack.layers.foreign import as_cell, initial_state, output_width, takes_training
from cellstack.spec import ShapeError, State, Trace, check_step


class StackedRNNCells(Layer):
    """Several cells, each fed with the output of the one before: itself a cell.

    Args:
        cells: bottom first; `LSTMCell`s, or any objects with `state_size` and a call `(x, states) -> (y, states)`.
        input_size: width I of the first cell's input, to make the weights at once.
        name: said in error messages.

    Raises:
        TypeError: something in `cells` is no cell.

    >>> from cellstack.layers import LSTMCell
    >>> StackedRNNCells([LSTMCell(4), LSTMCell(5)]).state_size
    [[4, 4], [5, 5]]
    """

    def __init__(self, cells: Iterable[Any], *, input_size: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        given = list(cells)
        if not given:
            raise ValueError(f"{self._owner}: expected at least one cell, got none")
        if any(isinstance(cell, StackedRNNCells) for cell in given):
            raise TypeError(f"{self._owner}: expected one flat list of cells, got a stack within a stack")
        self._config = {"cells": given, "input_size": input_size, "name": name}
        self.cells = nn.ModuleList(as_cell(self._owner, cell) for cell in given)
        if input_size is not None:
            self.build(input_size)

    @property
    def built(self) -> bool:
        """Whether the weights of all our cells exist."""
        return all(cell.built for cell in self.cells if isinstance(cell, Cell))

    @property
    def state_size(self) -> list[Any]:
        """State sizes, nested: one entry a cell."""
        return [cell.state_size for cell in self.cells]

    @property
    def output_size(self) -> int:
        """Width of the top cell's output."""
        return output_width(self.cells[-1])

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Make the weights of all our cells for inputs of width `input_size`."""
        width = last_axis(self._owner, input_size)
        for cell in self.cells:
            if isinstance(cell, Cell):
                cell.build(width)
            width = output_width(cell)

    def get_initial_state(self, batch_size: int) -> list[Any]:
        """Return zeros for each cell's state."""
        return [initial_state(cell, batch_size, next(self.parameters(), torch.empty(0))) for cell in self.cells]

    def forward(self, inputs: Any, states: Any, training: bool | None = None) -> tuple[Tensor, list[Any]]:
        """Run one step of each cell.

        Args:
            inputs: `[B, I]`.
            states: one entry a cell, bottom first.
            training: whether dropout is active; None: whether the module is in training mode.

        Returns:
            The top cell's output, and the new states, one entry a cell.

        Raises:
            ShapeError, TypeError, ValueError: see `cellstack.layers`.
        """
        if len(states) != len(self.cells):
            raise ShapeError(f"{self._owner}: expected {len(self.cells)} states, one a cell, got {len(states)}")
        cells: Any = self.cells
        if all(isinstance(cell, LSTMCell) for cell in cells):
            x = as_input(self._owner, "inputs", inputs, cells[0].like)
            check_step(self._owner, tuple(x.shape), cells[0].input_size, "inputs")
            self.build(x.shape[1])
            begin = [
                c.as_state(self._owner, s, x.shape[0], n) for n, (c, s) in enumerate(zip(cells, states, strict=True))
            ]
            training = self._trains(training)
            _, last, ends, _ = run_lstms(cells, x.unsqueeze(1), begin, None, training, False, False, False)
            return last, [list(state) for state in ends]
        new_states = []
        for cell, state in zip(self.cells, states, strict=True):
            kwargs = {"training": training} if takes_training(cell) else {}
            inputs, state = cell(inputs, state, **kwargs)
            new_states.append(state)
        return inputs, new_states


def run_lstms(
    cells: Sequence[LSTMCell],
    x: Tensor,
    states: Sequence[Any] | None,
    used: Tensor | None,
    training: bool,
    traced: bool,
    reverse: bool,
    sequences: bool,
) -> tuple[Tensor, Tensor, list[State], list[Trace]]:
    """Run built LSTMCells over a sequence: as many as can be in one call of the op, the others by their own routes.

    Returns:
        y `[B, T, H]` (where `sequences`), the last h, a `State` a cell, and a `Trace` a cell (where `traced`).
    """
    count = len(cells)
    for cell in cells:
        if cell._forward_pre_hooks or cell._forward_hooks:
            raise TypeError(
                f"{cell._owner}: expected a cell without forward hooks (pruning sets one), which a run over a sequence "
                "doesn't call: torch.nn.utils.parametrize changes weights without them, prune.remove makes them final"
            )
    arrays = [cell.arrays() for cell in cells]
    drops = [cell.masks(x.shape[0], training) for cell in cells]
    routes = [cell.route(weight[0])[0] for cell, weight in zip(cells, arrays, strict=True)]
    finals: list[State] = []
    traces: list[Trace] = []
    y = x
    start = 0
    while start < count:
        stop = start + 1
        while stop < count and routes[start] == routes[stop] == "fused" and drops[stop][0] is None:
            stop += 1
        input_drop = drops[start][0]
        if input_drop is not None:
            y = y * input_drop.unsqueeze(1)
        part = slice(start, stop)
        flat = [array for group in arrays[part] for array in group]
        begin = [] if states is None else states[part]
        h0, c0 = [state[0] for state in begin], [state[1] for state in begin]
        drop = [cell._no_bias if d[1] is None else d[1] for cell, d in zip(cells[part], drops[part], strict=True)]
        if all(d[1] is None for d in drops[part]):
            drop = []
        wanted = sequences or stop < count
        save = traced or needs_grad(y, *h0, *c0, *flat)
        if routes[start] == "fused":
            codes = [code for cell in cells[part] for code in cell._codes]
            out = op.run(y, h0, c0, flat, drop, used, codes, reverse, wanted, save)
        elif routes[start] == "cudnn" and used is None and not drop and not traced and y.shape[0] * y.shape[1]:
            start_h, start_c = (h0[0], c0[0]) if h0 else (None, None)
            ends = eager.cudnn_lstm(y, start_h, start_c, flat, reverse)
            out, save, wanted = [ends[1], ends[2], ends[0]], False, True
        else:
            functions = cells[start]._functions
            save, wanted = traced, True
            out = eager.lstm(y, h0, c0, flat, drop, used, functions, reverse, wanted, save)
        width = stop - start
        finals += map(State, out[:width], out[width : 2 * width])
        if wanted or save:
            y = out[3 * width - 1 if save else 2 * width]
        if traced:
            outputs, gates, memory = (out[k * width : (k + 1) * width] for k in (2, 3, 4))
            traces += map(_trace, gates, memory, outputs)
        start = stop
    return y, finals[-1].h, finals, traces


def _trace(gates: Tensor, cells: Tensor, y: Tensor) -> Trace:
    i, f, g, o = gates.unbind(2)
    return Trace(i, f, g, o, cells, y)
