"""Warm start: initialise a model with the weights of a trained network."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellstack import layers
from cellstack.formats import load
from cellstack.network import Network
from cellstack.nodes import Dense
from cellstack.nodes.cell import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.model import Model


class Start:
    """The network whose weights initialise a training.

    Args:
        given: a network, or the file of one.

    Raises:
        FormatError: the file doesn't contain a network that can be loaded, or its metadata doesn't fit it.
        OSError: the file can't be read.
    """

    def __init__(self, given: Network | str | os.PathLike[str]):
        self.name = "init" if isinstance(given, Network) else os.fspath(given)
        self.network = given if isinstance(given, Network) else load(given)
        is_ours = self.network.metadata.get("task") is not None
        self.trained = predict.trained(self.network, self.name) if is_ours else None

    def check(self, task: str, labels: tuple[Any, ...], channels: int) -> None:
        """Raise `UsageError` if the network was trained for something else."""
        if self.trained is None:
            return
        pairs = [("task", task, self.trained.task), ("channels", channels, len(self.trained.inputs.mean))]
        pairs.append(("classes", list(labels), list(self.trained.labels)))
        for what, wanted, found in pairs:
            if wanted != found:
                raise UsageError(f"{self.name}: expected an initial network with {what} {wanted}, found {found}")

    def into(self, model: Model, own_head: bool) -> None:
        """Copy the weights into a model: those of the cells, and of the dense head unless the head is the user's.

        Raises:
            UsageError: the cells differ from the model's, or the head has another shape.
        """
        cells, wanted = _cells(self.network), _cells_of(model)
        if len(cells) != len(wanted):
            raise UsageError(f"{self.name}: expected {len(wanted)} cells, as in this model, found {len(cells)}")
        for n, (initial, cell) in enumerate(zip(cells, wanted, strict=True)):
            ours, theirs = asdict(cell.spec), asdict(initial.spec)
            for name in ours:
                if ours[name] != theirs[name]:
                    raise UsageError(
                        f"{self.name}: expected cell {n} with {name} {ours[name]}, as in this model, found "
                        f"{theirs[name]}"
                    )
            for name in initial.spec.shapes:
                _copy(getattr(cell, name), getattr(initial, name))
        if own_head or self.trained is None:
            return
        last = next((node for node in reversed(self.network.nodes) if isinstance(node, Dense)), None)
        head: Any = model.head
        shape = tuple(head.weight.T.shape)
        if last is None or last.kernel.shape != shape or last.bias is None:
            found = "none" if last is None else str(last.kernel.shape)
            raise UsageError(f"{self.name}: expected a dense layer {shape} at its end, as in this model, found {found}")
        scale, mean = (value.numpy() for value in (model.targets.scale, model.targets.mean))
        # The network's outputs are in the targets' units, the head's are standardised.
        _copy(head.weight, (last.kernel / scale).T)
        _copy(head.bias, (last.bias - mean) / scale)


def _cells(network: Network) -> list[Cell]:
    found: list[Cell] = []
    for node in network.nodes:
        if isinstance(node, Recurrent):
            found += node.cells
        elif isinstance(node, Bidirectional):
            found += [*node.forward.cells, *node.backward.cells]
    return found


def _cells_of(model: Model) -> list[Any]:
    found: list[Any] = []
    for layer in model.recurrent:
        both = [layer.forward_layer, layer.backward_layer] if isinstance(layer, layers.Bidirectional) else [layer]
        found += [one.cell for one in both]
    return found


@torch.no_grad()
def _copy(target: Tensor, values: np.ndarray) -> None:
    target.copy_(torch.from_numpy(np.array(values, np.float32)))
