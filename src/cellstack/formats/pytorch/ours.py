"""Our own layers' weights, by the names and shapes that they have in a state dict.

A cell's arrays are called as in `cellstack.spec.ARRAYS`, after `cell.` in a layer of one cell, after `cell.cells.0.`
and so on in a stack, and after `forward_layer.cell.` and `backward_layer.cell.` in a `Bidirectional`. Their shapes tell
the kind and most flags. What they don't tell is taken to be as usual, and the network's metadata says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellstack.formats.build import Builder, listed
from cellstack.formats.pytorch.tensors import short
from cellstack.network import Network
from cellstack.nodes.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import ARRAYS, CellSpec, FormatError

BESIDE = "draws"  # how many dropout masks a cell has drawn
NAME = re.compile(
    rf"(?P<layer>(?:.*?[./:])??)(?P<half>(?:(?:forward|backward)_layer\.)?)cell\.(?:cells\.(?P<cell>0|[1-9]\d{{0,3}})\.)?"
    rf"(?P<array>{'|'.join(ARRAYS)}|{BESIDE})",
    re.DOTALL,
)
HELD = re.compile(r"(?P<layer>(?:.*?[./:])??)(?:(?:forward|backward)_layer\.)?states\.\d{1,4}\.[hc]", re.DOTALL)
LSTM_ALONE = ("peepholes", "projection", "cell_gain", "cell_bias", "initial_c")
ASSUMED = (
    "usual activations, no clipping, no zoneout, no residuals, every step returned{merged}: the weights don't say; the "
    "layer saved whole, by torch.save(layer), does"
)


@dataclass
class Layer:
    """The tensors of one of our layers.

    Attributes:
        prefix: what stands before `cell.`, or before `forward_layer.cell.`, the dot included.
        cells: each cell's arrays, by their names in the file; the cells by half and place in the stack.
        held: tensors of the state that a stateful layer held.
    """

    prefix: str
    cells: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The layer's name."""
        return self.prefix[:-1]

    @property
    def used(self) -> list[str]:
        """The names of all its tensors."""
        return [name for arrays in self.cells.values() for name in arrays.values()] + self.held


def layers_of(names: Iterable[str]) -> list[Layer]:
    """Return our layers that these names of tensors speak of, in their order."""
    names = list(names)
    found: dict[str, Layer] = {}
    for match in filter(None, map(NAME.fullmatch, names)):
        layer = found.setdefault(match["layer"], Layer(match["layer"]))
        layer.cells.setdefault((match["half"], int(match["cell"] or 0)), {})[match["array"]] = match[0]
    # What has no recurrent kernel is something else, such as a convolution that is called cell.
    found = {
        prefix: layer
        for prefix, layer in found.items()
        if all({"kernel", "recurrent_kernel"} <= arrays.keys() for arrays in layer.cells.values())
    }
    for match in filter(None, map(HELD.fullmatch, names)):
        if match["layer"] in found:
            found[match["layer"]].held.append(match[0])
    return list(found.values())


def network_of_layer(layer: Layer, tensors: Mapping[str, Any], where: str) -> Network:
    """Return the network of one of our layers.

    Raises:
        FormatError: names or shapes that no layer of ours has; names the tensor, what was expected and found.
    """
    here = f"{where}: {short(layer.title or 'the layer', 200)}"
    halves = sorted({half for half, _ in layer.cells}, reverse=True)  # forward first
    if halves not in ([""], ["forward_layer.", "backward_layer."]):
        raise FormatError(
            f"{here}: expected the cells of one layer, or of a forward and a backward one, found {halves}"
        )
    stacks = []
    for half in halves:
        numbers = sorted(number for own, number in layer.cells if own == half)
        if numbers != list(range(len(numbers))):
            raise FormatError(f"{here}: expected cells numbered from 0 on, found {listed(map(str, numbers), 5, ', ')}")
        stacks.append([_cell(where, layer.cells[half, number], tensors) for number in numbers])
    merged = ", halves put side by side" if len(stacks) > 1 else ""
    metadata = {"source": {"format": "pytorch", "module": layer.title}, "assumed": ASSUMED.format(merged=merged)}
    if layer.held:
        metadata["left_out"] = f"the state that the layer held ({listed(layer.held, 3, ', ')})"
    builder = Builder()
    try:
        ahead, *back = [
            Recurrent(tuple(cells), go_backwards=half == "backward_layer.")
            for half, cells in zip(halves, stacks, strict=True)
        ]
        node = Bidirectional(ahead, back[0]) if back else ahead
        builder.output(builder.add("layer_0", node, builder.input("x")))
        return builder.network(metadata, numbered=True)
    except (ValueError, TypeError) as error:  # cells that don't meet
        raise FormatError(f"{here}: {str(error)[:300]}") from None


def _cell(where: str, names: Mapping[str, str], tensors: Mapping[str, Any]) -> Cell:
    """Return a cell; `names` says which of its tensors is called what."""
    names = {what: name for what, name in names.items() if what != BESIDE}
    shapes = {what: tuple(tensors[name].shape) for what, name in names.items()}

    def tensor(what: str) -> str:
        return f"{where}: tensor {short(names[what], 200)}"

    for what in ("kernel", "recurrent_kernel", "projection"):
        if what in shapes and (len(shapes[what]) != 2 or 0 in shapes[what]):
            raise FormatError(f"{tensor(what)}: expected two axes, found {short(list(shapes[what]))}")
    spec = _spec(tensor("recurrent_kernel"), shapes)
    for what, shape in spec.shapes.items():
        if what not in names:
            raise FormatError(f"{tensor('kernel')}: expected {what} {list(shape)} beside it, found none")
        if shapes[what] != shape:
            found = f"{short(list(shapes[what]))} beside recurrent_kernel {short(list(shapes['recurrent_kernel']))}"
            raise FormatError(f"{tensor(what)}: expected {list(shape)}, as {spec.kind} cells have it, found {found}")
    for what in names:
        if what not in spec.shapes:
            raise FormatError(f"{tensor(what)}: expected no such array in {spec.kind} cells, found one")
    arrays = {}
    for what in spec.shapes:
        array = np.asarray(tensors[names[what]])
        if array.dtype.kind != "f":
            raise FormatError(f"{tensor(what)}: expected floats, found {array.dtype}")
        arrays[what] = array.astype(np.float32) if array.dtype.itemsize < 4 else array
    try:
        return Cell(spec, **arrays)
    except (ValueError, TypeError) as error:  # dtypes that differ
        raise FormatError(f"{tensor('kernel')}: {str(error)[:300]}") from None


def _spec(here: str, shapes: Mapping[str, tuple[int, ...]]) -> CellSpec:
    """Return what the shapes of a cell's arrays tell of it."""
    (width, _), (out, columns) = shapes["kernel"], shapes["recurrent_kernel"]
    units, size = shapes.get("projection", (out, 0))
    blocks = columns // units if columns % units == 0 else 0
    lstm = any(what in shapes for what in LSTM_ALONE)
    two = len(shapes.get("bias", ())) == 2
    if blocks not in (4, 3, 1) or (lstm and blocks == 1):
        wanted = "4H, 3H or H columns" if not lstm else "4H or 3H columns"
        raise FormatError(f"{here}: expected {wanted} for H={units} units, found {columns}")
    if blocks == 3 and not lstm and not two:
        raise FormatError(
            f"{here}: expected weights that tell a GRU with reset_after=False, or without a bias, from an LSTM with "
            "coupled gates, found such as all of them have: save the layer whole, by torch.save(layer)"
        )
    flags: dict[str, Any] = {"layer_norm": "kernel_gain" in shapes, "learn_initial_state": "initial_h" in shapes}
    kind = "rnn" if blocks == 1 else "lstm" if blocks == 4 or lstm else "gru"
    if kind == "lstm":
        flags |= {"peepholes": "peepholes" in shapes, "coupled": blocks == 3, "proj_size": size}
    try:
        return CellSpec(width, units, kind=kind, use_bias="bias" in shapes, **flags)
    except (ValueError, TypeError) as error:  # a projection as wide as the units
        raise FormatError(f"{here}: {str(error)[:300]}") from None
