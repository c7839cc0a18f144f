"""Files: one adapter a format. Adding a format is adding a module here and its name to `ADAPTERS`.

An adapter has `NAME` and `SUFFIXES`, and three functions: `recognises(head)` says whether a file that begins with these
bytes is of its kind, `load(path)` returns a Network or raises `FormatError`, `save(network, path)` writes one. One that
knows files of which only parts are recurrent has `extract(path)` too, which returns these parts by name.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any

from cellstack.network import Network
from cellstack.spec import FormatError

ADAPTERS = ("safetensors",)
HEAD_BYTES = 64  # what `recognises` gets to see


def adapters() -> list[Any]:
    """Return the adapter modules; an adapter imports what it needs when it is used."""
    return [import_module(f"cellstack.formats.{name}") for name in ADAPTERS]


def supported() -> str:
    """Return the formats and their suffixes, as messages name them."""
    return ", ".join(f"{adapter.NAME} ({' '.join(adapter.SUFFIXES)})" for adapter in adapters())


def load(path: str | PathLike[str]) -> Network:
    """Read a network from a file; the content tells the format, and no code from the file is run.

    Args:
        path: the file.

    Returns:
        The network, with its names and metadata.

    Raises:
        FormatError: the file is damaged, or of a format that isn't supported; names the file, the tensor, what was
            expected and what was found.
        OSError: the file can't be read.
    """
    path = fspath(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    candidates = [adapter for adapter in adapters() if adapter.recognises(head)]
    # a damaged file may not look like its kind any more: what its suffix promises says what is wrong with it
    candidates += [adapter for adapter in adapters() if PurePath(path).suffix.lower() in adapter.SUFFIXES]
    if not candidates:
        raise FormatError(f"{path}: expected one of {supported()}, found a file that begins with {head[:8]!r}")
    return candidates[0].load(path)


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
