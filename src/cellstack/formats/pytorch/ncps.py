"""Reads the CfC of the package ncps, with the cells of its wiring as one stack; every step takes a time of 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.cells.cfc import MIXED, backbone_layers, ncps_settings
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.nodes import Cell, Dense, Node, Recurrent

PRODUCTS = ("ff1", "ff2", "time_a", "time_b")  # g, k, s and t


def nodes_of(module: Any, weights: Mapping[str, Array]) -> list[Node]:
    """Return the nodes of a `CfC`.

    Raises:
        ValueError: settings that a `CellSpec` doesn't have.
    """
    if module.use_mixed:
        raise ValueError(MIXED)
    wired = hasattr(module.rnn_cell, "_layers")
    parts = {f"rnn_cell.layer_{n}.": part for n, part in enumerate(module.rnn_cell._layers)} if wired else {}
    cells = tuple(_cell(part, prefix, weights) for prefix, part in (parts or {"rnn_cell.": module.rnn_cell}).items())
    nodes: list[Node] = [Recurrent(cells, return_sequences=module.return_sequences)]
    return [*nodes, Dense(weights["fc.weight"].T, weights["fc.bias"])] if "fc.weight" in weights else nodes


def _cell(part: Any, prefix: str, weights: Mapping[str, Array]) -> Cell:
    """Return a `CfCCell`; a wiring multiplies the weights of two of its four products by a mask."""
    spec = CellSpec(**ncps_settings(part))
    mask = weights.get(f"{prefix}sparsity_mask", np.float32(1.0))
    products = PRODUCTS[: len(spec.gates)]
    matrices = [weights[f"{prefix}{name}.weight"] for name in products]
    matrix = np.concatenate([*(one * mask for one in matrices[:2]), *matrices[2:]]).T
    bias = np.concatenate([weights[f"{prefix}{name}.bias"] for name in products])
    names = {"decay": "w_tau", "limit": "A"}
    after = {ours: weights[f"{prefix}{theirs}"][0] for ours, theirs in names.items() if ours in spec.shapes}
    if spec.backbone_units:
        after |= {"gate_kernel": np.ascontiguousarray(matrix), "gate_bias": bias}
        names = [f"{prefix}backbone.{n}" for n in backbone_layers(part)]
        (matrix, *matrices), (bias, *biases) = ([weights[f"{n}.{of}"].T for n in names] for of in ("weight", "bias"))
        after |= {"backbone_kernel": np.stack(matrices), "backbone_bias": np.stack(biases)} if matrices else {}
    kernel, recurrent = (np.ascontiguousarray(each) for each in np.split(matrix, [spec.input_size]))
    return Cell(spec, kernel=kernel, recurrent_kernel=recurrent, bias=bias, **after)
