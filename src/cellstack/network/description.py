"""Describes a network as JSON values and arrays, from which a file restores it, and as text for `repr` and `plan()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import FormatError
from cellstack.cells.plan import Plan
from cellstack.network.layouts import as_line
from cellstack.nodes import NODES
from cellstack.nodes.patches import Patch
from cellstack.nodes.stored import Entry

if TYPE_CHECKING:
    from cellstack.network.network import Network
    from cellstack.nodes.base import Array, Node, Types

VERSION = 1


# ── as data ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tensors(Protocol):
    """The arrays of a file, by name.

    Attributes:
        path: the file, for error messages.
    """

    path: str

    def take(self, name: str, shape: tuple[int, ...], bfloat16: bool = False) -> Array | BFloat16Array:
        """Return an array; `FormatError` unless it has this shape. `bfloat16`: whether bfloat16 is allowed."""
        ...


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


def restored(description: Any, tensors: Tensors) -> dict[str, Any]:
    """Return the arguments of the `Network` that has a description: the inverse of `described`.

    Args:
        description: the JSON values.
        tensors: the arrays; each is taken once.

    Raises:
        FormatError: a newer version, or not a description of a network; the message says where.
    """
    where = f"{tensors.path}: description"
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
    found = [_node(tensors, entry) for entry in description["nodes"]]
    patches = [_patch(tensors, number, said) for number, said in enumerate(description.get("patches", []))]
    names, wires, nodes = zip(*found, strict=True) if found else ((), (), ())
    wiring = {"inputs": inputs, "wires": wires, "outputs": outputs}
    return {"nodes": nodes, "names": names, "metadata": description["metadata"], **wiring, "patches": patches}


def short(value: Any, length: int = 80) -> str:
    """Return a value from a file as text for a message: printable, and at most `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


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


class _Entry(Entry):
    """A node's description with its tensors, as `Node.restored` takes them.

    Args:
        tensors: the tensors of the whole file.
        prefix: the start of the names of the node's tensors.
        table: the description, without name and wires.
        kind: the type that it must have; "" = it has none.
    """

    def __init__(self, tensors: Tensors, prefix: str, table: Any, kind: str) -> None:
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

    def node(self, name: str, description: Any) -> Node:
        kind = description.get("type") if isinstance(description, dict) else None
        if not isinstance(kind, str) or kind not in NODES:
            raise self.refuse(f"expected nodes of type {', '.join(NODES)}, found {kind!r:.80}")
        return NODES[kind].restored(self.inner(name, description, kind))

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


def _node(tensors: Tensors, entry: Any) -> tuple[str, tuple[str, ...], Node]:
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


def _patch(tensors: Tensors, number: int, said: Any) -> Patch:
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


# ── as text ───────────────────────────────────────────────────────────────────────────────────────────────────────────


HEADINGS = ("layer", "inputs", "kind", "computes", "output shape", "parameters")


def as_text(network: Network, headings: tuple[str, ...] = ()) -> str:
    """Return a network as text: its inputs and outputs, a line per node, under `headings` if given, and its patches."""
    numbers = [f"{node.parameters:,}" for node in network.nodes]
    width = max(map(len, (*numbers, *headings[-1:])))
    rows = [
        (name, origin, type(node).__name__, node.summary, network.graph.shown(name), number.rjust(width))
        for name, origin, node, number in zip(network.names, _origins(network), network.nodes, numbers, strict=True)
    ]
    total = sum(node.parameters for node in network.nodes)
    comes, goes = (_ends(network, names) for names in (network.inputs, network.outputs))
    head = f"Network of {network.dtype}: {comes} -> {goes}, {total:,} numbers"
    lines = [*filter(None, [as_line(network)]), *_table(rows, headings), *map(repr, network.patches)]
    return "\n".join([head, *("  " + line for line in lines)])


def summary_text(network: Network) -> str:
    """Return the same with headings and totals: see `Network.summary`."""
    total = sum(node.parameters for node in network.nodes)
    size = sum(array.nbytes for array in described(network)[1].values())
    return f"{as_text(network, HEADINGS)}\ntotal: {total:,} parameters, {size:,} bytes"


def plan_lines(network: Network) -> Plan:
    """Return the cost of each node and what runs it: see `Network.plan`."""
    rows = []
    begun = {number: network.names[call.nodes[0]] for call in network.calls.sequences for number in call.nodes[1:]}
    for number, (name, origin, node) in enumerate(zip(network.names, _origins(network), network.nodes, strict=True)):
        engine = f"in the call of {begun[number]}" if number in begun else node.engine(network.dtype)
        patches = sum(patch.node == name for patch in network.patches)
        if patches and node.memory is not None:
            engine = f"NumPy ({network.dtype}), step by step"
        engine += f", {patches} patch{'es' * (patches > 1)}" if patches else ""
        rows.append((name, origin, node.summary, _cost(node.multiplications, node.bytes_read), engine))
    costs = [(node.multiplications, node.bytes_read) for node in network.nodes]
    total = _cost(*(sum(numbers) for numbers in zip(*costs, strict=True)))
    return Plan([*filter(None, [as_line(network)]), *_table(rows), f"total per step: {total}"])


def _origins(network: Network) -> list[str]:
    """Return, for each node, its inputs as text; "" if its input is the node before it."""
    before = ((network.inputs[0],), *((name,) for name in network.names[:-1]))
    return [
        "" if sources == usual else f"of {', '.join(sources)}"
        for sources, usual in zip(network.wires, before, strict=True)
    ]


def _ends(network: Network, names: tuple[str, ...]) -> str:
    """Return the shapes of the inputs or outputs, with their names if there are several."""
    shapes = [network.graph.shown(name) for name in names]
    named = len(names) > 1
    return ", ".join(f"{name} {shape}" if named else shape for name, shape in zip(names, shapes, strict=True))


def _cost(multiplications: int, read: int) -> str:
    """Return the cost of a step as text; "" without parameters."""
    return f"{multiplications:,} multiplications, {read:,} bytes" if read else ""


def _table(rows: Sequence[tuple[str, ...]], headings: tuple[str, ...] = ()) -> list[str]:
    """Return rows as lines with aligned columns, without empty columns, under their headings if they have any."""
    used = [number for number, column in enumerate(zip(*rows, strict=True)) if any(column)]
    lines = [[row[number] for number in used] for row in (*filter(None, [headings]), *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
