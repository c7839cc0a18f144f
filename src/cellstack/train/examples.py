"""Training examples, and the batches of an epoch, of similar lengths. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError
from cellstack.train.data.sequences import Sequences

VALIDATED = 256  # batch size without gradients
MIXED = 1.2  # greatest random factor of a length when sequences are sorted, so that batches differ between epochs
FINER, MOST_FINER = 8, 4  # factor between units of an input; how many there are below the standard deviation at most
GAP = 2.0  # sequences on either side of a gap in the lengths by more than this factor never share a batch


class Batch(NamedTuple):
    """The examples of one training step.

    `x` is the model's input: an array whose first axis is the batch, or a tuple or dict of such; for sequences
    `[B, T, I]` float32, NaN where missing. `y` is `[B]` int64 classes or `[B, O]` float32 targets, with an axis T after
    the first if there is one per step; `weight` is float32 in the shape of `y`: the weight of each in the loss, 0
    where the target is missing. `mask` is `[B, T]`, True at the steps to use; None = all.
    """

    x: Any
    y: NDArray
    weight: NDArray[np.float32]
    mask: NDArray[np.bool_] | None = None


class Data(Protocol):
    """Training data for the fit loop: the batches of every epoch.

    `steps` is the number of batches in an epoch; `validates` says whether there is a validation part.
    """

    steps: int
    validates: bool

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, numbered from 0, from batch `first` on.

        They depend only on the constructor's arguments and on the two numbers, in every process.
        """
        ...

    def held(self) -> Iterator[Batch]:
        """Yield the batches of the validation part, always the same ones."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the data: training only resumes from a checkpoint with the same ones."""
        ...


class Examples(Protocol):
    """Examples that can be fetched by index."""

    lengths: NDArray[np.int64]

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`, padded at their end to the longest of them.

        The padding is NaN in `x`, and has weight 0 if there is a target per step.
        """
        ...


class Labelled:
    """Sequences with their classes or targets, as `Examples`; without those, all weights are 0.

    Args:
        sequences: the data.
        weights: class weights, multiplied with the sequences' weights; None = all 1.
    """

    def __init__(self, sequences: Sequences, weights: NDArray[np.float32] | None = None):
        self.x, self.lengths = sequences.x, sequences.lengths
        self.y: Any
        self.weight: Any
        count, y = len(self.x), sequences.y
        if isinstance(y, list):
            each = np.ones(count, np.float32) if sequences.weight is None else sequences.weight
            pairs = [shaped(part, np.full(len(part), one), weights) for part, one in zip(y, each, strict=True)]
            self.y, self.weight = [one for one, _ in pairs], [one for _, one in pairs]
        elif y is None:
            self.y, self.weight = np.zeros((count, 1), np.float32), np.zeros((count, 1), np.float32)
        else:
            self.y, self.weight = shaped(y, sequences.weight, weights)

    def fetch(self, indices: NDArray[np.int64]) -> Batch:
        """See `Examples`."""
        x = padded([self.x[n] for n in indices], np.nan)
        if isinstance(self.y, list):
            return Batch(x, *(padded([part[n] for n in indices], 0) for part in (self.y, self.weight)))
        return Batch(x, self.y[indices], self.weight[indices])


def padded(arrays: Sequence[NDArray], value: float) -> NDArray:
    """Stack arrays `[T, …]`, the shorter ones with `value` at their end."""
    longest = max(map(len, arrays))
    if min(map(len, arrays)) == longest:
        return np.stack(arrays)
    whole = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, arrays[0].dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole


def shaped(
    y: NDArray, weight: NDArray | None, weights: NDArray[np.float32] | None
) -> tuple[NDArray, NDArray[np.float32]]:
    """Return targets in the shape of `Batch.y`, `[N]` classes or `[N, O]` numbers, and weights in the same shape.

    Args:
        y: classes or targets, `[N]` or `[N, O]`.
        weight: weight of each entry, `[N]`; None = all 1.
        weights: class weights; None = all 1.
    """
    y = y if y.dtype.kind == "i" or y.ndim == 2 else y[:, None]
    whole = np.ones(y.shape, np.float32) if weights is None else weights[y]
    if weight is not None:
        whole = whole * weight.reshape(-1, *[1] * (y.ndim - 1))
    return y, np.asarray(whole, np.float32)


def batches(
    lengths: NDArray[np.int64],
    indices: NDArray[np.int64],
    size: int,
    rng: np.random.Generator | None = None,
    gap: float = 1.0,
) -> list[NDArray[np.int64]]:
    """Group examples of equal length, or with `gap` of similar length, into batches.

    Args:
        lengths: steps of every example, `[N]`.
        indices: the examples to batch.
        size: maximum batch size. The examples are spread evenly over as few batches as possible.
        rng: shuffles the examples of similar length, and then the batches; None = file order and ascending length.
        gap: where two successive lengths of the examples differ by more than this factor, shorter and longer examples
            are in separate batches. With 1, all examples of a batch have the same length.

    Returns:
        Indices into `lengths`, one array per batch; each of `indices` appears once. The number of batches doesn't
        depend on `rng`.
    """
    chosen, rising = lengths[indices], np.unique(lengths[indices])
    part = np.searchsorted(rising[1:][rising[1:] > gap * rising[:-1]], chosen, side="right")
    groups = []
    for number in np.unique(part):
        group, mixing = indices[part == number], np.ones(1)
        if rng is not None:
            group = rng.permutation(group)
            mixing = np.linspace(1.0, MIXED, len(group))  # random, as the order is; equal lengths keep this order
        group = group[np.argsort(lengths[group] * mixing, kind="stable")]
        groups += np.array_split(group, -(-len(group) // size))
    return groups if rng is None else [groups[n] for n in rng.permutation(len(groups))]


def split(y: NDArray, share: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices to train on and to validate on; the latter are `share` of each class (or of all, for targets)."""
    strata = [np.flatnonzero(y == label) for label in np.unique(y)] if y.dtype.kind == "i" else [np.arange(len(y))]
    held = [rng.permutation(group)[: round(share * len(group))] for group in strata]
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), validation), validation


class ChangeWeights(NamedTuple):
    """Input channels that are computed from two steps: `tanh(x[t - 1] @ kernel[0] + x[t] @ kernel[1] + bias)`.

    x are the standardised raw channels `[I]`; `kernel` is `[2, I, F]`, `bias` `[F]`.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Inputs:
    """Turns raw inputs with gaps into the network's inputs, with statistics of the training part only.

    A missing value is replaced by the training mean, which is zero after standardisation; for a network that also sees
    the changes of the channels, by the channel's last observed value, so that its change is 0. A channel that is
    sometimes missing while another is observed gets an indicator channel: 1 where observed, 0 where missing. A step
    without any observed value is masked: the state is carried over it.

    Args:
        mean, scale: of each raw channel, `[I]`; scale is 1 where a channel is constant.
        observed: indices of the channels with an indicator.
        changes: the change of each raw channel since its last observed value, in units of its standard deviation. If
            a quarter of the sequences are far below a channel's standard deviation, as with powers, prices or rain, its
            values and changes in finer units, too. None: no such inputs.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    observed: tuple[int, ...] = ()
    changes: ChangeWeights | None = None

    @classmethod
    def measure(
        cls,
        examples: Examples,
        indices: NDArray[np.int64],
        most: int = 4096,
        called: Callable[[int], str] = "channel {}".format,
        changes: bool = False,
    ) -> Inputs:
        """Measure means and scales on the examples at `indices`, or on `most` of them, evenly spread, if more.

        `called` returns the name of a channel for messages; `changes` says whether the network also sees the changes.

        Raises:
            UsageError: a channel without values.
        """
        some = indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(np.int64)]
        rows = [examples.fetch(group).x for group in batches(examples.lengths, some, most)]
        x = np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows]).astype(np.float64)
        missing = np.isnan(x)
        if missing.all(axis=0).any():
            channel = int(np.argmax(missing.all(axis=0)))
            raise UsageError(f"{called(channel)} has no values in the training part: leave it out")
        scale = np.nanstd(x, axis=0)
        partly = missing & ~missing.all(axis=1, keepdims=True)
        mean = np.nanmean(x, axis=0)
        observed = tuple(map(int, np.flatnonzero(partly.any(axis=0))))
        known = cls(mean.astype(np.float32), standard_scale(mean, scale), observed)
        if not changes:
            return known
        middle = np.nanmedian(x, axis=0)
        moves = [_moves(row) for row in rows]
        deviation = np.nanstd(np.concatenate([np.zeros((1, len(mean))), *(m.reshape(-1, len(mean)) for m in moves)]), 0)
        unit = standard_scale(known.scale, deviation)
        # Of each input: its channel, its unit, the weight of the step before, and the value that is 0
        columns = [(channel, unit[channel], -1.0, mean[channel]) for channel in range(len(mean))]
        columns += [(channel, finer, -1.0, mean[channel]) for channel, finer in _finer(deviation, moves)]
        columns += [
            (channel, finer, 0.0, middle[channel]) for channel, finer in _finer(scale, [r - middle for r in rows])
        ]
        kernel, bias = np.zeros((2, len(mean), len(columns)), np.float32), np.zeros(len(columns), np.float32)
        for n, (channel, unit, before, zero) in enumerate(columns):
            factor = known.scale[channel] / unit
            kernel[:, channel, n] = before * factor, factor
            bias[n] = (mean[channel] - zero) / unit
        return replace(known, changes=ChangeWeights(kernel, bias))

    @property
    def width(self) -> int:
        """The number of the recurrent layers' input channels."""
        return len(self.mean) + len(self.observed) + (0 if self.changes is None else len(self.changes.bias))

    @property
    def wide(self) -> list[int]:
        """The raw channels that are also seen in finer units."""
        return [] if self.changes is None else np.flatnonzero((self.changes.kernel[1] != 0).sum(axis=1) > 1).tolist()

    @property
    def standardise(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and scale of each of the network's input channels, which are the raw ones and the indicators."""
        extra = np.zeros(len(self.observed), np.float32)
        return np.concatenate([self.mean, extra]), np.concatenate([self.scale, extra + 1])

    def __call__(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Fill `x [B, T, I]`: return `[B, T, I + indicators]` and the mask `[B, T]`, None if all steps are used."""
        missing = np.isnan(x)
        indicators = 1.0 - missing[..., list(self.observed)].astype(np.float32)
        known = x if self.changes is None else held(x)
        empty = missing if known is x else np.isnan(known)
        filled = np.concatenate([np.where(empty, self.mean, known), indicators], axis=-1, dtype=np.float32)
        used = np.asarray(~missing.all(axis=-1))
        return filled, None if used.all() else used

    def fill(self, batch: Batch) -> Batch:
        """Return a batch of raw examples as the model's input."""
        x, mask = self(batch.x)
        return batch._replace(x=x, mask=mask)

    @property
    def digest(self) -> str:
        """A digest of all fields."""
        return digest([self.mean, self.scale, np.array(self.observed, np.int64), *(self.changes or ())])


def held(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `x [B, T, I]` with the last observed value of a channel in place of a missing one, NaN before the first.

    >>> held(np.array([[[np.nan], [1.0], [np.nan], [2.0]]])).ravel()
    array([nan,  1.,  1.,  2.])
    """
    missing = np.isnan(x)
    if not missing.any():
        return x
    latest = np.maximum.accumulate(np.where(missing, 0, np.arange(x.shape[1])[:, None]), axis=1)
    return np.take_along_axis(x, latest, axis=1)


def _moves(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the change of each observed value from the one before, `[B, T - 1, I]`; NaN where there is none.

    Ref: Furui 1986, "Speaker-independent isolated word recognition using dynamic features of speech spectrum".
    """
    return x[:, 1:].astype(np.float64) - held(x)[:, :-1]


def _finer(deviation: NDArray, rows: Sequence[NDArray]) -> list[tuple[int, float]]:
    """Return channels and units finer than their `deviation [I]`, one for each unit.

    The finest is at least the size, the root of the mean square, below which a quarter of the sequences are: those of
    `rows [B, T, I]` that aren't zero.
    """
    found, rows = [], [row for row in rows if row.shape[1]]  # a sequence of one step has no change
    squares = [np.ma.masked_invalid(row.astype(np.float64)) ** 2 for row in rows]
    sizes = np.ma.concatenate([np.empty((0, len(deviation))), *(square.mean(axis=1) for square in squares)]) ** 0.5
    for channel, all_sizes in enumerate(sizes.T):  # [N] each
        size = all_sizes.compressed()
        lowest = np.quantile(size[size > 0], 0.25) if (size > 0).any() else np.inf
        units = (deviation[channel] / FINER**power for power in range(1, MOST_FINER + 1))
        found += [(channel, unit) for unit in units if unit >= lowest]
    return found


def standard_scale(mean: NDArray, scale: NDArray) -> NDArray[np.float32]:
    """Return the scales of channels, 1 for those that are constant up to rounding."""
    return np.where(scale > 1e-6 * np.maximum(np.abs(mean), 1e-6), scale, 1.0).astype(np.float32)


def target_scaling(values: NDArray, weight: NDArray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and scale of each column of the targets `values [N, O]`, where `weight` is above 0.

    Raises:
        UsageError: a column without targets, or one whose range float32 can't represent.
    """
    counted = np.where(weight > 0, values, np.nan).astype(np.float64)
    if np.isnan(counted).all(axis=0).any():
        raise UsageError("the training part has no observed targets")
    scale = np.nanstd(counted, axis=0)
    limits = np.finfo(np.float32)
    for bad, what in (
        (np.nanmax(counted, axis=0) - np.nanmin(counted, axis=0) > limits.max, "overflows float32: divide"),
        ((scale > 0) & (scale < limits.tiny), "underflows float32: multiply"),
    ):
        if bad.any():
            column = counted[:, np.argmax(bad)]
            raise UsageError(
                f"y: the targets' range, {np.nanmin(column):.3g} to {np.nanmax(column):.3g}, {what} them by a constant"
            )
    return np.nanmean(counted, axis=0).astype(np.float32), np.where(scale > 0, scale, 1.0).astype(np.float32)


class Indexed:
    """Indexed examples as `Data`: batches of similar lengths, gaps and padding masked.

    Args:
        examples: the data.
        inputs: fills gaps; measured on the training part.
        training, validation: indices into `examples`; the latter may be empty.
        batch: maximum batch size in training.
        seed: of the order.
        gap: see `batches`; 1 for batches of one length each, without padding.

    Raises:
        UsageError: no training examples.
    """

    def __init__(
        self,
        examples: Examples,
        inputs: Inputs,
        training: NDArray[np.int64],
        validation: NDArray[np.int64],
        batch: int,
        seed: int,
        gap: float = GAP,
    ):
        if not len(training):
            raise UsageError("there are no examples to train on")
        self.examples, self.inputs, self.training, self.validation = examples, inputs, training, validation
        self.batch, self.seed, self.gap = batch, seed, gap
        self.steps = len(batches(examples.lengths, training, batch, gap=gap))
        self.validates = bool(len(validation))

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """See `Data`."""
        rng = np.random.default_rng([self.seed, number])
        order = batches(self.examples.lengths, self.training, self.batch, rng, self.gap)
        for indices in order[first:]:
            yield self.inputs.fill(self.examples.fetch(indices))

    def held(self) -> Iterator[Batch]:
        """See `Data`."""
        for indices in batches(self.examples.lengths, self.validation, VALIDATED, gap=self.gap):
            yield self.inputs.fill(self.examples.fetch(indices))

    def describe(self) -> dict[str, Any]:
        """See `Data`."""
        parts = {"training": self.training, "validation": self.validation}
        digests = {name: self._digest(indices) for name, indices in parts.items()}
        return {"inputs": self.inputs.digest, **digests, **batching(self.examples.lengths, self.gap)}

    def _digest(self, indices: NDArray[np.int64]) -> str:
        total = Digest()
        total.add(indices)
        for group in batches(self.examples.lengths, indices, VALIDATED):
            total.add(*self.examples.fetch(group)[:3])
        return str(total)


def batching(lengths: NDArray[np.int64], gap: float) -> dict[str, str]:
    """Return a checkpoint's entry about padded batches, which must match on resuming; {} without padding."""
    return {"batches": f"of similar lengths, {MIXED} and {gap}"} if gap > 1 and len(np.unique(lengths)) > 1 else {}


class Digest:
    """A digest of arrays' shapes and values; all NaNs are equal."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def add(self, *arrays: NDArray) -> None:
        """Add arrays to the digest."""
        for array in arrays:
            if array.dtype.kind == "f":
                array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
            self.hash.update(f"{array.dtype.str}{array.shape}".encode())
            self.hash.update(np.ascontiguousarray(array).data)

    def __str__(self) -> str:
        return self.hash.hexdigest()[:16]


def digest(arrays: Iterable[NDArray]) -> str:
    """Return a digest of the arrays, see `Digest`."""
    total = Digest()
    total.add(*arrays)
    return str(total)
