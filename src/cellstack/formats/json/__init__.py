"""JSON that models of audio come in: [RTNeural](../../../docs/models.md)'s, neural-amp-modeler's, and state dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.formats.files import short
from cellstack.formats.json import nam, rtneural
from cellstack.formats.json.values import array_of
from cellstack.formats.pytorch import network_of, networks_of
from cellstack.layout import Array
from cellstack.network import Network
from cellstack.spec import FormatError, ShapeError

NAME = "JSON"
SUFFIXES = (".json", ".nam")


def recognises(head: bytes) -> bool:
    """Return whether a file that begins with `head` looks like JSON: an object."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _read(path: str) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        FormatError: it isn't JSON, or no object.
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, found {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _tensors(path: str, found: Mapping[str, Any]) -> dict[str, Array]:
    """Return an object of arrays by name, as a state dict is written."""
    return {name: array_of(f"{path}: {short(name)}", value).astype(np.float32) for name, value in found.items()}


def _is_tensors(found: Mapping[str, Any]) -> bool:
    return bool(found) and all(isinstance(value, list) for value in found.values())


def load(path: str) -> Network:
    """Read a network out of JSON: its keys tell which kind it is.

    Args:
        path: RTNeural's model files, with `in_shape` and `layers`; neural-amp-modeler's `.nam`, with `architecture`
            LSTM or Linear; or a state dict of PyTorch's as lists, of one recurrent module.

    Returns:
        The network, float32. What the file says beside its layers, the sample rate say, is in its metadata.

    Raises:
        FormatError: another kind of JSON, or a layer that a Network hasn't, which is named.
        OSError: the file can't be read.
    """
    found = _read(path)
    try:
        if "layers" in found and "in_shape" in found:
            return rtneural.network_of(path, found)
        if "architecture" in found:
            return nam.network_of(path, found)
    except ShapeError as error:
        raise FormatError(f"{path}: expected layers that go together, found {str(error)[:300]}") from None
    if _is_tensors(found):
        return network_of(_tensors(path, found), path)
    raise _unknown(path, found)


def extract(path: str) -> dict[str, Network]:
    """Return the recurrent layers of a file by name.

    Args:
        path: as for `load`; of a state dict every recurrent module.

    Returns:
        One network a layer.

    Raises:
        FormatError, OSError: see `load`.
    """
    found = _read(path)
    if _is_tensors(found) and "layers" not in found:
        return networks_of(_tensors(path, found), path)
    if "layers" in found and "in_shape" in found:
        return rtneural.parts_of(path, found)
    network = load(path)
    return {
        name: Network([node], [name]) for name, node in zip(network.names, network.nodes, strict=True) if node.cells
    }


def _unknown(path: str, found: Mapping[str, Any]) -> FormatError:
    kinds = "in_shape and layers (RTNeural), architecture (neural-amp-modeler), or tensors by name"
    return FormatError(f"{path}: expected JSON with {kinds}, found the keys {short(list(found), 200)}")


def save(network: Network, path: str) -> None:
    """Refuse to write: these formats are read alone.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"save: expected a format that is written, got {path!r}: JSON of RTNeural and .nam are read alone")
