"""`cellstack train` on sequences, for classification or regression: `.ts`, `.npz` and tables in long form."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellstack.cli.arguments import as_flags
from cellstack.cli.jobs import Job
from cellstack.cli.tables import only_one
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import SEQUENCES, TABLES, TABLES_ONLY, read_sequences
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.understood import understood
from cellstack.train.options import Architecture, FitOptions, settle
from cellstack.train.parts import check, cut, parts_of, per_step
from cellstack.train.sizes import size_of


@dataclass
class SequencesJob(Job):
    """Sequences to train on."""

    training: Sequences
    test: Sequences | None
    understood: list[str]
    described: dict[str, Any]
    given: dict[str, Any]
    validated: int = 0
    candidates: int = 1

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come."""
        training, test, share = self.training, self.test, options.validation
        check(training, None, test, self.given["class_weight"])
        if training.per_step:
            architecture = per_step(architecture)
        parts = parts_of(training, None, self.given["class_weight"], options)
        self.validated = parts.validated
        task = "classify" if training.labels else "regress"
        self.candidates = 1 if options.search else len(architecture.candidates(task, parts.targets))
        usual = architecture.of(task, float(np.median(training.lengths)))
        inputs = parts.measure(changes=bool(usual.changes))
        steps = parts.data(inputs).steps
        outputs = len(training.labels) or (1 if parts.y.ndim == 1 else parts.y.shape[1])
        size = size_of(usual, inputs.width)
        weights = size.weights + (size.width + 1) * outputs
        sizes = {"training": len(training.x) - parts.validated, "validation": parts.validated}
        sizes["test"] = 0 if test is None else len(test.x)
        chosen = f" ({share:.0%}{' of each class' * bool(training.labels and not training.per_step)}, chosen at random)"
        lines = [
            f"{sizes['training']:,} sequences to train on; {sizes['validation'] or 'none'} to validate on"
            f"{chosen * bool(parts.validated)}; {format(sizes['test'], ',') if test is not None else 'none'} to test on"
        ]
        lines.append(
            f"1 network: {size.layers}, {weights:,} weights; at most {options.epochs} "
            f"epoch{'s' * (options.epochs != 1)} of {steps} step{'s' * (steps != 1)}, batches of {options.batch}"
            f"{'; trained with and without noise' * (self.candidates > 1)}"
        )
        return lines, sizes | {
            "networks": 1,
            "layers": size.layers,
            "weights": weights,
            "epochs": options.epochs,
            "steps": steps,
            "batch": options.batch,
        }

    @property
    def validates(self) -> bool:
        """See `Job`."""
        return self.validated > 0

    def fits(self, options: FitOptions) -> list[tuple[int, int, bool]]:
        """See `Job`."""
        return super().fits(options) * self.candidates

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train on the sequences."""
        from cellstack.train.workflow import train_sequences

        return train_sequences(self.training, self.test, architecture, options, class_weight=self.given["class_weight"])


def read(args: argparse.Namespace, given: dict[str, Any]) -> SequencesJob:
    """Read the training file, and the test file if one is given.

    Args:
        args: the files, and the column to learn.
        given: the options.

    Raises:
        UsageError: a table without the options that it needs, or data that can't be used.
        FormatError: the content of a file doesn't match its suffix.
    """
    files = [args.file, *([] if args.test_file is None else [args.test_file])]
    if args.y is None and any(Path(name).suffix.lower() in TABLES for name in files):
        raise UsageError(f"{args.file}: expected --label COLUMN, the classes or numbers to learn")
    reading = {name: given[name] for name in SEQUENCES} | {"weight": given["sample_weight"], "task": args.task}
    reading |= {name: only_one(name, given[name]) for name in ("id", "time")}
    training = read_sequences(args.file, y=args.y, **reading)
    lines, described = understood(training, args.file)
    report: dict[str, Any] = {"training": described}
    test = None
    if args.test_file is not None:
        if given["test"]:
            raise UsageError(f"`test=…` and {args.test_file} both name data to test on: give one of them")
        reading["task"] = args.task or ("classify" if training.labels else "regress")
        reading |= {"labels": training.labels or None, "features": training.columns or None}
        reading |= {name: training.table.get(name) for name in TABLES_ONLY}
        test = read_sequences(args.test_file, y=args.y, **reading)
        more, report["test"] = understood(test, args.test_file)
        lines += more
    elif given["test"]:
        training, test = cut(training, given["test"], given["seed"])
    settle(given, len(training.x) + (0 if args.test_file or test is None else len(test.x)))
    return SequencesJob(training, test, [as_flags(line, args) for line in lines], report, given)
