"""The state that a layer keeps between calls: setting, reading, resetting and saving it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellstack.cells.errors import ShapeError, as_nested
from cellstack.cells.spec import STATES
from cellstack.layers import foreign
from cellstack.layers.base import Layer, as_input, recomputing, training_tensors
from cellstack.layers.cell_base import Cell
from cellstack.layers.foreign import as_parts, cell_name, like_size, state_counts

_STATES = tuple(STATES.values())
_NAMES = list(dict.fromkeys(name for state in _STATES for name in state._fields))  # in the order of the states


class StatefulLayer(Layer):
    """A layer with `states`, the initial states of the next call: one per cell, for ours a `State` or `HiddenState`.

    A stateful layer keeps the final states of the last call, detached from its graph, and saves them in the
    `state_dict` (`states.0.h`, `states.0.c`, …; plain tensors). In any other layer, `states` apply to one call.
    """

    stateful: bool

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._states: list[Any] | None = None
        self._set_once = False  # whether the last call used `states` that applied only to it

    @property
    def cells(self) -> Sequence[Any]:
        """The cells, bottom first."""
        raise NotImplementedError

    @property
    def stacked(self) -> bool:
        """Whether the layer has a stack, with one state per cell."""
        raise NotImplementedError

    def _reference(self) -> Tensor:
        raise NotImplementedError

    @property
    def states(self) -> Any:
        """Initial state of the next call, for a stack one per cell; None for the cells' initial state.

        `State(h, c)` for an LSTM, `HiddenState(h)` for our other cells. The cells' initial state is zeros, or learned
        with `learn_initial_state`.

        Raises (when set):
            ShapeError: a wrong number of arrays, rank or width.
            TypeError: a wrong dtype.
        """
        if self._states is None:
            return None
        return tuple(self._states) if self.stacked else self._states[0]

    @states.setter
    def states(self, value: Any) -> None:
        # A copy, so that later changes of the caller's tensors don't change the layer's state.
        self._states = None if value is None else _copied(self.cells, self._as_states(value, None))

    def __getstate__(self) -> dict[str, Any]:
        # For copy and pickle, which don't support tensors with a graph.
        states = self._states
        if states is not None:
            states = [
                like_size(cell, [part if part.is_leaf else part.detach() for part in as_parts(state)])
                for cell, state in zip(self.cells, states, strict=True)
            ]
        return {**self.__dict__, "_states": states}

    def public_states(self, states: list[Any]) -> tuple[Any, ...]:
        """Return states in the form that a call returns: one per cell for a stack, else h, c."""
        return tuple(states) if self.stacked else as_parts(states[0])

    @property
    def state_count(self) -> int:
        """Number of states that a call returns."""
        if self.stacked:
            return len(self.cells)
        size = self.cells[0].state_size
        return 1 if isinstance(size, int) else len(size)

    def reset_states(self, states: Any = None, indices: Any = None) -> None:
        """Reset the state, or replace it.

        Args:
            states: initial states of the next call; None: the cells' initial state, for any batch size.
            indices: rows of the batch to reset, as integers or a bool mask `[B]`; the others keep their state. `states`
                then has one row per index.

        Raises:
            ShapeError: a wrong shape, or `indices` for a layer without a state.
            TypeError: `indices` are neither integers nor bools.
            IndexError: an index out of range.
        """
        if indices is None:
            self.states = states
            return
        if self._states is None:
            raise ShapeError(f"{self._owner}: indices need a state, but the layer has none yet")
        batch = as_parts(self._states[0])[0].shape[0]
        rows = torch.as_tensor(indices)
        if rows.dtype == torch.bool:
            if tuple(rows.shape) != (batch,):
                raise ShapeError(f"{self._owner}: expected indices as a bool mask [B={batch}], got {tuple(rows.shape)}")
            rows = rows.nonzero()
        elif rows.numel() and (rows.is_floating_point() or rows.is_complex()):
            raise TypeError(f"{self._owner}: expected indices to be integers or a bool mask, got {rows.dtype}")
        rows = rows.to(torch.int64).reshape(-1)
        if rows.numel() and not (-batch <= int(rows.min()) and int(rows.max()) < batch):
            raise IndexError(f"{self._owner}: expected indices within the batch of {batch}, got {rows.tolist()}")
        if states is None:
            new = [foreign.initial_state(cell, rows.numel(), self._reference()) for cell in self.cells]
        else:
            new = self._as_states(states, rows.numel())
        changed = []
        for cell, old, values in zip(self.cells, self._states, new, strict=True):
            parts = [part.clone() for part in as_parts(old)]
            for part, value in zip(parts, as_parts(values), strict=True):
                part[rows.to(part.device)] = value
            changed.append(like_size(cell, parts))
        self._states = changed

    def reset_state(self) -> None:
        """Reset the state: `reset_states()` under Keras 3's name."""
        self.reset_states()

    def _as_states(self, value: Any, batch: int | None) -> list[Any]:
        """Return states in any accepted form as one entry per cell, checked against the cells and `batch`."""
        if not hasattr(value, "__len__"):
            raise TypeError(f"{self._owner}: expected a state of tensors or arrays, got {type(value).__name__}")
        if self.stacked:
            self._refuse_torch_order(value)
        if not self.stacked:
            if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple)):
                value = value[0] if _rank(value[0]) > 2 else value  # a list of one state, as for a stack
            entries = [value]
        else:  # a stack of one cell also accepts its state without a list
            alone = len(self.cells) == 1 and isinstance(value, _STATES)
            entries = [value] if alone else as_nested(self._owner, "the state", value, state_counts(self.cells))
        states = []
        for n, (cell, entry) in enumerate(zip(self.cells, entries, strict=True)):
            layer = n if self.stacked else None
            if isinstance(cell, Cell):
                state = cell.as_state(self._owner, entry, batch, layer)
            else:
                state = self._foreign_state(cell, entry, batch)
            states.append(state)
            batch = as_parts(state)[0].shape[0]
        return states

    def _refuse_torch_order(self, value: Any) -> None:
        """Refuse two arrays of two rows of states for a stack of two cells: torch's (h, c), or a pair for each cell."""
        if len(self.cells) != 2 or not isinstance(value, (list, tuple)) or len(value) != 2:
            return
        if all(getattr(one, "ndim", 0) == 3 for one in value):
            raise ShapeError(
                f"{self._owner}: two arrays {list(value[0].shape)} may be h and c of all layers, as in PyTorch, or the "
                "states of two layers: pass [(h[0], c[0]), (h[1], c[1])]"
            )

    def _foreign_state(self, cell: Any, entry: Any, batch: int | None) -> Any:
        sizes = [cell.state_size] if isinstance(cell.state_size, int) else list(cell.state_size)
        parts = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        tensors = [as_input(self._owner, "state", part, self._reference()) for part in parts]
        state = like_size(cell, tensors)
        for size, tensor in zip(sizes, tensors, strict=True):
            rows = tensor.shape[0] if batch is None and tensor.ndim else batch
            if isinstance(size, int) and tuple(tensor.shape) != (rows, size):
                came = tuple(tensor.shape)
                raise ShapeError(f"{self._owner}: expected a state of {cell_name(cell)} [B={rows}, {size}], got {came}")
        return state

    def _start(self, initial_state: Any, batch: int) -> list[Any] | None:
        """Return the initial states of this call, one entry per cell; None for the cells' initial state."""
        if initial_state is not None:
            states = self._as_states(initial_state, batch)
        else:
            states = self._states
            if (self.stateful or self._set_once) and recomputing():
                raise RuntimeError(
                    f"{self._owner}: `states` aren't supported under torch.utils.checkpoint, as they have changed when "
                    "the second pass runs: pass initial_state="
                )
            once = not self.stateful and states is not None
            if once != self._set_once:  # torch.export refuses other assignments
                self._set_once = once
            if states is not None and as_parts(states[0])[0].shape[0] != batch:
                kept = as_parts(states[0])[0].shape[0]
                raise ShapeError(
                    f"{self._owner}: expected a batch of {kept}, as in the layer's state, got {batch}: "
                    f"reset_states() resets the state"
                )
        if not self.stateful and self._states is not None:
            self._states = None
        return states

    def _keep(self, states: list[Any]) -> None:
        with training_tensors():
            detached = [
                like_size(cell, [part.detach() for part in as_parts(state)])
                for cell, state in zip(self.cells, states, strict=True)
            ]
            self._states = _copied(self.cells, detached)  # the caller may write to the results

    def _apply(self, fn: Any, recurse: bool = True) -> StatefulLayer:
        super()._apply(fn, recurse)
        if self._states is not None:
            self._states = [
                like_size(cell, [fn(part) for part in as_parts(state)])
                for cell, state in zip(self.cells, self._states, strict=True)
            ]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stateful and self._states is not None:
            for n, state in enumerate(self._states):
                for k, part in enumerate(as_parts(state)):
                    destination[f"{prefix}states.{n}.{self._key(state, k)}"] = part if keep_vars else part.detach()

    @staticmethod
    def _key(state: Any, k: int) -> str:
        return state._fields[k] if isinstance(state, _STATES) else str(k)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.stateful:
            # If the state dict has no state, the layer has none afterwards either.
            found: list[list[Tensor]] = [[] for _ in self.cells]
            for n in range(len(self.cells)):
                for key in (*_NAMES, *map(str, range(16))):
                    part = state_dict.pop(f"{prefix}states.{n}.{key}", None)
                    if part is not None:
                        found[n].append(part.to(self._reference()).clone())
            try:
                self.states = (found if self.stacked else found[0]) if all(found) else None
            except ShapeError as error:
                args[-1].append(str(error))  # error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _rank(value: Any) -> int:
    """Return the nesting depth of `value`: the rank of an array, plus one for each list around it."""
    if isinstance(value, (list, tuple)):
        return 1 + _rank(value[0]) if value else 1
    return getattr(value, "ndim", 0)


def _copied(cells: Sequence[Any], states: Sequence[Any]) -> list[Any]:
    return [
        like_size(cell, [part.clone() for part in as_parts(state)]) for cell, state in zip(cells, states, strict=True)
    ]
