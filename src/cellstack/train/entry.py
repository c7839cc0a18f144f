"""`train.fit`: train a network on data in memory or in a file, in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cellstack.train.checks import UsageError, collected
from cellstack.train.data.reading import read_sequences
from cellstack.train.data.sequences import Sequences, as_sequences, taken
from cellstack.train.data.stream import BUFFER, Stream, is_stream
from cellstack.train.examples import split
from cellstack.train.fitting import Result
from cellstack.train.settings import Architecture, FitOptions, record_of, widths_of
from cellstack.train.workflow import train_sequences


def fit(
    x: Any,
    y: Any = None,
    *,
    validation: Any = 0.15,
    test: Any = None,
    task: str | None = None,
    id: str | None = None,
    time: str | None = None,
    features: Sequence[str] | None = None,
    per_step: bool | None = None,
    resample: float | None = None,
    units: int | Sequence[int] = (48, 48),
    cell: str = "lstm",
    heads: int | None = None,
    bidirectional: bool = False,
    dropout: float = 0.3,
    pooling: str = "mean",
    every_step: bool = False,
    head: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    metrics: Mapping[str, Callable[[Any, Any], float]] | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | str = "cosine",
    callbacks: Sequence[Callable[[Any], Any]] = (),
    class_weight: Any = None,
    sample_weight: Any = None,
    epochs: int = 60,
    batch: int = 16,
    lr: float = 5e-3,
    clip: float = 1.0,
    patience: int = 20,
    noise: float = 0.0,
    offset: float = 0.0,
    seed: int = 0,
    init: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    threads: int | None = None,
    device: str = "auto",
    inspect: bool = False,
    buffer: int = BUFFER,
) -> Result:
    """Train a network to classify sequences or to predict numbers, for whole sequences or for each of their steps.

    Args:
        x: an array `[N, T, C]`; a list of arrays `[T, C]`, whose T may differ; a pandas or polars frame with a row per
            step; the name of a file, .ts, .npz, .csv or .parquet; a map-style dataset of `(sequence, target)`, such as
            torch's; or, for data larger than memory, an iterable of these that can be iterated repeatedly, or a
            function that returns an iterator: see `Stream`. NaN where a value is missing.
        y: classes (text, integers or bools) or numbers: one per sequence or, with another axis, several numbers per
            sequence or one entry per step. With a frame also the name of a column, or a mapping or Series by id; with
            a table's file the name of a column; None with .ts and .npz files, which contain it.
        validation: share of the sequences held out for early stopping, the same of each class; or separate data: a
            pair `(x, y)`, a frame or a file like `x`. The best epoch on it is kept; 0: none, and the last is kept.
        test: likewise, for data that isn't used in training: `scores` are measured on it. None: no test.
        task: `"classify"` or `"regress"`; None = determined by `y`: text, bools and integers are classes.
        id, time, features, per_step, resample: see `as_sequences`. `id`, `time` and `resample` apply to frames only;
            `features` selects their columns, and names the channels of other data.
        units: units of each layer, first layer first.
        cell, heads, bidirectional, dropout, pooling, every_step: see `Model`.
        head, loss, metrics, optimizer, scheduler, callbacks: your own parts: see `Architecture` and `FitOptions`.
        class_weight: `"balanced"`, or weights by class: their weights in the loss.
        sample_weight: `[N]`, the sequences' weights in the loss; with a frame also a column or a mapping by id.
        epochs, batch, lr, clip, patience, noise, offset, seed: see `Settings`.
        init: a network of the same shapes, or its file, whose weights are the initial ones.
        checkpoint, resume, overwrite, threads, inspect: see `learn`.
        progress: show a progress bar; None = where standard error is a terminal, and in notebooks.
        log: where to write each epoch's metrics as it ends: a .csv or .json file, or a folder for TensorBoard.
        device: see `processes`.
        buffer: for iterables, the number of examples in memory at a time; they are shuffled among each other.

    Returns:
        The `Result`: `.network` runs without torch, `.model` is a torch module; also `.scores`, `.history`, `.labels`,
        and `.sentence`, which says what stopped the training and how good the network is.

    Raises:
        UsageError: data or settings that can't be used as given; the message says how to fix it.
        FormatError: a file that can't be read.
        OSError: a file that can't be read or written.

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(40, 12, 3)), np.repeat(["calm", "busy"], 20)
    >>> x[y == "busy"] *= 3
    >>> result = fit(x, y, test=0.25, units=8, epochs=20, threads=1)
    >>> result.labels, result.network(x[:2].astype(np.float32)).shape
    (('busy', 'calm'), (2, 2))
    """
    given, x = locals(), collected(x)
    reading = {"task": task, "id": id, "time": time, "features": features, "per_step": per_step}
    reading["resample"] = resample
    if is_stream(x):
        share = float(validation) if isinstance(validation, (int, float)) else 0.0
        if isinstance(test, (int, float)):
            raise UsageError("test: a share isn't supported where x is iterated over: pass separate data")
        whole: Any = _stream(x, share, seed, buffer, reading, {"y": y, "sample_weight": sample_weight})
    else:
        whole = _taken(x, y, "x", weight=sample_weight, **reading)
    for column, why in whole.ignored.items():
        warnings.warn(f"column {column!r} isn't used: it {why}", stacklevel=2)
    if whole.rates:
        warnings.warn(whole.rates, stacklevel=2)
    reading["task"] = task or ("classify" if whole.labels else None if whole.y is None else "regress")
    parts, shares = {}, {}
    for name, part in (("validation", validation), ("test", test)):
        if part is None or isinstance(part, (int, float)):
            shares[name] = float(part or 0.0)
        else:
            if (part[0] if isinstance(part, tuple) else part) is x:
                raise UsageError(f"{name}: this is the training data: pass other data")
            parts[name] = _other(name, part, y, whole, **reading)
            if parts[name].y is None:
                raise UsageError(f"{name}: the sequences have neither classes nor targets: pass a pair (x, y)")
    training, tested = whole, parts.get("test")
    if shares.get("test"):
        training, tested = _cut(whole, shares["test"], seed)
    return train_sequences(
        training,
        tested,
        record_of(Architecture, given, units=widths_of(units)),
        record_of(FitOptions, given, validation=shares.get("validation", 0.0)),
        validation=parts.get("validation"),
        class_weight=class_weight,
    )


def _stream(x: Any, share: float, seed: int, buffer: int, reading: dict[str, Any], others: dict[str, Any]) -> Stream:
    """Return an iterable as a `Stream`, after one pass over it."""
    FitOptions(validation=share)  # checks the share
    if buffer < 1:
        raise UsageError(f"expected buffer >= 1, got {buffer}")
    for name, given in (*others.items(), *reading.items()):
        if name != "task" and given is not None:
            raise UsageError(
                f"{name} isn't supported where x is iterated over: its items are (sequence, target, weight)"
            )
    return Stream(x, share, seed, reading["task"], buffer=buffer)


def _taken(x: Any, y: Any, name: str, **reading: Any) -> Sequences:
    """Return data in memory or in a file as sequences."""
    if isinstance(x, (str, os.PathLike)):
        return read_sequences(x, y, **reading)
    return as_sequences(x, y, name=name, **reading)


def _other(name: str, given: Any, y: Any, whole: Sequences, **reading: Any) -> Sequences:
    """Return separate validation or test data, in the form of the training data."""
    pair = isinstance(given, tuple) and len(given) == 2
    x, own = given if pair else (given, y if isinstance(y, str) else None)
    if whole.columns:
        reading["features"] = whole.columns
    try:
        return _taken(x, own, name, labels=whole.labels or None, **reading)
    except UsageError as error:
        said = str(error)
        raise UsageError(said if said.startswith(name) else f"{name}: {said}") from None


def _cut(whole: Sequences, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Split off a test part, `share` of each class; return both parts."""
    if not 0.0 < share < 1.0:
        raise UsageError(f"expected test to be a share in (0, 1), or separate data, got {share}")
    y = np.zeros(len(whole.x)) if whole.y is None or isinstance(whole.y, list) else whole.y
    kept, held = split(y, share, np.random.default_rng([seed, 1]))
    if not len(held) or not len(kept):
        raise UsageError(
            f"test: a share of {share} of {len(y)} sequences leaves none to {'train' if len(held) else 'test'} on"
        )
    return taken(whole, kept), taken(whole, held)
