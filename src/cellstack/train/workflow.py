"""From a file to a trained network and its measured errors: what the command line and the demo do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellstack.network import Network
from cellstack.train import predict
from cellstack.train.examples import Inputs, Labelled, split, spread
from cellstack.train.forecast import Recipe, Windows, parts
from cellstack.train.loop import Fit, Settings, fit
from cellstack.train.model import Model
from cellstack.train.processes import Processes, processes
from cellstack.train.table import Table
from cellstack.train.ts import Sequences


@dataclass(frozen=True)
class Shape:
    """How a model is built: see `Model`."""

    units: tuple[int, ...]
    bidirectional: bool = False
    dropout: float = 0.0
    pooling: str = "mean"
    every_step: bool = False


@dataclass(frozen=True)
class Control:
    """How a training is run.

    Args:
        validation: share of the training part held out for early stopping; 0 for none.
        checkpoint, resume, progress: see `fit`.
        device: see `processes`.
    """

    validation: float = 0.15
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False
    progress: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"expected validation in [0, 1), got {self.validation}")


NODE_NAMES = {"Standardise": "standardise", "Pool": "pool", "Dense": "head"}


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
    training: Sequences, test: Sequences | None, shape: Shape, settings: Settings, control: Control = Control()
) -> Outcome:
    """Train on sequences, and measure on test sequences where there are some.

    Raises:
        ValueError: sequences without classes or targets, or fewer than two classes.
    """
    if training.y is None:
        raise ValueError(f"{training.name}: expected sequences with classes or targets, got neither")
    classify = bool(training.labels)
    if classify and len(np.unique(training.y)) < 2:
        raise ValueError(f"{training.name}: expected sequences of at least two classes, got one")
    examples = Labelled(training)
    kept, held = split(training.y, control.validation, np.random.default_rng(settings.seed))
    inputs = Inputs.measure(examples, kept)
    targets = None if classify else spread(examples.y[kept], examples.weight[kept])
    with processes(control.device) as team:
        model = _model(
            inputs, len(training.labels) or 1, "classify" if classify else "regress", shape, targets, settings
        )
        result = _fit(model, inputs, examples, kept, held, settings, control, team)
    task = "classify" if classify else "regress"
    net = _network(model, predict.metadata(task, inputs, training.labels, data=training.name))
    scores = {} if test is None else predict.sequences(net, test, test.name)
    return Outcome(net, model, result, scores, team.rank)


def train_forecast(
    table: Table,
    recipe: Recipe,
    shape: Shape,
    settings: Settings,
    control: Control = Control(),
    test: float = 0.2,
) -> Outcome:
    """Train on a table's earlier rows; measure by forecasts from every origin in its last `test` of the rows.

    Raises:
        ValueError: a column that isn't there, or too few rows.
    """
    if not 0.0 < test < 1.0 - control.validation:
        raise ValueError(f"expected a test share above 0 that leaves rows to train on, got {test}")
    origins = parts(len(table), recipe, control.validation, test)
    windows = Windows(recipe, table, np.concatenate(origins))
    kept, held = np.arange(len(origins[0])), np.arange(len(origins[0]), len(origins[0]) + len(origins[1]))
    inputs = Inputs.measure(windows, kept)
    examples = windows.fetch(kept)
    with processes(control.device) as team:
        model = _model(inputs, recipe.horizon, "regress", shape, spread(examples.y, examples.weight), settings)
        result = _fit(model, inputs, windows, kept, held, settings, control, team)
    net = _network(model, predict.metadata("forecast", inputs, recipe=recipe, data=os.path.basename(table.path)))
    drift = model.targets.mean.cpu().numpy()
    scores = predict.backtest(net, table, origins[2], table.path, drift)
    return Outcome(net, model, result, {**scores, "origins": len(origins[2])}, team.rank)


def _model(inputs: Inputs, outputs: int, task: str, shape: Shape, targets: Any, settings: Settings) -> Model:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        return Model(
            inputs.standardise,
            outputs,
            shape.units,
            task,
            bidirectional=shape.bidirectional,
            dropout=shape.dropout,
            pooling=shape.pooling,
            every_step=shape.every_step,
            targets=targets,
        )


def _fit(
    model: Model,
    inputs: Inputs,
    examples: Any,
    kept: Any,
    held: Any,
    settings: Settings,
    control: Control,
    team: Processes,
) -> Fit:
    return fit(
        model,
        inputs,
        examples,
        kept,
        held,
        settings,
        checkpoint=control.checkpoint,
        resume=control.resume,
        progress=control.progress,
        team=team,
    )


def _network(model: Model, metadata: dict[str, Any]) -> Network:
    nodes = model.to_nodes()
    kinds = [type(node).__name__ for node in nodes]
    names = [NODE_NAMES.get(kind, f"lstm_{n}") for n, kind in enumerate(kinds)]
    return Network(tuple(nodes), tuple(names), metadata)
