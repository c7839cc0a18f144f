"""The contents of a trace's page: a description in JSON, and arrays as bytes.

A sequence is stored as `[B, W, T]`, so that the values that a map draws for one unit are contiguous. The network's own
arrays keep their precision; those of the trace keep it while they are small, else they are rounded: see `ROUNDED`.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.inspect.annotations import answer_of, audio_of, each_row, features_of, labels_of
from cellstack.inspect.payload import cells_of, payload_of
from cellstack.inspect.values import as_tuple, rows_of
from cellstack.network.graph import origin

if TYPE_CHECKING:
    from cellstack.inspect.trace import CellTrace, NetworkTrace
    from cellstack.nodes.base import Array

VERSION = 1
LARGEST = 1 << 26  # numbers of a trace in one page: 128 MB as float16, which a browser handles easily
MOST_WEIGHTS = 1 << 23  # numbers of a network's arrays
ROUNDED = ((1 << 19, np.float64), (1 << 22, np.float32), (LARGEST, np.float16))
"""Size limits of a trace, in numbers, and the widest dtype for each."""
SMALLEST_NORMAL = 2.0**-14  # below, a float16 has fewer digits


class Payload(NamedTuple):
    """The contents of a page.

    Attributes:
        description: JSON-compatible values; an array in it is `{"array": n}`.
        arrays: the bytes of each array, described by `description["arrays"]`.
    """

    description: dict[str, Any]
    arrays: list[bytes]


class Arrays:
    """Collects arrays, each one once, even if it is added repeatedly.

    Args:
        dtype: the widest dtype for numbers of a trace.
        packed: whether the bytes are compressed: for a file, not for a page on the same machine.
    """

    def __init__(self, dtype: Any, packed: bool) -> None:
        self.dtype, self.packed = np.dtype(dtype), packed
        self.entries: list[dict[str, Any]] = []
        self.bytes: list[bytes] = []
        self._places: dict[Any, int] = {}
        self._alive: list[Array] = []  # keeps addresses from being reused

    def put(self, array: Array, sequence: bool = False) -> dict[str, int]:
        """Add an array and return its reference.

        Args:
            array: of any real dtype.
            sequence: whether it is `[B, T, …]` of a trace: rounded if large, and stored as `[B, W, T]`.
        """
        interface = array.__array_interface__
        key = interface["data"][0], interface["typestr"], array.shape, array.strides, sequence
        if key not in self._places:
            self._alive.append(array)
            self._places[key] = len(self.entries)
            self._add(self._laid_out(array) if sequence else array)
        return {"array": self._places[key]}

    def _laid_out(self, array: Array) -> Array:
        batch, steps = array.shape[:2]
        width = math.prod(array.shape[2:])
        turned = np.swapaxes(array.reshape(batch, steps, width), 1, 2)
        if array.dtype.kind != "f" or array.dtype.itemsize <= self.dtype.itemsize:
            return turned
        rounded = self.dtype
        if rounded == np.float16:
            sizes = np.abs(turned[np.isfinite(turned)])
            if sizes.size and not SMALLEST_NORMAL <= float(sizes.max()) <= float(np.finfo(np.float16).max):
                rounded = np.dtype(np.float32)
        with np.errstate(over="ignore"):
            return turned.astype(rounded)

    def _add(self, array: Array) -> None:
        if array.dtype.kind == "b":
            array = array.astype(np.uint8)
        elif array.dtype.kind in "iu" and array.dtype.itemsize > 1:
            array = array.astype(np.float64)  # ids: JavaScript's number type
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        data, size = array.tobytes(), array.dtype.itemsize
        if self.packed:  # group bytes by significance: these repeat, whole numbers don't
            planes = np.frombuffer(data, np.uint8).reshape(-1, size).T
            data = gzip.compress(planes.tobytes(), 1 if len(data) > 1 << 22 else 6, mtime=0)
        kind = f"{array.dtype.kind}{size}"
        self.entries.append({"dtype": kind, "shape": list(array.shape), "packed": self.packed})
        self.bytes.append(data)


def payload(
    t: NetworkTrace,
    labels: Any = None,
    audio: tuple[Any, float] | None = None,
    title: str | None = None,
    rows: Any = None,
    packed: bool = True,
    names: Mapping[str, Any] | None = None,
    truth: Any = None,
    rescale: tuple[Any, Any] | None = None,
    ids: Any = None,
) -> Payload:
    """Return the contents of a trace's page: see `NetworkTrace.save_html`.

    Args:
        t: the trace.
        labels, audio, title, rows, names, truth, rescale, ids: see there.
        packed: whether the arrays are compressed.

    Raises:
        ValueError: more numbers than a page supports; labels, names, true values or a wave that don't fit.
        IndexError: a row that doesn't exist.
        TypeError: a title that isn't a string.
    """
    if not isinstance(title, (str, type(None))):
        raise TypeError(f"save_html: expected title to be a string, got {title!r:.80}")
    taken = _rows(t, rows)
    count = len(taken)
    arrays = Arrays(_dtype(t, taken), packed)

    def sequence(array: Array) -> dict[str, int]:
        return arrays.put(rows_of(array, taken), sequence=True)

    numbers, aligned, nodes = t.steps, t._parts.aligned, t._parts.nodes
    network = t.network
    flows = _flows(t)
    features = features_of(t, names)
    inputs = [
        {
            "name": name,
            "names": features[name],
            "shape": network.graph.shown(name),
            "ids": name in network.graph.ids,
            **_value(flows.get(name), network.graph.timed(name), name in aligned, taken, arrays),
        }
        for name in network.inputs
    ]
    described = []
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        seen = nodes.get(name)
        value = _value(None if seen is None else seen.y, network.graph.timed(name), name in aligned, taken, arrays)
        cells = [] if seen is None else [_cell(cell, taken, arrays, sequence) for cell in seen.cells]
        if cells and seen is not None and seen.cells[0].record is None:  # the input of its first cell is known
            first = as_tuple(seen.x)[0]
            if first.ndim == 3:
                cells[0]["x"] = sequence(first)
        described.append(
            {
                "name": name,
                "names": features[name],
                "kind": type(node).__name__,
                "summary": node.summary,
                "shape": network.graph.shown(name),
                "sources": list(dict.fromkeys(map(origin, sources))),  # a state comes from its node
                "kept": seen is not None,
                "aligned": sources[0] in aligned,
                "residual": bool(getattr(node, "residual", False)),
                "cells": cells,
                **value,
            }
        )
    description: dict[str, Any] = {
        "version": VERSION,
        "title": title if title is not None else f"A trace of {len(numbers)} step{'s' * (len(numbers) != 1)}",
        "rows": count,
        "row_numbers": [int(number) for number in taken],
        "row_ids": None if ids is None else [str(each_row(t, "ids", ids)[row]) for row in taken],
        "steps": [int(number) for number in numbers],
        "labels": labels_of(labels, len(numbers), count),
        "audio": None if audio is None else audio_of(audio, arrays),
        "inputs": inputs,
        "nodes": described,
        "outputs": list(network.outputs),
        "answer": answer_of(t, taken, truth, rescale, arrays),
        "rounded": arrays.dtype.name if arrays.dtype.itemsize < network.dtype.itemsize else None,
        "dtype": network.dtype.name,
        "patches": [
            {"text": repr(patch), "units": None, "rows": None, "steps": None, "cell": 0, **patch.stored()}
            for patch in network.patches
        ],
        "cells": cells_of(network),
        **_computing(t, taken, arrays),
    }
    description["arrays"] = arrays.entries
    return Payload(description, arrays.bytes)


def text_of(description: dict[str, Any]) -> str:
    """Return a description as JSON that is safe in an HTML script element: nothing in it ends the script."""
    text = json.dumps(description, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ── contents of a trace ───────────────────────────────────────────────────────────────────────────────────────────────


def _rows(t: NetworkTrace, rows: Any) -> Array:
    """Return the numbers of the rows that go into the page."""
    numbers = np.arange(len(as_tuple(t.y)[0]))
    try:
        taken = numbers if rows is None else np.atleast_1d(numbers[rows])
    except IndexError as error:
        raise IndexError(f"save_html: expected rows from 0 to {len(numbers) - 1}: {error}") from None
    if taken.ndim > 1:
        raise IndexError(f"save_html: expected rows as a slice, a number or numbers, got {rows!r:.80}")
    return taken


def _flows(t: NetworkTrace) -> dict[str, Array]:
    """Return the inputs of the nodes, by the names of the inputs and nodes that they come from."""
    flows: dict[str, Array] = {}
    for name, node in t.items():
        values = as_tuple(node.x)
        flows |= dict(zip(t.network.wires[t.network.names.index(name)], values, strict=True))
    return flows


def _dtype(t: NetworkTrace, taken: Array) -> Any:
    """Return the widest dtype for the numbers of a trace.

    Raises:
        ValueError: there are too many numbers.
    """
    total = size_of(t, len(taken))
    for most, dtype in ROUNDED:
        if total <= most:
            return dtype
    raise ValueError(
        f"save_html: expected at most {LARGEST:,} numbers, got {total:,}: select rows, rows=0, or steps "
        "or units, select(steps=slice(0, 1000))"
    )


def size_of(t: NetworkTrace, rows: int | None = None) -> int:
    """Return the number of values of a trace in `rows` rows, or in all rows; shared arrays count once."""
    distinct = {(array.__array_interface__["data"][0], array.size): array for array in _all(t)}.values()
    return sum(array.size if rows is None else rows * math.prod(array.shape[1:]) for array in distinct)


def _all(t: NetworkTrace) -> list[Array]:
    arrays = []
    for node in t.values():
        arrays += [*as_tuple(node.x), node.y]
        for cell in node.cells:
            arrays += cell.values()
    return arrays


def _value(array: Array | None, timed: bool, aligned: bool, taken: Array, arrays: Arrays) -> dict[str, Any]:
    """Return the value of an input or the output of a node: a sequence `[B, W, T]`, or a vector `[B, W]`."""
    if array is None:
        return {"timed": timed, "value": None, "in_step": aligned}
    some = rows_of(array, taken)
    timed = timed and array.ndim >= 2
    if not timed:
        some = some.reshape(len(some), math.prod(some.shape[1:]))
    return {"timed": timed, "value": arrays.put(some, sequence=timed), "in_step": aligned}


def _cell(cell: CellTrace, taken: Array, arrays: Arrays, sequence: Callable[[Array], dict[str, int]]) -> dict[str, Any]:
    spec, record = cell.cell.spec, cell.record
    whole = spec.parameters <= MOST_WEIGHTS
    described: dict[str, Any] = {
        "spec": {"input_size": spec.input_size, "units": spec.units, **spec.form},
        "summary": cell.cell.summary,
        "fields": {field: sequence(array) for field, array in cell.items()},
        "units": [int(unit) for unit in cell.units],
        "mask": None if cell.mask is None else arrays.put(rows_of(cell.mask, taken)),
        "weights": {name: arrays.put(array) for name, array in cell.cell.arrays.items()} if whole else None,
        "x": None,
        "before": None,
        "reset": None,
        "reverse": False,
        "whole": record is not None,
    }
    if record is not None:
        described["x"] = sequence(record.x)
        initial = cell.cell.initial
        described["before"] = {}
        for name, shape in spec.state_shapes.items():
            fresh = np.broadcast_to(initial[name], (len(record.x), *shape))
            begun = rows_of(fresh if record.before is None else getattr(record.before, name), taken)
            described["before"][name] = arrays.put(np.array(begun).reshape(len(taken), math.prod(shape)))
        described["reset"] = None if record.reset is None else arrays.put(rows_of(record.reset, taken))
        described["reverse"] = record.reverse
    return described


def _computing(t: NetworkTrace, taken: Array, arrays: Arrays) -> dict[str, Any]:
    """Return what the page needs to run the network again, or why it can't."""
    network = t.network
    nothing = {"network": None, "run": None}
    total = sum(node.parameters for node in network.nodes)
    if total > MOST_WEIGHTS:
        reason = f"The network has {total:,} weights; a page can run networks of up to {MOST_WEIGHTS:,}."
        return {**nothing, "why_not": reason}
    if any(network.graph.states) or any(network.initial_state_sources):
        why = "The page doesn't support nodes that start from the states of others, or pass on their own."
        return {**nothing, "why_not": why}
    records = [record for node in t.values() for record in node.records if record is not None]
    flows = _flows(t)
    if len(records) < len(network.stateful) or network.inputs[0] not in flows:
        return {**nothing, "why_not": "The trace covers only part of a run, so the page can't run the network again."}
    if any(name not in flows for name in network.inputs):
        return {**nothing, "why_not": "The trace lacks some inputs, so the page can't run the network again."}
    resets = [record.reset for record in records]
    if len({None if one is None else one.tobytes() for one in resets}) > 1:
        why = "The layers of this run were reset at different steps, so the page can't run the network again."
        return {**nothing, "why_not": why}
    masks = {name: mask for name, mask in t._parts.masks.items() if name in network.inputs}
    flags = {
        "mask": {name: arrays.put(rows_of(mask, taken)) for name, mask in masks.items()},
        "reset": None if not resets or resets[0] is None else arrays.put(rows_of(resets[0], taken)),
    }
    stored = payload_of(network, lambda array: {"dtype": array.dtype.name, **arrays.put(array)})
    del stored["cells"]  # the page has them already
    return {"network": stored, "run": flags, "why_not": None}
