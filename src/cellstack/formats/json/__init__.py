"""JSON formats of audio models: [RTNeural](../../../docs/models.md), neural-amp-modeler, and state dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError, ShapeError
from cellstack.cells.layout import Array
from cellstack.formats.files import short
from cellstack.formats.json import nam, rtneural
from cellstack.formats.json.values import array_of
from cellstack.formats.pytorch import network_of, networks_of
from cellstack.network import Network

NAME = "JSON"
SUFFIXES = (".json", ".nam")


def recognises(head: bytes) -> bool:
    """Return whether a file that starts with `head` looks like a JSON object."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _read(path: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FormatError: it isn't JSON, or isn't an object.
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
    """Return the arrays of a state dict by name."""
    return {name: array_of(f"{path}: {short(name)}", value).astype(np.float32) for name, value in found.items()}


def _is_tensors(found: Mapping[str, Any]) -> bool:
    return bool(found) and all(isinstance(value, list) for value in found.values())


def load(path: str) -> Network:
    """Read a network from JSON; the format is detected from its keys.

    Args:
        path: a model file of RTNeural, with `in_shape` and `layers`; a `.nam` of neural-amp-modeler, with
            `architecture` LSTM or Linear; or a PyTorch state dict of one recurrent module, as lists.

    Returns:
        The network, float32. Other entries of the file, such as the sample rate, are in its metadata.

    Raises:
        FormatError: another kind of JSON, or an unsupported layer, which is named.
        OSError: the file can't be read.
    """
    found = _read(path)
    try:
        if "layers" in found and "in_shape" in found:
            return rtneural.network_of(path, found)
        if "architecture" in found:
            return nam.network_of(path, found)
    except ShapeError as error:
        raise FormatError(f"{path}: the layers' shapes don't match: {str(error)[:300]}") from None
    if _is_tensors(found):
        return network_of(_tensors(path, found), path)
    raise _unknown(path, found)


def extract(path: str) -> dict[str, Network]:
    """Return the recurrent layers of a file by name.

    Args:
        path: as for `load`; a state dict may have several recurrent modules.

    Returns:
        One network for each layer.

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
