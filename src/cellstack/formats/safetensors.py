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

from cellstack.bfloat16 import BFloat16Array
from cellstack.formats.files import replacing, short
from cellstack.formats.safetensors_weights import bfloat16_bits, extract_weights, has_parts, load_weights
from cellstack.network import Network
from cellstack.nodes import NODES, Node
from cellstack.nodes.patches import Patch
from cellstack.nodes.stored import Entry
from cellstack.spec import FormatError

if TYPE_CHECKING:
    from cellstack.nodes.base import Array, Node, Types

NAME = "safetensors"
SUFFIXES = (".safetensors",)
OPTIONS = ("order",)
KEY = "cellstack"
VERSION = 1
MAX_DESCRIPTION = 1 << 22  # enough for thousands of nodes; parsing JSON takes some twenty times its size
DTYPES = {"F32": np.float32, "F64": np.float64}
BFLOAT16 = "BF16"  # only for the matrices of cells


def recognises(head: bytes) -> bool:
    """Return whether a file that starts with `head` looks like safetensors: a length, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{"


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def described(network: Network) -> tuple[dict[str, Any], dict[str, Array | BFloat16Array]]:
    """Return the description of `network` as JSON values, and its arrays by the names of their tensors.

    Args:
        network: the network.
    """
    tensors: dict[str, Array | BFloat16Array] = {}
    nodes = []
    for name, wires, node in zip(network.names, network.wires, network.nodes, strict=True):
        entry, arrays = node.stored()
        nodes.append({"name": name, "wires": list(wires), **entry})
        tensors.update({f"{name}/{array}": numbers for array, numbers in arrays.items()})
    inputs = [{"name": name, "shape": list(network.shapes[name])} for name in network.inputs]
    graph: dict[str, Any] = {"inputs": inputs, "nodes": nodes, "outputs": list(network.outputs)}
    patches = []
    for number, patch in enumerate(network.patches):
        said = patch.stored()
        if patch.value is not None:
            said["value"] = list(patch.value.shape)
            tensors[f"patch/{number}/value"] = patch.value
        patches.append(said)
    if patches:  # left out if there are none, as older versions refuse unknown keys
        graph["patches"] = patches
    return {"version": VERSION, **graph, "metadata": network.metadata}, tensors


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

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # invalid JSON, or integers with too many digits
        raise FormatError(f"{where}: expected JSON, found {str(error)[:300]}") from None


def _take(where: str, table: Any, keys: Types, optional: Types | None = None) -> dict[str, Any]:
    """Return `table` after checking its keys and the types of its values; only the `optional` keys may be missing."""
    optional = optional or {}
    if not isinstance(table, dict) or not table.keys() >= keys.keys():
        found = short(sorted(table)) if isinstance(table, dict) else type(table).__name__
        raise FormatError(f"{where}: expected the keys {sorted(keys)}, found {found}")
    known = {**keys, **optional}
    unknown = sorted(table.keys() - known.keys())
    if unknown:
        raise FormatError(f"{where}: unknown key {short(unknown[0])}; expected {sorted(known)}")
    for name, value in table.items():
        one = known[name]
        kinds = one if isinstance(one, tuple) else (one,)
        whole = float in kinds and type(value) is int and abs(value) <= 1 << 53  # JSON has one type of number
        if type(value) not in kinds and not whole:  # a bool isn't accepted as an int
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise FormatError(f"{where}: expected {name} to be {expected}, found {type(value).__name__}")
    return table


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


class _Entry(Entry):
    """A node's description with its tensors, as `Node.restored` takes them.

    Args:
        tensors: the tensors of the whole file.
        prefix: the start of the names of the node's tensors.
        table: the description, without name and wires.
        kind: the type that it must have; "" = it has none.
    """

    def __init__(self, tensors: _Tensors, prefix: str, table: Any, kind: str) -> None:
        self.tensors, self.prefix, self.table, self.kind = tensors, prefix, table, kind
        self.where = f"{tensors.path}: {short(prefix)}"

    def take(self, keys: Types, optional: Types | None = None) -> dict[str, Any]:
        found = dict(_take(self.where, self.table, {"type": str, **keys} if self.kind else keys, optional))
        if self.kind and found.pop("type") != self.kind:
            raise self.refuse(f"expected type {self.kind!r}, found {short(self.table['type'])}")
        return found

    def array(self, name: str, shape: tuple[int, ...], bfloat16: bool = False) -> Array | BFloat16Array:
        return self.tensors.take(f"{self.prefix}/{name}", shape, bfloat16)

    def inner(self, name: str, description: Any, kind: str = "") -> _Entry:
        return _Entry(self.tensors, f"{self.prefix}/{name}", description, kind)

    def refuse(self, what: str) -> FormatError:
        return FormatError(f"{self.where}: {what}")


def _names(where: str, what: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise FormatError(f"{where}: expected {what} to be a list of names, found {short(values)}")
    return tuple(values)


def _inputs(where: str, entries: list[Any]) -> dict[str, Any]:
    """Return the inputs' shapes by name."""
    inputs: dict[str, Any] = {}
    for entry in entries:
        name, shape = (_take(f"{where}: inputs", entry, {"name": str, "shape": list})[key] for key in ("name", "shape"))
        if name in inputs:
            raise FormatError(f"{where}: the input {short(name)} occurs more than once")
        inputs[name] = shape
    return inputs


def _node(tensors: _Tensors, entry: Any) -> tuple[str, tuple[str, ...], Node]:
    """Return a node with its name and its wires."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise FormatError(f"{tensors.path}: expected a node with a name, found {short(entry)}")
    table = dict(entry)
    name = table.pop("name")
    wires = _names(f"{tensors.path}: {short(name)}", "wires", table.pop("wires", None))
    kind = table.get("type")
    if not isinstance(kind, str) or kind not in NODES:
        raise FormatError(
            f"{tensors.path}: {short(name)}: expected type to be one of {', '.join(NODES)}, found {short(kind)}"
        )
    try:
        return name, wires, NODES[kind].restored(_Entry(tensors, name, table, kind))
    except FormatError:
        raise
    except (ValueError, TypeError) as error:  # settings or arrays that the node refuses
        raise FormatError(f"{tensors.path}: {short(name)}: {str(error)[:300]}") from None


def _patch(tensors: _Tensors, number: int, said: Any) -> Patch:
    where, index = f"{tensors.path}: patch {number}", (list, dict)
    optional: Types = {"units": index, "rows": index, "steps": index, "cell": int, "value": list}
    table = dict(_take(where, said, {"node": str, "gate": str, "how": str}, optional))
    shape = table.pop("value", None)
    if shape is not None and not all(type(size) is int and size > 0 for size in shape):
        raise FormatError(f"{where}: expected value to be a shape, found {short(shape)}")
    value = None if shape is None else np.asarray(tensors.take(f"patch/{number}/value", tuple(shape)))
    try:
        return Patch.restored(table, value)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {str(error)[:300]}") from None


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
        raise FormatError(f"{path}: expected a safetensors file, found {short(str(error), 300)}") from None
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
    version = description.get("version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: expected a version, found {short(version)}")
    if version > VERSION:
        raise FormatError(
            f"{where}: expected version {VERSION} or older, found {short(version)}: made by a newer cellstack"
        )
    keys: Types = {"version": int, "inputs": list, "nodes": list, "outputs": list, "metadata": dict}
    _take(where, description, keys, {"patches": list})
    inputs, outputs = _inputs(where, description["inputs"]), _names(where, "outputs", description["outputs"])
    tensors = _Tensors(path, file)
    found = [_node(tensors, entry) for entry in description["nodes"]]
    patches = [_patch(tensors, number, said) for number, said in enumerate(description.get("patches", []))]
    if tensors.left:
        unused = short(min(tensors.left))
        raise FormatError(f"{path}: tensor {unused}: no node uses it")
    names, wires, nodes = zip(*found, strict=True) if found else ((), (), ())
    try:
        wiring = {"inputs": inputs, "wires": wires, "outputs": outputs}
        return Network(nodes, names, description["metadata"], **wiring, patches=patches, _warn=False)
    except (IndexError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: {str(error)[:300]}") from None
