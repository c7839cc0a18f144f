"""What connections may take from each other: places among the open ones, and time of the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, cast

EXTENSION = "cellstack.connection"  # of the scope, in which the application finds the connection
TURN_SECONDS = 0.002  # of the event loop for data that waits, before others have their turn
MOST_NEW = 2048  # connections without a valid request: as many as wait to be accepted
NEW_SECONDS = 60.0  # in which they must have sent one


class Client(Protocol):
    """A connection, of either protocol."""

    def give_way(self) -> None:
        """Close it, as others need its place."""


class Clients:
    """The open connections of a server, and the data of theirs that waits.

    Connections without a valid request have a limit of their own, and the oldest of them give way: those who can't
    use the server can't fill it either. A request is valid if it has a valid token, or if none is required.

    Args:
        most: connections with a valid request.

    Attributes:
        most_new: connections without.
    """

    def __init__(self, most: int) -> None:
        self.most, self.most_new = most, min(most, MOST_NEW)
        self._new: dict[asyncio.BaseTransport, float] = {}  # when they began, in this order
        self._known: set[asyncio.BaseTransport] = set()
        self._waiting: OrderedDict[Callable[[], None], None] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None  # while data wait

    def add(self, transport: asyncio.BaseTransport) -> None:
        """Note that a connection has begun."""
        self._new[transport] = time.monotonic()
        if len(self._new) > self.most_new:
            oldest = next(iter(self._new))
            del self._new[oldest]
            cast(Client, oldest.get_protocol()).give_way()

    def know(self, transport: asyncio.BaseTransport) -> bool:
        """Note that a connection has sent a valid request; return False if too many have."""
        if transport in self._new:
            if len(self._known) >= self.most:
                return False
            del self._new[transport]
            self._known.add(transport)
        return True

    def discard(self, transport: asyncio.BaseTransport) -> None:
        """Note that a connection has ended."""
        self._new.pop(transport, None)
        self._known.discard(transport)

    def drop_late(self) -> None:
        """Close connections without a valid request that have existed for `NEW_SECONDS`, such as to slow readers."""
        end = time.monotonic() - NEW_SECONDS
        for transport in [one for one, begun in self._new.items() if begun < end]:
            cast(asyncio.Transport, transport).abort()

    def later(self, go_on: Callable[[], None]) -> None:
        """Call a function that processes a part of a connection's data when it is this connection's turn, once."""
        self._waiting[go_on] = None
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Process data of some connections, then let the event loop do all else."""
        assert self._loop is not None
        end = time.monotonic() + TURN_SECONDS
        for _ in range(len(self._waiting)):
            self._waiting.popitem(last=False)[0]()
            if time.monotonic() > end:
                break
        if self._waiting:
            self._loop.call_soon(self._turn)
        else:
            self._loop = None
