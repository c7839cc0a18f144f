"""Writes a network as a state dict in the format of `torch.save`, without torch, for `load_state_dict` of `nn.LSTM`.

The file is an uncompressed zip: `archive/data.pkl` is a pickle that lists every tensor and its storage,
`archive/data/0` and so on are the storages; two more members hold the byte order and the format's version. A third one
holds the network's metadata as JSON, if it has any.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from cellstack.cells.layout import Array, CellArrays, to_rows
from cellstack.formats.files import check_unedited, replacing
from cellstack.formats.pytorch.archive import METADATA
from cellstack.network import Network
from cellstack.nodes import Node
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage"}
STORED = ("input_size", "units", "kind", "use_bias", "proj_size", "heads")  # settings that a state dict implies
ALIGNMENT = 64  # of storages in the file, so that they can be memory-mapped
VERSION = b"3\n"


def save(network: Network, path: str) -> None:
    """Write a network as a state dict, atomically.

    Args:
        network: consecutive `Recurrent` nodes of equal cells, or `Bidirectional` nodes of single cells, as in
            `nn.LSTM`, `nn.GRU` and `nn.RNN`. Its names aren't written: a state dict has no place for them.
        path: the file to write.

    Raises:
        ValueError: a node or setting that PyTorch's layers don't have, which is named.
        OSError: the file can't be written.
    """
    tensors = state_dict(network)
    with replacing(path) as file:
        _write(file, tensors, network.metadata)


def state_dict(network: Network) -> dict[str, Array]:
    """Return the network's arrays with PyTorch's names and shapes.

    Args:
        network: as for `save`.

    Returns:
        Arrays by name, `weight_ih_l0 [4H, I]` and so on.

    Raises:
        ValueError: as for `save`.
    """
    check_unedited(network, "a state dict")
    pairs: list[tuple[str, Cell]] = []
    both, before = isinstance(network.nodes[0], Bidirectional), network.inputs[0]
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        if not isinstance(node, (Recurrent, Bidirectional)) or isinstance(node, Bidirectional) != both:
            raise _refuse(name, node, "expected only Recurrent or only Bidirectional nodes")
        if sources != (before,):
            raise _refuse(name, node, f"expected {before} as its input, the output of the layer before")
        before = name
        if isinstance(node, Bidirectional):
            pairs += _both(name, node, len(pairs) // 2)
        else:
            pairs += [(f"_l{len(pairs) + layer}", cell) for layer, cell in enumerate(_cells(name, node))]
    if network.outputs != (before,):
        raise ValueError(f"save: expected one output, that of the last layer, got {', '.join(network.outputs)}")
    first = pairs[0][1]
    tensors: dict[str, Array] = {}
    for suffix, cell in pairs:
        for what in ("kind", "units", "use_bias", "proj_size"):
            one, other = getattr(first.spec, what), getattr(cell.spec, what)
            if one != other:
                raise ValueError(f"save: expected {what}={one!r} in every layer, as PyTorch has it, got {other!r}")
        tensors |= {f"{name}{suffix}": array for name, array in _arrays(cell).items()}
    return tensors


def _refuse(name: str, node: Node, why: str) -> ValueError:
    return ValueError(f"save: {name} ({type(node).__name__}): {why}; PyTorch files only hold one recurrent module")


def _cells(name: str, node: Recurrent, backwards: bool = False) -> tuple[Cell, ...]:
    """Return the cells of a stack, after checking that PyTorch's modules can represent it."""
    if not node.return_sequences or node.residual or node.go_backwards != backwards:
        raise _refuse(name, node, "expected return_sequences, and neither residual nor go_backwards")
    if node.zero_output_for_mask and not backwards:
        raise _refuse(name, node, "expected no zero_output_for_mask")
    for cell in node.cells:
        if "torch" not in cell.spec.of_kind.names:
            raise _refuse(name, node, f"expected cells as PyTorch has them, got {cell.spec.of_kind.title}")
        usual = {"reset_after": True, "activation": "tanh", "recurrent_activation": "sigmoid"}
        other = [key for key, value in cell.spec.settings.items() if key not in STORED and usual.get(key) != value]
        if other:
            settings = ", ".join(f"{key}={cell.spec.settings[key]!r}" for key in other)
            raise _refuse(name, node, f"expected cells as PyTorch has them, got {settings}")
    return tuple(cell.one_head for cell in node.cells)


def _both(name: str, node: Bidirectional, layer: int) -> list[tuple[str, Cell]]:
    if node.merge_mode != "concat" or len(node.cells) != 2:
        raise _refuse(name, node, "expected one cell per direction, with merge_mode concat")
    plain = Recurrent(node.forward.cells, node.forward.return_sequences, residual=node.forward.residual)
    (ahead,), (back,) = _cells(name, plain), _cells(name, node.backward, backwards=True)
    return [(f"_l{layer}", ahead), (f"_l{layer}_reverse", back)]


def _arrays(cell: Cell) -> dict[str, Array]:
    """Return a cell's arrays by PyTorch's names, transposed, and with two biases whose sum is the cell's."""
    arrays, order = CellArrays(cell.kernel, cell.recurrent_kernel, cell.bias), cell.spec.of_kind.names["torch"].order
    weight, recurrent, bias = to_rows(cell.spec.kind, arrays, order)
    arrays = {"weight_ih": weight, "weight_hh": recurrent}
    if bias is not None:
        arrays["bias_ih"], arrays["bias_hh"] = bias if cell.spec.two_biases else (bias, np.zeros_like(bias))
    if cell.projection is not None:
        arrays["weight_hr"] = cell.projection.T
    return arrays


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _name(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(8, "little")
    return b"\x8a" + bytes((len(data),)) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _pickle(tensors: dict[str, Array]) -> bytes:
    """Return the pickle (protocol 2) of an ordered dict of tensors, each with its own storage."""
    empty = _name("collections.OrderedDict") + b")R"
    entries = []
    for number, (name, array) in enumerate(tensors.items()):
        kind = _name(f"torch.{STORAGES[array.dtype.name]}")
        storage = _tuple(_text("storage"), kind, _text(str(number)), _text("cpu"), _whole(array.size)) + b"Q"
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        shape = (_tuple(*map(_whole, sizes)) for sizes in (array.shape, strides))
        call = _tuple(storage, _whole(0), *shape, b"\x89", empty)
        entries.append(_text(name) + _name("torch._utils._rebuild_tensor_v2") + call + b"R")
    return b"\x80\x02" + empty + b"(" + b"".join(entries) + b"u."


def _write(file: Any, tensors: dict[str, Array], metadata: dict[str, Any]) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:

        def put(name: str, data: bytes) -> None:
            member = zipfile.ZipInfo(f"archive/{name}")  # a fixed date, so that equal networks give equal files
            padding = -(file.tell() + 30 + len(member.filename) + 4) % ALIGNMENT
            member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            archive.writestr(member, data)

        put("data.pkl", _pickle(tensors))
        put("byteorder", b"little")
        for number, array in enumerate(tensors.values()):
            put(f"data/{number}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        put("version", VERSION)
        if metadata:
            put(METADATA, json.dumps(metadata).encode())
