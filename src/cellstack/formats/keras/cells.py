"""Converts the recurrent layers and activations of all Keras versions, and the cuDNN layers, to nodes.

Keras 2 and 3 store the gates in our order. Keras 1 stores one array for each gate, in another order, and cuDNN's layers
store their blocks transposed; `layout` converts both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells import KINDS, named
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import OURS, from_cudnn, reorder
from cellstack.cells.spec import CellSpec
from cellstack.formats.keras.config import OURS as OURS_OF_KERAS
from cellstack.formats.keras.config import Layer, numbered
from cellstack.formats.keras.files import short
from cellstack.nodes import Bidirectional, Cell, Recurrent
from cellstack.nodes.base import Array

LAYERS, CUDNN = named("keras"), named("cudnn")
CELLS = {f"{name}Cell": kind for name, kind in LAYERS.items()}
FLAGGED = {f"{OURS_OF_KERAS}{kind.title}": kind.name for kind in KINDS.values()}  # have all flags of a CellSpec
ALONE = {**LAYERS, **CUDNN, **FLAGGED}  # layers of one cell
RECURRENT = (*ALONE, "RNN", "Bidirectional")
SCALES = ("kernel_scale", "embeddings_scale")  # scales of integer weights
STATISTICS = (*SCALES, "moving_mean", "moving_variance", "running_mean", "running_std", "mean", "variance", "count")
PLAIN = ("linear", "tanh", "sigmoid", "relu", "softsign", "softplus", "elu", "leaky_relu", "hard_sigmoid", "softmax")
MORE = {  # activations that layers support and cells don't
    **{name: name for name in ("gelu", "silu", "selu", "exponential", "relu6", "log_softmax")},
    "swish": "silu",
}


class Slot(NamedTuple):
    """A weight of a layer: its path within the layer in Keras 3's files, its name, and whether it is trainable.

    `whole`: it holds 8-bit integers, whose scales are another weight of the layer.
    """

    path: str
    leaf: str
    trainable: bool
    whole: bool = False

    def below(self, prefix: str, trainable: bool = True) -> Slot:
        """Return the slot with a path relative to the enclosing layer."""
        return self._replace(
            path=f"{prefix}/{self.path}" if prefix else self.path, trainable=self.trainable and trainable
        )


def own_slots(layer: Layer, leaves: list[str]) -> list[Slot]:
    """Return the slots of a layer's own weights."""
    trained = layer.flag("trainable", True)
    return [Slot(f"vars/{n}", leaf, trained and leaf not in STATISTICS) for n, leaf in enumerate(leaves)]


# ── activations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def activation(layer: Layer, name: str, major: int, more: bool = False) -> str:
    """Return the activation of a setting, by our name; None means linear, as in Keras.

    `hard_sigmoid` is 0.2·z + 0.5 up to Keras 2, and z/6 + 0.5 from Keras 3 on. `more`: allow those that cells lack.
    """
    if name not in layer.config:
        raise layer.refuse(f"expected {name}, found none: its default differs between versions of Keras")
    value = layer.config[name]
    if isinstance(value, dict):  # Keras 3: a function by name, or a layer
        if value.get("class_name") in ("function", "Function"):
            value = value.get("config")
        elif isinstance(value.get("config"), dict):
            return activation_layer(layer.within(value, name), major, more)
    if value is None:
        return "linear"
    if value == "hard_sigmoid" and major < 3:
        return "hard_sigmoid(0.2, 0.5)"
    if isinstance(value, str) and value in PLAIN:
        return value
    if more and isinstance(value, str) and value in MORE:
        return MORE[value]
    raise layer.refuse(f"{name} {short(value)} isn't supported")


def activation_layer(layer: Layer, major: int, more: bool = False) -> str:
    """Return the activation that an activation layer computes, by our name."""
    kind = layer.kind
    if kind == "Activation":
        return activation(layer, "activation", major, more)
    if kind == "Softmax":
        if layer.axis("axis") not in (-1, None):
            raise layer.refuse(f"expected axis -1, the features, found {short(layer.config.get('axis'))}")
        return "softmax"
    if kind == "ELU":
        return f"elu({_number(layer, 'alpha', 1.0)})"
    if kind == "LeakyReLU":
        usual = _number(layer, "alpha", 0.3)
        return f"leaky_relu({_number(layer, 'negative_slope', usual)})"
    if kind == "ThresholdedReLU":
        return f"thresholded_relu({_number(layer, 'theta', 1.0)})"
    if kind == "ReLU":
        if layer.config.get("max_value") is not None:
            raise layer.refuse(f"max_value {short(layer.config['max_value'])} isn't supported")
        slope, threshold = _number(layer, "negative_slope", 0.0), _number(layer, "threshold", 0.0)
        if threshold and slope:
            raise layer.refuse("a threshold and a negative_slope together aren't supported")
        if threshold:
            return f"thresholded_relu({threshold})"
        return f"leaky_relu({slope})" if slope else "relu"
    raise layer.refuse("this activation isn't supported")


def _number(layer: Layer, name: str, usual: float) -> float:
    value = layer.config.get(name)
    if isinstance(value, dict):  # Keras 2 wrote some as arrays: {"class_name": "__numpy__", ...}
        value = value.get("value")
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise layer.refuse(f"expected {name} to be a number, found {short(value)}")
    return float(value)


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(layer: Layer) -> list[tuple[Layer, str, str]]:
    """Return the cells of a recurrent layer: for each its description, its kind, and the path of its weights."""
    if layer.kind in ALONE:
        return [(layer, ALONE[layer.kind], "" if layer.kind in FLAGGED else "cell")]
    cell = layer.within(layer.config.get("cell"), "cell")
    if cell.kind == "StackedRNNCells":
        if cell.flag("reverse_state_order"):
            raise cell.refuse("expected reverse_state_order=False, found True")
        entries = [cell.within(entry, "cells") for entry in cell.get("cells", list)]
        places = [f"cell/cells/{name}" for name in numbered([entry.kind for entry in entries])]
    else:
        entries, places = [cell], ["cell"]
    if not entries:
        raise cell.refuse("expected cells, found none")
    for entry in entries:
        if entry.kind not in CELLS:
            raise entry.refuse("this cell isn't supported")
    return [(entry, CELLS[entry.kind], place) for entry, place in zip(entries, places, strict=True)]


def _leaves(layer: Layer, kind: str, major: int) -> list[str]:
    """Return the names of a cell's arrays in Keras's order."""
    if layer.kind in FLAGGED:
        return list(_spec_of(layer, 2).shapes)  # the least width, with an attention
    biased = layer.flag("use_bias", True)
    if major == 1:
        together = layer.config.get("consume_less") == "gpu"
        gates = [f"_{letter}" for letter in KINDS[kind].names["keras1"].letters] if not together else []
        return [f"{letter}{gate}" for gate in gates or [""] for letter in "WUb"]
    return ["kernel", "recurrent_kernel", *(["bias"] if biased else [])]


def flagged(layer: Layer) -> bool:
    """Return whether a recurrent layer, or the layer in a Bidirectional, is one of cellstack.keras."""
    inner = layer.within(layer.config.get("layer"), "layer") if layer.kind == "Bidirectional" else layer
    return inner.kind in FLAGGED


def _spec_of(layer: Layer, width: int) -> CellSpec:
    """Return the cell of a layer of cellstack.keras, whose settings are those of a `CellSpec`."""
    names = {field.name for field in fields(CellSpec)} - {"input_size", "units", "kind"}
    settings = {name: value for name, value in layer.config.items() if name in names}
    try:
        return CellSpec(width, layer.integer("units"), kind=FLAGGED[layer.kind], **settings)
    except (TypeError, ValueError) as error:
        raise layer.refuse(str(error)) from None


def recurrent_slots(layer: Layer, major: int) -> list[Slot]:
    """Return the slots of a recurrent layer's weights, cell by cell."""
    if layer.kind == "Bidirectional":
        trained = layer.flag("trainable", True)
        return [
            slot.below(f"{way}_layer", trained)
            for way, inner in zip(("forward", "backward"), _directions(layer), strict=True)
            for slot in recurrent_slots(inner, major)
        ]
    trained, slots = layer.flag("trainable", True), []
    for cell, kind, place in cells_of(layer):
        slots += [slot.below(place, trained) for slot in own_slots(cell, _leaves(cell, kind, major))]
    return slots


def recurrent(layer: Layer, arrays: Iterator[Array], major: int) -> Recurrent | Bidirectional:
    """Return the node of a recurrent layer from its weights, in the order of `recurrent_slots`.

    Raises:
        FormatError: unsupported settings, or weights of other shapes.
    """
    if layer.kind == "Bidirectional":
        ahead, back = (recurrent(inner, arrays, major) for inner in _directions(layer))
        assert isinstance(ahead, Recurrent)
        assert isinstance(back, Recurrent)
        mode = layer.config.get("merge_mode", "concat") or "concat"  # None: the graph splits the output
        if mode not in ("concat", "sum", "mul", "ave"):
            raise layer.refuse(f"expected merge_mode concat, sum, mul or ave, found {short(mode)}")
        return Bidirectional(ahead, back, mode)
    if layer.flag("time_major"):
        raise layer.refuse("expected time_major=False: a Network takes [B, T, I], found True")
    for name in ("input_length", "ragged"):
        if layer.config.get(name) is True:
            raise layer.refuse(f"expected {name} not to be True")
    cells = []
    for cell, kind, _ in cells_of(layer):
        given = [next(arrays) for _ in _leaves(cell, kind, major)]
        cells.append(_cell(cell, kind, given, major))
    names = ("return_sequences", "go_backwards", "zero_output_for_mask")
    return Recurrent(tuple(cells), **{name: layer.flag(name) for name in names})


def _directions(layer: Layer) -> tuple[Layer, Layer]:
    """Return the forward and the backward layer of a Bidirectional; older files only describe the forward one."""
    ahead = layer.within(layer.config.get("layer"), "layer")
    if layer.config.get("backward_layer") is not None:
        back = layer.within(layer.config["backward_layer"], "backward_layer")
    else:
        config = {**ahead.config, "go_backwards": not ahead.flag("go_backwards")}
        back = Layer(ahead.where, ahead.name, ahead.kind, config)
    for inner in (ahead, back):
        if inner.kind not in (*ALONE, "RNN"):
            raise layer.refuse(f"expected a recurrent layer within, found {short(inner.kind)}")
    return ahead, back


def _cell(layer: Layer, kind: str, arrays: list[Array], major: int) -> Cell:
    if layer.kind in FLAGGED:
        scalar = bool(layer.config.get(KINDS[kind].scalar))  # a column of x that no array has a row for
        spec = _spec_of(layer, scalar + (arrays[0].shape[0] if arrays[0].ndim == 2 else 1))
        for (name, shape), array in zip(spec.shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise layer.refuse(f"expected {name} {list(shape)}, found {array.shape}")
        return Cell(spec, **dict(zip(spec.shapes, arrays, strict=True)))
    units = layer.integer("units")
    order = OURS[kind]
    if len(arrays) > 3:  # Keras 1: kernel, recurrent kernel and bias of each gate in turn
        source, letters = KINDS[kind].names["keras1"].order, (arrays[0::3], arrays[1::3], arrays[2::3])
        for name, one in zip("WUb", letters, strict=True):
            if any(array.ndim != (1 if name == "b" else 2) or array.shape[-1] != units for array in one):
                raise layer.refuse(f"expected {name} of every gate with {units} columns, found {one[0].shape}")
        arrays = [reorder(np.concatenate(one, axis=-1), source, order) for one in letters]
    kernel, recurrent_kernel, bias = arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None
    wide = len(order) * units
    if kernel.ndim != 2 or kernel.shape[1] != wide or recurrent_kernel.shape != (units, wide):
        raise layer.refuse(
            f"expected kernel [I, {wide}] and recurrent_kernel [{units}, {wide}], "
            f"found {kernel.shape} and {recurrent_kernel.shape}"
        )
    cudnn = layer.kind in CUDNN
    settings: dict[str, Any] = {"use_bias": bias is not None, "kind": kind}
    if not cudnn:
        settings["activation"] = activation(layer, "activation", major)
        if KINDS[kind].gated:
            settings["recurrent_activation"] = activation(layer, "recurrent_activation", major)
    of_cudnn = (2 * wide,)  # Keras 2 can load a cuDNN layer's weights into its own layers
    if "reset_after" in KINDS[kind].settings:
        found = None if bias is None else bias.shape
        settings["reset_after"] = cudnn or layer.flag("reset_after", found in ((2, wide), of_cudnn))
    spec = CellSpec(kernel.shape[0], units, **settings)
    expected = [spec.shapes["bias"]] if spec.use_bias else []
    expected += [of_cudnn] if "cudnn" in spec.of_kind.names and spec.reset_after else []
    if bias is not None and bias.shape not in expected:
        raise layer.refuse(f"expected a bias {' or '.join(str(list(shape)) for shape in expected)}, found {bias.shape}")
    if bias is not None and bias.shape == of_cudnn:
        kernel, recurrent_kernel, bias = from_cudnn(kind, kernel, recurrent_kernel, bias)
    elif cudnn:
        raise layer.refuse(f"expected a bias [{2 * wide}], as cuDNN's layers have, found {short(bias)}")
    return Cell(spec, kernel, recurrent_kernel, *([] if bias is None else [bias]))


def found_cudnn(name: str, arrays: dict[str, Array]) -> Recurrent | None:
    """Return the node of a cuDNN layer from its weights by name, which determine it without a description.

    Returns:
        A Recurrent that returns sequences; None if the weights aren't those of a cuDNN layer.
    """
    if arrays.keys() != {"kernel", "recurrent_kernel", "bias"}:
        return None
    units = arrays["recurrent_kernel"].shape[0] if arrays["recurrent_kernel"].ndim == 2 else 0
    for title, kind in CUDNN.items():
        wide = len(KINDS[kind].gates) * units
        if units and arrays["bias"].shape == (2 * wide,) and arrays["kernel"].shape[-1] == wide:
            layer = Layer(name, name, title, {"units": units, "return_sequences": True})
            try:
                return Recurrent((_cell(layer, kind, list(arrays.values()), 2),))
            except ValueError as error:
                raise FormatError(f"{name}: {error}") from None
    return None
