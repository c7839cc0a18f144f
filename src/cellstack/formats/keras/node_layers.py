"""Nodes as layers of Keras, with their settings and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cellstack import nodes
from cellstack.cells import activations
from cellstack.formats.keras.cells import MORE, PLAIN
from cellstack.formats.keras.layers import MERGES
from cellstack.nodes.base import Array, Node

MERGE_LAYERS = {mode: kind for kind, mode in MERGES.items()}
NAMED = (*PLAIN, *MORE.values())  # activations of layers, in addition to those of cells
OPERATIONS = {"Clip": "numpy", "Sum": "numpy", "Mean": "numpy", "Max": "numpy", "Min": "numpy", "Gelu": "nn"}
"""Functions that a model lists among its layers, and their Keras module; HDF5 can't store them."""
Written = tuple[str, dict[str, Any], list[Array]]  # a layer's class, settings and weights
Layers = Iterator[Written]


class RefusedError(ValueError):
    """Keras has no such node or setting."""


def layers_of(node: Node) -> list[Written]:
    """Return a node's layers with their settings and weights: one, or two if its activation is a separate layer."""
    for kind, build in BUILDERS.items():
        if isinstance(node, kind):
            return list(build(node))
    raise RefusedError(type(node).__name__)


def _activation(text: str) -> str:
    """Return Keras's name of an activation; raise `RefusedError` if it has no such function."""
    if text in PLAIN:
        return text
    raise RefusedError(f"the activation {text}")


def _activation_layer(text: str) -> Written:
    if text in NAMED:
        return "Activation", {"activation": text}, []
    if text == "gelu_tanh":
        return "Gelu", {"approximate": True}, []
    name, alpha, _ = activations.activation(text)
    layers = {
        "elu": ("ELU", "alpha"),
        "leaky_relu": ("LeakyReLU", "negative_slope"),
        "thresholded_relu": ("ReLU", "threshold"),
    }
    if name not in layers or (name == "thresholded_relu" and alpha < 0.0):
        raise RefusedError(f"the activation {text}")
    kind, setting = layers[name]
    return kind, {setting: alpha}, []


def _with_activation(kind: str, settings: dict[str, Any], arrays: list[Array], activation: str) -> Layers:
    """Yield a layer, followed by the layer of its activation if that can't be a setting."""
    named = activation in NAMED
    yield kind, {**settings, "activation": activation if named else "linear"}, arrays
    if not named:
        yield _activation_layer(activation)


def _cell(cell: nodes.Cell) -> tuple[dict[str, Any], list[Array]]:
    """Return the settings and weights of a cell; raise `RefusedError` for flags that Keras's cells don't have."""
    cell = cell.one_head
    description, kind = cell.spec, cell.spec.of_kind
    if "keras" not in kind.names:
        raise RefusedError(kind.title)
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
    odd = [f"{name}={value!r}" for name, value in description.settings.items() if name not in known]
    if odd:
        raise RefusedError(f"a cell with {', '.join(odd)}")
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


def _stack(node: nodes.Recurrent) -> Written:
    if any(added for _, added in node.parts):
        raise RefusedError("a residual stack")
    names = ("return_sequences", "go_backwards", "zero_output_for_mask")
    flags: dict[str, Any] = {name: getattr(node, name) for name in names}
    if len(node.cells) == 1:
        settings, arrays = _cell(node.cells[0])
        return node.cells[0].spec.of_kind.names["keras"].name, {**settings, **flags}, arrays
    cells, arrays = [], []
    for number, cell in enumerate(node.cells):
        settings, own = _cell(cell)
        kind = f"{cell.spec.of_kind.names['keras'].name}Cell"
        cells.append(entry_of(kind, f"cell_{number}", {"dtype": str(node.dtype), **settings}))
        arrays += own
    stack = entry_of("StackedRNNCells", "cells", {"cells": cells})
    return "RNN", {"cell": stack, **flags}, arrays


def _bidirectional(node: nodes.Bidirectional) -> Layers:
    settings: dict[str, Any] = {"merge_mode": node.merge_mode}
    arrays = []
    for part, key in ((node.forward, "layer"), (node.backward, "backward_layer")):
        kind, inner, own = _stack(part)
        settings[key] = entry_of(
            kind, f"{'forward' if key == 'layer' else 'backward'}", {"dtype": str(node.dtype), **inner}
        )
        arrays += own
    yield "Bidirectional", settings, arrays


def _dense(node: nodes.Dense) -> Layers:
    settings = {"units": node.kernel.shape[1], "use_bias": node.bias is not None}
    return _with_activation("Dense", settings, _both(node.kernel, node.bias), node.activation)


def _both(first: Array | None, second: Array | None) -> list[Array]:
    return [array for array in (first, second) if array is not None]


def _conv(node: nodes.Conv1D) -> Layers:
    if not isinstance(node.padding, str):
        raise RefusedError(f"a convolution with padding {node.padding}")
    if node.strides > 1 and node.dilation > 1:
        raise RefusedError("a convolution with strides and dilation together")
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


def _embedding(node: nodes.Embedding) -> Layers:
    sizes = {"input_dim": node.table.shape[0], "output_dim": node.table.shape[1]}
    yield "Embedding", {**sizes, "mask_zero": node.mask_zero}, [node.table]


def _scale(node: nodes.Scale) -> Layers:
    """Yield a batch normalisation with mean 0 and variance 1."""
    zeros, ones = np.zeros_like(node.scale), np.ones_like(node.scale)
    yield "BatchNormalization", {"axis": -1, "epsilon": 0.0}, [node.scale, node.shift, zeros, ones]


def _standardise(node: nodes.Standardise) -> Layers:
    if (node.scale < 1e-6).any():  # Keras stores variances, and replaces scales below 1e-7
        raise RefusedError("a scale below 1e-6")
    variance = node.scale.astype(np.float64) ** 2
    yield "Normalization", {"axis": [-1], "mean": node.mean.tolist(), "variance": variance.tolist()}, []


def _layer_norm(node: nodes.LayerNorm) -> Layers:
    flags = {"scale": node.gain is not None, "center": node.bias is not None}
    yield "LayerNormalization", {"axis": -1, "epsilon": node.epsilon, **flags}, _both(node.gain, node.bias)


def _pool(node: nodes.GlobalPool) -> Layers:
    if node.mode == "last":
        raise RefusedError("the last step of a sequence")
    yield "GlobalAveragePooling1D" if node.mode == "mean" else "GlobalMaxPooling1D", {}, []


def _windows(node: nodes.Pool1D) -> Layers:
    if node.padding not in ("valid", "same"):
        raise RefusedError(f"a pool with padding {node.padding}")
    kind = "AveragePooling1D" if node.mode == "mean" else "MaxPooling1D"
    yield kind, {"pool_size": [node.size], "strides": [node.strides], "padding": node.padding}, []


def _clip(node: nodes.Clip) -> Layers:
    if node.low == 0.0:
        yield "ReLU", {"max_value": node.high, "negative_slope": 0.0, "threshold": 0.0}, []
    elif node.low is None or node.high is None:
        raise RefusedError(f"a Clip with one bound, {node.summary}")
    else:
        yield "Clip", {"x_min": node.low, "x_max": node.high}, []


def _reduce(node: nodes.Reduce) -> Layers:
    more = {"initial": None} if node.mode in ("max", "min") else {}
    yield node.mode.title(), {"axis": node.axis, "keepdims": node.keepdims, **more}, []


def _pad(node: nodes.Pad) -> Layers:
    if node.axis != 1 or node.value != 0.0:
        raise RefusedError(f"padding of {node.summary}")
    yield "ZeroPadding1D", {"padding": [node.before, node.after]}, []


def _select(node: nodes.Select) -> Layers:
    first, last = node.start or 0, node.stop or 0
    if node.axis != 1 or node.step != 1 or first < 0 or last > 0 or node.stop == 0:
        raise RefusedError(f"the slice {node.summary}")
    yield "Cropping1D", {"cropping": [first, -last]}, []


def _merge(node: nodes.Merge) -> Layers:
    yield MERGE_LAYERS[node.mode], {"axis": node.axis} if node.mode == "concat" else {}, []


BUILDERS: dict[type[Node], Callable[[Any], Any]] = {
    nodes.Recurrent: lambda node: [_stack(node)],
    nodes.Bidirectional: _bidirectional,
    nodes.Dense: _dense,
    nodes.Conv1D: _conv,
    nodes.Embedding: _embedding,
    nodes.Scale: _scale,
    nodes.Standardise: _standardise,
    nodes.LayerNorm: _layer_norm,
    nodes.Activation: lambda node: [_activation_layer(node.activation)],
    nodes.Masking: lambda node: [("Masking", {"mask_value": node.value}, [])],
    nodes.GlobalPool: _pool,
    nodes.Pool1D: _windows,
    nodes.Clip: _clip,
    nodes.Reduce: _reduce,
    nodes.Pad: _pad,
    nodes.Flatten: lambda node: [("Flatten", {}, [])],
    nodes.Reshape: lambda node: [("Reshape", {"target_shape": list(node.shape)}, [])],
    nodes.Permute: lambda node: [("Permute", {"dims": list(node.dims)}, [])],
    nodes.Repeat: lambda node: [("RepeatVector", {"n": node.times}, [])],
    nodes.Select: _select,
    nodes.Merge: _merge,
}


def with_states(kind: str, settings: dict[str, Any], arrays: list[Array]) -> Written:
    """Return a recurrent layer that returns its states too."""
    if kind != "Bidirectional":
        return kind, {**settings, "return_state": True}, arrays
    inner = {}
    for key in ("layer", "backward_layer"):
        entry = settings[key]
        inner[key] = {**entry, "config": {**entry["config"], "return_state": True}}
    return kind, {**settings, **inner}, arrays


def entry_of(kind: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's entry in the description of a model."""
    if kind in OPERATIONS:
        config = {"name": name, **{key: value for key, value in settings.items() if key != "dtype"}}
        module = f"keras.src.ops.{OPERATIONS[kind]}"
        return {"module": module, "class_name": kind, "config": config, "registered_name": kind}
    return {"module": "keras.layers", "class_name": kind, "config": {"name": name, **settings}, "registered_name": None}
