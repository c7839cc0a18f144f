"""What a network was trained for, according to its metadata. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.network import Network
from cellstack.nodes import Conv1D, Standardise
from cellstack.train.checks import UsageError
from cellstack.train.examples import ChangeWeights, Inputs
from cellstack.train.forecasting.recipe import Recipe

TASKS = ("classify", "regress")
OBSERVED = "{} observed"  # the name of a channel that is 1 where another one was observed


class Task(NamedTuple):
    """What a network was trained for, according to its metadata.

    `task` is `"classify"` or `"regress"`; `labels` are the classes; `inputs` are the raw channels; `per_step` says
    whether there is an output at every step.
    """

    task: str
    labels: tuple[Any, ...]
    inputs: Inputs
    per_step: bool = False


def metadata(task: str, inputs: Inputs, labels: tuple[Any, ...] = (), **more: Any) -> dict[str, Any]:
    """Return the metadata that `trained` reads, as plain values, and `more` entries."""
    known = {"observed": list(inputs.observed), "changes": inputs.changes is not None}
    return {"task": task, "labels": list(labels), **known, **more}


def trained(net: Network, path: str) -> Task:
    """Return what the network was trained for.

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
    if net.metadata.get("changes"):
        inputs = replace(inputs, changes=_changes(net, len(first.mean), len(inputs.mean), path))
    labels = _labels(net.metadata.get("labels"), task, outputs, path)
    return Task(task, labels, inputs, per_step)


def raw_inputs(first: Standardise, observed: Any, path: str) -> Inputs:
    """Return the raw channels of the first node, and which of them have an indicator."""
    raw = len(first.mean) - len(observed) if isinstance(observed, list) else 0
    if raw < 1 or not all(type(n) is int and before < n < raw for before, n in pairwise([-1, *observed])):
        raise FormatError(
            f"{path}: expected observed to be ascending indices of raw channels, below {raw}, found {observed!r}"
        )
    return Inputs(first.mean[:raw], first.scale[:raw], tuple(observed))


def _changes(net: Network, width: int, raw: int, path: str) -> ChangeWeights:
    """Return the weights of the second node, which computes the changes of the raw channels."""
    node = next(iter(net.nodes[1:]), None)
    if not isinstance(node, Conv1D) or node.kernel.shape[:2] != (2, width) or node.kernel[:, raw:].any():
        raise FormatError(f"{path}: expected the changes of {raw} channels after the first node, found {node}")
    bias = np.zeros(node.kernel.shape[2], np.float32) if node.bias is None else node.bias
    return ChangeWeights(node.kernel[:, :raw], bias)


def _labels(labels: Any, task: str, outputs: int, path: str) -> tuple[Any, ...]:
    kinds = {type(label) for label in labels} if isinstance(labels, list) else {list}
    if kinds not in (set(), {str}, {int}, {bool}):
        raise FormatError(f"{path}: expected labels to be a list of strings, integers or bools, found {labels!r:.60}")
    if task == "classify" and not outputs == len(labels) == len(set(labels)):
        raise FormatError(f"{path}: expected {outputs} distinct labels, one per output, found {len(set(labels))}")
    if task == "regress" and labels:
        raise FormatError(f"{path}: expected no labels for regress, found {len(labels)}")
    return tuple(labels)


def channels(net: Network) -> tuple[str, ...]:
    """Return the names of the channels of a network's input, those of the indicators at the end; () if unknown."""
    columns, observed = net.metadata.get("columns"), net.metadata.get("observed")
    if net.task == "forecast":
        try:
            columns = Recipe.from_json(net.metadata.get("recipe") or {}).channels
        except (UsageError, KeyError, TypeError, AttributeError):  # of an older version, which `predict` refuses
            return ()
    if not columns or not isinstance(observed, list) or len(columns) + len(observed) != net.input_size:
        return ()
    return (*columns, *(OBSERVED.format(columns[n]) for n in observed))
