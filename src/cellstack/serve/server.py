"""The server: uvicorn with the application, limits of connections, signals, reload, TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import uvicorn

    from cellstack.serve.app import application
    from cellstack.serve.http import Http
    from cellstack.serve.websocket import WebSocket
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"cellstack serve needs {error.name}: pip install 'cellstack[serve]'", name=error.name
    ) from error
from cellstack import FormatError
from cellstack.serve.clients import MOST_NEW, Clients
from cellstack.serve.models import Limits, Models, ServeError
from cellstack.serve.texts import described

if TYPE_CHECKING:
    from cellstack.serve.durable import Store

BACKLOG = 2048
FILES = 256  # open ones other than connections
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SETTLE_SECONDS = 0.2  # for requests of connections that were accepted last when the server stops
FLUSH_SECONDS = 5.0  # for clients to read their last answers
SWITCH_SECONDS = (
    0.0005  # after which a thread gets the interpreter; the default of 5 ms is longer than most answers take
)


@dataclass(frozen=True)
class ServerSettings:
    """How a server serves.

    Attributes:
        host, port: where it listens; port 0: any free one.
        durable: the folder in which sessions are stored; None: they end with the process.
        limits: see `Limits`.
        connections: open connections whose client has sent a valid request; at most as many others may be open.
        tokens: one of them is required in each request; none: no token is required.
        allow_origins: origins of other pages that may use the server from a browser.
        allow_hosts: names of the server that are accepted in the header Host, see `hosts`.
        tls_cert, tls_key: files of the certificate and its key; None: no TLS.
        threads: the threads of a step.
        options: keyword arguments of `cellstack.load`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    durable: Path | None = None
    limits: Limits = field(default_factory=Limits)
    connections: int = 10_000
    tokens: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def hosts(settings: ServerSettings) -> set[str]:
    """Return the names that are accepted in the header Host, none for any.

    A server without tokens on this machine's own address is protected only by that address, which a page of another
    site can reach under a name of its own. So it accepts no other names than those of this machine and `allow_hosts`.
    """
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.tokens or not (host in LOOPBACK or host.startswith("127.")):
        return {name.lower() for name in settings.allow_hosts}
    return {host.lower(), *LOOPBACK, *(name.lower() for name in settings.allow_hosts)}


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ServeError: the port is in use, or the host isn't an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        number = error.errno or 0  # negative for names that are unknown
        raise ServeError(503, f"{host}:{port}: {os.strerror(number) if number > 0 else error}") from None
    # Connections inherit it. asyncio sets it only where a socket names its protocol, and then an answer in two parts
    # waits 40 ms for an acknowledgement; uvloop, which doesn't exist for Windows, always sets it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class Server(uvicorn.Server):
    """A server of models.

    Args:
        models: the models, which are loaded.
        settings: see `ServerSettings`.
        report: called with what an operator should know, such as the result of a reload.
        listens: called with the URL and the descriptions of the models when it listens.

    Attributes:
        ready: whether it takes requests.
        signal: the number of the signal that stopped it, if any.
    """

    def __init__(
        self,
        models: Models,
        settings: ServerSettings,
        report: Callable[[str], None] = print,
        listens: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.models, self.settings, self.report, self._listens = models, settings, report, listens
        self.ready, self.signal, self.clients = False, 0, Clients(settings.connections)
        self.app = application(models, settings.tokens, settings.allow_origins, self, hosts(settings))
        self._store: Store | None = None
        self._finished = False
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        config = uvicorn.Config(
            self.app,
            http=type("LimitedHttp", (Http,), {"clients": self.clients}),
            ws=type("LimitedWebSocket", (WebSocket,), {"clients": self.clients}),
            ws_max_size=settings.limits.message,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order on SIGTERM and SIGINT, and reload the models on SIGHUP."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        for number in numbers:
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self.reload()))
        try:
            yield
        finally:
            for number in [*numbers, signal.SIGHUP]:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self.force_exit = self.should_exit  # the second signal doesn't wait for open connections
        self.should_exit, self.signal = True, number

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal.

        Args:
            sockets: the listening sockets.

        Raises:
            ServeError, FormatError, OSError: see `durable.Store`.
        """
        if self.settings.durable is not None:
            self._restore(self.settings.durable)
        await super().serve(sockets)

    def _restore(self, folder: Path) -> None:
        """Restore the stored sessions."""
        from cellstack.serve.durable import Store

        self._store = Store(folder)
        for model in self.models.all():
            if count := self._store.restore(model):
                self.report(f"{model.name}: restored {count} sessions")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving."""
        assert sockets
        loop, settings = asyncio.get_running_loop(), self.settings
        for model in self.models.all():
            model.start(loop)
        await super().startup(sockets)
        self._start(self._close_idle())
        self.ready = True
        host, port = sockets[0].getsockname()[:2]
        url = f"http{'s' if settings.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        models = [described(versions[-1]) for versions in self.models.versions.values()]
        self._listens({"url": url, "port": port, "models": models})

    async def finish(self) -> None:
        """Accept no more connections, answer all frames that were received, and store the sessions."""
        if self._finished:
            return
        self._finished, self.ready = True, False
        for server in self.servers:
            server.close()
        await asyncio.sleep(SETTLE_SECONDS)
        await self.app.state.connections.finish()
        loop = asyncio.get_running_loop()
        for model in self.models.all():
            await loop.run_in_executor(None, model.stop)
            if self._store is not None:
                try:
                    self._store.save(model)
                except OSError as error:
                    self.report(f"{model.name}: its sessions can't be stored: {error.strerror or error}")
        if self._store is not None:
            self._store.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, after `finish`."""
        await self.finish()
        for task in self._tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        """End connections whose clients don't read."""
        for connection in self.server_state.connections:
            connection.transport.abort()

    async def reload(self) -> None:
        """Load the models whose files have changed. Open sessions stay with the version that they began with."""
        loop = asyncio.get_running_loop()
        async with self._reloading:
            for name, path in self.models.paths.items():
                current = self.models.model(name)
                try:
                    model = await loop.run_in_executor(None, self.models.load, path)
                except (FormatError, OSError, ValueError, TypeError, ModuleNotFoundError) as error:
                    self.report(f"{path}: {error}; version {current.version} stays")
                    continue
                if model.digest and model.digest == current.digest:
                    await loop.run_in_executor(None, model.stop)
                    self.report(f"{name}: {path} hasn't changed")
                    continue
                try:
                    if self._store is not None:
                        await loop.run_in_executor(None, self._store.restore, model)
                except (ServeError, OSError) as error:
                    self.report(f"{path}: {error}; version {current.version} stays")
                    await loop.run_in_executor(None, model.stop)
                    continue
                model.start(loop)
                self.models.add(path, model)
                self.report(f"{name}: loaded version {model.version} for new sessions")
            await self.models.drop_unused()

    async def _close_idle(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self.settings.limits.idle / 4))
            self.clients.drop_late()
            await self.models.drop_unused()


def prepare_process(connections: int) -> int:
    """Set what is per process: the switch between threads, and the limit of open files.

    Returns:
        the number of connections with a valid request that can be open, in addition to those without.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    if sys.platform == "win32":
        return connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + min(connections, MOST_NEW) + FILES
    if soft < wanted:
        soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = soft - FILES
    return min(connections, max(free // 2, free - MOST_NEW))
