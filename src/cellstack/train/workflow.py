"""Train a network on sequences and measure its errors, for `train.fit`, the command line and the demo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.spec import FormatError
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.data.sequences import Sequences, joined
from cellstack.train.data.stream import Stream, Streamed
from cellstack.train.data.targets import class_weights
from cellstack.train.examples import Data, Indexed, Inputs, Labelled, shaped, split, target_scaling
from cellstack.train.fitting import Result, as_network, check_memory, fitted
from cellstack.train.learner import Fit
from cellstack.train.model import Model
from cellstack.train.settings import Architecture, Own, RunOptions, Settings
from cellstack.train.trained import metadata
from cellstack.train.warm import Start


def train_sequences(
    training: Sequences | Stream,
    test: Sequences | None,
    architecture: Architecture,
    settings: Settings,
    options: RunOptions = RunOptions(),
    own: Own = Own(),
    *,
    validation: Sequences | None = None,
    class_weight: Any = None,
) -> Result:
    """Train on sequences, and measure the scores on test sequences if there are any.

    Args:
        training: the training data, with the validation part; a `Stream` has chosen its validation part itself.
        test: test data, read with the labels of `training`; None for none.
        architecture: how the model is built.
        settings: how it is fitted.
        options: how the training is run.
        own: the user's own parts of the model and the training.
        validation: validation data, read with the labels of `training`; None = a share of `training`, see `options`.
        class_weight: see `targets.class_weights`; they apply to the loss in training and validation, and to the
            accuracy in the history.

    Returns:
        The network and its scores on the test sequences, see `Predictions`.

    Raises:
        UsageError: sequences without classes or targets, or fewer than two classes; see `learn` for more.
        FormatError: test sequences of another kind or width.
    """
    y = training.y
    if y is None:
        raise UsageError(f"{training.name}: the sequences have neither classes nor targets")
    classify, flat = bool(training.labels), np.concatenate(y) if isinstance(y, list) else y
    if classify and len(np.unique(flat)) < 2:
        raise UsageError(f"{training.name}: expected at least two classes, got one")
    for name, other in (("validation", validation), ("test", test)):
        _check_alike(name, other, training)  # before the training
    if class_weight is not None and not classify:
        raise UsageError("class_weight applies only to classes, not to numbers")
    if training.per_step:
        architecture = _per_step(architecture)
    if isinstance(training, Stream):
        parts = _streamed(training, validation, class_weight, settings)
    else:
        parts = _indexed(training, validation, class_weight, settings, options)
    start = None if own.init is None else Start(own.init)
    task = "classify" if classify else "regress"
    if start is not None:
        start.check(task, training.labels, training.channels)
    known = (
        None if start is None or start.trained is None else start.trained.inputs
    )  # its weights depend on those scales
    inputs = parts.measure() if known is None else known
    targets = None if classify else target_scaling(parts.y, parts.weight)
    outputs = len(training.labels) if classify else len(targets[0]) if targets else 1
    head = {"outputs": outputs, "task": task, "targets": targets, "head": copy.deepcopy(own.head), "loss": own.loss}
    if own.metrics:
        metrics = {name: _of_labels(metric, training.labels) for name, metric in own.metrics.items()}
        own = replace(own, metrics=metrics)
    model, fit, rank = _model(head, inputs, parts.data(inputs), architecture, settings, options, own, start)
    more = {
        "data": training.name,
        "columns": list(training.columns),
        "per_step": training.per_step,
        "table": training.table,
    }
    net = as_network(model, metadata(task, inputs, training.labels, **more))
    scores = {} if test is None else predict.sequences(net, test, test.name).scores
    return Result(net, model, fit, scores, rank, parts.validated)


class _Parts(NamedTuple):
    """The training part's `y` and `weight`, the size of the validation part, and functions that make `Data`."""

    y: NDArray
    weight: NDArray[np.float32]
    validated: int
    measure: Callable[[], Inputs]
    data: Callable[[Inputs], Data]


def _indexed(
    training: Sequences, validation: Sequences | None, class_weight: Any, settings: Settings, options: RunOptions
) -> _Parts:
    """Return the parts of sequences in memory."""
    assert training.y is not None
    whole, (kept, held) = _split(training, validation, options.validation, settings.seed)
    weights = None if class_weight is None else class_weights(class_weight, _of(training.y, kept), training.labels)
    examples = Labelled(whole, weights)

    def data(inputs: Inputs) -> Data:
        s = settings
        return Indexed(examples, inputs, kept, held, s.batch, s.seed, s.noise, s.offset)

    measure = partial(Inputs.measure, examples, kept, called=whole.channel)
    return _Parts(_of(examples.y, kept), _of(examples.weight, kept), len(held), measure, data)


def _streamed(stream: Stream, validation: Sequences | None, class_weight: Any, settings: Settings) -> _Parts:
    """Return the parts of a `Stream`."""
    kept = ~stream.held
    weights = None if class_weight is None else class_weights(class_weight, stream.y[kept], stream.labels)
    y, weight = shaped(stream.y, stream.weight, weights)
    own = None if validation is None else Labelled(validation, weights)

    def data(inputs: Inputs) -> Data:
        s = settings
        return Streamed(stream, inputs, y, weight, own, s.batch, s.seed, s.noise, s.offset)

    validated = int(stream.held.sum()) if validation is None else len(validation.x)
    return _Parts(y[kept], weight[kept], validated, lambda: stream.inputs, data)


def _check_alike(name: str, other: Sequences | None, training: Sequences | Stream) -> None:
    if other is None:
        return
    if other.channels != training.channels:
        raise FormatError(f"{other.name}: expected {training.channels} channels, as trained on, found {other.channels}")
    if other.columns != training.columns:
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


def _per_step(architecture: Architecture) -> Architecture:
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


def _of_labels(metric: Callable[[Any, Any], float], labels: tuple[Any, ...]) -> Callable[[NDArray, NDArray], float]:
    """Wrap a metric of labels, or of numbers, for the loop, which calls it with class indices and probabilities."""
    names = np.array(labels)

    def measured(truth: NDArray, answers: NDArray) -> float:
        if labels:
            return metric(names[truth], names[answers.argmax(axis=1)])
        return metric(*(array[:, 0] if array.shape[1] == 1 else array for array in (truth, answers)))

    return measured


def _of(values: Any, kept: NDArray[np.int64]) -> NDArray:
    """Return the entries of some sequences, or of all their steps if there is one per step."""
    return np.concatenate([values[n] for n in kept]) if isinstance(values, list) else values[kept]


def _model(
    head: dict[str, Any],
    inputs: Inputs,
    data: Data,
    architecture: Architecture,
    settings: Settings,
    options: RunOptions,
    own: Own = Own(),
    start: Start | None = None,
) -> tuple[Model, Fit, int]:
    """Make a model with `head` and fit it; return the model, the `Fit` and this process's rank."""
    check_memory(architecture, len(inputs.standardise[0]), head["outputs"])

    def make() -> Model:
        model = Model(inputs.standardise, **head, **asdict(architecture))
        if start is not None:
            start.into(model, own.head is not None)
        return model

    return fitted(make, data, settings, options, own)
