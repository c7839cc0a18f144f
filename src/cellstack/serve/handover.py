"""Rolling upgrades on one port: a new server process takes over the listening sockets of the running one.

Both use the same durable folder, in which the running process listens on a Unix socket. Connections that arrive in
between wait in the listening sockets.
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
from typing import TYPE_CHECKING

from cellstack.serve.models import ServeError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "handover"  # of the Unix socket in the folder
REQUEST = b"cellstack handover 1\n"
MOST_SOCKETS = 64

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
    """Waits for a new server process, and passes the listening sockets to it.

    Args:
        folder: the durable folder, of which this process has the lock.
        sockets: the listening sockets.
        stop: stops accepting connections, finishes the queued frames, stores all sessions, releases the folder's lock,
            and closes the connections. The sockets stay open; they are passed after it returns.

    Attributes:
        done: set after the sockets were passed, or could not be: the process should exit.
    """

    def __init__(self, folder: Path, sockets: Sequence[socket.socket], stop: Callable[[], Awaitable[None]]) -> None:
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
                try:
                    await self._stop()
                    answer, descriptors = {"sockets": len(self.sockets)}, [own.fileno() for own in self.sockets]
                except Exception as error:  # whatever it is, the new process must learn of it
                    answer, descriptors = {"error": str(error) or type(error).__name__}, []
                try:
                    connection.setblocking(True)
                    socket.send_fds(connection, [json.dumps(answer).encode() + b"\n"], descriptors)
                except OSError as error:
                    _log.warning("the new server ended before it took over: %s", error)
                finally:
                    self.done.set()
                return


async def request_handover(folder: Path, timeout: float = 60.0) -> list[socket.socket] | None:
    """Ask the server that uses a durable folder to stop, and receive its listening sockets.

    Call it when all is ready but for the sessions, such as after the models were loaded: until these are restored,
    new connections wait.

    Args:
        folder: the durable folder.
        timeout: seconds for the other process to finish.

    Returns:
        the listening sockets; None if no server uses the folder.

    Raises:
        ServeError: the other process didn't answer in time, or could not store its sessions.
    """

    def ask() -> list[socket.socket] | None:
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
                data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, MOST_SOCKETS)
            except TimeoutError:
                raise ServeError(503, f"the running server didn't hand over within {timeout:g} s") from None
        sockets = [socket.socket(fileno=number) for number in descriptors]
        if not data:
            raise ServeError(503, "the running server ended without handing over")
        answer = json.loads(data)
        if "error" in answer:
            raise ServeError(503, f"the running server could not hand over: {answer['error']}")
        if answer["sockets"] != len(sockets):
            raise ServeError(503, f"the running server handed over {answer['sockets']} sockets, {len(sockets)} arrived")
        return sockets

    return await asyncio.get_running_loop().run_in_executor(None, ask)
