"""Checks of user arguments and their conversion to arrays, before anything runs; only safe casts are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError, as_nested, check_mask, check_state
from cellstack.nodes.base import Array, CellState
from cellstack.nodes.values import Celled


def as_numbers(owner: str, name: str, value: Any) -> Array:
    """Return `value` as an array of bools, integers or floats; for the errors see `as_floats`."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{owner}: NumPy masked arrays aren't supported as {name}: pass a plain array and mask=")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"{owner}: expected {name} to be a rectangular array, got rows of unequal length") from error
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{owner}: expected {name} array-like, got {type(value).__name__}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: expected {name} to hold real numbers, got {array.dtype}")
    return array


def as_floats(owner: str, name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Return `value` as an array of `dtype`; bools, integers and floats of any width are cast.

    Args:
        owner: the function or class, for error messages.
        name: the argument's name, for error messages.
        value: array-like.
        dtype: float32 or float64.

    Returns:
        The array; `value` itself if it is already an array of this dtype.

    Raises:
        TypeError: complex numbers, objects, text, or masked arrays (the mask is a separate argument).
        ShapeError: rows of unequal length.
    """
    if type(value) is np.ndarray and value.dtype == dtype and value.dtype.isnative:
        return value
    array = as_numbers(owner, name, value)
    with np.errstate(over="ignore"):  # a float64 above the range of float32 becomes inf
        return array.astype(dtype, copy=False)


def as_mask(owner: str, mask: Any, lengths: Any, batch: int, steps: int) -> NDArray[np.bool_] | None:
    """Return `mask`, or `lengths` as a mask, `[B, T]`; None if both are None."""
    if lengths is not None:
        if mask is not None:
            raise TypeError(f"{owner}: expected mask or lengths, got both")
        array = np.asarray(lengths)
        if array.shape != (batch,):
            raise ShapeError(f"{owner}: expected lengths [B={batch}], got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{owner}: expected lengths to be integers, got {array.dtype}")
        if ((array < 0) | (array > steps)).any():
            raise ShapeError(f"{owner}: expected lengths from 0 to T={steps}, got {array.min()} to {array.max()}")
        return np.arange(steps) < array[:, None]
    return as_flags(owner, "mask", mask, batch, steps, "use the step")


def as_flags(owner: str, name: str, flags: Any, batch: int, steps: int, true: str) -> NDArray[np.bool_] | None:
    """Return per-step flags as an array `[B, T]`, or None; `true` is the meaning of True, for error messages."""
    if flags is None:
        return None
    try:
        array = np.asarray(flags)
    except ValueError as error:
        raise ShapeError(f"{owner}: expected {name} [B={batch}, T={steps}], got rows of unequal length") from error
    check_mask(owner, array.shape, batch, steps, name)
    if array.size and array.dtype != bool:
        raise TypeError(f"{owner}: expected {name} of bool, True = {true}, got {array.dtype}: give {name} != 0")
    return array.astype(bool)


class OwnState(tuple[Any, ...]):
    """A state that a network computed. Its numbers aren't checked: NaN in an input, or patches, may have led to numbers
    that a caller can't give."""


def as_states(
    owner: str, state: Any, cells: Sequence[Celled], batch: int, sources: Sequence[str] = ()
) -> tuple[CellState | None, ...]:
    """Return one state per cell and memory, contiguous and of its dtype; None where the state isn't given.

    The state of a cell without c may be `HiddenState(h)`, a sequence of one h, or h itself. The state of a network with
    one cell may be given without the outer tuple, and that of several cells as a flat list of arrays.

    Args:
        owner: the function or class, for error messages.
        state: a state or None per cell; None: no states. The numbers of an `OwnState` aren't checked.
        cells: the cells and memories in the order of their states, `Network.stateful`.
        batch: the number of rows.
        sources: for each cell, or for the first ones, which values of the network it starts from, for error messages;
            "" if none. The state of such a cell can't be given.

    Raises:
        ShapeError: the number or the shapes of the states are wrong.
        ValueError: numbers that the state can't have: see `Kind.refuses`; NaN or infinity in the state of a memory.
    """
    if state is None:
        return (None,) * len(cells)
    given = (state,) if len(cells) == 1 and _of_one_cell(state, cells[0]) else state
    if not isinstance(given, Sequence):
        raise ShapeError(f"{owner}: expected state as one state per cell ({len(cells)}), got {type(given).__name__}")
    given = as_nested(owner, "state", given, [len(cell.state_shapes) for cell in cells])
    states = []
    for layer, (cell, parts) in enumerate(zip(cells, given, strict=True)):
        shapes, where = cell.state_shapes, f"state of layer {layer}"
        if parts is None:
            states.append(None)
            continue
        if layer < len(sources) and sources[layer]:
            raise ShapeError(f"{owner}: expected None as the {where}, because {sources[layer]}, got a state")
        if not isinstance(parts, Sequence) and not _is_array(parts):
            raise ShapeError(f"{owner}: expected {where} to be arrays {', '.join(shapes)}, got {type(parts).__name__}")
        parts = (parts,) if _is_array(parts) else parts
        arrays = [as_floats(owner, where, array, cell.dtype) for array in parts]
        check_state(owner, [array.shape for array in arrays], batch, shapes, layer)
        plain = [np.require(array, requirements=("C", "A")) for array in arrays]
        own = isinstance(state, OwnState)
        states.append(cell.state_type(*plain) if own else cell.as_state(f"{owner}: {where}", plain))
    return tuple(states)


def _of_one_cell(state: Any, cell: Celled) -> bool:
    """Whether `state` is the state of the one cell itself (an array, or h and c), without an outer tuple."""
    if hasattr(state, "_fields") or _is_array(state):
        return True
    alone = isinstance(state, Sequence) and len(state) == len(cell.state_shapes) > 1
    return alone and all(map(_is_array, state))


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def as_own(answers: Sequence[Array], given: Sequence[Array]) -> Any:
    """Return contiguous arrays that the caller owns: copied if they share memory with each other or with `given`.

    Args:
        answers: at least one.
        given: the caller's arrays.

    Returns:
        The array if there is only one, else a tuple of them.
    """
    owned: list[Array] = []
    for answer in answers:
        y = np.ascontiguousarray(answer)
        if min(y.strides, default=0) < 0:  # an axis of length 1 may have such a stride: torch.from_numpy refuses it
            y = y.copy()
        if y.base is not None or any(y is other for other in (*given, *owned)) or len(answers) > 1:
            y = y.copy() if any(np.may_share_memory(y, other) for other in (*given, *owned)) else y
        owned.append(y)
    return owned[0] if len(owned) == 1 else tuple(owned)
