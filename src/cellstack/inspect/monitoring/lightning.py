"""A callback for Lightning's Trainer."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cellstack.inspect.monitoring.monitor import TrainingMonitor

if TYPE_CHECKING:
    from cellstack.inspect.monitoring.records import TrainingRecord

NAMES = ("lightning.pytorch", "pytorch_lightning")  # the same library under two names


def lightning_callback(
    every_n_epochs: int = 1, every_n_train_steps: int | None = None, rows: int = 32, lags: int = 256
) -> Any:
    """Return a Lightning callback that inspects a model's layers during training: see `TrainingMonitor`.

    Every record goes to all of the Trainer's loggers (`log_metrics`), including TensorBoard's, and into the callback's
    `records`. With several processes, only the first one inspects, using its own rows.

    Args:
        every_n_epochs: inspect every n-th epoch.
        every_n_train_steps: inspect at every n-th optimiser step, instead of by epochs.
        rows, lags: see `TrainingMonitor`.

    Raises:
        ImportError: Lightning isn't installed.
        ValueError: a number below 1.

    >>> callback = lightning_callback(every_n_train_steps=500)  # Trainer(callbacks=[callback])
    >>> callback.records
    []
    """
    for name, number in (("every_n_epochs", every_n_epochs), ("every_n_train_steps", every_n_train_steps)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"lightning_callback: expected {name} as a whole number from 1 on, got {number!r:.80}")
    base: Any = _lightning().Callback

    class Monitoring(base):
        """A `TrainingMonitor` driven by the Trainer's epochs or steps."""

        def __init__(self) -> None:
            self.monitor: TrainingMonitor | None = None
            self.logged = 0  # the last optimiser step that was logged

        @property
        def records(self) -> list[TrainingRecord]:
            return [] if self.monitor is None else self.monitor.records

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                every = 1 if every_n_train_steps else every_n_epochs
                self.monitor = TrainingMonitor(pl_module, every, rows, lags)
                self.logged = trainer.global_step
                if not every_n_train_steps and trainer.current_epoch:  # resumed training
                    self.monitor.skip(trainer.current_epoch)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # Where gradients are accumulated, several batches are one step.
            if every_n_train_steps and trainer.global_step >= self.logged + every_n_train_steps:
                self.logged = trainer.global_step
                self._log(trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not every_n_train_steps:
                self._log(trainer)

        def _log(self, trainer: Any) -> None:
            record = None if self.monitor is None else self.monitor.epoch()
            if record is not None:
                for logger in trainer.loggers:
                    logger.log_metrics(record.scalars(), step=trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def _close(self) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return Monitoring()


def _lightning() -> Any:
    """Return the library under the name that the program already imported, else under an installed one."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        if name in sys.modules or find_spec(name.partition(".")[0]):
            return import_module(name)
    raise ImportError("lightning_callback needs Lightning: pip install lightning")
