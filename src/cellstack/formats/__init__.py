"""File formats, one adapter each. To add a format, add a module here and its name to `ADAPTERS`.

An adapter has `NAME` and `SUFFIXES`, and three functions: `recognises(head)` returns whether a file that starts with
these bytes may be in its format, `load(path)` returns a Network or raises `FormatError`, and `extract(path)` returns
the recurrent parts of a file by name, even where the rest isn't supported. `save(network, path)` writes a network,
unless the format can only be read. `OPTIONS` lists the names of further arguments that `load` takes, if there are any.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.formats.files import NATIVE, check_readable, existing_file
from cellstack.network import Network

ADAPTERS = ("safetensors", "keras", "pytorch", "onnx", "json")
HEAD_BYTES = 64  # of a file, passed to `recognises`


def adapters() -> list[Any]:
    """Return the adapter modules; each imports its own dependencies only when it is used."""
    return [import_module(f"cellstack.formats.{name}") for name in ADAPTERS]


def writers() -> list[Any]:
    """Return the adapters that can write networks."""
    return [adapter for adapter in adapters() if hasattr(adapter, "save")]


def listed(some: Iterable[Any]) -> str:
    """Return the names and suffixes of adapters as one text for messages."""
    return ", ".join(f"{adapter.NAME} ({' '.join(adapter.SUFFIXES)})" for adapter in some)


def adapter_of(path: str) -> Any:
    """Return the adapter for the file at `path`, determined by its content, or else by its suffix.

    Raises:
        FormatError: no adapter recognises the file.
        OSError: the file can't be read, or isn't a regular file, such as a named pipe.
    """
    check_readable(path)
    if os.path.isdir(path):
        return import_module("cellstack.formats.folders")
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    candidates = [adapter for adapter in adapters() if adapter.recognises(head)]
    by_suffix = [adapter for adapter in adapters() if PurePath(path).suffix.lower() in adapter.SUFFIXES]
    # Files of two formats may start with the same bytes, so the suffix decides between them. A damaged file may not be
    # recognised at all: the adapter of its suffix then reports what is wrong.
    preferred = [adapter for adapter in candidates if adapter in by_suffix]
    for adapter in (*preferred, *candidates, *by_suffix):
        return adapter
    raise FormatError(f"{path}: expected one of {listed(adapters())}, found a file that begins with {head[:8]!r}")


def load(source: Any, **options: Any) -> Network:
    """Return the network in a file, or of a PyTorch module or a Keras model in memory.

    A file's format is detected from its content, and no code from it is run. Of a model in memory, the weights are
    copied. For the modules that are supported see `cellstack.formats.pytorch.of_module`; a Keras model is a built
    Sequential or functional model of Keras 2 or 3, on any backend.

    Args:
        source: the path of the file, of which `.safetensors`, the suffix of the native format, may be omitted; or the
            model.
        **options: what the file doesn't specify, for the formats below; None is the same as leaving an option out.
            PyTorch's weights: `order`, the modules' names in the order in which they run, where the file doesn't
            specify it, as with the weights of a custom class: `["lstm", "final", "fc"]`. `"final"` means the final
            hidden states of the recurrent module before it, forward then backward (`h[-2]` and `h[-1]` if it is
            bidirectional, else `h[-1]`), and `"last"` the last step (`y[:, -1]`); after a bidirectional layer these
            differ, and `load` warns about `"last"`. `"mean"` and `"max"` are taken over all steps. The list may also
            hold the name of an activation such as `"relu"`, or a node. `"words:Embedding"` and `"head:Linear"`
            distinguish an embedding from a Linear without a bias. Any other operation between the class's modules has
            to be listed too. `verify(network, module)` compares the result with the model.
            ONNX: `constants`, the values of inputs by name, `{"sr": 16000}`; `weights`, the same for inputs that are
            weights; `frames`, the number of values in a frame of an input; `context`, how many of a frame's last
            values are repeated at the start of the next frame.

    Returns:
        The network, with its names and metadata. An ONNX file with operators that a Network doesn't have, and with
        recurrent operators that the kernel runs, becomes a `cellstack.formats.onnx.runtime.RuntimeModel`, with a
        warning: ONNX Runtime runs all of its other operators.

    Raises:
        TypeError: an option that the file's format doesn't have, or an order for a file that specifies its own; a
            module, a setting or another object that isn't supported.
        ShapeError: modules whose widths or ranks don't match.
        FormatError: the file is damaged, in an unsupported format, or holds operations that a Network can't run; the
            message names the file, the tensor or operation, what was expected and what was found.
        ModuleNotFoundError: the package that reads the format isn't installed; the message names it.
        OSError: the file can't be read, or isn't a regular file, such as a named pipe.
    """
    try:
        return _read(source, options)
    except FormatError as error:
        given = any(value is not None for value in options.values())
        if given or not isinstance(source, (str, PathLike)) or os.path.isdir(source):
            raise
        adapter = adapter_of(path := existing_file(source))
        model = adapter.runtime_model(path, str(error)) if hasattr(adapter, "runtime_model") else None
        if model is None:
            raise
        warnings.warn(f"load: {error}; ONNX Runtime runs all but the recurrent operators: see plan()", stacklevel=2)
        return model


def load_network(source: Any, **options: Any) -> Network:
    """Return what `load` returns, but refuse files of which ONNX Runtime would run a part.

    Args:
        source, **options: as for `load`.

    Raises:
        FormatError and others: as `load` does.
    """
    return _read(source, options)


def _read(source: Any, given: dict[str, Any]) -> Network:
    """Return the network of a file or a model."""
    options = {name: value for name, value in given.items() if value is not None}
    if not isinstance(source, (str, PathLike)):
        if options:
            raise TypeError(f"load: {', '.join(options)}: only files take options, got a {type(source).__name__}")
        return _of_model(source)
    path = existing_file(source)
    adapter = adapter_of(path)
    known = getattr(adapter, "OPTIONS", ())
    for name in options:
        if name not in known:
            has = f"the option{'s' * (len(known) > 1)} {', '.join(known)}" if known else "no options"
            raise TypeError(f"load: {path}: {adapter.NAME} files take {has}, got {name}")
    return adapter.load(path, **options)


def _of_model(model: Any) -> Network:
    """Return the network of a model in memory, by an adapter whose framework the caller has imported."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    of_keras = keras is not None and isinstance(model, keras.layers.Layer)  # with PyTorch's backend, a module too
    if callable(getattr(model, "to_nodes", None)) or (
        torch is not None and isinstance(model, torch.nn.Module) and not of_keras
    ):
        return import_module("cellstack.formats.pytorch").of_module(model)
    if of_keras or callable(getattr(model, "get_config", None)):
        return import_module("cellstack.formats.keras").of_model(model)
    raise TypeError(f"load: expected a path, a PyTorch module or a Keras model, got {type(model).__name__}")


def extract(path: str | PathLike[str]) -> dict[str, Network]:
    """Return the recurrent parts of a file by name, even where the rest of it isn't supported.

    Args:
        path: the file, as for `load`.

    Returns:
        One network for each recurrent part, under its name in the file. A stack of layers is one part where the file
        stores it as one. For PyTorch's weights, the networks of the Linear modules follow.

    Raises:
        FormatError, ModuleNotFoundError, OSError: see `load`; FormatError also for a file without a recurrent part.
    """
    path = existing_file(path)
    adapter = adapter_of(path)
    parts = adapter.extract(path)
    if not parts:
        raise FormatError(f"{path}: expected recurrent parts, found none")
    return parts


def save(network: Network, path: str | PathLike[str]) -> None:
    """Write a network to a file atomically; the suffix determines the format.

    Args:
        network: the network to write.
        path: the file to write; an existing file is replaced in one step.

    Raises:
        ValueError: no format that can be written has this suffix, or the format can't represent the network.
        OSError: the file can't be written.
    """
    path = fspath(path)
    for adapter in writers():
        if PurePath(path).suffix.lower() in adapter.SUFFIXES:
            try:
                adapter.save(network, path)
            except ValueError as error:
                if NATIVE not in str(error):
                    error.args = (f"{error}; {NATIVE} supports every network",)
                raise
            return
    bare = PurePath(path).name and not PurePath(path).suffix
    such = f": {NATIVE} supports every network, such as {path + NATIVE!r}" if bare else ""
    raise ValueError(f"save: expected a path that ends as one of {listed(writers())}, got {path!r}{such}")
