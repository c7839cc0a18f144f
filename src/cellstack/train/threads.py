"""How many threads a step is fastest with: measured at the start of a fit, on its own batches.

A second thread costs a meeting point in every operation. A small model loses by it, and on a busy machine many times
over, as threads that wait for one another spin on cores that others need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WORTH = 1.15  # more threads have to be this much faster: they sum in another order, and take a core from others
LONG = 3.0  # seconds that the rest of a fit has to take on one thread, before it is worth measuring
ROUNDS, AT_MOST = 5, 1.0  # rounds of measuring, and the seconds after which no further one begins


@contextmanager
def kept() -> Iterator[None]:
    """Give torch's number of threads back as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def fastest(steps: list[Callable[[], None]], left: int) -> dict[int, float]:
    """Set torch's number of threads, and with it the kernel's, to what runs a step fastest: one, or all there are.

    Args:
        steps: each runs the passes of one batch, and leaves no trace.
        left: how many steps the fit has before it.

    Returns:
        The seconds of a step by the number of threads, the fastest of some rounds; that of one thread alone where the
        fit is too short to measure more.
    """
    most, started = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    _seconds(steps[:1])  # warms up
    took = {1: _seconds(steps)}
    if took[1] * left < LONG:
        return took
    for round_ in range(ROUNDS):
        for threads in (most, 1):
            torch.set_num_threads(threads)
            if not round_:
                _seconds(steps[:1])  # starts the threads
            took[threads] = min(_seconds(steps), took.get(threads, float("inf")))
        if time.perf_counter() - started > AT_MOST:
            break
    torch.set_num_threads(most if took[most] * WORTH < took[1] else 1)
    return took


def _seconds(steps: list[Callable[[], None]]) -> float:
    """Return the seconds that a step takes, on average."""
    started = time.perf_counter()
    for step in steps:
        step()
    return (time.perf_counter() - started) / len(steps)
