"""Writes networks as files of Keras 3: `.keras`, and the HDF5 of `model.save("model.h5")`.

A network becomes a functional model with a layer for each node, of the same name. Nodes that Keras has no layer for are
refused, all of them by name. The network's metadata is written where Keras ignores it, see `files.NOTE`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack import spec
from cellstack.formats.build import Names
from cellstack.formats.files import replacing
from cellstack.formats.keras.cells import MORE, PLAIN
from cellstack.formats.keras.config import layer_of, numbered
from cellstack.formats.keras.files import MEMBERS, NOTE
from cellstack.formats.keras.layers import MERGES, slots
from cellstack.graph import state_of
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Pad,
    Permute,
    Pool1D,
    Recurrent,
    Reduce,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.nodes.base import Array, Node
from cellstack.nodes.masks import NamedMasks

if TYPE_CHECKING:
    from cellstack.network import Network

VERSION = "3.10.0"  # the version that files are written for; it decides which hard_sigmoid is meant
MERGE_LAYERS = {mode: kind for kind, mode in MERGES.items()}
NAMED = (*PLAIN, *MORE.values())  # activations of layers, in addition to those of cells
OPERATIONS = {"Clip": "numpy", "Sum": "numpy", "Mean": "numpy", "Max": "numpy", "Min": "numpy", "Gelu": "nn"}
"""Functions that a model lists among its layers, and their Keras module; HDF5 can't store them."""
Entry = tuple[str, str, dict[str, Any], list[Array]]  # a layer's class, name, settings and weights
Tensor = tuple[str, int]  # the layer that returns it, and the index among its outputs


class Feeds(NamedTuple):
    """A layer's inputs and its initial states, which are nested lists for a stack of cells."""

    inputs: list[Tensor]
    starts: list[Any]

    @property
    def layers(self) -> list[str]:
        """The layers that return its inputs and states."""
        return [name for name, _ in (*self.inputs, *_flat(self.starts))]


Written = tuple[str, dict[str, Any], list[Array]]  # the same without a name
Layers = Iterator[Written]


class _RefusedError(ValueError):
    """Keras has no such node or setting."""


def write(network: Network, path: str) -> None:
    """Write a network as a model of Keras 3: a zip if the suffix is `.keras`, else HDF5.

    Args:
        network: the network to write.
        path: the file to write.

    Raises:
        ValueError: nodes or settings that Keras doesn't have, all of which are named.
        OSError: the file can't be written.
        ModuleNotFoundError: h5py is missing.
    """
    zipped = PurePath(path).suffix.lower() == ".keras"
    entries, wires, outputs = _entries(network, zipped)
    inputs = [entry[1] for entry in entries if entry[0] == "InputLayer"]
    order = _order([entry[1] for entry in entries], [feeds.layers for feeds in wires], [name for name, _ in outputs])
    entries, wires = [entries[number] for number in order], [wires[number] for number in order]
    config = _config(network, entries, wires, inputs, outputs)
    content = (_zipped if zipped else _legacy)(config, entries, network.metadata)
    with replacing(path) as file:
        file.write(content)


def _flat(starts: list[Any]) -> Iterator[Tensor]:
    for one in starts:
        if isinstance(one, list):
            yield from _flat(one)
        else:
            yield one


def _entries(network: Network, operations: bool) -> tuple[list[Entry], list[Feeds], list[Tensor]]:
    """Return the layers, the inputs of each, and the output tensors.

    Args:
        network: the network to write.
        operations: whether the file can store functions among the layers.
    """
    dtype, problems = str(network.dtype), []
    entries: list[Entry] = []
    wires: list[Feeds] = []
    free = Names(mark="_")  # Keras's torch backend accepts no names with a dot
    last = {name: (free.fresh(name.replace(".", "_")), 0) for name in (*network.inputs, *network.names)}
    for name in network.inputs:
        shape = [None, *network.shapes[name]]
        kind = "int32" if name in network.graph.ids else dtype
        if shape[-1] is None and name not in network.graph.ids:
            problems.append(f"input {name}: its width isn't fixed")
        entries.append(
            ("InputLayer", last[name][0], {"batch_shape": shape, "dtype": kind, "sparse": False, "ragged": False}, [])
        )
        wires.append(Feeds([], []))
    masks: dict[str, frozenset[str] | None] = dict.fromkeys(network.inputs)
    graph, ends = network.graph, _ends(network)
    for name, node, wired, exposed in zip(network.names, network.nodes, network.wires, graph.states, strict=True):
        sources, starts = node.apart(wired)
        before, axes = [masks.get(source) for source in sources], len(network.shapes[sources[0]])
        masks[name] = node.mask_after(before, axes, NamedMasks())  # names of the layers at which Keras drops them
        problems += _mask_problems(name, node, before, axes)
        if starts and before[0] is not None:
            problems.append(f"{name}: Keras ignores the mask of a sequence with initial states")
        if name in ends:  # the h of the layer before
            sizes = network.nodes[network.names.index(ends[name])].state_sizes
            last[name] = last[ends[name]][0], 1 + [*sizes].index([state for state in sizes if state.endswith("h")][-1])
            continue
        try:
            layers = _layers(node)
            if exposed or name in ends.values():
                layers = [_with_states(*layer) for layer in layers]
        except _RefusedError as error:
            problems.append(f"{name}: {error}")
            continue
        for kind, _, _ in layers:
            if kind in OPERATIONS and not operations:
                problems.append(f"{name}: the function {kind}, which only .keras files can store, not HDF5")
            if kind in ("Cropping1D", "ZeroPadding1D") and axes != 2:
                shape = network.graph.shown(sources[0])
                problems.append(f"{name}: {kind} of {shape}, which only takes sequences [B, T, W]")
            if (kind in OPERATIONS or kind == "Cropping1D") and masks[name] is not None:
                masks[name] = (masks[name] or frozenset()) | {name}
        feeds = Feeds([last[source] for source in sources], _nested(node, [last[start] for start in starts]))
        for number, (kind, settings, arrays) in enumerate(layers):
            own = free.fresh(f"{last[name][0]}_activation") if number else last[name][0]
            entries.append((kind, own, {"dtype": dtype, **settings}, arrays))
            wires.append(feeds)
            last[name] = own, 0
            feeds = Feeds([last[name]], [])
        places = {state_of(name, state): 1 + place for place, state in enumerate(node.state_sizes)}
        last |= {state.value: (last[name][0], places[state.value]) for state in exposed}
    if problems:
        raise ValueError(f"save: Keras can't represent this network: {'; '.join(problems)}")
    return entries, wires, [last[name] for name in network.outputs]


def _ends(network: Network) -> dict[str, str]:
    """Return the names of nodes that take a sequence's last step, if it is a state of the node that returns it."""
    nodes = dict(zip(network.names, network.nodes, strict=True))
    found = {}
    for name, node, (source, *_) in zip(network.names, network.nodes, network.wires, strict=True):
        before = nodes.get(source)
        if not isinstance(node, GlobalPool) or node.mode != "last" or not isinstance(before, Recurrent):
            continue
        if not before.go_backwards and not before.zero_output_for_mask and not before.parts[-1][1]:
            found[name] = source
    return found


def _with_states(kind: str, settings: dict[str, Any], arrays: list[Array]) -> Written:
    """Return a recurrent layer that returns its states too."""
    if kind != "Bidirectional":
        return kind, {**settings, "return_state": True}, arrays
    inner = {}
    for key in ("layer", "backward_layer"):
        entry = settings[key]
        inner[key] = {**entry, "config": {**entry["config"], "return_state": True}}
    return kind, {**settings, **inner}, arrays


def _nested(node: Node, starts: list[Tensor]) -> list[Any]:
    """Return initial states in Keras's form: for a stack, a list for each cell."""
    if not starts or not isinstance(node, Recurrent) or len(node.cells) == 1:
        return starts
    left = iter(starts)
    return [[next(left) for _ in cell.spec.state_sizes] for cell in node.cells]


def _order(names: list[str], wires: list[list[str]], outputs: list[str]) -> list[int]:
    """Return the order in which Keras lists the layers, by which it assigns the weights.

    Layers with the longest path to an output come first; among equals, those that a depth-first search from the outputs
    visits first.

    Ref: `map_graph` in Keras's `ops/function.py`.
    """
    sources = dict(zip(names, wires, strict=True))
    far = dict.fromkeys(names, 0)
    for name in reversed(names):
        for source in sources[name]:
            far[source] = max(far[source], far[name] + 1)
    met: dict[str, int] = {}
    waiting = [*reversed(outputs)]
    while waiting:
        name = waiting.pop()
        if name not in met:
            met[name] = len(met)
            waiting += reversed(sources[name])
    return sorted(range(len(names)), key=lambda number: (-far[names[number]], met[names[number]]))


def _mask_problems(name: str, node: Node, masks: Sequence[frozenset[str] | None], axes: int) -> Iterator[str]:
    """Yield the differences between a node's treatment of masks and Keras's."""
    on = [mask for mask in masks if mask is not None]
    if node.heeds_mask:
        for layer in sorted(frozenset().union(*on)):
            yield f"{layer}: Keras drops the mask, which {name} needs"
    if not on:
        return
    if isinstance(node, GlobalPool) and node.mode == "max":
        yield f"{name}: Keras's max over time ignores the mask"
    if isinstance(node, Reduce) and node.place(axes) == 1:
        yield f"{name}: Keras's {node.mode} over time ignores the mask"
    if isinstance(node, Masking):
        yield f"{name}: a second mask replaces the first in Keras"


# ── nodes as layers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _layers(node: Node) -> list[Written]:
    """Return a node's layers with their settings and weights: one, or two if its activation is a separate layer."""
    for kind, build in BUILDERS.items():
        if isinstance(node, kind):
            return list(build(node))
    raise _RefusedError(f"a {type(node).__name__}")


def _activation(text: str) -> str:
    """Return Keras's name of an activation; raise `_RefusedError` if it has no such function."""
    if text in PLAIN:
        return text
    raise _RefusedError(f"the activation {text}")


def _activation_layer(text: str) -> Written:
    if text in NAMED:
        return "Activation", {"activation": text}, []
    if text == "gelu_tanh":
        return "Gelu", {"approximate": True}, []
    name, alpha, _ = spec.activation(text)
    layers = {
        "elu": ("ELU", "alpha"),
        "leaky_relu": ("LeakyReLU", "negative_slope"),
        "thresholded_relu": ("ReLU", "threshold"),
    }
    if name not in layers or (name == "thresholded_relu" and alpha < 0.0):
        raise _RefusedError(f"the activation {text}")
    kind, setting = layers[name]
    return kind, {setting: alpha}, []


def _with_activation(kind: str, settings: dict[str, Any], arrays: list[Array], activation: str) -> Layers:
    """Yield a layer, followed by the layer of its activation if that can't be a setting."""
    named = activation in NAMED
    yield kind, {**settings, "activation": activation if named else "linear"}, arrays
    if not named:
        yield _activation_layer(activation)


def _cell(cell: Cell) -> tuple[dict[str, Any], list[Array]]:
    """Return the settings and weights of a cell; raise `_RefusedError` for flags that Keras's cells don't have."""
    cell = cell.one_head
    description, kind = cell.spec, cell.spec.of_kind
    if "keras" not in kind.names:
        raise _RefusedError(f"a {kind.title}")
    known = (
        "kind",
        "input_size",
        "units",
        "activation",
        "recurrent_activation",
        "use_bias",
        "reset_after",
        "norm_epsilon",
    )
    odd = [name.replace("_", " ") for name in description.settings if name not in known]
    if odd:
        raise _RefusedError(f"a cell with {', '.join(odd)}")
    settings: dict[str, Any] = {
        "units": description.units,
        "activation": _activation(description.activation),
        "use_bias": description.use_bias,
    }
    if kind.gated:
        settings["recurrent_activation"] = _activation(description.recurrent_activation)
    if "reset_after" in kind.settings:
        settings["reset_after"] = description.reset_after
    return settings, list(cell.arrays.values())


def _stack(node: Recurrent) -> Written:
    if any(added for _, added in node.parts):
        raise _RefusedError("a residual stack")
    names = ("return_sequences", "go_backwards", "zero_output_for_mask")
    flags: dict[str, Any] = {name: getattr(node, name) for name in names}
    if len(node.cells) == 1:
        settings, arrays = _cell(node.cells[0])
        return node.cells[0].spec.of_kind.names["keras"].name, {**settings, **flags}, arrays
    cells, arrays = [], []
    for number, cell in enumerate(node.cells):
        settings, own = _cell(cell)
        kind = f"{cell.spec.of_kind.names['keras'].name}Cell"
        cells.append(_entry(kind, f"cell_{number}", {"dtype": str(node.dtype), **settings}))
        arrays += own
    stack = _entry("StackedRNNCells", "cells", {"cells": cells})
    return "RNN", {"cell": stack, **flags}, arrays


def _bidirectional(node: Bidirectional) -> Layers:
    settings: dict[str, Any] = {"merge_mode": node.merge_mode}
    arrays = []
    for part, key in ((node.forward, "layer"), (node.backward, "backward_layer")):
        kind, inner, own = _stack(part)
        settings[key] = _entry(
            kind, f"{'forward' if key == 'layer' else 'backward'}", {"dtype": str(node.dtype), **inner}
        )
        arrays += own
    yield "Bidirectional", settings, arrays


def _dense(node: Dense) -> Layers:
    settings = {"units": node.kernel.shape[1], "use_bias": node.bias is not None}
    return _with_activation("Dense", settings, _both(node.kernel, node.bias), node.activation)


def _both(first: Array | None, second: Array | None) -> list[Array]:
    return [array for array in (first, second) if array is not None]


def _conv(node: Conv1D) -> Layers:
    if not isinstance(node.padding, str):
        raise _RefusedError(f"a convolution with padding {node.padding}")
    if node.strides > 1 and node.dilation > 1:
        raise _RefusedError("a convolution with strides and dilation together")
    settings = {
        "filters": node.kernel.shape[2],
        "kernel_size": [node.kernel.shape[0]],
        "strides": [node.strides],
        "padding": node.padding,
        "dilation_rate": [node.dilation],
        "groups": node.groups,
        "use_bias": node.bias is not None,
    }
    return _with_activation("Conv1D", settings, _both(node.kernel, node.bias), node.activation)


def _embedding(node: Embedding) -> Layers:
    sizes = {"input_dim": node.table.shape[0], "output_dim": node.table.shape[1]}
    yield "Embedding", {**sizes, "mask_zero": node.mask_zero}, [node.table]


def _scale(node: Scale) -> Layers:
    """Yield a batch normalisation with mean 0 and variance 1."""
    zeros, ones = np.zeros_like(node.scale), np.ones_like(node.scale)
    yield "BatchNormalization", {"axis": -1, "epsilon": 0.0}, [node.scale, node.shift, zeros, ones]


def _standardise(node: Standardise) -> Layers:
    if (node.scale < 1e-6).any():  # Keras stores variances, and replaces scales below 1e-7
        raise _RefusedError("a scale below 1e-6")
    variance = node.scale.astype(np.float64) ** 2
    yield "Normalization", {"axis": [-1], "mean": node.mean.tolist(), "variance": variance.tolist()}, []


def _layer_norm(node: LayerNorm) -> Layers:
    flags = {"scale": node.gain is not None, "center": node.bias is not None}
    yield "LayerNormalization", {"axis": -1, "epsilon": node.epsilon, **flags}, _both(node.gain, node.bias)


def _pool(node: GlobalPool) -> Layers:
    if node.mode == "last":
        raise _RefusedError("the last step of a sequence")
    yield "GlobalAveragePooling1D" if node.mode == "mean" else "GlobalMaxPooling1D", {}, []


def _windows(node: Pool1D) -> Layers:
    if node.padding not in ("valid", "same"):
        raise _RefusedError(f"a pool with padding {node.padding}")
    kind = "AveragePooling1D" if node.mode == "mean" else "MaxPooling1D"
    yield kind, {"pool_size": [node.size], "strides": [node.strides], "padding": node.padding}, []


def _clip(node: Clip) -> Layers:
    if node.low == 0.0:
        yield "ReLU", {"max_value": node.high, "negative_slope": 0.0, "threshold": 0.0}, []
    elif node.low is None or node.high is None:
        raise _RefusedError(f"a Clip with one bound, {node.summary}")
    else:
        yield "Clip", {"x_min": node.low, "x_max": node.high}, []


def _reduce(node: Reduce) -> Layers:
    more = {"initial": None} if node.mode in ("max", "min") else {}
    yield node.mode.title(), {"axis": node.axis, "keepdims": node.keepdims, **more}, []


def _pad(node: Pad) -> Layers:
    if node.axis != 1 or node.value != 0.0:
        raise _RefusedError(f"padding of {node.summary}")
    yield "ZeroPadding1D", {"padding": [node.before, node.after]}, []


def _select(node: Select) -> Layers:
    first, last = node.start or 0, node.stop or 0
    if node.axis != 1 or node.step != 1 or first < 0 or last > 0 or node.stop == 0:
        raise _RefusedError(f"the slice {node.summary}")
    yield "Cropping1D", {"cropping": [first, -last]}, []


def _merge(node: Merge) -> Layers:
    yield MERGE_LAYERS[node.mode], {"axis": node.axis} if node.mode == "concat" else {}, []


BUILDERS: dict[type[Node], Callable[[Any], Any]] = {
    Recurrent: lambda node: [_stack(node)],
    Bidirectional: _bidirectional,
    Dense: _dense,
    Conv1D: _conv,
    Embedding: _embedding,
    Scale: _scale,
    Standardise: _standardise,
    LayerNorm: _layer_norm,
    Activation: lambda node: [_activation_layer(node.activation)],
    Masking: lambda node: [("Masking", {"mask_value": node.value}, [])],
    GlobalPool: _pool,
    Pool1D: _windows,
    Clip: _clip,
    Reduce: _reduce,
    Pad: _pad,
    Flatten: lambda node: [("Flatten", {}, [])],
    Reshape: lambda node: [("Reshape", {"target_shape": list(node.shape)}, [])],
    Permute: lambda node: [("Permute", {"dims": list(node.dims)}, [])],
    Repeat: lambda node: [("RepeatVector", {"n": node.times}, [])],
    Select: _select,
    Merge: _merge,
}


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _entry(kind: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    if kind in OPERATIONS:
        config = {"name": name, **{key: value for key, value in settings.items() if key != "dtype"}}
        module = f"keras.src.ops.{OPERATIONS[kind]}"
        return {"module": module, "class_name": kind, "config": config, "registered_name": kind}
    return {"module": "keras.layers", "class_name": kind, "config": {"name": name, **settings}, "registered_name": None}


def _config(
    network: Network, entries: list[Entry], wires: list[Feeds], inputs: list[str], outputs: list[Tensor]
) -> dict[str, Any]:
    """Return the description of the model in Keras 3's form."""
    dtype, layers = str(network.dtype), []

    def tensor(one: Any) -> Any:
        if isinstance(one, list):
            return [tensor(inner) for inner in one]
        history = [one[0], 0, one[1]]
        return {"class_name": "__keras_tensor__", "config": {"shape": [], "dtype": dtype, "keras_history": history}}

    for (kind, name, settings, _), (sources, starts) in zip(entries, wires, strict=True):
        args = [tensor(sources)] if kind in MERGE_LAYERS.values() else tensor(sources)
        kwargs = {"initial_state": tensor(starts)} if starts else {}
        calls = [{"args": args, "kwargs": kwargs}] if sources else []
        layers.append({**_entry(kind, name, settings), "name": name, "inbound_nodes": calls})
    ends = {
        "input_layers": [[name, 0, 0] for name in inputs],
        "output_layers": [[name, 0, place] for name, place in outputs],
    }
    for key, refs in ends.items():
        ends[key] = refs[0] if len(refs) == 1 else refs
    return {
        "module": "keras.src.models.functional",
        "class_name": "Functional",
        "config": {"name": "cellstack", "trainable": True, "layers": layers, **ends},
        "registered_name": "Functional",
    }


def _named(entries: list[Entry]) -> Iterator[tuple[str, str, list[tuple[str, str, Array]]]]:
    """Yield each layer's name, its path, and the path, the name and the array of each of its weights."""
    entries = [entry for entry in entries if entry[0] not in OPERATIONS]
    for (kind, name, settings, arrays), place in zip(entries, numbered([entry[0] for entry in entries]), strict=True):
        found = slots(layer_of("save", _entry(kind, name, settings), 0), 3)
        pairs = zip(found, arrays, strict=True)
        yield name, place, [(slot.path, slot.leaf, array) for slot, array in pairs]


def _hdf5(fill: Callable[[Any], None]) -> bytes:
    from cellstack.formats.keras.files import import_h5py

    image = io.BytesIO()
    with import_h5py().File(image, "w") as file:
        fill(file)
    return image.getvalue()


def _zipped(config: dict[str, Any], entries: list[Entry], metadata: dict[str, Any]) -> bytes:
    """Return a `.keras` file, uncompressed and with a fixed date, so that equal networks give equal files."""

    def fill(file: Any) -> None:
        for name, place, weights in _named(entries):
            file.create_group(f"layers/{place}/vars").attrs["name"] = name
            for path, _, array in weights:
                file.create_dataset(f"layers/{place}/{path}", data=array)
        file.create_group("vars").attrs["name"] = "cellstack"

    about = {"keras_version": VERSION, "date_saved": "", **({NOTE: metadata} if metadata else {})}
    contents = {
        MEMBERS["metadata"]: json.dumps(about).encode(),
        MEMBERS["config"]: json.dumps(config).encode(),
        MEMBERS["weights"]: _hdf5(fill),
    }
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return image.getvalue()


def _legacy(config: dict[str, Any], entries: list[Entry], metadata: dict[str, Any]) -> bytes:
    """Return the HDF5 of a whole model, its weights listed layer by layer."""

    def fill(file: Any) -> None:
        group = file.create_group("model_weights")
        for at in (file, group):
            at.attrs["keras_version"], at.attrs["backend"] = VERSION, "numpy"
        layers = [_older(layer) for layer in config["config"]["layers"]]
        file.attrs["model_config"] = json.dumps({**_older(config), "config": {**config["config"], "layers": layers}})
        if metadata:
            file.attrs[NOTE] = json.dumps(metadata)
        group.attrs["layer_names"] = [entry[1].encode() for entry in entries]
        for name, _, weights in _named(entries):
            own, names = group.create_group(name), []
            for path, leaf, array in weights:
                names.append(f"{name}/{path.rsplit('vars/', 1)[0]}{leaf}".encode())
                own.create_dataset(names[-1], data=array)
            own.attrs["weight_names"] = names
        group.create_group("top_level_model_weights").attrs["weight_names"] = []

    return _hdf5(fill)


def _older(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a description in HDF5's form, which names classes without their modules."""
    return {key: value for key, value in entry.items() if key not in ("module", "registered_name")}
