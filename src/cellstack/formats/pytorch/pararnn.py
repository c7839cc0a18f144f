"""Reads ParaLSTM and ParaGRU: cells whose recurrent matrices are diagonal, trained in parallel over time.

They are cells of ours with a head for each unit: an LSTM with coupled gates and peepholes, and a GRU. Their f keeps c
and their z writes to h, where our i writes to c and our z keeps h: sigmoid(-a) = 1 - sigmoid(a), so the weights of
these gates are negated. Two packages store such cells, both as `pararnn`. Apple's, in which inputs may be divided into
blocks too, has these arrays, with the gates f o g, or z r g:

    A [3, H], C [2, H], b [3, H], B [blocks, I / blocks, 3, H / blocks]

pararnn-torch, in which a GRU may have heads of several units, has the gates f g o, or z r g:

    a_z … [H], or A_z … [heads, H / heads, H / heads]; c_f, c_o [H]; W_x.weight [3H, I], W_x.bias [3H]

Ref: Danieli et al. 2025, "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models", eq. 3.1
and 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import chain, errors_of
from cellstack.formats.pytorch.tensors import ModuleTensors, array, short
from cellstack.network import Network
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Recurrent

OF_A_LINEAR = ("W_x.weight", "W_x.bias")
CELLS = {  # the arrays on h of each gate, in our order, by all names of a cell
    frozenset(("A", "B", "C", "b")): (0, 2, 1),
    frozenset(("A", "B", "b")): (0, 1, 2),
    frozenset(("a_f", "a_z", "a_o", "c_f", "c_o", *OF_A_LINEAR)): ("a_f", "a_z", "a_o"),
    frozenset(("a_z", "a_r", "a_n", *OF_A_LINEAR)): ("a_z", "a_r", "a_n"),
    frozenset(("A_z", "A_r", "A_n", *OF_A_LINEAR)): ("A_z", "A_r", "A_n"),
}
NAME = re.compile(r"(?P<prefix>(?:.*[./:])?)(?P<what>[AC]_?[zrn]?|[Bb]|[ac]_[fzrno]|W_x\.(?:weight|bias))", re.DOTALL)
NUMBERED = re.compile(r"(?P<stack>(?:.*[./:])?)layers\.(?P<number>\d{1,4})\.", re.DOTALL)
LARGEST = 0.5  # to which pararnn-torch limits diagonal weights by default
ASSUMED = "sigmoid for gates, tanh for candidates and c: a state dict doesn't record the activations"


@dataclass
class Layer(ModuleTensors):
    """The tensors of one cell, or of the cells of a stack, bottom first: their names in the file, by array."""

    cells: list[dict[str, str]]

    @property
    def used(self) -> list[str]:
        """The names of all its tensors."""
        return [name for cell in self.cells for name in cell.values()]


def layers_of(tensors: Mapping[str, Any]) -> list[Layer]:
    """Return the stacks of such cells among these tensors, and the cells outside of stacks."""
    cells: dict[str, dict[str, str]] = {}
    for match in filter(None, map(NAME.fullmatch, tensors)):
        cells.setdefault(match["prefix"], {})[match["what"]] = match[0]
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for prefix, names in cells.items():
        if frozenset(names) in CELLS and ("B" not in names or len(tensors[names["B"]].shape) == 4):
            match = NUMBERED.fullmatch(prefix)
            stack, number = (match["stack"], int(match["number"])) if match else (prefix, 0)
            stacks.setdefault(stack, {})[number] = names
    layers = []
    for prefix, stack in stacks.items():
        if sorted(stack) == list(range(len(stack))):
            layers.append(Layer(prefix, [stack[number] for number in sorted(stack)]))
        else:  # something else runs between them
            layers += [Layer(f"{prefix}layers.{number}.", [names]) for number, names in stack.items()]
    return layers


def network_of_layer(layer: Layer, tensors: Mapping[str, Any], where: str) -> Network:
    """Return the network of a cell or a stack in a state dict.

    Raises:
        FormatError: shapes that no such cell has, or weights that pararnn-torch would have limited.
    """
    arrays = []
    for names in layer.cells:
        arrays.append(
            {what: array(tensors[name], f"{where}: tensor {short(name, 200)}: ") for what, name in names.items()}
        )
        for what, value in arrays[-1].items():
            if what[:2] in ("a_", "c_") and np.abs(value).max() > LARGEST:
                raise FormatError(
                    f"{where}: tensor {short(names[what], 200)}: expected values up to {LARGEST}, to which ParaLSTM "
                    f"and ParaGRU limit them by default, found {np.abs(value).max():.3g}; as a state dict doesn't "
                    "record max_recurrent_norm, call cs.load(module)"
                )
    metadata = {"source": {"format": "pytorch", "module": layer.title}, "assumed": ASSUMED}
    with errors_of(f"{where}: {short(layer.title or 'the module', 200)}"):  # shapes that don't match
        return chain([Recurrent(tuple(map(cell_of, arrays)))], metadata, numbered=True)


def nodes_of(module: Any, weights: Mapping[str, Array]) -> list[Recurrent]:
    """Return the node of a module of pararnn-torch: a stack, or one cell.

    Raises:
        ValueError: the module returns states, or has another cell.
    """
    stack: list[Any] = list(getattr(module, "layers", [module]))
    if hasattr(module, "layers") and (module.return_hidden or module.output_hidden < stack[-1].state_slots - 1):
        raise ValueError("expected return_hidden=False, and output_hidden=True for ParaLSTM")
    cells = []
    for number, cell in enumerate(stack):
        prefix = "" if cell is module else f"layers.{number}."
        arrays = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        arrays.pop("_eye_head", None)
        if frozenset(arrays) not in CELLS:
            raise ValueError(f"expected cells ParaLSTM or ParaGRU, found {type(cell).__name__}")
        limit = np.inf if cell.max_recurrent_norm is None else cell.max_recurrent_norm
        for name in arrays.keys() - OF_A_LINEAR:
            arrays[name] = arrays[name].clip(-limit, limit)
        cells.append(cell_of(arrays))
    return [Recurrent(tuple(cells))]


def cell_of(arrays: Mapping[str, Array]) -> Cell:
    """Return the cell with these arrays, named as either package does.

    Raises:
        ValueError: shapes that don't match.
    """
    order = CELLS[frozenset(arrays)]
    if "B" in arrays:
        blocks, width, gates, units = arrays["B"].shape
        size, total = blocks * width, blocks * units
        if not gates == len(arrays["A"]) == 3 or any(arrays[name].shape[1:] != (total,) for name in ("A", "b")):
            shapes = {name: list(value.shape) for name, value in arrays.items()}
            raise ValueError(f"expected A and b [3, H] and B [blocks, I / blocks, 3, H / blocks], found {shapes}")
        kernel = np.zeros((blocks, width, gates, blocks, units), arrays["B"].dtype)
        kernel[np.arange(blocks), :, :, np.arange(blocks)] = arrays["B"]
        kernel = kernel.reshape(size, gates, total)[:, list(order)]
        recurrent = [arrays["A"][gate] for gate in order]
        bias, peepholes = arrays["b"][list(order)], arrays.get("C")
    else:
        recurrent = [arrays[name] for name in order]
        total = recurrent[0].shape[0] * (recurrent[0].shape[-1] if recurrent[0].ndim == 3 else 1)
        kernel = arrays["W_x.weight"].T.reshape(-1, 3, total)
        bias = arrays["W_x.bias"].reshape(3, total)
        peepholes = np.stack([arrays["c_f"], arrays["c_o"]]) if "c_f" in arrays else None
    heads = [one.reshape(-1, 1, 1) if one.ndim == 1 else one for one in recurrent]
    sign = np.array([-1, 1, 1], kernel.dtype)
    kernel, bias = kernel * sign[:, None], bias * sign[:, None]
    own: dict[str, Any] = {"kind": "gru", "reset_after": False}
    if peepholes is not None:
        own = {"coupled": True, "peepholes": True}
        peepholes = peepholes * sign[:2, None]
    return Cell(
        CellSpec(len(kernel), total, heads=len(heads[0]), **own),
        kernel=kernel.reshape(len(kernel), -1),
        recurrent_kernel=np.concatenate([one * factor for one, factor in zip(heads, sign, strict=True)], axis=-1),
        bias=bias.reshape(-1),
        **({} if peepholes is None else {"peepholes": peepholes}),
    )
