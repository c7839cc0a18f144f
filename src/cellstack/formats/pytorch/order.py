"""Networks out of files that don't say in which order their modules run, where the caller says it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cellstack.formats.build import listed
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.modules import Reader
from cellstack.formats.pytorch.names import OPTIMISER, array, by_module, dense, networks_of, say_left_out
from cellstack.formats.pytorch.saved import Saved, Source, UnsaidError
from cellstack.formats.pytorch.tensors import short
from cellstack.formats.pytorch.tree import Contents, within
from cellstack.network import Network
from cellstack.nodes import Activation, Embedding, GlobalPool, Node, Reshape, Select
from cellstack.nodes.recurrent import ends_both_ways
from cellstack.spec import FormatError

LAST = "last"  # the word for the last step of a sequence
MOST_NAMES = 8  # of a file's modules that a message lists
KINDS = ("Linear", "Embedding")  # that one matrix may be of


def in_order(found: Contents, source: Source, order: Sequence[str | Node]) -> Network:
    """Return the network of a file's modules, one after the other.

    Args:
        found: what the file holds.
        source: the file.
        order: see `cellstack.load`.

    Raises:
        FormatError: a module that isn't there, that is there more than once, or of which the file doesn't say what it
            computes; weights that no module in the order has.
        TypeError: an order that isn't one of names and nodes.
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
    beside = [name for name in tensors if not any(within(name, module) for module in used)]
    optimiser = [name for name in beside if OPTIMISER.fullmatch(name)]
    rest = by_module(tensors, [name for name in beside if name not in set(optimiser)])
    if rest:
        raise FormatError(
            f"{where}: expected the order to name every module with weights, found beside it {listed(rest, 6, ', ')}"
        )
    reader.builder.output(reader.wire)
    said = {"assumed": "; ".join(dict.fromkeys(assumed))} if assumed else {}
    metadata = {"source": {"format": "pytorch", "order": [str(entry) for entry in order]}, **said}
    network = reader.builder.network(metadata, numbered=True)
    return say_left_out(network, by_module(tensors, optimiser))


def _placed(where: str, entry: str, names: list[str]) -> tuple[str | None, str | None]:
    """Return the module that is meant, by its whole name, and what it is said to be; None for what isn't a module."""
    title, _, kind = entry.rpartition(":") if entry.rpartition(":")[2] in KINDS else (entry, "", None)
    fits = [title] if title in names else [name for name in names if name.endswith(f".{title}")]
    if len(fits) > 1:
        raise FormatError(f"{where}: expected one module {short(entry)}, found {listed(fits, MOST_NAMES, ', ')}")
    if fits:
        return fits[0], kind
    if entry != LAST:
        try:
            Activation(entry)
        except ValueError:
            own = [name for name in names if name]
            raise FormatError(
                f"{where}: expected a module {short(entry)}, as the order says, found {listed(own, MOST_NAMES, ', ')}; "
                f"{LAST} stands for the last step, and an activation for itself"
            ) from None
    return None, None


def _read(reader: Reader, module: Saved, name: str, where: str) -> None:
    """Read a module whose settings the file says."""
    try:
        reader.read(module, name)
    except FormatError:
        raise
    except (TypeError, ValueError, UnsaidError) as error:
        raise FormatError(f"{where}: {str(error).removeprefix('from_torch: ')[:1000]}") from None


def _matrix(where: str, name: str, kind: str | None, tensors: Mapping[str, Any]) -> Node:
    """Return the node of a module of which there are the tensors alone: one that its shapes tell."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if within(key, name)}
    here = f"{where}: {short(name, 200)}"
    matrix = own.keys() <= {"weight", "bias"} and "weight" in own and len(own["weight"].shape) == 2
    if not matrix:
        found = ", ".join(by_module(tensors, [key for key in tensors if within(key, name)]))
        raise FormatError(
            f"{here}: expected a recurrent layer, a Linear or an Embedding, found {found}, of which the weights don't "
            "say what it does: save the model whole, by torch.save(model)"
        )
    if "bias" not in own and kind is None:
        raise FormatError(
            f"{here}: expected a bias, without which a Linear and an Embedding look alike: say which it is, in the "
            f"order, by {name}:Linear or {name}:Embedding"
        )
    if kind == "Embedding":
        if "bias" in own:
            raise FormatError(f"{here}: expected an Embedding, found a bias beside its weight")
        return Embedding(array(own["weight"]))
    return dense(name, tensors, where).nodes[0]
