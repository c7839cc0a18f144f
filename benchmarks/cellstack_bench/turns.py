"""Timing of calls in turn, each alone on the machine as far as this process can ensure it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Seconds between checks whether threads still spin, and the maximum wait. The system updates the CPU time of a thread
# on another processor at its ticks, up to 10 ms apart: a shorter interval may miss a spinning thread.
LOOK, PATIENCE = 0.011, 0.5
MOST_BEFORE = 10  # maximum calls per turn, where something else precedes each
IDLE = 0.1  # share of a processor: below it, no thread spins


def rest() -> bool:
    """Wait until no thread of this process computes or spins.

    Thread pools spin for some time after a call, to catch the next one, and would occupy another engine's core.

    Returns:
        whether they stopped within half a second.
    """
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(LOOK)
        if time.process_time() - used < IDLE * (time.perf_counter() - wall):
            return True
    return False


def timed(
    run: Callable[[], Any],
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] | None = None,
) -> float:
    """Return the mean seconds of `count` calls; `before`, which precedes each, isn't timed."""
    if before is None:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls
    seconds = 0.0
    for _ in range(calls):
        before()
        start = clock()
        run()
        seconds += clock() - start
    return seconds / calls


def alternate(
    runs: Mapping[Any, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 0.0,
    before: Callable[[], Any] | None = None,
) -> dict[Any, tuple[float, float]]:
    """Time each of `runs` once per round, in turn, so that a drift of the machine's speed affects all of them.

    Before each turn, all threads come to rest; then one untimed call wakes the run's own threads.

    Args:
        runs: the functions to time, by name.
        rounds: the number of turns of each.
        clock: the clock.
        seconds: the minimum duration of a turn, whose result is the mean of its calls. 0 = one call.
        before: called before each timed call, untimed.

    Returns:
        the minimum and the median of each run's rounds, in milliseconds.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rest()
            once = timed(run, 1)
            calls = max(1, min(10_000 if before is None else MOST_BEFORE, int(seconds / max(once, 1e-7))))
            times[name].append(timed(run, calls, clock, before))
    return {name: (min(taken) * 1e3, float(np.median(taken)) * 1e3) for name, taken in times.items()}


def apart(processors: set[int]) -> list[int]:
    """Return processors ordered so that those sharing a core come last, if the system reports which do."""
    seen: dict[str, int] = {}

    def order(number: int) -> tuple[int, int]:
        place = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        core = place.read_text() if place.exists() else str(number)
        seen[core] = seen.get(core, 0) + 1
        return seen[core], number

    return sorted(sorted(processors), key=order)


@contextmanager
def kept_on(threads: int) -> Iterator[None]:
    """Pin this thread, and threads started meanwhile, to as many processors, if the system supports it."""
    if not hasattr(os, "sched_setaffinity") or threads >= len(before := os.sched_getaffinity(0)):
        yield
        return
    os.sched_setaffinity(0, apart(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
