"""Keras's files without Keras: `.keras`, and HDF5 of Keras 1, 2 and 3, whole models or weights only.

A file is read as data: nothing in it is run, and nothing outside it is read. A layer's class, its settings and the
version of Keras determine what it computes; a layer that isn't supported is refused by name. A layer is computed in the
dtype of its weights, regardless of its dtype policy, such as `mixed_float16`; int8 weights are divided by their scale.

Ref: https://keras.io/api/models/model_saving_apis/
"""

from __future__ import annotations

import os
import sys
from os import PathLike, fspath
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats.build import HINT, ProblemsError, chain
from cellstack.formats.files import check_unedited
from cellstack.formats.keras.cells import found_cudnn
from cellstack.formats.keras.config import Model, model_of
from cellstack.formats.keras.files import HDF5_HEAD, LEGACY, ModelFile, opened, parse, short
from cellstack.formats.keras.graph import Reader
from cellstack.formats.keras.weights import Built
from cellstack.network import Network

NAME = "Keras"
SUFFIXES = (".keras", ".h5", ".hdf5")
WORDS_2 = ("units", "filters", "recurrent_activation", "kernel_initializer")  # settings that Keras 1 doesn't have

Architecture = dict[str, Any] | list[Any] | str | PathLike[str]


def recognises(head: bytes) -> bool:
    """Return whether a file that starts with `head` looks like Keras's: HDF5, or a zip with Keras's members."""
    return head.startswith(HDF5_HEAD) or (
        head[:4] == b"PK\x03\x04" and head[30:].startswith((b"metadata.json", b"config.json", b"model.weights.h5"))
    )


def load(path: str | PathLike[str], architecture: Architecture | None = None) -> Network:
    """Read a model from a file of Keras 1, 2 or 3.

    Args:
        path: the file.
        architecture: for a file of weights only, the model's description as `model.to_json()` returns it: a dict, JSON
            text, or the path of a JSON file; or a list of layers, each `{"class_name": ..., "config": {...}}`.

    Returns:
        The model in inference mode, with a node for each layer, of the same name. `metadata["source"]` holds the
        version of Keras that wrote the file, and any assumption made. A file that cellstack wrote has the network's
        metadata too.

    Raises:
        FormatError: the file is damaged, or holds layers or settings that aren't supported, all of which are named.
        OSError: the file can't be read.
        ModuleNotFoundError: h5py is missing.

    Ref: the layouts of weights: Keras's `legacy_h5_format` and `saving_lib`.
    """
    path = fspath(path)
    with opened(path) as source:
        model = _described(source, architecture)
        built = Built(source, model)
        network = _wired(source, model, built)
        _check_all_used(source)
    return network


def extract(path: str | PathLike[str], architecture: Architecture | None = None) -> dict[str, Network]:
    """Read the recurrent layers of a file, even where its other layers aren't supported.

    Args:
        path: the file.
        architecture: as for `load`. Weights of cuDNN's layers need none, as these layers have no settings.

    Returns:
        A Network for each recurrent layer, by its name; `"outer.inner"` within another model.

    Raises:
        FormatError: the file is damaged, has no recurrent layer, or one that isn't supported.
        OSError: the file can't be read.
        ModuleNotFoundError: h5py is missing.
    """
    path = fspath(path)
    with opened(path) as source:
        if source.config is None and architecture is None and source.layout == LEGACY:
            return _extract_cudnn(source)
        built = Built(source, _described(source, architecture))
        refused = [built.refused[id(part.layer)] for part in built.recurrent if id(part.layer) in built.refused]
        if refused:
            raise FormatError(f"{path}: {'; '.join(refused)}")
        if not built.recurrent:
            raise FormatError(f"{path}: expected a recurrent layer, found none")
        found = {}
        for part in built.recurrent:
            name = part.name.replace("/", ".")
            found[name] = chain(built.nodes[id(part.layer)], _metadata(source), name)
        return found


def of_model(model: Any) -> Network:
    """Return a Keras model in memory as a Network, with copies of its weights.

    Args:
        model: a built Sequential or functional model of Keras 2 or 3, on any backend.

    Returns:
        The model in inference mode, with a node for each layer, of the same name.

    Raises:
        FormatError: layers or settings that aren't supported, all of which are named.
        TypeError: `model` isn't such a model.

    Ref: the description comes from the model's `get_config()`.
    """
    kind, package = type(model).__name__, type(model).__module__.split(".")[0]
    if package not in ("keras", "tf_keras", "tensorflow") or kind not in ("Sequential", "Functional", "Model"):
        raise TypeError(f"load: expected a Sequential or functional model of Keras, got {type(model).__name__}")
    version = getattr(sys.modules.get(package), "__version__", None)
    source = ModelFile("load", LEGACY, "2" if package == "tensorflow" else version)
    source.config = {"class_name": kind, "config": _plain(model.get_config())}
    for layer in model.layers:
        names = []
        for number, weight in enumerate([*layer.trainable_weights, *layer.non_trainable_weights]):
            leaf = str(getattr(weight, "path", None) or weight.name).split("/")[-1]
            name = f"{layer.name}/{number}/{leaf}"
            source.weights[name] = _numbers(weight)
            names.append(name)
        source.orders[layer.name] = names
    described = _described(source, None)
    network = _wired(source, described, Built(source, described))
    _check_all_used(source)
    return network


def save(network: Network, path: str) -> None:
    """Write a network so that Keras 3 can load it: as `.keras`, or as HDF5 with any other suffix.

    Args:
        network: the network to write.
        path: the file to write; an existing file is replaced in one step.

    Raises:
        ValueError: nodes that Keras has no layers for, all of which are named; a path that ends in `.weights.h5`.
        OSError: the file can't be written.
        ModuleNotFoundError: h5py is missing.
    """
    from cellstack.formats.keras.writer import write

    if path.lower().endswith(".weights.h5"):
        raise ValueError(
            f"save: {path!r}: Keras reads files that end in .weights.h5 as weights without a model; leave out .weights"
        )
    check_unedited(network, NAME)
    write(network, path)


def _numbers(weight: Any) -> Any:
    value = weight.value if hasattr(weight, "value") and not callable(weight.value) else weight
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
    return np.array(value.numpy() if hasattr(value, "numpy") else value)


def _plain(config: Any) -> Any:
    """Return a description with JSON's types only: `get_config` also returns tuples."""
    if isinstance(config, dict):
        return {str(key): _plain(value) for key, value in config.items()}
    return [_plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def _described(source: ModelFile, architecture: Architecture | None) -> Model:
    config = source.config
    if architecture is not None:
        if config is not None:
            raise FormatError(f"{source.path}: architecture is for files of weights only; this file holds its own")
        config = _given(architecture)
    if config is None:
        raise FormatError(
            f"{source.path}: expected a model, found weights only: pass the model's JSON to "
            "cellstack.formats.keras.load(path, architecture=...)"
        )
    model = model_of(source, config)
    if source.version is None and source.layout == LEGACY:
        modern = any(word in layer.config for layer in model.layers for word in WORDS_2)
        source.version = "2" if modern else "1"
        source.assumed = f"Keras {source.version}, as the file doesn't specify the version"
    return model


def _given(architecture: Architecture) -> Any:
    if isinstance(architecture, (dict, list)):
        return _plain(architecture)
    text = fspath(architecture)
    if text.lstrip()[:1] in ("{", "["):
        return parse("architecture", text)
    with open(text, "rb") as file:
        if os.fstat(file.fileno()).st_size > 1 << 26:
            raise FormatError(f"{text}: the JSON is larger than 64 MiB")
        return parse(text, file.read())


def _metadata(source: ModelFile) -> dict[str, Any]:
    about: dict[str, Any] = {"format": "keras"}
    about["producer"] = f"Keras {source.version or source.major}"
    if source.assumed:
        about["assumed"] = source.assumed
    return {"source": about}


def _wired(source: ModelFile, model: Model, built: Built) -> Network:
    try:
        return Reader(built, source.major).network(model, source.note | _metadata(source))
    except ProblemsError as error:
        hint = f"; {HINT}" if built.recurrent else ""
        raise FormatError(f"{source.path}: expected layers that are supported, found: {error}{hint}") from None
    except (ValueError, TypeError) as error:  # layers whose shapes don't match
        text = str(error).removeprefix(f"{source.path}: ")
        raise FormatError(f"{source.path}: {text[:300]}") from None


def _check_all_used(source: ModelFile) -> None:
    unused = source.unused
    if unused:
        raise FormatError(f"{source.path}: no layer uses the weights {', '.join(map(short, unused[:20]))}")


def _extract_cudnn(source: ModelFile) -> dict[str, Network]:
    found, unknown = {}, []
    for name, weights in source.orders.items():
        leaves = {weight.split("/")[-1].split(":")[0]: weight for weight in weights}
        if "recurrent_kernel" not in leaves:
            continue
        node = None
        if leaves.keys() == {"kernel", "recurrent_kernel", "bias"} and len(weights) == 3:
            node = found_cudnn(
                f"{source.path}: layer {short(name)}",
                {leaf: source.take(leaves[leaf]) for leaf in ("kernel", "recurrent_kernel", "bias")},
            )
        if node is None:
            unknown.append(name)
        else:
            key = name.replace("/", ".")
            found[key] = chain([node], _metadata(source), key)
    if unknown or not found:
        what = f"layers {', '.join(map(short, unknown))} with unknown activations" if unknown else "none"
        raise FormatError(
            f"{source.path}: expected the weights of cuDNN layers, found {what}: pass the model's JSON to "
            "cellstack.formats.keras.extract(path, architecture=...)"
        )
    return found
