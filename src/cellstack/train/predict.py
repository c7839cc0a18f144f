"""Run a trained network over files: classes or numbers for `.ts`, a forecast for CSV. Needs no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.nodes import Standardise
from cellstack.spec import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.examples import Examples, Inputs, Labelled, batches
from cellstack.train.forecast import Recipe, Windows, errors
from cellstack.train.table import Table
from cellstack.train.ts import Sequences

TASKS = ("classify", "regress", "forecast")


class Trained(NamedTuple):
    """What a network's metadata says about what it was trained for.

    `task` is `"classify"`, `"regress"` or `"forecast"`; `labels` are the classes' names; `recipe` is a forecast's.
    """

    task: str
    labels: tuple[str, ...]
    inputs: Inputs
    recipe: Recipe | None


def metadata(
    task: str, inputs: Inputs, labels: tuple[str, ...] = (), recipe: Recipe | None = None, **more: Any
) -> dict[str, Any]:
    """Return what `trained` reads, as plain values, and whatever `more` should travel along."""
    return {
        "task": task,
        "labels": list(labels),
        "observed": list(inputs.observed),
        "recipe": None if recipe is None else recipe.to_json(),
        **more,
    }


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
            f"{path}: expected the metadata of cellstack train, its task one of {', '.join(TASKS)}, found task {task!r}"
        )
    answers = [net.shapes[name] for name in net.outputs]
    outputs = answers[0][-1]
    if len(net.inputs) != 1 or len(answers) != 1 or len(answers[0]) != 1 or outputs is None:
        raise FormatError(f"{path}: expected one answer a sequence, found a network that answers every step")
    inputs = _inputs(first, net.metadata.get("observed"), path)
    labels = _labels(net.metadata.get("labels"), task, outputs, path)
    recipe = _recipe(net.metadata.get("recipe"), len(inputs.mean), outputs, path) if task == "forecast" else None
    return Trained(task, labels, inputs, recipe)


def _inputs(first: Standardise, observed: Any, path: str) -> Inputs:
    """Return the raw channels' part of the first node, and which of them have a companion."""
    raw = len(first.mean) - len(observed) if isinstance(observed, list) else 0
    if raw < 1 or not all(type(n) is int and before < n < raw for before, n in pairwise([-1, *observed])):
        raise FormatError(
            f"{path}: expected observed to be rising positions of the raw channels, below {raw}, found {observed!r}"
        )
    return Inputs(first.mean[:raw], first.scale[:raw], tuple(observed))


def _labels(labels: Any, task: str, outputs: int, path: str) -> tuple[str, ...]:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"{path}: expected labels to be a list of text, found {labels!r:.60}")
    if task == "classify" and not outputs == len(labels) == len(set(labels)):
        raise FormatError(f"{path}: expected {outputs} different labels, one an output, found {len(set(labels))}")
    if task == "regress" and (labels or outputs != 1):
        raise FormatError(f"{path}: expected no labels and one output for regress, found {len(labels)} and {outputs}")
    return tuple(labels)


def _recipe(values: Any, channels: int, outputs: int, path: str) -> Recipe:
    try:
        recipe = Recipe.from_json(values)
    except UsageError as error:
        raise FormatError(f"{path}: recipe: {error}") from None
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path}: expected a recipe that Recipe.to_json wrote, found another ({error})") from None
    if recipe.horizon != outputs:
        raise FormatError(f"{path}: expected a horizon of {outputs}, one an output, found {recipe.horizon}")
    if channels != 2 + len(recipe.inputs):
        raise FormatError(f"{path}: expected {2 + len(recipe.inputs)} raw channels for this recipe, found {channels}")
    return recipe


def answers(net: Network, inputs: Inputs, examples: Examples, threads: int | None = None) -> NDArray[np.float64]:
    """Return what the network answers to every example, `[N, O]`, in batches without padding."""
    everything = np.arange(len(examples.lengths))
    out = np.empty((0, 0))
    for indices in batches(examples.lengths, everything, 1024):
        x, mask = inputs(examples.fetch(indices).x)
        y = net.run(x, mask=mask, threads=threads)[0]
        if not out.size:
            out = np.empty((len(everything), y.shape[1]))
        out[indices] = y
    return out


def sequences(net: Network, sequences: Sequences, path: str, threads: int | None = None) -> dict[str, Any]:
    """Classify sequences, or give their numbers.

    Args:
        net: a network that `cellstack train` made.
        sequences: what to run it on; read with the network's `labels`.
        path: the file they come from, for messages.
        threads: how many the kernel may use.

    Returns:
        `answers` `[N, O]`, and `predicted`, a label or a number each; where the file holds the truth, `accuracy` and
        `confusion` (`[true, predicted]` counts), or `rmse` and `mae`.

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
    out = answers(net, task.inputs, Labelled(sequences), threads)
    if task.task != "classify":
        result: dict[str, Any] = {"answers": out, "predicted": out[:, 0].tolist()}
        return result if sequences.y is None else result | errors(out[:, 0], sequences.y.astype(np.float64))
    chosen = out.argmax(axis=1)
    result = {"answers": out, "predicted": [task.labels[n] for n in chosen]}
    if sequences.y is not None:
        confusion = np.zeros((len(task.labels),) * 2, np.int64)
        np.add.at(confusion, (sequences.y, chosen), 1)
        result |= {"accuracy": float((chosen == sequences.y).mean()), "confusion": confusion}
    return result


def forecast(net: Network, table: Table, path: str, threads: int | None = None) -> dict[str, Any]:
    """Forecast the steps after a table's last row.

    Args:
        net: a network that `cellstack train` made of a table.
        table: the series.
        path: the network's file, for messages.
        threads: how many the kernel may use.

    Returns:
        `target`, and `forecast` and `seasonal_naive` `[horizon]` in the target's units, NaN where the series has no
        value to start from; `dates`, where the table has some.

    Raises:
        UsageError: a column of the recipe isn't there.
        FormatError: the network's metadata doesn't fit it, or its forecast goes beyond the calendar.
    """
    task = trained(net, path)
    assert task.recipe is not None
    windows = Windows(task.recipe, table, np.array([len(table) - 1]))
    reference = windows.reference(np.array([0]))
    out = reference + answers(net, task.inputs, windows, threads)
    dates = [table.date_after(n) for n in range(1, task.recipe.horizon + 1)]
    return {
        "target": task.recipe.target,
        "dates": None if dates[0] is None else dates,
        "forecast": out[0],
        "seasonal_naive": reference[0],
    }


def backtest(
    net: Network, table: Table, origins: NDArray[np.int64], path: str, drift: NDArray[np.float32]
) -> dict[str, dict[str, float]]:
    """Return the errors of forecasts from every one of `origins`, and those of two simple rules on the same points.

    Args:
        net: a network that `cellstack train` made of a table.
        table: the series.
        origins: row of the last step that each forecast sees, `[N]`.
        path: the network's file, for messages.
        drift: mean difference to the value one season before in the training part, `[horizon]`.

    Returns:
        `mae` and `rmse` of `model`, of `seasonal_naive`, the value one season before, and of `seasonal_drift`, that
        value plus `drift`.

    Raises:
        UsageError: a column of the recipe isn't there.
    """
    task = trained(net, path)
    assert task.recipe is not None
    windows, every = Windows(task.recipe, table, origins), np.arange(len(origins))
    reference, actual = windows.reference(every), windows.actual(every)
    actual = np.where(np.isnan(reference), np.nan, actual)
    out = reference + answers(net, task.inputs, windows)
    rules = {"seasonal_naive": reference, "seasonal_drift": reference + drift, "model": out}
    return {name: errors(values, actual) for name, values in rules.items()}
