"""The client for programs without an event loop."""

from __future__ import annotations

import asyncio
import ssl as tls
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from cellstack.serve.client.asynchronous import AsyncClient
from cellstack.serve.client.sessions import OpenSession

T = TypeVar("T")


class Session(OpenSession):
    """A session of a `Client`, which opens it.

    Attributes:
        token, model, frame, answers: see `AsyncSession`.
    """

    _client: _Core

    def step(self, x: Any) -> Any:
        """Send the next frame, and return its answer; see `AsyncSession.step`."""
        return self._client.wait(self._client._step_one(self, x))

    def state(self) -> bytes:
        """Return the state, for `Client.open`."""
        return self._client.wait(self._client._state(self))

    def close(self) -> None:
        """Close the session."""
        self._client.wait(self._client._close(self))


class _Core(AsyncClient):
    """The `AsyncClient` of a `Client`, with an event loop in a thread of its own."""

    _session = Session
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, and connect."""
        if self._thread is not None:
            raise RuntimeError("a client is opened once: make a new one")
        self._own_loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._own_loop.run_forever, name="cellstack-client", daemon=True)
        self._thread.start()
        try:
            self.wait(self.__aenter__())
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """Close the connection, and end the thread."""
        self.wait(self.__aexit__())
        self._end()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call."""
        if self._thread is None or not self._thread.is_alive():
            work.close()
            assert self._error is not None
            raise self._error.with_traceback(None)
        running = asyncio.run_coroutine_threadsafe(work, self._own_loop)
        try:
            return running.result()
        except BaseException:  # such as KeyboardInterrupt, which doesn't end the call
            running.cancel()
            raise

    def _end(self) -> None:
        assert self._thread is not None
        # in its own thread: this one may run another loop, as in a notebook
        asyncio.run_coroutine_threadsafe(self._own_loop.shutdown_default_executor(), self._own_loop).result()
        self._own_loop.call_soon_threadsafe(self._own_loop.stop)
        self._thread.join()
        self._own_loop.close()


class Client:
    """`AsyncClient` for programs without an event loop, which runs in a thread of its own.

    Threads may share a client: their steps share messages.

    Args:
        url, token, give_up, ssl: see `AsyncClient`.

    Raises:
        ConnectionError, OSError, ServeError: on entering the `with` block, see `AsyncClient`.

    Example::

        with Client("ws://localhost:8080") as client:
            session = client.open("model")
            y = session.step(x)
    """

    def __init__(
        self, url: str, token: str | None = None, *, give_up: float = 60.0, ssl: tls.SSLContext | None = None
    ) -> None:
        self._core = _Core(url, token, give_up=give_up, ssl=ssl)

    def __enter__(self) -> Client:
        self._core.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._core.stop()

    def open(self, model: str, count: int | None = None, version: int | None = None, state: bytes | None = None) -> Any:
        """Open a session, or a list of several; see `AsyncClient.open`."""
        return self._core.wait(self._core.open(model, count, version, state))

    def resume(self, token: str, last: int | None = None) -> Session:
        """Continue a session; see `AsyncClient.resume`."""
        return self._core.wait(self._core.resume(token, last))

    def step(self, sessions: Sequence[Session], x: Any) -> Any:
        """Send the next frame of each of some sessions in one message; see `AsyncClient.step`."""
        return self._core.wait(self._core.step(sessions, x))
