"""The training and validation parts of sequences, and checks that they have the same form. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import OptionError, UsageError
from cellstack.train.data.sequences import Sequences, joined, taken
from cellstack.train.data.targets import class_weights
from cellstack.train.examples import GAP, Data, Indexed, Inputs, Labelled, split
from cellstack.train.options import Architecture, FitOptions


class TrainingParts(NamedTuple):
    """The training part with the `y` and `weight` of its sequences or steps, the validation part, and makers of `Data`.

    Without a validation part it is None.
    """

    y: NDArray
    weight: NDArray[np.float32]
    kept: Sequences
    held: Sequences | None
    measure: Callable[..., Inputs]
    data: Callable[[Inputs], Data]

    @property
    def validated(self) -> int:
        """The number of sequences in the validation part."""
        return 0 if self.held is None else len(self.held.x)

    @property
    def targets(self) -> int:
        """The number of classes or targets in the validation part."""
        y: Any = () if self.held is None else self.held.y
        return sum(map(len, y)) if isinstance(y, list) else len(y)


def parts_of(
    training: Sequences,
    validation: Sequences | None,
    class_weight: Any,
    options: FitOptions,
    gap: float = GAP,
) -> TrainingParts:
    """Return the parts of sequences.

    Args:
        training: the training data, including the validation part.
        validation: separate validation data; None = a share of `training`.
        class_weight: see `targets.class_weights`.
        options: the share of `training` to validate on, and the seed of the choice; the batch size.
        gap: see `batches`.
    """
    assert training.y is not None
    whole, (kept, held) = _split(training, validation, options.validation, options.seed)
    weights = None if class_weight is None else class_weights(class_weight, _of(training.y, kept), training.labels)
    examples = Labelled(whole, weights)

    def data(inputs: Inputs) -> Data:
        return Indexed(examples, inputs, kept, held, options.batch, options.seed, gap)

    measure = partial(Inputs.measure, examples, kept, called=whole.channel)
    parts = taken(whole, kept), taken(whole, held) if len(held) else None
    return TrainingParts(_of(examples.y, kept), _of(examples.weight, kept), *parts, measure, data)


def check(training: Sequences, validation: Sequences | None, test: Sequences | None, class_weight: Any) -> None:
    """Check that the data can be trained on, and that all parts have the same form.

    Raises:
        UsageError: sequences without classes or targets, fewer than two classes, or parts that differ.
        FormatError: parts with other channels.
    """
    y = training.y
    if y is None:
        raise UsageError(f"{training.name}: the sequences have neither classes nor targets: pass them as y")
    flat = np.concatenate(y) if isinstance(y, list) else y
    if training.labels and len(np.unique(flat)) < 2:
        found = f"only the class {training.labels[int(flat[0])]!r}" if len(flat) else "none"
        raise UsageError(f"{training.name}: expected at least two classes, got {found}")
    for name, other in (("validation", validation), ("test", test)):
        _check_alike(name, other, training)
    if class_weight is not None and not training.labels:
        raise UsageError("class_weight applies only to classes, not to numbers")


def _check_alike(name: str, other: Sequences | None, training: Sequences) -> None:
    if other is None:
        return
    if other.channels != training.channels:
        raise FormatError(f"{other.name}: expected {training.channels} channels, as trained on, found {other.channels}")
    if training.columns and other.columns != training.columns:
        raise UsageError(
            f"{name}: expected the columns {', '.join(training.columns)}, as trained on, got {', '.join(other.columns)}"
        )
    if name == "validation" and other.y is None:
        raise UsageError("validation: the sequences have neither classes nor targets")
    if other.y is not None and other.per_step != training.per_step:
        kinds = ("sequence", "step")
        raise UsageError(
            f"{name}: expected one class or target per {kinds[training.per_step]}, as in training, got one per "
            f"{kinds[other.per_step]}"
        )


def per_step(architecture: Architecture) -> Architecture:
    """Return the architecture of a network with an output at every step."""
    if architecture.every_step:
        raise UsageError("every_step applies only to one class or target per sequence, got one per step")
    return replace(architecture, pooling="none")


def _split(
    training: Sequences, validation: Sequences | None, share: float, seed: int
) -> tuple[Sequences, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the sequences to train or validate on, and the indices of either."""
    if validation is None:
        y = np.zeros(len(training.x)) if isinstance(training.y, list) or training.y is None else training.y
        return training, split(y, share, np.random.default_rng(seed))
    return joined(training, validation), (
        np.arange(len(training.x)),
        np.arange(len(training.x), len(training.x) + len(validation.x)),
    )


def _of(values: Any, kept: NDArray[np.int64]) -> NDArray:
    """Return the values of the sequences `kept`, or of all their steps if there is one per step."""
    return np.concatenate([values[n] for n in kept]) if isinstance(values, list) else values[kept]


def cut(whole: Sequences, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Split off a test part, `share` of each class; return both parts."""
    if not 0.0 < share < 1.0:
        raise OptionError("test", f"to be a share in (0, 1), or separate data, got {share}")
    y = np.zeros(len(whole.x)) if whole.y is None or isinstance(whole.y, list) else whole.y
    kept, held = split(y, share, np.random.default_rng([seed, 1]))
    if not len(held) or not len(kept):
        raise UsageError(
            f"test: a share of {share} of {len(y)} sequences leaves none to {'train' if len(held) else 'test'} on"
        )
    return taken(whole, kept), taken(whole, held)
