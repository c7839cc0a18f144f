"""Safetensors files that hold only weights, such as a torch state dict: their recurrent modules by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from cellstack.cells.bfloat16 import widened
from cellstack.cells.errors import FormatError
from cellstack.formats import xlstm
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.names import (
    NAME,
    keep_bfloat16,
    layers_of,
    network_of,
    networks_of,
    parts_of,
    with_dense,
)
from cellstack.formats.pytorch.order import in_order
from cellstack.formats.pytorch.saved import SavedFile
from cellstack.formats.pytorch.tree import Contents
from cellstack.formats.tirex import is_second, of_folder

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes import Node
    from cellstack.nodes.base import Array

DTYPES = ("F16", "F32", "F64", "BF16")


class Tensor:
    """A tensor of the file, read on first use."""

    def __init__(self, path: str, file: safe_open, name: str) -> None:
        self.path, self.file, self.name = path, file, name
        entry = file.get_slice(name)
        self.shape, self.dtype = tuple(entry.get_shape()), entry.get_dtype()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self.dtype not in DTYPES:
            found = f"found {self.dtype}"
            raise FormatError(f"{self.path}: tensor {self.name!r}: expected dtype {', '.join(DTYPES)}, {found}")
        array = widened(bfloat16_bits(self.path, self.name, self.shape)) if self.dtype == "BF16" else None
        return np.asarray(self.file.get_tensor(self.name) if array is None else array, dtype)


def bfloat16_bits(path: str, name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Return the bits of a bfloat16 tensor, as NumPy has no such dtype.

    The package has opened the file before, and so checked that the header and the offsets in it are within the file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), "<u2").reshape(shape)


def tensors_in(path: str, file: safe_open) -> dict[str, Tensor]:
    """Return the tensors of an open file by name."""
    return {name: Tensor(path, file, name) for name in file.keys()}  # noqa: SIM118 - no dict


def has_parts(file: safe_open) -> bool:
    """Return whether any tensor has a name that PyTorch gives the weights of a recurrent module, or a TiRex-2 has."""
    try:
        tensors = tensors_in("", file)
        known = is_second(tensors) or xlstm.recognises(tensors)
        return known or bool(layers_of(tensors) or parts_of(joined(tensors, "", NAME)))
    except FormatError:  # weights in pieces that don't fit together: reading them reports it
        return True


def load_weights(path: str, file: safe_open, order: Sequence[str | Node] | None = None) -> Network:
    """Return the network of a file of weights: its only recurrent module, or its modules in a given order."""
    tensors = tensors_in(path, file)
    if order is None and xlstm.recognises(tensors):
        return xlstm.network_of(tensors, path)
    if order is None and is_second(tensors):
        return of_folder(path, tensors)
    network = network_of(tensors, path) if order is None else in_order(Contents(tensors), SavedFile(path), order)
    return keep_bfloat16(network, tensors)


def extract_weights(path: str, file: safe_open) -> dict[str, Network]:
    """Return the recurrent and the Linear modules of a file of weights, by name."""
    tensors = tensors_in(path, file)
    networks = {name: keep_bfloat16(network, tensors) for name, network in networks_of(tensors, path).items()}
    return with_dense(networks, tensors, path)
