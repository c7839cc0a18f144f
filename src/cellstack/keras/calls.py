"""Count the calls of Keras's recurrent layers that the kernel ran, and those that Keras ran, by reason."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

_served = 0
_left: Counter[str] = Counter()


class Calls(NamedTuple):
    """Numbers of calls of accelerated layers since the process started, or since `calls(reset=True)`."""

    served: int  # run by the kernel
    left: dict[str, int]  # run by Keras, by reason


def calls(reset: bool = False) -> Calls:
    """Return how many calls of accelerated Keras layers the kernel ran, and how many Keras ran.

    Args:
        reset: set the counts to zero afterwards.

    Returns:
        `Calls(served, left)`: the number of calls that the kernel ran, and those that Keras ran, by reason.

    >>> calls(reset=True) and calls()
    Calls(served=0, left={})
    """
    global _served
    found = Calls(_served, dict(_left))
    if reset:
        _served = 0
        _left.clear()
    return found


def count(why_not: str) -> None:
    """Count a call, under the reason why Keras ran it; "": the kernel ran it."""
    global _served
    if why_not:
        _left[why_not] += 1
    else:
        _served += 1
