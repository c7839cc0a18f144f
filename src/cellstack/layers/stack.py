"""`StackedRNNCells`: a stack of cells as one cell, and the call that runs a stack over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellstack.cells.errors import ShapeError, as_nested, check_step
from cellstack.layers import eager, forward
from cellstack.layers.base import EXPORT_HINT, Layer, as_input, last_axis
from cellstack.layers.cell_base import Cell
from cellstack.layers.foreign import as_cell, initial_state, output_width, state_counts, takes_training
from cellstack.layers.forward import CellRun, Results


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
            training = self._trains(training)
            steps = x.unsqueeze(1)
            results = run_cells(
                cells, steps, begin, None, None, training=training, sequences=False, residual=self.residual
            )
            return results.last, [list(state) for state in results.states]
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


class StackCall(NamedTuple):
    """Arguments and results of a call of `run_cells`, for observers."""

    cells: Sequence[Cell]
    runs: list[CellRun]  # with the weights, states and random masks of each cell
    x: Tensor  # [B, T, I]
    used: Tensor | None  # [B, T]
    reset: Tensor | None  # [B, T]
    reverse: bool
    results: Results


def run_cells(
    cells: Iterable[Cell],
    x: Tensor,
    states: Sequence[Any] | None,
    used: Tensor | None,
    reset: Tensor | None,
    *,
    training: bool,
    traced: bool = False,
    reverse: bool = False,
    sequences: bool = True,
    residual: bool = False,
    observers: Sequence[Callable[[StackCall], None]] = (),
    remat: bool = False,
) -> Results:
    """Run built cells over a sequence.

    Args:
        cells: bottom first.
        states: one entry per cell; None: their initial states.
        training: whether dropout and zoneout are active.
        reverse: run from the last step to the first; y has the order of x.
        residual: see `StackedRNNCells`.
        observers: are called with the `StackCall`.
        remat: see `RNN`.
        x, used, reset, traced, sequences: see `forward.run_layers`.
    """
    cells = list(cells)  # slicing a ModuleList takes as long as a short step
    batch, steps, _ = x.shape
    arrays = [cell.arrays() for cell in cells]
    masks = [cell.masks(batch, steps, training) for cell in cells]
    runs = []
    for n, cell in enumerate(cells):
        if cell._forward_pre_hooks or cell._forward_hooks:
            raise TypeError(
                f"{cell._owner}: forward hooks of a cell aren't supported, as a run over a sequence doesn't call them "
                "(pruning sets one): use torch.nn.utils.parametrize, or make pruning permanent with prune.remove"
            )
        route = cell.route(arrays[n][0])[0]
        if route == "torch" and (
            traced
            or not eager.torch_kind(cell._spec)
            or any(given is not None for given in (used, reset, masks[n].recurrent, *masks[n].zoneout))
        ):
            raise TypeError(
                f"{cell._owner}: torch.jit.trace and torch.onnx.export support only what torch's LSTM, GRU and RNN "
                f"compute, without a mask, reset, dropout or return_gates; {EXPORT_HINT}"
            )
        state = () if states is None else states[n]
        added = residual and n > 0 and cell.input_size == cell.output_size
        run = CellRun(cell._call, arrays[n], state, masks[n], route, added, cell._functions)
        runs.append(run)
    results = forward.run_layers(
        runs, x, used, reset, directions=(reverse,), sequences=sequences, traced=traced, recompute=remat
    )
    for observer in observers:
        observer(StackCall(cells, runs, x, used, reset, reverse, results))
    return results
