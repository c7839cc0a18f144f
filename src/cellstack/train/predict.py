"""Run a trained network over sequences, to classify them or to predict numbers. Needs no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cellstack.network import Network
from cellstack.nodes import Standardise
from cellstack.spec import FormatError
from cellstack.train.data.frames import is_frame
from cellstack.train.data.sequences import Sequences, as_sequences
from cellstack.train.examples import Examples, Inputs, Labelled, batches
from cellstack.train.measures import errors

TASKS = ("classify", "regress")


class Trained(NamedTuple):
    """What a network was trained for, according to its metadata.

    `task` is `"classify"` or `"regress"`; `labels` are the classes; `per_step` says whether there is an output at every
    step.
    """

    task: str
    labels: tuple[Any, ...]
    inputs: Inputs
    per_step: bool = False


def metadata(task: str, inputs: Inputs, labels: tuple[Any, ...] = (), **more: Any) -> dict[str, Any]:
    """Return the metadata that `trained` reads, as plain values, and `more` entries."""
    return {"task": task, "labels": list(labels), "observed": list(inputs.observed), **more}


def trained(net: Network, path: str) -> Trained:
    """Return what the network was trained for.

    Args:
        net: the network.
        path: the file it was read from, for the message.

    Raises:
        FormatError: it wasn't written by `cellstack train`, or its metadata doesn't fit its nodes.
    """
    task, first = net.metadata.get("task"), net.nodes[0]
    if task not in TASKS or not isinstance(first, Standardise):
        raise FormatError(
            f"{path}: expected a network written by cellstack train, for the task {' or '.join(TASKS)}, found {task!r}"
        )
    answers = [net.shapes[name] for name in net.outputs]
    outputs = answers[0][-1]
    per_step = net.metadata.get("per_step", False) is True
    if len(net.inputs) != 1 or len(answers) != 1 or len(answers[0]) != 1 + per_step or outputs is None:
        expected, found = ("step", "one per sequence") if per_step else ("sequence", "one per step")
        raise FormatError(f"{path}: expected a network with one output per {expected}, found {found}")
    inputs = raw_inputs(first, net.metadata.get("observed"), path)
    labels = _labels(net.metadata.get("labels"), task, outputs, path)
    return Trained(task, labels, inputs, per_step)


def raw_inputs(first: Standardise, observed: Any, path: str) -> Inputs:
    """Return the raw channels of the first node, and which of them have an indicator."""
    raw = len(first.mean) - len(observed) if isinstance(observed, list) else 0
    if raw < 1 or not all(type(n) is int and before < n < raw for before, n in pairwise([-1, *observed])):
        raise FormatError(
            f"{path}: expected observed to be ascending indices of raw channels, below {raw}, found {observed!r}"
        )
    return Inputs(first.mean[:raw], first.scale[:raw], tuple(observed))


def _labels(labels: Any, task: str, outputs: int, path: str) -> tuple[Any, ...]:
    kinds = {type(label) for label in labels} if isinstance(labels, list) else {list}
    if kinds not in (set(), {str}, {int}, {bool}):
        raise FormatError(f"{path}: expected labels to be a list of strings, integers or bools, found {labels!r:.60}")
    if task == "classify" and not outputs == len(labels) == len(set(labels)):
        raise FormatError(f"{path}: expected {outputs} distinct labels, one per output, found {len(set(labels))}")
    if task == "regress" and labels:
        raise FormatError(f"{path}: expected no labels for regress, found {len(labels)}")
    return tuple(labels)


def run(
    net: Network, x: Any, y: Any = None, *, id: str | None = None, time: str | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Run a network made by `train.fit` on data in memory, in any form that `train.fit` takes except iterables.

    Args:
        net: the network.
        x: the data; of a frame, the columns on which the network was trained.
        y: the true values, if known.
        id, time: columns of a frame; None = as in training.
        threads: number of the kernel's threads.

    Returns:
        `predicted`, `answers` and, if `y` is given, the scores: see `sequences`. In the order of the sequences, with
        their `ids` if they come from a frame.

    Raises:
        UsageError: data in another form, or classes that the network doesn't have.
        FormatError: a network that wasn't trained here, or sequences of another width.
    """
    task, reading = trained(net, "the network"), dict[str, Any]()
    if is_frame(x):
        table = net.metadata.get("table") or {}
        reading = {"id": id or table.get("id"), "time": time or table.get("time")}
        reading["features"] = net.metadata.get("columns") or None
    labels = task.labels or None
    data = as_sequences(x, y, task=task.task, labels=labels, per_step=task.per_step or None, **reading)
    result = sequences(net, data, data.name, threads)
    return {"ids": data.ids, **result} if data.ids else result


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


def sequences(net: Network, sequences: Sequences, path: str, threads: int | None = None) -> dict[str, Any]:
    """Classify sequences, or predict their numbers.

    Args:
        net: a network made by `cellstack train` or `train.fit`.
        sequences: the data, read with the network's `labels`.
        path: the file of the data, for messages.
        threads: number of the kernel's threads.

    Returns:
        `answers`, see `answers`, and `predicted`, a label, a number or a list of numbers for each sequence, or a list
        of these with one for each step; if the data has the true values, also `accuracy` and `confusion`
        (`[true, predicted]` counts), or `rmse` and `mae`.

    Raises:
        FormatError: sequences of another kind or width than the network's.
    """
    task = trained(net, path)
    classes = bool(sequences.labels)
    if sequences.y is not None and classes != bool(task.labels):
        kinds = ("numbers", "classes")
        raise FormatError(f"{path}: expected {kinds[not classes]}, found {kinds[classes]}")
    if sequences.channels != len(task.inputs.mean):
        raise FormatError(f"{path}: expected {len(task.inputs.mean)} channels, found {sequences.channels}")
    if sequences.y is not None and sequences.per_step != task.per_step:
        kinds = ("sequence", "step")
        raise FormatError(
            f"{path}: expected one target per {kinds[task.per_step]}, found one per {kinds[not task.per_step]}"
        )
    out = answers(net, task.inputs, Labelled(sequences), threads)
    parts = out if task.per_step else [out]  # [T, O] each, or one [N, O]
    if task.task == "classify":
        chosen = [part.argmax(axis=1) for part in parts]
        predicted: list[Any] = [[task.labels[n] for n in part] for part in chosen]
    else:
        chosen = [part[:, 0] if part.shape[1] == 1 else part for part in parts]
        predicted = [part.tolist() for part in chosen]
    result: dict[str, Any] = {"answers": out, "predicted": predicted if task.per_step else predicted[0]}
    if sequences.y is None:
        return result
    flat = np.concatenate(chosen)
    truth = np.concatenate(sequences.y) if isinstance(sequences.y, list) else sequences.y
    if task.task != "classify":
        if truth.size != flat.size:
            count = truth.shape[1] if truth.ndim == 2 else 1
            raise FormatError(f"{path}: expected {out[0].shape[-1]} targets, found {count}")
        return result | errors(flat, truth.reshape(flat.shape).astype(np.float64))
    confusion = np.zeros((len(task.labels),) * 2, np.int64)
    np.add.at(confusion, (truth, flat), 1)
    return result | {"accuracy": float((flat == truth).mean()), "confusion": confusion}
