"""Finds where a module's code depends on sizes: a graph only contains what it did for the example's sizes."""

from __future__ import annotations

import builtins
import math
import operator
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.jit import ScriptFunction
from torch.overrides import TorchFunctionMode

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
ALONE = {"neg": operator.neg, "abs": abs, "ceil": math.ceil, "floor": math.floor, "round": round, "trunc": math.trunc}
MEASURES = ("__get__", "size", "stride", "numel")  # functions of tensors that return sizes; shape and nbytes are got
OURS = str(Path(__file__).absolute().parents[1])


class Places(NamedTuple):
    """Where a module's code depends on sizes, each as `file.py:12`.

    Attributes:
        compared: where it compares sizes.
        converted: where it turns them into plain numbers, as `int`, `range` and the index of a list do.
        failed: why these places can't be found; "" if they can.
    """

    compared: list[str]
    converted: list[str]
    failed: str = ""


def unscripted() -> Any:
    """Return a context in which functions of `torch.jit.script` run as the Python functions they were made from."""
    return mock.patch.object(ScriptFunction, "__call__", _run_source)


def _run_source(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function._torchdynamo_inline(*args, **kwargs)


class Renamed:
    """Functions that take the place of Python's of the same names, in files of the module's code.

    Python asks an object for its conversion to a number, but not for whom, and `len` and `int` must return an int.
    """

    def __init__(self, functions: dict[str, Any]) -> None:
        self.functions, self.files = functions, list[dict[str, Any]]()

    def at(self, frame: FrameType) -> None:
        """Replace the functions in the file of a frame, unless it is PyTorch's or ours."""
        if line_of(frame):
            self.within(frame.f_globals)

    def within(self, names: dict[str, Any]) -> None:
        """Replace the functions in a file with these global names, unless it has such names itself."""
        if self.functions.keys().isdisjoint(names):
            names.update(self.functions)
            self.files.append(names)

    def restore(self) -> None:
        """Give the files Python's functions back."""
        for names in self.files:
            for name in self.functions:
                names.pop(name, None)


# By "compared" or "converted" and the place: the size, what it is compared with, and the sizes that both follow from
Uses = dict[tuple[str, str], set[tuple[Any, Any, frozenset[float]]]]


def compared(run: Callable[[Any], Any], example: Any, others: Iterable[Any]) -> Places:
    """Return where code depends on sizes that change with the size of the input.

    Sizes are followed through arithmetic and into tensors, whose sizes the graph contains. Every other use counts:
    comparisons, and conversions to plain numbers, which can't be followed further. A `range` with steps of 1 that isn't
    empty doesn't count: the outputs for other sizes show whether the network contains the loop. Neither do uses in
    PyTorch's code and in ours, of sizes that never change, such as the number of features, and comparisons of two sizes
    that are always equal.

    Args:
        run: calls the module.
        example: the input that it was exported with.
        others: inputs of other sizes; those that the module rejects are skipped.
    """
    renamed = Renamed({})
    uses_in = _follow(renamed)
    try:
        uses_in(run, example)  # the first run finds the files with the module's code
        runs = [uses_in(run, example)]
        for other in others:
            with suppress(Exception):  # the module rejects this size
                runs.append(uses_in(run, other))
    finally:
        renamed.restore()
    found = Places([], [])
    for kind, place in dict.fromkeys(use for uses in runs for use in uses):
        seen = [uses[kind, place] for uses in runs if (kind, place) in uses]
        checked = all(size == other for pairs in seen for size, other, _ in pairs)
        if not checked and any(pairs != seen[0] for pairs in seen):
            getattr(found, kind).append(place)
    return found


def pytorch() -> str:
    """Return the folder of PyTorch's code."""
    return os.path.dirname(torch.__file__)


def outside(frame: FrameType, *paths: str) -> FrameType:
    """Return the innermost frame of a call stack whose code isn't in one of some folders or files."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(paths):
        frame = frame.f_back
    return frame


def line_of(frame: FrameType) -> str:
    """Return the line of a frame as `file.py:12`; "" for code of PyTorch and of cellstack."""
    path = frame.f_code.co_filename
    return "" if path.startswith((pytorch(), OURS)) else f"{os.path.basename(path)}:{frame.f_lineno}"


def _follow(renamed: Renamed) -> Callable[[Callable[[Any], Any], Any], Uses]:
    """Return a function that runs a module, and returns the sizes that its code uses, each with what it is compared to.

    Args:
        renamed: gets the functions that take the place of `len` and `range`; the caller restores these.
    """
    seen: Uses = defaultdict(set)
    thread = threading.get_ident()  # others may call the module's code meanwhile

    def record(kind: str, size: Size, frame: FrameType, other: Any = None) -> None:
        if line := line_of(frame):
            compared, sources = (other.number, other.sources) if isinstance(other, Size) else (None, frozenset())
            seen[kind, line].add((size.number, compared, size.sources | sources))

    class Size(torch.SymInt):
        """A size, or a number computed from sizes. It isn't an int, so that Python asks for each conversion to one."""

        def __init__(self, number: float, *computed_from: Any) -> None:
            self.number = number
            sources = [one.sources for one in computed_from if isinstance(one, Size)]
            self.sources: frozenset[float] = frozenset().union(*sources) if sources else frozenset((number,))

        def __repr__(self) -> str:
            return repr(self.number)

        def __format__(self, form: str) -> str:
            return format(self.number, form)

        def __hash__(self) -> int:  # a cache would keep a size as a key, and return what was computed from it
            raise TypeError(f"it uses a size as a key, as in n in {{1, 2}} ({line_of(sys._getframe(1))})")

    def plain(value: Any) -> Any:
        """Return a value, or nested values, with sizes as plain numbers."""
        if isinstance(value, Size):
            return value.number
        if type(value) in (tuple, list, torch.Size):
            return type(value)(map(plain, value))
        if isinstance(value, slice):
            return slice(plain(value.start), plain(value.stop), plain(value.step))
        return {key: plain(one) for key, one in value.items()} if type(value) is dict else value

    def comparison(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def compare(self: Size, other: Any) -> Any:
            record("compared", self, sys._getframe(1), other)
            return function(self.number, plain(other))

        return compare

    def truth(self: Size) -> bool:
        record("compared", self, sys._getframe(1), 0)
        return bool(self.number)

    def arithmetic(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Any, Any], Any]:
        def compute(self: Size, other: Any) -> Any:
            if not isinstance(other, (int, float, Size)):
                return NotImplemented
            pair = (plain(other), self.number) if swapped else (self.number, plain(other))
            return Size(function(*pair), self, other)

        return compute

    def conversion(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def convert(self: Size) -> Any:
            record("converted", self, sys._getframe(1))
            return function(self.number)

        return convert

    for name in COMPARISONS:
        setattr(Size, f"__{name}__", comparison(getattr(operator, name)))
    for name in ARITHMETIC:
        for swapped in (False, True):
            setattr(Size, f"__{'r' * swapped}{name}__", arithmetic(getattr(operator, name), swapped))
    for name, function in ALONE.items():
        setattr(Size, f"__{name}__", lambda self, *args, function=function: Size(function(self.number, *args), self))
    for name, function in (("index", operator.index), ("int", int), ("float", float), ("complex", complex)):
        setattr(Size, f"__{name}__", conversion(function))
    Size.__bool__ = truth

    def measured(value: Any) -> Any:
        tracked = isinstance(value, torch.Tensor) and value.ndim and threading.get_ident() == thread
        return Size(value.shape[0]) if tracked else builtins.len(value)

    def steps(*ends: Any) -> range:
        numbers = range(*map(plain, ends))
        if abs(numbers.step) > 1 or not numbers:
            for end in ends:
                if isinstance(end, Size):
                    record("converted", end, sys._getframe(1))
        return numbers

    renamed.functions.update(len=measured, range=steps)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*plain(args), **plain(kwargs or {}))
            frame, name = sys._getframe(1), getattr(func, "__name__", "")
            caller = outside(frame, pytorch())
            renamed.at(caller)
            if func is torch.Tensor.__len__:
                record("converted", Size(made), caller)
            if name not in MEASURES or not line_of(frame):
                return made
            if isinstance(made, tuple):
                return type(made)(map(Size, made))
            return Size(made) if type(made) is int else made

    def uses_in(run: Callable[[Any], Any], inputs: Any) -> Uses:
        seen.clear()
        with torch.no_grad(), Watch(), unscripted():
            run(inputs)
        return dict(seen)

    return uses_in
