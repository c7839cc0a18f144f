"""What the fit loop asks of a model, what it tells a callback, and what it has done at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cellstack.inspect.records import TrainingRecord


class Learner(Protocol):
    """What a `torch.nn.Module` offers to be fitted.

    `forward(x, mask)` returns what the other methods take as `out`; x and mask are those of a `Batch`, as tensors.

    A model that carries a state from batch to batch, as in truncated backpropagation, also has an attribute `carried`:
    tensors in tuples, lists or dicts, or None. The loop sets it to None where an epoch starts, and for the validation
    part; `forward` reads it and puts the state after the batch there. The loop cuts it off from its graph after each
    step and keeps it in the checkpoint, with NamedTuples as plain tuples, so that a resumed run goes on from it.
    """

    def losses(self, out: Any, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return each target's loss, in the shape of the batch's `weight`."""
        ...

    def measure(self, out: Any, mask: Tensor | None, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return sums over a batch of the validation part: they are added up over batches and processes."""
        ...

    def measured(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the metrics that the sums amount to, by the names that the history has them under."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values in which a checkpoint's model must be alike, beside the shapes of the weights."""
        ...


class Epoch(NamedTuple):
    """What a callback is given after an epoch.

    `entry` is its line of the history, to which a callback may add; `model` is in evaluation mode; `fit` is what was
    done so far.
    """

    entry: dict[str, Any]
    model: nn.Module
    fit: Fit


@dataclass
class Fit:
    """What a fit did. The model holds the best weights when it returns.

    Args:
        history: one entry an epoch: `epoch`, `lr`, `loss` and, with a validation part, `validation_loss` and the
            model's metrics.
        best: the entry whose weights were kept; None before the first epoch was done.
        steps: steps of the optimiser.
        seconds: time spent in this call.
        stopped: what ended it: `"epochs"`, `"patience"`, `"ctrl-c"` or `"callback"`.
        checkpoint_error: why the last checkpoint could not be written; "" where it was, or none was asked for.
        records: what was seen of the layers, in the epochs that were looked at.
        threads: how many were used.
        timed: seconds of a step by the number of threads, where that was measured.
        resumed: the epochs that a checkpoint brought.
        notes: what has to be said of how it went, a sentence each.
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

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.stopped == "ctrl-c"
