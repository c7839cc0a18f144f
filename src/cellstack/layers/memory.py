"""Memory of a training step's results, kept for those of the next: a system takes longer to get pages than to fill."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellstack import native

_MOST = 256 << 20  # bytes that are kept, in use or not
_LARGE_PAGES = 4 << 20  # bytes from which these pay; NumPy asks for them from the same size on


def _references(storages: Sequence[Any], place: int) -> int:
    """Return how many references there are to one of them, as this interpreter counts those of a call like this."""
    return sys.getrefcount(storages[place])


_OURS = _references([object()], 0)  # to what a list has, and nobody else


class Reused:
    """Tensors whose memory others of their size had before them, as soon as nobody else has it any more.

    What is given out is a tensor like any other. What lies in it before it is written is not defined.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._storages: list[torch.UntypedStorage] = []  # that which was given out last, last
        self._turn = threading.Lock()

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a contiguous tensor of this shape, of the dtype of `like`, on the CPU."""
        # Another thread is at it; or was, as this process was forked from its own.
        if not self._turn.acquire(blocking=False):
            return like.new_empty(shape)
        try:
            found = self._found(like, shape)
            return self._made(like, shape) if found is None else found
        finally:
            self._turn.release()

    def _found(self, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        size = math.prod(shape) * like.element_size()
        for place in range(len(self._storages)):
            if _references(self._storages, place) != _OURS:
                continue
            storage = self._storages[place]
            if (
                storage.nbytes() == size
                and torch._C._storage_Use_Count(storage._cdata) == 1  # pyright: ignore[reportAttributeAccessIssue]
                and not storage.is_shared()  # with a process that may still read it
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
