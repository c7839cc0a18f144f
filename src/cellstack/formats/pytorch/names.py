"""Builds networks from a state dict by the names and shapes of PyTorch's recurrent layers.

A state dict specifies neither the order of its modules nor the operations between them. But it does define each
recurrent module: its names are the module's name followed by `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`,
`weight_ih_l0_reverse` and so on, and its shapes distinguish an LSTM `[4H, I]` from a GRU `[3H, I]` and a plain RNN
`[H, I]`.

Ref: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html#torch.nn.LSTM (Variables)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellstack.cells import KINDS, named
from cellstack.cells.bfloat16 import exact
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import from_rows
from cellstack.cells.spec import MATRICES, CellSpec
from cellstack.formats.build import HINT, chain, errors_of, listed
from cellstack.formats.pytorch import ours, sru
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.ours import either, of_units
from cellstack.formats.pytorch.tensors import ModuleTensors, array, short
from cellstack.network import Network
from cellstack.nodes import Dense
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.dense import Products
from cellstack.nodes.recurrent import Bidirectional, Recurrent

MODULES = {name: KINDS[kind] for name, kind in named("torch").items()}  # of torch.nn
OTHER_NAMES: tuple[Any, ...] = (ours, sru)
"""The readers of layers whose tensors have other names: cellstack's and the package sru's."""

NAME = re.compile(
    r"(?P<prefix>(?:.*[./:])?)(?P<what>weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)"
    r"(?:_l(?P<layer>0|[1-9]\d{0,3})(?P<back>_reverse)?)?",
    re.DOTALL,
)
DROPPED = re.compile(r"(?P<prefix>(?:.*[./:])?)(?P<name>weight_hh_l\d{1,4}(?:_reverse)?)_raw", re.DOTALL)
ASSUMED = "tanh: a state dict doesn't record whether this RNN's nonlinearity is tanh or relu"
OPTIMISER = re.compile(  # the names of torch's optimisers for their state of a weight, which is numbered
    r"(?P<where>(?:.*\.)?state)\.\d+\.(?:step|exp_avg|exp_avg_sq|max_exp_avg_sq|exp_inf|momentum_buffer|square_avg|"
    r"acc_delta|grad_avg|sum|prev|step_size|ax|mu|eta|row_var|col_var|variance|mu_product|d|n_iter|old_dirs|old_stps|"
    r"ro|H_diag|prev_flat_grad|al|func_evals)(?:\.\d+)?",
    re.DOTALL,
)
GATES_ASSUMED = "gates in the order of torch.nn.{}: a cell that isn't PyTorch's may use these names with another order"
LONGEST_ENTRY = 500  # characters of an entry in a message
MOST_OF_A_MODULE = 4  # how many tensors of a module a message lists


@dataclass
class RecurrentTensors(ModuleTensors):
    """The tensors of one recurrent module.

    Attributes:
        prefix: the part of the names before `weight_ih_l0`, including the dot.
        layered: whether the names end in a layer's number, `_l0`; a cell's don't.
        names: the tensors' names, by array, layer and whether it is the backward direction.
        others: other tensors of the module itself, not of a child.
    """

    layered: bool
    names: dict[tuple[str, int, bool], str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[str]:
        """The names of all its tensors."""
        return list(self.names.values())


def parts_of(names: Iterable[str]) -> list[RecurrentTensors]:
    """Return the recurrent modules to which these names of tensors belong, in their order."""
    modules: dict[tuple[str, bool], RecurrentTensors] = {}
    others: dict[str, list[str]] = {}
    names = list(names)
    raw = _raw_weights(names)
    whole_ones = set(raw.values())
    for name in names:
        if name in whole_ones:
            continue
        match = NAME.fullmatch(name)
        if match is None:
            prefix = name[: 1 + max(name.rfind(mark) for mark in "./:")]
            others.setdefault(prefix, []).append(name)
            continue
        key = (match["prefix"], match["layer"] is not None)
        part = modules.setdefault(key, RecurrentTensors(*key))
        part.names[match["what"], int(match["layer"] or 0), match["back"] is not None] = name
    for name, whole in raw.items():
        match = NAME.fullmatch(name)
        assert match is not None
        modules[match["prefix"], True].names["weight_hh", int(match["layer"]), match["back"] is not None] = whole
    for part in modules.values():
        part.others = others.get(part.prefix, [])
    return list(modules.values())


def _raw_weights(names: list[str]) -> dict[str, str]:
    """Return the raw recurrent weights of DropConnect, by the name of the weights with dropout applied.

    AWD-LSTMs have them: `rnn.weight_hh_l0_raw` holds the weights. `rnn.module.weight_hh_l0` or `rnn.weight_hh_l0`, if
    the file has it, holds the weights after the dropout of the last training step.

    Ref: Merity, Keskar and Socher 2018, "Regularizing and Optimizing LSTM Language Models", sec. 2.
    """
    known, raw = set(names), {}
    for match in filter(None, map(DROPPED.fullmatch, names)):
        for prefix in (match["prefix"], f"{match['prefix']}module."):
            if prefix + match["name"].replace("weight_hh", "weight_ih") in known:
                raw[prefix + match["name"]] = match[0]
                break
    return raw


def layers_of(tensors: Mapping[str, Any]) -> list[Any]:
    """Return the layers with names of their own to which these tensors belong: see `OTHER_NAMES`."""
    return [layer for reader in OTHER_NAMES for layer in reader.layers_of(tensors)]


def networks_of(
    tensors: Mapping[str, Any],
    where: str,
    activations: Mapping[str, str] | None = None,
    directions: Mapping[str, int] | None = None,
    axes: Mapping[str, int] | None = None,
) -> dict[str, Network]:
    """Return every recurrent module that a state dict holds, as a Network.

    Args:
        tensors: arrays by PyTorch's names; tensors of other modules are ignored and not read.
        where: the file's name, for messages.
        activations: the nonlinearity of plain RNNs by module name, if known; else tanh is assumed, as `metadata` says.
        directions: the number of directions of quantised layers, by name, if known; else inferred from their widths.
        axes: the axes of spectral norms, as in `derived.joined`.

    Returns:
        Networks by the module's name, such as `"encoder.lstm"`; `""` where the names have no prefix. Each has one
        `Recurrent` or one `Bidirectional` for each layer, and takes `[B, T, I]`.

    Raises:
        FormatError: names or shapes that no PyTorch layer has; names the tensor, what was expected and found.

    >>> rng = np.random.default_rng(0)
    >>> state = {"rnn.weight_ih_l0": rng.normal(size=(12, 3)), "rnn.weight_hh_l0": rng.normal(size=(12, 4))}
    >>> networks_of(state, "a file")
    {'rnn': Network of float64: [B, T, 3] -> [B, T, 4], 84 numbers
      layer_0  Recurrent  GRU 3 -> 4 (no bias)  [B, T, 4]  84}
    """
    networks: dict[str, Network] = {}
    tensors = joined(tensors, where, NAME, directions, axes)
    for part in parts_of(tensors):
        title = part.title if part.title not in networks else part.prefix
        networks[title] = _network(part, tensors, where, (activations or {}).get(part.title))
    for reader in OTHER_NAMES:
        for layer in reader.layers_of(tensors):
            title = layer.title if layer.title not in networks else layer.prefix
            networks[title] = reader.network_of_layer(layer, tensors, where)
    return networks


def with_dense(networks: Mapping[str, Network], tensors: Mapping[str, Any], where: str) -> dict[str, Network]:
    """Return networks, and one for each Linear of a state dict, if it holds any recurrent module.

    No other PyTorch module has a weight with two axes and a bias for each of its rows.
    """
    every = dict(networks)
    used = {name for layer in layers_of(tensors) for name in layer.used}
    for name, tensor in tensors.items() if networks else ():
        title, _, what = name.rpartition(".")
        bias = tensors.get(f"{title}.bias" if title else "bias")
        if (
            what != "weight"
            or title in every
            or name in used
            or bias is None
            or len(tensor.shape) != 2
            or 0 in tensor.shape
        ):
            continue
        if tuple(bias.shape) == (tensor.shape[0],):
            every[title] = dense(title, tensors, where)
    return every


def dense(title: str, tensors: Mapping[str, Any], where: str) -> Network:
    """Return the network of the Linear with this name."""
    weight, bias = (tensors.get(f"{title}.{what}" if title else what) for what in ("weight", "bias"))
    with errors_of(f"{where}: {short(title, 200)}"):
        node = Dense(array(weight).T, None if bias is None else array(bias))
    return Network([node], metadata={"source": {"format": "pytorch", "module": title}})


def network_of(
    tensors: Mapping[str, Any],
    where: str,
    activations: Mapping[str, str] | None = None,
    unknown: Iterable[str] = (),
    directions: Mapping[str, int] | None = None,
    axes: Mapping[str, int] | None = None,
) -> Network:
    """Return the network of a state dict that holds only one recurrent module.

    Args:
        tensors: as for `networks_of`.
        where: the file's name, for messages.
        activations: as for `networks_of`.
        unknown: descriptions of other contents of the file, which can't be run.
        directions: as for `networks_of`.
        axes: as for `networks_of`.

    Returns:
        The network.

    Raises:
        FormatError: there is no recurrent module, or anything else too, which is listed by name.
    """
    tensors = joined(tensors, where, NAME, directions, axes)
    parts = [*parts_of(tensors), *layers_of(tensors)]
    used = {name for part in parts for name in part.used}
    optimiser = {name for name in tensors if OPTIMISER.fullmatch(name)}
    left = [*unknown, *by_module(tensors, [name for name in tensors if name not in used | optimiser])]
    if not parts:
        raise nothing_recurrent(tensors, where, unknown)
    if len(parts) > 1 or left:
        left += by_module(tensors, [name for name in tensors if name in optimiser])
        names = listed([part.title or "one without a name" for part in parts], between=", ")
        rest = f", and {_listed(left)}" if left else ""
        what = (
            "the file of a pickled class doesn't contain its code"
            if unknown
            else "a state dict doesn't specify the order of modules"
        )
        raise FormatError(
            f"{where}: expected only one recurrent module, as {what}, "
            f"found {len(parts)} recurrent ({names}){rest}; pass `order=…`, the names of modules in the "
            f"order in which they run, with 'final' or 'last' after a recurrent one; {HINT}"
        )
    network = next(iter(networks_of(tensors, where, activations, directions).values()))
    return say_left_out(network, by_module(tensors, [name for name in tensors if name in optimiser]))


def say_left_out(network: Network, what: Iterable[str]) -> Network:
    """Add to a network's metadata what its file holds that isn't part of the model, and return the network."""
    what = [*filter(None, [network.metadata.get("left_out")]), *what]
    if what:
        network.metadata["left_out"] = _listed(what)
    return network


def keep_bfloat16(network: Network, tensors: Mapping[str, Any]) -> Network:
    """Return a network in float32 with its matrices in bfloat16, if tensors of its file are and none is rounded."""
    if not any(getattr(tensor, "dtype", None) in ("bfloat16", "BF16") for tensor in tensors.values()):
        return network
    matrices = [cell.arrays[name] for cell in network.cells for name in MATRICES if name in cell.spec.shapes]
    matrices += [node.kernel for node in network.nodes if isinstance(node, Products)]
    whole = all(matrix.dtype == np.float32 and exact(matrix) for matrix in matrices)
    return network.with_weights("bfloat16") if whole else network


def nothing_recurrent(tensors: Mapping[str, Any], where: str, unknown: Iterable[str] = ()) -> FormatError:
    """Return the error for a file without a recurrent module, which says what the file holds instead."""
    contents = _listed([*unknown, *by_module(tensors, list(tensors))]) or "no tensor"
    return FormatError(
        f"{where}: expected weights of recurrent layers, named as PyTorch names them (weight_ih_l0 and so on), "
        f"found {contents}"
    )


def by_module(tensors: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the names and shapes of tensors grouped by module; those of optimisers are only counted."""
    modules: dict[str, list[str]] = {}
    optimisers: dict[str, int] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        optimiser = OPTIMISER.fullmatch(name)
        if optimiser:
            optimisers[optimiser["where"]] = optimisers.get(optimiser["where"], 0) + 1
            continue
        modules.setdefault(module, []).append(f"{last} {list(getattr(tensors[name], 'shape', ()))}")
    texts = [(module, listed(tensors_here, MOST_OF_A_MODULE, ", ")) for module, tensors_here in modules.items()]
    counted = [f"{count} tensors of an optimiser ({where})" for where, count in optimisers.items()]
    return [*(f"{module} ({tensors_here})" if module else tensors_here for module, tensors_here in texts), *counted]


def _listed(entries: list[str]) -> str:
    """Return the entries as one printable text of bounded length, with the number of those left out."""
    text = listed([entry[:LONGEST_ENTRY] for entry in entries], between=", ")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _network(part: RecurrentTensors, tensors: Mapping[str, Any], where: str, activation: str | None) -> Network:
    """Return the network of one recurrent module."""
    names = part.names
    depth = 1 + max(layer for _, layer, _ in names)
    ways = (False, True) if any(back for _, _, back in names) else (False,)
    kinds = {what for what, _, _ in names} | {"weight_ih", "weight_hh"}
    kinds |= {"bias_ih", "bias_hh"} if kinds & {"bias_ih", "bias_hh"} else set()
    here = f"{where}: {short(part.title or 'the recurrent module', 200)}"
    if part.others:
        raise FormatError(
            f"{here}: expected only the weights of a recurrent layer of PyTorch, found {_listed(part.others)} too: "
            "another kind of layer"
        )
    for layer in range(depth):
        for back in ways:
            for what in sorted(kinds):
                if (what, layer, back) not in names:
                    tail = f"_l{layer}{'_reverse' * back}" if part.layered else ""
                    raise FormatError(
                        f"{where}: tensor {short(part.prefix + what + tail, 200)} is missing; the file holds "
                        f"{short(next(iter(names.values())), 200)} of the same module"
                    )
    layers: list[list[Cell]] = []
    for layer in range(depth):
        layers.append([])
        for back in ways:
            by_kind = {what: names[what, layer, back] for what in sorted(kinds)}
            layers[-1].append(_cell(where, by_kind, tensors, activation))
    metadata: dict[str, Any] = {"source": {"format": "pytorch", "module": part.title}}
    gated = all(cell.spec.of_kind.gated for own in layers for cell in own)
    if not gated and activation is None:
        metadata["assumed"] = ASSUMED
    elif not part.layered and gated:
        metadata["assumed"] = GATES_ASSUMED.format(f"{layers[0][0].spec.of_kind.names['torch'].name}Cell")
    computed = {what: tensors[name].how for (what, _, _), name in names.items() if hasattr(tensors[name], "how")}
    if computed:
        metadata["computed"] = computed
    with errors_of(here):  # layers whose shapes don't match
        return chain([_both_ways(*cells) for cells in layers], metadata)


def _both_ways(cell: Cell, *back: Cell) -> Recurrent | Bidirectional:
    ahead = Recurrent((cell,))
    return Bidirectional(ahead, Recurrent(back, go_backwards=True)) if back else ahead


def _cell(where: str, names: Mapping[str, str], tensors: Mapping[str, Any], activation: str | None) -> Cell:
    """Return the cell of one layer and direction; `names` holds the names in the file of its arrays."""

    def tensor(what: str) -> str:
        return f"{where}: tensor {short(names[what], 200)}"

    shapes = {what: tuple(tensors[name].shape) for what, name in names.items()}
    for what, shape in shapes.items():
        axes = "[rows]" if what.startswith("bias") else "[P, H]" if what == "weight_hr" else "[rows, width]"
        if len(shape) != axes.count(",") + 1 or 0 in shape:
            raise FormatError(f"{tensor(what)}: expected {axes}, found {short(list(shape))}")
    rows, width = shapes["weight_ih"]
    projected = shapes.get("weight_hr")
    out, units = projected or shapes["weight_hh"][1:] * 2
    able = {name: kind for name, kind in MODULES.items() if not projected or "proj_size" in kind.settings}
    kind = next((kind for kind in able.values() if len(kind.gates) * units == rows), None)
    if kind is None:
        counts = either([of_units(len(kind.gates)) for kind in able.values()])
        having = f"{either(list(able), 'and')} have" if len(able) > 1 else f"an {next(iter(able))} has"
        raise FormatError(
            f"{tensor('weight_ih')}: expected {counts} rows for H={units} units, as {having}, found {rows}"
        )
    expected = {"weight_ih": (rows, width), "weight_hh": (rows, out), "weight_hr": (out, units)}
    for what, shape in shapes.items():
        if shape != expected.get(what, (rows,)):
            reason = f"found {short(list(shape))} with {short(names['weight_ih'], 200)} {[rows, width]}"
            raise FormatError(f"{tensor(what)}: expected {list(expected.get(what, (rows,)))}, {reason}")
    arrays = {what: array(tensors[name], f"{tensor(what)}: ") for what, name in names.items()}
    biases = tuple(arrays[what] for what in ("bias_ih", "bias_hh") if what in arrays)
    size = out if projected else 0
    with errors_of(tensor("weight_ih")):  # a projection as wide as the units, dtypes that differ
        spec = CellSpec(width, units, activation or "tanh", use_bias=bool(biases), kind=kind.name, proj_size=size)
        order = kind.names["torch"].order
        cell = from_rows(kind.name, arrays["weight_ih"], arrays["weight_hh"], biases, order)._asdict()
        return Cell(spec, **cell, **({"projection": arrays["weight_hr"].T} if projected else {}))
