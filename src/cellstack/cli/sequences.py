"""`cellstack train` on sequences, for classification or regression: `.ts`, `.npz` and tables in long form."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cli.arguments import as_flags
from cellstack.cli.jobs import Job
from cellstack.cli.tables import SEQUENCES, given, only_one
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES, read_sequences
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.understood import understood
from cellstack.train.parts import check, parts_of, per_step
from cellstack.train.settings import Architecture, FitOptions
from cellstack.train.sizes import size_of

UNUSED = ("date", "zone", "freq", "categories")


def add_arguments(train: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the options for sequences to the parser, and return them."""
    data = train.add_argument_group("sequences", "options for .csv, .tsv and .parquet tables of sequences")
    text = "sequences in a table: column of the classes or numbers to learn"
    return [
        train.add_argument("--label", dest="y", metavar="COLUMN", help=text),
        data.add_argument(
            "--time", metavar="COLUMN", help="column that orders the rows of a sequence (default: as in the file)"
        ),
        data.add_argument(
            "--resample", type=float, metavar="X", help="interpolate with this time between steps (dates: in seconds)"
        ),
        data.add_argument("--features", metavar="A,B", help="input columns (default: all other numeric ones)"),
        data.add_argument(
            "--weight", dest="sample_weight", metavar="COLUMN", help="column of the sequences' weights in the loss"
        ),
        data.add_argument("--per-step", action="store_true", help="learn a label for each step, not for each sequence"),
        data.add_argument("--class-weights", choices=("balanced",), help="give every class the same total weight"),
    ]


@dataclass
class SequencesJob(Job):
    """Sequences to train on."""

    training: Sequences
    test: Sequences | None
    class_weights: str | None
    understood: list[str]
    described: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    validated: int = 0

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come."""
        training, test, share = self.training, self.test, options.validation
        check(training, None, test, self.class_weights)
        if training.per_step:
            architecture = per_step(architecture)
        parts = parts_of(training, None, self.class_weights, options)
        self.validated = parts.validated
        inputs = parts.measure()
        steps = parts.data(inputs).steps
        outputs = len(training.labels) or (1 if parts.y.ndim == 1 else parts.y.shape[1])
        size = size_of(architecture, len(inputs.standardise[0]))
        weights = size.weights + (size.width + 1) * outputs
        sizes = {"training": len(training.x) - parts.validated, "validation": parts.validated}
        sizes["test"] = 0 if test is None else len(test.x)
        chosen = f" ({share:.0%}{' of each class' * bool(training.labels and not training.per_step)}, chosen at random)"
        lines = [
            f"{sizes['training']:,} sequences to train on; {sizes['validation'] or 'none'} to validate on"
            f"{chosen * bool(parts.validated)}; {format(sizes['test'], ',') if test is not None else 'none'} to test on"
        ]
        baseline, said = _baseline(parts.y, training.labels)
        lines += [
            said,
            f"1 network: {size.layers}, {weights:,} weights; at most {options.epochs} "
            f"epoch{'s' * (options.epochs != 1)} of {steps} step{'s' * (steps != 1)}, batches of {options.batch}",
        ]
        return lines, sizes | {
            "baselines": baseline,
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

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train on the sequences."""
        from cellstack.train.workflow import train_sequences

        return train_sequences(self.training, self.test, architecture, options, class_weight=self.class_weights)


def read(args: argparse.Namespace) -> SequencesJob:
    """Read the training file, and the test file if one is given.

    Raises:
        UsageError: a table without the options that it needs, or data that can't be used.
        FormatError: the content of a file doesn't match its suffix.
    """
    tables = [name for name in (args.file, args.test) if name is not None and Path(name).suffix.lower() in TABLES]
    if tables and args.y is None:
        raise UsageError(f"{args.file}: expected --label COLUMN, the classes or numbers to learn")
    features = None if args.features is None else [name.strip() for name in args.features.split(",") if name.strip()]
    columns = {"id": only_one(args.id), "time": args.time, "features": features, "weight": args.sample_weight}
    columns["resample"] = args.resample
    how = partial(read_sequences, y=args.y, per_step=args.per_step or None, **columns)
    training = how(args.file, task=args.task, **given(args, SEQUENCES))
    if args.test is None:
        test = None
    else:
        task = args.task or ("classify" if training.labels else "regress")
        features = training.columns or None
        reading = {name: training.table.get(name) for name in SEQUENCES}
        test = how(args.test, task=task, labels=training.labels or None, features=features, **reading)
    lines, described = understood(training, args.file)
    report: dict[str, Any] = {"training": described}
    if test is not None and args.test is not None:
        more, report["test"] = understood(test, args.test)
        lines += more
    return SequencesJob(training, test, args.class_weights, [as_flags(line, args) for line in lines], report)


def _baseline(y: NDArray, labels: tuple[Any, ...]) -> tuple[dict[str, Any], str]:
    """Return the score of the best constant prediction on the training part."""
    if not labels:
        rmse = float(np.sqrt(np.square(y - y.mean(axis=0)).mean()))
        return {
            "mean": {"rmse": rmse}
        }, f"for comparison: the RMSE of always predicting the mean is {rmse:.4g} on the training part"
    counts = np.bincount(y.ravel(), minlength=len(labels))
    share, best = float(counts.max() / counts.sum()), labels[int(counts.argmax())]
    return (
        {"most frequent class": {"class": best, "accuracy": share}},
        f"for comparison: the accuracy of always predicting {best!r} is {share:.4g} on the training part",
    )
