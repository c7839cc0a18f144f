"""Keras's files, run by Keras; a lambda in them is refused."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from cellstack.cells import KINDS
from cellstack.formats.build import Names
from cellstack.formats.runtimes.answers import Answers, CannotRunError, Inputs, OtherSizesError, by_name, package, says
from cellstack.network import Network


def _choose_backend(ours: bool) -> None:
    """Choose an installed backend for keras, if none is chosen; cellstack's layers only run on torch."""
    names = ("torch",) if ours else ("tensorflow", "torch", "jax")
    there = next((name for name in names if find_spec(name) is not None), None)
    if there is not None and "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", there)


def _has_our_layers(path: str) -> bool:
    """Return whether a file contains cellstack's layers: Keras's containers store the description uncompressed."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file can't be mapped
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return whole.find(b"cellstack>") >= 0


def _check_sizes(net: Network, shapes: Sequence[Any], inputs: Inputs) -> None:
    """Raise `OtherSizesError` if a model, whose inputs are in the network's order, requires other lengths."""
    for name, shape in zip(net.inputs, shapes, strict=False):
        want, got = list(shape[:2]), list(inputs[name].shape[:2])
        sizes = [one or other for one, other in zip(want, got, strict=True)]
        if net.graph.timed(name) and sizes != got:
            raise OtherSizesError(*sizes)


def run(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run a model, on the installed backend that is chosen or first in order."""
    ours = _has_our_layers(path)
    _choose_backend(ours)
    keras = package("keras", path)
    try:
        if ours:
            import_module("cellstack.keras")  # registers cellstack's layers with Keras
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        names = [tensor.name for tensor in model.inputs]
        _check_sizes(net, [tensor.shape for tensor in model.inputs], inputs)
        given = by_name(names, list(inputs), list(inputs.values()), "inputs")
        arrays = [given[name] for name in names]
        made, why = _with_states(keras, net, model)
        y = (made or model)(arrays if len(arrays) > 1 else arrays[0], training=False)
    except CannotRunError:
        raise
    except Exception as error:  # building a model from a file may raise anything
        raise CannotRunError(says(f"keras {keras.__version__} can't run it", error)) from None
    found = [keras.ops.convert_to_numpy(one) for one in keras.tree.flatten(y)]
    count = len(keras.tree.flatten(model.outputs))
    found, states = found[:count], found[count:]
    names = list(getattr(model, "output_names", [])) or [f"output {number}" for number in range(len(found))]
    outputs = by_name(net.outputs, names, found, "outputs")
    cells = [f"cell {n} {part}" for n, cell in enumerate(net.cells) for part in cell.spec.state_sizes]
    return Answers("keras", keras.__version__, outputs, dict(zip(cells, states, strict=bool(states))), why)


def _inner(layer: Any) -> Iterator[Any]:
    """Yield a layer and all layers inside it."""
    yield layer
    parts = [getattr(layer, name, None) for name in ("forward_layer", "backward_layer", "layer")]
    for part in (*parts, *getattr(layer, "layers", ())):
        if part is not None:
            yield from _inner(part)


def _with_states(keras: Any, net: Network, model: Any) -> tuple[Any, str]:
    """Return a model that also returns the states of its recurrent layers; or None and the reason why there is none.

    Each recurrent layer is copied with `return_state=True` and its weights, on the same input; the states are in the
    order of the network's cells.
    """
    ours = sys.modules.get("cellstack.keras")
    kinds = (keras.layers.RNN, *(getattr(ours, kind.title) for kind in KINDS.values() if hasattr(ours, kind.title)))
    wraps = keras.layers.Bidirectional
    layers = {layer.name: layer for layer in model.layers if isinstance(layer, (*kinds, wraps))}
    for layer in _inner(model):  # a stateful layer may run twice in the new model; a fresh one starts at zero
        if getattr(layer, "stateful", False):
            layer.stateful = False
    nodes = {name: node for name, node in zip(net.names, net.nodes, strict=True) if node.cells}
    order = list(nodes) if nodes.keys() == layers.keys() else list(layers)
    tensors: list[Any] = []
    names = Names((layer.name for layer in model.layers), "_")
    for name in order:
        layer = layers[name]
        settings = keras.saving.serialize_keras_object(layer)
        settings["config"]["name"] = names.fresh(f"{name}_states")
        for one in (settings, *(settings["config"].get(key) for key in ("layer", "backward_layer"))):
            if one is not None and isinstance(layer, wraps) == (one is not settings):
                own = {"return_gates": False} if "return_gates" in one["config"] else {"stateful": False}
                one["config"] |= {"return_state": True, **own}
        try:
            again = keras.saving.deserialize_keras_object(settings)
            x, *others = keras.tree.flatten(layer.input)
            masks = [one for one in others if one.dtype == "bool"]
            if others != masks:
                return None, f"{name} takes its initial state from the model"
            states = keras.tree.flatten(again(x, **dict(zip(["mask"], masks, strict=False))))[1:]
            again.set_weights(layer.get_weights())
        except Exception as error:  # any, as above; an AttributeError if a layer is called twice
            return None, says(f"keras can't give the states of {name}", error)
        tensors += states
    sizes = [size for cell in net.cells for size in cell.spec.state_sizes.values()]
    found = [tensor.shape[-1] for tensor in tensors]
    if found != sizes:
        return None, f"the model's top-level layers have states of widths {found}, the network's cells {sizes}"
    return keras.Model(model.inputs, [*keras.tree.flatten(model.outputs), *tensors]), ""
