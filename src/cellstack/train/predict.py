"""Run a trained network over files: classes or numbers for `.ts`, a forecast for CSV. Needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.nodes import Standardise
from cellstack.spec import FormatError
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
    first = net.nodes[0]
    try:
        task, observed = net.metadata["task"], tuple(map(int, net.metadata["observed"]))
        labels = tuple(map(str, net.metadata["labels"]))
        recipe = net.metadata["recipe"]
        recipe = None if recipe is None else Recipe.from_json(recipe)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: expected the metadata of cellstack train, found none that fits ({error})") from None
    if task not in TASKS or (task == "forecast") != (recipe is not None) or not isinstance(first, Standardise):
        raise FormatError(f"{path}: expected a classify, regress or forecast model, found task {task!r}")
    raw = len(first.mean) - len(observed)
    return Trained(task, labels, Inputs(first.mean[:raw], first.scale[:raw], observed), recipe)


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
        FormatError: sequences of another width than the network's.
    """
    task = trained(net, path)
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

    Returns:
        `target`, and `forecast` and `seasonal_naive` `[horizon]` in the target's units, NaN where the series has no
        value to start from; `dates`, where the table has some.

    Raises:
        ValueError: a column of the recipe isn't there.
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

    `seasonal_naive` is the value one season before, `seasonal_drift` is that plus `drift` `[horizon]`, the mean
    difference in the training part.
    """
    task = trained(net, path)
    assert task.recipe is not None
    windows, every = Windows(task.recipe, table, origins), np.arange(len(origins))
    reference, actual = windows.reference(every), windows.actual(every)
    actual = np.where(np.isnan(reference), np.nan, actual)
    out = reference + answers(net, task.inputs, windows)
    rules = {"seasonal_naive": reference, "seasonal_drift": reference + drift, "model": out}
    return {name: errors(values, actual) for name, values in rules.items()}
