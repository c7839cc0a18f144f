"""The errors that name an argument or a file, and the checks that all parts share."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np

from cellstack.cells.base import Kind


class ShapeError(ValueError):
    """An argument has the wrong rank, width or batch: the message names it, the expected shape and the actual one."""


class FormatError(ValueError):
    """A file is malformed or unsupported: the message names the file, the tensor, and what was expected and found."""


def check_installed(owner: str, package: str, extra: str) -> None:
    """Raise `ModuleNotFoundError`, which names the extra of cellstack to install, unless a package is installed."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{owner} needs {package}: pip install 'cellstack[{extra}]'", name=package)


def as_flag(owner: str, name: str, value: Any) -> bool:
    """Return `value`, a Python or NumPy bool; `TypeError` for anything else, such as the truthy text "False"."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}: expected {name} to be True or False, got {value!r}")
    return bool(value)


def as_integer(owner: str, name: str, value: Any) -> int:
    """Return `value`, a Python or NumPy integer, as an int; `TypeError` for anything else, bools included."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{owner}: expected {name} to be an integer, got {value!r}")
    return operator.index(value)


def as_number(owner: str, name: str, value: Any) -> float:
    """Return `value`, a Python or NumPy number, as a float; `TypeError` for anything else, bools included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{owner}: expected {name} to be a number, got {value!r}")
    return float(value)


def check_sequence(owner: str, shape: tuple[int, ...], input_size: int | None, name: str = "x") -> None:
    """Raise `ShapeError` unless `shape` is `[B, T, I]` with `input_size` features (None: any number)."""
    expected = "I" if input_size is None else f"I={input_size}"
    if len(shape) != 3 or (input_size is not None and shape[2] != input_size):
        hint = "the last axis is the feature axis"
        if len(shape) == 2 and input_size in (None, shape[1]):
            hint = "add a batch axis: x[None]"
            if name == "sequences":
                hint += ", or set return_sequences=True in the layer below"
        elif len(shape) == 2 and input_size == 1:
            hint = "add a feature axis: x[..., None]"
        raise ShapeError(f"{owner}: expected {name} [B, T, {expected}], got {tuple(shape)}: {hint}")
    if shape[2] < 1:
        raise ShapeError(f"{owner}: expected {name} [B, T, {expected}] with at least one feature, got {tuple(shape)}")


def check_step(owner: str, shape: tuple[int, ...], input_size: int | None, name: str = "x") -> None:
    """Raise `ShapeError` unless `shape` is one step `[B, I]`."""
    expected = "I" if input_size is None else f"I={input_size}"
    if len(shape) != 2 or shape[1] < 1 or (input_size is not None and shape[1] != input_size):
        alone = len(shape) == 1 and input_size in (None, shape[0])
        hint = "add a batch axis: x[None]" if alone else "one step has no time axis"
        raise ShapeError(f"{owner}: expected {name} [B, {expected}], got {tuple(shape)}: {hint}")


def check_state(
    owner: str,
    shapes: list[tuple[int, ...]],
    batch: int,
    sizes: Mapping[str, int | tuple[int, ...]],
    layer: int | None = None,
) -> None:
    """Raise `ShapeError` unless `shapes` are the batch and the size, or the shape, of each array of the state."""
    where = "state" if layer is None else f"state of layer {layer}"
    if len(shapes) != len(sizes):
        names = ", ".join(sizes)
        expected = f"a pair ({names})" if len(sizes) == 2 else f"{len(sizes)} array(s), {names}"
        raise ShapeError(f"{owner}: expected {where} to be {expected}, got {len(shapes)} array(s)")
    for (name, size), shape in zip(sizes.items(), shapes, strict=True):
        own = (size,) if isinstance(size, int) else size
        if tuple(shape) != (batch, *own):
            axes = f"H={own[0]}" if len(own) == 1 else ", ".join(map(str, own))
            raise ShapeError(f"{owner}: expected {name} of {where} [B={batch}, {axes}], got {tuple(shape)}")


def check_state_numbers(where: str, kind: Kind, state: Sequence[Any]) -> None:
    """Raise `ValueError` if a kind of cell can't be in a state, arrays or tensors in the order of `Kind.state`."""
    problem = kind.refuses(dict(zip(kind.state._fields, state, strict=True)))
    if problem:
        raise ValueError(f"{where}: {problem}")


def as_nested(owner: str, name: str, value: Any, counts: Sequence[int]) -> list[Any]:
    """Return the states of a stack as one entry per cell, from that form or from a flat list of arrays.

    Args:
        owner: the function or class, for the message.
        name: the argument's name, for the message.
        value: one state per cell; or the arrays of all states, bottom first: h, c, h, c for two LSTM cells.
        counts: the number of arrays of each cell's state.

    Raises:
        ShapeError: neither.
    """
    given = list(value)
    as_list = isinstance(value, Sequence)  # not one array of all states, such as PyTorch's [layers, B, H]
    if as_list and len(given) == sum(counts) > len(counts) and all(hasattr(one, "ndim") for one in given):
        arrays = iter(given)
        return [tuple(islice(arrays, count)) for count in counts]
    if len(given) != len(counts):
        flat = f", or as a flat list of {sum(counts)} arrays" if sum(counts) > len(counts) else ""
        kinds = ", ".join(type(one).__name__ for one in given[:4])
        found = f"{len(given)} ({kinds})" if as_list and given else f"{type(value).__name__} of length {len(given)}"
        raise ShapeError(f"{owner}: expected {name} as one state per cell ({len(counts)}){flat}, got {found}")
    return given


def check_mask(owner: str, shape: tuple[int, ...], batch: int, steps: int, name: str = "mask") -> None:
    """Raise `ShapeError` unless `shape` is `[batch, steps]`."""
    if tuple(shape) != (batch, steps):
        raise ShapeError(f"{owner}: expected {name} [B={batch}, T={steps}], got {tuple(shape)}")
