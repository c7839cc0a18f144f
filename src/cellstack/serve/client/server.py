"""Where a server is, and how a client connects to it."""

from __future__ import annotations

import asyncio
import json
import random
import ssl as tls
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit, urlunsplit

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import InvalidHandshake, InvalidStatus
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"cellstack.serve.client needs {error.name}: pip install 'cellstack[serve]'", name=error.name
    ) from error
from cellstack.serve.models import ServeError

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds before a connection is tried again; they double
SECONDS = 20.0  # for an HTTP request
RETRIED = (429, 500, 502, 503, 504)  # HTTP statuses of a server that is starting or stopping, or of its proxy


class Server:
    """A server's address, with what is needed to connect.

    Args:
        url, token, give_up, ssl: see `AsyncClient`.

    Raises:
        ValueError: another scheme than ws and wss, or no host.
    """

    def __init__(self, url: str, token: str | None, give_up: float, ssl: tls.SSLContext | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.netloc:
            raise ValueError(f"expected a URL such as ws://localhost:8080, got {url!r}")
        path = parts.path.rstrip("/")
        self.url, self.give_up = url, give_up
        self._socket_url = urlunsplit((parts.scheme, parts.netloc, f"{path}/multiplex", "", ""))
        self._http_url = urlunsplit(("http" + parts.scheme[2:], parts.netloc, path, "", ""))
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._tls = ssl

    async def connect(self) -> ClientConnection:
        """Connect once.

        Raises:
            ConnectionError: the server can't be reached now.
            ServeError: it refuses the connection.
        """
        try:
            options: dict[str, Any] = {"ssl": self._tls} if self._tls is not None else {}
            return await connect(
                self._socket_url, additional_headers=self._headers, compression=None, max_size=None, **options
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in RETRIED:
                raise ConnectionError(f"{self.url} answered with status {status}") from None
            raise ServeError(
                status, _reason(bytes(error.response.body or b""), f"{self.url} answered with status {status}")
            ) from None
        except InvalidHandshake as error:
            raise ConnectionError(f"{self.url}: {error}") from None
        except (OSError, asyncio.TimeoutError) as error:
            if isinstance(error, tls.SSLError):
                raise
            raise ConnectionError(f"{self.url} can't be reached: {error or type(error).__name__}") from None

    async def connect_again(self) -> ClientConnection:
        """Connect, with pauses between the attempts.

        Raises:
            ConnectionError: after `give_up` seconds.
            ServeError: see `connect`.
        """
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE
        lost = loop.time()
        while True:
            try:
                return await self.connect()
            except OSError as error:
                if (seconds := loop.time() - lost) > self.give_up:
                    raise ConnectionError(f"given up after {seconds:.0f} seconds: {error}") from None
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # so that clients don't come all at once
            pause = min(2 * pause, LONGEST_PAUSE)

    def http(self, method: str, path: str, body: bytes | None) -> bytes:
        """Return the body of an HTTP answer; this blocks.

        Raises:
            ServeError: the server refuses the request.
            OSError: it can't be reached now.
        """
        request = urllib.request.Request(self._http_url + path, body, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS, context=self._tls) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                text = error.read()
            raise ServeError(error.code, _reason(text, f"{error.code} {error.reason}")) from None


def _reason(body: bytes, otherwise: str) -> str:
    """Return the text of an error that the server answered, or another one if the answer isn't the server's own."""
    try:
        return json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return otherwise
