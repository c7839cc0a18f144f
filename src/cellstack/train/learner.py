"""The fit loop's interfaces: the model's protocol, the argument of callbacks, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cellstack.inspect.monitoring.records import TrainingRecord
from cellstack.train.history import named

STOPPED = {
    "": "not finished",
    "epochs": "all of them",
    "patience": "stopped early",
    "ctrl-c": "stopped by Ctrl-C",
    "callback": "stopped by a callback",
}


class Learner(Protocol):
    """The methods that a `torch.nn.Module` needs to be fitted.

    `forward(x, mask)` returns the argument `out` of the other methods; x and mask are those of a `Batch`, as tensors.

    A model that carries a state from batch to batch, as in truncated backpropagation, also has an attribute `carried`:
    tensors in tuples, lists or dicts, or None. The loop sets it to None at the start of an epoch and for the validation
    part; `forward` reads it and stores the state after the batch in it. The loop detaches it from its graph after each
    step and saves it in the checkpoint, with NamedTuples as plain tuples, so that a resumed run continues from it.
    """

    def losses(self, out: Any, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return each target's loss, in the shape of the batch's `weight`."""
        ...

    def measure(self, out: Any, mask: Tensor | None, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return sums over a batch of the validation part, to be added up over batches and processes."""
        ...

    def measured(self, sums: dict[str, float]) -> dict[str, float]:
        """Compute the metrics from the sums; return them by their names in the history."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values that must match a checkpoint's model, in addition to the shapes of the weights."""
        ...


class Epoch(NamedTuple):
    """The argument of a callback, after an epoch.

    `entry` is the epoch's entry in the history, to which a callback may add; `model` is in evaluation mode; `fit` is
    the state of the fit so far.
    """

    entry: dict[str, Any]
    model: nn.Module
    fit: Fit


class Cost(NamedTuple):
    """How long a fit takes on this machine: seconds per step and per validation, and steps per epoch."""

    step: float
    validation: float
    steps: int

    def seconds(self, epochs: int, validates: bool) -> float:
        """Return the seconds of a number of epochs, with or without validation."""
        return epochs * (self.steps * self.step + self.validation * validates)


class Timed(Exception):  # noqa: N818
    """Ends a training with `FitOptions.timing` where its first fit would begin; it isn't an error."""

    def __init__(self, cost: Cost):
        super().__init__(f"a step takes {cost.step:.3g} s")
        self.cost = cost


@dataclass(repr=False)
class Fit:
    """The course of a fit. Afterwards, the model has the best weights.

    Args:
        history: one entry per epoch: `epoch`, `lr` and `loss`, the mean over the training part; with a validation part
            also `validation_loss` and the model's metrics on that part: `accuracy`, `rmse`, `mase` or
            `bits_per_character`. Metrics are never measured on the training part.
        best: the entry whose weights were kept; None before the end of the first epoch.
        steps: steps of the optimiser.
        seconds: time spent in this call.
        stopped: what stopped it: `"epochs"`, `"patience"`, `"ctrl-c"` or `"callback"`.
        checkpoint_error: why the last checkpoint could not be written; "" if it was, or if none was requested.
        records: records of the layers, of the inspected epochs.
        threads: number of threads used.
        timed: seconds of a step by the number of threads, if measured.
        resumed: number of epochs that a checkpoint contained.
        notes: remarks on the fit, a sentence each.
        selects: whether the lowest validation loss selected the best epoch; otherwise it is the last one.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    steps: int = 0
    seconds: float = 0.0
    stopped: str = ""
    checkpoint_error: str = ""
    records: list[TrainingRecord] = field(default_factory=list)
    threads: int = 0
    timed: dict[int, float] = field(default_factory=dict)
    resumed: int = 0
    notes: list[str] = field(default_factory=list)
    selects: bool = True

    def __repr__(self) -> str:
        """Describe the fit in at most two lines, without the history."""
        count = len(self.history)
        said = f"Fit: {count} epoch{'s' * (count != 1)}, {STOPPED[self.stopped]}; {self.took}"
        if self.best is None:
            return said
        found = [
            f"{named(name)} {value:.4g}"
            for name, value in self.best.items()
            if isinstance(value, float) and name != "lr"
        ]
        return f"{said}\n  best epoch {self.best['epoch']}: {', '.join(found)}"

    @property
    def took(self) -> str:
        """The number of steps, the time, and the number of threads, as text."""
        return f"{self.steps:,} steps in {self.seconds:.1f} s on {self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it."""
        return self.stopped == "ctrl-c"
