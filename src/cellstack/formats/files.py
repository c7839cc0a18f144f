"""What formats share: writes files atomically, checks paths, parses JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.network.description import short as short

if TYPE_CHECKING:
    from cellstack.network import Network


MAX_JSON = 1 << 26  # bytes; parsing takes some twenty times as many
NATIVE = ".safetensors"  # the suffix of the native format, which may be omitted to read a file


def existing_file(path: str | PathLike[str]) -> str:
    """Return the name of an existing file: as given, or with the suffix of the native format.

    Raises:
        FileNotFoundError: neither exists.
    """
    name = os.fspath(path)
    other = name + NATIVE if os.path.basename(name) and not name.endswith(NATIVE) else ""
    if other and os.path.isfile(other) and not os.path.isfile(name):  # a folder may have the name
        return other
    if not os.path.exists(name):
        raise FileNotFoundError(errno.ENOENT, f"no such file, nor {other}" if other else "no such file", name)
    return name


def digest_of(path: Path, options: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files, hexadecimal.

    Args:
        path: the file or folder.
        options: the keyword arguments of `cellstack.load`, which are included if there are any.
    """
    if options:
        return hashlib.sha256(f"{digest_of(path)} {options_text(options)}".encode()).hexdigest()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{digest_of(file)} {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def options_text(options: Mapping[str, Any]) -> str:
    """Return keyword arguments of `cellstack.load` as JSON; arrays are lists."""
    return json.dumps(options, sort_keys=True, default=lambda array: np.asarray(array).tolist())


def parse(where: str, text: str | bytes, **hooks: Any) -> Any:
    """Parse JSON, with hooks of `json.loads`; any defect is a `FormatError`."""
    if len(text) > MAX_JSON:
        raise FormatError(f"{where}: {len(text)} bytes of JSON are more than the limit of {MAX_JSON}")
    try:
        return json.loads(text, **hooks)
    except FormatError:  # of a hook
        raise
    except RecursionError:
        raise FormatError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # includes UnicodeDecodeError
        raise FormatError(f"{where}: expected JSON, found {short(str(error), 120)}") from None


def as_metadata(where: str, found: Any) -> dict[str, Any]:
    """Return what a file has as the network's metadata; `FormatError` unless it is a JSON object."""
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected the network's metadata, found {short(found)}")
    return found


def check_unedited(network: Network, what: str) -> None:
    """Raise `ValueError` if a network has patches, which the format `what` can't store: only the native one can."""
    for patch in network.patches[:1]:
        more = f" and {len(network.patches) - 1} more" if len(network.patches) > 1 else ""
        raise ValueError(
            f"save: {what} can't store patches; the network has {patch}{more}: "
            "save it as .safetensors, or save net.unedited"
        )


def check_readable(path: str | PathLike[str]) -> None:
    """Check that a path leads to no named pipe, socket or device, from which reading may wait for ever.

    Raises:
        OSError: it does, or nothing is there.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises an error of its own
        kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
        found = next((what for is_kind, what in kinds if is_kind(mode)), "a device")
        raise OSError(f"{os.fspath(path)}: expected a regular file, found {found}: write the model to a file first")


def check_replaceable(path: str | PathLike[str]) -> tuple[str, int | None]:
    """Check in advance that `replacing` can replace or create a file.

    Returns:
        The file that the path resolves to, and the mode of the existing file, None if there is none.

    Raises:
        OSError: `path` is no regular file, or may not be written, or its folder isn't there.
    """
    target, given = os.path.realpath(path), os.fspath(path)
    mode = None
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise OSError(f"{given}: it exists and isn't a regular file, so it can't be replaced")
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{given}: no permission to write to the existing file")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{given}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{given}: no permission to write to the folder {folder}")
    return target, mode


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, and is deleted if the block fails.

    The data is written to a new file in the same folder and flushed to the disk, then renamed in one step. The mode of
    an existing file is kept; a read-only file isn't replaced; a symbolic link stays one. A killed process leaves its
    temporary file `.cellstack-….tmp`, which is never read and may be deleted.

    Returns:
        A context manager over the open binary file.

    Raises:
        OSError: `path` isn't a regular file, can't be written, or the disk is full; it names `path`.
    """
    target, mode = check_replaceable(path)
    folder = os.path.dirname(target)
    draft = os.path.join(folder, f".cellstack-{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(draft, stat.S_IMODE(mode))
        os.replace(draft, target)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        if isinstance(error, OSError) and error.errno and error.filename in (None, draft):  # such as a full disk
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    if os.name == "posix":
        with suppress(OSError):  # the file is complete by now; not every file system can flush a folder
            flush_folder(folder)


def flush_folder(folder: str | PathLike[str]) -> None:
    """Write a folder's list of files to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
