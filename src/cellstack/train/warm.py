"""Warm start: initialise a model with the weights of a trained network."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cellstack import layers, nodes
from cellstack.cells.mlstm import MemorySpec
from cellstack.formats import load_network
from cellstack.network import Network
from cellstack.nodes import Dense
from cellstack.nodes.recurrent import Bidirectional, Recurrent
from cellstack.train import predict
from cellstack.train.cell_names import MLSTM
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
        self.network = given if isinstance(given, Network) else load_network(given)
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

    @property
    def filters(self) -> dict[str, int]:
        """The options `filters` and `stride` of its convolution before the layers."""
        if "filters" not in self.network.names:
            return {"filters": 0, "stride": 1}
        node: Any = self.network.nodes[self.network.names.index("filters")]
        return {"filters": node.kernel.shape[2], "stride": node.strides}

    def into(self, model: Model, own_head: bool) -> None:
        """Copy the weights into a model: of the convolution, the cells, and the dense head unless it is the user's.

        Raises:
            UsageError: the convolution, the cells or the head differ from the model's.
        """
        build = model.architecture
        wanted = {"filters": build.filters, "stride": build.stride}
        if self.filters != wanted:
            raise UsageError(
                f"{self.name}: expected a convolution with {wanted}, as in this model, found {self.filters}"
            )
        if model.filters is not None:
            at = self.network.names.index("filters")
            windows, norm = cast(tuple[Any, Any], self.network.nodes[at : at + 2])
            _copy(model.filters.conv.weight, windows.kernel.transpose(2, 1, 0))
            _copy(cast(Tensor, model.filters.conv.bias), windows.bias)
            _copy(model.filters.norm.weight, norm.gain)
            _copy(model.filters.norm.bias, norm.bias)
        cells, wanted = _cells(self.network), _cells_of(model)
        if len(cells) != len(wanted):
            raise UsageError(f"{self.name}: expected {len(wanted)} cells, as in this model, found {len(cells)}")
        for n, (initial, cell) in enumerate(zip(cells, wanted, strict=True)):
            for name, ours in cell.settings.items():
                theirs = initial.settings.get(name)
                if ours != theirs:
                    raise UsageError(
                        f"{self.name}: expected cell {n} with {name} {ours}, as in this model, found {theirs}"
                    )
            for name, values in initial.arrays.items():
                _copy(cell.arrays[name], values)
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


class _Cell(NamedTuple):
    """A cell, or an mLSTM with its projection: what has to be equal, and the weights."""

    settings: dict[str, Any]
    arrays: dict[str, Any]


def _cells(network: Network) -> list[_Cell]:
    found: list[_Cell] = []
    for before, node in pairwise([None, *network.nodes]):
        cells = node.cells if isinstance(node, Recurrent) else ()
        if isinstance(node, Bidirectional):
            cells = (*node.forward.cells, *node.backward.cells)
        found += [_Cell(asdict(cell.spec), cell.arrays) for cell in cells]
        if isinstance(node, nodes.MLSTM) and isinstance(before, Dense):
            bias = np.zeros(node.input_size or 0) if before.bias is None else before.bias
            found.append(_mlstm(len(before.kernel), node.memory, {"kernel": before.kernel, "bias": bias}))
    return found


def _cells_of(model: Model) -> list[_Cell]:
    found: list[_Cell] = []
    for layer in model.recurrent:
        both = [layer.forward_layer, layer.backward_layer] if isinstance(layer, layers.Bidirectional) else [layer]
        found += map(_of_layer, both)
    return found


def _of_layer(layer: Any) -> _Cell:
    if isinstance(layer, layers.MLSTM):
        arrays = dict(layer.named_parameters())
        return _mlstm(len(arrays["kernel"]), layer.spec, arrays)
    spec = layer.cell.spec
    return _Cell(asdict(spec), {name: getattr(layer.cell, name) for name in spec.shapes})


def _mlstm(width: int, spec: MemorySpec, arrays: dict[str, Any]) -> _Cell:
    return _Cell({"kind": MLSTM, "input_size": width, **spec._asdict()}, arrays)


@torch.no_grad()
def _copy(target: Tensor, values: np.ndarray) -> None:
    target.copy_(torch.from_numpy(np.array(values, np.float32)))
