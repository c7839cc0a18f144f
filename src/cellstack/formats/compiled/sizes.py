"""Finds where a module's code compares sizes of tensors: a graph only contains what it did for the example's sizes."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod")
OURS = str(Path(__file__).absolute().parents[2])


class Places(NamedTuple):
    """Where a module's code uses sizes, each as `file.py:12`: where it compares them, and where it calls `len`.

    `failed` says why these places can't be found; "" if they can.
    """

    compared: list[str]
    measured: list[str]
    failed: str = ""


def compared(run: Callable[[Any], Any], example: Any, others: Iterable[Any]) -> Places:
    """Return where code compares sizes that change with the size of the input, and where it takes `len` of a tensor.

    Comparisons in PyTorch's code and in ours don't count. Neither do those of sizes that never change, such as the
    number of features, nor of two sizes that are always equal. What `len`, `int` and `float` return is a plain number,
    whose comparisons can't be recorded.

    Args:
        run: calls the module.
        example: the input that it was exported with.
        others: inputs of other sizes; those that the module rejects are skipped.
    """
    measured: list[str] = []
    runs = [_comparisons(run, example, measured)]
    for other in others:
        with suppress(Exception):  # the module rejects this size
            runs.append(_comparisons(run, other, measured))
    found = []
    for place in dict.fromkeys(place for seen in runs for place in seen):
        seen = [one[place] for one in runs if place in one]
        checked = all(size == other for pairs in seen for size, other in pairs)
        if not checked and any(pairs != seen[0] for pairs in seen):
            found.append(place)
    return Places(found, list(dict.fromkeys(measured)))


def pytorch() -> str:
    """Return the folder of PyTorch's code."""
    import torch

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


def _comparisons(run: Callable[[Any], Any], inputs: Any, measured: list[str]) -> dict[str, set[tuple[int, int | None]]]:
    """Run a module, and return the sizes that its code compares, by place: each with the size it is compared with.

    The places where it calls `len` are added to `measured`.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    seen: dict[str, set[tuple[int, int | None]]] = defaultdict(set)

    class Size(int):
        """The length of an axis, or a number computed from it. Its comparisons are recorded."""

        __hash__ = int.__hash__

        def __bool__(self) -> bool:
            record(self, 0, sys._getframe(1))
            return int(self) != 0

        def __neg__(self) -> Size:
            return Size(-int(self))

    def record(size: Size, other: Any, frame: FrameType) -> None:
        if line := line_of(frame):
            seen[line].add((int(size), int(other) if isinstance(other, Size) else None))

    def comparison(name: str) -> Callable[[Size, Any], Any]:
        plain = getattr(int, f"__{name}__")

        def compare(self: Size, other: Any) -> Any:
            record(self, other, sys._getframe(1))
            return plain(int(self), int(other) if isinstance(other, Size) else other)

        return compare

    def arithmetic(name: str) -> Callable[[Size, Any], Any]:
        plain = getattr(int, name)

        def compute(self: Size, other: Any) -> Any:
            value: Any = plain(int(self), int(other) if isinstance(other, Size) else other)
            return value if value is NotImplemented else Size(value)

        return compute

    for name in COMPARISONS:
        setattr(Size, f"__{name}__", comparison(name))
    for name in ARITHMETIC:
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(Size, method, arithmetic(method))

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made, frame = func(*args, **(kwargs or {})), sys._getframe(1)
            if isinstance(made, torch.Size) and line_of(frame):
                return torch.Size([Size(size) for size in made])
            if func is torch.Tensor.size and type(made) is int and line_of(frame):
                return Size(made)
            if func is torch.Tensor.__len__ and (line := line_of(outside(frame, pytorch()))):
                measured.append(line)
            return made

    with torch.no_grad(), Watch():
        run(inputs)
    return seen
