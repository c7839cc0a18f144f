"""The native format: safetensors, with the network's description as JSON in the header's metadata.

The container is written and read by the `safetensors` package. Under `__metadata__`, the key `cellstack` holds the
description, which is ours: the format's version, the nodes in order with their names and settings, and the network's
own metadata. A tensor is named by its node, its place in it and its array: `layer_0/forward/0/kernel`.

What a file claims of an array is checked before the array is read, nothing in it is run, and memory stays near the size
of the arrays: a header takes some fifteen times its length, which the package keeps below 100 MB.

Ref: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from cellstack.formats.files import replacing
from cellstack.network import Network
from cellstack.nodes import Activation, Array, Dense, Node, Pool, Standardise
from cellstack.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import CellSpec, FormatError

NAME = "safetensors"
SUFFIXES = (".safetensors",)
KEY = "cellstack"
VERSION = 1
MAX_DESCRIPTION = 1 << 22  # thousands of nodes; JSON takes some twenty times its size when it is parsed
RECURRENT_FLAGS = ("return_sequences", "go_backwards", "zero_output_for_mask", "residual")
TYPES = {"int": int, "str": str, "bool": bool, "float": float, "float | None": float, "Any": dict}
CELL = {field.name: TYPES[str(field.type)] for field in fields(CellSpec)}  # a cell's settings, and what holds each
CELL_WIDTHS = ("input_size", "units")  # those that a cell can't do without
DTYPES = {"F32": np.float32, "F64": np.float64}


def recognises(head: bytes) -> bool:
    """Return whether a file that begins with `head` looks like safetensors: a length, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{"


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _describe_cells(prefix: str, cells: tuple[Cell, ...], tensors: dict[str, Array]) -> list[dict[str, Any]]:
    for number, cell in enumerate(cells):
        tensors.update({f"{prefix}/{number}/{name}": array for name, array in cell.arrays.items()})
    return [cell.spec.settings for cell in cells]


def _describe(prefix: str, node: Node, tensors: dict[str, Array]) -> dict[str, Any]:
    """Return a node's description, and put its arrays into `tensors`."""
    if isinstance(node, Recurrent):
        settings = {name: getattr(node, name) for name in RECURRENT_FLAGS}
        return {"type": "recurrent", "cells": _describe_cells(prefix, node.cells, tensors), **settings}
    if isinstance(node, Bidirectional):
        halves = {name: _describe(f"{prefix}/{name}", getattr(node, name), tensors) for name in ("forward", "backward")}
        return {"type": "bidirectional", **halves, "merge_mode": node.merge_mode}
    if isinstance(node, Standardise):
        tensors |= {f"{prefix}/mean": node.mean, f"{prefix}/scale": node.scale}
        return {"type": "standardise", "input_size": len(node.mean)}
    if isinstance(node, Dense):
        tensors[f"{prefix}/kernel"] = node.kernel
        if node.bias is not None:
            tensors[f"{prefix}/bias"] = node.bias
        sizes = {"input_size": node.kernel.shape[0], "units": node.kernel.shape[1]}
        return {"type": "dense", **sizes, "use_bias": node.bias is not None, "activation": node.activation}
    if isinstance(node, Activation):
        return {"type": "activation", "activation": node.activation}
    if isinstance(node, Pool):
        return {"type": "pool", "mode": node.mode}
    raise TypeError(f"save: expected a node that the format knows, got {type(node).__name__}")


def save(network: Network, path: str) -> None:
    """Write `network` to `path`, whole or not at all.

    Args:
        network: what to write.
        path: where to.

    Raises:
        ValueError: a description (names and metadata) of more than 4 MiB.
        OSError: the file can't be written.
    """
    tensors: dict[str, Array] = {}
    nodes = [
        {"name": name, **_describe(name, node, tensors)}
        for name, node in zip(network.names, network.nodes, strict=True)
    ]
    description = json.dumps({"version": VERSION, "nodes": nodes, "metadata": network.metadata})
    if len(description) > MAX_DESCRIPTION:
        raise ValueError(f"save: expected a description of at most {MAX_DESCRIPTION} bytes, got {len(description)}")
    with replacing(path) as file:
        file.write(to_bytes(tensors, metadata={KEY: description}))


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _short(value: Any, length: int = 80) -> str:
    """Return how a message shows what a file claims: printable, and short however long it is."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _parse(where: str, text: str) -> Any:
    """Parse JSON strictly: no key twice, no NaN; whatever is wrong is a `FormatError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{where}: expected every key once, found {_short(key)} more than once")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise FormatError(f"{where}: expected numbers that JSON knows, found {name}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{where}: expected a description, found JSON nested too deep") from None
    except ValueError as error:  # bad JSON, numbers beyond reason
        raise FormatError(f"{where}: expected JSON, found {str(error)[:300]}") from None


def _take(where: str, table: Any, fields: dict[str, type]) -> list[Any]:
    """Return the values of `table`, which must have exactly these keys with values of these types."""
    if not isinstance(table, dict) or table.keys() != fields.keys():
        found = _short(sorted(table)) if isinstance(table, dict) else type(table).__name__
        raise FormatError(f"{where}: expected the keys {sorted(fields)}, found {found}")
    _check_types(where, table, fields)
    return [table[name] for name in fields]


def _check_types(where: str, table: dict[str, Any], fields: dict[str, type]) -> None:
    """Raise `FormatError` unless every value of `table` is of its field's type."""
    for name, value in table.items():
        kind = fields[name]
        whole = kind is float and type(value) is int and abs(value) <= 1 << 53  # JSON has one kind of number
        if type(value) is not kind and not whole:  # bool is no int here
            raise FormatError(f"{where}: expected {name} to be {kind.__name__}, found {type(value).__name__}")


def _cell_spec(where: str, table: Any) -> CellSpec:
    """Return the cell that `CellSpec.settings` describes: its widths, and what is other than usual."""
    if not isinstance(table, dict) or not table.keys() >= set(CELL_WIDTHS):
        found = _short(sorted(table)) if isinstance(table, dict) else type(table).__name__
        raise FormatError(f"{where}: expected the keys {list(CELL_WIDTHS)}, found {found}")
    unknown = sorted(table.keys() - CELL.keys())
    if unknown:
        raise FormatError(f"{where}: expected settings of a cell alone, found the key {_short(unknown[0])}")
    _check_types(where, table, CELL)
    for gate, name in table.get("gate_activations", {}).items():
        if type(name) is not str:
            raise FormatError(f"{where}: expected the activation of {_short(gate)} to be str, found {_short(name)}")
    return CellSpec(**table)


class _Reader:
    """Hands out the tensors of a file one by one, and knows which were never asked for."""

    def __init__(self, path: str, file: safe_open) -> None:
        self.path, self.file = path, file
        self.left = set(file.keys())

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        where = f"{self.path}: tensor {_short(name)}"
        if name not in self.left:
            raise FormatError(f"{where}: expected it, with shape {_short(list(shape))}, found no such tensor")
        self.left.remove(name)
        entry = self.file.get_slice(name)
        dtype, found = entry.get_dtype(), entry.get_shape()
        if dtype not in DTYPES:
            raise FormatError(f"{where}: expected dtype {' or '.join(DTYPES)}, found {_short(dtype)}")
        if found != list(shape):
            raise FormatError(f"{where}: expected shape {_short(list(shape))}, found {_short(found)}")
        if 0 in shape:  # the other axis could be of any length, beyond what NumPy can count
            raise FormatError(f"{where}: expected at least one number, found shape {_short(found)}")
        np.empty(shape, DTYPES[dtype])  # MemoryError where there is no room for it: the package would panic
        return self.file.get_tensor(name)

    def cells(self, prefix: str, descriptions: list[Any]) -> tuple[Cell, ...]:
        cells = []
        for number, description in enumerate(descriptions):
            where = f"{prefix}/{number}"
            spec = _cell_spec(f"{self.path}: {_short(where)}", description)
            arrays = {name: self.take(f"{where}/{name}", shape) for name, shape in spec.shapes.items()}
            cells.append(Cell(spec, **arrays))
        return tuple(cells)


def _recurrent(reader: _Reader, prefix: str, table: Any) -> Recurrent:
    fields = {"type": str, "cells": list, **dict.fromkeys(RECURRENT_FLAGS, bool)}
    kind, cells, *flags = _take(f"{reader.path}: {_short(prefix)}", table, fields)
    if kind != "recurrent":
        raise FormatError(f"{reader.path}: {_short(prefix)}: expected type 'recurrent', found {_short(kind)}")
    return Recurrent(reader.cells(prefix, cells), *flags)


def _bidirectional(reader: _Reader, prefix: str, table: Any) -> Bidirectional:
    fields = {"type": str, "forward": dict, "backward": dict, "merge_mode": str}
    _, forward, backward, merge_mode = _take(f"{reader.path}: {_short(prefix)}", table, fields)
    ahead = _recurrent(reader, f"{prefix}/forward", forward)
    return Bidirectional(ahead, _recurrent(reader, f"{prefix}/backward", backward), merge_mode)


def _standardise(reader: _Reader, prefix: str, table: Any) -> Standardise:
    _, size = _take(f"{reader.path}: {_short(prefix)}", table, {"type": str, "input_size": int})
    return Standardise(reader.take(f"{prefix}/mean", (size,)), reader.take(f"{prefix}/scale", (size,)))


def _dense(reader: _Reader, prefix: str, table: Any) -> Dense:
    fields = {"type": str, "input_size": int, "units": int, "use_bias": bool, "activation": str}
    _, size, units, use_bias, activation = _take(f"{reader.path}: {_short(prefix)}", table, fields)
    kernel = reader.take(f"{prefix}/kernel", (size, units))
    return Dense(kernel, reader.take(f"{prefix}/bias", (units,)) if use_bias else None, activation)


def _activation(reader: _Reader, prefix: str, table: Any) -> Activation:
    return Activation(_take(f"{reader.path}: {_short(prefix)}", table, {"type": str, "activation": str})[1])


def _pool(reader: _Reader, prefix: str, table: Any) -> Pool:
    return Pool(_take(f"{reader.path}: {_short(prefix)}", table, {"type": str, "mode": str})[1])


BUILDERS: dict[str, Callable[[_Reader, str, Any], Node]] = {
    "recurrent": _recurrent,
    "bidirectional": _bidirectional,
    "standardise": _standardise,
    "dense": _dense,
    "activation": _activation,
    "pool": _pool,
}


def _node(reader: _Reader, entry: Any) -> tuple[str, Node]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise FormatError(f"{reader.path}: expected every node to have a name, found {_short(entry)}")
    table = dict(entry)
    name = table.pop("name")
    kind = table.get("type")
    builder = BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        raise FormatError(
            f"{reader.path}: {_short(name)}: expected type to be one of {', '.join(BUILDERS)}, found {_short(kind)}"
        )
    try:
        return name, builder(reader, name, table)
    except FormatError:
        raise
    except (ValueError, TypeError) as error:  # what a node refuses in anybody's hands
        raise FormatError(f"{reader.path}: {_short(name)}: {str(error)[:300]}") from None


def load(path: str) -> Network:
    """Read the network in `path`.

    Args:
        path: the file.

    Returns:
        The network, bit for bit as it was saved.

    Raises:
        FormatError: the file is damaged, of a newer version, or not a network; names the file, the tensor, what was
            expected and what was found.
        OSError: the file can't be read.
        MemoryError: there is no room for an array.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return _read(path, file)
    except SafetensorError as error:
        raise FormatError(f"{path}: expected a safetensors file, found {_short(str(error), 300)}") from None
    except RecursionError:
        raise FormatError(f"{path}: expected a description, found JSON nested too deep") from None


def _read(path: str, file: safe_open) -> Network:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise FormatError(
            f"{path}: expected a description under __metadata__.{KEY}, found none: "
            "a safetensors file of weights alone doesn't say what to do with them"
        )
    where = f"{path}: description"
    if len(text) > MAX_DESCRIPTION:
        raise FormatError(f"{where}: expected at most {MAX_DESCRIPTION} characters, found {len(text)}")
    description = _parse(where, text)
    version = description.get("version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: expected a version, found {_short(version)}")
    if version > VERSION:
        raise FormatError(
            f"{where}: expected version {VERSION} or older, found {_short(version)}: made by a newer cellstack"
        )
    _, entries, metadata = _take(where, description, {"version": int, "nodes": list, "metadata": dict})
    reader = _Reader(path, file)
    nodes = [_node(reader, entry) for entry in entries]
    if reader.left:
        found = _short(min(reader.left))
        raise FormatError(f"{path}: tensor {found}: expected no such tensor, found one that no node uses")
    try:
        return Network([node for _, node in nodes], [name for name, _ in nodes], metadata)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: {str(error)[:300]}") from None
