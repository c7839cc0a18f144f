"""The contents of a trace's page: a description in JSON, and arrays as bytes.

A sequence is stored as `[B, W, T]`, so that the values that a map draws for one unit are contiguous. The network's own
arrays keep their precision; those of the trace keep it while they are small, else they are rounded: see `ROUNDED`.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.graph import origin
from cellstack.inspect.payload import cells_of, named, payload_of
from cellstack.nodes import Activation, Clip, Masking, Scale, Select, Standardise

if TYPE_CHECKING:
    from cellstack.inspect.trace import CellTrace, NetworkTrace
    from cellstack.nodes.base import Array

VERSION = 1
LARGEST = 1 << 26  # numbers of a trace in one page: 128 MB as float16, which a browser handles easily
MOST_WEIGHTS = 1 << 23  # numbers of a network's arrays
ROUNDED = ((1 << 19, np.float64), (1 << 22, np.float32), (LARGEST, np.float16))
"""Size limits of a trace, in numbers, and the widest dtype for each."""
SMALLEST_NORMAL = 2.0**-14  # below, a float16 has fewer digits
MOST_BLOCKS = 1 << 17  # maximum number of blocks of a wave's minimum and maximum
KEEPING = (Activation, Clip, Masking, Scale, Standardise)  # nodes whose output has the features of their input
BANDS, FRAMES = 96, 2048  # maximum size of a spectrum


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
        return arrays.put(_some(array, taken), sequence=True)

    numbers, aligned, nodes = t.steps, t._parts.aligned, t._parts.nodes
    network = t.network
    flows = _flows(t)
    features = _features(t, names)
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
            first = seen.x[0] if isinstance(seen.x, tuple) else seen.x
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
        "row_ids": None if ids is None else [str(_each_row(t, "ids", ids)[row]) for row in taken],
        "steps": [int(number) for number in numbers],
        "labels": _labels(labels, len(numbers), count),
        "audio": None if audio is None else _audio(audio, arrays),
        "inputs": inputs,
        "nodes": described,
        "outputs": list(network.outputs),
        "answer": _answer(t, taken, truth, rescale, arrays),
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
    numbers = np.arange(len(t.y[0] if isinstance(t.y, tuple) else t.y))
    try:
        taken = numbers if rows is None else np.atleast_1d(numbers[rows])
    except IndexError as error:
        raise IndexError(f"save_html: expected rows from 0 to {len(numbers) - 1}: {error}") from None
    if taken.ndim > 1:
        raise IndexError(f"save_html: expected rows as a slice, a number or numbers, got {rows!r:.80}")
    return taken


def _some(array: Array, taken: Array) -> Array:
    """Return some rows of an array; for all rows, the array itself, so that duplicates are recognised."""
    return array if np.array_equal(taken, np.arange(len(array))) else array[taken]


def _flows(t: NetworkTrace) -> dict[str, Array]:
    """Return the inputs of the nodes, by the names of the inputs and nodes that they come from."""
    flows: dict[str, Array] = {}
    for name, node in t.items():
        values = node.x if isinstance(node.x, tuple) else (node.x,)
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
    distinct = {array.__array_interface__["data"][0]: array for array in _all(t)}.values()
    return sum(array.size if rows is None else rows * math.prod(array.shape[1:]) for array in distinct)


def _all(t: NetworkTrace) -> list[Array]:
    arrays = []
    for node in t.values():
        arrays += [*(node.x if isinstance(node.x, tuple) else (node.x,)), node.y]
        for cell in node.cells:
            arrays += [cell[field] for field in cell]
    return arrays


def _value(array: Array | None, timed: bool, aligned: bool, taken: Array, arrays: Arrays) -> dict[str, Any]:
    """Return the value of an input or the output of a node: a sequence `[B, W, T]`, or a vector `[B, W]`."""
    if array is None:
        return {"timed": timed, "value": None, "in_step": aligned}
    some = _some(array, taken)
    timed = timed and array.ndim >= 2
    if not timed:
        some = some.reshape(len(some), math.prod(some.shape[1:]))
    return {"timed": timed, "value": arrays.put(some, sequence=timed), "in_step": aligned}


def _cell(cell: CellTrace, taken: Array, arrays: Arrays, sequence: Callable[[Array], dict[str, int]]) -> dict[str, Any]:
    spec, record = cell.cell.spec, cell.record
    whole = cell.cell.spec.parameters <= MOST_WEIGHTS
    described: dict[str, Any] = {
        "spec": spec_of(spec),
        "summary": cell.cell.summary,
        "fields": {field: sequence(cell[field]) for field in cell},
        "units": [int(unit) for unit in cell.units],
        "mask": None if cell.mask is None else arrays.put(_some(cell.mask, taken)),
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
        states = {
            name: np.broadcast_to(initial[name], (len(record.h), len(initial[name])))
            if record.before is None
            else getattr(record.before, name)
            for name in spec.state_sizes
        }
        described["before"] = {name: arrays.put(np.array(_some(array, taken))) for name, array in states.items()}
        described["reset"] = None if record.reset is None else arrays.put(_some(record.reset, taken))
        described["reverse"] = record.reverse
    return described


def spec_of(spec: Any) -> dict[str, Any]:
    """Return a `CellSpec` in JSON-compatible form."""
    return {**asdict(spec), "gate_activations": dict(spec.gate_activations)}


def _computing(t: NetworkTrace, taken: Array, arrays: Arrays) -> dict[str, Any]:
    """Return what the page needs to run the network again, or why it can't."""
    network = t.network
    nothing = {"network": None, "run": None}
    total = sum(node.parameters for node in network.nodes)
    if total > MOST_WEIGHTS:
        reason = f"The network has {total:,} weights; a page can run networks of up to {MOST_WEIGHTS:,}."
        return {**nothing, "why_not": reason}
    if any(network.graph.states) or any(network.started):
        why = "The page doesn't support nodes that start from the states of others, or pass on their own."
        return {**nothing, "why_not": why}
    cells = [cell for node in t.values() for cell in node.cells]
    flows = _flows(t)
    if len(cells) < len(network.cells) or any(cell.record is None for cell in cells) or network.inputs[0] not in flows:
        return {**nothing, "why_not": "The trace covers only part of a run, so the page can't run the network again."}
    if any(name not in flows for name in network.inputs):
        return {**nothing, "why_not": "The trace lacks some inputs, so the page can't run the network again."}
    records = [cell.record for cell in cells if cell.record is not None]
    resets = [record.reset for record in records]
    if len({None if one is None else one.tobytes() for one in resets}) > 1:
        why = "The layers of this run were reset at different steps, so the page can't run the network again."
        return {**nothing, "why_not": why}
    masks = {name: mask for name, mask in t._parts.masks.items() if name in network.inputs}
    flags = {
        "mask": {name: arrays.put(_some(mask, taken)) for name, mask in masks.items()},
        "reset": None if not resets or resets[0] is None else arrays.put(_some(resets[0], taken)),
    }
    stored = payload_of(network, lambda array: {"dtype": array.dtype.name, **arrays.put(array)})
    del stored["cells"]  # the page has them already
    return {"network": stored, "run": flags, "why_not": None}


def _features(t: NetworkTrace, given: Mapping[str, Any] | None) -> dict[str, list[str] | None]:
    """Return the names of the features of each input and node, None where they have none.

    They are those of `given`, else those in the network's metadata. Nodes that keep the features of their source keep
    their names, too.
    """
    network, own = t.network, named(t.network)
    width = {name: network.shapes[name][-1] if network.shapes[name] else None for name in network.shapes}
    found: dict[str, list[str] | None] = dict.fromkeys((*network.inputs, *network.names))
    usual = {network.inputs[0]: own.channels} if len(network.inputs) == 1 else {}
    ends = {network.outputs[0]: own.outputs} if len(network.outputs) == 1 else {}
    for name, some in (usual | ends).items():
        if len(some) == width[name] and name not in network.graph.ids:
            found[name] = list(some)
    for name, some in (given or {}).items():
        if name not in found:
            raise ValueError(f"save_html: expected names of {', '.join(found)}, got {name!r:.80}")
        listed = [str(one) for one in some]
        if isinstance(some, str) or len(listed) != width[name]:
            raise ValueError(f"save_html: expected {width[name]} names for {name}, got {some!r:.80}")
        found[name] = listed
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        kept = isinstance(node, KEEPING) or (isinstance(node, Select) and node.axis == 1)
        if found[name] is None and kept and len(sources) == 1 and width[name] == width.get(sources[0]):
            found[name] = found[sources[0]]
    return found


def _answer(t: NetworkTrace, taken: Array, truth: Any, rescale: tuple[Any, Any] | None, arrays: Arrays) -> Any:
    """Return what the page needs to show the prediction: task, targets, quantiles, true values, and the scaling."""
    own = named(t.network)
    scaled = None
    if rescale is not None:
        shape = np.shape(t.y)
        try:
            scaled = [
                arrays.put(_some(np.array(np.broadcast_to(np.asarray(one, np.float64), shape)), taken))
                for one in rescale
            ]
        except ValueError as error:
            raise ValueError(f"save_html: expected rescale as (scale, offset) for {list(shape)}: {error}") from None
    return {
        "task": own.task,
        "targets": list(own.targets),
        "quantiles": list(own.quantiles),
        "truth": None if truth is None else [_plain(_each_row(t, "truth", truth)[row]) for row in taken],
        "rescale": scaled,
    }


def _each_row(t: NetworkTrace, name: str, given: Any) -> Any:
    """Return an argument that must have one entry per row of the trace; raise `ValueError` if it doesn't."""
    rows = len(t.y[0] if isinstance(t.y, tuple) else t.y)
    if isinstance(given, str) or len(given) != rows:
        raise ValueError(f"save_html: expected {name} to be a list of {rows}, one for each row, got {given!r:.80}")
    return given


def _plain(value: Any) -> Any:
    """Return a true value in JSON-compatible form: a number, a string, or a list of these; None for NaN."""
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):
        return [_plain(one) for one in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return value if math.isfinite(value) else None
    return None if value is None else str(value)


def _labels(labels: Any, steps: int, rows: int) -> dict[str, Any] | None:
    """Return the labels of the steps, for all rows, or for each row."""
    if labels is None:
        return None
    if isinstance(labels, str):
        labels = list(labels)
    try:
        kind, lists = _texts(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_html: expected labels as a string or a list, one per step, got {labels!r:.80}: {error}"
        ) from None
    nested = bool(lists) and isinstance(lists[0], list)
    found = [len(one) for one in lists] if nested else [len(lists)]
    if any(length != steps for length in found) or (nested and len(lists) != rows):
        each = f"{len(lists)} lists of {', '.join(map(str, found[:4]))}" if nested else f"{found[0]}"
        raise ValueError(
            f"save_html: expected labels for {steps} steps, as one list for all rows, or {rows} lists, got {each}"
        )
    return {"kind": kind, "values": lists, "nested": nested}


def _texts(labels: Any) -> tuple[str, list[Any]]:
    """Return the type of labels, "text", "number" or "date", and their JSON-compatible values."""
    array = labels if isinstance(labels, np.ndarray) and labels.ndim == 1 else None
    if array is None:
        labels = list(labels)
        if labels and isinstance(labels[0], (list, tuple, np.ndarray)):
            kinds, lists = zip(*map(_texts, labels), strict=True)
            if any(one and isinstance(one[0], list) for one in lists):
                raise ValueError("lists are nested too deeply")
            return kinds[0], list(lists)
        if any(isinstance(label, str) for label in labels):
            return "text", [str(label) for label in labels]
        array = np.asarray(labels)
    if array.dtype.kind == "M":
        whole = array.astype("datetime64[D]")  # without a time of day if all are midnight
        return "date", np.datetime_as_string(whole if (whole == array).all() else array).tolist()
    if array.dtype.kind in "iuf":
        return "number", [None if not math.isfinite(value) else value for value in array.astype(float).tolist()]
    if array.dtype.kind == "O":  # such as datetime.date
        return "date" if all(hasattr(label, "isoformat") for label in labels) else "text", list(map(str, labels))
    return "text", np.vectorize(str, otypes=[object])(array).tolist() if array.size else []


def _audio(audio: tuple[Any, float], arrays: Arrays) -> dict[str, Any]:
    """Return a wave as its lowest and highest samples, block by block, and its spectrum."""
    try:
        samples, rate = audio
        samples, rate = np.asarray(samples), float(rate)
    except (TypeError, ValueError):
        raise ValueError("save_html: expected audio as a pair (samples, rate)") from None
    if samples.ndim != 1 or samples.dtype.kind not in "iuf" or not len(samples) or not 0 < rate < math.inf:
        raise ValueError(
            f"save_html: expected audio as samples [N] and a rate in Hz, got {list(samples.shape)} of {samples.dtype} "
            f"and {rate}"
        )
    wave = np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    wave = (wave / (float(np.abs(wave).max()) or 1.0)).astype(np.float32)  # both plots show ratios
    block = -(-len(wave) // MOST_BLOCKS)
    padded = np.pad(wave, (0, -len(wave) % block), mode="edge").reshape(-1, block)
    ends = np.stack([padded.min(axis=1), padded.max(axis=1)])
    most = float(np.abs(ends).max()) or 1.0
    levels = np.round(127.0 * ends / most).astype(np.int8)
    return {
        "rate": rate,
        "samples": len(wave),
        "block": block,
        "wave": arrays.put(levels),
        "spectrum": arrays.put(_spectrum(wave)),
    }


def _spectrum(wave: Array) -> Array:
    """Return the levels of a wave's bands over time, lowest first, as bytes over 80 dB, `[bands, frames]`."""
    size = 512
    hop = max(size // 4, -(-len(wave) // FRAMES))
    padded = np.pad(wave, (size // 2, size))
    starts = np.arange(0, len(wave), hop)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[starts] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.unique(np.round(np.linspace(0, power.shape[1], BANDS + 1)).astype(int))
    bands = (np.add.reduceat(power, edges[:-1], axis=1) / np.diff(edges)).T
    decibels = 10.0 * np.log10(np.maximum(bands, 1e-12))
    return np.clip((decibels - decibels.max() + 80.0) / 80.0 * 255.0, 0.0, 255.0).astype(np.uint8)
