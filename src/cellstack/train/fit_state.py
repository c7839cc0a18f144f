"""The state of a fit: the model and what trains it, its position, its results; its checkpoints."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cellstack.cells.errors import FormatError
from cellstack.inspect.monitoring.monitor import TrainingMonitor
from cellstack.inspect.monitoring.records import TrainingRecord
from cellstack.train import checkpoint as checkpoints
from cellstack.train.checks import UsageError
from cellstack.train.examples import Data
from cellstack.train.learner import Fit
from cellstack.train.model import Random
from cellstack.train.options import FitOptions, Optimisation, declared
from cellstack.train.processes import Processes


class FitState:
    """The state of a fit, from its beginning or from a checkpoint."""

    def __init__(self, model: Any, data: Data, options: FitOptions, team: Processes):
        self.data, self.options, self.team = data, options, team
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.model = model.to(team.device)
        self.wrapped = team.wrap(self.model)
        make = options.optimizer or partial(torch.optim.Adam, lr=options.lr)
        self.optimizer = make(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.schedule = _schedule(options.scheduler, self.optimizer, options.epochs)
        self.random = [module for module in model.modules() if isinstance(module, Random)]
        self.selects = data.validates and options.selects
        self.result = Fit(selects=self.selects)
        self.best_weights: dict[str, Tensor] | None = None
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0.0]  # sums of weighted losses and of weights in this epoch
        self.figures: dict[str, float] = {}  # of the last epoch, on the validation part
        self.monitor: TrainingMonitor | None = None
        self.metrics = dict(options.metrics or {})
        self.called_off = False  # by a callback

    @property
    def carried(self) -> Any:
        """The state that the model carries from batch to batch; None for a model that carries none."""
        return getattr(self.model, "carried", None)

    @carried.setter
    def carried(self, state: Any) -> None:
        if hasattr(self.model, "carried"):
            self.model.carried = state

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same to resume from a checkpoint; the number of epochs may differ."""
        settings = {name: getattr(self.options, name) for name in declared(Optimisation)}
        del settings["epochs"]
        return {
            **settings,
            **self.model.describe(),
            "shapes": {name: list(value.shape) for name, value in self.model.state_dict().items()},
            **self.data.describe(),
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.schedule).__name__,
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {
            "fingerprint": self.fingerprint,
            "position": [self.epoch, self.step, *self.sums],
            "epochs": self.options.epochs,
            "called_off": self.called_off,
            "threads": self.result.threads,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "carried": self.carried,
            "best_weights": self.best_weights,
            "history": self.result.history,
            "best": self.result.best,
            "records": [record.to_json() for record in self.result.records],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint; if that fails, warn, and let the fit continue."""
        failed, self.result.checkpoint_error = self.result.checkpoint_error, ""
        try:
            checkpoints.save(path, self.state())
        except OSError as error:
            self.result.checkpoint_error = f"{os.fspath(path)}: {error.strerror or error}"
            if not failed:  # warn once, not after each following epoch
                said = f"the checkpoint could not be written, training continues: {self.result.checkpoint_error}"
                warnings.warn(said, RuntimeWarning, stacklevel=2)

    def restore(self, path: str) -> None:
        """Load a checkpoint, with its number of threads unless one is given."""
        state = checkpoints.load(path)
        for name, mine in self.fingerprint.items():
            found = state["fingerprint"].get(name)
            if found != mine:
                raise UsageError(
                    f"{path}: expected a checkpoint with {name} {mine}, as in this training, found {found}"
                )
        try:
            self.epoch, self.step, *self.sums = state["position"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if hasattr(self.model, "carried"):
                self.carried = pytree.tree_map_only(Tensor, lambda one: one.to(self.team.device), state["carried"])
            self.result.records = [TrainingRecord.from_json(record) for record in state["records"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = checkpoints.first_line(error)
            raise FormatError(f"{path}: the checkpoint doesn't fit this training: {why}") from None
        if self.options.callbacks and state["epochs"] == self.options.epochs:
            self.called_off = state["called_off"]
        if self.options.scheduler == "cosine" and state["epochs"] != self.options.epochs:
            self.extend(state["epochs"])
        self.best_weights = state["best_weights"]
        self.result.history, self.result.best = state["history"], state["best"]
        self.result.resumed = self.epoch
        if self.options.threads is None and self.team.world == 1 and self.team.device.type == "cpu":
            self.result.threads = state["threads"]
            torch.set_num_threads(max(state["threads"], 1))
        if self.monitor is not None:
            self.monitor.skip(self.epoch)

    def extend(self, before: int) -> None:
        """Continue with the learning rate of a run of `options.epochs`, if the checkpoint was for another number."""
        epochs, state = self.options.epochs, self.schedule.state_dict()
        least, share = state["eta_min"], (1 + math.cos(math.pi * min(self.epoch / epochs, 1.0))) / 2
        rates = [least + (base - least) * share for base in state["base_lrs"]]
        self.schedule.load_state_dict({**state, "T_max": epochs, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.result.notes.append(
            f"the checkpoint is of a training of {before} epochs: from epoch {self.epoch + 1} on, the learning rate is "
            f"that of a training of {epochs} epochs, now {rates[0]:.3g}"
        )


def _schedule(
    given: Callable[[torch.optim.Optimizer], Any] | str, optimizer: torch.optim.Optimizer, epochs: int
) -> Any:
    if callable(given):
        return given(optimizer)
    if given == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 0)
    if given == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, optimizer.param_groups[0]["lr"] / 100)
    raise UsageError(f"expected scheduler to be cosine, constant or a callable of the optimizer, got {given!r}")
