"""How a model is built, how it is fitted, and how the training is run. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from cellstack.train.cell_names import check_cell
from cellstack.train.checks import UsageError

POOLINGS = ("mean", "max", "last", "none")


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        epochs: maximum number of passes over the training part.
        batch: batch size, over all processes.
        lr: learning rate in the first epoch; the default scheduler lowers it to a hundredth along half a cosine.
        clip: largest norm of all gradients together.
        patience: epochs without a lower validation loss before the fit stops; 0: never stop early.
        noise: standard deviation of noise that training adds to each input, in units of its channel's scale.
        offset: likewise, for noise that is constant over a sequence and channel: a varying sensor, place or level.
        seed: of all random numbers; below 2^63.

    Raises:
        UsageError: a setting out of range.
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
        for field in fields(Settings):
            check_number(field.name, getattr(self, field.name), whole=isinstance(field.default, int))
        for name, least in {"epochs": 1, "batch": 1, "patience": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name, bound in {"lr": "> 0", "clip": "> 0", "noise": ">= 0", "offset": ">= 0"}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and bound == "> 0"):
                raise UsageError(f"expected {name} {bound} and finite, got {value}")
        if self.seed >= 2**63:  # torch's limit
            raise UsageError(f"expected seed < 2^63, got {self.seed}")


def epochs_of(settings: Settings, validates: bool) -> tuple[int, int, bool]:
    """Return the fewest and the most epochs of a fit, and whether it has a validation part."""
    early = settings.patience + 1 if validates and settings.patience else settings.epochs
    return min(early, settings.epochs), settings.epochs, validates


def widths_of(units: int | Sequence[int]) -> tuple[int, ...]:
    """Return the units of each layer, given as one number or as several."""
    several: Any = units  # a string isn't a sequence of numbers
    return tuple(several) if isinstance(units, Iterable) and not isinstance(units, str) else (several,)


def check_layers(
    units: tuple[int, ...], cell: str, heads: int | None, dropout: float, bidirectional: bool = False
) -> None:
    """Raise `UsageError` if recurrent layers can't be made with these options."""
    whole = [isinstance(size, Integral) and not isinstance(size, bool) and size >= 1 for size in units]
    if not whole or not all(whole):
        given = ", ".join(map(repr, units)) or "none"
        raise UsageError(f"expected units to be integers of at least 1, one for each layer, got {given}")
    check_cell(units, cell, heads, bidirectional)
    check_number("dropout", dropout, whole=False)
    if not 0.0 <= dropout < 1.0:
        raise UsageError(f"expected dropout in [0, 1), got {dropout}")


def check_number(name: str, value: Any, whole: bool) -> None:
    """Raise `UsageError` if a setting isn't a number, or isn't an integer although `whole`."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise UsageError(f"expected {name} to be {'an integer' if whole else 'a number'}, got {value!r:.80}")


@dataclass(frozen=True)
class Architecture:
    """How a model is built: see `Model`.

    Args:
        units: units of each layer, first layer first.
        bidirectional, dropout, pooling, every_step, cell, heads: see `Model`.
        head: a `torch.nn.Module` from pooled states `[B, W]` to `[B, O]`, instead of one dense layer.
        loss: a function of the model's output (logits or standardised predictions) and of the targets (class indices or
            standardised numbers) that returns each example's loss, `[B]` or in the targets' shape.
        init: a network, or the file of one, whose weights are the initial ones.

    Raises:
        UsageError: an option out of range, or a loss that isn't a function.
    """

    units: tuple[int, ...]
    bidirectional: bool = False
    dropout: float = 0.0
    pooling: str = "mean"
    every_step: bool = False
    cell: str = "lstm"
    heads: int | None = None
    head: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    init: Any = None

    def __post_init__(self) -> None:
        check_layers(self.units, self.cell, self.heads, self.dropout, self.bidirectional)
        if self.pooling not in POOLINGS:
            raise UsageError(f"expected pooling to be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        check_function("loss", self.loss, "torch.nn.MSELoss(reduction='none')")


@dataclass(frozen=True, kw_only=True)
class FitOptions(Settings):
    """How a model is fitted: the `Settings`, how the training is run, and the user's own parts of it.

    Args:
        validation: share of the training part held out for early stopping; 0 for none.
        checkpoint, resume, overwrite, threads, inspect: see `learn`.
        progress: likewise; or a `progress.Bar` that several fits share.
        device: see `processes`.
        events: folder for the TensorBoard events of `inspect`, if TensorBoard is installed; None for none.
        log: where to write each epoch's metrics as it ends: a .csv or .json file, or a folder for TensorBoard.
        name: a label before the progress bar, if several models are trained.
        timing: only measure how long training takes: `fitted` raises `Timed` instead of fitting.
        metrics: by name, functions of the true values and the predictions over the whole validation part, as labels or
            as numbers in the targets' units, that return a number.
        optimizer: a function of the parameters that returns a `torch.optim.Optimizer`; None = Adam.
        scheduler: a function of the optimiser that returns a scheduler, stepped once per epoch; or `"constant"` or
            `"cosine"`.
        callbacks: called after every epoch, see `learn`.

    Raises:
        UsageError: a setting out of range, or an argument that isn't a function, a mapping or a list of functions,
            where one is needed.
    """

    validation: float = 0.15
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False
    overwrite: bool = False
    progress: Any = None
    device: str = "auto"
    inspect: int = False
    events: str | os.PathLike[str] | None = None
    threads: int | None = None
    log: str | os.PathLike[str] | None = None
    name: str = ""
    timing: bool = False
    metrics: Mapping[str, Callable[[Any, Any], float]] | None = None
    optimizer: Callable[[Any], Any] | None = None
    scheduler: Callable[[Any], Any] | str = "cosine"
    callbacks: Sequence[Callable[[Any], Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.validation < 1.0:
            raise UsageError(f"expected validation to be a share in [0, 1), got {self.validation}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"expected threads >= 1, got {self.threads}")
        if self.resume and self.checkpoint is None:
            raise UsageError("expected a checkpoint to resume from, got none")
        check_function("optimizer", self.optimizer, "lambda parameters: torch.optim.SGD(parameters, lr=0.1)")
        if self.metrics is not None and not isinstance(self.metrics, Mapping):
            raise UsageError(
                f"expected metrics to be functions by name, such as {{'f1': f1_score}}, got {self.metrics!r:.60}"
            )
        if not isinstance(self.callbacks, Sequence) or not all(map(callable, self.callbacks)):
            raise UsageError(f"expected callbacks to be a list of functions, got {self.callbacks!r:.60}")


R = TypeVar("R")


def record_of(kind: type[R], given: Mapping[str, Any], **more: Any) -> R:
    """Return a record whose fields are those of `given` and `more` with the same names; other entries are ignored."""
    values = {**given, **more}
    return kind(**{field.name: values[field.name] for field in fields(cast(Any, kind)) if field.name in values})


def check_function(name: str, value: Any, example: str) -> None:
    """Raise `UsageError` if a value is neither None nor a function."""
    if value is not None and not callable(value):
        raise UsageError(f"expected {name} to be a function, such as {example}, got {value!r:.60}")
