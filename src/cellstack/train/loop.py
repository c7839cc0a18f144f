"""The fit loop: Adam, clipping, early stopping, checkpoints, Ctrl-C, one process or many.

Every random draw of a step is a function of (seed, epoch, step) alone. So a run repeats bit for bit, a resumed run
equals an unbroken one, and processes that share a batch draw the same numbers for it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cellstack import layers
from cellstack.formats.files import check_replaceable
from cellstack.inspect.monitor import TrainingMonitor
from cellstack.inspect.records import TrainingRecord
from cellstack.spec import FormatError
from cellstack.train import checkpoint as checkpoints
from cellstack.train.checks import UsageError
from cellstack.train.examples import Examples, Inputs, batches
from cellstack.train.model import Model
from cellstack.train.processes import Processes

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        epochs: most passes over the training part.
        batch: most examples in a step, over all processes.
        lr: Adam's rate in the first epoch; it falls to a hundredth along half a cosine.
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
        for name, least in {"epochs": 1, "batch": 1, "patience": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name, bound in {"lr": "> 0", "clip": "> 0", "noise": ">= 0", "offset": ">= 0"}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and bound == "> 0"):
                raise UsageError(f"expected {name} {bound} and finite, got {value}")
        if self.seed >= 2**63:  # as many as torch takes
            raise UsageError(f"expected seed < 2^63, got {self.seed}")


@dataclass
class Fit:
    """What a fit did. The model holds the best weights when it returns.

    Args:
        history: one entry an epoch: `epoch`, `lr`, `loss` and, with a validation part, `validation_loss` and the
            metric (`accuracy`, or `rmse` in the targets' units).
        best: the entry whose weights were kept; None before the first epoch was done.
        steps: steps of the optimiser.
        seconds: time spent in this call.
        interrupted: Ctrl-C ended it.
        checkpoint_error: why the last checkpoint could not be written; "" where it was, or none was asked for.
        records: what was seen of the layers, in the epochs that were looked at.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    checkpoint_error: str = ""
    records: list[TrainingRecord] = field(default_factory=list)


def fit(
    model: Model,
    inputs: Inputs,
    examples: Examples,
    training: Indices,
    validation: Indices,
    settings: Settings,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    team: Processes | None = None,
    inspect: int = 0,
    writer: Any = None,
) -> Fit:
    """Fit the model to the examples at `training`, keeping the weights that do best at `validation`.

    Args:
        model: its weights are the start, and afterwards the best found (the last, without a validation part).
        inputs: fills gaps; measured on the training part.
        examples: the data.
        training, validation: positions in `examples`; the latter may be empty.
        settings: how to fit.
        checkpoint: file that is written after every epoch and on Ctrl-C. Where that fails, as on a full disk, there is
            a warning, the checkpoint before stays, and the fit goes on.
        resume: go on from `checkpoint` where it exists.
        progress: show a bar with loss, metric, steps/s and time left on standard error.
        team: the processes that share each batch; this one alone where None.
        inspect: look at the layers in one epoch of so many, see `inspect.TrainingMonitor`; 0: never. What is trained is
            the same bit for bit. Of several processes the first one looks, at its own rows.
        writer: a `torch.utils.tensorboard.SummaryWriter` that gets what was seen.

    Returns:
        What happened. After Ctrl-C (SIGINT) too: the step is finished, then the loop ends; a second one raises.

    Raises:
        UsageError: nothing to train on, a loss that isn't finite, or a checkpoint of other settings, another model or
            other data.
        FormatError: a damaged checkpoint.
        OSError: `checkpoint` is where no file can be written, which is told before the first step.
    """
    if not len(training):
        raise UsageError("expected at least one example to train on, got none")
    team = team or Processes()
    if checkpoint is not None and team.rank == 0:
        check_replaceable(checkpoint)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _interruptible() as interrupt:
        run = _Run(model, inputs, examples, training, validation, settings, team)
        if inspect and team.rank == 0:
            run.monitor = TrainingMonitor(run.model, inspect, writer=writer)
        if resume and checkpoint is not None and Path(checkpoint).exists():
            run.restore(checkpoint)
        return run.go(checkpoint, progress, interrupt)


class _Run:
    """A fit under way."""

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        examples: Examples,
        training: Indices,
        validation: Indices,
        settings: Settings,
        team: Processes,
    ):
        self.inputs, self.examples, self.settings, self.team = inputs, examples, settings, team
        self.training, self.validation = training, validation
        self.model = model.to(team.device)
        self.wrapped = team.wrap(self.model)
        self.optimizer = torch.optim.Adam(model.parameters(), settings.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, settings.epochs, settings.lr / 100)
        self.result = Fit()
        self.best_weights: dict[str, Tensor] | None = None
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0.0]  # sums of weighted losses and of weights in this epoch
        self.per_epoch = len(self.batches(0))
        self.monitor: TrainingMonitor | None = None

    def batches(self, epoch: int) -> list[Indices]:
        """Return the epoch's batches, the same ones in every process and every run."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        return batches(self.examples.lengths, self.training, self.settings.batch, rng)

    def go(self, checkpoint: str | os.PathLike[str] | None, progress: bool, interrupt: threading.Event) -> Fit:
        """Run to the end, to early stopping or to Ctrl-C."""
        settings, result, started = self.settings, self.result, time.perf_counter()
        total, done = settings.epochs * self.per_epoch, self.epoch * self.per_epoch + self.step
        show = progress and self.team.rank == 0
        bar = tqdm(total=total, initial=done, unit="step", disable=not show, file=sys.stderr, dynamic_ncols=True)
        with bar, self.monitor or nullcontext():
            while self.epoch < settings.epochs and not self.stalled() and not result.interrupted:
                order = self.batches(self.epoch)
                while self.step < len(order) and not result.interrupted:
                    self.train(order[self.step])
                    self.step += 1
                    bar.update()
                    bar.set_postfix(self.shown(), refresh=False)
                    # Processes must leave at the same step, or the others would wait for ever.
                    result.interrupted = self.team.add([float(interrupt.is_set())])[0] > 0
                if self.step == len(order):
                    self.close_epoch()
                if checkpoint is not None and self.team.rank == 0:
                    self.save(checkpoint)
        result.steps = self.epoch * self.per_epoch + self.step
        result.seconds = time.perf_counter() - started
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return result

    def train(self, indices: Indices) -> None:
        """Take one step of the optimiser on the global batch `indices`, of which this process does its rows."""
        settings, size = self.settings, len(indices)
        draws = np.random.SeedSequence([settings.seed, self.epoch, self.step])
        torch.manual_seed(int(draws.generate_state(1)[0]))
        batch = self.examples.fetch(indices)
        x = self.augment(batch.x, np.random.default_rng(draws))
        rows, share = self.team.rows(size), 1.0
        if not len(rows):  # a process without a row joins the step all the same, with a row that counts for nothing
            rows, share = np.array([0]), 0.0
        self.model.dropout.rows = (torch.from_numpy(rows), size)
        self.model.train()
        out, mask = self.forward(self.wrapped, x[rows])
        weight, y = self.tensor(batch.weight[rows]) * share, self.tensor(batch.y[rows])
        total = max(float(batch.weight.sum()), 1e-12)
        mine = (self.model.losses(out, mask, y) * weight).sum() / total
        loss = mine * self.team.world  # gradients are averaged over the processes, and should be added
        for penalty in layers.losses(self.model):
            loss = loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        if not torch.isfinite(norm):
            noise = ", or less noise" if settings.noise or settings.offset else ""
            raise UsageError(
                f"the loss is no longer finite in epoch {self.epoch + 1}: try a smaller lr than {settings.lr}{noise}"
            )
        self.optimizer.step()
        layers.apply_constraints(self.model)
        self.model.dropout.rows = None
        for n, value in enumerate(self.team.add([float(mine.detach()) * total, total / self.team.world])):
            self.sums[n] += value

    def augment(self, x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return `x [B, T, I]` with the training's noise added."""
        for strength, shape in ((self.settings.noise, x.shape), (self.settings.offset, (len(x), 1, x.shape[2]))):
            if strength:
                x = x + rng.standard_normal(shape, np.float32) * (np.float32(strength) * self.inputs.scale)
        return x

    def close_epoch(self) -> None:
        """Validate, keep the weights where they are the best, and begin the next epoch."""
        entry = {"epoch": self.epoch + 1, "lr": self.schedule.get_last_lr()[0], "loss": self.sums[0] / self.sums[1]}
        record = None if self.monitor is None else self.monitor.epoch()
        if record is not None:
            self.result.records.append(record)
        if len(self.validation):
            entry.update(self.validate())
        best = self.result.best
        if not len(self.validation) or best is None or entry["validation_loss"] < best["validation_loss"]:
            self.result.best = entry
            self.best_weights = copy.deepcopy(self.model.state_dict())
        self.result.history.append(entry)
        self.schedule.step()
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the validation loss and the metric, each process having done its share of the batches."""
        self.model.eval()
        classify = self.model.task == "classify"
        sums = [0.0, 0.0, 0.0]  # weighted losses, weighted hits or squared errors, weights
        for indices in batches(self.examples.lengths, self.validation, 256)[self.team.rank :: self.team.world]:
            batch = self.examples.fetch(indices)
            out, mask = self.forward(self.model, batch.x)
            weight, y = self.tensor(batch.weight), self.tensor(batch.y)
            answer = self.model.answer(out, mask)
            score = (answer.argmax(1) == y).float() if classify else (answer - y).square()
            for n, value in enumerate((self.model.losses(out, mask, y) * weight, score * weight, weight)):
                sums[n] += float(value.sum(dtype=torch.float64))
        loss, score, weight = self.team.add(sums)
        weight = max(weight, 1e-12)
        return {"validation_loss": loss / weight} | (
            {"accuracy": score / weight} if classify else {"rmse": (score / weight) ** 0.5}
        )

    def forward(self, model: nn.Module, x: NDArray[np.float32]) -> tuple[Tensor, Tensor | None]:
        filled, used = self.inputs(x)
        mask = None if used is None else self.tensor(used)
        return model(self.tensor(filled), mask), mask

    def tensor(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.team.device)

    def shown(self) -> dict[str, str]:
        """Return what the bar shows beside steps/s and the time left."""
        shown = {"epoch": str(self.epoch + 1), "loss": f"{self.sums[0] / max(self.sums[1], 1e-12):.4f}"}
        last = self.result.history[-1] if self.result.history else {}
        return shown | {name: f"{last[name]:.4f}" for name in ("accuracy", "rmse") if name in last}

    def stalled(self) -> bool:
        """Return whether the validation loss has stopped falling."""
        best = self.result.best
        if best is None or not self.settings.patience or not len(self.validation):
            return False
        return self.epoch - best["epoch"] >= self.settings.patience

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from; arrays are there as digests."""
        model, inputs = self.model, self.inputs
        return {
            **asdict(self.settings),
            **{name: getattr(model, name) for name in ("task", "cell", "bidirectional", "pooling", "every_step")},
            "dropout": model.dropout.p,
            "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
            "inputs": _digest([inputs.mean, inputs.scale, np.array(inputs.observed, np.int64)]),
            "targets": _digest(value.cpu().numpy() for value in (model.targets.mean, model.targets.scale)),
            "training": self.digest(self.training),
            "validation": self.digest(self.validation),
        }

    def digest(self, indices: Indices) -> str:
        """Return a digest of the examples at `indices`, and of `indices`."""
        groups = batches(self.examples.lengths, indices, 256)
        return _digest(chain([indices], *(self.examples.fetch(group) for group in groups)))

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "position": [self.epoch, self.step, *self.sums],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best_weights": self.best_weights,
            "history": self.result.history,
            "best": self.result.best,
            "records": [record.to_json() for record in self.result.records],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint; work done isn't lost where that fails, so the fit goes on."""
        failed, self.result.checkpoint_error = self.result.checkpoint_error, ""
        try:
            checkpoints.save(path, self.state())
        except OSError as error:
            self.result.checkpoint_error = f"{os.fspath(path)}: {error.strerror or error}"
            if not failed:  # once, not after each epoch that follows
                said = f"the checkpoint could not be written, training goes on: {self.result.checkpoint_error}"
                warnings.warn(said, RuntimeWarning, stacklevel=2)

    def restore(self, path: str | os.PathLike[str]) -> None:
        state = checkpoints.load(path)
        for name, mine in self.fingerprint.items():
            found = state["fingerprint"].get(name)
            if found != mine:
                raise UsageError(f"{path}: expected {name} as in this training, {mine}, found {found}")
        try:
            self.epoch, self.step, *self.sums = state["position"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            # Checkpoints of 0.1.0 have none.
            self.result.records = [TrainingRecord.from_json(record) for record in state.get("records", [])]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = checkpoints.first_line(error)
            raise FormatError(
                f"{path}: expected the state of this training, found one that doesn't fit: {why}"
            ) from None
        self.best_weights = state["best_weights"]
        self.result.history, self.result.best = state["history"], state["best"]
        if self.monitor is not None:
            self.monitor.skip(self.epoch)


def _digest(arrays: Iterable[NDArray]) -> str:
    """Return a digest of the arrays' shapes and values; one NaN is as good as another."""
    digest = hashlib.sha256()
    for array in arrays:
        if array.dtype.kind == "f":
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets; the second one does what it always does.

    Where SIGINT is ignored, as in the background of a shell, it stays so.
    """
    event = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()  # signals reach no other
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
