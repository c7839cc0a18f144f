"""Make a model and fit it, for any task, and the result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from cellstack.network import Network
from cellstack.spec import CellSpec
from cellstack.train.checks import UsageError
from cellstack.train.examples import Data
from cellstack.train.history import Log, event_writer
from cellstack.train.learner import Fit
from cellstack.train.loop import learn
from cellstack.train.predict import predict
from cellstack.train.processes import processes
from cellstack.train.settings import Architecture, Own, RunOptions, Settings

COPIES = 4  # values per weight in training, at least: the weight, its gradient, and Adam's two moments
RECURRENT = ("Recurrent", "Bidirectional")
NODE_NAMES = {"Standardise": "standardise", "GlobalPool": "pool", "Dense": "head"}


@dataclass
class Result:
    """A trained network.

    Args:
        network: the network with its metadata; it doesn't need torch.
        model: the same network as a torch module.
        fit: the course of the fit.
        scores: scores on test data, see `Predictions`; {} without test data.
        rank: number of this process among those that trained; process 0 writes and prints.
        validated: number of examples in the validation part.
        summary: the text of `sentence`, if several fits made the network.
    """

    network: Network
    model: Any
    fit: Fit
    scores: dict[str, Any]
    rank: int = 0
    validated: int = 0
    summary: str = ""

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per epoch: see `Fit`."""
        return self.fit.history

    @property
    def labels(self) -> tuple[Any, ...]:
        """The classes, in the order of the network's outputs; () for regression."""
        return self.network.labels

    def predict(self, data: Any, y: Any = None, **options: Any) -> Any:
        """Predict for new data with the network: see `Network.predict`."""
        return predict(self.network, data, y, **options)

    @property
    def sentence(self) -> str:
        """What stopped the training, which epoch was kept, and its scores on held-out data."""
        return self.summary or "; ".join(part for part in (self._stopped(), self._kept(), self._measured()) if part)

    def _stopped(self) -> str:
        done, fit = len(self.fit.history), self.fit
        how = {
            "epochs": f"trained for all {_count(done, 'epoch')}",
            "patience": f"stopped after {_count(done, 'epoch')}, because the validation loss had not decreased for "
            f"{done - fit.best['epoch'] if fit.best else 0}",
            "ctrl-c": f"stopped by Ctrl-C after {_count(done, 'complete epoch')}",
            "callback": f"stopped by a callback after {_count(done, 'epoch')}",
        }
        return how[fit.stopped]

    def _kept(self) -> str:
        best = self.fit.best
        if best is None:
            return "no epoch was completed: the weights are those of the last step"
        why = "with the lowest validation loss" if "validation_loss" in best else "the last, without a validation part"
        return f"kept epoch {best['epoch']}, {why}"

    def _measured(self) -> str:
        best, names = self.fit.best, ("accuracy", "mae", "rmse", "bits_per_character")
        scored = [f"{name.replace('_', ' ')} {self.scores[name]:.4g}" for name in names if name in self.scores]
        if scored:
            return f"on the test part: {', '.join(scored)}"
        if best is None or "validation_loss" not in best:
            return "no data was held out to measure its accuracy on"
        found = [f"{name.replace('_', ' ')} {best[name]:.4g}" for name in names if name in best]
        found = ", ".join(found or [f"loss {best['validation_loss']:.4g}"])
        return f"on the {_count(self.validated, 'validation example')}, which also selected the epoch: {found}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def fitted(
    make: Callable[[], Any], data: Data, settings: Settings, options: RunOptions, own: Own = Own()
) -> tuple[Any, Fit, int]:
    """Make a model and fit it; return the model, the `Fit` and this process's rank.

    Args:
        make: makes the model, a `Learner`; its random numbers depend on the seed.
        data: the training data.
        settings, options: how to fit.
        own: the optimiser, scheduler, metrics and callbacks; `make` uses the rest of it.

    Raises:
        UsageError: see `learn`.
        MemoryError: torch can't allocate the memory of a step.
    """
    try:
        with processes(options.device) as team:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(settings.seed)
                model = make()
            writes = options.inspect and options.events is not None and team.rank == 0
            with ExitStack() as stack:
                writer = stack.enter_context(event_writer(options.events) or nullcontext()) if writes else None
                callbacks = own.callbacks
                if options.log is not None:  # only the first of several processes calls it
                    callbacks = (*callbacks, stack.enter_context(closing(Log(options.log))))
                fit = learn(
                    model,
                    data,
                    settings,
                    checkpoint=options.checkpoint,
                    resume=options.resume,
                    overwrite=options.overwrite,
                    progress=options.progress,
                    name=options.name,
                    team=team,
                    inspect=int(options.inspect),
                    writer=writer,
                    threads=options.threads,
                    optimizer=own.optimizer,
                    scheduler=own.scheduler,
                    metrics=own.metrics,
                    callbacks=callbacks,
                )
            return model, fit, team.rank
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).partition("can't allocate memory: ")[2] or str(error)) from None
        raise


def check_memory(architecture: Architecture, width: int, outputs: int) -> None:
    """Raise `UsageError` if a model can't fit into this machine's memory, before it is made.

    Args:
        architecture: how the model is built.
        width: of its input.
        outputs: number of classes or of predicted numbers.
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
            f"units {units} don't fit into memory: their {numbers:,} weights need {takes / 1e9:,.1f} GB in training, "
            f"and this machine has {have / 1e9:,.1f} GB"
        )


def as_network(model: Any, metadata: dict[str, Any]) -> Network:
    """Return a trained model as a Network: `layer_0`, `layer_1` … are its layers, other names say what a node does."""
    nodes = model.to_nodes()
    kinds = [type(node).__name__ for node in nodes]
    layer = (f"layer_{n}" for n in count())
    names = [next(layer) if kind in RECURRENT else NODE_NAMES.get(kind, kind.lower()) for kind in kinds]
    names = [f"{name}_{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    return Network(tuple(nodes), tuple(names), metadata, _warn=False)
