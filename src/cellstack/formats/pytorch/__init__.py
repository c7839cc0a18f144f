"""PyTorch's files, read and written without PyTorch, and PyTorch modules in memory.

`torch.save` writes state dicts, checkpoints that contain them, and whole modules. All are read as data: nothing that a
pickle names is imported or called (`pickles.py`). The names and shapes in a state dict define its recurrent modules,
but not the order in which modules run. So `load` reads a file of one recurrent module, or a whole PyTorch module such
as a `Sequential`, whose order is known. `extract` reads the recurrent modules of any file, and `load` converts
modules in memory.

Weights that PyTorch computes before use are computed here too: weight norm, spectral norm and pruning, as hooks and as
parametrizations. The weights of dynamically quantised layers are dequantised.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.formats import xlstm
from cellstack.formats.pytorch.archive import recognises, records
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.modules import TIME_FIRST, Reader, network_of_module, of_module
from cellstack.formats.pytorch.names import (
    HINT,
    MODULES,
    keep_bfloat16,
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
from cellstack.formats.pytorch.saved import MissingSettingError, Saved, SavedFile
from cellstack.formats.pytorch.tree import OUR_PACKAGE, Contents, attributes_of, contents, kind_of, within
from cellstack.formats.pytorch.writer import save
from cellstack.formats.tirex import of_checkpoint
from cellstack.network import Network
from cellstack.nodes import Node

__all__ = ["NAME", "SUFFIXES", "extract", "load", "network_of", "networks_of", "of_module", "recognises", "save"]

NAME = "PyTorch"
SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
OPTIONS = ("order",)


def load(path: str, order: Sequence[str | Node] | None = None) -> Network:
    """Read a file that holds only one recurrent module, or one whole module that `load` supports.

    Args:
        path: a file of `torch.save`: a state dict of `nn.LSTM`, `GRU`, `RNN` or one of their cells, or of one of our
            layers; the module itself, a `Sequential` of PyTorch's layers and ours, or a dict that contains any of them.
            The state of an optimiser, and what Lightning stores in addition to its `state_dict`, is ignored.
        order: the modules in the order in which they run, if the file doesn't specify it: see `cellstack.load`.

    Returns:
        The network, in float32 or float64. float16 and bfloat16 are widened to float32, except the matrices of cells,
        which stay in bfloat16 (see `Network.with_weights`). It takes `[B, T, I]` regardless of `batch_first`, and
        returns every step. Its metadata holds the source, and under `"assumed"` what the file doesn't specify: a state
        dict doesn't record the nonlinearity of `nn.RNN`, so tanh is assumed. `"computed"` lists weights that the file
        stores in pieces or as integers, `"left_out"` tensors that aren't part of the model. A file that cellstack wrote
        also has the network's own metadata.

    Raises:
        FormatError: the file is damaged, tries to run code, or holds anything else, all of which is named.
        OSError: the file can't be read.
        MemoryError: an array doesn't fit into memory.
    """
    with records(path) as file:
        whole = file.read()
        if order is None and (tirex := of_checkpoint(path, whole)) is not None:
            return tirex
        root, left_out = _model(whole)
        found = contents(path, root)
        network = say_left_out(_read(path, found, order), left_out)
        network.metadata.update(file.metadata() | network.metadata)
        return keep_bfloat16(network, found.tensors)


def _read(path: str, found: Contents, order: Sequence[str | Node] | None) -> Network:
    if order is None and xlstm.recognises(found.tensors):
        return xlstm.network_of(found.tensors, path)
    if order is not None:
        return in_order(found, SavedFile(path), order)
    place, module = next(iter(found.roots.items())) if len(found.roots) == 1 else ((), None)
    if module is None or not _whole(path, found, module):
        for name, one in found.modules.items():
            kind = kind_of(one).rpartition(".")[2]
            if kind in MODULES and attributes_of(one).get("batch_first") is False:
                warnings.warn(f"load: {path}: {name or 'the module'} ({kind}) {TIME_FIRST}", stacklevel=5)
                break
        return network_of(found.tensors, path, found.activations, found.unknown, found.directions, found.axes)
    reader = Reader()
    network = _network(path, Saved(SavedFile(path), module), ".".join(place), reader)
    for doubt in reader.doubts:
        warnings.warn(f"load: {path}: {doubt}", stacklevel=5)  # the call of cellstack.load
    return network


def _model(root: Any) -> tuple[Any, list[str]]:
    """Return a file's model, and descriptions of its other contents: Lightning also stores the state of training."""
    if isinstance(root, dict) and "pytorch-lightning_version" in root and isinstance(root.get("state_dict"), dict):
        return {"state_dict": root["state_dict"]}, ["Lightning's training state"]
    return root, []


def _whole(path: str, found: Contents, root: Standin) -> bool:
    """Return whether a file is a whole module of PyTorch or cellstack, other than a single recurrent one of PyTorch."""
    if root.kind.startswith("__torch__."):
        return False
    kind, child = kind_of(root), root
    while kind.startswith("torch.nn.parallel.") and isinstance(child, Standin):  # the wrapped module decides
        child = attributes_of(child).get("_modules", {}).get("module")
        kind = kind_of(child) if isinstance(child, Standin) else ""
    alone = len(parts_of(joined(found.tensors, path, WEIGHT, found.directions, found.axes))) == 1 and not found.unknown
    known = kind.startswith(("torch.nn.", OUR_PACKAGE)) and (not alone or bool(found.ours))
    return known and len(contents(path, root).tensors) == len(found.tensors)


def _network(path: str, module: Saved, title: str, reader: Reader | None = None) -> Network:
    """Return the network of a module in a file, as `load` does for one in memory."""
    try:
        computed = {name: tensor.how for name, tensor in module.tensors.items() if hasattr(tensor, "how")}
        metadata = {"source": {"format": "pytorch", "module": title}, **({"computed": computed} if computed else {})}
        return network_of_module(module, metadata, reader)
    except FormatError:
        raise
    except (TypeError, ValueError, MissingSettingError) as error:
        raise FormatError(f"{path}: {str(error).removeprefix('load: ')[:1000]}; {HINT}") from None


def extract(path: str) -> dict[str, Network]:
    """Read every recurrent module and every Linear of a file, even where its other modules aren't supported.

    Args:
        path: a file of `torch.save`: a state dict, a checkpoint, a whole model, TorchScript.

    Returns:
        Networks by the modules' names, recurrent ones first, such as `"model_state.lstm"`; `""` where the names have no
        prefix.

    Raises:
        FormatError: the file is damaged, tries to run code, or holds no recurrent module, or one that isn't PyTorch's.
        OSError: the file can't be read.
        MemoryError: an array doesn't fit into memory.
    """
    with records(path) as file:
        found = contents(path, _model(file.read())[0])
        source = SavedFile(path)
        networks = {name: _network(path, Saved(source, module), name) for name, module in found.ours.items()}
        others = {name: tensor for name, tensor in found.tensors.items() if not any(within(name, o) for o in networks)}
        networks |= networks_of(others, path, found.activations, found.directions, found.axes)
        if not networks:
            raise nothing_recurrent(found.tensors, path, found.unknown)
        networks = {name: keep_bfloat16(network, found.tensors) for name, network in networks.items()}
        return with_dense(networks, others, path)
