"""A stream's state as a safetensors file, so that a stopped stream can continue.

The arrays are `cell_0/h`, `cell_0/c` and so on, and `frames_0/x` for nodes that keep past steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from cellstack.cells.errors import FormatError
from cellstack.formats.files import replacing

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.base import Array
    from cellstack.streaming.stream import Stream

KEY = "cellstack_state"
VERSION = "1"


def _named(network: Network, state: Sequence[Any]) -> dict[str, Array]:
    """Return the arrays of a state by name: those of the cells, then those of other nodes with memory."""
    count, named = len(network.stateful), {}
    for number, arrays in enumerate(state):
        prefix = f"cell_{number}" if number < count else f"frames_{number - count}"
        named |= {f"{prefix}/{name}": array for name, array in zip(arrays._fields, arrays, strict=True)}
    return named


def state_to_bytes(network: Network, state: Sequence[Any], **metadata: str) -> bytes:
    """Return a state of a stream or a session as the bytes of a file.

    Args:
        network: the network.
        state: as returned by `Stream.state` or `Sessions.state`.
        **metadata: further entries for the file's `__metadata__`.
    """
    tensors = {name: np.ascontiguousarray(array) for name, array in _named(network, state).items()}
    return to_bytes(tensors, metadata={KEY: VERSION, **metadata})


def state_from(
    data: bytes, network: Network, like: Sequence[Any], name: str = "state"
) -> tuple[tuple[Any, ...], dict[str, str]]:
    """Read what `state_to_bytes` returned.

    Args:
        data: the bytes.
        network: the network.
        like: the initial state, for the expected shapes and dtypes. Only where it is infinite, as before the first
            steps of a pool, may the state be so.
        name: the name for error messages.

    Returns:
        the state, and the file's metadata.

    Raises:
        FormatError: the data are damaged, hold no state, the state of another network or batch size, or numbers that
            aren't finite.
    """
    expected = _named(network, like)
    try:
        found = from_bytes(data)
    except SafetensorError as error:
        raise FormatError(f"{name}: expected a safetensors file, found {str(error)[:200]!r}") from None
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    version = metadata.get(KEY)
    if version != VERSION:
        shown = "none" if version is None else repr(version[:20])
        raise FormatError(f"{name}: expected {KEY} of version {VERSION} under __metadata__, found {shown}")
    if found.keys() != expected.keys():
        tensor = min(found.keys() ^ expected.keys())
        what = "is missing" if tensor in expected else "belongs to no cell"
        raise FormatError(f"{name}: tensor {tensor[:80]!r} {what}: this isn't a state of this network")
    for tensor, array in expected.items():
        want, got = (f"{part.dtype} {list(part.shape)}" for part in (array, found[tensor]))
        if want != got:
            raise FormatError(f"{name}: tensor {tensor!r}: expected {want}, found {got}")
        if not (np.isfinite(found[tensor]) | (found[tensor] == array)).all():
            raise FormatError(f"{name}: tensor {tensor!r}: expected finite numbers, found NaN or infinity")
    arrays = iter([found[tensor] for tensor in expected])
    return tuple(type(entry)(*(next(arrays) for _ in entry)) for entry in like), metadata


def save_state(path: str | PathLike[str], stream: Stream) -> None:
    """Write a stream's state atomically.

    Args:
        path: the file to write; an existing file is replaced in one step.
        stream: the stream.

    Raises:
        OSError: the file can't be written.
    """
    data = state_to_bytes(stream.network, stream.state)
    with replacing(path) as file:
        file.write(data)


def load_state(path: str | PathLike[str], stream: Stream) -> tuple[Any, ...]:
    """Read a state that `save_state` wrote.

    Args:
        path: the file.
        stream: the stream that is to continue from it.

    Returns:
        A state to assign to `Stream.state`.

    Raises:
        FormatError: the file is damaged, holds no state, the state of another network or batch size, or numbers that
            aren't finite.
        OSError: the file can't be read.

    >>> import tempfile
    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> net = Network([Recurrent((Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8)), np.ones((2, 8))),))])
    >>> stream, other = net.stream(), net.stream()
    >>> y = stream.step([[1.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(f"{folder}/state", stream)
    ...     other.state = load_state(f"{folder}/state", other)
    >>> bool((other.step([[2.0]]) == stream.step([[2.0]])).all())
    True
    """
    initial = stream.fork()
    initial.reset()
    return state_from(Path(path).read_bytes(), stream.network, initial.state, fspath(path))[0]
