"""The native format: safetensors, with the network's description as JSON in the header's metadata.

The container is written and read by the `safetensors` package. Under `__metadata__`, the key `cellstack` holds the
description, which is ours: the format's version, the inputs, the nodes in order with their names, wires and settings,
the outputs, and the network's own metadata. A tensor is named by its node, its place in it and its array:
`layer_0/forward/0/kernel`.

What a file claims of an array is checked before the array is read, nothing in it is run, and memory stays near the size
of the arrays: a header takes some fifteen times its length, which the package keeps below 100 MB.

Ref: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from cellstack.formats.files import replacing
from cellstack.formats.safetensors_weights import extract_weights, has_parts, load_weights
from cellstack.network import Network
from cellstack.nodes import (
    Activation,
    Array,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Node,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.spec import CellSpec, FormatError

NAME = "safetensors"
SUFFIXES = (".safetensors",)
KEY = "cellstack"
VERSION = 1
MAX_DESCRIPTION = 1 << 22  # thousands of nodes; JSON takes some twenty times its size when it is parsed
RECURRENT_FLAGS = ("return_sequences", "go_backwards", "zero_output_for_mask", "residual")
TYPES = {"int": int, "str": str, "bool": bool, "float": float, "float | None": float, "Any": dict}
CELL = {
    setting.name: TYPES[str(setting.type)] for setting in fields(CellSpec)
}  # a cell's settings, and what holds each
CELL_WIDTHS = ("input_size", "units")  # those that a cell can't do without
DTYPES = {"F32": np.float32, "F64": np.float64}


Types = dict[str, type | tuple[type, ...]]  # keys, and of what type their values are: of one, or of one of several
NONE = type(None)


@dataclass(frozen=True)
class _Kind:
    """How the format holds a node whose arguments are arrays, and settings that JSON has words for."""

    node: type[Node]
    settings: Types = field(default_factory=dict)  # arguments of the node, held as they are
    sizes: Types = field(default_factory=dict)  # what settles its arrays' shapes
    measure: Callable[[Any], dict[str, Any]] = lambda node: {}  # the sizes of a node
    shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]] = lambda sizes: {}  # its arrays, by argument


def _dense_shapes(size: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"kernel": (size["input_size"], size["units"]), **({"bias": (size["units"],)} if size["use_bias"] else {})}


def _conv_sizes(node: Conv1D) -> dict[str, Any]:
    taps, _, units = node.kernel.shape
    return {"taps": taps, "input_size": node.input_size, "units": units, "use_bias": node.bias is not None}


def _conv_shapes(size: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if size["groups"] < 1 or size["input_size"] % size["groups"]:
        raise ValueError(f"expected groups to divide input_size {size['input_size']}, found {_short(size['groups'])}")
    kernel = (size["taps"], size["input_size"] // size["groups"], size["units"])
    return {"kernel": kernel, **({"bias": (size["units"],)} if size["use_bias"] else {})}


def _norm_sizes(node: LayerNorm) -> dict[str, Any]:
    return {"input_size": node.input_size, "use_gain": node.gain is not None, "use_bias": node.bias is not None}


def _norm_shapes(size: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {name: (size["input_size"],) for name in ("gain", "bias") if size[f"use_{name}"]}
    if bool(shapes) == (size["input_size"] is None):
        raise ValueError("expected an input_size with a gain or a bias, and null without, found otherwise")
    return shapes


KINDS = {
    "standardise": _Kind(
        Standardise,
        sizes={"input_size": int},
        measure=lambda node: {"input_size": node.input_size},
        shapes=lambda size: dict.fromkeys(("mean", "scale"), (size["input_size"],)),
    ),
    "scale": _Kind(
        Scale,
        sizes={"input_size": int},
        measure=lambda node: {"input_size": node.input_size},
        shapes=lambda size: dict.fromkeys(("scale", "shift"), (size["input_size"],)),
    ),
    "layer_norm": _Kind(
        LayerNorm,
        settings={"epsilon": float},
        sizes={"input_size": (int, NONE), "use_gain": bool, "use_bias": bool},
        measure=_norm_sizes,
        shapes=_norm_shapes,
    ),
    "dense": _Kind(
        Dense,
        settings={"activation": str},
        sizes={"input_size": int, "units": int, "use_bias": bool},
        measure=lambda node: {
            "input_size": node.kernel.shape[0],
            "units": node.kernel.shape[1],
            "use_bias": node.bias is not None,
        },
        shapes=_dense_shapes,
    ),
    "activation": _Kind(Activation, settings={"activation": str}),
    "embedding": _Kind(
        Embedding,
        settings={"mask_zero": bool},
        sizes={"ids": int, "units": int},
        measure=lambda node: dict(zip(("ids", "units"), node.table.shape, strict=True)),
        shapes=lambda size: {"table": (size["ids"], size["units"])},
    ),
    "masking": _Kind(Masking, settings={"value": float}),
    "conv1d": _Kind(
        Conv1D,
        settings={"strides": int, "padding": (str, list), "dilation": int, "groups": int, "activation": str},
        sizes={"taps": int, "input_size": int, "units": int, "use_bias": bool},
        measure=_conv_sizes,
        shapes=_conv_shapes,
    ),
    "pool1d": _Kind(Pool1D, settings={"mode": str, "size": int, "strides": int, "padding": str}),
    "pool": _Kind(GlobalPool, settings={"mode": str}),
    "flatten": _Kind(Flatten),
    "reshape": _Kind(Reshape, settings={"shape": list}),
    "permute": _Kind(Permute, settings={"dims": list}),
    "repeat": _Kind(Repeat, settings={"times": int}),
    "select": _Kind(Select, settings={"start": (int, NONE), "stop": (int, NONE), "step": int, "axis": int}),
    "merge": _Kind(Merge, settings={"mode": str, "axis": int}),
}
NAMES = {kind.node: name for name, kind in KINDS.items()}


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
    if type(node) in NAMES:
        name = NAMES[type(node)]
        kind = KINDS[name]
        sizes = kind.measure(node)
        settings = {key: getattr(node, key) for key in kind.settings}
        tensors.update({f"{prefix}/{array}": getattr(node, array) for array in kind.shapes({**sizes, **settings})})
        return {"type": name, **sizes, **settings}
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
        {"name": name, "wires": wires, **_describe(name, node, tensors)}
        for name, wires, node in zip(network.names, network.wires, network.nodes, strict=True)
    ]
    inputs = [{"name": name, "shape": network.shapes[name]} for name in network.inputs]
    graph = {"inputs": inputs, "nodes": nodes, "outputs": network.outputs}
    description = json.dumps({"version": VERSION, **graph, "metadata": network.metadata})
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


def _take(where: str, table: Any, fields: Types) -> list[Any]:
    """Return the values of `table`, which must have exactly these keys with values of these types."""
    if not isinstance(table, dict) or table.keys() != fields.keys():
        found = _short(sorted(table)) if isinstance(table, dict) else type(table).__name__
        raise FormatError(f"{where}: expected the keys {sorted(fields)}, found {found}")
    _check_types(where, table, fields)
    return [table[name] for name in fields]


def _check_types(where: str, table: dict[str, Any], fields: Types) -> None:
    """Raise `FormatError` unless every value of `table` is of its field's type."""
    for name, value in table.items():
        known = fields[name]
        kinds = known if isinstance(known, tuple) else (known,)
        whole = float in kinds and type(value) is int and abs(value) <= 1 << 53  # JSON has one kind of number
        if type(value) not in kinds and not whole:  # bool is no int here
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise FormatError(f"{where}: expected {name} to be {expected}, found {type(value).__name__}")


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


def _plain(name: str, reader: _Reader, prefix: str, table: Any) -> Node:
    kind = KINDS[name]
    where = f"{reader.path}: {_short(prefix)}"
    fields: Types = {"type": str, **kind.sizes, **kind.settings}
    values = dict(zip(fields, _take(where, table, fields), strict=True))
    try:
        shapes = kind.shapes(values)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    arrays = {array: reader.take(f"{prefix}/{array}", shape) for array, shape in shapes.items()}
    return kind.node(**arrays, **{key: values[key] for key in kind.settings})


BUILDERS: dict[str, Callable[[_Reader, str, Any], Node]] = {
    "recurrent": _recurrent,
    "bidirectional": _bidirectional,
    **{name: partial(_plain, name) for name in KINDS},
}


def _names(where: str, what: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise FormatError(f"{where}: expected {what} to be a list of names, found {_short(values)}")
    return tuple(values)


def _inputs(where: str, entries: list[Any]) -> dict[str, Any]:
    """Return the inputs' shapes by name."""
    inputs: dict[str, Any] = {}
    for entry in entries:
        name, shape = _take(f"{where}: inputs", entry, {"name": str, "shape": list})
        if name in inputs:
            raise FormatError(f"{where}: expected inputs of different names, found {_short(name)} more than once")
        inputs[name] = shape
    return inputs


def _node(reader: _Reader, entry: Any) -> tuple[str, tuple[str, ...], Node]:
    """Return a node with its name and its wires."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise FormatError(f"{reader.path}: expected every node to have a name, found {_short(entry)}")
    table = dict(entry)
    name = table.pop("name")
    wires = _names(f"{reader.path}: {_short(name)}", "wires", table.pop("wires", None))
    kind = table.get("type")
    builder = BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        raise FormatError(
            f"{reader.path}: {_short(name)}: expected type to be one of {', '.join(BUILDERS)}, found {_short(kind)}"
        )
    try:
        return name, wires, builder(reader, name, table)
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
    with _opened(path) as file:
        return load_weights(path, file) if _of_weights(file) else _read(path, file)


def extract(path: str) -> dict[str, Network]:
    """Return the recurrent parts of the file by name: nodes of a network, or modules of a torch state dict.

    Args:
        path: the file.

    Returns:
        One network a part.

    Raises:
        FormatError, OSError, MemoryError: see `load`.
    """
    with _opened(path) as file:
        if _of_weights(file):
            return extract_weights(path, file)
        network = _read(path, file)
    named = zip(network.names, network.nodes, strict=True)
    return {name: Network([node], [name]) for name, node in named if node.cells}


@contextmanager
def _opened(path: str) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise FormatError(f"{path}: expected a safetensors file, found {_short(str(error), 300)}") from None
    except RecursionError:
        raise FormatError(f"{path}: expected a description, found JSON nested too deep") from None


def _of_weights(file: safe_open) -> bool:
    """Whether there is no description, but weights whose names say what they are."""
    return KEY not in (file.metadata() or {}) and has_parts(file)


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
    fields: Types = {"version": int, "inputs": list, "nodes": list, "outputs": list, "metadata": dict}
    _, inputs, entries, outputs, metadata = _take(where, description, fields)
    inputs, outputs = _inputs(where, inputs), _names(where, "outputs", outputs)
    reader = _Reader(path, file)
    found = [_node(reader, entry) for entry in entries]
    if reader.left:
        unused = _short(min(reader.left))
        raise FormatError(f"{path}: tensor {unused}: expected no such tensor, found one that no node uses")
    names, wires, nodes = zip(*found, strict=True) if found else ((), (), ())
    try:
        return Network(nodes, names, metadata, inputs=inputs, wires=wires, outputs=outputs)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: {str(error)[:300]}") from None
