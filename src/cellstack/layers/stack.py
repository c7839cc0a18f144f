"""`StackedRNNCells`: several cells as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellstack.layers.base import Layer, last_axis
from cellstack.layers.cells import Cell
from cellstack.layers.foreign import as_cell, initial_state, output_width, takes_training
from cellstack.spec import ShapeError


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
        """
        if len(states) != len(self.cells):
            raise ShapeError(f"{self._owner}: expected {len(self.cells)} states, one a cell, got {len(states)}")
        new_states = []
        for cell, state in zip(self.cells, states, strict=True):
            kwargs = {"training": training} if takes_training(cell) else {}
            inputs, state = cell(inputs, state, **kwargs)
            new_states.append(state)
        return inputs, new_states
