"""The options of training, declared once: name, type, default, one line of text, range, and the data they apply to.

An option is a field of a class below, with `option(…)` as its default. `fit`, `fit_forecast` and `fit_text`, the flags
of `cellstack train`, the estimators' constructors, what a checkpoint must match, the errors for options that have no
effect, and docs/options.md have theirs from here. Needs no torch.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import inspect
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

from cellstack.cells.arguments import Argument, Limit, documented
from cellstack.train.cell_names import CELLS, check_cell
from cellstack.train.checks import OptionError, UsageError
from cellstack.train.forecasting.recipe import SCALES

DATA = ("sequences", "forecasts", "texts")
"""The kinds of data."""

NUMBERS = {"int": (Integral, "an integer"), "float": (Real, "a number")}
POOLINGS = ("mean", "max", "last", "none")
R = TypeVar("R")


class Option(NamedTuple):
    """An option of training.

    Args:
        name: of the argument in Python; the flag is `--` and the same name with hyphens.
        type: annotation in signatures.
        text: one line of documentation; names of other options are in backquotes.
        defaults: by the kinds of data that the option applies to.
        unset: what None means, by kind of data.
        limit: its range.
        rare: whether only `--help-all` shows it.
        flag: whether the command line may have it.
        python: what only Python accepts, in words.
        kept: annotation of the record's field, which may lack None where it is replaced before.
    """

    name: str
    type: str
    text: str
    defaults: dict[str, Any]
    unset: dict[str, str]
    limit: Limit | None
    rare: bool
    flag: bool
    python: str
    kept: str

    def typed(self, data: str) -> str:
        """Return the annotation for a kind of data."""
        optional = self.defaults[data] is None and "None" not in self.type and self.type != "Any"
        return f"{self.type} | None" if optional else self.type

    def described(self, data: str) -> str:
        """Return the text for a kind of data."""
        unset = self.unset.get(data) if self.defaults[data] is None else ""
        choices = f": {', '.join(self.limit.options)}" if self.limit is not None and self.limit.options else ""
        more = f"; {self.python}" * (bool(self.python) and data == "sequences")
        return f"{self.text}{choices}{more}{f'; None = {unset}' if unset else ''}."

    def check(self, value: Any) -> None:
        """Raise `OptionError` if the option can't have this value."""
        if value is None and (self.kept == "Any" or "None" in self.kept):
            return
        kind, what = NUMBERS.get(self.kept.removesuffix(" | None"), (None, ""))
        if kind is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise OptionError(self.name, f"to be {what}, got {value!r:.80}")
        if self.limit is not None and not self.limit.allows(value):
            raise OptionError(self.name, f"{self.limit.text}, got {value!r:.80}")


def option(
    default: Any,
    text: str,
    limit: Limit | None = None,
    *,
    of: str | tuple[str, ...] = DATA,
    type: str = "",
    unset: str | dict[str, str] = "",
    rare: bool = False,
    flag: bool = True,
    python: str = "",
    **defaults: Any,
) -> Any:
    """Declare a field as an option.

    Args:
        default: the field's.
        text, limit, rare, flag, python: see `Option`.
        of: the kinds of data that it applies to.
        type: annotation in signatures; "" = the field's.
        unset: what None means, for all kinds of data or for some.
        defaults: other defaults, by kind of data.
    """
    own = {data: defaults.get(data, default) for data in ((of,) if isinstance(of, str) else of)}
    said = unset if isinstance(unset, dict) else dict.fromkeys(own, unset)
    return field(
        default=default,
        metadata={
            "option": lambda name, kept: Option(name, type or kept, text, own, said, limit, rare, flag, python, kept)
        },
    )


def at_least(least: int, most: float = math.inf) -> Limit:
    """Return the limit of a number."""
    return Limit(lambda value: least <= value <= most, f">= {least}" if most == math.inf else f"from {least} to {most}")


def among(*choices: str) -> Limit:
    """Return the limit of an option with a few values."""
    return Limit(lambda value: value in choices, f"to be one of {', '.join(choices)}", options=choices)


def function(example: str) -> Limit:
    """Return the limit of an option that is a function."""
    return Limit(callable, f"to be a function, such as {example}")


ABOVE_ZERO = Limit(lambda value: 0 < value < math.inf, "> 0 and finite")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < math.inf, ">= 0 and finite")
SHARE = Limit(lambda value: 0.0 <= value < 1.0, "to be a share in [0, 1)")
NAMES, TABLES = "str | Sequence[str]", ("sequences", "forecasts")


@dataclass(frozen=True)
class Record:
    """Options with their values, which are checked.

    Raises:
        UsageError: an option out of range.
    """

    def __post_init__(self) -> None:
        for one in declared(type(self)).values():
            one.check(getattr(self, one.name))


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
        None, "column of a table that identifies the sequence or series of a row; of series, or several", of=TABLES
    )
    time: str | Sequence[str] | None = option(
        None,
        "column of a table that orders its rows: dates; of sequences also numbers; of series, or several columns",
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
    class_weight: Any = option(
        None, '`"balanced"`, or weights by class: their weights in the loss', of="sequences", rare=True
    )
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
    pooling: str = option(
        "mean",
        "how the steps of a sequence become one output",
        among(*POOLINGS),
        of="sequences",
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
    init: Any = option(
        None, "a network of the same shapes, or its file, whose weights are the initial ones", of="sequences", rare=True
    )

    def __post_init__(self) -> None:
        units: Any = (None,) if self.units is None else several(self.units)
        object.__setattr__(self, "units", units)
        whole = [isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1 for size in units]
        if not whole or not all(whole):
            given = ", ".join(map(repr, units)) or "none"
            raise OptionError("units", f"to be integers of at least 1, one for each layer, got {given}")
        super().__post_init__()
        check_cell(units, self.cell, self.heads, self.bidirectional)

    def described(self) -> dict[str, Any]:
        """Return what a checkpoint's model must match, as plain values; `init` may differ."""
        plain = (int, float, str, tuple, type(None))
        values = {name: getattr(self, name) for name in declared(Architecture) if name != "init"}
        named = {name: getattr(value, "__qualname__", None) or repr(value) for name, value in values.items()}
        return {name: value if isinstance(value, plain) else named[name] for name, value in values.items()}


@dataclass(frozen=True)
class Optimisation(Record):
    """What determines the weights; a checkpoint is resumed with the same values, except more epochs."""

    epochs: int = option(
        60, "largest number of passes over the training part", at_least(1), forecasts=None, unset="16 or 60", texts=30
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
        forecasts=None,
        unset="6 or 8",
        texts=5,
        rare=True,
    )
    noise: float = option(
        0.0,
        "standard deviation of noise on each input in training, in units of its channel's scale",
        NOT_NEGATIVE,
        of="sequences",
        rare=True,
    )
    offset: float = option(
        0.0, "the same, for noise that is constant over a sequence and channel", NOT_NEGATIVE, of="sequences", rare=True
    )
    seed: int = option(0, "of all random numbers", Limit(lambda value: 0 <= value < 2**63, "in [0, 2^63)"))


@dataclass(frozen=True, kw_only=True)
class FitOptions(Optimisation):
    """How a model is fitted, and how the training is run.

    Args:
        events: folder for the TensorBoard events of `inspect`, if TensorBoard is installed; None for none.
        name: a label before the progress bar, if several models are trained.
        timing: only measure how long training takes: `fitted` raises `Timed` instead of fitting.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resume", "overwrite"):
            if getattr(self, name) and self.checkpoint is None:
                raise UsageError(f"`{name}=True` needs `checkpoint=…`")
        if self.resume and self.overwrite:
            raise UsageError("`resume=True`, to continue, and `overwrite=True`, to start again, exclude each other")


RECORDS = (DataOptions, ForecastOptions, Architecture, FitOptions)


def several(value: Any) -> Any:
    """Return one name or number, or several, as a tuple; None for None."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    return None if value is None else (value,)


@cache
def declared(*records: type) -> dict[str, Option]:
    """Return the options of records, all by default, by name."""
    return {
        one.name: one.metadata["option"](one.name, str(one.type))
        for record in records or RECORDS
        for one in fields(record)
        if one.metadata
    }


def applying(data: str, *records: type) -> dict[str, Option]:
    """Return the options of records, all by default, that apply to a kind of data, by name."""
    return {name: one for name, one in declared(*records).items() if data in one.defaults}


def record_of(kind: type[R], given: Mapping[str, Any], **more: Any) -> R:
    """Return a record whose fields are those of `given` and `more` with the same names; other entries are ignored."""
    values = {**given, **more}
    return kind(**{one.name: values[one.name] for one in fields(cast(Any, kind)) if one.name in values})


def no_effect(name: str, data: str) -> str:
    """Return the message that an option of other kinds of data has no effect on this one."""
    return f"`{name}=…` doesn't apply to {data}, only to {' and '.join(declared()[name].defaults)}"


def head_of(name: str, data: str, own: str, first: Iterable[str] = ()) -> str:
    """Return the head of a function that trains as source text, without its colon.

    Args:
        name, own: of the function, and its own arguments.
        data: kind of data.
        first: options that may be given by position.
    """
    typed = {one.name: f"{one.name}: {one.typed(data)} = {one.defaults[data]!r}" for one in applying(data).values()}
    parts = [own, *(typed.pop(option) for option in first), "*", *typed.values()]
    text = ",\n".join(parts)
    return f"def {name}(\n{textwrap.indent(text, '    ')},\n)"


def trains(data: str, own: str, first: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Give a function the signature and the documentation of the options of a kind of data.

    The signature is compiled, as in `dataclasses`. The function gets its own arguments, and all options in a dict.

    Args:
        data: kind of data.
        own: the function's own arguments, as source text.
        first: options that may be given by position.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name, options = function.__name__, applying(data)
        head = head_of(name, data, own, first)
        values = ", ".join(f"{option!r}: {option}" for option in options)
        passed = ", ".join(part.split(":")[0].strip() for part in own.split(", "))
        source = (
            f"{head[:-1]}    **unknown: Any,\n):\n    if unknown:\n        raise refused(unknown)\n"
            f"    return run({passed}, {{{values}}})\n"
        )
        names = {**globals(), **function.__globals__, "run": function, "refused": partial(_unexpected, name, data)}
        exec(compile(source, f"<{function.__module__}.{name}>", "exec"), names)
        made = names[name]
        shown = inspect.signature(made)
        made.__signature__ = shown.replace(parameters=list(shown.parameters.values())[:-1])
        made.__module__, made.__annotations__["return"] = function.__module__, function.__annotations__["return"]
        made.head = head
        lines = [Argument(option.name, "", None, option.described(data)) for option in options.values()]
        made.__doc__ = documented(function.__doc__, lines, "\n\nReturns:")
        return made

    return decorate


def _unexpected(function: str, data: str, unknown: Mapping[str, Any]) -> TypeError:
    """Return the error for an argument that a function doesn't have."""
    name = next(iter(unknown))
    if name in declared():
        return TypeError(f"{function}: {no_effect(name, data)}")
    close = get_close_matches(name, applying(data), 1)
    fix = f": did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{fix}")
