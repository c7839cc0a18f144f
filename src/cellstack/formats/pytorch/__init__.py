"""PyTorch: its files, read and written without it, and its modules in memory.

`torch.save` writes state dicts, checkpoints around them, and whole modules. All are read as data: what a pickle in
them would import or call is never imported or called (`pickles.py`). From a state dict's names and
shapes come recurrent networks. What else it holds, such as a Linear, it doesn't say how to run: so `load` takes a file
of one recurrent module alone, or a whole module of PyTorch's own, such as a `Sequential`, whose order is known; and
`extract` the recurrent modules out of any file. `from_torch` takes modules in memory.

Weights that PyTorch computes before it uses them are computed here too: weight norm, spectral norm, pruning, in old
ways and as parametrizations. Those of dynamically quantised layers are multiplied out.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cellstack.formats.pytorch.archive import recognises, records
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.modules import from_torch, network_of_module
from cellstack.formats.pytorch.names import (
    HINT,
    held_as_read,
    network_of,
    networks_of,
    nothing_recurrent,
    parts_of,
    say_left_out,
    with_dense,
)
from cellstack.formats.pytorch.names import NAME as WEIGHT
from cellstack.formats.pytorch.order import in_order
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.saved import Saved, Source, UnsaidError
from cellstack.formats.pytorch.script import Scripts
from cellstack.formats.pytorch.tree import OUR_PACKAGE, Contents, attributes_of, contents, kind_of, within
from cellstack.formats.pytorch.writer import save
from cellstack.network import Network
from cellstack.nodes import Node
from cellstack.spec import FormatError

__all__ = ["NAME", "SUFFIXES", "extract", "from_torch", "load", "network_of", "networks_of", "recognises", "save"]

NAME = "PyTorch"
SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
OPTIONS = ("order",)


def load(path: str, order: Sequence[str | Node] | None = None) -> Network:
    """Read a file that holds one recurrent module and nothing else, or one whole module that `from_torch` takes.

    Args:
        path: what `torch.save` wrote: a state dict of `nn.LSTM`, `GRU`, `RNN` or one of their cells, or of one of our
            layers; the module itself, a `Sequential` of PyTorch's layers and ours, or a dict around any of these;
            TorchScript of such modules, scripted or traced, where its code computes what PyTorch's own does. What an
            optimiser keeps is no part of a model; neither is what Lightning writes beside its `state_dict`.
        order: which modules run, one after the other, where the file doesn't say it: see `cellstack.load`.

    Returns:
        The network, float32 (float16 and bfloat16 are widened, but for matrices of cells, which stay in bfloat16:
        `Network.with_weights`) or float64: it takes `[B, T, I]` whatever `batch_first`
        says, and gives every step. Its metadata says where it comes from, and what is assumed where the file doesn't
        say: a state dict doesn't hold whether `nn.RNN` has tanh or relu, and it is taken to be tanh. `"computed"` there
        says which weights the file holds in pieces, or as integers; `"left_out"`, which tensors are of no model.

    Raises:
        FormatError: the file is damaged, made to run code, or holds more than that, all of which is listed by name.
        OSError: the file can't be read.
        MemoryError: there is no room for an array.
    """
    with records(path) as file:
        scripts = Scripts(path, file.code)
        root, left_out = _model(file.read())
        found = contents(path, root, scripts)
        return held_as_read(say_left_out(_read(path, found, scripts, order), left_out), found.tensors)


def _read(path: str, found: Contents, scripts: Scripts, order: Sequence[str | Node] | None) -> Network:
    if order is not None:
        return in_order(found, Source(path, scripts), order)
    place, module = next(iter(found.roots.items())) if len(found.roots) == 1 else ((), None)
    if module is None or not _whole(path, found, module):
        return network_of(found.tensors, path, found.activations, found.unknown, found.directions, found.axes)
    return _network(path, found, Saved(Source(path, scripts), module), ".".join(place))


def _model(root: Any) -> tuple[Any, list[str]]:
    """Return what a file holds of a model, and what else there is, in words: Lightning writes its training too."""
    if isinstance(root, dict) and "pytorch-lightning_version" in root and isinstance(root.get("state_dict"), dict):
        return {"state_dict": root["state_dict"]}, ["what Lightning keeps of the training"]
    return root, []


def _whole(path: str, found: Contents, root: Standin) -> bool:
    """Return whether a file is one module of PyTorch's own or ours, more than one of PyTorch's recurrent ones alone."""
    kind, child = kind_of(root), root
    while kind.startswith("torch.nn.parallel.") and isinstance(child, Standin):  # what it wraps decides
        child = attributes_of(child).get("_modules", {}).get("module")
        kind = kind_of(child) if isinstance(child, Standin) else ""
    alone = len(parts_of(joined(found.tensors, path, WEIGHT, found.directions, found.axes))) == 1 and not found.unknown
    known = kind.startswith(("torch.nn.", OUR_PACKAGE)) and (not alone or bool(found.ours))
    return known and len(contents(path, root).tensors) == len(found.tensors)


def _network(path: str, found: Contents, module: Saved, title: str) -> Network:
    """Return a module of a file as the network that `from_torch` gives for it in memory."""
    try:
        computed = {name: tensor.how for name, tensor in module.tensors.items() if hasattr(tensor, "how")}
        metadata = {"source": {"format": "pytorch", "module": title}, **({"computed": computed} if computed else {})}
        return network_of_module(module, metadata)
    except FormatError:
        raise
    except (TypeError, ValueError, UnsaidError) as error:
        raise FormatError(f"{path}: {str(error).removeprefix('from_torch: ')[:1000]}; {HINT}") from None


def extract(path: str) -> dict[str, Network]:
    """Read every recurrent module of a file, whatever stands around them, and each Linear beside them.

    Args:
        path: what `torch.save` wrote: a state dict, a checkpoint, a whole model, TorchScript.

    Returns:
        Networks by the modules' names, recurrent ones first, such as `"model_state.lstm"`; `""` where the names have no
        prefix.

    Raises:
        FormatError: the file is damaged, made to run code, or holds no recurrent module, or one that isn't PyTorch's.
        OSError: the file can't be read.
        MemoryError: there is no room for an array.
    """
    with records(path) as file:
        scripts = Scripts(path, file.code)
        found = contents(path, _model(file.read())[0], scripts)
        source = Source(path, scripts)
        networks = {name: _network(path, found, Saved(source, module), name) for name, module in found.ours.items()}
        others = {name: tensor for name, tensor in found.tensors.items() if not any(within(name, o) for o in networks)}
        networks |= networks_of(others, path, found.activations, found.directions, found.axes)
        if not networks:
            raise nothing_recurrent(found.tensors, path, found.unknown)
        networks = {name: held_as_read(network, found.tensors) for name, network in networks.items()}
        return with_dense(networks, others, path)
