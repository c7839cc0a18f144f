"""The options of training, declared once: name, type, default, one line of text, range, and the data they apply to.

An option is a field of a class below, with `option(…)` as its default. `fit`, `fit_forecast` and `fit_text`, the flags
of `cellstack train`, the estimators' constructors, what a checkpoint must match, the errors for options that have no
effect, and docs/options.md have theirs from here. Needs no torch.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, TypeVar, cast

from cellstack.cells.arguments import Limit
from cellstack.train.cell_names import CELLS, check_cell
from cellstack.train.checks import OptionError, UsageError
from cellstack.train.declaration import (
    ABOVE_ZERO,
    NOT_NEGATIVE,
    SHARE,
    Option,
    Record,
    among,
    at_least,
    function,
    option,
    options_of,
    several,
)
from cellstack.train.forecasting.recipe import SCALES

POOLINGS = ("mean", "max", "last", "none")
SEQUENCE_CLASSIFIER = "{} for one class per sequence, else {}"
NOISE, OFFSET_SHARE = 0.6, 0.5  # for classifiers
NOISE_OF_NUMBERS = 0.3  # without an offset: numbers often depend on the level of the input
FILTERS, TAPS, LONG, STRIDES, SEEN = 96, 8, 32, 8, 100  # of the convolution before the layers
FEWEST = 20  # validation targets from which on they select the epoch: fewer choose badly
EPOCHS, STEPS = 60, 750  # minimum number of epochs, and of optimiser steps, if `epochs` is None
# Options of a model that `model` replaces
LAYERS = (
    "units",
    "cell",
    "heads",
    "bidirectional",
    "dropout",
    "every_step",
    "head",
    "changes",
    "filters",
    "stride",
    "init",
)
NAMES, TABLES = "str | Sequence[str]", ("sequences", "forecasts")


@dataclass(frozen=True)
class DataOptions(Record):
    """How the data is read, and divided into parts. See `as_sequences` and `read_table`."""

    test: Any = option(
        None,
        "share to test on, of each class or at the end",
        python="or separate data: `(x, y)`, a frame or a file",
        unset="no test",
        forecasts=0.2,
        texts=0.05,
    )
    task: str | None = option(
        None,
        '`"classify"` or `"regress"`',
        of="sequences",
        unset="by y: text, bools and integers are classes",
        flag=False,
    )
    id: str | Sequence[str] | None = option(
        None, "column of a table that identifies the sequence or series of a row; for series, one or several", of=TABLES
    )
    time: str | Sequence[str] | None = option(
        None,
        "column of a table that orders its rows: dates; for sequences also numbers; for series, one or several columns",
        of=TABLES,
        unset={"sequences": "row order", "forecasts": "detected"},
    )
    features: Sequence[str] | None = option(
        None, "input columns of a table, or the names of the channels", of="sequences", unset="all other numeric ones"
    )
    per_step: bool | None = option(
        None,
        "whether y has an entry per step, not per sequence",
        of="sequences",
        unset="determined by its shape",
        rare=True,
    )
    resample: float | None = option(
        None,
        "time between the steps to which a table's sequences are interpolated (dates: in seconds)",
        of="sequences",
        unset="the rows as they are",
        rare=True,
    )
    class_weight: Any = option(None, '`"balanced"`, or weights by class, in the loss', of="sequences", rare=True)
    sample_weight: Any = option(
        None,
        "weights of the sequences in the loss, `[N]`; of a table, a column or a mapping by id",
        of="sequences",
        rare=True,
    )
    zone: str | None = option(None, "time zone of a table's dates, such as Europe/Berlin", of="forecasts", rare=True)
    freq: str | None = option(
        None,
        "spacing of a table's rows, as in pandas: h, 30min, D, B (weekdays), MS (months)",
        of="forecasts",
        unset="inferred",
        rare=True,
    )
    categories: Sequence[str] = option(
        (), "columns to read as categories, not as numbers", of="forecasts", type=NAMES, rare=True
    )
    day_first: bool | None = option(
        None, "01/02 in a table is 1 February, not 2 January", of=TABLES, unset="detected", rare=True
    )
    date_format: str | None = option(
        None,
        "format of a table's dates, such as %d.%m.%Y; s, ms, us or ns for Unix times; excel",
        of=TABLES,
        unset="detected",
        rare=True,
    )
    decimal: str | None = option(None, "decimal separator of a table", of=TABLES, unset="detected", rare=True)
    encoding: str | None = option(
        None, "text encoding of a table, such as latin-1", of=TABLES, unset="detected", rare=True
    )
    bytes: bool = option(False, "learn the bytes of a file of any kind, not characters", of="texts", rare=True)


@dataclass(frozen=True)
class ForecastOptions(Record):
    """What to forecast, and from which inputs; options that aren't given are inferred from the table."""

    target: Sequence[str] = option(
        (), "column to forecast, or several", of="forecasts", type=NAMES, forecasts=None, unset="the only numeric one"
    )
    horizon: int | None = option(None, "steps to forecast", of="forecasts", unset="one season")
    window: int | None = option(None, "input steps", of="forecasts", unset="two seasons, from 16 to 168", rare=True)
    seasons: Sequence[int] | None = option(
        None,
        "steps in each season, or several; 1 for none",
        of="forecasts",
        type="int | Sequence[int]",
        unset="detected",
    )
    inputs: Sequence[str] | None = option(
        None, "further columns, known up to the present", of="forecasts", type=NAMES, unset="all others"
    )
    known: Sequence[str] = option((), "columns that are known in advance", of="forecasts", type=NAMES)
    holidays: str = option("", "country whose holidays are an input, such as US or DE-BY", of="forecasts")
    scale: str | None = option(
        None,
        "unit of the values",
        among(*SCALES),
        of="forecasts",
        unset="the one with which smoothing fits better",
        rare=True,
    )
    quantiles: Sequence[float] = option(
        (0.1, 0.5, 0.9),
        "quantiles to forecast; 0.5 is added",
        Limit(lambda value: all(0 < level < 1 for level in value), "to be numbers between 0 and 1, such as 0.1,0.9"),
        of="forecasts",
        type="float | Sequence[float]",
    )

    def __post_init__(self) -> None:
        for name in ("target", "seasons", "inputs", "known", "quantiles"):
            object.__setattr__(self, name, several(getattr(self, name)))
        if self.seasons is not None:
            object.__setattr__(self, "seasons", tuple(season for season in self.seasons if season != 1))
        super().__post_init__()


def strided(steps: float) -> int:
    """Return the default stride for sequences of so many steps."""
    return int(min(max(steps // SEEN, 1), STRIDES))


@dataclass(frozen=True)
class Architecture(Record):
    """How a model is built."""

    units: Sequence[int] = option(
        (48, 48),
        "units of each layer, first layer first",
        type="int | Sequence[int]",
        unset="48",
        forecasts=None,
        texts=(256, 256),
    )
    cell: str = option("lstm", "kind of the recurrent layers", among(*CELLS))
    heads: int | None = option(None, "heads of each layer", unset="1, of an mlstm 4", rare=True)
    bidirectional: bool = option(False, "run layers in both directions, and concatenate the outputs", of="sequences")
    embedding: int = option(64, "size of the character embedding; 0: one-hot", at_least(0), of="texts")
    dropout: float = option(
        0.3,
        "share of values dropped out after each layer in training",
        Limit(SHARE.allows, "in [0, 1)"),
        forecasts=None,
        unset="0.1",
    )
    members: int = option(
        3,
        "networks to average, each trained with its own seed",
        at_least(1, 99),
        of="forecasts",
        forecasts=None,
        unset="3, or 2 for many windows",
        rare=True,
    )
    pooling: str | None = option(
        None,
        "how the steps of a sequence become one output",
        among(*POOLINGS),
        of="sequences",
        unset="max of a classifier without `every_step`, else mean",
    )
    every_step: bool = option(
        False, "compute the output and the loss at every step, and pool the outputs: for streams", of="sequences"
    )
    head: Any = option(
        None,
        "a `torch.nn.Module` from pooled states `[B, W]` to `[B, O]`",
        of="sequences",
        unset="a dense layer",
        flag=False,
    )
    loss: Callable[[Any, Any], Any] | None = option(
        None,
        "a function of outputs and targets that returns each example's loss",
        function("torch.nn.MSELoss(reduction='none')"),
        of="sequences",
        unset="cross-entropy or squared error",
    )
    changes: bool | None = option(
        None,
        "also use the change of each channel since the previous step as an input channel; of a channel that is far "
        "smaller in many sequences than in others, also its values and changes in finer units",
        of="sequences",
        unset="yes for one class or number per sequence, else no, also with `every_step`",
        rare=True,
    )
    noise: float | None = option(
        None,
        "standard deviation of noise on each input in training, in units of its channel's scale; it falls to 0, except "
        "with `every_step`",
        NOT_NEGATIVE,
        of="sequences",
        unset=f"by the validation loss {NOISE} or 0 for one class per sequence, {NOISE_OF_NUMBERS} or 0 for one "
        "number; else 0",
        rare=True,
    )
    offset: float | None = option(
        None,
        "the same, for noise that is constant over a sequence and channel",
        NOT_NEGATIVE,
        of="sequences",
        unset=SEQUENCE_CLASSIFIER.format(f"{NOISE * OFFSET_SHARE} or 0", 0),
        rare=True,
    )
    filters: int | None = option(
        None,
        f"features of a convolution over {TAPS} steps before the layers; 0: none",
        at_least(0),
        of="sequences",
        unset=f"{FILTERS} for one class per sequence of usually {LONG} steps or more, else 0",
    )
    stride: int | None = option(
        None,
        "steps from one output of this convolution to the next, so that the layers have fewer",
        at_least(1),
        of="sequences",
        unset=SEQUENCE_CLASSIFIER.format(f"1 to {STRIDES}, for about {SEEN} steps,", 1),
        rare=True,
    )
    model: Any = option(
        None,
        "a `torch.nn.Module` from standardised sequences `[B, T, I]` to logits or numbers `[B, O]`, in place of the "
        "layers, pooling and head",
        of="sequences",
        unset="the layers that the other options describe",
        flag=False,
    )
    init: Any = option(
        None, "a network of the same shapes, or its file, whose weights are the initial ones", of="sequences", rare=True
    )

    def __post_init__(self) -> None:
        units: Any = (None,) if self.units is None else several(self.units)
        object.__setattr__(self, "units", units)
        whole = [isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1 for size in units]
        if not whole or not all(whole):
            got = ", ".join(map(repr, units)) or "none"
            raise OptionError("units", f"to be integers of at least 1, one for each layer, got {got}")
        super().__post_init__()
        check_cell(units, self.cell, self.heads, self.bidirectional)
        if self.model is not None:
            given = [
                name for name in LAYERS if getattr(self, name) not in (False, declared()[name].defaults["sequences"])
            ]
            if given or self.pooling not in (None, "none"):
                raise OptionError([*given, "pooling"][0], "not to be given with `model`, which takes its place")

    def of(self, task: str, steps: float = 1) -> Architecture:
        """Return the architecture for a task, `"classify"` or `"regress"`, with the values of what is None by default.

        They are those that measured best: docs/training.md has the measurements. `steps` is the usual length of a
        sequence.
        """
        one = self.pooling != "none" and self.model is None
        classes, pooled = one and task == "classify", one and not self.every_step
        filters = FILTERS * (classes and pooled and steps >= LONG) if self.filters is None else self.filters
        strides = classes and pooled and filters > 0
        usual: dict[str, Any] = {
            "pooling": None if self.model is not None else "max" if classes and pooled else "mean",
            "changes": pooled,
            "filters": filters,
            "stride": None if self.model is not None else strided(steps) if strides else 1,
            "noise": NOISE * classes,
            "offset": NOISE * OFFSET_SHARE * classes,
        }
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    def candidates(self, task: str, targets: int) -> list[Architecture]:
        """Return this architecture with and without noise, or as it is if so few validation targets can't choose.

        Noise hides small differences, which tell some classes apart, so it isn't always better.
        """
        usual = self.of(task)
        if targets < FEWEST or not (usual.noise or usual.changes) or (self.noise, self.offset) != (None, None):
            return [self]
        noisy = self if usual.noise else replace(self, noise=NOISE_OF_NUMBERS)
        return [noisy, replace(self, noise=0.0, offset=0.0)]

    def described(self) -> dict[str, Any]:
        """Return what a checkpoint's model must match, as plain values; `init` may differ."""
        values = {name: getattr(self, name) for name in options_of(Architecture) if name != "init"}
        plain = (int, float, str, tuple, type(None))
        return {
            name: value if isinstance(value, plain) else getattr(value, "__qualname__", None) or repr(value)
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Optimisation(Record):
    """What determines the weights; a checkpoint is resumed with the same values, except more epochs."""

    epochs: int = option(
        60,
        "largest number of passes over the training part",
        at_least(1),
        sequences=None,
        forecasts=None,
        unset={"sequences": "750 training steps, at least 60 passes", "forecasts": "16 or 60"},
        texts=30,
    )
    batch: int = option(
        16,
        "batch size, over all processes",
        at_least(1),
        forecasts=None,
        texts=None,
        unset={"forecasts": "32 or 64", "texts": "8 to 32"},
        rare=True,
    )
    lr: float = option(
        5e-3,
        "learning rate of Adam in the first epoch; it falls to a hundredth",
        ABOVE_ZERO,
        forecasts=None,
        unset="1e-3 or 3e-3",
    )
    clip: float = option(1.0, "largest norm of all gradients together", ABOVE_ZERO, rare=True)
    patience: int = option(
        20,
        "epochs without a lower validation loss before training stops; 0: never stop early",
        at_least(0),
        sequences=None,
        forecasts=None,
        unset={"sequences": "a third of `epochs`", "forecasts": "6 or 8"},
        texts=5,
        rare=True,
    )
    seed: int = option(0, "of all random numbers", Limit(lambda value: 0 <= value < 2**63, "in [0, 2^63)"))


@dataclass(frozen=True, kw_only=True)
class FitOptions(Optimisation):
    """How a model is fitted, and how the training is run.

    Args:
        events: folder for the TensorBoard events of `inspect`, if TensorBoard is installed; None for none.
        name: a label before the progress bar, if several models are trained.
        timing: only measure how long training takes: `fitted` raises `Timed` instead of fitting.
        selects: whether the validation part selects the epoch whose weights are kept, and ends the training early.
    """

    validation: float = option(
        0.15,
        "share to choose the best epoch on, of each class or before the test part; 0: none",
        SHARE,
        type="Any",
        python="or separate data, as for `test`",
        texts=0.05,
    )
    steps: int = option(128, "characters over which gradients are backpropagated", at_least(1), of="texts")
    optimizer: Callable[[Any], Any] | None = option(
        None,
        "a function of the parameters that returns a `torch.optim.Optimizer`",
        function("lambda parameters: torch.optim.SGD(parameters, lr=0.1)"),
        of=("sequences", "texts"),
        unset="Adam",
    )
    scheduler: Callable[[Any], Any] | str = option(
        "cosine",
        'a function of the optimiser that returns a scheduler, stepped once per epoch; `"constant"` or `"cosine"`',
        of=("sequences", "texts"),
    )
    metrics: Mapping[str, Callable[[Any, Any], float]] | None = option(
        None,
        "functions of labels or numbers, true and predicted, of the validation part, by name",
        Limit(lambda value: isinstance(value, Mapping), "to be functions by name, such as {'f1': f1_score}"),
        of="sequences",
    )
    baseline: bool = option(
        True,
        "compare with boosting on summary statistics (scikit-learn), or one answer for all, on the held-out part",
        of="sequences",
        flag=False,
    )
    pretrained: Any = option(
        None,
        "a network of TiRex or TiRex-2, or its file, whose forecasts of the test part are measured too",
        of="forecasts",
        unset="none",
    )
    search: int | None = option(
        None,
        "settings to try on the validation part before the training: units, layers, cell, lr, pooling and noise that "
        "aren't given",
        at_least(2),
        of="sequences",
        unset="none",
    )
    callbacks: Sequence[Callable[[Any], Any]] = option(
        (),
        "functions that are called with an `Epoch` after each epoch; one that returns True stops the training",
        Limit(lambda value: isinstance(value, Sequence) and all(map(callable, value)), "to be a list of functions"),
        of=("sequences", "texts"),
    )
    checkpoint: str | os.PathLike[str] | None = option(None, "file to write after each epoch and on Ctrl-C")
    resume: bool = option(False, "continue from `checkpoint` if it exists; `epochs` may be larger")
    overwrite: bool = option(False, "start again even if `checkpoint` exists", rare=True)
    log: str | os.PathLike[str] | None = option(
        None, "where to write each epoch's metrics as it ends: to .csv, .json or a folder for TensorBoard", rare=True
    )
    progress: Any = option(
        None,
        "show a progress bar",
        type="bool | None",
        unset="if standard error is a terminal, and in notebooks",
        flag=False,
    )
    threads: int | None = option(
        None, "number of processor threads", at_least(1), unset="the faster of 1 and all", flag=False
    )
    device: str = option("auto", "device to train on", among("auto", "cpu", "cuda"), rare=True)
    inspect: bool | int = option(
        False, "record gates, norms and gradients of the layers in one batch of each epoch", type="bool", rare=True
    )
    events: str | os.PathLike[str] | None = None
    name: str = ""
    timing: bool = False
    selects: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resume", "overwrite"):
            if getattr(self, name) and self.checkpoint is None:
                raise UsageError(f"`{name}=True` needs `checkpoint=…`")
        if self.resume and self.overwrite:
            raise UsageError("`resume=True`, to continue, and `overwrite=True`, to start again, exclude each other")


RECORDS = (DataOptions, ForecastOptions, Architecture, FitOptions)
R = TypeVar("R")


def declared(*records: type) -> dict[str, Option]:
    """Return the options of records, all by default, by name."""
    return options_of(*(records or RECORDS))


def applying(data: str, *records: type) -> dict[str, Option]:
    """Return the options of records, all by default, that apply to a kind of data, by name."""
    return {name: one for name, one in declared(*records).items() if data in one.defaults}


def record_of(kind: type[R], given: Mapping[str, Any], **more: Any) -> R:
    """Return a record whose fields are those of `given` and `more` with the same names; other entries are ignored."""
    values = {**given, **more}
    return kind(**{one.name: values[one.name] for one in fields(cast(Any, kind)) if one.name in values})


def settle(given: dict[str, Any], count: int) -> None:
    """Set the epochs and the patience in the options of a training on `count` sequences where they are None.

    Raises:
        UsageError: epochs or a batch size out of range.
    """
    declared()["batch"].check(given["batch"])
    if given["epochs"] is None:
        given["epochs"] = max(EPOCHS, -(-STEPS * given["batch"] // max(count, 1)))
    declared()["epochs"].check(given["epochs"])
    if given["patience"] is None:
        given["patience"] = -(-given["epochs"] // 3)
