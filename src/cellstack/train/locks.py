"""Locks: two processes must not write to one file at the same time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike

from cellstack.train.checks import UsageError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks


@contextmanager
def locked(path: str | PathLike[str] | None, other: str = "another training") -> Iterator[None]:
    """Lock a file against other processes while the block runs.

    The operating system keeps the lock, on a small file in the same folder, `.cellstack-….lock`, and releases it when
    the process ends, even if it is killed. A leftover lock file doesn't lock anything.

    Args:
        path: the file, which need not exist; None: lock nothing.
        other: what another process with the lock is called in messages.

    Raises:
        UsageError: another process has locked the file.
        OSError: no file can be created in the folder.
    """
    if path is None:
        yield
        return
    target = os.path.realpath(path)
    digest = hashlib.sha256(os.fsencode(os.path.basename(target))).hexdigest()[:16]
    name = os.path.join(os.path.dirname(target), f".cellstack-{digest}.lock")
    descriptor = _lock(name, os.fspath(path), other)
    try:
        yield
    finally:
        if _is_at(descriptor, name):
            os.unlink(name)
        with suppress(OSError):  # on file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have inherited the descriptor
        os.close(descriptor)


def _lock(name: str, path: str, other: str) -> int:
    """Return the descriptor of the lock file `name`, locked, for the file `path`."""
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise UsageError(
                f"{path}: {other}{owner} is writing to this file: wait for it to end, or name another file"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            said = f"{path}: the file system has no locks: don't start {other} that writes to this file"
            warnings.warn(said, RuntimeWarning, stacklevel=4)
            return descriptor
        if _is_at(descriptor, name):
            break
        os.close(descriptor)  # its owner has just removed it
    with suppress(OSError):  # on a full disk the lock works too, but messages don't name the process
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f" (process {os.getpid()} on {platform.node()})".encode())
    return descriptor


def _is_at(descriptor: int, name: str) -> bool:
    """Return whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name))
    except FileNotFoundError:
        return False
