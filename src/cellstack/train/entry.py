"""`train.fit`, `fit_forecast` and `fit_text`: train a network on data in memory or in a file, in one call."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from cellstack.train.checks import UsageError, collected
from cellstack.train.data.reading import SEQUENCES, TABLES_ONLY, read_sequences
from cellstack.train.data.sequences import Sequences, as_sequences
from cellstack.train.fitting import Result
from cellstack.train.forecasting.plan import planned
from cellstack.train.forecasting.training import Trained, train_forecast
from cellstack.train.options import Architecture, FitOptions, ForecastOptions, record_of, settle
from cellstack.train.parts import cut
from cellstack.train.progress import above, is_shown
from cellstack.train.signatures import trains
from cellstack.train.tables.table import READING, Table, read_table
from cellstack.train.text.data import Text, content, usual_batch
from cellstack.train.text.workflow import train_text
from cellstack.train.workflow import train_sequences


@trains("sequences", "x: Any, y: Any = None")
def fit(x: Any, y: Any, given: dict[str, Any]) -> Result:
    """Train a network to classify sequences or to predict numbers, for whole sequences or for each of their steps.

    Args:
        x: an array `[N, T, C]`; a list of arrays `[T, C]`, whose T may differ; a pandas or polars frame with a row per
            step; the name of a file, .ts, .npz, .csv or .parquet; a map-style dataset of `(sequence, target)`, such as
            torch's, also of data larger than memory. NaN where a value is missing.
        y: classes (text, integers or bools) or numbers: one per sequence or, with another axis, several numbers per
            sequence or one entry per step. With a frame also the name of a column, or a mapping or Series by id; with
            a table's file the name of a column; None with .ts and .npz files, which contain it.

    Returns:
        The `Result`: `.network` runs without torch, `.model` is a torch module; also `.scores`, `.history`, `.labels`,
        and `.sentence`, which says what stopped the training and how good the network is.

    Raises:
        UsageError: data or options that can't be used as given; the message says how to fix it.
        FormatError: a file that can't be read.
        OSError: a file that can't be read or written.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(40, 12, 3)), np.repeat(["calm", "busy"], 20)
    >>> x[y == "busy"] *= 3
    >>> result = fit(x, y, test=0.25, units=8, epochs=20, threads=1)
    >>> result.labels, result.network(x[:2].astype(np.float32)).shape
    (('busy', 'calm'), (2, 2))
    """
    x, seed, weight = collected(x), given["seed"], given["sample_weight"]
    reading = {name: given[name] for name in SEQUENCES}
    whole = _taken(x, y, "x", weight=weight, **reading)
    for column, why in whole.ignored.items():
        warnings.warn(f"column {column!r} isn't used: it {why}", stacklevel=3)
    if whole.rates:
        warnings.warn(whole.rates, stacklevel=3)
    reading["task"] = reading["task"] or ("classify" if whole.labels else None if whole.y is None else "regress")
    parts, shares = {}, {}
    for name in ("validation", "test"):
        part = given[name]
        if part is None or isinstance(part, (int, float)):
            shares[name] = float(part or 0.0)
        else:
            if (part[0] if isinstance(part, tuple) else part) is x:
                raise UsageError(f"{name}: this is the training data: pass other data")
            parts[name] = _other(name, part, y, whole, **reading)
            if parts[name].y is None:
                raise UsageError(f"{name}: the sequences have neither classes nor targets: pass a pair (x, y)")
    training, tested = whole, parts.get("test")
    settle(given, len(whole.x))
    if shares.get("test"):
        training, tested = cut(whole, shares["test"], seed)
    return train_sequences(
        training,
        tested,
        record_of(Architecture, given),
        record_of(FitOptions, given, validation=shares.get("validation", 0.0)),
        validation=parts.get("validation"),
        class_weight=given["class_weight"],
    )


@trains("forecasts", "data: Any", ("target", "horizon"))
def fit_forecast(data: Any, given: dict[str, Any]) -> Trained:
    """Train a network to forecast columns of a table, as `cellstack train` does, with the same defaults.

    Args:
        data: a pandas or polars frame, the name of a CSV or Parquet file, or a `Table` from `read_table`.

    Returns:
        `result`, with the network and its errors, `recipe`, `test` and `understood`. What depends on options that are
        None also depends on the table and on the number of training windows.

    Raises:
        UsageError: a column that doesn't exist or is empty, too few rows, or options that don't fit each other.
        FormatError: a file or a cell that can't be read.
        OSError: a file that can't be read or written.

    Example:
        >>> import numpy as np, pandas as pd
        >>> from cellstack import train
        >>> n = np.arange(120)
        >>> frame = pd.DataFrame({"y": 5 + np.sin(n * np.pi / 6)})
        >>> quick = {"units": 4, "members": 1, "epochs": 1}
        >>> done = train.fit_forecast(frame, "y", horizon=4, seasons=12, **quick)
        >>> done.recipe.horizon, done.result.network.metadata["task"]
        (4, 'forecast')
    """
    reading = {name: given[name] for name in READING if given[name] not in (None, ())}
    if isinstance(data, Table):
        for name in reading:
            raise UsageError(f"fit_forecast: {name} has no effect for a Table, which has been read already")
    table = data if isinstance(data, Table) else read_table(data, **reading)
    request = record_of(ForecastOptions, {name: value for name, value in given.items() if value is not None})
    recipe, _, usual, validation = planned(table, request, given["validation"], given["test"])
    given |= {name: value for name, value in usual.items() if given[name] is None}
    options = record_of(FitOptions, given, validation=validation)
    return train_forecast(table, request, record_of(Architecture, given), options, given["test"], recipe)


@trains("texts", "text: str | bytes | Path")
def fit_text(text: str | bytes | Path, given: dict[str, Any]) -> Result:
    """Train a network to predict the next character of a text, by truncated backpropagation over stateful batches.

    The training part is divided into `batch` parallel streams, which are read `steps` characters at a time. The state
    is carried from one training step to the next, while gradients are truncated at its start. Each epoch starts with
    zero states.

    Args:
        text: a text, whose characters become the model's; bytes, for a model of all 256 bytes; or the `Path` of a UTF-8
            file.

    Returns:
        The `Result`: `.network` maps ids `[B, T]` (one-hot `[B, T, V]` without an embedding) to the next character's
        probabilities `[B, T, V]`; it supports streaming and `generate`. `.scores` has `bits_per_character` of the test
        part and `validation_bits_per_character`; `.history` has an entry per epoch, with a `sample`.

    Raises:
        UsageError: a text that is too short, or options that can't be used; the message says how to fix it.
        FormatError: a file that isn't UTF-8.
        OSError: a file that can't be read or written.

    >>> from cellstack.train import generate
    >>> result = fit_text("a rose is " * 200, units=16, epochs=8, batch=4, steps=32, threads=1)
    >>> "".join(generate(result.network, "a ro", length=26, temperature=0))
    'se is a rose is a rose is '
    """
    whole = Text.of(content(str(text), given["bytes"]), str(text)) if isinstance(text, Path) else Text.of(text)
    parts = whole.parts(given["validation"], given["test"])
    if given["batch"] is None:
        given["batch"] = usual_batch(parts.training[1], given["steps"])
    say = above if is_shown(given["progress"]) else None
    return train_text(whole, parts, record_of(Architecture, given), record_of(FitOptions, given), say=say)


def _taken(x: Any, y: Any, name: str, **reading: Any) -> Sequences:
    """Return data in memory or in a file as sequences."""
    reading = {name: value for name, value in reading.items() if value is not None}
    if isinstance(x, (str, os.PathLike)):
        return read_sequences(x, y, **reading)
    for option in TABLES_ONLY:
        if option in reading:
            raise UsageError(f"{option} has no effect: it applies to files, not to data in memory")
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
