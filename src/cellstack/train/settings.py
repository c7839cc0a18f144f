"""How a model is built, how it is fitted, and how the training is run. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from cellstack.train.checks import UsageError


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        epochs: most passes over the training part.
        batch: most examples in a step, over all processes.
        lr: the rate in the first epoch; without a scheduler of one's own it falls to a hundredth along half a cosine.
        clip: largest norm of all gradients together.
        patience: epochs without a better validation loss before the fit stops; 0 never stops early.
        noise: standard deviation of noise that training adds to each input, in units of its channel's scale.
        offset: the same for noise that is drawn once a sequence and channel: another speaker's place, sensor or level.
        seed: fixes every draw; below 2^63.

    Raises:
        UsageError: a setting out of its range.
    """

    epochs: int = 60
    batch: int = 16
    lr: float = 5e-3
    clip: float = 1.0
    patience: int = 20
    noise: float = 0.0
    offset: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), whole=isinstance(field.default, int))
        for name, least in {"epochs": 1, "batch": 1, "patience": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name, bound in {"lr": "> 0", "clip": "> 0", "noise": ">= 0", "offset": ">= 0"}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and bound == "> 0"):
                raise UsageError(f"expected {name} {bound} and finite, got {value}")
        if self.seed >= 2**63:  # as many as torch takes
            raise UsageError(f"expected seed < 2^63, got {self.seed}")


def check_number(name: str, value: Any, whole: bool) -> None:
    """Raise `UsageError` where a setting is no number, or where it has to be `whole` no integer."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise UsageError(f"expected {name} to be {'an integer' if whole else 'a number'}, got {value!r:.80}")


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
        checkpoint, resume, overwrite, progress, threads: see `learn`.
        device: see `processes`.
        inspect: look at the layers in each epoch, see `learn`.
        events: folder that then gets TensorBoard's events, where TensorBoard is installed; None for none.
        log: where each epoch's figures go as it ends: a file that ends in .csv or .json, or a folder for TensorBoard.
        name: what stands before the progress bar, where several models are trained.

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
    overwrite: bool = False
    threads: int | None = None
    log: str | os.PathLike[str] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise UsageError(f"expected validation in [0, 1), got {self.validation}")
        if self.resume and self.checkpoint is None:
            raise UsageError("expected a checkpoint to resume from, got none")


@dataclass(frozen=True)
class Own:
    """What a user brings in place of, or beside, what there is.

    Args:
        head: a `torch.nn.Module` from pooled states `[B, W]` to `[B, O]`, in place of one dense layer.
        loss: a callable of what the model gives, logits or standardised numbers, and of the targets: class positions or
            standardised numbers; returns each example's loss, `[B]` or in the targets' shape.
        metrics: by name, callables of the truth and of what was predicted over the whole validation part, as labels or
            numbers in the targets' units; return one number.
        optimizer: a callable of the parameters that returns a `torch.optim.Optimizer`; Adam where None.
        scheduler: a callable of the optimiser that returns a scheduler, stepped once an epoch; `"constant"`, or
            `"cosine"`.
        callbacks: called after every epoch, see `learn`.
        init: a network, or the file of one, whose weights are the start.
    """

    head: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], float]] | None = None
    optimizer: Callable[[Any], Any] | None = None
    scheduler: Callable[[Any], Any] | str = "cosine"
    callbacks: Sequence[Callable[[Any], Any]] = ()
    init: Any = None
