"""How many calls of Keras's recurrent layers our op has served, and why others were left to Keras."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

_served = 0
_left: Counter[str] = Counter()


class Calls(NamedTuple):
    """What became of the calls of accelerated layers since the process started, or since `calls(reset=True)`."""

    served: int  # by our op
    left: dict[str, int]  # to Keras, by why


def calls(reset: bool = False) -> Calls:
    """Return how many calls of accelerated Keras layers our op has served, and how many were left to Keras.

    Args:
        reset: count from zero from here on.

    Returns:
        `Calls(served, left)`: a number, and a number for each reason why calls were left.

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
    """Count a call: as served, where there is no reason against it."""
    global _served
    if why_not:
        _left[why_not] += 1
    else:
        _served += 1
