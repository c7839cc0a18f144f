"""Builds networks from files that don't specify the order of their modules, in an order that the caller gives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cellstack.formats.build import listed
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.modules import Reader
from cellstack.formats.pytorch.names import OPTIMISER, array, by_module, dense, networks_of, say_left_out
from cellstack.formats.pytorch.saved import MissingSettingError, Saved, Source
from cellstack.formats.pytorch.tensors import short
from cellstack.formats.pytorch.tree import Contents, within
from cellstack.network import Network
from cellstack.nodes import Activation, Embedding, GlobalPool, Node, Reshape, Select
from cellstack.nodes.recurrent import ends_both_ways
from cellstack.spec import FormatError

LAST = "last"  # means the last step of a sequence
MOST_NAMES = 8  # how many of a file's modules a message lists
KINDS = ("Linear", "Embedding")  # modules that may consist of one matrix


def in_order(found: Contents, source: Source, order: Sequence[str | Node]) -> Network:
    """Return the network that runs a file's modules in the given order.

    Args:
        found: the file's contents.
        source: the file.
        order: see `cellstack.load`.

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
    for entry in order:
        last = entry == LAST or (isinstance(entry, GlobalPool) and entry.mode == "last")
        if last and ends_both_ways(reversed(reader.builder.nodes.values())):
            warnings.warn(
                f"load: {where}: {entry if isinstance(entry, str) else 'GlobalPool(last)'} after a bidirectional layer "
                "is the last step, not both final states: at that step the backward direction has read one step only. "
                "This is right for a model that takes y[:, -1]; for one that takes h[-2] and h[-1], use "
                "cellstack.compile(model, example)",
                stacklevel=5,  # the call of cellstack.load
            )
        if isinstance(entry, Node):
            reader.add(entry)
            continue
        name, kind = _placed(where, entry, [*names])
        if name is None:
            reader.add(*((Select(-1, None), Reshape((-1,))) if entry == LAST else (Activation(entry),)))
            continue
        used.append(name)
        if name in found.modules:
            _read(reader, Saved(source, found.modules[name]), name, where)
        elif name in recurrent:
            reader.add(*recurrent[name].nodes)
            assumed += filter(None, [recurrent[name].metadata.get("assumed")])
        else:
            reader.add(_matrix(where, name, kind, tensors))
    unused = [name for name in tensors if not any(within(name, module) for module in used)]
    optimiser = [name for name in unused if OPTIMISER.fullmatch(name)]
    rest = by_module(tensors, [name for name in unused if name not in set(optimiser)])
    if rest:
        raise FormatError(
            f"{where}: order has to name every module with weights; it doesn't name {listed(rest, 6, ', ')}"
        )
    reader.builder.output(reader.wire)
    said = {"assumed": "; ".join(dict.fromkeys(assumed))} if assumed else {}
    metadata = {"source": {"format": "pytorch", "order": [str(entry) for entry in order]}, **said}
    network = reader.builder.network(metadata, numbered=True)
    return say_left_out(network, by_module(tensors, optimiser))


def _placed(where: str, entry: str, names: list[str]) -> tuple[str | None, str | None]:
    """Return the full name of the module of an entry, and the kind given for it; None if the entry isn't a module."""
    title, _, kind = entry.rpartition(":") if entry.rpartition(":")[2] in KINDS else (entry, "", None)
    fits = [title] if title in names else [name for name in names if name.endswith(f".{title}")]
    if len(fits) > 1:
        raise FormatError(f"{where}: {short(entry)} may be any of the modules {listed(fits, MOST_NAMES, ', ')}")
    if fits:
        return fits[0], kind
    if entry != LAST:
        try:
            Activation(entry)
        except ValueError:
            own = [name for name in names if name]
            raise FormatError(
                f"{where}: there is no module {short(entry)}, as in order; there are {listed(own, MOST_NAMES, ', ')}; "
                f"order also takes {LAST!r} for the last step, and names of activations"
            ) from None
    return None, None


def _read(reader: Reader, module: Saved, name: str, where: str) -> None:
    """Read a module whose settings are in the file."""
    try:
        reader.read(module, name)
    except FormatError:
        raise
    except (TypeError, ValueError, MissingSettingError) as error:
        raise FormatError(f"{where}: {str(error).removeprefix('from_torch: ')[:1000]}") from None


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
