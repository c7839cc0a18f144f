"""The loudness of many audio streams at once, measured as pipecat measures the volume of one.

pipecat filters the last 0.4 s anew at every step. Here each sample is filtered once, and what the filter's state at the
start of these 0.4 s adds to the measured energy is subtracted.

Ref: ITU-R BS.1770, "Algorithms to measure audio programme loudness and true-peak audio level"
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

WINDOWS = 13  # of 32 ms: 0.4 s are the last 12 and the second half of the one before
FORGOTTEN = 5  # windows after which the filter's earlier state adds less than 1e-10 of its energy
BLOCK = 32  # samples that are filtered in one product

Floats = NDArray[np.float64]


class Loudness:
    """The volume of streams, each in a slot, over their last 0.4 s.

    Args:
        rate: of the samples, Hz.
        size: samples of a window: 32 ms.
        capacity: the number of slots. Memory is allocated when a slot is first used.
    """

    def __init__(self, rate: int, size: int, capacity: int) -> None:
        half = size // 2
        b, a = weighting(rate)
        step = np.eye(4, k=1)  # of the state: s' = step s + enter x, y = b[0] x + s[0]
        step[:, 0] = -a[1:]
        enter = b[1:] - a[1:] * b[0]
        powers = [np.eye(4)]
        for _ in range(size):
            powers.append(powers[-1] @ step)
        seen = np.array([power[0] for power in powers])  # [size + 1, 4]: what a state adds to the n-th output after it
        # A block's outputs, and what it adds to the state after it.
        self._filter = np.zeros((BLOCK, BLOCK + 4))
        for n in range(BLOCK):
            self._filter[n, n] = b[0]
            self._filter[n, n + 1 : BLOCK] = seen[: BLOCK - n - 1] @ enter
            self._filter[n, BLOCK:] = powers[BLOCK - n - 1] @ enter
        self._seen_in_block = seen[:BLOCK].T  # [4, BLOCK]
        # The state before each block and after the last one, from the first state and from what each block adds.
        blocks = size // BLOCK
        self._states = np.zeros((1 + blocks, 4, 1 + blocks, 4))
        for source in range(1 + blocks):
            for target in range(source, 1 + blocks):
                self._states[source, :, target] = powers[BLOCK * (target - source)].T
        self._states = self._states.reshape(4 * (1 + blocks), -1)
        self._seen_in_half = seen[:half]  # [half, 4]
        # The state at the start of the 0.4 s, as it would be at the start of each following half without input.
        halves = [np.linalg.matrix_power(powers[half], n) for n in range(2 * FORGOTTEN - 1)]
        self._later = np.concatenate([power.T for power in halves], axis=1)  # [4, 4 · halves]
        outputs = np.concatenate([self._seen_in_half @ power for power in halves])
        self._alone = outputs.T @ outputs  # [4, 4]: the energy of the outputs without input, as a quadratic form
        self._half, self._count = half, round(0.4 * rate)
        self._unused = list(range(capacity - 1, -1, -1))
        self._next = np.zeros((capacity, 4))  # the filter's state
        self._windows = np.zeros(capacity, np.int64)
        # Of the halves of the last windows: the energy, the state before, and the products of outputs with `seen`.
        self._energy = np.zeros((capacity, WINDOWS, 2))
        self._before = np.zeros((capacity, WINDOWS, 4))  # of second halves only
        self._products = np.zeros((capacity, WINDOWS, 2, 4))

    def open(self) -> int:
        """Return the slot of a new stream.

        Raises:
            IndexError: all slots are in use.
        """
        slot = self._unused.pop()
        self._windows[slot] = 0
        self._next[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Free a slot."""
        self._unused.append(slot)

    def measure(self, slots: NDArray[np.int64], x: Floats) -> Floats:
        """Add a window to each of some streams and return their volumes.

        Args:
            slots: `[n]`, different ones.
            x: `[n, size]` samples between -1 and 1.

        Returns:
            `[n]`, between 0 and 1; 0 until 0.4 s were added.
        """
        n, size = x.shape
        filtered = x.reshape(-1, BLOCK) @ self._filter
        added = filtered[:, BLOCK:].reshape(n, -1)
        states = (np.concatenate([self._next[slots], added], axis=1) @ self._states).reshape(n, -1, 4)
        y = filtered[:, :BLOCK] + states[:, :-1].reshape(-1, 4) @ self._seen_in_block
        y = y.reshape(n, 2, self._half)
        end = states[:, -1]
        end[np.abs(end) < 1e-30] = 0  # denormal numbers, of long silence, are slow
        self._next[slots] = end

        place = self._windows[slots] % WINDOWS
        self._windows[slots] += 1
        self._energy[slots, place] = np.einsum("nht,nht->nh", y, y)
        self._before[slots, place] = states[:, size // BLOCK // 2]
        self._products[slots, place] = y @ self._seen_in_half
        oldest = (place + 1) % WINDOWS
        energy = self._energy[slots].sum(axis=(1, 2)) - self._energy[slots, oldest, 0]
        start = self._before[slots, oldest]  # which the outputs contain, and which a measurement of 0.4 s alone doesn't
        places = (oldest[:, None] + np.arange(FORGOTTEN)) % WINDOWS
        products = self._products[slots[:, None], places].reshape(n, -1)[:, 4:]
        energy -= 2 * np.einsum("ni,ni->n", start @ self._later, products)
        energy += np.einsum("ni,ni->n", start @ self._alone, start)
        with np.errstate(divide="ignore"):
            level = 10 * np.log10(np.maximum(energy, 0) / self._count) - 0.691
        # The original counts levels in steps of 0.1, from -70, and reports the middle of a step.
        level = np.where(level < -70, -110, np.floor(10 * level) / 10 + 0.05)
        return np.where(self._windows[slots] < WINDOWS, 0.0, np.clip((level + 110) / 100, 0, 1))


def weighting(rate: int) -> tuple[Floats, Floats]:
    """Return the filter of BS.1770, a high shelf and a high pass, as the coefficients b and a of order 4."""
    k = math.tan(math.pi * 1681.974450955533 / rate)
    high = 10 ** (3.999843853973347 / 20)
    middle, damping = high**0.4996667741545416, k / 0.7071752369554196
    shelf = [high + middle * damping + k * k, 2 * (k * k - high), high - middle * damping + k * k]
    below = np.array([1 + damping + k * k, 2 * (k * k - 1), 1 - damping + k * k])
    k = math.tan(math.pi * 38.13547087602444 / rate)
    damping = k / 0.5003270373238773
    lowest = np.array([1 + damping + k * k, 2 * (k * k - 1), 1 - damping + k * k])
    return (
        np.convolve(np.array(shelf) / below[0], [1.0, -2.0, 1.0]),
        np.convolve(below / below[0], lowest / lowest[0]),
    )
