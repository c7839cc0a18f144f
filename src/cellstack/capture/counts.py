"""Python's functions on sizes and counts, which stay symbols of the graph while `torch.export` records a module.

`int(lengths.max())` and `len(x)` would be the example's numbers, and `range(0, len(x), 10)` would fix the length and
not only the number of its entries. In the files of the module's code, these functions take the place of Python's.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from cellstack.capture.axes import is_count

SYMBOLS = (SymInt, SymFloat, SymBool)


def is_open(value: Any) -> bool:
    """Whether a value holds integers, such as lengths, for an open number of rows, which a list would fix."""
    return isinstance(value, Tensor) and value.ndim == 1 and is_count(value) and isinstance(value.shape[0], SymInt)


class _Conversion(type):
    """A type that stands for one of Python's, also in `isinstance`, but converts symbols by a function of its own."""

    def __call__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own, value = cls.__base__, args[0] if args else None
        if len(args) == 1 and own is not list and isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, SYMBOLS):
            return cls.symbolic(value)
        return value if own is list and is_open(value) else own(*args, **kwargs)

    def __eq__(cls: Any, other: Any) -> bool:  # in type(x) == list
        return other is cls or other is cls.__base__

    def __hash__(cls: Any) -> int:
        return hash(cls.__base__)

    def __instancecheck__(cls: Any, value: Any) -> bool:
        return isinstance(value, cls.__base__)

    def __subclasscheck__(cls: Any, other: Any) -> bool:
        return issubclass(other, cls.__base__)


class _Int(int, metaclass=_Conversion):
    symbolic = staticmethod(torch.sym_int)


class _Float(float, metaclass=_Conversion):
    symbolic = staticmethod(torch.sym_float)


class _List(list, metaclass=_Conversion):
    pass


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)


def _steps(*ends: Any) -> Any:
    if not any(isinstance(end, SymInt) for end in ends):
        return range(*ends)
    start, stop, step = (0, *ends, 1) if len(ends) == 1 else (*ends, 1)[:3]
    return [start + n * step for n in range(-((start - stop) // step))]


FUNCTIONS = {"int": _Int, "float": _Float, "list": _List, "len": _length, "range": _steps}
