"""Reads the containers of `torch.save` as data; tensors are read on first use.

Three containers are supported: the zip of PyTorch 1.6 and later (also TorchScript's), the series of pickles of earlier
versions, and a plain pickle that holds tensors. `pickles.py` reads the pickles without running anything. A tensor's
size is checked against the file before it is read.

Ref: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.formats.files import as_metadata, parse
from cellstack.formats.pytorch.pickles import read
from cellstack.formats.pytorch.tensors import Builders, Records, Storage, short, size_of

MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number at the start of old files, as a pickle
METADATA = "extra/cellstack.json"  # the member of our own files with the network's metadata, which PyTorch ignores
PROTOCOL = 1001  # the version of old files
MEMBER = re.compile(rb"[^/]+/(data\.pkl|data/|version|byteorder|constants\.pkl|code/|extra/|\.)")
TAR_MEMBERS = (b"sys_info\0", b"pickle\0", b"storages\0", b"tensors\0")


class _Zip(Records):
    """A zip whose members are `NAME/data.pkl`, `NAME/data/0` and so on, none of them compressed."""

    def __init__(self, path: str, file: BinaryIO, size: int) -> None:
        import zipfile  # importing it takes longer than reading a small file

        super().__init__(path, size)
        self.file = file
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
            raise FormatError(f"{path}: the zip file is damaged: {short(str(error), 200)}") from None
        self.members = {member.filename: member for member in members}
        for name in self.members:
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise FormatError(f"{path}: the archive has a member with a path outside it, {short(name)}")
        if len(self.members) != len(members):
            raise FormatError(f"{path}: the zip has two members of one name")
        roots = [name for name in self.members if name.split("/", 1)[-1] == "data.pkl"]
        if len(roots) != 1:
            raise FormatError(f"{path}: expected one data.pkl as torch.save writes it, found {len(roots)} in the zip")
        self.root = roots[0].removesuffix("data.pkl")
        self.kept: dict[str, NDArray[np.uint8]] = {}
        self.order = ">" if self.has("byteorder") and self.take("byteorder").strip() == b"big" else "<"

    def has(self, name: str) -> bool:
        return self.root + name in self.members

    def take(self, name: str, length: int | None = None) -> bytes:
        """Return the bytes of a member; raise `FormatError` if it doesn't have the given length."""
        where = f"{self.where}: {short(name)}"
        member = self.members.get(self.root + name)
        if member is None:
            raise FormatError(f"{where}: the zip has no such member")
        if length is not None and member.file_size != length:
            raise FormatError(f"{where}: expected {length} bytes, found {member.file_size}")
        if member.compress_type != 0 or member.flag_bits & 1 or member.compress_size != member.file_size:
            raise FormatError(f"{where}: compressed or encrypted members aren't supported; torch.save writes none")
        self.file.seek(max(member.header_offset, 0))  # it may be negative in a damaged file
        head = self.file.read(30)
        if member.header_offset < 0 or len(head) < 30 or not head.startswith(b"PK\x03\x04"):
            raise FormatError(f"{where}: expected a member of the zip at byte {member.header_offset}, found none")
        start = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + member.file_size > self.size:
            raise FormatError(f"{where}: the file ends within its {member.file_size} bytes at {start}")
        self.file.seek(start)
        data = self.file.read(member.file_size)
        if member.CRC not in (0, zlib.crc32(data)):  # 0: torch wrote no checksum
            raise FormatError(f"{where}: the bytes don't match the checksum {member.CRC:08x}: the file is damaged")
        return data

    def storage(self, key: str, length: int) -> NDArray[np.uint8]:
        if key not in self.kept:
            self.kept[key] = np.frombuffer(self.take(f"data/{key}", length), np.uint8)
            self.spend(length, key)
        if len(self.kept[key]) != length:
            raise FormatError(f"{self.where}: storage {short(key)}: its tensors give it different lengths")
        return self.kept[key]

    def metadata(self) -> dict[str, Any]:
        if not self.has(METADATA):
            return {}
        where = f"{self.where}: {METADATA}"
        return as_metadata(where, parse(where, self.take(METADATA)))

    def read(self) -> Any:
        """Return the saved object."""
        builders = Builders(self.where, self)
        return read(f"{self.where}: data.pkl", self.take("data.pkl"), 0, builders.by_path, builders.persistent)[0]


class _Row(Records):
    """An old file: pickles of a magic number, a version, the machine, the object and the storages' keys, then the
    storages in the order of the keys, each preceded by its number of elements.
    """

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(path, len(data))
        self.data, self.at = data, 0
        self.places: dict[str, tuple[int, int]] = {}
        self.units: dict[str, int] = {}

    def next(self, builders: Builders | None = None) -> Any:
        made, self.at = read(
            self.where,
            self.data,
            self.at,
            builders.by_path if builders else None,
            self._persistent(builders) if builders else None,
        )
        return made

    def _persistent(self, builders: Builders) -> Callable[[Any], Any]:
        def persistent(key: Any) -> Any:
            made = builders.persistent(key)
            if isinstance(made, Storage):
                unit = size_of(made.dtype)
                if self.units.setdefault(made.key, unit) != unit:
                    raise FormatError(f"{self.where}: storage {short(made.key)}: it has several dtypes")
            return made

        return persistent

    def read(self) -> Any:
        """Return the saved object, and find the position of every storage."""
        self.next()  # the magic number
        version = self.next()
        if version != PROTOCOL:
            found = short(version) if isinstance(version, int) else type(version).__name__
            raise FormatError(f"{self.where}: expected version {PROTOCOL} of the old format, found {found}")
        self.next()  # the machine that wrote it
        made = self.next(Builders(self.where, self))
        keys = self.next()
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise FormatError(f"{self.where}: expected the storages' keys, found {type(keys).__name__}")
        for key in keys:
            head = self.data[self.at : self.at + 8]
            count = int.from_bytes(head, "little", signed=True)
            length = count * self.units.get(key, 0)
            if key in self.places or key not in self.units:
                raise FormatError(f"{self.where}: storage {short(key)}: no tensor uses it, or it occurs twice")
            if len(head) < 8 or count < 0 or self.at + 8 + length > len(self.data):
                raise FormatError(f"{self.where}: storage {short(key)}: the file ends before its numbers")
            self.places[key] = (self.at + 8, length)
            self.at += 8 + length
        return made

    def storage(self, key: str, length: int) -> NDArray[np.uint8]:
        where = f"{self.where}: storage {short(key)}"
        if key not in self.places:
            raise FormatError(f"{where}: the file has no such storage")
        start, found = self.places[key]
        if found != length:
            raise FormatError(f"{where}: expected {length} bytes, found {found}")
        return np.frombuffer(self.data, np.uint8, length, start)


class _Plain(Records):
    """A plain pickle in which each storage is an old file as bytes."""

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(path, len(data))
        self.data, self.nested = data, 0

    def load(self, args: tuple[Any, ...]) -> Any:
        """Return the storage that these bytes hold."""
        data = args[0] if args else None
        if not isinstance(data, bytes) or MAGIC not in data[:16]:
            raise FormatError(f"{self.where}: expected a storage as torch saves it, found {type(data).__name__}")
        self.nested += len(data)
        if self.nested > len(self.data):
            raise FormatError(f"{self.where}: the pickle loads the same storage many times")
        return _Row(self.where, data).read()

    def read(self) -> Any:
        """Return the saved object."""
        builders = Builders(self.where, self)
        builders.by_path["torch.storage._load_from_bytes"] = self.load
        return read(self.where, self.data, 0, builders.by_path, None)[0]


def recognises(head: bytes) -> bool:
    """Return whether a file that starts with `head` looks like one of torch: a zip, the old format or the oldest."""
    if head.startswith(b"PK\x03\x04"):
        length = int.from_bytes(head[26:28], "little")
        name = head[30 : 30 + length]
        if MEMBER.match(name):
            return True
        return len(name) < length and re.fullmatch(rb"[^/]+(/[a-z.]*)?", name) is not None  # `head` cuts the name off
    return (head.startswith(b"\x80") and MAGIC in head[:32]) or head.startswith(TAR_MEMBERS)


@contextmanager
def records(path: str) -> Iterator[Records]:
    """Open a PyTorch file; `read()` of its records returns the saved object.

    Returns:
        A context manager over its records.

    Raises:
        FormatError: it isn't a PyTorch file.
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"PK"):
            yield _Zip(path, file, size)
            return
        if head.startswith(TAR_MEMBERS):
            raise FormatError(
                f"{path}: tar files of PyTorch versions before 0.1.10 aren't supported: load it with torch, and save "
                "it again"
            )
        if head[257:262] == b"ustar":
            raise FormatError(f"{path}: expected a file of torch.save, found a tar file: unpack it first")
        if not head.startswith(b"\x80"):
            raise FormatError(f"{path}: expected a file of torch.save, found one that begins with {head[:8]!r}")
        data = file.read()
        yield _Row(path, data) if MAGIC in data[:32] else _Plain(path, data)
