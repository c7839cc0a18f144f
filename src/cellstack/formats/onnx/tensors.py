"""The tensors of an ONNX file as arrays: their sizes are checked against the bytes that are there."""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np

from cellstack.cells.bfloat16 import widened
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.formats.files import short

KNOWN_TYPES = {  # TensorProto's data types: the NumPy name, and the field of data that isn't raw
    1: ("<f4", "float_data"),
    2: ("u1", "int32_data"),
    3: ("i1", "int32_data"),
    4: ("<u2", "int32_data"),
    5: ("<i2", "int32_data"),
    6: ("<i4", "int32_data"),
    7: ("<i8", "int64_data"),
    9: ("?", "int32_data"),
    10: ("<f2", "int32_data"),
    11: ("<f8", "double_data"),
    12: ("<u4", "uint64_data"),
    13: ("<u8", "uint64_data"),
    16: ("<u2", "int32_data"),  # bfloat16: the upper 16 bits of a float32
}
BFLOAT16 = 16
MOST_AXES = 32


class Tensors:
    """Reads the tensors of one file as arrays; external tensors must be in its folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def array(self, tensor: Any) -> Array:
        """Return a TensorProto as an array.

        Raises:
            FormatError: an unknown type, sizes that don't match the data, data outside the file's folder.
        """
        where = f"{self.path}: tensor {short(tensor.name)}"
        if tensor.data_type not in KNOWN_TYPES:
            raise FormatError(f"{where}: data type {tensor.data_type} isn't supported")
        dtype, field_name = KNOWN_TYPES[tensor.data_type]
        dims = list(tensor.dims)
        if len(dims) > MOST_AXES or any(axis < 0 for axis in dims):
            raise FormatError(f"{where}: expected at most {MOST_AXES} axes, none negative, found {short(dims)}")
        count, width = prod(dims), np.dtype(dtype).itemsize
        if prod(max(1, axis) for axis in dims) * width >= 1 << 62:  # NumPy's limit, even with an axis of length 0
            raise FormatError(f"{where}: shape {short(dims)} doesn't fit into memory")
        if tensor.data_location == 1:
            array = np.frombuffer(self._elsewhere(where, tensor, count * width), dtype)
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != count * width:
                raise FormatError(
                    f"{where}: expected {count * width} bytes for shape {short(dims)}, found {len(tensor.raw_data)}"
                )
            array = np.frombuffer(tensor.raw_data, dtype)
        else:
            values = getattr(tensor, field_name)
            if len(values) != count:
                raise FormatError(f"{where}: expected {count} numbers for shape {short(dims)}, found {len(values)}")
            array = _typed(where, values, dtype, tensor.data_type)
        if tensor.data_type == BFLOAT16:
            array = widened(array)
        return array.reshape(dims)

    def _elsewhere(self, where: str, tensor: Any, size: int) -> bytes:
        """Return the bytes of an external tensor, from a file in this file's folder."""
        entries = {str(entry.key): str(entry.value) for entry in tensor.external_data}
        location, folder = entries.get("location", ""), os.path.realpath(os.path.dirname(self.path) or ".")
        target = os.path.realpath(os.path.join(folder, location)) if "\0" not in location else ""
        inside = os.path.dirname(target) == folder or target.startswith(folder + os.sep)
        if not location or os.path.isabs(location) or ".." in location.replace("\\", "/").split("/") or not inside:
            raise FormatError(f"{where}: external data must be in this file's folder, found location {short(location)}")
        if not os.path.isfile(target):
            raise FormatError(f"{where}: the file of its data, {short(location)}, doesn't exist")
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
        except ValueError:
            raise FormatError(f"{where}: expected offset and length as numbers, found {short(entries)}") from None
        available = os.path.getsize(target)
        if length != size or offset < 0 or offset + size > available:
            raise FormatError(
                f"{where}: expected {size} bytes within the {available} bytes of {short(location)}, "
                f"found offset {short(offset)} and length {short(length)}"
            )
        with open(target, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _typed(where: str, values: Any, dtype: str, kind: int) -> Array:
    """Return the numbers in a typed field of a tensor."""
    wide = np.array(values, dtype="<u2" if kind == BFLOAT16 else None) if len(values) else np.zeros(0, dtype)
    if dtype == "<f2":  # float16 is stored as its bits
        if len(values) and not (wide.min() >= 0 and wide.max() < 1 << 16):
            raise FormatError(f"{where}: expected the bits of float16, found {short(int(wide.max()))}")
        return wide.astype("<u2").view("<f2")
    if np.dtype(dtype).kind in "iu" and len(values):
        bounds = np.iinfo(dtype)
        if not (bounds.min <= wide.min() and wide.max() <= bounds.max):
            raise FormatError(f"{where}: expected numbers from {bounds.min} to {bounds.max}, found values out of range")
    return wide.astype(dtype)
