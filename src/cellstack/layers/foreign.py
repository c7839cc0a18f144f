"""Custom cells, and the Python loop that runs them: it calls each cell exactly T times per sequence."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellstack.cells.errors import ShapeError
from cellstack.layers.cell_base import NO_MASKS, Cell
from cellstack.layers.sequences import shifted


class ForeignCell(nn.Module):
    """A cell that isn't a torch module: any object with `state_size` and `call(x, states)` or `__call__`."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell
        self.state_size = cell.state_size
        if getattr(cell, "output_size", None) is not None:
            self.output_size = cell.output_size
        if hasattr(cell, "get_initial_state"):
            self.get_initial_state = cell.get_initial_state

    def forward(self, inputs: Tensor, states: Any, **kwargs: Any) -> Any:
        """Call the cell."""
        function = self.cell if callable(self.cell) else self.cell.call
        return function(inputs, states, **kwargs)


def as_cell(owner: str, cell: Any) -> nn.Module:
    """Return `cell` as a module.

    Raises:
        TypeError: it has no `state_size`, or can't be called.
    """
    if not hasattr(cell, "state_size") or not (callable(cell) or callable(getattr(cell, "call", None))):
        raise TypeError(
            f"{owner}: expected a cell (an object with state_size and a call (x, states) -> (y, states)), "
            f"got {type(cell).__name__}"
        )
    return cell if isinstance(cell, nn.Module) else ForeignCell(cell)


def cell_name(cell: nn.Module) -> str:
    """Return the class name of a cell; for a `ForeignCell` that of the wrapped object."""
    return type(cell.cell if isinstance(cell, ForeignCell) else cell).__name__


def takes_training(cell: nn.Module) -> bool:
    """Whether a cell's call has an argument `training`."""
    target = cell.cell if isinstance(cell, ForeignCell) else cell.forward
    if isinstance(cell, ForeignCell) and not callable(target):
        target = target.call
    return "training" in inspect.signature(target).parameters


def output_width(cell: Any) -> int:
    """Return the width of a cell's output: `output_size`, or the width of its first state."""
    width = getattr(cell, "output_size", None)
    if width is None:
        width = cell.state_size if isinstance(cell.state_size, int) else cell.state_size[0]
    return int(width)


def initial_state(cell: Any, batch: int, like: Tensor) -> Any:
    """Return the result of a cell's `get_initial_state`, or zeros with the dtype and device of `like`."""
    if hasattr(cell, "get_initial_state"):
        return cell.get_initial_state(batch_size=batch)
    if isinstance(cell.state_size, int):
        return like.new_zeros(batch, cell.state_size)
    return [like.new_zeros(batch, size) for size in cell.state_size]


def state_counts(cells: Iterable[Any]) -> list[int]:
    """Return the number of tensors in each cell's state."""
    return [1 if isinstance(cell.state_size, int) else len(cell.state_size) for cell in cells]


def as_parts(state: Any) -> tuple[Tensor, ...]:
    """Return the tensors of one cell's state."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def like_size(cell: Any, state: Any) -> Any:
    """Return a state in the structure of the cell's `state_size`: a tensor or a tuple; for our cells a `State`."""
    parts = as_parts(state)
    if isinstance(cell, Cell):
        return cell.State(*parts)
    if isinstance(cell.state_size, int):
        if len(parts) != 1:
            raise ShapeError(f"{cell_name(cell)}: expected one state, got {len(parts)}")
        return parts[0]
    if len(parts) != len(cell.state_size):
        raise ShapeError(f"{cell_name(cell)}: expected {len(cell.state_size)} states, got {len(parts)}")
    return parts


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(where.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _choose_states(cells: Sequence[Any], where: Tensor, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    return [
        like_size(cell, [_choose(where, *pair) for pair in zip(as_parts(a), as_parts(b), strict=True)])
        for cell, a, b in zip(cells, new, old, strict=True)
    ]


def _at_rest(states: Sequence[Any], like: Tensor) -> Tensor:
    """Return the output before any step: the top cell's first state if it has the output's shape, else zeros."""
    first = as_parts(states[-1])[0]
    return first if first.shape == like.shape else torch.zeros_like(like)


def loop(
    cells: Sequence[Any],
    x: Tensor,
    states: list[Any] | None,
    used: Tensor | None,
    reset: Tensor | None,
    training: bool,
    reverse: bool,
    like: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, list[Any]]:
    """Run cells over `x [B, T, …]`, step by step; for the arguments see `stack.run_cells`. The state is like `like`.

    Before the first unmasked step, the output is the first state of the top cell if it has the output's shape (the
    initial h), else zeros.

    Returns:
        The top cell's output at every step, `[B, T, …]`; its last output; the states, one entry per cell.
    """
    batch, steps = x.shape[:2]
    if reset is not None and reverse:
        reset = shifted(reset)
    begin: list[Any] = []
    if states is None or reset is not None:
        begin = [like_size(cell, initial_state(cell, batch, like)) for cell in cells]
    states = begin if states is None else states
    masks = [cell.masks(batch, steps, training) if isinstance(cell, Cell) else NO_MASKS for cell in cells]
    extra = [{"training": training} if takes_training(cell) else {} for cell in cells]
    if not steps:
        last = _at_rest(states, like.new_zeros(batch, output_width(cells[-1])))
        return last.new_zeros(batch, 0, *last.shape[1:]), last, states
    if used is not None:  # masked steps may hold NaN, and a zero gradient times NaN is NaN
        x = torch.where(used.reshape(batch, steps, *(1,) * (x.ndim - 2)), x, 0.0)
    last: Tensor | None = None
    outputs = [x] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        if reset is not None:
            states = _choose_states(cells, reset[:, t], begin, states)
        value, new_states = x[:, t], []
        for n, cell in enumerate(cells):
            below = value
            if isinstance(cell, Cell):
                new_states.append(cell.State(*cell.step(value, states[n], masks[n].at(slice(t, t + 1)))))
                value = new_states[-1][0]
            else:
                value, state = cell(value, list(as_parts(states[n])), **extra[n])
                new_states.append(like_size(cell, state))
            if residual and n and value.shape == below.shape:
                value = value + below
        if used is not None:
            last = _at_rest(states, value) if last is None else last
            if reset is not None:
                last = _choose(reset[:, t], _at_rest(states, value), last)
            value = _choose(used[:, t], value, last)
            new_states = _choose_states(cells, used[:, t], new_states, states)
        outputs[t] = last = value
        states = new_states
    return torch.stack(outputs, dim=1), outputs[0 if reverse else -1], states
