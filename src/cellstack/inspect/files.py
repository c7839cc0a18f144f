"""Traces in safetensors files: the arrays by name, and the network.

`network` is a native file of the network, as bytes; then follow `steps`, `y/0`, `state/0/h`; for each node,
`nodes/NAME/x/0` and `y`, and for each of its cells, `cells/0/f` and so on. `__metadata__` describes the contents.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cellstack.cells.errors import FormatError
from cellstack.cells.mlstm import MemorySpec
from cellstack.formats import safetensors as native_format
from cellstack.formats.files import check_replaceable
from cellstack.inspect.memories import MemoryTrace
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace, TraceContents
from cellstack.inspect.values import alone, as_tuple
from cellstack.nodes.recording import MemoryRecord, Record

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.base import Array
    from cellstack.nodes.patches import CellPatches
    from cellstack.nodes.values import Celled

KEY, VERSION = "cellstack_trace", 1


def save(t: NetworkTrace, path: str | PathLike[str]) -> None:
    """Write a trace: see `NetworkTrace.save`."""
    target, _ = check_replaceable(path)
    steps, aligned, nodes, masks, whole = t._parts
    tensors: dict[str, Array] = {"steps": steps} | {f"masks/{name}": mask for name, mask in masks.items()}
    for number, array in enumerate(as_tuple(t.y)):
        tensors[f"y/{number}"] = array
    for number, state in enumerate(t.state):
        tensors |= _fields(f"state/{number}", state)
    cells = {}
    for name, node in nodes.items():
        for number, array in enumerate(as_tuple(node.x)):
            tensors[f"nodes/{name}/x/{number}"] = array
        tensors[f"nodes/{name}/y"] = node.y
        for number, cell in enumerate(node.cells):
            where = f"nodes/{name}/cells/{number}"
            tensors |= _fields(where, cell.fields) | {f"{where}/units": cell.units}
            tensors |= {f"{where}/pre/{gate}": array for gate, array in (cell._sums or {}).items()}
            said: dict[str, Any] = {"mask": cell.mask is not None, "pre": [*(cell._sums or {})]}
            if cell.mask is not None:
                tensors[f"{where}/mask"] = cell.mask
            if cell.record is not None:
                record = cell.record
                tensors[f"{where}/run/x"] = record.x
                if record.before is not None:
                    tensors |= _fields(f"{where}/run/before", record.before)
                if record.reset is not None:
                    tensors[f"{where}/run/reset"] = record.reset
                said["run"] = {
                    "before": record.before is not None,
                    "reset": record.reset is not None,
                    "reverse": record.reverse,
                }
            cells[where] = said
    said = {"nodes": list(nodes), "aligned": sorted(aligned), "cells": cells, "masks": list(masks), "whole": whole}
    text = json.dumps({"version": VERSION, **said})
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as folder:
        own = os.path.join(folder, "network.safetensors")
        native_format.save(t.network, own)
        with open(own, "rb") as file:
            tensors["network"] = np.frombuffer(file.read(), np.uint8)
        draft = os.path.join(folder, "trace.safetensors")
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, draft, {KEY: text})
        os.replace(draft, target)


def _fields(where: str, values: Any) -> dict[str, Array]:
    return {f"{where}/{name}": array for name, array in zip(values._fields, values, strict=True)}


class _Tensors:
    """The tensors of a file, each used once, with its shape and dtype checked."""

    def __init__(self, path: str, arrays: dict[str, Array]) -> None:
        self.path, self.arrays = path, arrays

    def take(self, name: str, shape: Sequence[int | None], kinds: str | np.dtype[Any]) -> Array:
        """Return a tensor; `kinds`: its dtype, or the letters of the allowed kinds of dtypes."""
        array = self.arrays.pop(name, None)
        if array is None:
            raise FormatError(f"{self.path}: tensor {name[:80]!r} is missing")
        fits = array.ndim == len(shape) and all(
            want in (None, got) for want, got in zip(shape, array.shape, strict=True)
        )
        right = array.dtype.kind in kinds if isinstance(kinds, str) else array.dtype == kinds
        if not fits or not right:
            lengths = ", ".join("any" if n is None else str(n) for n in shape)
            raise FormatError(
                f"{self.path}: tensor {name[:80]!r}: expected [{lengths}] of {kinds}, found {list(array.shape)} of "
                f"{array.dtype}"
            )
        return array

    def fields(
        self, where: str, kind: type[Any], shapes: Mapping[str, Sequence[int | None]], dtype: np.dtype[Any]
    ) -> Any:
        """Return a named tuple with a tensor in each field."""
        return kind(*(self.take(f"{where}/{field}", shapes[field], dtype) for field in kind._fields))


def load(path: str | PathLike[str]) -> NetworkTrace:
    """Read a trace that `NetworkTrace.save` wrote.

    Args:
        path: the file.

    Raises:
        FormatError: it isn't a trace, or it is damaged.
        OSError: it can't be read.
    """
    path = os.fsdecode(fspath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder, not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(said, dict) or said.get("version") != VERSION:
                raise FormatError(f"{path}: expected a trace of version {VERSION}, which NetworkTrace.save writes")
            names = list(file.keys())
            tensors = _Tensors(path, {name: file.get_tensor(name) for name in names})
        found = _read(path, said, tensors)
    except SafetensorError as error:
        raise FormatError(f"{path}: not a safetensors file: {str(error)[:200]!r}") from None
    except (AttributeError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: the trace is damaged: {error!r:.200}") from None
    if tensors.arrays:
        raise FormatError(f"{path}: tensor {min(tensors.arrays)[:80]!r}: a trace has no such tensor")
    return found


def _read(path: str, said: dict[str, Any], tensors: _Tensors) -> NetworkTrace:
    with tempfile.TemporaryDirectory() as folder:
        own = os.path.join(folder, "network.safetensors")
        with open(own, "wb") as copy:
            copy.write(tensors.take("network", [None], "u").tobytes())
        try:
            network = native_format.load(own)
        except FormatError as error:
            raise FormatError(f"{path}: the network in it: {str(error).removeprefix(f'{own}: ')}") from None
    batch = len(tensors.arrays["y/0"])
    ys = tuple(_value(network, name, f"y/{place}", batch, tensors) for place, name in enumerate(network.outputs))
    state = tuple(
        _state(cell, f"state/{number}", batch, network.dtype, tensors) for number, cell in enumerate(network.stateful)
    )
    nodes = {}
    for name in said["nodes"]:
        if name not in network.names:
            raise FormatError(f"{path}: the network has no node {name!r:.80}")
        number, where = network.names.index(name), f"nodes/{name}"
        node, patches = network.nodes[number], network.patches_of(name)
        xs = tuple(
            _value(network, source, f"{where}/x/{place}", batch, tensors)
            for place, source in enumerate(network.wires[number])
        )
        seen = tuple(
            _cell(
                cell,
                patches[place] if patches else None,
                f"{where}/cells/{place}",
                batch,
                said["cells"][f"{where}/cells/{place}"],
                tensors,
            )
            for place, cell in enumerate(node.cells_in(network.dtype))
        )
        nodes[name] = NodeTrace(node, alone(xs), _value(network, name, f"{where}/y", batch, tensors), seen)
    aligned = frozenset(str(name) for name in said["aligned"])
    masks = {str(name): tensors.take(f"masks/{name}", [batch, None], "b") for name in said["masks"]}
    steps = tensors.take("steps", [None], "i")
    values = [(name, nodes[name].y) for name in nodes] + list(zip(network.outputs, ys, strict=True)) + [*masks.items()]
    for name, array in values:
        if name in aligned and array.shape[1:2] != steps.shape:
            raise FormatError(f"{path}: {name}: expected {len(steps)} steps, as in 'steps', found {list(array.shape)}")
    parts = TraceContents(steps, aligned, nodes, masks, said["whole"] is True)
    return NetworkTrace(network, alone(ys), state, parts)


def _value(network: Network, name: str, tensor: str, batch: int, tensors: _Tensors) -> Array:
    """Return the value of an input or the output of a node."""
    ids = name in network.graph.ids
    shape = (
        [None] if ids else [None, *network.shapes[name][1:]] if len(network.shapes[name]) > 1 else network.shapes[name]
    )
    return tensors.take(tensor, [batch, *shape], "biuf" if ids else network.dtype)


def _state(cell: Celled, where: str, batch: int, dtype: np.dtype[Any], tensors: _Tensors) -> Any:
    shapes = {name: [batch, *shape] for name, shape in cell.state_shapes.items()}
    return tensors.fields(where, cell.state_type, shapes, dtype)


def _cell(
    cell: Any, patches: CellPatches | None, where: str, batch: int, said: dict[str, Any], tensors: _Tensors
) -> CellTrace:
    spec, dtype = cell.spec, cell.dtype
    units = tensors.take(f"{where}/units", [None], "i")
    if units.size and (units.min() < 0 or units.max() >= spec.units):
        raise FormatError(f"{tensors.path}: tensor {where + '/units'!r}: expected values from 0 to {spec.units - 1}")
    steps, kind = tensors.arrays[f"{where}/h"].shape[1:2], spec.of_kind.trace
    shapes = {
        field: [batch, *steps, *((len(units),) if shape == (spec.units,) else shape)]
        for field, shape in spec.trace_shapes.items()
    }
    fields = tensors.fields(where, kind, shapes, dtype)
    mask = tensors.take(f"{where}/mask", [batch, *steps], "b") if said["mask"] else None
    sums = {gate: tensors.take(f"{where}/pre/{gate}", shapes[gate], dtype) for gate in said["pre"]} or None
    of_memory, record = isinstance(spec, MemorySpec), None
    if "run" in said:
        run, at = said["run"], f"{where}/run"
        x = tensors.take(f"{at}/x", [batch, *steps, spec.input_size], dtype)
        before = _state(cell, f"{at}/before", batch, dtype, tensors) if run["before"] else None
        reset = tensors.take(f"{at}/reset", [batch, *steps], "b") if run["reset"] else None
        if len(units) != spec.units or not isinstance(run["reverse"], bool):
            raise FormatError(f"{tensors.path}: {where}: the record must cover all units, with its direction")
        if of_memory:
            record = MemoryRecord(x, before, mask, reset)
        else:
            gates = np.stack([getattr(fields, gate) for gate in spec.of_kind.gates], axis=2)
            states = spec.of_kind.state(*(getattr(fields, name) for name in spec.state_sizes))
            record = Record(gates, states, x, before, mask, reset, run["reverse"], patches)
    return (MemoryTrace if of_memory else CellTrace)(cell, fields, units, mask, sums, record)
