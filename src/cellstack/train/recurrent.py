"""The recurrent layers of a model, built from the name of a cell, and their nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstack import layers
from cellstack.cells import KINDS
from cellstack.formats.pytorch.modules import of_module
from cellstack.nodes import Node
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent
from cellstack.train.cell_names import MLSTM, NOT_INSPECTED, heads_of
from cellstack.train.checks import UsageError
from cellstack.train.options import Architecture

LAYERS: dict[str, Any] = {name: getattr(layers, kind.title) for name, kind in KINDS.items()} | {MLSTM: layers.MLSTM}


def recurrent_layers(architecture: Architecture, width: int, **options: Any) -> nn.ModuleList:
    """Return layers with an output at every step, first layer first.

    Args:
        architecture: how they are built.
        width: of the first layer's input.
        options: further arguments of each layer.
    """
    stack = nn.ModuleList()
    cell, both, count = architecture.cell, architecture.bidirectional, heads_of(architecture.cell, architecture.heads)
    given = {"return_sequences": True, **({"heads": count} if cell == MLSTM or count > 1 else {}), **options}
    for size in architecture.units:
        layer = LAYERS[cell](size, input_size=width, **given)
        stack.append(layers.Bidirectional(layer) if both else layer)
        width = size * (1 + both)
    return stack


def nodes_of_layers(stack: Iterable[nn.Module]) -> list[Node]:
    """Return such layers as nodes; consecutive layers of one direction are one node."""
    nodes: list[Node] = []
    alike: list[Any] = []
    for layer in stack:
        if isinstance(layer, layers.Bidirectional):
            nodes.append(Bidirectional(_recurrent([layer.forward_layer]), _recurrent([layer.backward_layer], True)))
        elif isinstance(layer, layers.MLSTM):
            nodes += of_module(layer).nodes
        else:
            alike.append(layer)
    return [_recurrent(alike)] if alike else nodes


def _recurrent(stack: list[Any], go_backwards: bool = False) -> Recurrent:
    """Return layers of cells as one node, first layer first."""
    modules = [layer.cell for layer in stack]
    cells = (Cell(cell.spec, *(as_array(getattr(cell, name)) for name in cell.spec.shapes)) for cell in modules)
    return Recurrent(tuple(cells), return_sequences=True, go_backwards=go_backwards)


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a contiguous array on the CPU."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def check_supported(model: nn.Module, device: torch.device, inspect: int) -> None:
    """Raise `UsageError` if a model can't be trained on this device, or can't be inspected."""
    if not any(isinstance(module, layers.MLSTM) for module in model.modules()):
        return
    if device.type != "cpu":
        raise UsageError(f"cell mlstm is trained on the CPU only: expected device cpu, got {device.type}")
    if inspect:
        raise UsageError(NOT_INSPECTED)
