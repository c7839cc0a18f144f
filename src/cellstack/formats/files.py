"""Writing files so that a reader sees the old one or the new one; and how a message shows what is in one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from cellstack.network import Network


def check_unedited(network: Network, what: str) -> None:
    """Raise `ValueError` where a network has patches, which only the native format holds.

    Args:
        network: what is written.
        what: what it is written as, for the message.
    """
    for patch in network.patches[:1]:
        more = f" and {len(network.patches) - 1} more" if len(network.patches) > 1 else ""
        raise ValueError(
            f"save: expected a network without patches, which {what} can't hold, got {patch}{more}: "
            "save it as .safetensors, or save net.unedited"
        )


def short(value: Any, length: int = 80) -> str:
    """Return how a message shows what a file claims: printable, and short however long it is."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


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
    """Check what can be told before there is anything to write: that `replacing` could replace or make a file.

    Args:
        path: the file to replace or to make.

    Returns:
        The file that the path leads to, and the mode of what is there, None where nothing is.

    Raises:
        OSError: `path` is no regular file, or may not be written, or its folder isn't there.
    """
    target, given = os.path.realpath(path), os.fspath(path)
    mode = None
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise OSError(f"{given}: expected a regular file to replace, found something else there")
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{given}: the file that is there may not be written to")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{given}: expected a folder {folder}, found none")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{given}: the folder {folder} may not be written to")
    return target, mode


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes if it fails.

    The bytes go to a new file beside it, and to the disk, before the name is moved over in one step. The mode of the
    file that was there is kept; one that can't be written to is not replaced; a symbolic link stays one. A process that
    is killed meanwhile leaves its draft there, `.cellstack-….tmp`, which nothing reads and anyone may delete.

    Args:
        path: the file to replace or to make.

    Returns:
        A context manager over the open binary file.

    Raises:
        OSError: `path` is no regular file, or may not be written, or there is no room for it; it names `path`.
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
        with suppress(OSError):  # the file is whole by now; not every file system can put a folder on the disk
            folder_descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(folder_descriptor)
            finally:
                os.close(folder_descriptor)
