"""What the user adds to a trace's page: names, labels, true values, and a wave, checked and in the page's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.inspect.payload import named
from cellstack.inspect.values import as_tuple, rows_of
from cellstack.nodes import Activation, Clip, Masking, Scale, Select, Standardise

if TYPE_CHECKING:
    from cellstack.inspect.contents import Arrays
    from cellstack.inspect.trace import NetworkTrace
    from cellstack.nodes.base import Array

MOST_BLOCKS = 1 << 17  # maximum number of blocks of a wave's minimum and maximum
KEEPING = (Activation, Clip, Masking, Scale, Standardise)  # nodes whose output has the features of their input
BANDS, FRAMES = 96, 2048  # maximum size of a spectrum


def features_of(t: NetworkTrace, given: Mapping[str, Any] | None) -> dict[str, list[str] | None]:
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


def answer_of(t: NetworkTrace, taken: Array, truth: Any, rescale: tuple[Any, Any] | None, arrays: Arrays) -> Any:
    """Return what the page needs to show the prediction: task, targets, quantiles, true values, and the scaling."""
    own = named(t.network)
    scaled = None
    if rescale is not None:
        shape = np.shape(t.y)
        try:
            scaled = [
                arrays.put(rows_of(np.array(np.broadcast_to(np.asarray(one, np.float64), shape)), taken))
                for one in rescale
            ]
        except ValueError as error:
            raise ValueError(f"save_html: expected rescale as (scale, offset) for {list(shape)}: {error}") from None
    return {
        "task": own.task,
        "targets": list(own.targets),
        "quantiles": list(own.quantiles),
        "truth": None if truth is None else [_plain(each_row(t, "truth", truth)[row]) for row in taken],
        "rescale": scaled,
    }


def each_row(t: NetworkTrace, name: str, given: Any) -> Any:
    """Return an argument that must have one entry per row of the trace; raise `ValueError` if it doesn't."""
    rows = len(as_tuple(t.y)[0])
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


def labels_of(labels: Any, steps: int, rows: int) -> dict[str, Any] | None:
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


def audio_of(audio: tuple[Any, float], arrays: Arrays) -> dict[str, Any]:
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
