"""The native format: safetensors, with the network's description as JSON in the header's metadata.

The `safetensors` package writes and reads the container. Under `__metadata__`, the key `cellstack` holds cellstack's
description: the format's version, the inputs, the nodes in order with their names, wires and settings, the outputs, and
the network's metadata. A tensor's name consists of its node, its position in the node and its array:
`layer_0/forward/0/kernel`.

An array's shape and dtype are checked before the array is read, and nothing in the file is run. Memory stays near the
size of the arrays: parsing the header takes some fifteen times its length, which the package limits to 100 MB.

Ref: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import FormatError
from cellstack.formats.files import parse, replacing, short
from cellstack.formats.safetensors_weights import bfloat16_bits, extract_weights, has_parts, load_weights
from cellstack.network import Network
from cellstack.network.description import described, restored

if TYPE_CHECKING:
    from cellstack.nodes.base import Array, Node

NAME = "safetensors"
SUFFIXES = (".safetensors",)
OPTIONS = ("order",)
KEY = "cellstack"
MAX_DESCRIPTION = 1 << 22  # enough for thousands of nodes; parsing JSON takes some twenty times its size
DTYPES = {"F32": np.float32, "F64": np.float64}
BFLOAT16 = "BF16"  # only for the matrices of cells


def recognises(head: bytes) -> bool:
    """Return whether a file that starts with `head` looks like safetensors: a length, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{"


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(network: Network, path: str) -> None:
    """Write `network` to `path` atomically.

    Args:
        network: the network to write.
        path: the file to write.

    Raises:
        ValueError: the description (names and metadata) is larger than 4 MiB.
        OSError: the file can't be written.
    """
    found, tensors = described(network)
    description = json.dumps(found)
    if len(description) > MAX_DESCRIPTION:
        raise ValueError(
            f"save: the description has {len(description)} bytes, more than {MAX_DESCRIPTION}: shorten the metadata"
        )
    with replacing(path) as file:
        file.write(_to_bytes(tensors, description))


def _to_bytes(tensors: Mapping[str, Array | BFloat16Array], description: str) -> bytes:
    """Return the bytes of a file; bfloat16 arrays are written as bits, as NumPy has no such dtype."""
    narrow = {name for name, array in tensors.items() if isinstance(array, BFloat16Array)}
    written = {name: array.bits if isinstance(array, BFloat16Array) else array for name, array in tensors.items()}
    data = to_bytes(written, metadata={KEY: description})
    if not narrow:
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name in narrow:
        header[name]["dtype"] = BFLOAT16
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse(where: str, text: str) -> Any:
    """Parse JSON strictly, without repeated keys or NaN; any defect is a `FormatError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{where}: the key {short(key)} occurs more than once")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise FormatError(f"{where}: {name} isn't a number in JSON")

    return parse(where, text, object_pairs_hook=unique, parse_constant=no_constant)


class _Tensors:
    """Reads the tensors of a file one by one, and records which are left."""

    def __init__(self, path: str, file: safe_open) -> None:
        self.path, self.file = path, file
        self.left = set(file.keys())

    def take(self, name: str, shape: tuple[int, ...], bfloat16: bool = False) -> Array | BFloat16Array:
        where = f"{self.path}: tensor {short(name)}"
        if name not in self.left:
            raise FormatError(f"{where}: expected shape {short(list(shape))}, found no such tensor")
        self.left.remove(name)
        entry = self.file.get_slice(name)
        dtype, found = entry.get_dtype(), entry.get_shape()
        known = (*DTYPES, BFLOAT16) if bfloat16 else tuple(DTYPES)
        if dtype not in known:
            raise FormatError(f"{where}: expected dtype {', '.join(known[:-1])} or {known[-1]}, found {short(dtype)}")
        if found != list(shape):
            raise FormatError(f"{where}: expected shape {short(list(shape))}, found {short(found)}")
        if 0 in shape:  # the other axis could be longer than NumPy allows
            raise FormatError(f"{where}: expected at least one number, found shape {short(found)}")
        if dtype == BFLOAT16:
            return BFloat16Array(bfloat16_bits(self.path, name, shape))
        np.empty(shape, DTYPES[dtype])  # raises MemoryError if it doesn't fit: the package would panic
        return self.file.get_tensor(name)


def load(path: str, order: Sequence[str | Node] | None = None) -> Network:
    """Read the network in `path`.

    Args:
        path: the file.
        order: the order of the modules, for a file of weights only: see `cellstack.load`.

    Returns:
        The network, bit for bit as it was saved.

    Raises:
        FormatError: the file is damaged, of a newer version, or not a network; the message names the file, the tensor,
            what was expected and what was found.
        OSError: the file can't be read.
        MemoryError: the file doesn't fit into memory; the message names it.
        TypeError: an order is given for a network, which has its own.
    """
    with _opened(path) as file:
        if _of_weights(file):
            return load_weights(path, file, order)
        if order is not None:
            raise TypeError(f"load: order isn't used for {path}: it holds a network, which defines its own order")
        return _read(path, file)


def extract(path: str) -> dict[str, Network]:
    """Return the recurrent parts of the file by name: nodes of a network, or modules of a torch state dict.

    Args:
        path: the file.

    Returns:
        One network for each part.

    Raises:
        FormatError, OSError, MemoryError: see `load`.
    """
    with _opened(path) as file:
        if _of_weights(file):
            return extract_weights(path, file)
        network = _read(path, file)
    return {
        name: Network([node], [name], patches=[patch for patch in network.patches if patch.node == name])
        for name, node in zip(network.names, network.nodes, strict=True)
        if node.cells
    }


@contextmanager
def _opened(path: str) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as opened:
            head = opened.read(9)
        found = short(str(error), 300) if head[8:9] in (b"", b"{", b"[") else f"a file that begins with {head[:8]!r}"
        raise FormatError(f"{path}: expected a safetensors file, found {found}") from None
    except RecursionError:
        raise FormatError(f"{path}: the JSON is nested too deeply") from None
    except MemoryError:  # the original error names neither the file nor its size
        raise MemoryError(f"{path}: not enough memory for its {os.path.getsize(path):,} bytes") from None


def _of_weights(file: safe_open) -> bool:
    """Return whether a file has no description, but weights with the names of recurrent modules."""
    return KEY not in (file.metadata() or {}) and has_parts(file)


def _read(path: str, file: safe_open) -> Network:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise FormatError(
            f"{path}: expected a description under __metadata__.{KEY}, found none: "
            "a safetensors file of weights only doesn't define a network"
        )
    where = f"{path}: description"
    if len(text) > MAX_DESCRIPTION:
        raise FormatError(f"{where}: {len(text)} characters are more than the limit of {MAX_DESCRIPTION}")
    description = _parse(where, text)
    tensors = _Tensors(path, file)
    arguments = restored(description, tensors)
    if tensors.left:
        unused = short(min(tensors.left))
        raise FormatError(f"{path}: tensor {unused}: no node uses it")
    try:
        return Network(**arguments, _warn=False)
    except (IndexError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: {str(error)[:300]}") from None
