"""A model made and fitted as the options say, and what comes of it: whatever it learns."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cellstack.network import Network
from cellstack.spec import CellSpec
from cellstack.train.checks import UsageError
from cellstack.train.examples import Data
from cellstack.train.history import Log, event_writer
from cellstack.train.learner import Fit
from cellstack.train.loop import learn
from cellstack.train.processes import processes
from cellstack.train.settings import Architecture, Own, RunOptions, Settings

COPIES = 4  # of each weight that training keeps at least: itself, its gradient, and two moments of Adam
RECURRENT = ("Recurrent", "Bidirectional")
NODE_NAMES = {"Standardise": "standardise", "GlobalPool": "pool", "Dense": "head"}


@dataclass
class Result:
    """A trained network.

    Args:
        network: the network, its metadata filled in; it needs no torch.
        model: the same as a torch module.
        fit: what the fit did.
        scores: what was measured on held-out data, see `predict`; {} where there was none.
        rank: number of this process among those that trained; 0 is the one that writes and prints.
        validated: how many examples the validation part has.
        told: what `sentence` is, where several fits made the network.
    """

    network: Network
    model: Any
    fit: Fit
    scores: dict[str, Any]
    rank: int = 0
    validated: int = 0
    told: str = ""

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry an epoch: see `Fit`."""
        return self.fit.history

    @property
    def labels(self) -> tuple[Any, ...]:
        """The classes, in the order of the network's answers; () where it answers with numbers."""
        return tuple(self.network.metadata.get("labels", ()))

    @property
    def sentence(self) -> str:
        """What stopped the training, which epoch is kept, and how well it does on what was never trained on."""
        return self.told or "; ".join(part for part in (self._stopped(), self._kept(), self._measured()) if part)

    def _stopped(self) -> str:
        done, fit = len(self.fit.history), self.fit
        how = {
            "epochs": f"trained for all {_count(done, 'epoch')}",
            "patience": f"stopped after {_count(done, 'epoch')}, as the validation loss had not fallen for "
            f"{done - fit.best['epoch'] if fit.best else 0}",
            "ctrl-c": f"stopped by Ctrl-C after {_count(done, 'whole epoch')}",
            "callback": f"stopped by a callback after {_count(done, 'epoch')}",
        }
        return how[fit.stopped]

    def _kept(self) -> str:
        best = self.fit.best
        if best is None:
            return "no epoch came to its end: the weights are those of the last step"
        why = "whose validation loss is the lowest" if "validation_loss" in best else "the last, as none was held out"
        return f"kept is epoch {best['epoch']}, {why}"

    def _measured(self) -> str:
        best, names = self.fit.best, ("accuracy", "mae", "rmse", "bits_per_character")
        scored = [f"{name.replace('_', ' ')} {self.scores[name]:.4g}" for name in names if name in self.scores]
        if scored:
            return f"on the test part, which was never trained on: {', '.join(scored)}"
        if best is None or "validation_loss" not in best:
            return "nothing was held out to measure it on"
        found = [f"{name.replace('_', ' ')} {best[name]:.4g}" for name in names if name in best]
        found = ", ".join(found or [f"loss {best['validation_loss']:.4g}"])
        return (
            f"on the {_count(self.validated, 'validation example')}, never trained on, which chose the epoch: {found}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def fitted(
    make: Callable[[], Any], data: Data, settings: Settings, options: RunOptions, own: Own = Own()
) -> tuple[Any, Fit, int]:
    """Make a model and fit it; returns it, what the fit did, and this process's rank.

    Args:
        make: makes the model, a `Learner`; its draws are those of the seed.
        data: what it learns from.
        settings, options: how.
        own: the optimiser, scheduler, metrics and callbacks; the rest of it is for `make` to heed.

    Raises:
        UsageError: see `learn`.
        MemoryError: torch can't have the memory that a step takes.
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
                if options.log is not None:  # of several processes the first one calls it
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


def as_network(model: Any, metadata: dict[str, Any]) -> Network:
    """Return a trained model as a Network, its nodes named by what they are for."""
    nodes = model.to_nodes()
    kinds = [type(node).__name__ for node in nodes]
    names = [
        f"recurrent_{n}" if kind in RECURRENT else NODE_NAMES.get(kind, kind.lower()) for n, kind in enumerate(kinds)
    ]
    names = [f"{name}_{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    return Network(tuple(nodes), tuple(names), metadata, _warn=False)
