"""What `train` needs to know of each kind of data."""

from __future__ import annotations

from typing import Any

from cellstack.train.confusion import confusion_panels
from cellstack.train.history import Panel
from cellstack.train.options import Architecture, FitOptions


class Job:
    """Data that was read, and how to train on it.

    `understood` describes how the data was read, in lines; `described` is the same in plain values, for --json;
    `given` has all options by name, with the defaults that depend on the data; `others` is the time in seconds that a
    training takes in addition to its fits, as far as `plan` measured it.
    """

    understood: list[str]
    described: dict[str, Any]
    given: dict[str, Any]
    others: float = 0.0

    @property
    def validates(self) -> bool:
        """Whether there is a validation part, after `plan`."""
        raise NotImplementedError

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come, in lines and as plain values: its parts, baselines and networks."""
        raise NotImplementedError

    def fits(self, options: FitOptions) -> list[tuple[int, int, bool]]:
        """Return the fewest and the most epochs of each fit to come, and whether they include a validation."""
        early = options.patience + 1 if self.validates and options.patience else options.epochs
        return [(min(early, options.epochs), options.epochs, self.validates)] * (1 + (options.search or 0))

    def checkpoints(self, path: str) -> list[str]:
        """Return the files of the checkpoints that `--checkpoint` names."""
        return [path]

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train; return a `Result`."""
        raise NotImplementedError

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the scores on held-out data, as plain values and as lines in addition to the result's sentence."""
        return result.scores, []

    def panels(self, result: Any) -> list[Panel]:
        """Return functions that draw further panels of --picture, in addition to the history."""
        return confusion_panels(result.scores, result.labels)

    def write(self) -> None:
        """Write further output files, after the network has been written."""
