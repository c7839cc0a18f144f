"""Train a network on sequences and measure its errors, for `train.fit`, the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train import predict
from cellstack.train.baseline import baseline
from cellstack.train.checks import UsageError, refuse_existing
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.understood import SHOWN, understood
from cellstack.train.examples import GAP, Data, target_scaling
from cellstack.train.fitting import Result, as_network, fitted
from cellstack.train.learner import Fit
from cellstack.train.model import Model
from cellstack.train.options import FEWEST, Architecture, FitOptions
from cellstack.train.parts import check, parts_of, per_step
from cellstack.train.processes import uses_gpu
from cellstack.train.search import best_settings
from cellstack.train.sizes import check_memory
from cellstack.train.trained import metadata
from cellstack.train.warm import Start


def train_sequences(
    training: Sequences,
    test: Sequences | None,
    architecture: Architecture,
    options: FitOptions = FitOptions(),
    *,
    validation: Sequences | None = None,
    class_weight: Any = None,
) -> Result:
    """Train on sequences, and measure the scores on test sequences if there are any.

    Args:
        training: the training data, with the validation part.
        test: test data, read with the labels of `training`; None for none.
        architecture: how the model is built.
        options: how it is fitted.
        validation: validation data, read with the labels of `training`; None = a share of `training`, see `options`.
        class_weight: see `targets.class_weights`; they apply to the loss in training and validation, and to the
            accuracy in the history.

    Returns:
        The network and its scores on the test sequences, see `Predictions`.

    Raises:
        UsageError: sequences without classes or targets, or fewer than two classes; see `learn` for more.
        FormatError: test sequences of another kind or width.
    """
    check(training, validation, test, class_weight)
    classify = bool(training.labels)
    if options.search and not options.timing:
        if not options.validation and validation is None:
            raise UsageError("search: expected a validation part, to compare the settings on")
        fit = partial(train_sequences, training, None, validation=validation, class_weight=class_weight)
        shape = per_step(architecture) if training.per_step else architecture
        found, how, trials = best_settings(fit, shape, options, "classify" if classify else "regress")
        how = replace(how, search=None, checkpoint=None, resume=False, overwrite=False)
        best = train_sequences(training, test, found, how, validation=validation, class_weight=class_weight)
        return replace(best, trials=trials)
    if training.per_step:
        architecture = per_step(architecture)
    elif architecture.pooling == "none":
        raise UsageError("pooling none applies only to one class or target per step, got one per sequence")
    padded = architecture.model is None  # modules of others take no mask
    parts = parts_of(training, validation, class_weight, options, gap_of(options.device) if padded else 1.0)
    start = None if architecture.init is None else Start(architecture.init)
    task = "classify" if classify else "regress"
    if start is not None:
        start.check(task, training.labels, training.channels)
    # The weights of a trained network depend on its scales.
    known = None if start is None or start.trained is None else start.trained.inputs
    usual = architecture.of(task, float(np.median(training.lengths)))
    if start is not None:
        usual = replace(
            architecture, **{name: n for name, n in start.filters.items() if getattr(architecture, name) is None}
        )
    if architecture.model is None:
        architecture = replace(architecture, filters=usual.filters, stride=usual.stride)
    inputs = parts.measure(changes=bool(usual.changes)) if known is None else known
    targets = None if classify else target_scaling(parts.y, parts.weight)
    outputs = len(training.labels) if classify else len(targets[0]) if targets else 1
    if options.metrics:
        metrics = {name: _of_labels(metric, training.labels) for name, metric in options.metrics.items()}
        options = replace(options, metrics=metrics)
    options = replace(options, selects=parts.targets >= FEWEST)
    if architecture.model is None:
        check_memory(architecture, inputs.width, outputs)

    def make(tried: Architecture) -> Model:
        model = Model(inputs, outputs, tried, task, targets)
        if start is not None:
            start.into(model, tried.head is not None)
        return model

    (model, fit, rank), chosen = best_of(
        architecture.candidates(task, parts.targets), make, parts.data(inputs), options
    )
    more = {
        "data": training.name,
        "columns": list(training.columns),
        "per_step": training.per_step,
        "table": training.table,
    }
    net = as_network(model, metadata(task, inputs, training.labels, **more))
    scores = {} if test is None else predict.sequences(net, test, test.name).scores
    parts_of_data = {"training": training, "validation": validation, "test": test}
    said = [understood(one, name)[0] for name, one in parts_of_data.items() if one is not None]
    said = [line.strip() for lines in said for line in lines]
    if inputs.wide:
        names = training.columns or [f"channel {n}" for n in range(training.channels)]
        wide = ", ".join(names[n] for n in inputs.wide[:SHOWN])
        more = f" and {len(inputs.wide) - SHOWN} more" * (len(inputs.wide) > SHOWN)
        said.append(f"values span orders of magnitude, so also seen in finer units: {wide}{more}")
    measured = parts.held if test is None or test.y is None else test
    compared = None
    if options.baseline and measured is not None and rank == 0:
        compared = baseline(parts.kept, parts.weight, measured, options.seed)
    return Result(net, model, fit, scores, rank, parts.validated, understood=said, baseline=compared, chosen=chosen)


def best_of(
    candidates: list[Architecture], make: Callable[[Architecture], Model], data: Data, options: FitOptions
) -> tuple[tuple[Model, Fit, int], str]:
    """Fit a model with and without noise, or the only candidate; return the best fit, and why it was chosen.

    The files of the second fit have `-without-noise` in their names.
    """
    if options.timing or len(candidates) == 1:
        return fitted(partial(make, candidates[0]), data, options), ""
    names, files = ("with noise", "without noise"), dict[str, Any]()
    for name in ("checkpoint", "log", "events"):
        if path := getattr(options, name):
            files[name] = Path(path).with_stem(f"{Path(path).stem}-without-noise")
    if "checkpoint" in files and not (options.resume or options.overwrite):
        refuse_existing(files["checkpoint"])
    stages = replace(options, name=names[0]), replace(options, name=names[1], **files)
    fits: list[tuple[Model, Fit, int]] = []
    for tried, stage in zip(candidates, stages, strict=True):
        fits.append(fitted(partial(make, tried), data, stage))
        if fits[-1][1].interrupted:
            break
    if len(fits) == 1:
        return fits[0], ""
    losses = [np.inf if fit.best is None else fit.best["validation_loss"] for _, fit, _ in fits]
    best = int(np.argmin(losses))
    (_, fit, _), (_, other, _) = fits[best], fits[1 - best]
    fit.seconds, fit.steps = fit.seconds + other.seconds, fit.steps + other.steps
    fit.stopped = other.stopped if other.interrupted else fit.stopped
    said = f"trained {names[best]}: validation loss {losses[best]:.4g}, {names[1 - best]} {losses[1 - best]:.4g}"
    return fits[best], said


def gap_of(device: str) -> float:
    """Return `gap` of `batches`. On GPUs nothing is padded: cuDNN has no masks, and the torch loop is much slower."""
    return 1.0 if uses_gpu(device) else GAP


def _of_labels(metric: Callable[[Any, Any], float], labels: tuple[Any, ...]) -> Callable[[NDArray, NDArray], float]:
    """Wrap a metric of labels, or of numbers, for the loop, which calls it with class indices and probabilities."""
    names = np.array(labels)

    def measured(truth: NDArray, answers: NDArray) -> float:
        if labels:
            return metric(names[truth], names[answers.argmax(axis=1)])
        return metric(*(array[:, 0] if array.shape[1] == 1 else array for array in (truth, answers)))

    return measured
