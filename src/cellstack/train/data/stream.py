"""Examples from an iterable, for data larger than memory: a first pass measures them, and each epoch is another pass.

They are shuffled within a buffer: as many consecutive examples as fit into the buffer are read, grouped into batches of
similar lengths, and trained on in random order, before the next ones are read. Examples further apart in the source are
never in the same batch, so shuffle a source that is sorted by class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.data.frames import is_frame
from cellstack.train.data.lazy import is_dataset, parts
from cellstack.train.data.sequences import Sequences, checked
from cellstack.train.data.targets import as_targets, as_weights
from cellstack.train.examples import (
    GAP,
    VALIDATED,
    Batch,
    Digest,
    Examples,
    Inputs,
    augment,
    batches,
    batching,
    padded,
    standard_scale,
)

BUFFER = 4096


def is_stream(x: Any) -> bool:
    """Return whether x is an iterable or a function, and not an array, list, frame, file name or dataset."""
    if (
        hasattr(x, "shape")
        or isinstance(x, (list, tuple, dict, set, str, bytes, os.PathLike, Sequences))
        or is_frame(x)
    ):
        return False
    return not is_dataset(x) and (callable(x) or hasattr(x, "__iter__"))


class Stream:
    """A source of examples after its first pass.

    Args:
        source: an iterable of `(sequence [T, C], target)` or `(sequence, target, weight)` that can be iterated
            repeatedly, or a function that returns an iterator. Each pass must yield the same examples in the same
            order.
        share: probability of each example to be held out for validation.
        seed: of that choice.
        task: see `as_sequences`.
        name: of the data, for messages.
        buffer: number of examples in memory at a time.

    Raises:
        UsageError: an iterator, which can only be read once; items of another form; or an error of `as_sequences`.
    """

    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rates = ""
    per_step = False

    def __init__(
        self, source: Any, share: float, seed: int, task: str | None = None, name: str = "x", buffer: int = BUFFER
    ):
        if any(kind.__name__ == "DataLoader" for kind in type(source).__mro__):
            raise UsageError(f"{name}: expected a dataset, got a DataLoader: pass its .dataset instead")
        if not callable(source) and iter(source) is source:
            raise UsageError(
                f"{name}: an iterator isn't supported, because it can only be read once: pass the function that makes "
                "it, or an object with __iter__"
            )
        self.source, self.name, self.buffer = source, name, buffer
        self.ignored: dict[str, str] = {}
        self.table: dict[str, Any] = {}
        draws = np.random.default_rng([seed, 2])
        lengths, held, y, weights = [], [], [], []
        sums, digests = _Sums(), (Digest(), Digest())
        for x, target, weight in self.items():
            lengths.append(len(x))
            held.append(bool(draws.random() < share))
            y.append(target)
            weights.append(weight)
            digests[held[-1]].add(x)
            if not held[-1]:
                sums.add(x)
        if not len(lengths):
            raise UsageError(f"{name}: the iterable is empty")
        self.lengths, self.held = np.array(lengths, np.int64), np.array(held, bool)
        targets, self.labels = as_targets(y, self.lengths, task, per_step=False)
        assert isinstance(targets, np.ndarray)
        self.y: NDArray = targets
        given = [1.0 if weight is None else weight for weight in weights]
        self.weight = as_weights(given, len(given))
        self.inputs, self.channels = sums.inputs(), len(sums.total)
        self.digests = tuple(map(str, digests))

    def items(self) -> Iterator[tuple[NDArray[np.float32], Any, Any]]:
        """Yield every example, with its sequence checked; a missing weight is None."""
        whole: Any = self.source() if callable(self.source) else self.source
        width = 0
        for n, item in enumerate(whole):
            found = parts(item, f"{self.name}[{n}]")
            if len(found) < 2:
                raise UsageError(f"{self.name}[{n}]: expected (sequence, target), got only a sequence")
            x = checked(found[0], n, self.name)
            width = width or x.shape[1]
            if x.shape[1] != width:
                raise UsageError(f"{self.name}[{n}]: expected {width} channels, as the first has, got {x.shape[1]}")
            yield x, found[1], found[2] if len(found) > 2 else None


class _Sums:
    """Means and scales of channels, accumulated over sequences relative to the first one's means."""

    def add(self, x: NDArray[np.float32]) -> None:
        missing = np.isnan(x)
        if not hasattr(self, "total"):
            some = np.where(missing, 0.0, x.astype(np.float64)).sum(axis=0)
            self.around = some / np.maximum((~missing).sum(axis=0), 1)
            self.count, self.total, self.squares = np.zeros((3, x.shape[1]))
            self.partly = np.zeros(x.shape[1], bool)
        away = np.where(missing, 0.0, x - self.around)
        self.count += (~missing).sum(axis=0)
        self.total += away.sum(axis=0)
        self.squares += np.square(away).sum(axis=0)
        self.partly |= (missing & ~missing.all(axis=1, keepdims=True)).any(axis=0)

    def inputs(self) -> Inputs:
        if not hasattr(self, "total"):
            raise UsageError("there are no examples to train on")
        if not self.count.all():
            channel = int(np.argmin(self.count))
            raise UsageError(f"channel {channel} has no values in the training part: leave it out")
        mean = self.total / self.count
        scale = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0.0))
        mean = mean + self.around
        observed = tuple(map(int, np.flatnonzero(self.partly)))
        return Inputs(mean.astype(np.float32), standard_scale(mean, scale), observed)


class Streamed:
    """A `Stream` as `Data`.

    Args:
        stream: the examples.
        inputs: fills gaps.
        y: targets in the form of `Batch`, `[N]` or `[N, O]`; their weights in the same shape.
        weight: see `y`.
        validation: separate examples to validate on; None = those that the stream holds out.
        batch, seed, noise, offset, gap: see `Indexed`.
    """

    def __init__(
        self,
        stream: Stream,
        inputs: Inputs,
        y: NDArray,
        weight: NDArray[np.float32],
        validation: Examples | None,
        batch: int,
        seed: int,
        noise: float,
        offset: float,
        gap: float = GAP,
    ):
        self.stream, self.inputs, self.y, self.weight, self.validation = stream, inputs, y, weight, validation
        self.batch, self.seed, self.noise, self.offset, self.gap = batch, seed, noise, offset, gap
        self.buffer = buffer = stream.buffer
        kept = stream.lengths[~stream.held]
        blocks = [kept[at : at + buffer] for at in range(0, len(kept), buffer)]
        self.steps = sum(len(batches(block, np.arange(len(block)), batch, gap=gap)) for block in blocks)
        self.validates = validation is not None or bool(stream.held.any())

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """See `Data`."""
        step = 0
        for count, (places, block) in enumerate(self._blocks(False)):
            rng = np.random.default_rng([self.seed, number, count])
            for indices in batches(self.stream.lengths[places], np.arange(len(places)), self.batch, rng, self.gap):
                if step >= first:
                    raw = self._batch(places, block, indices)
                    yield self.inputs.fill(
                        augment(raw, self.inputs, self.noise, self.offset, (self.seed, number, step))
                    )
                step += 1

    def held(self) -> Iterator[Batch]:
        """See `Data`."""
        if self.validation is not None:
            lengths = self.validation.lengths
            for indices in batches(lengths, np.arange(len(lengths)), VALIDATED, gap=self.gap):
                yield self.inputs.fill(self.validation.fetch(indices))
            return
        for places, block in self._blocks(True):
            for indices in batches(self.stream.lengths[places], np.arange(len(places)), VALIDATED, gap=self.gap):
                yield self.inputs.fill(self._batch(places, block, indices))

    def describe(self) -> dict[str, Any]:
        """See `Data`."""
        found, held = Digest(), Digest()
        found.add(self.y, self.weight)
        if self.validation is not None:
            for indices in batches(self.validation.lengths, np.arange(len(self.validation.lengths)), VALIDATED):
                held.add(*self.validation.fetch(indices)[:3])
        training, validation = self.stream.digests
        return {
            "inputs": self.inputs.digest,
            "training": f"{training} {found}",
            "validation": f"{validation} {held}",
            "buffer": self.buffer,
            **batching(self.stream.lengths, self.gap),
        }

    def _blocks(self, held: bool) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.float32]]]]:
        """Yield the examples of one part, a buffer at a time, with their indices in the source."""
        places, block = [], []
        n = -1
        for n, (x, _, _) in enumerate(self.stream.items()):
            if n >= len(self.stream.lengths) or len(x) != self.stream.lengths[n]:
                raise UsageError(
                    f"{self.stream.name}: expected the same examples in every pass, but example {n} differs"
                )
            if self.stream.held[n] == held:
                places.append(n)
                block.append(x)
            if len(block) == self.buffer:
                yield np.array(places), block
                places, block = [], []
        if n + 1 != len(self.stream.lengths):
            raise UsageError(
                f"{self.stream.name}: expected the same {len(self.stream.lengths)} examples in every pass, got {n + 1}"
            )
        if block:
            yield np.array(places), block

    def _batch(self, places: NDArray[np.int64], block: list[NDArray[np.float32]], indices: NDArray[np.int64]) -> Batch:
        at = places[indices]
        return Batch(padded([block[n] for n in indices], np.nan), self.y[at], self.weight[at])
