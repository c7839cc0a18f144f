"""A stream's state as a safetensors file, so that a stopped stream can continue.

The arrays are `cell_0/h`, `cell_0/c` and so on, and `frames_0/x` for nodes that keep past steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from cellstack.formats.files import replacing
from cellstack.spec import FormatError

if TYPE_CHECKING:
    from cellstack.network import Network
    from cellstack.nodes.base import Array
    from cellstack.streaming.stream import Stream

KEY = "cellstack_state"
VERSION = "1"
DTYPES = {"float32": "F32", "float64": "F64"}


def _named(network: Network, state: Sequence[Any]) -> dict[str, Array]:
    """Return the arrays of a state by name: those of the cells, then those of other nodes with memory."""
    count, named = len(network.cells), {}
    for number, arrays in enumerate(state):
        prefix = f"cell_{number}" if number < count else f"frames_{number - count}"
        named |= {f"{prefix}/{name}": array for name, array in zip(arrays._fields, arrays, strict=True)}
    return named


def save_state(path: str | PathLike[str], stream: Stream) -> None:
    """Write a stream's state atomically.

    Args:
        path: the file to write; an existing file is replaced in one step.
        stream: the stream.

    Raises:
        OSError: the file can't be written.
    """
    tensors = {name: np.ascontiguousarray(array) for name, array in _named(stream.network, stream.state).items()}
    with replacing(path) as file:
        file.write(to_bytes(tensors, metadata={KEY: VERSION}))


def load_state(path: str | PathLike[str], stream: Stream) -> tuple[Any, ...]:
    """Read a state that `save_state` wrote.

    Args:
        path: the file.
        stream: the stream that is to continue from it.

    Returns:
        A state to assign to `Stream.state`.

    Raises:
        FormatError: the file is damaged, holds no state, or the state of another network or batch size.
        OSError: the file can't be read.

    >>> import tempfile
    >>> from cellstack import Cell, CellSpec, Network, Recurrent
    >>> net = Network([Recurrent((Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8)), np.ones((2, 8))),))])
    >>> stream, other = net.stream(), net.stream()
    >>> y = stream.step([[1.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(f"{folder}/state", stream)
    ...     other.state = load_state(f"{folder}/state", other)
    >>> bool((other.step([[2.0]]) == stream.step([[2.0]])).all())
    True
    """
    path, state = fspath(path), stream.state
    expected = _named(stream.network, state)
    try:
        with safe_open(path, framework="numpy") as file:
            version = (file.metadata() or {}).get(KEY)
            if version != VERSION:
                found = "none" if version is None else repr(version[:20])
                raise FormatError(f"{path}: expected {KEY} of version {VERSION} under __metadata__, found {found}")
            names = set(file.keys())
            if names != expected.keys():
                name = min(names ^ expected.keys())
                what = "is missing" if name in expected else "belongs to no cell"
                raise FormatError(f"{path}: tensor {name[:80]!r} {what}: this isn't a state of this network")
            for name, array in expected.items():
                entry = file.get_slice(name)
                want = f"{DTYPES[array.dtype.name]} {list(array.shape)}"
                got = f"{entry.get_dtype()} {list(entry.get_shape())}"
                if want != got:
                    raise FormatError(f"{path}: tensor {name!r}: expected {want}, found {got}")
            arrays = iter([file.get_tensor(name) for name in expected])
    except SafetensorError as error:
        raise FormatError(f"{path}: expected a safetensors file, found {str(error)[:200]!r}") from None
    return tuple(type(entry)(*(next(arrays) for _ in entry)) for entry in state)
