"""`train.fit`: from data in memory or a file to a trained network, in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cellstack.train.checks import UsageError
from cellstack.train.data.reading import read_sequences
from cellstack.train.data.sequences import Sequences, as_sequences, taken
from cellstack.train.data.stream import BUFFER, Stream, is_stream
from cellstack.train.examples import split
from cellstack.train.fitting import Result
from cellstack.train.settings import Architecture, Own, RunOptions, Settings
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
    units: int | Sequence[int] = (48, 48),
    cell: str = "lstm",
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
    progress: bool = False,
    threads: int | None = None,
    device: str = "auto",
    inspect: bool = False,
    buffer: int = BUFFER,
) -> Result:
    """Train a network to tell classes or numbers of sequences, of whole ones or of each of their steps.

    Args:
        x: an array `[N, T, C]`; a list of arrays `[T, C]`, each with its own T; a pandas or polars frame, a row a step;
            the name of a file, .ts, .npz, .csv or .parquet; a map-style dataset of `(sequence, target)`, such as
            torch's; or an iterable of these that begins anew each time, or a function that returns an iterator, for
            what is larger than memory: see `Stream`. NaN where a value is missing.
        y: classes, text or whole numbers or bools, or numbers, one a sequence or, with a further axis, several numbers
            a sequence or an entry a step. With a frame also the name of a column, or a mapping or Series by id; with a
            file of a frame that name; None with files that hold them, .ts and .npz.
        validation: share of the sequences held out for early stopping, of each class alike; or data of its own: a pair
            `(x, y)`, a frame or a file as `x` is. The epoch that does best on it is kept; 0: none, and the last one is.
        test: the same for what nothing is chosen by: `scores` are measured on it. None: nothing.
        task: `"classify"` or `"regress"`; told by `y` where None: text, bools and whole numbers are classes.
        id, time, features, per_step: see `as_sequences`; for frames, but for the last.
        units: width of each layer, bottom first.
        cell, bidirectional, dropout, pooling, every_step: see `Model`.
        head, loss, metrics, optimizer, scheduler, callbacks: what of your own takes the place of what there is, or
            stands beside it: see `Own`.
        class_weight: `"balanced"`, or weights by class: how much each counts in the loss.
        sample_weight: `[N]`, how much each sequence counts; with a frame also a column or a mapping by id.
        epochs, batch, lr, clip, patience, noise, offset, seed: see `Settings`.
        init: a network, or the file of one, of the same shapes, whose weights are the start.
        checkpoint, resume, overwrite, progress, threads, inspect: see `learn`.
        log: where each epoch's figures go as it ends: a file that ends in .csv or .json, or a folder for TensorBoard.
        device: see `processes`.
        buffer: of what is iterated over, how many examples are in memory at a time; they are shuffled among each other.

    Returns:
        The `Result`: `.network` runs without torch, `.model` is a torch module, `.scores`, `.history`, `.labels`, and
        `.sentence` says what stopped the training and how good it is.

    Raises:
        UsageError: data or settings that can't be used as they are given; the message names the mend.
        FormatError: a file that can't be read.
        OSError: a file that can't be read or written.

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(40, 12, 3)), np.repeat(["calm", "busy"], 20)
    >>> x[y == "busy"] *= 3
    >>> result = fit(x, y, test=0.25, units=8, epochs=20, threads=1)
    >>> result.labels, result.network(x[:2].astype(np.float32)).shape
    (('busy', 'calm'), (2, 2))
    """
    told = {"task": task, "id": id, "time": time, "features": features, "per_step": per_step}
    if is_stream(x):
        share = float(validation) if isinstance(validation, (int, float)) else 0.0
        if isinstance(test, (int, float)):
            raise UsageError("expected test to be data of its own, where x is iterated over, got a share")
        whole: Any = _stream(x, share, seed, buffer, told, {"y": y, "sample_weight": sample_weight})
    else:
        whole = _taken(x, y, "x", weight=sample_weight, **told)
    for column, why in whole.ignored.items():
        warnings.warn(f"column {column!r} isn't used: it {why}", stacklevel=2)
    told["task"] = task or ("classify" if whole.labels else None if whole.y is None else "regress")
    parts, shares = {}, {}
    for name, given in (("validation", validation), ("test", test)):
        if given is None or isinstance(given, (int, float)):
            shares[name] = float(given or 0.0)
        else:
            parts[name] = _other(name, given, y, whole, **told)
    training, tested = whole, parts.get("test")
    if shares.get("test"):
        training, tested = _cut(whole, shares["test"], seed)
    settings = Settings(epochs, batch, lr, clip, patience, noise, offset, seed)
    widths = (units,) if isinstance(units, int) else tuple(units)
    architecture = Architecture(widths, bidirectional, dropout, pooling, every_step, cell)
    options = RunOptions(
        shares.get("validation", 0.0),
        checkpoint=checkpoint,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        device=device,
        inspect=inspect,
        threads=threads,
        log=log,
    )
    own = Own(head, loss, metrics, optimizer, scheduler, tuple(callbacks), init)
    return train_sequences(
        training,
        tested,
        architecture,
        settings,
        options,
        own,
        validation=parts.get("validation"),
        class_weight=class_weight,
    )


def _stream(x: Any, share: float, seed: int, buffer: int, told: dict[str, Any], others: dict[str, Any]) -> Stream:
    """Return what is iterated over, once it has been."""
    RunOptions(share)  # checks it
    if buffer < 1:
        raise UsageError(f"expected buffer >= 1, got {buffer}")
    for name, given in (*others.items(), *told.items()):
        if name != "task" and given is not None:
            raise UsageError(
                f"expected no {name} where x is iterated over, as its items are (sequence, target, weight)"
            )
    return Stream(x, share, seed, told["task"], buffer=buffer)


def _taken(x: Any, y: Any, name: str, **told: Any) -> Sequences:
    """Return data, or what a file holds, as sequences."""
    if isinstance(x, (str, os.PathLike)):
        return read_sequences(x, y, **told)
    return as_sequences(x, y, name=name, **told)


def _other(name: str, given: Any, y: Any, whole: Sequences, **told: Any) -> Sequences:
    """Return data of its own for one of the parts, in the form of the training's."""
    pair = isinstance(given, tuple) and len(given) == 2
    x, own = given if pair else (given, y if isinstance(y, str) else None)
    if whole.columns:
        told["features"] = whole.columns
    try:
        return _taken(x, own, name, labels=whole.labels or None, **told)
    except UsageError as error:
        said = str(error)
        raise UsageError(said if said.startswith(name) else f"{name}: {said}") from None


def _cut(whole: Sequences, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Return what is trained on and what is tested on: `share` of each class."""
    if not 0.0 < share < 1.0:
        raise UsageError(f"expected test to be a share in (0, 1), or data of its own, got {share}")
    y = np.zeros(len(whole.x)) if whole.y is None or isinstance(whole.y, list) else whole.y
    kept, held = split(y, share, np.random.default_rng([seed, 1]))
    if not len(held) or not len(kept):
        raise UsageError(f"expected a test share that holds a sequence out, and leaves one, got {share} of {len(y)}")
    return taken(whole, kept), taken(whole, held)
