"""Tensors of the Open Inference Protocol: bytes or JSON values to arrays, and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.serve.models import ServeError
from cellstack.serve.texts import array_of, text_of_array

MOST_AXES = 8

# BF16, which NumPy lacks, is read as the upper 16 bits of a float32.
DATATYPES = {
    "BOOL": np.dtype("?"),
    **{
        f"{sign}INT{8 * size}": np.dtype(f"<{sign.lower() or 'i'}{size}") for sign in ("", "U") for size in (1, 2, 4, 8)
    },
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}


class Tensor(NamedTuple):
    """An input of a request.

    Attributes:
        datatype: such as FP32.
        array: its values; of float32 for BF16.
    """

    datatype: str
    array: NDArray[Any]


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype of any byte order."""
    return NAMES[dtype.newbyteorder("<")]


def _checked(name: str, datatype: Any, shape: Any) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return the dtype, shape and number of values of a declared tensor. No memory is allocated for it."""
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        known = ", ".join(DATATYPES)
        raise ServeError(400, f"{name}: expected one of the datatypes {known}, got {datatype!r:.40}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ServeError(400, f"{name}: expected a shape of whole numbers from 0 to 2^31 - 1, got {shape!r:.80}")
    if len(shape) > MOST_AXES:
        raise ServeError(400, f"{name}: expected a shape of at most {MOST_AXES} axes, got {len(shape)}")
    return DATATYPES[datatype], tuple(shape), math.prod(shape)


def from_bytes(name: str, datatype: Any, shape: Any, data: bytes | memoryview) -> Tensor:
    """Read a tensor from little-endian values in row-major order.

    Raises:
        ServeError: an unknown datatype, an invalid shape, or another number of bytes than the shape needs.
    """
    dtype, shape, count = _checked(name, datatype, shape)
    if len(data) != count * dtype.itemsize:
        needs = f"{count * dtype.itemsize} bytes for {datatype} {list(shape)}"
        raise ServeError(400, f"{name}: expected {needs}, got {len(data)}")
    array = np.frombuffer(data, np.uint8 if datatype == "BOOL" else dtype).reshape(shape)
    if datatype == "BOOL":  # a bool of another byte than 0 or 1 is undefined in NumPy
        array = array != 0
    elif datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return Tensor(datatype, array)


def from_values(name: str, datatype: Any, shape: Any, values: Any) -> Tensor:
    """Read a tensor from a list, flat or nested, in row-major order.

    Raises:
        ServeError: an unknown datatype, an invalid shape, another number of values than the shape needs, or values that
            the datatype can't represent. Fractions are rounded to the nearest value of a floating-point datatype.
    """
    dtype, shape, count = _checked(name, datatype, shape)
    if datatype == "BF16":
        raise ServeError(400, f"{name}: BF16 is only supported as binary data")
    if not isinstance(values, list):
        raise ServeError(400, f"{name}: expected data as a list, got {type(values).__name__}")
    try:
        array = array_of(values)
    except (ValueError, OverflowError):
        array = np.array(None)
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if array.size != count and array.dtype != object:
        raise ServeError(400, f"{name}: expected {count} values for the shape {list(shape)}, got {array.size}")
    if array.size and array.dtype.kind not in kinds:
        raise ServeError(400, f"{name}: expected values of the datatype {datatype}")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
    if dtype.kind == "f":
        fits = np.isfinite(converted) | ~np.isfinite(array)
    else:
        fits = (converted == array) & ((converted < 0) == (array < 0))
    if not fits.all():
        raise ServeError(400, f"{name}: {array[~fits].flat[0]} is outside the range of {datatype}")
    return Tensor(datatype, converted.reshape(shape))


def as_exactly(name: str, tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a tensor's values in another dtype.

    Raises:
        ServeError: a value isn't exactly representable.
    """
    array = tensor.array
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
        exact = converted.astype(array.dtype) == array
        kinds = array.dtype.kind + dtype.kind
        if kinds == "ff":
            exact |= np.isnan(array)
        elif "f" in kinds and "b" not in kinds:  # conversion to an integer that is out of range is undefined
            floats, whole = (array, dtype) if dtype.kind in "iu" else (converted, array.dtype)
            floats = floats.astype(np.float64)
            exact &= (floats >= float(np.iinfo(whole).min)) & (floats < float(np.iinfo(whole).max // 2 + 1) * 2)
        elif kinds[0] in "iu":
            exact &= (array < 0) == (converted < 0)
    if not exact.all():
        wanted = datatype_of(dtype)
        raise ServeError(
            400, f"{name}: {array[~exact].flat[0]} of {tensor.datatype} isn't exactly representable: send {wanted}"
        )
    return converted


def to_bytes(array: NDArray[Any]) -> bytes:
    """Return an array as little-endian values in row-major order."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_json(name: str, array: NDArray[Any]) -> str:
    """Return an array as the JSON of a flat list in row-major order.

    Raises:
        ServeError: NaN or infinity, for which JSON has no number.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServeError(400, f"{name} contains NaN or infinity, which JSON can't represent: request binary data")
    return text_of_array(array.ravel())
