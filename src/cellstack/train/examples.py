"""Examples that a model learns from, in batches that need no padding. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.ts import Sequences


class Batch(NamedTuple):
    """Examples of one length.

    `x` is `[B, T, I]` float32, NaN where missing; `y` is `[B]` int64 classes or `[B, O]` float32 targets; `weight` is
    float32 in the shape of `y`: how much each counts in the loss, 0 where the target is missing.
    """

    x: NDArray[np.float32]
    y: NDArray
    weight: NDArray[np.float32]


class Examples(Protocol):
    """What the fit loop needs of its data."""

    lengths: NDArray[np.int64]

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`, which must be of one length."""
        ...


class Labelled:
    """Sequences with their classes or targets, as `Examples`; those without either weigh nothing."""

    def __init__(self, sequences: Sequences):
        self.x, self.lengths = sequences.x, sequences.lengths
        y = np.zeros((len(self.x), 1), np.float32) if sequences.y is None else sequences.y
        self.y = y if y.dtype.kind == "i" or y.ndim == 2 else y[:, None]
        self.weight = np.full(self.y.shape, float(sequences.y is not None), np.float32)

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """See `Examples`."""
        return Batch(np.stack([self.x[n] for n in indices]), self.y[indices], self.weight[indices])


def batches(
    lengths: NDArray[np.int64], indices: NDArray[np.int64], size: int, rng: np.random.Generator | None = None
) -> list[NDArray[np.int64]]:
    """Group examples of equal length into batches, so that no step is padding.

    Args:
        lengths: steps of every example, `[N]`.
        indices: the examples to batch.
        size: most examples in a batch. A length's examples are spread evenly over as few batches as hold them.
        rng: shuffles the examples within their length, and then the batches; file order and rising length where None.

    Returns:
        Positions in `lengths`, one array a batch; every one of `indices` appears once.
    """
    groups = []
    for length in np.unique(lengths[indices]):
        group = indices[lengths[indices] == length]
        if rng is not None:
            group = rng.permutation(group)
        groups += np.array_split(group, -(-len(group) // size))
    return groups if rng is None else [groups[n] for n in rng.permutation(len(groups))]


def split(y: NDArray, share: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions to train on and to validate on, `share` of each class (of all, for targets) in the latter."""
    strata = [np.flatnonzero(y == label) for label in np.unique(y)] if y.dtype.kind == "i" else [np.arange(len(y))]
    held = [rng.permutation(group)[: round(share * len(group))] for group in strata]
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), validation), validation


@dataclass(frozen=True)
class Inputs:
    """Turns raw inputs with gaps into what the network takes; measured on the training part alone.

    A missing value becomes the training mean, which is zero once standardised, and a channel that is ever missing
    where another is observed gets a channel beside it that says 1 where it was observed and 0 where not. A step at
    which nothing was observed is left out by the mask: the state is carried over it.

    Args:
        mean, scale: of each raw channel, `[I]`; scale is 1 where a channel is constant.
        observed: which channels have such a companion.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    observed: tuple[int, ...] = ()

    @classmethod
    def measure(cls, examples: Examples, indices: NDArray[np.int64], most: int = 4096) -> Inputs:
        """Measure means and scales on the examples at `indices`, on `most` of them evenly spread where there are more.

        Raises:
            UsageError: a channel without a single value.
        """
        some = indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(np.int64)]
        rows = [examples.fetch(group).x for group in batches(examples.lengths, some, most)]
        x = np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows]).astype(np.float64)
        missing = np.isnan(x)
        if missing.all(axis=0).any():
            channel = int(np.argmax(missing.all(axis=0)))
            raise UsageError(f"expected values in every channel of the training part, found none in channel {channel}")
        scale = np.nanstd(x, axis=0)
        partly = missing & ~missing.all(axis=1, keepdims=True)
        mean = np.nanmean(x, axis=0)
        scale = np.where(scale > 1e-6 * np.maximum(np.abs(mean), 1e-6), scale, 1.0)
        return cls(
            mean.astype(np.float32), scale.astype(np.float32), tuple(map(int, np.flatnonzero(partly.any(axis=0))))
        )

    @property
    def standardise(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and scale of every channel that the network takes, companions included."""
        extra = np.zeros(len(self.observed), np.float32)
        return np.concatenate([self.mean, extra]), np.concatenate([self.scale, extra + 1])

    def __call__(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Fill `x [B, T, I]`: returns `[B, T, I + companions]` and the mask `[B, T]`, None where all steps count."""
        missing = np.isnan(x)
        companions = 1.0 - missing[..., list(self.observed)].astype(np.float32)
        filled = np.concatenate([np.where(missing, self.mean, x), companions], axis=-1, dtype=np.float32)
        used = np.asarray(~missing.all(axis=-1))
        return filled, None if used.all() else used


def target_scaling(values: NDArray, weight: NDArray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and scale of the targets in each column of `values [N, O]` where `weight` is above 0.

    Raises:
        UsageError: a column without a target.
    """
    counted = np.where(weight > 0, values, np.nan).astype(np.float64)
    if np.isnan(counted).all(axis=0).any():
        raise UsageError("expected at least one observed target in the training part, found none")
    scale = np.nanstd(counted, axis=0)
    return np.nanmean(counted, axis=0).astype(np.float32), np.where(scale > 0, scale, 1.0).astype(np.float32)
