"""Sequences that are fetched when a batch needs them: map-style datasets, such as torch's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.data.frames import is_frame


class Lazy(Sequence[NDArray[np.float32]]):
    """A list of arrays of known lengths, each fetched when it is indexed.

    Args:
        fetch: returns the array at an index, the same each time.
        lengths: steps of each, `[N]`.
        indices: the indices that the list contains, in order; None = all.
    """

    def __init__(self, fetch: Callable[[int], NDArray[np.float32]], lengths: NDArray[np.int64], indices: Any = None):
        self.fetch, self.all_lengths = fetch, lengths
        self.indices = np.arange(len(lengths)) if indices is None else np.asarray(indices, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each array in the list."""
        return self.all_lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, n: Any) -> Any:
        at = int(self.indices[n])
        array = self.fetch(at)
        if len(array) != self.all_lengths[at]:
            raise UsageError(
                f"x[{at}]: expected {self.all_lengths[at]} steps, as in the first pass, got {len(array)}: a dataset "
                "must return the same sequence each time"
            )
        return array

    def take(self, indices: NDArray[np.int64]) -> Lazy:
        """Return the arrays at `indices`, as a list of the same kind."""
        return Lazy(self.fetch, self.all_lengths, self.indices[indices])


def is_dataset(x: Any) -> bool:
    """Return whether x has `__getitem__` and `__len__`, and isn't an array, list or frame."""
    if hasattr(x, "shape") or isinstance(x, (list, tuple, str, bytes, dict)) or is_frame(x):
        return False
    by_position = hasattr(x, "__getitem__") and hasattr(x, "__len__")
    return by_position and not any(kind.__name__ == "IterableDataset" for kind in type(x).__mro__)


def is_iterable(x: Any) -> bool:
    """Return whether x is an iterable or a function, and not an array, list, frame, file name or dataset."""
    if hasattr(x, "shape") or isinstance(x, (list, tuple, dict, set, str, bytes, os.PathLike)) or is_frame(x):
        return False
    return not is_dataset(x) and (callable(x) or hasattr(x, "__iter__"))


def read(
    x: Any, checked: Callable[[Any, int], NDArray[np.float32]], name: str
) -> tuple[Lazy, list[Any] | None, list[Any] | None]:
    """Iterate over a dataset once; return its sequences, lazily, and its targets and weights, None for none.

    Args:
        x: the dataset; an item is a sequence, or a tuple `(sequence, target)` or `(sequence, target, weight)`.
        checked: checks a sequence and returns it as `[T, I]`.
        name: for messages.

    Raises:
        UsageError: no items, or items of different forms.
    """
    lengths, targets, weights = np.empty(len(x), np.int64), [], []
    sizes = set()
    for n in range(len(x)):
        array, *more = parts(x[n], f"{name}[{n}]")
        lengths[n] = len(checked(array, n))
        sizes.add(len(more))
        if len(sizes) > 1:
            raise UsageError(f"{name}[{n}]: expected an item of the same form as {name}[0], got {1 + len(more)} parts")
        targets += more[:1]
        weights += more[1:]
    if not len(x):
        raise UsageError(f"{name}: expected at least one sequence, got none")
    return Lazy(lambda n: checked(parts(x[n], f"{name}[{n}]")[0], n), lengths), targets or None, weights or None


def parts(item: Any, name: str) -> tuple[Any, ...]:
    """Return an item as a tuple of a sequence and, if present, a target and a weight."""
    if not isinstance(item, tuple):
        if isinstance(item, dict):
            raise UsageError(f"{name}: expected (sequence, target), got a dict of {', '.join(map(str, item))}")
        return tuple(item) if isinstance(item, list) and len(item) == 2 and np.ndim(item[0]) == 2 else (item,)
    if not 1 <= len(item) <= 3:
        raise UsageError(f"{name}: expected (sequence, target) or (sequence, target, weight), got {len(item)} parts")
    return item
