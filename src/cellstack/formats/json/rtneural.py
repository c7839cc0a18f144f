"""RTNeural's model files: `in_shape`, and `layers` in order with their weights in Keras's layout.

Ref: https://github.com/jatinchowdhury18/RTNeural, RTNeural/model_loader.h and python/model_utils.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells import named
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import Builder, Names, ProblemsError
from cellstack.formats.files import short
from cellstack.formats.json.values import array_of, value_of
from cellstack.network import Network
from cellstack.nodes import Activation, Clip, Conv1D, Dense, Merge, Recurrent, Scale
from cellstack.nodes.cell_arrays import Cell

RECURRENT = named("rtneural")
ACTIVATIONS = ("tanh", "relu", "sigmoid", "softmax", "elu")
KNOWN = ("type", "activation", "shape", "weights", "kernel_size", "dilation", "groups", "epsilon", "name")
# Settings of which RTNeural supports only these values.
USUAL = {"strides": (1, [1]), "recurrent_activation": ("sigmoid", ""), "reset_after": (True,)}


class _Layer(NamedTuple):
    """A layer of a file.

    Attributes:
        where: the layer, for messages.
        name: the name of its node.
        entry: its JSON object.
        width: features of its input.
        units: features of its output.
        steps: steps of its input and its output, None where the file doesn't specify them.
    """

    where: str
    name: str
    entry: Mapping[str, Any]
    width: int
    units: int
    steps: tuple[int | None, int | None]

    def weights(self, place: int, *shape: int | None) -> Array:
        """Return one of the layer's arrays, float32."""
        arrays = value_of(self.where, self.entry, "weights", list)
        if place >= len(arrays):
            raise FormatError(f"{self.where}: expected at least {place + 1} arrays of weights, found {len(arrays)}")
        return array_of(f"{self.where}: weights {place}", arrays[place], *shape).astype(np.float32)

    @property
    def array_count(self) -> int:
        """The number of its arrays of weights."""
        return len(value_of(self.where, self.entry, "weights", list))

    def check_count(self, *counts: int) -> None:
        """Raise `FormatError` unless the number of arrays is one of `counts`."""
        if self.array_count not in counts:
            wanted = " or ".join(map(str, counts))
            raise FormatError(f"{self.where}: expected {wanted} arrays of weights, found {self.array_count}")

    def number(self, key: str, *usual: Any) -> int:
        """Return a positive integer, or the last one of a list."""
        value = value_of(self.where, self.entry, key, (int, list), *usual)
        value = value[-1] if isinstance(value, list) and value else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FormatError(f"{self.where}: expected {key} to be a positive integer, found {short(value)}")
        return value

    @property
    def activation(self) -> str:
        """The layer's activation, `""` if it has none."""
        text = value_of(self.where, self.entry, "activation", str, "")
        if text and text not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise FormatError(f"{self.where}: unknown activation {short(text)}; RTNeural has {names}")
        return text


def _dense(build: Builder, layer: _Layer, wire: str) -> str:
    layer.check_count(1, 2)
    kernel = layer.weights(0, layer.width, layer.units)
    bias = layer.weights(1, layer.units) if layer.array_count == 2 else None
    return build.add(layer.name, Dense(kernel, bias, layer.activation or "linear"), wire)


def _conv(build: Builder, layer: _Layer, wire: str) -> str:
    """Add a convolution: causal, unless the shapes show that its steps were reduced for want of padding."""
    layer.check_count(1, 2)
    taps, dilation, groups = layer.number("kernel_size"), layer.number("dilation", 1), layer.number("groups", 1)
    if layer.width % groups:
        raise FormatError(f"{layer.where}: expected groups to divide {layer.width} features, found {groups}")
    kernel = layer.weights(0, taps, layer.width // groups, layer.units)
    bias = layer.weights(1, layer.units) if layer.array_count == 2 else None
    before, after = layer.steps
    padding = "causal"
    if before is not None and after is not None and before != after:
        padding = "valid"
        if after != before - (taps - 1) * dilation:
            wanted = before - (taps - 1) * dilation
            raise FormatError(f"{layer.where}: expected {before} steps, or {wanted} without padding, found {after}")
    return build.add(layer.name, Conv1D(kernel, bias, 1, padding, dilation, groups, layer.activation or "linear"), wire)


def _cell(layer: _Layer, kind: str) -> Cell:
    if layer.activation not in ("", "tanh"):
        raise FormatError(f"{layer.where}: expected the activation tanh, found {layer.activation}")
    layer.check_count(3)
    spec = CellSpec(layer.width, layer.units, kind=kind)
    shapes = reversed([*enumerate(spec.shapes.items())])  # the bias first: a wrong number of units shows there
    return Cell(spec, **{name: layer.weights(number, *shape) for number, (name, shape) in shapes})


def _recurrent(kind: str) -> Callable[[Builder, _Layer, str], str]:
    return lambda build, layer, wire: build.add(layer.name, Recurrent((_cell(layer, kind),)), wire)


def prelu(build: Builder, name: str, slopes: Array, wire: str) -> str:
    """Add nodes for `max(x, 0) + slopes·min(x, 0)`, and return the wire of the result."""
    if (slopes == slopes[0]).all():
        return build.add(name, Activation(f"leaky_relu({float(slopes[0])!r})"), wire)
    below = build.add(f"{name}.below", Clip(None, 0.0), wire)
    below = build.add(f"{name}.slopes", Scale(slopes, np.zeros_like(slopes)), below)
    return build.add(name, Merge("add"), build.add(f"{name}.above", Activation("relu"), wire), below)


def _prelu(build: Builder, layer: _Layer, wire: str) -> str:
    layer.check_count(1)
    (slopes,) = layer.weights(0, 1, None)
    if len(slopes) not in (1, layer.width):
        raise FormatError(f"{layer.where}: expected one slope, or {layer.width}, found {len(slopes)}")
    return prelu(build, layer.name, slopes, wire)


def _batch_norm(build: Builder, layer: _Layer, wire: str) -> str:
    layer.check_count(2, 4)
    gamma, beta, mean, variance = ([None, None] if layer.array_count == 2 else []) + [
        layer.weights(place, layer.width) for place in range(layer.array_count)
    ]
    epsilon = float(value_of(layer.where, layer.entry, "epsilon", (int, float)))
    assert mean is not None
    assert variance is not None
    try:
        return build.add(layer.name, Scale.of_statistics(mean, variance, epsilon, gamma, beta), wire)
    except ValueError as error:
        raise FormatError(f"{layer.where}: {error}") from None


def _activation(build: Builder, layer: _Layer, wire: str) -> str:
    return build.add(layer.name, Activation(layer.activation), wire) if layer.activation else wire


TYPES: dict[str, Callable[[Builder, _Layer, str], str]] = {
    "activation": _activation,
    "batchnorm": _batch_norm,
    "conv1d": _conv,
    "dense": _dense,
    **{name: _recurrent(kind) for name, kind in sorted(RECURRENT.items())},
    "prelu": _prelu,
    "time-distributed-dense": _dense,
}


def _shape(where: str, found: Mapping[str, Any], key: str) -> tuple[int | None, int]:
    """Return the number of steps in a shape, None if it isn't specified, and the number of features."""
    shape = value_of(where, found, key, list)
    sizes = [n is None or (type(n) is int and n > 0) for n in shape]
    if len(shape) not in (2, 3) or not all(sizes) or shape[-1] is None:
        raise FormatError(f"{where}: expected {key} [null, steps, features], found {short(shape)}")
    return (shape[1] if len(shape) == 3 else None), shape[-1]


def _layers(path: str, found: Mapping[str, Any]) -> list[_Layer]:
    """Return the layers; an error names all that aren't supported."""
    made: list[_Layer] = []
    names = Names()
    entries = value_of(path, found, "layers", list)
    problems = []
    for number, entry in enumerate(entries):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in TYPES:
            problems.append(f"layer {number} of type {short(kind)}")
    if problems or not entries:
        known = ", ".join(TYPES)
        raise FormatError(f"{path}: expected layers of the types {known}, found {', '.join(problems) or 'none'}")
    steps, width = _shape(path, found, "in_shape")
    for number, entry in enumerate(entries):
        where, kind = f"{path}: layer {number} ({entry['type']})", entry["type"]
        after, units = _shape(where, entry, "shape")
        for key, usual in USUAL.items():
            if key in entry and entry[key] not in usual:
                raise FormatError(f"{where}: expected {key} {usual[0]}, found {short(entry[key])}")
        if kind in ("activation", "batchnorm", "prelu") and units != width:
            raise FormatError(f"{where}: expected {width} features, as its input has, found a shape of {units}")
        name = names.fresh(str(entry.get("name") or f"{kind}_{number}"))
        made.append(_Layer(where, name, entry, width, units, (steps, after)))
        steps, width = after, units
    return made


def network_of(path: str, found: Mapping[str, Any]) -> Network:
    """Return the network of a file's JSON object, `[B, T, I]` to `[B, T, O]`.

    Raises:
        FormatError: an unsupported layer, or weights of the wrong shape.
    """
    layers, build = _layers(path, found), Builder()
    wire = build.input("x", (None, layers[0].width))
    others = {}
    for layer in layers:
        wire = TYPES[layer.entry["type"]](build, layer, wire)
        more = {key: value for key, value in layer.entry.items() if key not in KNOWN and key not in USUAL}
        others |= {layer.name: more} if more else {}
    build.output(wire, "output")
    said = {key: value for key, value in found.items() if key != "layers"}
    said |= {"layers": others} if others else {}
    try:
        return build.network({"source": {"format": "rtneural"}, "rtneural": said})
    except ProblemsError as error:
        raise FormatError(f"{path}: {error}") from None


def parts_of(path: str, found: Mapping[str, Any]) -> dict[str, Network]:
    """Return the recurrent layers of a model file by name, even where other layers aren't supported.

    A repeated name gets a number appended.
    """
    networks, names = {}, Names()
    entries = value_of(path, found, "layers", list)
    for number, entry in enumerate(entries):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind in RECURRENT:
            where = f"{path}: layer {number} ({kind})"
            _, units = _shape(where, entry, "shape")
            arrays = value_of(where, entry, "weights", list)
            width = len(arrays[0]) if arrays and isinstance(arrays[0], list) else 0
            layer = _Layer(where, str(entry.get("name") or f"{kind}_{number}"), entry, width, units, (None, None))
            name = names.fresh(layer.name)
            networks[name] = Network([Recurrent((_cell(layer, RECURRENT[kind]),))], [name])
    return networks
