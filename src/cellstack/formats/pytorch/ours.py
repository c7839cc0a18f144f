"""Recognises the weights of cellstack's torch layers in a state dict by their names and shapes.

A cell's arrays have the names in `cellstack.cells.spec.ARRAYS`, with the prefix `cell.` in a layer of one cell,
`cell.cells.0.` and so on in a stack, and `forward_layer.cell.` and `backward_layer.cell.` in a `Bidirectional`. Their
shapes determine the kind and most flags. The other settings are assumed to be the defaults, as the metadata says.
Kinds with as many gates have the same arrays: the first of them in `KINDS` is assumed, an LSTM and not an sLSTM.
A kind without a recurrent kernel is determined by the number of columns, if only one of these kinds can have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cellstack.cells import KINDS, Kind
from cellstack.cells.errors import FormatError
from cellstack.cells.spec import ARRAYS, MATRICES, STATES, CellSpec
from cellstack.formats.build import chain, errors_of, listed
from cellstack.formats.pytorch.tensors import ModuleTensors, array, short
from cellstack.network import Network
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent

COUNTER = "draws"  # how many dropout masks a cell has drawn
NAME = re.compile(
    rf"(?P<layer>(?:.*?[./:])??)(?P<way>(?:(?:forward|backward)_layer\.)?)cell\.(?:cells\.(?P<cell>0|[1-9]\d{{0,3}})\.)?"
    rf"(?P<array>{'|'.join(ARRAYS)}|{COUNTER})",
    re.DOTALL,
)
STATE = "|".join(sorted({name for state in STATES.values() for name in state._fields}))
HELD = re.compile(
    rf"(?P<layer>(?:.*?[./:])??)(?:(?:forward|backward)_layer\.)?states\.\d{{1,4}}\.(?:{STATE})", re.DOTALL
)
SHOWN = {"use_bias": "bias", "layer_norm": "kernel_gain", "learn_initial_state": "initial_h"}  # by their arrays
HIDDEN = {"coupled": True, "reset_after": False}  # settings that only the numbers of gates and biases show
ASSUMED = (
    "{kinds}default activations, no clipping, no zoneout, no attention, no residuals, every step returned{merged}: a "
    "state dict doesn't store these settings; torch.save(layer) does"
)


@dataclass
class Layer(ModuleTensors):
    """The tensors of one of our layers.

    Attributes:
        prefix: the part of the names before `cell.` or `forward_layer.cell.`, including the dot.
        cells: for each direction and index in the stack, the names in the file of the cell's arrays.
        held: the names of the tensors of a stateful layer's state.
    """

    cells: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[str]:
        """The names of all its tensors."""
        return [name for arrays in self.cells.values() for name in arrays.values()] + self.held


AXES = {"recurrent_kernel": (2, 3), "backbone_kernel": (3,)}
"""The possible numbers of axes of matrices: 3 if there is one for each head, or several layers. The others have 2."""


def layers_of(tensors: Mapping[str, Any]) -> list[Layer]:
    """Return our layers to which these tensors belong, in their order."""
    found: dict[str, Layer] = {}
    for match in filter(None, map(NAME.fullmatch, tensors)):
        layer = found.setdefault(match["layer"], Layer(match["layer"]))
        layer.cells.setdefault((match["way"], int(match["cell"] or 0)), {})[match["array"]] = match[0]
    # Modules without such kernels are something else, such as a convolution with the name cell.
    found = {
        prefix: layer
        for prefix, layer in found.items()
        if all(
            "kernel" in arrays and ("recurrent_kernel" in arrays or len(tensors[arrays["kernel"]].shape) == 2)
            for arrays in layer.cells.values()
        )
    }
    for match in filter(None, map(HELD.fullmatch, tensors)):
        if match["layer"] in found:
            found[match["layer"]].held.append(match[0])
    return list(found.values())


def network_of_layer(layer: Layer, tensors: Mapping[str, Any], where: str) -> Network:
    """Return the network of one of our layers.

    Raises:
        FormatError: names or shapes that none of our layers has; names the tensor, what was expected and found.
    """
    here = f"{where}: {short(layer.title or 'the layer', 200)}"
    ways = sorted({way for way, _ in layer.cells}, reverse=True)  # forward first
    if ways not in ([""], ["forward_layer.", "backward_layer."]):
        raise FormatError(f"{here}: expected the cells of one layer, or of a forward and a backward one, found {ways}")
    stacks = []
    for way in ways:
        numbers = sorted(number for own, number in layer.cells if own == way)
        if numbers != list(range(len(numbers))):
            raise FormatError(f"{here}: expected cells numbered from 0 on, found {listed(map(str, numbers), 5, ', ')}")
        stacks.append([_cell(where, layer.cells[way, number], tensors) for number in numbers])
    merged = ", directions concatenated" if len(stacks) > 1 else ""
    kinds = _assumed_kinds(cell.spec for cells in stacks for cell in cells)
    assumed = ASSUMED.format(kinds=kinds, merged=merged)
    metadata = {"source": {"format": "pytorch", "module": layer.title}, "assumed": assumed}
    if layer.held:
        metadata["left_out"] = f"the state of the stateful layer ({listed(layer.held, 3, ', ')})"
    with errors_of(here):  # cells whose shapes don't match
        ahead, *back = [
            Recurrent(tuple(cells), go_backwards=way == "backward_layer.")
            for way, cells in zip(ways, stacks, strict=True)
        ]
        return chain([Bidirectional(ahead, back[0]) if back else ahead], metadata, numbered=True)


def _cell(where: str, names: Mapping[str, str], tensors: Mapping[str, Any]) -> Cell:
    """Return a cell; `names` holds the names in the file of its arrays."""
    names = {what: name for what, name in names.items() if what != COUNTER}
    shapes = {what: tuple(tensors[name].shape) for what, name in names.items()}

    def tensor(what: str) -> str:
        return f"{where}: tensor {short(names[what], 200)}"

    for what in MATRICES:
        able = AXES.get(what, (2,))
        if what in shapes and (len(shapes[what]) not in able or 0 in shapes[what]):
            count = "two" if 2 in able else "three"
            raise FormatError(f"{tensor(what)}: expected {count} axes, found {short(list(shapes[what]))}")
    widest = "recurrent_kernel" if "recurrent_kernel" in shapes else "kernel"
    spec = _spec(tensor(widest), shapes, heads_of(shapes) * shapes[widest][-1])
    for what, shape in spec.shapes.items():
        if what not in names:
            raise FormatError(f"{tensor('kernel')}: expected {what} {list(shape)} of the same cell, found none")
        if shapes[what] != shape:
            found = f"{short(list(shapes[what]))} with {widest} {short(list(shapes[widest]))}"
            raise FormatError(f"{tensor(what)}: expected {list(shape)}, as {spec.kind} cells have it, found {found}")
    for what in names:
        if what not in spec.shapes:
            raise FormatError(f"{tensor(what)}: {spec.kind} cells have no such array")
    arrays = {what: array(tensors[names[what]], f"{tensor(what)}: ") for what in spec.shapes}
    with errors_of(tensor("kernel")):  # dtypes that differ
        return Cell(spec, **arrays)


def heads_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of heads of a cell, given the shapes of its arrays."""
    shape = shapes.get("recurrent_kernel", ())
    return shape[0] if len(shape) == 3 else 1


def _spec(here: str, shapes: Mapping[str, tuple[int, ...]], columns: int) -> CellSpec:
    """Return the description of a cell, determined from the shapes of its arrays, and its number of columns."""
    able = _candidates(here, shapes)
    found = [spec for spec in able if spec.shapes["kernel"][1] == columns]
    if not found:
        wanted = either([of_units(count) for count in sorted({len(spec.gates) for spec in able}, reverse=True)])
        units = f" for H={able[0].units} units" if len({spec.units for spec in able}) == 1 else ""
        raise FormatError(f"{here}: expected {wanted} columns{units}, found {columns}")
    biases = len(shapes.get("bias", ()))
    fitting = [spec for spec in found if len(found) == 1 or len(spec.shapes.get("bias", ())) == biases]
    if len(fitting) != 1:
        these = either([_described(spec) for spec in reversed(fitting or found)])
        raise FormatError(f"{here}: these weights may belong to {these}: save the whole layer, by torch.save(layer)")
    return fitting[0]


def _candidates(here: str, shapes: Mapping[str, tuple[int, ...]]) -> list[CellSpec]:
    """Return the cells that have arrays of these names, of all kinds and with any number of gates.

    Of the kinds with as many gates only the first is among them. Kinds without a recurrent kernel get as many units as
    fit the columns, unless an initial state gives the number.
    """
    (width, columns), recurrent = shapes["kernel"], "recurrent_kernel" in shapes
    heads = heads_of(shapes)
    out = heads * shapes["recurrent_kernel"][-2] if recurrent else shapes.get("initial_h", (0,))[0]
    units, size = shapes.get("projection", (out, 0))
    flags = {name: what in shapes for name, what in SHOWN.items()}
    some = {"peepholes": "peepholes" in shapes, "proj_size": size, "heads": heads}
    backbone = "gate_kernel" in shapes
    layers = 1 + shapes.get("backbone_kernel", (0,))[0]
    some |= {"backbone_units": columns, "backbone_layers": layers} if backbone else {}
    found = []
    with errors_of(here):  # a projection as wide as the units
        for kind in KINDS.values():
            first = _alike(len(kind.gates), kind)[:1] if not backbone else [kind]
            needed = {one.name for one in kind.arrays if not one.needs and one.name != "recurrent_kernel"}
            if (
                kind.has_recurrent_kernel is not recurrent
                or kind not in first
                or (backbone and "backbone_units" not in kind.settings)
                or not needed <= shapes.keys()
            ):
                continue
            wide = units or max(1, columns // len(kind.gates))
            own: dict[str, Any] = flags | {name: value for name, value in some.items() if name in kind.settings}
            for name in (None, *(name for name in HIDDEN if name in kind.settings)):
                hidden: dict[str, Any] = {name: HIDDEN[name]} if name else {}
                joint = flags["layer_norm"] and kind.joins and "recurrent_gain" not in shapes
                own |= {"layer_norm": "joint"} if joint else {}
                if name != "reset_after" or not flags["layer_norm"]:  # a combination that no cell has
                    found.append(CellSpec(width, wide, kind=kind.name, **own, **hidden))
    return [spec for spec in found if shapes.keys() <= spec.shapes.keys()] or found


def _alike(gates: int, like: Kind) -> list[Kind]:
    """Return the kinds with so many gates, in the order of `KINDS`, whose usual arrays have the shapes of another's."""
    usual = {kind.name: {one.name for one in kind.arrays if not one.needs} for kind in KINDS.values()}
    return [kind for kind in KINDS.values() if len(kind.gates) == gates and usual[kind.name] == usual[like.name]]


def _assumed_kinds(specs: Iterable[CellSpec]) -> str:
    """Return which kinds were assumed because others have the same arrays, with a comma at the end; "" if none."""
    said = {}
    for spec in specs:
        flags = spec.settings.keys() - {"input_size", "kind"}
        alike = _alike(len(spec.gates), spec.of_kind)
        others = [kind.title for kind in alike if kind is not spec.of_kind and flags <= kind.settings.keys()]
        if others:
            said[f"{spec.of_kind.title} and not {either(others)}, "] = None
    return "".join(said)


def _described(spec: CellSpec) -> str:
    flags = [f"{name}={value}" for name, value in HIDDEN.items() if name in spec.settings]
    how = f" with {flags[0]}" if flags else " without a bias" if not spec.use_bias else ""
    how += "" if spec.of_kind.has_recurrent_kernel else f" of {spec.units} units"
    return f"{'an' if spec.of_kind.title[0] in 'LR' else 'a'} {spec.of_kind.title}{how}"


def of_units(gates: int) -> str:
    """Return the number of columns, or rows, of so many gates: `4H`, or `H` for one."""
    return f"{gates}H" if gates > 1 else "H"


def either(words: Sequence[str], last: str = "or") -> str:
    """Return words as a list in a sentence: `a, b or c`."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
