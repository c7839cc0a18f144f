"""Builds networks from files that don't specify the order of their modules, in an order that the caller gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats.build import listed
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.modules import Reader
from cellstack.formats.pytorch.names import OPTIMISER, by_module, dense, networks_of, say_left_out
from cellstack.formats.pytorch.saved import MissingSettingError, Saved, SavedFile
from cellstack.formats.pytorch.tensors import array, short
from cellstack.formats.pytorch.tree import Contents, within
from cellstack.network import Network
from cellstack.nodes import Activation, Bidirectional, Dense, Embedding, GlobalPool, Node
from cellstack.nodes.recurrent import ends_both_ways
from cellstack.nodes.time import FINAL, POOL_MODES

WORDS = (*POOL_MODES, FINAL)  # modes of GlobalPool
MOST_NAMES = 8  # how many of a file's modules a message lists
KINDS = ("Linear", "Embedding")  # modules that may consist of one matrix


def in_order(found: Contents, source: SavedFile, order: Sequence[str | Node]) -> Network:
    """Return the network that runs a file's modules in the given order, see `cellstack.load`.

    Raises:
        FormatError: a module is missing, ambiguous, or of an unknown kind; weights of modules that aren't in the order.
        TypeError: the order isn't a list of names and nodes.
    """
    if isinstance(order, str) or not all(isinstance(entry, (str, Node)) for entry in order) or not len(order):
        raise TypeError(f"load: expected order as a list of modules' names, got {short(order, 200)}")
    where, reader = source.where, Reader()
    tensors = joined(found.tensors, where, None, found.directions, found.axes)
    recurrent = networks_of(tensors, where, found.activations, found.directions)
    names = dict.fromkeys((*recurrent, *found.modules, *(name.rpartition(".")[0] for name in tensors)))
    used, assumed = [], []
    layers: tuple[Node, ...] = ()  # of the last recurrent module
    for entry in order:
        name, kind = (None, None) if isinstance(entry, Node) else _placed(where, entry, [*names])
        if name is not None:
            used.append(name)
        if name in recurrent:
            layers = recurrent[name].nodes
            assumed += filter(None, [recurrent[name].metadata.get("assumed")])
        if name in found.modules:
            _read(reader, Saved(source, found.modules[name]), name, where)
        elif name in recurrent:
            _add(reader, where, name, layers, layers)
        elif name is not None:
            _add(reader, where, name, [_matrix(where, name, kind, tensors)], layers)
        else:
            node = entry if isinstance(entry, Node) else GlobalPool(entry) if entry in WORDS else Activation(entry)
            if isinstance(node, GlobalPool) and node.mode == "last":
                _warn_of_last(reader, where)
            _add(reader, where, short(entry) if isinstance(entry, str) else type(entry).__name__, [node], layers)
    unused = [name for name in tensors if not any(within(name, module) for module in used)]
    optimiser = [name for name in unused if OPTIMISER.fullmatch(name)]
    rest = by_module(tensors, [name for name in unused if name not in set(optimiser)])
    if rest:
        raise FormatError(
            f"{where}: order has to name every module with weights; it doesn't name {listed(rest, 6, ', ')}"
        )
    for doubt in reader.doubts:
        warnings.warn(f"load: {where}: {doubt}", stacklevel=6)
    reader.builder.output(reader.wire)
    said = {"assumed": "; ".join(dict.fromkeys(assumed))} if assumed else {}
    metadata = {"source": {"format": "pytorch", "order": [str(entry) for entry in order]}, **said}
    network = reader.builder.network(metadata, numbered=True)
    return say_left_out(network, by_module(tensors, optimiser))


def _warn_of_last(reader: Reader, where: str) -> None:
    """Warn if the last step is that of a bidirectional layer: its final states may be intended."""
    if ends_both_ways(reversed(reader.builder.nodes.values())):
        warnings.warn(
            f'load: {where}: "last" after a bidirectional layer is the last step, not both final states: at that step '
            "the backward direction has read one step only. This is right for a model that takes y[:, -1]; for one "
            'that takes h[-2] and h[-1], write "final" instead',
            stacklevel=7,  # the call of cellstack.load
        )


def _add(reader: Reader, where: str, title: str, nodes: Iterable[Node], layers: Sequence[Node]) -> None:
    """Add the nodes of an entry; `layers` are those of the last recurrent module, for messages."""
    nodes = [*nodes]
    try:
        reader.add(*nodes)
    except ShapeError as error:
        shape, hint = reader.builder.shapes[reader.wire], ""
        if isinstance(nodes[0], Dense) and shape is not None:
            hint = _other_states(layers, nodes[0].kernel.shape[0], len(shape) == 1)
        raise FormatError(f"{where}: {title}, as in order: {error}{hint}") from None


def _other_states(layers: Sequence[Node], width: int, pooled: bool) -> str:
    """Return a sentence that says which states have the width that a Linear expects; "" if none has."""
    sizes = [cell.spec.output_size for node in layers for cell in node.cells]
    both = bool(layers) and isinstance(layers[-1], Bidirectional)
    if not pooled or not sizes:
        return ""
    if width == sum(sizes):
        found = f"the final states of all {len(layers)} layers together, and 'final' takes only those of the last layer"
    elif both and width == sizes[-1]:
        found = "one direction; h[-1] is the final state of the backward direction, and 'final' takes both"
    else:
        return ""
    return f". {width} is the width of {found}: use cellstack.compile(model, example) for such a model"


def _placed(where: str, entry: str, names: list[str]) -> tuple[str | None, str | None]:
    """Return the full name of the module of an entry, and the kind given for it; None if the entry isn't a module."""
    title, _, kind = entry.rpartition(":") if entry.rpartition(":")[2] in KINDS else (entry, "", None)
    fits = [title] if title in names else [name for name in names if name.endswith(f".{title}")]
    if len(fits) > 1:
        raise FormatError(f"{where}: {short(entry)} may be any of the modules {listed(fits, MOST_NAMES, ', ')}")
    if fits:
        return fits[0], kind
    if entry not in WORDS:
        try:
            Activation(entry)
        except ValueError:
            own = [name for name in names if name]
            raise FormatError(
                f"{where}: there is no module {short(entry)}, as in order; there are {listed(own, MOST_NAMES, ', ')}; "
                "order also takes 'last' for the last step, 'mean' and 'max' over all steps, 'final' for the final "
                "states of the recurrent module before it, and names of activations"
            ) from None
    return None, None


def _read(reader: Reader, module: Saved, name: str, where: str) -> None:
    """Read a module whose settings are in the file."""
    try:
        reader.read(module, name)
    except FormatError:
        raise
    except (TypeError, ValueError, MissingSettingError) as error:
        raise FormatError(f"{where}: {str(error).removeprefix('load: ')[:1000]}") from None


def _matrix(where: str, name: str, kind: str | None, tensors: Mapping[str, Any]) -> Node:
    """Return the node of a Linear or Embedding of which the file only holds the tensors."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if within(key, name)}
    here = f"{where}: {short(name, 200)}"
    matrix = own.keys() <= {"weight", "bias"} and "weight" in own and len(own["weight"].shape) == 2
    if not matrix:
        found = ", ".join(by_module(tensors, [key for key in tensors if within(key, name)]))
        raise FormatError(
            f"{here}: expected a recurrent layer, a Linear or an Embedding, found {found}: weights alone don't define "
            "other modules; save the whole model, by torch.save(model)"
        )
    if "bias" not in own and kind is None:
        raise FormatError(
            f"{here}: without a bias it may be a Linear or an Embedding: write {name}:Linear or {name}:Embedding "
            "in order"
        )
    if kind == "Embedding":
        if "bias" in own:
            raise FormatError(f"{here}: expected an Embedding, found a weight and a bias")
        return Embedding(array(own["weight"]))
    return dense(name, tensors, where).nodes[0]
