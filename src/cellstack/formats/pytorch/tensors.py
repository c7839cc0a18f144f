"""Tensors as PyTorch's pickles tell them: what they claim of a storage, checked, and read when they are asked for.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.bfloat16 import widened
from cellstack.formats.pytorch.pickles import Global, Standin
from cellstack.spec import FormatError

SHARES = 16  # how many times its own length a file's storages may be read as tensors: weights may be shared, not bred
MOST_AXES = 64

# A storage's kind, or a dtype, and what holds a number of it; bfloat16 is the upper half of a float32.
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
    """The bytes of a file, of which tensors take a bounded number."""

    order = "<"  # of the bytes in a number

    def __init__(self, where: str, size: int) -> None:
        self.where, self.size, self.spent = where, size, 0

    def spend(self, count: int, key: str) -> None:
        """Count bytes that are about to be taken for storage `key`."""
        self.spent += count
        if self.spent > SHARES * self.size:
            raise FormatError(
                f"{self.where}: expected tensors that have numbers of their own, "
                f"found those of storage {short(key)} taken over and over"
            )

    def storage(self, key: str, length: int) -> NDArray[np.uint8]:
        """Return the bytes of a storage, which must be `length` of them."""
        raise NotImplementedError

    def read(self) -> Any:
        """Return what is saved."""
        raise NotImplementedError

    def code(self, path: str) -> str:
        """Return the source, if any, that TorchScript keeps of a class's module."""
        return ""


@dataclass(eq=False, frozen=True)
class Storage:
    """A storage of a file: a row of numbers that tensors look into.

    Attributes:
        records: where its bytes lie.
        key: what the file calls it.
        dtype: what a number of it is.
        count: how many numbers it holds.
        start: where in the bytes of `key` the first lies, counted in numbers; old files have storages within others.
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
    """A tensor of a file; `np.asarray` reads it: float16 and bfloat16 as float32, all else as it is.

    Attributes:
        storage: what it looks into.
        dtype: of its numbers.
        offset: where in the storage its first number lies.
        shape: its axes.
        strides: of each axis, counted in numbers.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the tensor's numbers.

        Args:
            dtype: what to cast them to; None = as `Tensor` says.
            copy: taken for NumPy's sake; the array is always the caller's own.

        Returns:
            An array of `shape`.

        Raises:
            FormatError: a dtype that isn't read, bytes that aren't there, or a tensor larger than its storage.
        """
        storage, records = self.storage, self.storage.records
        if self.dtype not in READABLE:
            raise FormatError(f"{records.where}: expected a tensor of {', '.join(READABLE)}, found {self.dtype}")
        item, count = size_of(self.dtype), prod(self.shape)
        if count > storage.count:
            raise FormatError(
                f"{records.where}: expected a tensor that has numbers of its own, found one "
                f"{short(list(self.shape))} in the {storage.count} of storage {short(storage.key)}"
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
        wanted = np.dtype(np.float32) if self.dtype in ("float16", "bfloat16") else view.dtype.newbyteorder("=")
        return np.array(view, dtype=wanted if dtype is None else dtype, order="C")


@dataclass(eq=False, frozen=True)
class Quantised:
    """A tensor whose file holds integers, and by what they are multiplied; `np.asarray` gives the products, float32.

    Attributes:
        integers: what the file holds.
        scales: a number, or a tensor of one a slice.
        zeros: the integers that stand for zero: one, or a tensor of one a slice.
        axis: along which there is one a slice; None = one for all.
    """

    integers: Tensor
    scales: Any
    zeros: Any
    axis: int | None

    dtype = "float32"
    how = "dequantised: PyTorch also rounds what comes in at each step, which isn't done here"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self.integers.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the numbers that the integers stand for; raises as `Tensor.__array__` does."""
        shape = [1] * len(self.shape)
        if self.axis is not None:
            shape[self.axis] = -1
        with np.errstate(all="ignore"):  # what overflows is infinite, as it is in PyTorch
            scales = np.asarray(self.scales, np.float64).astype(np.float32).reshape(shape)
            whole = np.asarray(self.integers).astype(np.float32) - np.asarray(self.zeros, np.float32).reshape(shape)
            return (whole * scales).astype(np.float32 if dtype is None else dtype)


def size_of(dtype: str) -> int:
    """Return how many bytes hold a number of `dtype`."""
    return np.dtype(DTYPES[dtype]).itemsize


def short(value: Any, length: int = 80) -> str:
    """Return how a message shows what a file claims: printable, short, and found in no time whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"  # whose digits would take long to find
    if isinstance(value, (list, tuple)):
        text = ", ".join(short(part, length) for part in value[:MOST_AXES])
        text = f"[{text}]" if isinstance(value, list) else f"({text})"
    elif isinstance(value, (str, bytes)):
        text = ascii(value[:length])
    else:
        text = ascii(value) if isinstance(value, (bool, int, float, type(None))) else type(value).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


# ── what the pickles of torch call ──────────────────────────────────────────────────────────────────────────────────


class Builders:
    """Makes tensors and storages out of what torch's pickles call, and checks what they claim."""

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
        """Give what a parameter, or the type of a list, wraps."""
        return args[0] if args else None

    def typed(self, args: tuple[Any, ...]) -> Any:
        """Give a tensor of a subclass as a tensor: the function that makes it, the subclass, its arguments, a state."""
        if len(args) >= 3 and isinstance(args[0], Global) and isinstance(args[2], tuple):
            builder = self.by_path.get(args[0].path)
            if builder is not None and builder != self.typed:
                return builder(args[2])
        return Standin("torch._tensor._rebuild_from_type_v2", args)

    def tensor(self, args: tuple[Any, ...], dtype_at: int | None = None) -> Tensor:
        """Give a tensor: a storage, an offset, a shape, strides; a dtype where the storage has none of its own."""
        where = f"{self.where}: tensor"
        if len(args) < 4 or (dtype_at is not None and len(args) <= dtype_at):
            raise FormatError(f"{where}: expected a storage, offset, shape and strides, found {len(args)} values")
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, Storage):
            raise FormatError(f"{where}: expected a storage, found {type(storage).__name__}")
        where = f"{where} in storage {short(storage.key, 40)}"
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise FormatError(f"{where}: expected a stride for each axis, found other things")
        if len(shape) > MOST_AXES:
            raise FormatError(f"{where}: expected at most {MOST_AXES} axes, found {len(shape)}")
        for number in (offset, *shape, *strides):
            if type(number) is not int or not 0 <= number < 1 << 63:
                found = short(number, 40) if type(number) is int else type(number).__name__
                raise FormatError(f"{where}: expected offset, shape and strides from 0 to 2^63 - 1, found {found}")
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
        """Give a quantised tensor: a storage, an offset, a shape, strides, and how its integers are meant."""
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
                found = f"{short(scale)} and {short(zero)}"
                raise FormatError(f"{where}: expected a scale above 0 and a zero among its integers, found {found}")
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
        """Return the storage, or the class, that a persistent id stands for."""
        where = f"{self.where}: persistent id"
        parts = list(key[:MOST_AXES]) if isinstance(key, tuple) else []
        if len(parts) > 1 and parts[0] == "module":  # a class, with its source, which is left alone
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
        found = short(kind.path) if isinstance(kind, Global) else type(kind).__name__
        raise FormatError(f"{where}: expected a kind of storage of torch's, found {found}")
    return dtype
