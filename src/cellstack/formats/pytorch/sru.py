"""Reads the SRU of the package sru: its state dicts, and modules in memory.

A layer has the arrays weight `[I, D·H·k]`, weight_c and bias `[2·D·H]`, and scale_x `[1]`, with D directions and k = 4
products of x for each unit, of g, f, r and s, next to each other. It has three where s is x itself, times scale_x: then
our kernel's block of s is the identity, or the part of it that belongs to a direction. Factorised products
(weight_proj) are multiplied out.

Ref: https://github.com/asappresearch/sru, sru/modules.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import chain, errors_of
from cellstack.formats.pytorch.tensors import ModuleTensors, array, short
from cellstack.network import Network
from cellstack.nodes import Bidirectional, Cell, Dense, Node, Recurrent

BATCH_FIRST = False
REQUIRED = {"weight", "weight_c", "bias", "scale_x"}
NAME = re.compile(r"(?P<prefix>(?:.*[./:])?)rnn_lst\.(?P<number>\d{1,4})\.(?P<what>[a-z_.]+)", re.DOTALL)
ASSUMED = "one direction, no activation of c, and a highway: a state dict doesn't record them"


@dataclass
class Layer(ModuleTensors):
    """The tensors of a module: the names in the file of each layer's arrays, and of all of the module."""

    cells: list[dict[str, str]]
    used: list[str]


def layers_of(tensors: Mapping[str, Any]) -> list[Layer]:
    """Return the modules of the package among these tensors."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for match in filter(None, map(NAME.fullmatch, tensors)):
        found.setdefault(match["prefix"], {}).setdefault(int(match["number"]), {})[match["what"]] = match[0]
    layers = []
    for prefix, cells in found.items():
        if sorted(cells) == list(range(len(cells))) and all(names.keys() >= REQUIRED for names in cells.values()):
            first = [f"{prefix}input_to_hidden.weight"] if f"{prefix}input_to_hidden.weight" in tensors else []
            ordered = [cells[number] for number in sorted(cells)]
            layers.append(Layer(prefix, ordered, [*first, *(name for names in ordered for name in names.values())]))
    return layers


def network_of_layer(layer: Layer, tensors: Mapping[str, Any], where: str) -> Network:
    """Return the network of a module in a state dict.

    Raises:
        FormatError: shapes that no such module has, or arrays of an option that isn't supported, such as layer_norm.
    """
    arrays = {name: array(tensors[name], f"{where}: tensor {short(name, 200)}: ") for name in layer.used}
    metadata = {"source": {"format": "pytorch", "module": layer.title}, "assumed": ASSUMED}
    with errors_of(f"{where}: {short(layer.title or 'the module', 200)}"):
        cells = [_cells({what: arrays[name] for what, name in names.items()}) for names in layer.cells]
        stack = Recurrent(tuple(cell for of_layer in cells for cell in of_layer))
        linear = _linear(arrays.get(f"{layer.prefix}input_to_hidden.weight"))
        return chain([*linear, stack], metadata, numbered=True)


def nodes_of(module: Any, weights: Mapping[str, Array]) -> list[Node]:
    """Return the nodes of an `SRU`.

    Raises:
        ValueError: an option that isn't supported.
    """
    stack: list[tuple[Cell, ...]] = []
    for number, layer in enumerate(module.rnn_lst):
        if layer.custom_m is not None:
            raise ValueError("expected custom_m=None: U is computed by another module")
        start = f"rnn_lst.{number}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        stack.append(_cells(own, module.num_directions, layer.activation, layer.has_skip_term))
    nodes: list[Node] = _linear(weights.get("input_to_hidden.weight"))
    if module.num_directions == 1:
        return [*nodes, Recurrent(tuple(cells[0] for cells in stack))]
    pairs = ((Recurrent((ahead,)), Recurrent((back,), go_backwards=True)) for ahead, back in stack)
    return [*nodes, *(Bidirectional(*pair) for pair in pairs)]


def _linear(weight: Array | None) -> list[Node]:
    return [] if weight is None else [Dense(np.ascontiguousarray(weight.T))]


def _cells(
    arrays: Mapping[str, Array], directions: int = 1, activation: str = "none", skips: bool = True
) -> tuple[Cell, ...]:
    """Return a layer's cells, one for each direction."""
    unknown = arrays.keys() - REQUIRED - {"weight_proj"}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: layer_norm isn't supported")
    weight, width = arrays["weight"], arrays["weight_c"].size // 2  # of all directions
    if "weight_proj" in arrays:
        weight = arrays["weight_proj"] @ weight
    features, columns = weight.shape
    units, products = width // directions, columns // max(width, 1)
    if products not in (3, 4) or columns != products * width or arrays["bias"].size != 2 * width:
        raise ValueError(f"expected weight [I, 3H] or [I, 4H] with H={width}, got {list(weight.shape)}")
    blocks = weight.reshape(features, directions, units, products)
    highway = np.zeros((features, directions, units), weight.dtype)
    if products == 4:
        highway = blocks[..., 3]
    elif skips and features == width:
        highway = (arrays["scale_x"] * np.eye(width, dtype=weight.dtype)).reshape(highway.shape)
    gates = {} if activation == "none" else {"cell": activation}
    spec = CellSpec(features, units, kind="sru", gate_activations=gates)
    cells = []
    for n in range(directions):
        kernel = np.concatenate([blocks[:, n, :, 0], blocks[:, n, :, 1], blocks[:, n, :, 2], highway[:, n]], axis=1)
        bias = np.zeros((4, units), weight.dtype)
        bias[1:3] = arrays["bias"].reshape(2, directions, units)[:, n]
        vectors = arrays["weight_c"].reshape(2, directions, units)[:, n]
        cells.append(Cell(spec, kernel=kernel, bias=bias.reshape(-1), cell_vectors=vectors))
    return tuple(cells)
