"""Predictions of any network, without torch: `predict`, which `Network.predict` calls."""

from __future__ import annotations

import os
import warnings
from collections import UserList
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.network import Network
from cellstack.train.checks import UsageError, collected
from cellstack.train.data.frames import is_frame, is_polars
from cellstack.train.data.lazy import is_iterable
from cellstack.train.data.reading import TABLES, TABLES_ONLY, merged, read_sequences
from cellstack.train.data.samples import read_sample
from cellstack.train.data.sequences import Sequences, as_sequences
from cellstack.train.data.ts import read_ts
from cellstack.train.examples import Examples, Inputs, Labelled, batches
from cellstack.train.forecasting.predict import forecasts_after
from cellstack.train.measures import errors
from cellstack.train.predictions import Predictions
from cellstack.train.tables.table import READING
from cellstack.train.text.data import alphabet_of, content
from cellstack.train.text.sampling import generate
from cellstack.train.trained import Task, trained

__all__ = ["answers", "as_trained", "outputs", "predict", "sequences", "trained"]


def predict(
    net: Network,
    data: Any,
    y: Any = None,
    *,
    id: Any = None,
    time: Any = None,
    threads: int | None = None,
    name: str = "the network",
    **options: Any,
) -> Any:
    """Predict what a network was trained for: see `Network.predict`.

    Args:
        net, data, y, id, time, threads, options: see `Network.predict`.
        name: the network's file, for messages.
    """
    data = collected(data)
    task = net.metadata.get("task")  # `as_trained` refuses an unknown one
    if task == "forecast":
        _refuse({"y": y}, "a network that forecasts: later rows of the table are compared: see .scores")
        _check_options(options, ("origin", *READING))
        how = {option: value for option, value in {"id": id, "time": time, **options}.items() if value is not None}
        found, notes = forecasts_after(net, data, name, threads=threads, **how)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        return found
    if task == "text":
        _refuse({"y": y, "id": id, "time": time, "threads": threads}, "a network that continues a text")
        _check_options(options, signature(generate).parameters)
        return _continued(net, data, name, options)
    if task is None:
        _refuse({"y": y, "id": id, "time": time, **options}, "a network that cellstack.train didn't train")
        found = outputs(net, data, threads)
        _warn_of_nan(found)
        return found
    _check_options(options, TABLES_ONLY)
    found = as_trained(net, data, y, name, id=id, time=time, **options)
    return replace(sequences(net, found, found.name, threads), polars=is_polars(data))


def _refuse(given: Mapping[str, Any], what: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"predict: {name} has no effect for {what}")


def _check_options(options: Mapping[str, Any], known: Iterable[str]) -> None:
    names = [name for name in known if name not in ("source", "net", "prompt", "name")]  # what predict itself passes
    for option in options:
        if option not in names:
            raise TypeError(f"predict: expected options among {', '.join(names)}, got {option!r}")


# ── classes and numbers ─────────────────────────────────────────────────────────────────────────────────────────────


def as_trained(
    net: Network, data: Any, y: Any = None, name: str = "the network", *, id: Any = None, time: Any = None, **how: Any
) -> Sequences:
    """Return data as sequences for a network, with the columns on which it was trained and its classes.

    Args:
        net: a network that classifies or predicts numbers.
        data: see `train.fit`.
        y: the true values, see `train.fit`; None for those that the data contains: a file, a frame, a dataset or an
            iterable. A table may lack the column of the training data.
        name: the network's file, for messages.
        id, time: columns of a table; None = as in training.
        how: `day_first`, `date_format`, `decimal` and `encoding` of a table's file; as in training where not given.

    Raises:
        UsageError: data in another form, or a class that the network doesn't have.
        FormatError: a network that `cellstack.train` didn't train, or a file that can't be read.
    """
    task = trained(net, name)
    known: dict[str, Any] = {
        "task": task.task,
        "labels": task.labels or None,
        "per_step": task.per_step or (False if task.task == "regress" else None),
    }
    table, columns = net.metadata.get("table") or {}, net.metadata.get("columns") or None  # None: any numeric columns
    label = table.get("label") if y is None else y
    named = {"id": id or table.get("id"), "time": time or table.get("time"), "features": columns}
    named["resample"] = table.get("resample")
    if isinstance(data, (str, os.PathLike)):
        if Path(data).suffix.lower() not in TABLES:
            return read_sequences(data, y, id=id, time=time, **known, **how)
        if named["id"] is None:
            raise UsageError(
                f"{data}: expected a .ts or .npz file, because {name} wasn't trained on a table, or `id=…`, the "
                "column that identifies the sequence of a row"
            )
        how = merged({option: table.get(option) for option in TABLES_ONLY}, how)
        return read_sequences(data, label, optional=y is None, **named, **known, **how)
    for option in how:
        raise UsageError(f"predict: {option} applies only to a table's file")
    if is_frame(data):
        if y is None and label not in [str(column) for column in data.columns]:
            label = known["per_step"] = None
        return as_sequences(data, label, **named, **known)
    if is_iterable(data):
        items: Any = data() if callable(data) else data
        data = UserList(items)  # a dataset, whose items may have their true values
    frames = isinstance(data, (list, tuple)) and any(map(is_frame, data))
    return as_sequences(data, y, id=id, time=time, features=columns if frames else None, **known)


def answers(net: Network, inputs: Inputs, examples: Examples, threads: int | None = None) -> Any:
    """Run the network over all examples, in batches without padding.

    Returns:
        The outputs, `[N, O]`; a list of `[T, O]` if the network has an output at every step.
    """
    everything = np.arange(len(examples.lengths))
    per_step = len(net.shapes[net.outputs[0]]) == 2
    out: Any = [np.empty(0)] * len(everything) if per_step else np.empty((0, 0))
    for indices in batches(examples.lengths, everything, 1024):
        x, mask = inputs(examples.fetch(indices).x)
        y = net.run(x, mask=mask, threads=threads)[0]
        if per_step:
            for n, row in zip(indices, y, strict=True):
                out[n] = row.astype(np.float64)
            continue
        if not out.size:
            out = np.empty((len(everything), y.shape[1]))
        out[indices] = y
    return out


def sequences(net: Network, sequences: Sequences, path: str, threads: int | None = None) -> Predictions:
    """Classify sequences, or predict their numbers.

    Args:
        net: a network made by `cellstack train` or `train.fit`.
        sequences: the data, read with the network's `labels`.
        path: the file of the data, for messages.
        threads: number of the kernel's threads.

    Raises:
        FormatError: sequences of another kind or width than the network's.
    """
    task = trained(net, path)
    classes = bool(sequences.labels)
    if sequences.y is not None and classes != bool(task.labels):
        kinds = ("numbers", "classes")
        raise FormatError(f"{path}: expected {kinds[not classes]}, found {kinds[classes]}")
    if sequences.channels != len(task.inputs.mean):
        names = f": {', '.join(sequences.columns)}" if sequences.columns else ""
        raise FormatError(f"{path}: expected {len(task.inputs.mean)} channels, found {sequences.channels}{names}")
    if sequences.y is not None and sequences.per_step != task.per_step:
        kinds = ("sequence", "step")
        raise FormatError(
            f"{path}: expected one target per {kinds[task.per_step]}, found one per {kinds[not task.per_step]}"
        )
    out = answers(net, task.inputs, Labelled(sequences), threads)
    scores = {} if sequences.y is None else _scores(task, out, sequences.y, path)
    return Predictions(out, task.labels, sequences.ids, sequences.table.get("id") or "sequence", scores)


def _scores(task: Task, out: Any, y: Any, path: str) -> dict[str, Any]:
    """Return the scores of outputs, compared with the true values."""
    flat = np.concatenate(out) if task.per_step else out  # [N, O]
    truth = np.concatenate(y) if isinstance(y, list) else y
    if task.task != "classify":
        if truth.size != flat.size:
            count = truth.shape[1] if truth.ndim == 2 else 1
            raise FormatError(f"{path}: expected {flat.shape[1]} targets, found {count}")
        return errors(flat, truth.reshape(flat.shape).astype(np.float64))
    chosen = flat.argmax(axis=1)
    confusion = np.zeros((len(task.labels),) * 2, np.int64)
    np.add.at(confusion, (truth, chosen), 1)
    return {"accuracy": float((chosen == truth).mean()), "confusion": confusion}


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _continued(net: Network, prompt: Any, name: str, options: dict[str, Any]) -> str:
    """Return the text that follows a prompt, which is a text or the path of one."""
    if isinstance(prompt, os.PathLike):
        prompt = content(os.fspath(prompt), alphabet_of(net, name).characters is None)
    elif isinstance(prompt, str) and os.path.isfile(prompt):
        raise UsageError(
            f"predict: {prompt!r} is both a text to continue and a file's name: pass pathlib.Path({prompt!r}) to "
            "continue the file's text; train.generate continues the name itself"
        )
    elif not isinstance(prompt, (str, bytes)):
        raise UsageError(
            f"predict: expected a text to continue, or the pathlib.Path of one, got {type(prompt).__name__}"
        )
    return "".join(generate(net, prompt, name=name, **options))


# ── other networks ──────────────────────────────────────────────────────────────────────────────────────────────────


def _warn_of_nan(found: Any) -> None:
    """Warn of NaN in the outputs of a network, which doesn't say what becomes of missing values."""
    several = found if isinstance(found, tuple) else (found,)
    count = max(sum(bool(np.isnan(row).any()) for row in rows) for rows in several)
    if count:
        warnings.warn(
            f"predict: the outputs contain NaN for {count} of {len(several[0])} sequences: NaN in the data makes "
            "states and outputs NaN from its step on. Fill in missing values, or leave out their steps by a mask",
            stacklevel=4,
        )


def outputs(net: Network, data: Any, threads: int | None = None, columns: Sequence[str] | None = None) -> Any:
    """Return the outputs of any network, for sequences of any lengths.

    Args:
        net: the network.
        data: what `Network.run` takes; for a network with one input also a list, an object array, a dataset or an
            iterable of sequences `[T, I]`, whose T may differ; or the name of a file: `.ts`, or one that `read_sample`
            reads.
        threads: number of the kernel's threads.
        columns: see `read_sample`.

    Returns:
        `[N, …]`, in the order of the sequences; a list of arrays if the output has a time axis and lengths differ; a
        tuple of these if there are several outputs.

    Raises:
        UsageError: data in another form, or no sequence.
        ShapeError: sequences of another width or rank.
    """
    if isinstance(data, (str, os.PathLike)):
        path = os.fspath(data)
        of_ts = columns is None and path.lower().endswith(".ts")
        data = read_ts(path).x if of_ts else read_sample(net, path, columns)
    if is_frame(data):
        raise UsageError(
            "predict: expected arrays, a list of sequences or a file, got a data frame: frames need a network that was "
            "trained on one"
        )
    array = hasattr(data, "shape") and getattr(data.dtype, "kind", "") != "O"
    if array or isinstance(data, Mapping) or len(net.inputs) > 1:
        return net.run(data, threads=threads)[0]
    return _of_rows(net, data, lambda rows: net.unpadded.run(rows, threads=threads)[0])


def _of_rows(net: Network, data: Any, run: Callable[[NDArray], Any]) -> Any:
    """Run a network with one input over sequences, grouped by shape, so that nothing is padded."""
    name = net.inputs[0]
    sequences: Any = data() if callable(data) else data
    rows = [net.as_inputs("predict", row)[name] for row in sequences]
    if not rows:
        raise UsageError("predict: expected at least one sequence, got none")
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(row.shape, []).append(n)
    found: list[list[Any]] = [[None] * len(rows) for _ in net.outputs]
    for members in groups.values():
        y = run(np.stack([rows[n] for n in members]))
        for out, part in zip(found, y if isinstance(y, tuple) else (y,), strict=True):
            for n, one in zip(members, part, strict=True):
                out[n] = one
    whole = [np.stack(out) if len({one.shape for one in out}) == 1 else out for out in found]
    return whole[0] if len(whole) == 1 else tuple(whole)
