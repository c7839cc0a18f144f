"""From a file to a trained network and its measured errors: what the command line and the demo do."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.spec import CellSpec, FormatError
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.examples import Examples, Inputs, Labelled, split, target_scaling
from cellstack.train.forecast import Recipe, Windows, parts
from cellstack.train.loop import Fit, Settings, fit
from cellstack.train.model import Model
from cellstack.train.processes import processes
from cellstack.train.table import Table
from cellstack.train.ts import Sequences


@dataclass(frozen=True)
class Architecture:
    """How a model is built: see `Model`."""

    units: tuple[int, ...]
    bidirectional: bool = False
    dropout: float = 0.0
    pooling: str = "mean"
    every_step: bool = False
    cell: str = "lstm"


@dataclass(frozen=True)
class RunOptions:
    """How a training is run.

    Args:
        validation: share of the training part held out for early stopping; 0 for none.
        checkpoint, resume, progress: see `fit`.
        device: see `processes`.
        inspect: look at the layers in each epoch, see `fit`.
        events: folder that then gets TensorBoard's events, where TensorBoard is installed; None for none.

    Raises:
        UsageError: a share out of its range.
    """

    validation: float = 0.15
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False
    progress: bool = False
    device: str = "auto"
    inspect: bool = False
    events: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise UsageError(f"expected validation in [0, 1), got {self.validation}")


COPIES = 4  # of each weight that training keeps at least: itself, its gradient, and two moments of Adam
NODE_NAMES = {"Standardise": "standardise", "GlobalPool": "pool", "Dense": "head"}


@dataclass
class Outcome:
    """A trained network.

    Args:
        net: the network, its metadata filled in.
        model: the same as a torch module.
        fit: what the fit did.
        scores: what was measured on held-out data, see `predict`.
        rank: number of this process among those that trained; 0 is the one that writes and prints.
    """

    net: Network
    model: Model
    fit: Fit
    scores: dict[str, Any]
    rank: int


def train_sequences(
    training: Sequences,
    test: Sequences | None,
    architecture: Architecture,
    settings: Settings,
    options: RunOptions = RunOptions(),
) -> Outcome:
    """Train on sequences, and measure on test sequences where there are some.

    Args:
        training: what to learn from, and to hold out for validation.
        test: what to measure on, read with the labels of `training`; None for nothing.
        architecture: how the model is built.
        settings: how it is fitted.
        options: how the training is run.

    Returns:
        The network and what was measured: `scores` are those of `predict.sequences`.

    Raises:
        UsageError: sequences without classes or targets, or fewer than two classes; see `fit` for more.
        FormatError: test sequences of another kind or width.
    """
    if training.y is None:
        raise UsageError(f"{training.name}: expected sequences with classes or targets, got neither")
    classify = bool(training.labels)
    if classify and len(np.unique(training.y)) < 2:
        raise UsageError(f"{training.name}: expected sequences of at least two classes, got one")
    if test is not None and test.channels != training.channels:  # before the work, not after it
        raise FormatError(f"{test.name}: expected {training.channels} channels, as trained on, found {test.channels}")
    examples = Labelled(training)
    kept, held = split(training.y, options.validation, np.random.default_rng(settings.seed))
    inputs = Inputs.measure(examples, kept)
    targets = None if classify else target_scaling(examples.y[kept], examples.weight[kept])
    task = "classify" if classify else "regress"
    head = {"outputs": len(training.labels) or 1, "task": task, "targets": targets}
    model, result, rank = _train(head, inputs, examples, (kept, held), architecture, settings, options)
    net = _network(model, predict.metadata(task, inputs, training.labels, data=training.name))
    scores = {} if test is None else predict.sequences(net, test, test.name)
    return Outcome(net, model, result, scores, rank)


def train_forecast(
    table: Table,
    recipe: Recipe,
    architecture: Architecture,
    settings: Settings,
    options: RunOptions = RunOptions(),
    test: float = 0.2,
) -> Outcome:
    """Train on a table's earlier rows; measure by forecasts from every origin in its last `test` of the rows.

    Args:
        table: the series.
        recipe: what is forecast from what.
        architecture: how the model is built.
        settings: how it is fitted.
        options: how the training is run; its validation part lies between the training part and the test part.
        test: share of the rows to measure on.

    Returns:
        The network and what was measured: `scores` are those of `predict.backtest`, and the number of `origins`.

    Raises:
        UsageError: a column that isn't there or holds nothing, or too few rows; see `fit` for more.
    """
    if not 0.0 < test < 1.0 - options.validation:
        raise UsageError(f"expected a test share above 0 that leaves rows to train on, got {test}")
    for name in (recipe.target, *recipe.inputs):
        if name in table.columns and np.isnan(table.columns[name]).all():
            raise UsageError(f"{table.path}: expected numbers in column {name!r}, found none")
    origins = parts(len(table), recipe, options.validation, test)
    windows = Windows(recipe, table, np.concatenate(origins))
    kept, held = np.arange(len(origins[0])), np.arange(len(origins[0]), len(origins[0]) + len(origins[1]))
    inputs = Inputs.measure(windows, kept)
    examples = windows.fetch(kept)
    head = {"outputs": recipe.horizon, "task": "regress", "targets": target_scaling(examples.y, examples.weight)}
    model, result, rank = _train(head, inputs, windows, (kept, held), architecture, settings, options)
    net = _network(model, predict.metadata("forecast", inputs, recipe=recipe, data=os.path.basename(table.path)))
    drift = model.targets.mean.cpu().numpy()
    scores = predict.backtest(net, table, origins[2], table.path, drift)
    return Outcome(net, model, result, {**scores, "origins": len(origins[2])}, rank)


def _train(
    head: dict[str, Any],
    inputs: Inputs,
    examples: Examples,
    parts: tuple[NDArray[np.int64], NDArray[np.int64]],
    architecture: Architecture,
    settings: Settings,
    options: RunOptions,
) -> tuple[Model, Fit, int]:
    """Build a model that ends in `head` and fit it; returns both and this process's rank.

    Raises:
        UsageError: a model whose weights and what training keeps beside them this machine can't hold.
        MemoryError: torch can't have the memory that a step takes.
    """
    check_memory(architecture, len(inputs.standardise[0]), head["outputs"])
    try:
        return _fitted(head, inputs, examples, parts, architecture, settings, options)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).partition("can't allocate memory: ")[2] or str(error)) from None
        raise


def _fitted(
    head: dict[str, Any],
    inputs: Inputs,
    examples: Examples,
    parts: tuple[NDArray[np.int64], NDArray[np.int64]],
    architecture: Architecture,
    settings: Settings,
    options: RunOptions,
) -> tuple[Model, Fit, int]:
    with processes(options.device) as team:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(settings.seed)
            model = Model(inputs.standardise, **head, **asdict(architecture))
        how = {"checkpoint": options.checkpoint, "resume": options.resume, "progress": options.progress}
        writes = options.inspect and options.events is not None and team.rank == 0
        with event_writer(options.events) if writes else nullcontext() as writer:
            how |= {"inspect": int(options.inspect), "writer": writer}
            return model, fit(model, inputs, examples, *parts, settings, **how, team=team), team.rank


def event_writer(folder: str | os.PathLike[str] | None) -> Any:
    """Return TensorBoard's writer to a folder, or a context of None where TensorBoard isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return nullcontext()
    return SummaryWriter(folder)


def check_memory(architecture: Architecture, width: int, outputs: int) -> None:
    """Raise `UsageError` where a model can't be trained on this machine at all, before any of it is made.

    Args:
        architecture: how the model is built.
        width: of its input.
        outputs: how many classes or numbers it answers with.
    """
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers, ways = 0, 1 + architecture.bidirectional
    for units in architecture.units:
        arrays = CellSpec(width, units, kind=architecture.cell).shapes.values()
        numbers, width = numbers + ways * sum(map(math.prod, arrays)), ways * units
    takes = 4 * COPIES * (numbers + (width + 1) * outputs)
    if takes > have:
        units = ",".join(map(str, architecture.units))
        raise UsageError(
            f"expected units that fit into memory, got {units}: their {numbers:,} weights take {takes / 1e9:,.1f} GB "
            f"in training, of {have / 1e9:,.1f} GB that this machine has"
        )


def _network(model: Model, metadata: dict[str, Any]) -> Network:
    nodes = model.to_nodes()
    kinds = [type(node).__name__ for node in nodes]
    names = [NODE_NAMES.get(kind, f"recurrent_{n}") for n, kind in enumerate(kinds)]
    return Network(tuple(nodes), tuple(names), metadata)
