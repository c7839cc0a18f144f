"""The fit loop, for any model and data that follow a small protocol: see `learner.Learner` and `examples.Data`.

Adam or another optimiser, clipping, early stopping, checkpoints, Ctrl-C, one process or many. The random numbers of a
step depend only on (seed, epoch, step). So a run is reproducible bit for bit, a resumed run equals an uninterrupted
one, and processes that share a batch draw the same numbers for it.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellstack import layers
from cellstack.formats.files import check_replaceable
from cellstack.inspect.monitoring.monitor import TrainingMonitor
from cellstack.train import threads
from cellstack.train.checks import UsageError, refuse_existing
from cellstack.train.examples import Batch, Data
from cellstack.train.fit_state import FitState
from cellstack.train.interrupt import interruptible
from cellstack.train.learner import Cost, Epoch, Fit
from cellstack.train.locks import locked
from cellstack.train.options import FitOptions
from cellstack.train.processes import Processes
from cellstack.train.progress import Bar, opened

TIMED = 3  # batches on which the number of threads is chosen
TIMED_SECONDS = 1.0  # how long `cost_of_fit` trains


def learn(
    model: Any, data: Data, options: FitOptions = FitOptions(), team: Processes | None = None, writer: Any = None
) -> Fit:
    """Fit a model to data, and keep the weights of the best epoch on the validation part.

    Args:
        model: a module that is a `Learner`. Training starts from its weights, and sets them to the best ones found
            (the last, without a validation part).
        data: the batches.
        options: how to fit. If a `checkpoint` can't be written, for example because the disk is full, there is a
            warning, the previous one is intact, and the fit continues. A resumed run may have more epochs: from then on
            the learning rate is that of a run of so many epochs; one that a callback stopped stays stopped, unless
            there are more epochs or no callbacks. It has the checkpoint's number of `threads`, because another number
            changes the last bits. `metrics` get classes `[M]` or numbers `[M, O]`, as in `y`, and `[M, O]`, as returned
            by the model's `answer(out, mask)`; M is the number of sequences, or of all their steps. `inspect` may be a
            number n, for every n-th epoch, see `inspect.TrainingMonitor`; the weights are the same bit for bit. With
            several processes, the first one shows the progress bar, inspects its own rows, and calls the callbacks.
        team: the processes that share each batch; None = this one only.
        writer: a `torch.utils.tensorboard.SummaryWriter` for the records of `inspect`.

    Returns:
        The course of the fit. After Ctrl-C (SIGINT) the loop finishes the step and returns; a second one raises.

    Raises:
        UsageError: no training data; a loss that isn't finite; a checkpoint that exists without `resume` or
            `overwrite`, that another training is writing, or that has other options, another model or other data.
        FormatError: a damaged checkpoint.
        OSError: the checkpoint can't be written, checked before the first step.
    """
    team = team or Processes()
    path, first = None if options.checkpoint is None else os.fspath(options.checkpoint), team.rank == 0
    if path is not None and first:
        check_replaceable(path)
    if hasattr(model, "carried") and team.world > 1:
        raise UsageError("a model that carries its state from batch to batch can't be trained by several processes")
    with (
        locked(path if first else None),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        threads.restored(),
        interruptible() as interrupt,
    ):
        if path is not None and not (options.resume or options.overwrite):
            refuse_existing(path)
        run = _Run(model, data, options, team)
        if options.inspect and first:
            run.monitor = TrainingMonitor(run.model, options.inspect, writer=writer)
        if path is not None and Path(path).exists() and not options.overwrite:
            run.restore(path)
        with opened(options.progress, hidden=not first) as bar:
            return run.go(bar, interrupt)


def cost_of_fit(model: Any, data: Data, options: FitOptions, team: Processes) -> Cost:
    """Train a model for about a second, to measure how long a fit takes; see `fit` for the arguments."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), threads.restored():
        run = _Run(model, data, options, team)
        run.carried = None
        if options.threads is None and team.device.type == "cpu" and torch.get_num_threads() > 1:
            run.time(list(islice(data.epoch(0), TIMED)), options.epochs * data.steps)
        batches = data.epoch(0)
        run.train(next(batches))  # warms up
        started, done, took = time.perf_counter(), 0, 0.0
        for batch in chain(batches, data.epoch(1)):
            run.train(batch)
            done, took = done + 1, time.perf_counter() - started
            if took > TIMED_SECONDS:
                break
        started = time.perf_counter()
        if data.validates:
            run.validate()
        return Cost(took / max(done, 1), time.perf_counter() - started, data.steps)


class _Run(FitState):
    """A fit."""

    def go(self, bar: Bar, interrupt: threading.Event) -> Fit:
        """Run until the end, early stopping or Ctrl-C."""
        options, result, started = self.options, self.result, time.perf_counter()
        per_epoch = self.data.steps
        total, done = options.epochs * per_epoch, self.epoch * per_epoch + self.step
        bar.begin(options.name, options.epochs, per_epoch, done)
        measure = options.threads is None and not result.threads
        measure = measure and self.team.world == 1 and self.team.device.type == "cpu"
        with self.monitor or nullcontext():
            while not result.stopped and not self.ended():
                if self.step == 0:
                    self.carried = None
                batches = self.data.epoch(self.epoch, self.step)
                if measure and torch.get_num_threads() > 1:
                    first = list(islice(batches, TIMED))
                    result.timed = self.time(first, total - done)
                    batches = chain(first, batches)
                measure = False
                for batch in batches:
                    self.train(batch)
                    self.step += 1
                    bar.step(self.epoch + 1, self.sums[0] / max(self.sums[1], 1e-12))
                    # Processes must stop at the same step, or the others would wait forever.
                    if self.team.add([float(interrupt.is_set())])[0] > 0:
                        result.stopped = "ctrl-c"
                        break
                if self.step == per_epoch:
                    self.close_epoch()
                    bar.validated(self.figures)
                elif not result.stopped:
                    raise UsageError(
                        f"expected {per_epoch} batches in every epoch, got {self.step} in epoch {self.epoch + 1}: "
                        "data must have the same batches in each"
                    )
                result.threads = torch.get_num_threads()
                if options.checkpoint is not None and self.team.rank == 0:
                    self.save(options.checkpoint)
        result.stopped = result.stopped or self.ended()
        bar.end(completed=not result.interrupted)
        result.steps = self.epoch * per_epoch + self.step
        result.threads = torch.get_num_threads()
        result.seconds = time.perf_counter() - started
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return result

    def loss(self, batch: Batch, share: float = 1.0, rows: NDArray[np.int64] | None = None) -> tuple[Tensor, float]:
        """Return the weighted losses of a global batch's `rows`, summed and divided by the total weight, and that."""
        size = len(batch.weight)
        rows = np.arange(size) if rows is None else rows
        for part in self.random:
            part.rows = (torch.from_numpy(rows), size)
            part.progress = (self.epoch + self.step / self.data.steps) / self.options.epochs
        self.model.train()
        mine = batch if len(rows) == size else pytree.tree_map_only(np.ndarray, lambda a: a[rows], batch)
        x, y, weight, mask = self.tensors(mine)
        out = self.wrapped(x, mask)
        total = max(float(batch.weight.sum()), 1e-12)
        each = self.model.losses(out, mask, y)
        if each.shape != weight.shape:
            raise UsageError(
                f"expected a loss that returns one number per target, in the shape {tuple(weight.shape)}, got "
                f"{tuple(each.shape)}: use reduction='none' with torch's losses"
            )
        loss = (each * (weight * share)).sum() / total
        for part in self.random:
            part.rows = None
        return loss, total

    def train(self, batch: Batch) -> None:
        """Take one optimiser step on a global batch; this process computes its own rows."""
        options = self.options
        draws = np.random.SeedSequence([options.seed, self.epoch, self.step])
        # torch.manual_seed takes 0.3 ms, as it also seeds the generators of devices that this process doesn't use.
        seeded = torch.manual_seed if self.team.device.type != "cpu" else torch.default_generator.manual_seed
        seeded(int(draws.generate_state(1)[0]))
        rows, share = self.team.rows(len(batch.weight)), 1.0
        if not len(rows):  # a process without rows must join the step too: with a row of weight 0
            rows, share = np.array([0]), 0.0
        mine, total = self.loss(batch, share, rows)
        loss = mine * self.team.world  # gradients are averaged over the processes, and should be added
        for penalty in layers.losses(self.model):
            loss = loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        if not torch.isfinite(norm):
            raise UsageError(
                f"the loss is no longer finite in epoch {self.epoch + 1}: try a smaller lr than {options.lr}"
            )
        self.optimizer.step()
        layers.apply_constraints(self.model)
        self.carried = _cut_off(self.carried)
        for n, value in enumerate(self.team.add([float(mine.detach()) * total, total / self.team.world])):
            self.sums[n] += value

    def time(self, batches: list[Batch], left: int) -> dict[int, float]:
        """Choose the number of threads on some batches, without side effects: see `threads.fastest`."""
        carried = self.carried
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def passes(batch: Batch) -> None:
            self.loss(batch)[0].backward()
            self.carried = carried

        if self.monitor is not None:
            self.monitor.close()  # it records the first gradient that it sees, which must be a training step's
        took = threads.fastest([partial(passes, batch) for batch in batches], left)
        if self.monitor is not None:
            self.monitor.skip(0)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        return took

    def close_epoch(self) -> None:
        """Validate, keep the weights if they are the best, and start the next epoch."""
        rate = self.optimizer.param_groups[0]["lr"]
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "lr": float(rate), "loss": self.sums[0] / self.sums[1]}
        record = None if self.monitor is None else self.monitor.epoch()
        if record is not None:
            self.result.records.append(record)
        if self.data.validates:
            self.figures = self.validate()
            entry.update(self.figures)
        best = self.result.best
        if not self.selects or best is None or entry["validation_loss"] < best["validation_loss"]:
            self.result.best = entry
            self.best_weights = copy.deepcopy(self.model.state_dict())
        self.result.history.append(entry)
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(entry.get("validation_loss", entry["loss"]))
        else:
            self.schedule.step()
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0]
        stop = False
        if self.options.callbacks and self.team.rank == 0:
            self.model.eval()
            for callback in self.options.callbacks:  # call all, even if one returns True
                stop = bool(callback(Epoch(entry, self.model, self.result))) or stop
        if self.options.callbacks and self.team.add([float(stop)])[0] > 0:
            self.called_off = True

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Compute the validation loss and the metrics; each process computes its share of the batches."""
        self.model.eval()
        carried, self.carried = self.carried, None
        sums: dict[str, float] = {"": 0.0, " ": 0.0}  # weighted losses and weights, by names that no model uses
        whole: list[tuple[NDArray, NDArray]] = []
        for batch in islice(self.data.held(), self.team.rank, None, self.team.world):
            x, y, weight, mask = self.tensors(batch)
            out = self.model(x, mask)
            found = {"": self.model.losses(out, mask, y) * weight, " ": weight}
            found |= self.model.measure(out, mask, y, weight)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum(dtype=torch.float64))
            if self.metrics:
                whole.append(_flat(batch, self.model.answer(out, mask).cpu().numpy()))
        self.carried = carried
        gathered = self.team.gather((sums, whole))  # a process without a batch has no sums of the model
        names = dict.fromkeys(chain.from_iterable(theirs for theirs, _ in gathered))
        sums = {name: sum(theirs.get(name, 0.0) for theirs, _ in gathered) for name in names}
        loss, weight = sums.pop(""), sums.pop(" ")
        figures = {"validation_loss": loss / max(weight, 1e-12), **self.model.measured(sums)}
        for name, metric in self.metrics.items():
            pairs = chain.from_iterable(theirs for _, theirs in gathered)
            figures[name] = float(metric(*map(np.concatenate, zip(*pairs, strict=True))))
        return figures

    def tensors(self, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """Return x, y, weight and mask as tensors on this process's device."""
        x, y, weight, mask = pytree.tree_map_only(
            np.ndarray, lambda array: torch.from_numpy(array).to(self.team.device), tuple(batch)
        )
        return x, y, weight, mask

    def ended(self) -> str:
        """Return why there is no further epoch; "" if there is one."""
        if self.called_off:
            return "callback"
        if self.epoch >= self.options.epochs:
            return "epochs"
        best, patience = self.result.best, self.options.patience
        if best is not None and patience and self.selects and self.epoch - best["epoch"] >= patience:
            return "patience"
        return ""


def _flat(batch: Batch, answers: NDArray) -> tuple[NDArray, NDArray]:
    """Return the true values and predictions of nonzero weight, `[M]` classes or `[M, O]` numbers, and `[M, O]`."""
    classes = batch.y.dtype.kind in "iu"
    truth, weight = (array.reshape(-1) if classes else array.reshape(-1, array.shape[-1]) for array in batch[1:3])
    counts = weight > 0 if classes else (weight > 0).any(axis=-1)
    return truth[counts], answers.reshape(-1, answers.shape[-1])[counts]


def _cut_off(state: Any) -> Any:
    """Return a state detached from its graph, in plain containers, as in a checkpoint."""
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        return type(state)(map(_cut_off, state)) if type(state) is list else tuple(map(_cut_off, state))
    return {name: _cut_off(part) for name, part in state.items()} if isinstance(state, dict) else state
