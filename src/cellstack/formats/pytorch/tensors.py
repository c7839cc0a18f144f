"""Tensors in PyTorch's pickles: their claims about storages are checked first, and their values read on first use.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import widened
from cellstack.cells.errors import FormatError
from cellstack.formats.pytorch.pickles import Global, Standin

SHARES = 16  # tensors may share storages, but take at most this many times the file's length in total
MOST_AXES = 64

# A storage's dtype, and NumPy's for it; bfloat16 has none, and is read as its 16 bits.
DTYPES = {
    "float32": "f4",
    "float64": "f8",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
    "complex64": "c8",
    "complex128": "c16",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2fnuz": "u1",
    "qint8": "i1",
    "quint8": "u1",
    "qint32": "i4",
}
READABLE = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "Untyped": "uint8",
}
TYPED_LISTS = ("restore_type_tag", "build_tensorlist", "build_intlist", "build_doublelist", "build_boollist")


class Records:
    """The bytes of a file; how many of them tensors may take is limited."""

    order = "<"  # the byte order

    def __init__(self, where: str, size: int) -> None:
        self.where, self.size, self.spent = where, size, 0

    def spend(self, count: int, key: str) -> None:
        """Count bytes that are about to be read from storage `key`."""
        self.spent += count
        if self.spent > SHARES * self.size:
            raise FormatError(f"{self.where}: too many tensors share the numbers of storage {short(key)}")

    def storage(self, key: str, length: int) -> NDArray[np.uint8]:
        """Return the `length` bytes of a storage; raise `FormatError` if it has another length."""
        raise NotImplementedError

    def read(self) -> Any:
        """Return the saved object."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Return the network's metadata, which cellstack's own files have."""
        return {}


@dataclass(eq=False, frozen=True)
class Storage:
    """A storage of a file: a one-dimensional array of which tensors are views.

    Attributes:
        records: the file's bytes.
        key: its name in the file.
        dtype: the dtype of its numbers.
        count: how many numbers it holds.
        start: the index of its first number within the bytes of `key`; old files have storages within others.
        whole: how many numbers the bytes of `key` hold.
    """

    records: Records
    key: str
    dtype: str
    count: int
    start: int
    whole: int


@dataclass(eq=False, frozen=True)
class Tensor:
    """A tensor of a file; `np.asarray` reads it: float16 and bfloat16 as float32, other dtypes unchanged.

    Attributes:
        storage: the storage that it is a view of.
        dtype: the dtype of its numbers.
        offset: the index of its first number in the storage.
        shape: its shape.
        strides: the stride of each axis, counted in numbers.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the tensor's numbers.

        Args:
            dtype: the dtype to cast to; None = see `Tensor`.
            copy: ignored; part of NumPy's protocol. The result is always a copy.

        Returns:
            An array of `shape`.

        Raises:
            FormatError: the dtype isn't supported, the file is too short, or the tensor is larger than its storage.
        """
        storage, records = self.storage, self.storage.records
        if self.dtype not in READABLE:
            raise FormatError(f"{records.where}: expected a tensor of {', '.join(READABLE)}, found {self.dtype}")
        item, count = size_of(self.dtype), prod(self.shape)
        if count > storage.count:
            raise FormatError(
                f"{records.where}: a tensor {short(list(self.shape))} doesn't fit into the {storage.count} numbers "
                f"of storage {short(storage.key)}"
            )
        records.spend(count * item, storage.key)
        unit = size_of(storage.dtype)
        data = records.storage(storage.key, storage.whole * unit)
        length = storage.count * unit // item * item
        row = data[storage.start * unit :][:length].view(f"{records.order}{DTYPES[self.dtype]}")
        if not count:
            return np.zeros(self.shape, row.dtype.newbyteorder("="))
        steps = tuple(stride * item for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(row[self.offset :], self.shape, steps, writeable=False)
        if self.dtype == "bfloat16":
            view = widened(view)
        usual = np.dtype(np.float32) if self.dtype in ("float16", "bfloat16") else view.dtype.newbyteorder("=")
        return np.array(view, dtype=usual if dtype is None else dtype, order="C")


@dataclass(eq=False, frozen=True)
class Quantised:
    """A quantised tensor, stored as integers with scales; `np.asarray` dequantises it to float32.

    Attributes:
        integers: the stored integers.
        scales: a number, or a tensor with one per slice.
        zeros: the zero point: an integer, or a tensor with one per slice.
        axis: the axis of the slices; None = one scale and zero point for all.
    """

    integers: Tensor
    scales: Any
    zeros: Any
    axis: int | None

    dtype = "float32"
    how = "dequantised: PyTorch also quantises the inputs at each step, which isn't done here"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.integers.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the dequantised numbers; raises as `Tensor.__array__` does."""
        shape = [1] * len(self.shape)
        if self.axis is not None:
            shape[self.axis] = -1
        with np.errstate(all="ignore"):  # overflow gives infinity, as in PyTorch
            scales = np.asarray(self.scales, np.float64).astype(np.float32).reshape(shape)
            whole = np.asarray(self.integers).astype(np.float32) - np.asarray(self.zeros, np.float32).reshape(shape)
            return (whole * scales).astype(np.float32 if dtype is None else dtype)


def size_of(dtype: str) -> int:
    """Return the size in bytes of a number of `dtype`."""
    return np.dtype(DTYPES[dtype]).itemsize


def short(value: Any, length: int = 80) -> str:
    """Return a value from a file as text for a message: printable, short, and quick to make."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"  # its digits would take long to compute
    if isinstance(value, (list, tuple)):
        text = ", ".join(short(part, length) for part in value[:MOST_AXES])
        text = f"[{text}]" if isinstance(value, list) else f"({text})"
    elif isinstance(value, (str, bytes)):
        text = ascii(value[:length])
    else:
        text = ascii(value) if isinstance(value, (bool, int, float, type(None))) else type(value).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


# ── functions that torch's pickles call ─────────────────────────────────────────────────────────────────────────────


class Builders:
    """Makes tensors and storages for the calls in torch's pickles, and checks their arguments."""

    def __init__(self, where: str, records: Records) -> None:
        self.where, self.records = where, records
        self.by_path: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": lambda args: self.tensor(args, dtype_at=6),
            "torch._utils._rebuild_qtensor": self.quantised,
            "torch._utils._rebuild_parameter": self.first,
            "torch._utils._rebuild_parameter_with_state": self.first,
            "torch._tensor._rebuild_from_type_v2": self.typed,
            **dict.fromkeys((f"torch.jit._pickle.{name}" for name in TYPED_LISTS), self.first),
            "torch.nn.parameter.Parameter": self.first,
            "torch.nn.parameter.Buffer": self.first,
        }

    def first(self, args: tuple[Any, ...]) -> Any:
        """Return the value that a parameter or a typed list wraps."""
        return args[0] if args else None

    def typed(self, args: tuple[Any, ...]) -> Any:
        """Return a tensor subclass as a plain tensor. Arguments: the function, the subclass, its arguments, a state."""
        if len(args) >= 3 and isinstance(args[0], Global) and isinstance(args[2], tuple):
            builder = self.by_path.get(args[0].path)
            if builder is not None and builder != self.typed:
                return builder(args[2])
        return Standin("torch._tensor._rebuild_from_type_v2", args)

    def tensor(self, args: tuple[Any, ...], dtype_at: int | None = None) -> Tensor:
        """Return a tensor. Arguments: a storage, an offset, a shape, strides, and a dtype if the storage is untyped."""
        where = f"{self.where}: tensor"
        if len(args) < 4 or (dtype_at is not None and len(args) <= dtype_at):
            raise FormatError(f"{where}: expected a storage, offset, shape and strides, found {len(args)} values")
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, Storage):
            raise FormatError(f"{where}: expected a storage, found {type(storage).__name__}")
        where = f"{where} in storage {short(storage.key, 40)}"
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise FormatError(f"{where}: expected a shape and a stride for each axis")
        if len(shape) > MOST_AXES:
            raise FormatError(f"{where}: expected at most {MOST_AXES} axes, found {len(shape)}")
        for number in (offset, *shape, *strides):
            if type(number) is not int or not 0 <= number < 1 << 63:
                value = short(number, 40) if type(number) is int else type(number).__name__
                raise FormatError(f"{where}: expected offset, shape and strides from 0 to 2^63 - 1, found {value}")
        dtype, count = storage.dtype, storage.count
        if dtype_at is not None:
            dtype = _dtype(where, args[dtype_at])
            count = count * size_of(storage.dtype) // size_of(dtype)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= count:
            raise FormatError(
                f"{where}: expected numbers within the storage's {count}, found shape {short(list(shape))} "
                f"and strides {short(list(strides))} from {offset} on, which reach number {short(last, 40)}"
            )
        return Tensor(storage, dtype, offset, shape, strides)

    def quantised(self, args: tuple[Any, ...]) -> Quantised:
        """Return a quantised tensor. Arguments: a storage, an offset, a shape, strides, and the quantisation scheme."""
        where = f"{self.where}: quantised tensor"
        scheme, *numbers = args[4] if len(args) > 4 and isinstance(args[4], tuple) and args[4] else (None,)
        kind = scheme.path.removeprefix("torch.") if isinstance(scheme, Global) else type(scheme).__name__
        whole = self.tensor(args)
        if whole.dtype not in ("qint8", "quint8"):
            raise FormatError(f"{where}: expected qint8 or quint8, found {whole.dtype}")
        integers = Tensor(whole.storage, whole.dtype.removeprefix("q"), whole.offset, whole.shape, whole.strides)
        if kind == "per_tensor_affine" and [type(number) for number in numbers] == [float, int]:
            scale, zero = numbers
            if not 0.0 < scale < np.inf or not -256 < zero < 256:
                values = f"{short(scale)} and {short(zero)}"
                raise FormatError(f"{where}: expected a scale above 0 and a zero among its integers, found {values}")
            return Quantised(integers, scale, zero, axis=None)
        if kind.startswith("per_channel_affine") and len(numbers) == 3:
            scales, zeros, axis = numbers
            fits = isinstance(scales, Tensor) and isinstance(zeros, Tensor) and type(axis) is int
            if fits and 0 <= axis < whole.ndim and scales.shape == zeros.shape == (whole.shape[axis],):
                return Quantised(integers, scales, zeros, axis)
        raise FormatError(
            f"{where}: expected a scale and a zero for all, or for each slice of an axis, found {short(kind)}"
        )

    def persistent(self, key: Any) -> Any:
        """Return the storage or the class of a persistent id."""
        where = f"{self.where}: persistent id"
        parts = list(key[:MOST_AXES]) if isinstance(key, tuple) else []
        if len(parts) > 1 and parts[0] == "module":  # a class, with its source, which is ignored
            return parts[1]
        if len(parts) < 5 or parts[0] != "storage":
            raise FormatError(f"{where}: expected a storage, found {type(key).__name__}")
        _, kind, name, _, count = parts[:5]
        dtype = _dtype(where, kind)
        if type(name) is not str:
            raise FormatError(f"{where}: expected a storage's key as text, found {type(name).__name__}")
        if type(count) is not int or not 0 <= count < 1 << 60:
            raise FormatError(f"{where}: expected a storage of 0 to 2^60 numbers, found {short(count, 40)}")
        view = parts[5] if len(parts) > 5 else None
        if view is None:
            return Storage(self.records, name, dtype, count, 0, count)
        start, length = view[1:3] if isinstance(view, tuple) and len(view) >= 3 else (None, None)
        if type(start) is not int or type(length) is not int or not (0 <= start <= start + length <= count):
            raise FormatError(f"{where}: expected a view within the {count} numbers of {short(name, 40)}")
        return Storage(self.records, name, dtype, length, start, count)


def _dtype(where: str, kind: Any) -> str:
    """Return the dtype of `torch.FloatStorage`, or of `torch.float32` itself."""
    module, _, name = kind.path.rpartition(".") if isinstance(kind, Global) else ("", "", "")
    dtype = STORAGES.get(name.removesuffix("Storage")) if name.endswith("Storage") else name
    if dtype not in DTYPES or module.split(".")[0] != "torch":
        written = short(kind.path) if isinstance(kind, Global) else type(kind).__name__
        raise FormatError(f"{where}: expected a storage type of torch, found {written}")
    return dtype


@dataclass
class ModuleTensors:
    """The tensors of a module in a state dict, whose names begin with `prefix`, including its dot."""

    prefix: str

    @property
    def title(self) -> str:
        """The module's name."""
        return self.prefix[:-1]


def array(tensor: Any, label: str = "") -> NDArray[Any]:
    """Return a weight of a file, float32 or float64; `label` begins the message about another dtype."""
    numbers = np.asarray(tensor)
    if numbers.dtype.kind != "f":
        why = ": perhaps a quantised layer" if numbers.dtype.kind in "iu" else ""
        raise FormatError(f"{label}expected floats, found {numbers.dtype}{why}")
    return numbers.astype(np.float32) if numbers.dtype.itemsize < 4 else numbers
