"""Files: one adapter a format. Adding a format is adding a module here and its name to `ADAPTERS`.

An adapter has `NAME` and `SUFFIXES`, and four functions: `recognises(head)` says whether a file that begins with these
bytes is of its kind, `load(path)` returns a Network or raises `FormatError`, `save(network, path)` writes one;
`extract(path)` returns the recurrent parts of a file by name, whatever else it holds. `OPTIONS`, where there are
some, are names that `load` takes besides.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any

from cellstack.formats.files import check_readable
from cellstack.network import Network
from cellstack.spec import FormatError

ADAPTERS = ("safetensors", "keras", "pytorch", "onnx", "json")
HEAD_BYTES = 64  # what `recognises` gets to see


def adapters() -> list[Any]:
    """Return the adapter modules; an adapter imports what it needs when it is used."""
    return [import_module(f"cellstack.formats.{name}") for name in ADAPTERS]


def supported() -> str:
    """Return the formats and their suffixes, as messages name them."""
    return ", ".join(f"{adapter.NAME} ({' '.join(adapter.SUFFIXES)})" for adapter in adapters())


def adapter_of(path: str) -> Any:
    """Return the adapter for the file at `path`, by its content, or where that says nothing by its suffix.

    Raises:
        FormatError: no format is like it.
        OSError: the file can't be read, or is no regular file.
    """
    check_readable(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    candidates = [adapter for adapter in adapters() if adapter.recognises(head)]
    by_suffix = [adapter for adapter in adapters() if PurePath(path).suffix.lower() in adapter.SUFFIXES]
    # Two kinds of file may begin alike; and a damaged one may not look like its kind any more: what its suffix promises
    # says what is wrong with it.
    preferred = [adapter for adapter in candidates if adapter in by_suffix]
    for adapter in (*preferred, *candidates, *by_suffix):
        return adapter
    raise FormatError(f"{path}: expected one of {supported()}, found a file that begins with {head[:8]!r}")


def load(path: str | PathLike[str], **options: Any) -> Network:
    """Read a network from a file; the content tells the format, and no code from the file is run.

    Args:
        path: the file.
        **options: what a file leaves open, for the formats that have such; None: nothing is said.
            PyTorch's weights: `order`, for those that don't say in which order their modules run, such as the weights
            of one's own class: the modules' names, in that order. `"last"` stands for the last step of a sequence,
            which after a bidirectional layer isn't both final states (`load` warns of that), `"relu"` and the like for
            an activation, and a node for itself; `"words:Embedding"` and `"head:Linear"` tell apart what looks alike
            without a bias. What else the class does between its modules is for the caller to know.
            ONNX: `constants`, values of inputs by name, `{"sr": 16000}`; `weights`, the same of inputs that are
            weights; `frames`, how many numbers a frame of an input has; `context`, how many of a frame's last numbers
            stand ahead of the next one.

    Returns:
        The network, with its names and metadata.

    Raises:
        TypeError: options that the file's format doesn't have, or an order for a file that says its own.
        FormatError: the file is damaged, of a format that isn't supported, or holds what a Network can't run, each
            named; names the file, the tensor, what was expected and what was found.
        ModuleNotFoundError: the format is read by a package that isn't installed, which the message names.
        OSError: the file can't be read, or is no regular file, such as a named pipe.
    """
    path = fspath(path)
    adapter = adapter_of(path)
    known = getattr(adapter, "OPTIONS", ())
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in known:
            has = f"the option{'s' * (len(known) > 1)} {', '.join(known)}" if known else "no options"
            raise TypeError(f"load: {path}: expected {has} for a file of {adapter.NAME}, got {name}")
    return adapter.load(path, **options)


def extract(path: str | PathLike[str]) -> dict[str, Network]:
    """Return the recurrent parts of a file by name, whatever else it holds.

    Args:
        path: the file.

    Returns:
        One network a recurrent part, named as it is in the file: a stack of layers is one part where the file says so.
        After them come, out of weights of PyTorch, those of each Linear.

    Raises:
        FormatError, ModuleNotFoundError, OSError: see `load`; also for a file without any recurrent part.
    """
    path = fspath(path)
    adapter = adapter_of(path)
    parts = adapter.extract(path)
    if not parts:
        raise FormatError(f"{path}: expected recurrent parts, found none")
    return parts


def save(network: Network, path: str | PathLike[str]) -> None:
    """Write a network to a file, whole or not at all; the suffix picks the format.

    Args:
        network: what to write.
        path: where to; a file that is there is replaced in one step.

    Raises:
        ValueError: no format has this suffix.
        OSError: the file can't be written.
    """
    path = fspath(path)
    for adapter in adapters():
        if PurePath(path).suffix.lower() in adapter.SUFFIXES:
            adapter.save(network, path)
            return
    raise ValueError(f"save: expected a path that ends as one of {supported()}, got {path!r}")
