"""What a module does with an input, found by calling it: what prevents a network from doing the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cellstack.capture.axes import Axes, longer
from cellstack.capture.copied import duplicate
from cellstack.capture.equality import Ends, GraphEnds
from cellstack.capture.nested import fresh
from cellstack.capture.sizes import OURS, Places, compared, line_of, outside, pytorch
from cellstack.formats.runtimes.in_memory import watched


def value_reads() -> Any:
    """Return a context whose `found` says whether code in it reads values of tensors, as `if` and `float()` do."""

    class Look(TorchDispatchMode):
        found = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found = self.found or func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    return Look()


def reads_values(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a module reads values from its tensors; sizes don't count."""
    with torch.no_grad(), value_reads() as reads:
        module(*fresh(inputs))
    return reads.found


def calls(module: Any, parts: list[Any], inputs: tuple[Any, ...]) -> int:
    """Return how often a call of a module calls one of `parts`, for the part that is called most often."""
    counts = dict.fromkeys(map(id, parts), 0)

    def count(part: Any, _: Any) -> None:
        counts[id(part)] += 1

    with torch.no_grad(), watched(parts, count):
        module(*fresh(inputs))
    return max(counts.values(), default=0)


def calls_cells_repeatedly(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a call of a module calls a cell several times."""
    return calls(module, [part for part in module.modules() if isinstance(part, torch.nn.RNNCellBase)], inputs) > 1


def steps_repeated(module: Any, inputs: tuple[Any, ...], axes: Sequence[Axes]) -> bool:
    """Return whether a module calls more of PyTorch's functions for longer inputs, as a loop over the steps does."""
    counts = list[int]()

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[-1] += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), suppress(Exception):  # it may refuse all axes longer at once
        for given in (inputs, longer(inputs, axes)):
            counts.append(0)
            with Count():
                duplicate(module)(*fresh(given))
    return len(counts) == 2 and counts[1] > counts[0]


def compared_sizes(ends: Ends | GraphEnds, module: Any, example: tuple[Any, ...]) -> Places:
    """Return where a module's code depends on sizes of its input."""
    first, module = list(example), duplicate(module)  # whose attributes may keep sizes
    others = [size.given for size in ends.longer(first)]
    try:
        return compared(lambda given: module(*fresh(given)), first, others)
    except Exception as error:  # code may reject sizes that aren't plain integers
        return Places([], [], str(error))


def line_of_call(module: Any, inputs: tuple[Any, ...], name: str) -> str:
    """Return the line in which a module first calls a function of PyTorch, as `file.py:12`; "" if it doesn't."""
    found: list[str] = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "").replace("_", "") == name.replace("_", "") and not found:
                found.append(line_of(outside(sys._getframe(1), pytorch(), OURS)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        module(*fresh(inputs))
    return found[0] if found else ""
