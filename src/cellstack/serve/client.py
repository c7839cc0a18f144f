"""The client of a server: sessions, each over a WebSocket of its own, which is opened again after it was lost."""

from __future__ import annotations

import json
import ssl as tls
import time
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np

from cellstack import ShapeError
from cellstack.serve.models import ServeError

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.sync.client import ClientConnection, connect
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"cellstack.serve.Client needs {error.name}: pip install 'cellstack[serve]'", name=error.name
    ) from error

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds before a connection is tried again; they double
RETRIED = (429, 500, 502, 503, 504)  # HTTP statuses of a server that is starting or stopping, or of its proxy
ENDED = (1000, 4409, 4410)  # close codes with which a session is over for this connection


class Client:
    """A server's address, with what is needed to open sessions.

    Args:
        url: such as `ws://localhost:8080`.
        token: of the server, if it requires one.
        give_up: seconds after which a lost connection is an error.
        ssl: settings of TLS, for `wss`; None: Python's.

    Raises:
        ValueError: another scheme than ws and wss, or no host.

    Example::

        session = Client("ws://localhost:8080").open("model")
        y = session.step(x)
    """

    def __init__(
        self, url: str, token: str | None = None, *, give_up: float = 60.0, ssl: tls.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.netloc:
            raise ValueError(f"expected a URL such as ws://localhost:8080, got {url!r}")
        self.url, self.give_up = url.rstrip("/"), give_up
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._tls: dict[str, Any] = {} if ssl is None else {"ssl": ssl}

    def open(self, model: str) -> Session:
        """Open a session of a model.

        Raises:
            ConnectionError: the server can't be reached.
            ServeError: it refuses the session.
        """
        return Session(self, model, self._connected(model))

    def resume(self, model: str, token: str) -> Session:
        """Continue a session, which another client or process has opened.

        Raises:
            ConnectionError, ServeError: see `open`.
        """
        return Session(self, model, self._connected(model, session=token))

    def _connected(self, model: str, **query: Any) -> ClientConnection:
        path = f"{self.url}/models/{quote(model)}/stream?{urlencode(query)}"
        options = {"additional_headers": self._headers, "compression": None, "max_size": None, **self._tls}
        try:
            return connect(path, **options).__enter__()  # until the session is closed
        except InvalidStatus as error:
            status, body = error.response.status_code, bytes(error.response.body or b"")
            if status in RETRIED:
                raise ConnectionError(f"{self.url} answered with status {status}") from None
            try:
                why = json.loads(body)["error"]
            except (ValueError, KeyError, TypeError):  # of a proxy
                why = f"{self.url} answered with status {status}"
            raise ServeError(status, why) from None
        except (OSError, InvalidHandshake) as error:
            if isinstance(error, tls.SSLError):
                raise
            raise ConnectionError(f"{self.url} can't be reached: {error or type(error).__name__}") from None


class Session:
    """A session of a server, which a `Client` opens. At the end of a `with` block it is closed.

    Attributes:
        token: the secret with which it can be resumed.
        model: the model's name.
        frame: the number of the last frame that was answered.
    """

    def __init__(self, client: Client, model: str, socket: ClientConnection) -> None:
        self.model, self._client = model, client
        self.frame = self._greeted(socket)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, x: Any) -> Any:
        """Send the next frame, and return its answer. If the connection is lost, the call only takes longer.

        Args:
            x: `[I]`, or an id; several inputs are a dict by name.

        Returns:
            `[W]`, or a tuple if there are several outputs.

        Raises:
            ShapeError: another width, before anything is sent.
            ServeError: the server has refused the frame, such as one with NaN, which counts all the same; or the
                session is over (status 404 or 409). If the server has restarted without the last frames, `frame` is
                the last one that it knows: send again those after it.
            ConnectionError: the server could not be reached again.
        """
        data, there = self._packed(x), False
        while True:
            try:
                if not there:
                    self._socket.send(data)
                answer = self._socket.recv()
                break
            except ConnectionClosed as error:
                if error.rcvd is not None and error.rcvd.code in ENDED:
                    raise ServeError(409, error.rcvd.reason or "the session is closed") from None
                there = self._again()
        self.frame += 1
        if isinstance(answer, str):
            raise ServeError(400, json.loads(answer)["error"])
        row = np.frombuffer(answer, self._outputs)[0]
        return row[0] if len(row) == 1 else tuple(row)

    def close(self) -> None:
        """Close the session."""
        with suppress(ConnectionClosed):
            self._socket.send('{"close": true}')
        self._socket.close()

    def _again(self) -> bool:
        """Connect again; return whether the server has received the next frame already."""
        self._socket.close()
        pause, end = FIRST_PAUSE, time.monotonic() + self._client.give_up
        while True:
            try:
                known = self._greeted(self._client._connected(self.model, session=self.token, last=self.frame))
                break
            except (ConnectionError, ConnectionClosed) as error:
                if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code in ENDED:
                    self._lost(error.rcvd.reason)
                if time.monotonic() > end:
                    raise ConnectionError(f"given up after {self._client.give_up:g} seconds: {error}") from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if known < self.frame:
            frame, self.frame = self.frame, known
            self._lost(f"the server has lost the frames from {known + 1} to {frame}")
        return known > self.frame

    def _lost(self, why: str) -> None:
        raise ServeError(409, why)

    def _greeted(self, socket: ClientConnection) -> int:
        """Read what the server says of the session; return the number of its last frame."""
        self._socket, about = socket, json.loads(socket.recv())
        self.token: str = about["session"]
        self._inputs, self._outputs = (np.dtype([_field(of) for of in about[name]]) for name in ("inputs", "outputs"))
        return about["frame"]

    def _packed(self, x: Any) -> bytes:
        row, names = np.zeros(1, self._inputs), self._inputs.names or ()
        values = x if isinstance(x, dict) else dict.fromkeys(names[:1], x)
        if values.keys() != set(names):
            raise ShapeError(f"step: expected the inputs {', '.join(names)}, got {', '.join(map(str, values))}")
        for name, value in values.items():
            array, wanted = np.asarray(value), self._inputs[name]
            if array.shape != wanted.shape or array.dtype.kind not in "iuf"[: 2 + (wanted.base.kind == "f")]:
                raise ShapeError(
                    f"step: expected {name} {list(wanted.shape)} {wanted.base}, got {list(array.shape)} {array.dtype}"
                )
            row[name] = array
        return row.tobytes()


def _field(of: dict[str, Any]) -> tuple[Any, ...]:
    """Return the field of a record for a description of an input or output."""
    kind = np.dtype(of["dtype"]).newbyteorder("<")
    return (of["name"], kind) if of["width"] is None else (of["name"], kind, (of["width"],))
