"""Reuse the memory of a training step's results in the next step: allocating pages takes longer than filling them."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellstack import native

_MOST = 256 << 20  # bytes kept at most, in use or not
_LARGE_PAGES = 4 << 20  # bytes from which large pages pay off; NumPy uses the same size


def _references(storages: Sequence[Any], place: int) -> int:
    """Return the interpreter's reference count of one of the storages, which includes those of this call."""
    return sys.getrefcount(storages[place])


_OURS = _references([object()], 0)  # the count of an object that only a list refers to


class Reused:
    """A pool that allocates tensors in the memory of earlier ones of the same size that are no longer referenced.

    The tensors are ordinary ones with undefined contents.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._storages: list[torch.UntypedStorage] = []  # the most recently used last
        self._lock = threading.Lock()

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a contiguous tensor of this shape, of the dtype of `like`, on the CPU."""
        # Another thread holds the lock, or held it when this process was forked.
        if not self._lock.acquire(blocking=False):
            return like.new_empty(shape)
        try:
            found = self._found(like, shape)
            return self._made(like, shape) if found is None else found
        finally:
            self._lock.release()

    def _found(self, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        size = math.prod(shape) * like.element_size()
        for place in range(len(self._storages)):
            if _references(self._storages, place) != _OURS:
                continue
            storage = self._storages[place]
            if (
                storage.nbytes() == size
                and torch._C._storage_Use_Count(storage._cdata) == 1  # pyright: ignore[reportAttributeAccessIssue]
                and not storage.is_shared()  # another process may still read it
            ):
                self._storages.append(self._storages.pop(place))
                return like.new_empty(0).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return None

    def _made(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        new = like.new_empty(shape)
        if new.nbytes >= _LARGE_PAGES:
            native.prefer_large_pages(new.data_ptr(), new.nbytes)
        if new.nbytes <= self._most:
            self._storages.append(new.untyped_storage())
            while sum(storage.nbytes() for storage in self._storages) > self._most:
                del self._storages[0]
        return new
