"""Opens Keras's containers, the zip of a `.keras` file and the HDF5 of all versions, without trusting their contents.

Nothing is unpacked to the disk, and nothing outside the file is read: links, datasets stored in other files and objects
with two names are refused before they are followed. Sizes are checked against the file before anything is allocated.
"""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats.files import MAX_JSON, as_metadata, parse, short
from cellstack.nodes.base import Array

HDF5_HEAD = b"\x89HDF\r\n\x1a\n"
HEAP_HEAD = b"GCOL\x01\0\0\0"
MEMBERS = {"config": "config.json", "metadata": "metadata.json", "weights": "model.weights.h5"}
NOTE = "cellstack"
"""Where our files have the network's metadata: a key of a zip's metadata.json, an attribute of HDF5, as JSON text."""
EXPANSION = 100  # how many times its size a file may take in memory; Keras itself compresses nothing
SPARE = 1 << 20  # bytes that a file may take in addition, however small it is
MOST_SEARCHED = 1 << 28  # bytes that are searched, which takes some tenths of a second
DEEPEST = 32  # groups within groups
MOST_TEXTS = 64  # variable-length texts in one attribute: each of them could be as long as the file
LEGACY, V3 = "legacy", "v3"  # weights listed by layers' names; weights by their layers' positions in the model
V3_ROOTS = ("layers", "_layer_checkpoint_dependencies")  # the latter in TensorFlow 2.12 to 2.15
STATES = ("optimizer", "optimizer_weights", "_optimizer", "metrics", "_metrics", "compile_metrics")


@contextmanager
def guarded(label: str, what: str = "a Keras file") -> Iterator[None]:
    """Turn any exception for a damaged file into a `FormatError`: h5py raises many kinds."""
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise FormatError(f"{label}: expected {what}, found {short(text, 300)}") from None


@dataclass
class ModelFile:
    """An open file: the model's description, and its weights, which are read one by one.

    Attributes:
        path: the file, for messages.
        layout: `LEGACY` or `V3`.
        version: the version of Keras that wrote it; None if the file doesn't specify it.
        backend: the backend of Keras that wrote it; None if the file doesn't specify it.
        config: the model's description; None in a file of weights only.
        orders: `LEGACY`: for each layer, the names of its weights in order.
        weights: every array by its name, an open dataset or a NumPy array.
        note: the network's metadata, if cellstack wrote the file.
        assumed: what was assumed, where the file doesn't specify it.
        room: how many bytes of arrays may still be read.
        taken: the names of the weights that have been read.
    """

    path: str
    layout: str
    version: str | None = None
    backend: str | None = None
    config: Any = None
    orders: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    assumed: str | None = None
    room: float = float("inf")
    taken: set[str] = field(default_factory=set)

    @property
    def major(self) -> int:
        """The major version; if it isn't specified, 3 for the layout of Keras 3, else 1, as Keras assumes too."""
        if self.version is None:
            return 3 if self.layout == V3 else 1
        first = self.version.split(".")[0]
        if not first.isdecimal() or not 0 <= int(first[:4]) <= 3:
            raise FormatError(f"{self.path}: expected keras_version 1, 2 or 3, found {short(self.version)}")
        # TensorFlow 2's Keras also writes the layout of Keras 3, but computes as Keras 2 does.
        return max(1, int(first))

    def take(self, name: str, whole: bool = False) -> Array:
        """Return one array by name, as float32 or float64; a `whole` one has to be int8 in the file."""
        where = f"{self.path}: weight {short(name)}"
        value = self.weights[name]
        with guarded(where, "numbers"):
            kind = value.dtype
            if whole and kind != np.int8:
                raise FormatError(f"{where}: expected int8, found {kind}")
            if not whole and (kind.kind != "f" or kind.itemsize not in (2, 4, 8)):
                raise FormatError(f"{where}: expected float32 or float64, found {kind}")
            if not isinstance(value, np.ndarray):
                value = self._read(where, value)
        self.taken.add(name)
        return value.astype(np.float64 if kind.itemsize == 8 else np.float32)

    def _read(self, where: str, dataset: Any) -> Array:
        shape, size = dataset.shape, dataset.dtype.itemsize
        if shape is None or len(shape) > 5:
            raise FormatError(f"{where}: expected an array, found shape {short(shape)}")
        for axis in shape:
            size *= int(axis)
        if dataset.external or dataset.is_virtual:
            raise FormatError(f"{where}: datasets stored in another file aren't supported")
        stored = dataset.id.get_storage_size()
        filtered = dataset.id.get_create_plist().get_nfilters() > 0
        if size > stored * (EXPANSION if filtered else 1) or size > self.room:
            raise FormatError(f"{where}: expected {size} bytes for shape {short(shape)}, found {stored} in the file")
        self.room -= size
        return dataset[()]

    @property
    def unused(self) -> list[str]:
        """The weights that weren't read, without those of optimisers and metrics."""
        return [name for name in self.weights if name not in self.taken and not _of_training(name)]


def _of_training(name: str) -> bool:
    parts = name.split("/")
    return parts[0] in STATES or any(part.startswith("seed_generator") for part in parts)


@contextmanager
def opened(path: str) -> Iterator[ModelFile]:
    """Open a Keras file of any kind; its arrays can be read until the block ends.

    Returns:
        A context manager over the file's `ModelFile`.

    Raises:
        FormatError: it isn't such a file, or is damaged or hostile.
        OSError: the file can't be read.
        ModuleNotFoundError: h5py is missing.
    """
    h5py = import_h5py()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        room = EXPANSION * size + SPARE
        head = file.read(len(HDF5_HEAD))
        file.seek(0)
        image, config, about = file, None, {}
        if head[:2] == b"PK":
            with guarded(path, "a .keras file, a zip archive"):
                config, about, image = _unzip(path, file, room)
        handle: Any = None
        try:
            with guarded(path, "an HDF5 file"):
                _check_heaps(path, image)
                handle = h5py.File(image, "r")
                source = _source(h5py, path, handle, size, room)
            if config is not None:
                if source.layout != V3:
                    raise FormatError(f"{path}: expected the weights by layers, found HDF5 of another layout")
                source.config, source.version = config, about["keras_version"]
                source.note = as_metadata(f"{path}: {NOTE}", about.get(NOTE, {}))
            yield source
        finally:
            if handle is not None:
                with guarded(path, "an HDF5 file"):
                    handle.close()


def import_h5py() -> Any:
    """Import and return h5py; raise an error that says how to install it."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Keras's files need h5py: pip install 'cellstack[keras]'", name=error.name) from None
    return h5py


def _unzip(path: str, file: Any, room: int) -> tuple[Any, dict[str, Any], io.BytesIO]:
    """Return the description, Keras's metadata and the weights of a `.keras` file, all in memory."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        for name in names:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                raise FormatError(f"{path}: the archive has a member with a path outside it, {short(name)}")
        if len(set(names)) != len(names):
            raise FormatError(f"{path}: the archive has two members of one name")
        lacking = sorted(set(MEMBERS.values()) - set(names))
        if lacking:
            raise FormatError(f"{path}: expected {', '.join(MEMBERS.values())}, found no {', '.join(lacking)}")
        contents = {}
        for kind, name in MEMBERS.items():
            most = room if kind == "weights" else min(room, MAX_JSON)
            claimed = archive.getinfo(name).file_size
            if claimed > most:
                raise FormatError(f"{path}: {name}: {claimed} bytes are more than the limit of {most}")
            with archive.open(name) as member:
                contents[kind] = member.read(most + 1)
            if len(contents[kind]) != claimed:
                raise FormatError(f"{path}: {name}: expected {claimed} bytes, found another number")
    metadata = parse(f"{path}: {MEMBERS['metadata']}", contents["metadata"])
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    if not isinstance(version, str):
        raise FormatError(f"{path}: {MEMBERS['metadata']}: expected keras_version, found {short(version)}")
    config = parse(f"{path}: {MEMBERS['config']}", contents["config"])
    return config, metadata, io.BytesIO(contents["weights"])


def _check_heaps(path: str, image: Any) -> None:
    """Refuse heaps of texts whose entries have inconsistent lengths: the HDF5 library would never stop reading.

    Ref: HDF5 File Format Specification, version 3.0, section III.E, "Disk Format: Level 1E - Global Heap".
    """
    with ExitStack() as stack:
        if isinstance(image, io.BytesIO):
            data: Any = image.getvalue()
        elif os.fstat(image.fileno()).st_size:
            data = stack.enter_context(mmap.mmap(image.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            data = b""
        heaps: dict[int, dict[bytes, int]] = {}
        start = data.find(HEAP_HEAD)
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + 16], "little")
            if not start + 16 <= end <= len(data):
                raise FormatError(f"{path}: expected a global heap within the file, found one that ends at {end}")
            heaps[start] = _heap(path, data, start + 16, end)
            start = data.find(HEAP_HEAD, end)
        if len(heaps) * len(data) <= MOST_SEARCHED:
            for start, sizes in heaps.items():
                _check_texts(path, data, start, sizes)


def _heap(path: str, data: Any, at: int, end: int) -> dict[bytes, int]:
    """Return the lengths of a heap's texts by their indices."""
    sizes = {}
    while at + 16 <= end:
        index, size = data[at : at + 2], int.from_bytes(data[at + 8 : at + 16], "little")
        step = size if index == b"\0\0" else 16 + (size + 7) // 8 * 8  # index 0 is the free space
        if step < 16 or at + step > end:
            raise FormatError(f"{path}: expected texts within a global heap, found one of {size} bytes at {at}")
        sizes[index + b"\0\0"] = size
        at += step
    return sizes


def _check_texts(path: str, data: Any, heap: int, sizes: dict[bytes, int]) -> None:
    """Refuse references to texts (a length, a heap and an index) whose length exceeds the file.

    The library allocates that length before it checks the text. References to no heap aren't detected here, and none
    are in large files, where the search would take longer than reading.
    """
    address = heap.to_bytes(8, "little")
    at = data.find(address)
    while at >= 0:
        claimed, index = int.from_bytes(data[max(0, at - 4) : at], "little"), data[at + 8 : at + 12]
        if at % 8 == 4 and index in sizes and claimed > len(data):  # elsewhere the bytes mean something else
            raise FormatError(
                f"{path}: expected a text of {sizes[index]} bytes, found the length {claimed} at {at - 4}"
            )
        at = data.find(address, at + 1)


def _source(h5py: Any, path: str, file: Any, size: int, room: int) -> ModelFile:
    """Return the contents of an HDF5 file, without reading the datasets."""
    base = _child(h5py, path, file, "model_weights") if "model_weights" in file else file
    names = _texts(h5py, path, base, "layer_names", size)
    layout = LEGACY if names is not None else V3
    if names is None and not any(root in file for root in V3_ROOTS):
        if "nb_layers" in file.attrs:
            raise FormatError(f"{path}: weights of Keras versions before 1 aren't supported")
        raise FormatError(f"{path}: expected weights by layers, found HDF5 that isn't Keras's")
    source = ModelFile(path, layout, room=room)
    for key in ("keras_version", "backend"):
        for group in (file, base):
            text = _texts(h5py, path, group, key, size)
            if text:
                setattr(source, "version" if key == "keras_version" else key, text[0])
                break
    config = _texts(h5py, path, file, "model_config", size)
    if config:
        source.config = parse(f"{path}: model_config", config[0])
    note = _texts(h5py, path, file, NOTE, size)
    if note:
        where = f"{path}: {NOTE}"
        source.note = as_metadata(where, parse(where, note[0]))
    seen: set[int] = set()
    if layout == V3:
        _walk(h5py, source, file, "", 0, seen)
        return source
    for name in names or ():
        group = _child(h5py, path, base, name)
        weights = _texts(h5py, path, group, "weight_names", size)
        if weights is None:
            raise FormatError(f"{path}: layer {short(name)}: expected weight_names, found none")
        source.orders[name] = [f"{name}/{weight}" for weight in weights]
    if len(source.orders) != len(names or ()):
        raise FormatError(f"{path}: layer_names holds a layer more than once")
    _walk(h5py, source, base, "", 0, seen)
    for name, order in source.orders.items():
        for weight in order:
            if weight not in source.weights:
                raise FormatError(f"{path}: layer {short(name)}: expected a weight {short(weight)}, found none")
    return source


def _child(h5py: Any, path: str, group: Any, name: str) -> Any:
    """Return a group within a group by its path, without following soft or external links."""
    for part in name.split("/"):
        link = group.get(part, getlink=True) if part else None
        if not isinstance(link, h5py.HardLink):
            kind = "none" if link is None else type(link).__name__
            raise FormatError(f"{path}: expected a group {short(name)}, found {kind}")
        group = group[part]
        if not isinstance(group, h5py.Group):
            raise FormatError(f"{path}: expected a group {short(name)}, found {type(group).__name__}")
    return group


def _walk(h5py: Any, source: ModelFile, group: Any, prefix: str, depth: int, seen: set[int]) -> None:
    """Add every dataset below a group to `source.weights`."""
    if depth > DEEPEST:
        raise FormatError(f"{source.path}: groups are nested more than {DEEPEST} deep at {short(prefix)}")
    for name in group:
        where = f"{source.path}: {short(prefix + name)}"
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = f"{type(link).__name__} at {short(prefix + name)}"
            raise FormatError(f"{source.path}: HDF5 links aren't supported (found {kind})")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            raise FormatError(f"{where}: the same HDF5 object has another name too, which isn't supported")
        seen.add(address)
        if isinstance(item, h5py.Group):
            _walk(h5py, source, item, f"{prefix}{name}/", depth + 1, seen)
        elif isinstance(item, h5py.Dataset):
            source.weights[prefix + name] = item
        else:
            raise FormatError(f"{where}: expected a group or numbers, found {type(item).__name__}")


def _texts(h5py: Any, path: str, group: Any, name: str, size: int) -> list[str] | None:
    """Return an attribute's texts, one or many; None if there is no such attribute.

    A list too long for one attribute is split into name0, name1 and so on.
    """
    if name in group.attrs:
        return _text_attribute(h5py, path, group, name, size)
    texts: list[str] = []
    for part in count():
        if f"{name}{part}" not in group.attrs:
            return texts if part else None
        texts += _text_attribute(h5py, path, group, f"{name}{part}", size)
    return None


def _text_attribute(h5py: Any, path: str, group: Any, name: str, size: int) -> list[str]:
    where = f"{path}: attribute {short(name)}"
    attribute = group.attrs.get_id(name)
    number = int(np.prod(attribute.shape or (), dtype=np.float64))
    if number == 0:
        return []  # h5py writes an empty list as an array of numbers
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID):
        raise FormatError(f"{where}: expected text, found {attribute.dtype}")
    fixed = not kind.is_variable_str()
    if number * (kind.get_size() if fixed else 16) > size + SPARE or (
        not fixed and number > MOST_TEXTS and number * size > 1 << 30
    ):
        raise FormatError(f"{where}: expected texts that fit into the file, found {number}")
    value = group.attrs[name]
    texts = [value] if isinstance(value, (str, bytes)) else list(np.asarray(value, object).ravel())
    texts = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in texts]
    for text in texts:
        text.encode("utf-8")  # fails on the surrogates that h5py returns for bytes that it can't decode
    return texts
