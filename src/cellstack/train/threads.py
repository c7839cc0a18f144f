"""The fastest number of threads for a training step, measured at the start of a fit on its own batches.

Threads synchronise in every operation. That makes a small model slower, and much slower on a busy machine, because
waiting threads spin on cores that others need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WORTH = 1.15  # more threads must be faster by this factor, as they change the order of sums and occupy more cores
LONG = 3.0  # measure only if the rest of the fit takes at least so many seconds on one thread
ROUNDS, AT_MOST = 5, 1.0  # rounds of measuring, and the seconds after which no further one starts


@contextmanager
def restored() -> Iterator[None]:
    """Restore torch's number of threads at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def fastest(steps: list[Callable[[], None]], left: int) -> dict[int, float]:
    """Set torch's number of threads, and with it the kernel's, to the faster of one and all.

    Args:
        steps: functions that run the forward and backward pass of one batch, without side effects.
        left: number of steps that the fit still has to run.

    Returns:
        The seconds of a step by the number of threads, the fastest of several rounds; only that of one thread if the
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
    """Return the mean duration of a step, in seconds."""
    started = time.perf_counter()
    for step in steps:
        step()
    return (time.perf_counter() - started) / len(steps)
