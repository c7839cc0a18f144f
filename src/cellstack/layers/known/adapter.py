"""What each library's module declares for its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cellstack.layers.handwritten import HandWritten


class Adapter(NamedTuple):
    """How a class of another library runs on the kernel.

    Args:
        base: the class that overrides the method with the loop.
        describe: returns a module's cells in words; `ValueError` if the kernel doesn't support it as it is configured.
        examples: returns the arguments of some calls, with random values.
        growth: a factor of the tolerance, for a class whose results differ for another reason than rounding.
    """

    base: type[HandWritten]
    describe: Callable[[Any], str]
    examples: Callable[[Any], list[tuple[Any, ...]]]
    growth: float = 1.0
