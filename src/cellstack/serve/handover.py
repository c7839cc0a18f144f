"""Rolling upgrades on one port: a new server process takes over the sockets of the running one.

Both use the same durable folder, in which the running process listens on a Unix socket. Clients that connect in between
wait in the listening sockets, and idle connections are passed too, so that none is reset.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.serve.models import ServeError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "handover"  # of the Unix socket in the folder
REQUEST = b"cellstack handover 2\n"
PER_MESSAGE = 100  # sockets: systems allow some 250

_log = logging.getLogger(__name__)


@contextmanager
def _address(folder: Path) -> Iterator[str]:
    """Give a path of the socket that is short enough for the system, which allows about 100 bytes."""
    path = str(folder / NAME)
    if len(os.fsencode(path)) < 100 or not os.path.isdir("/proc/self/fd"):
        yield path
        return
    entry = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{entry}/{NAME}"
    finally:
        os.close(entry)


class HandoverServer:
    """Waits for a new server process, and passes the sockets to it.

    Args:
        folder: the durable folder, of which this process has the lock.
        sockets: the listening sockets.
        stop: stops accepting connections, finishes the queued frames, stores all sessions, and releases the folder's
            lock; returns the sockets of connections with which the new process goes on. All are passed after that.

    Attributes:
        done: set after the sockets were passed, or could not be: the process should exit.
    """

    def __init__(
        self, folder: Path, sockets: Sequence[socket.socket], stop: Callable[[], Awaitable[Sequence[socket.socket]]]
    ) -> None:
        self.folder, self.sockets, self.done = folder, list(sockets), asyncio.Event()
        self._stop = stop
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen for a request.

        Raises:
            OSError: the socket can't be created.
        """
        (self.folder / NAME).unlink(missing_ok=True)  # of a process that was killed: this one has the lock
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with _address(self.folder) as address:
            self._listener.bind(address)
        (self.folder / NAME).chmod(0o600)
        self._listener.listen(8)
        self._task = asyncio.get_running_loop().create_task(self._serve(self._listener))

    async def close(self) -> None:
        """Listen no longer."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            (self.folder / NAME).unlink(missing_ok=True)

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            with connection:
                connection.setblocking(False)
                try:
                    request = await asyncio.wait_for(loop.sock_recv(connection, len(REQUEST)), 2.0)
                except (OSError, asyncio.TimeoutError):
                    continue  # such as another program that connects to every socket
                if request != REQUEST:
                    continue
                self._stop_listening()  # before the new process creates its own socket at this path
                connections: Sequence[socket.socket] = ()
                try:
                    connections = await self._stop()
                    answer = {"sockets": len(self.sockets), "connections": len(connections)}
                except Exception as error:  # whatever it is, the new process must learn of it
                    answer = {"error": str(error) or type(error).__name__}
                try:
                    connection.setblocking(True)
                    _send(connection, answer, () if "error" in answer else [*self.sockets, *connections])
                except OSError as error:
                    _log.warning("the new server ended before it took over: %s", error)
                finally:
                    for one in connections:
                        one.close()
                    self.done.set()
                return


def _send(connection: socket.socket, answer: dict[str, Any], sockets: Sequence[socket.socket]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")
    for start in range(0, len(sockets), PER_MESSAGE):
        some = [one.fileno() for one in sockets[start : start + PER_MESSAGE]]
        socket.send_fds(connection, [b"."], some)


def _receive(connection: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """Return what `_send` sent: the answer, empty if the other process ended, and the sockets."""
    data, sockets = b"", []
    while True:
        part, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, PER_MESSAGE)
        sockets += [socket.socket(fileno=number) for number in descriptors]
        data += part
        if not part:
            return data.partition(b"\n")[0], sockets


class Taken(NamedTuple):
    """What another process handed over: its listening sockets, and the connections to go on with."""

    sockets: list[socket.socket]
    connections: list[socket.socket]


def is_running(folder: Path) -> bool:
    """Return whether a server uses this durable folder and can hand over."""
    if not (folder / NAME).exists():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _address(folder) as address:
        return connection.connect_ex(address) == 0


async def request_handover(folder: Path, timeout: float = 60.0) -> Taken | None:
    """Ask the server that uses a durable folder to stop, and receive its sockets.

    Call it when all is ready but for the sessions, such as after the models were loaded: until these are restored,
    clients wait.

    Args:
        folder: the durable folder.
        timeout: seconds for the other process to finish.

    Returns:
        what it handed over; None if no server uses the folder.

    Raises:
        ServeError: the other process didn't answer in time, or could not store its sessions.
    """

    def ask() -> Taken | None:
        if not (folder / NAME).exists():
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            try:
                with _address(folder) as address:
                    connection.connect(address)
            except (ConnectionRefusedError, FileNotFoundError):
                return None  # its process was killed, or has just stopped
            try:
                connection.sendall(REQUEST)
                data, sockets = _receive(connection)
            except TimeoutError:
                raise ServeError(503, f"the running server didn't hand over within {timeout:g} s") from None
        if not data:
            raise ServeError(503, "the running server ended without handing over")
        answer = json.loads(data)
        if "error" in answer:
            raise ServeError(503, f"the running server could not hand over: {answer['error']}")
        count = answer["sockets"]
        if count + answer["connections"] != len(sockets):
            expected = f"{count} sockets and {answer['connections']} connections"
            raise ServeError(503, f"the running server handed over {expected}, {len(sockets)} arrived")
        return Taken(sockets[:count], sockets[count:])

    return await asyncio.get_running_loop().run_in_executor(None, ask)
