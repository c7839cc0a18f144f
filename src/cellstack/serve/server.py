"""The server: uvicorn with the application, limits of connections, signals, reload, TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
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
from cellstack.formats.files import digest_of
from cellstack.serve.clients import MOST_NEW, Clients
from cellstack.serve.inference_protocol.service import Service
from cellstack.serve.models import Limits, Models, ServeError
from cellstack.serve.texts import described

if TYPE_CHECKING:
    from cellstack.serve.durable import Store
    from cellstack.serve.handover import HandoverServer, Taken

BACKLOG = 2048
FILES = 256  # open ones other than connections
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SETTLE_SECONDS = 0.2  # for requests of connections that were accepted last when the server stops
ANSWER_SECONDS = 2.0  # for requests that are under way then
FLUSH_SECONDS = 5.0  # for clients to read their last answers
EXIT_SECONDS = 5.0  # for the process that has handed over, to release its folder
SWITCH_SECONDS = (
    0.0005  # after which a thread gets the interpreter; the default of 5 ms is longer than most answers take
)


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        host, port: where it listens; port 0: any free one.
        grpc_port: where it listens for gRPC; None: nowhere.
        durable: the folder in which sessions are stored; None: they end with the process.
        durability: `"none"`, `"snapshot"`, `"frames"` or `"synced"`, see docs/serve.md.
        limits: see `Limits`.
        connections: open connections whose client has sent a valid request; at most as many others may be open.
        tokens: one of them is required in each request; none: no token is required.
        allow_origins: origins of other pages that may use the server from a browser.
        allow_hosts: names of the server that are accepted in the header Host, see `hosts`.
        tls_cert, tls_key: files of the certificate and its key; None: no TLS.
        threads: the threads of a step.
        options: keyword arguments of `cellstack.load`.
        recover: start also if stored sessions are damaged, with what precedes the damage.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    durable: Path | None = None
    durability: str = "frames"
    limits: Limits = field(default_factory=Limits)
    connections: int = 10_000
    tokens: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    recover: bool = False


def hosts(settings: Settings) -> set[str]:
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
        settings: see `Settings`.
        report: called with what an operator should know, such as the result of a reload.
        listens: called with the URL and the descriptions of the models when it listens.

    Attributes:
        ready: whether it takes requests.
        signal: the number of the signal that stopped it, if any.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        report: Callable[[str], None] = print,
        listens: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.models, self.settings, self.report, self._listens = models, settings, report, listens
        self.ready, self.signal, self.clients = False, 0, Clients(settings.connections)
        self.app = application(models, settings.tokens, settings.allow_origins, self, hosts(settings))
        self._store: Store | None = None
        self._handover: HandoverServer | None = None
        self._grpc: Any = None
        self._taken: Taken | None = None
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
            sockets: the listening sockets; None, with durable sessions: those of the process that uses the folder, or
                new ones.

        Raises:
            ServeError, FormatError, OSError: the port is in use, or see `request_handover` and `durable.Store`.
        """
        if self.settings.durable is not None:
            sockets = await self._take_over(self.settings.durable, sockets)
        assert sockets
        await super().serve(sockets)

    async def _take_over(self, folder: Path, sockets: list[socket.socket] | None) -> list[socket.socket]:
        from cellstack.serve.handover import is_running, request_handover

        settings = self.settings
        if is_running(folder):
            self._bind_grpc(reuse_port=True)  # before the other process stops listening, so that clients can connect
            self._taken = await request_handover(folder)
        elif settings.grpc_port is not None:
            listen(settings.host, settings.grpc_port).close()  # gRPC wouldn't notice that others use a port it shares
            self._bind_grpc(reuse_port=True)
        self._restore(folder)
        if self._taken is not None:
            return self._taken.sockets
        return sockets or [listen(settings.host, settings.port)]

    def _bind_grpc(self, reuse_port: bool = False) -> None:
        settings = self.settings
        if settings.grpc_port is None:
            return
        from cellstack.serve.inference_protocol import grpc

        address, credentials = (settings.host, settings.grpc_port), grpc_credentials(settings)
        self._grpc = grpc.bound(self.models, *address, settings.tokens, credentials, reuse_port)

    def _restore(self, folder: Path) -> None:
        """Restore the stored sessions, and store sessions from now on."""
        from cellstack.serve.durable import Store

        settings, models = self.settings, self.models
        self._store = store = Store(folder, settings.durability, wait=EXIT_SECONDS if self._taken else 0.0)
        loaded = {model.digest for model in models.all()}
        for path, options in reversed(store.stored_models()):  # older versions, of which there are sessions
            if digest_of(path, options) not in loaded:
                models.versions.setdefault(path.stem, []).insert(0, models.load(path, options))
        for name, versions in models.versions.items():
            for number, model in enumerate(versions, 1):
                model.version = number
                found = store.restore(
                    model, models.paths.get(name) if model is versions[-1] else None, settings.recover
                )
                if found is not None and (found.sessions or found.damage):
                    said = f"{name}: restored {found.sessions} sessions and {found.frames} frames"
                    self.report(f"{said} in {found.seconds:.2f} s")
                    for text in found.damage:
                        self.report(f"{name}: {text}")
        Service.of(models).find_restored()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving."""
        assert sockets
        loop, settings = asyncio.get_running_loop(), self.settings
        for model in self.models.all():
            model.start(loop)
        if self._grpc is None:
            self._bind_grpc()
        if self._grpc is not None:
            await self._grpc.start()
        if self._store is not None:
            from cellstack.serve.handover import HandoverServer

            self._handover = HandoverServer(self._store.folder, [one.dup() for one in sockets], self._hand_over)
            await self._handover.start()
            self._start(self._exit_after_handover(self._handover))
        await super().startup(sockets)
        for connection in self._taken.connections if self._taken else ():
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)
        self._start(self._close_idle())
        self.ready = True
        host, port = sockets[0].getsockname()[:2]
        url = f"http{'s' if settings.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        models = [described(versions[-1]) for versions in self.models.versions.values()]
        self._listens({"url": url, "port": port, "models": models})

    async def _exit_after_handover(self, handover: HandoverServer) -> None:
        await handover.done.wait()
        self.report("another process continues")
        self.should_exit = True

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _hand_over(self) -> list[socket.socket]:
        """Stop, and return the sockets of idle HTTP connections, which stay open."""
        taken: list[socket.socket] = []

        async def settle() -> None:
            until = time.monotonic() + ANSWER_SECONDS
            await asyncio.sleep(0.05)  # connections that were accepted just now aren't in the list yet
            while some := [one for one in self.server_state.connections if isinstance(one, Http)]:
                taken.extend(taken_from(one) for one in some if one.between_requests())
                if time.monotonic() > until:
                    return
                await asyncio.sleep(0.01)

        await self.finish(settle if self.settings.tls_cert is None else None)  # the state of TLS can't be passed
        return taken

    async def finish(self, settle: Callable[[], Awaitable[None]] | None = None) -> None:
        """Accept no more connections, answer all frames that were received, and store the sessions.

        Args:
            settle: waits for requests of connections that were accepted last; None: for `SETTLE_SECONDS`.
        """
        if self._finished:
            return
        self._finished, self.ready = True, False
        for server in self.servers:
            server.close()
        await (settle() if settle is not None else asyncio.sleep(SETTLE_SECONDS))
        Service.of(self.models).stop()
        await self.app.state.connections.finish()
        if self._grpc is not None:
            await self._grpc.stop(ANSWER_SECONDS)
        loop = asyncio.get_running_loop()
        for model in self.models.all():
            await loop.run_in_executor(None, model.stop)
        if self._store is not None:
            self._store.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, after `finish`."""
        if self._handover is not None:
            await self._handover.close()
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
                        await loop.run_in_executor(None, self._store.restore, model, path)
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


def taken_from(connection: Http) -> socket.socket:
    """Return a copy of a connection's socket that stays open, and forget the connection."""
    connection.transport.pause_reading()
    found = socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno()))
    connection.transport.abort()
    return found


def grpc_credentials(settings: Settings) -> Any:
    """Return the certificate and its key for gRPC; None without TLS."""
    if settings.tls_cert is None:
        return None
    import grpc

    certificate = Path(settings.tls_cert).read_bytes()
    key = Path(settings.tls_key).read_bytes() if settings.tls_key else certificate
    return grpc.ssl_server_credentials([(key, certificate)])


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
