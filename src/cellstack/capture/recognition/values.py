"""Values with which a module is examined: copies with random numbers, tensors in nested values, differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstack.capture.copied import duplicate
from cellstack.formats.runtimes.differences import apart

TOLERANCE = 1e-9  # largest difference in float64, relative to the largest value


class NotReplaced(ValueError):  # noqa: N818
    """A module isn't replaced; the message says why.

    Args:
        text: the reason.
        differs: whether it was recognised, but its outputs or gradients differ from the kernel's.
    """

    def __init__(self, text: str, differs: bool = False) -> None:
        super().__init__(text)
        self.differs = differs


@contextmanager
def experiments() -> Iterator[None]:
    """Make float64 the default dtype, use one thread, hide warnings; restore all this and the random state at the end.

    Modules are run on random values within it, of which they may warn.
    """
    before, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)  # faster for small products
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a copy in float64 and evaluation mode."""
    made = duplicate(module).to("cpu", torch.float64)
    made.eval()  # the eval of some modules returns None
    return made


def fill(module: nn.Module, low: float, high: float, seed: int) -> dict[str, np.ndarray]:
    """Fill a module's parameters and buffers with random numbers, and return copies of them by name.

    Buffers are positive: there are variances among them.
    """
    random = np.random.default_rng(seed)
    values = {name: random.uniform(low, high, tuple(array.shape)) for name, array in module.named_parameters()}
    for name, array in module.named_buffers():
        if array.is_floating_point():
            values[name] = random.uniform(0.1, 1.0, tuple(array.shape))
    put(module, values)
    return values


def put(module: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Copy values to a module's parameters and buffers."""
    with torch.no_grad():
        for name, array in (*module.named_parameters(), *module.named_buffers()):
            if name in values:
                array.copy_(torch.from_numpy(np.asarray(values[name])))


def as_float64(args: Any) -> Any:
    """Return arguments with their floating-point tensors in float64."""
    return mapped(lambda x: x.detach().to("cpu", torch.float64) if x.is_floating_point() else x, args)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value in which `function` is applied to each tensor in nested tuples and lists."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(mapped(function, part) for part in value) if type(value) in (tuple, list) else value


def flat(value: Any) -> list[Tensor]:
    """Return the tensors of floating-point numbers in a value."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [found for part in value for found in flat(part)] if isinstance(value, (tuple, list)) else []


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and, up to rounding, the same values."""
    return one.shape == other.shape and difference(one, other) <= TOLERANCE


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, divided by the largest value of `other` or by 1; infinity if `one` isn't."""
    if not bool(torch.isfinite(one).all()):
        return float("inf")
    differences, largest = apart(one.detach(), other.detach())
    return float(differences.max(initial=0.0)) / max(largest, 1.0)
