"""What a module does with an input, found by calling it: what prevents a network from doing the same."""

from __future__ import annotations

from typing import Any

from cellstack.formats.compiled.equality import Ends
from cellstack.formats.compiled.nested import fresh, like, tensors_in, wider
from cellstack.formats.compiled.sizes import Places, compared
from cellstack.formats.runtimes.in_memory import first_axes, watched
from cellstack.network import Network


def plain(module: Any) -> bool:
    """Return whether all parts of a module are PyTorch's classes or ours: no custom `forward` may permute axes."""
    return all(type(part).__module__.startswith(("torch.", "cellstack.")) for part in module.modules())


def time_first(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether the first axis of a module's input is the time of all its layers with `batch_first=False`.

    It isn't if `forward` permutes the axes before it calls the layers.
    """
    import torch

    first, *others = tensors_in(inputs)

    def lengths(x: Any) -> list[int]:
        """Return the length of the first axis of each layer's input, given the first input of the module."""
        with torch.no_grad(), first_axes(module) as seen:
            module(*fresh(like(inputs, [x, *others])))
        return [shape[0] for shape in seen]

    before = lengths(first)
    for axis in (0, 1) if before and first.ndim > 1 else ():
        try:
            after = lengths(wider(first, axis, 1))
        except Exception:  # the module accepts no other length of this axis
            after = []
        if after:
            return all((old != new) == (axis == 0) for old, new in zip(before, after, strict=False))
    return bool(before) and all(length == len(first) for length in before)


def reads_values(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a module reads values from its tensors, as `if` and `float()` do; sizes don't count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    read = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                read.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        module(*fresh(inputs))
    return bool(read)


def calls(module: Any, parts: list[Any], inputs: tuple[Any, ...]) -> int:
    """Return how often a call of a module calls one of `parts`, for the part that is called most often."""
    import torch

    counts = dict.fromkeys(map(id, parts), 0)

    def count(part: Any, _: Any) -> None:
        counts[id(part)] += 1

    with torch.no_grad(), watched(parts, count):
        module(*fresh(inputs))
    return max(counts.values(), default=0)


def calls_cells_repeatedly(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a call of a module calls a cell several times."""
    import torch

    return calls(module, [part for part in module.modules() if isinstance(part, torch.nn.RNNCellBase)], inputs) > 1


def compared_sizes(network: Network, module: Any, example: tuple[Any, ...]) -> Places:
    """Return where a module's code compares sizes of its input."""
    first = tensors_in(example)
    others = [given for _, given in Ends(network, len(first)).longer(first)]
    try:
        return compared(lambda given: module(*fresh(like(example, given))), first, others)
    except Exception as error:  # code may reject sizes that aren't plain integers
        return Places([], [], str(error))
