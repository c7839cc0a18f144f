"""Connections over HTTP: uvicorn's, with limits of heads and of the data that are processed at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cellstack.serve.clients import EXTENSION, Clients

HEAD_SECONDS = 10.0  # in which a request's head must arrive
HEAD_BYTES = 64 << 10  # of a head
HEAD_LINES = 256  # of a head: each takes some 150 bytes of memory, however short it is
PORTION = 4096  # bytes that are parsed before other connections have their turn: at most some 200 requests


class Flow(FlowControl):
    """Pauses reading while uvicorn wants it, and while data wait that have been read.

    Attributes:
        held: whether data wait.
    """

    def __init__(self, connection: Http) -> None:
        super().__init__(connection.transport)
        self.held, self._connection = False, connection

    def hold(self, held: bool) -> None:
        """Note whether data wait."""
        self.held = held
        if not self.read_paused:
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def pause_reading(self) -> None:
        """Read no further data, for uvicorn."""
        if self.held:
            self.read_paused = True
        else:
            super().pause_reading()

    def resume_reading(self) -> None:
        """Read further data, for uvicorn."""
        if self.held:
            self.read_paused = False
            self._connection.later()
        else:
            super().resume_reading()


class Http(HttpToolsProtocol):
    """A connection, until it becomes a WebSocket.

    Attributes:
        clients: of the server; set by a subclass.
    """

    clients: Clients
    flow: Any  # a `Flow`
    parser: Any
    _deadline: asyncio.TimerHandle | None = None  # of a head, or of the rest of a body that nobody reads
    _size = 0  # bytes of it so far
    _receiving = False  # whether a request has arrived in part
    _in_head = True  # whether less than its head
    _answering: Any = None  # the request that is being answered, or was last

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rest = bytearray()  # data that wait

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection."""
        super().connection_made(transport)
        self.flow = Flow(self)
        self._expect()
        self.clients.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._arrived()
        self.clients.discard(self.transport)
        if self._answering is not None:  # uvicorn only tells the request that arrived last
            self._answering.disconnected = True
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Parse data, or the first part of them."""
        if self.transport.is_closing():
            return
        if len(data) <= PORTION and not self.pipeline and not self.flow.held:
            self._parse(data)
            return
        self._rest += data
        if not self.flow.held:
            self.flow.hold(True)
            self._go_on()

    def later(self) -> None:
        """Parse data that wait when it is this connection's turn."""
        self.clients.later(self._go_on)

    def _go_on(self) -> None:
        """Parse a part of the data that wait, unless requests before them do."""
        if not self.flow.held or self.pipeline or self.flow.read_paused or self.transport.is_closing():
            return
        data = bytes(self._rest[:PORTION])
        del self._rest[:PORTION]
        self._parse(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        if self._rest:
            self.later()
        else:
            self.flow.hold(False)

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        answered = self.cycle is not None and self.cycle.response_complete
        if self._deadline is None and answered:
            if self._receiving:
                self._expect()
            elif self.timeout_keep_alive_task is None:  # such as after the end of a line between two requests
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
        if self._deadline is not None:
            self._size += len(data)
        if self._deadline is not None or self._receiving:
            self._check(self._size)

    def _check(self, size: int) -> bool:
        """Refuse a request whose head, or what follows its body, is too large; return whether it is not."""
        if size > HEAD_BYTES:
            text = f"the head is larger than {HEAD_BYTES} bytes"
        elif len(self.headers or ()) > HEAD_LINES:
            text = f"the head has more than {HEAD_LINES} lines"
        else:
            return True
        if self._in_head:
            self._refuse("431 Request Header Fields Too Large", text)
        else:
            self.transport.close()
        return False

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {EXTENSION: self}
        self._receiving = self._in_head = True
        if self._deadline is None:
            self._expect()

    def on_headers_complete(self) -> None:
        """End a request's head."""
        if not self._check(sum([len(name) + len(value) + 4 for name, value in self.headers], len(self.url))):
            raise ValueError("the head is too large")  # ends the parser
        if self.parser.should_upgrade() and self._should_upgrade():
            self.url.decode("ascii")  # raises an error, which is answered
        else:
            self._arrived()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request."""
        self._receiving = False
        if self.cycle is not None and self.cycle.response_complete:
            self._arrived()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """End the answer to a request."""
        super().on_response_complete()
        if self.flow.held:
            self.later()

    def _should_upgrade(self) -> bool:
        plain = self.parser.get_method() == b"GET" and self.parser.get_http_version() == "1.1"
        bodies = (b"content-length", b"transfer-encoding")
        return plain and super()._should_upgrade() and not any(name in bodies for name, _ in self.headers)

    def _unsupported_upgrade_warning(self) -> None:
        self.cycle.keep_alive = False  # nothing after this request will be parsed

    def handle_websocket_upgrade(self) -> None:
        """Become a WebSocket.

        uvicorn would have the head parsed again, with other limits, which has no answer to a head beyond them.
        """
        self._arrived()
        self.connections.discard(self)
        options: dict[str, Any] = {"server_state": self.server_state, "app_state": self.app_state}
        websocket: Any = self.ws_protocol_class(config=self.config, **options)  # type: ignore[misc]
        websocket.connection_made(self.transport)
        self.transport.set_protocol(websocket)
        self.transport.resume_reading()
        websocket.handshake(self.url, self.headers)

    def give_way(self) -> None:
        """Close the connection, as others need its place."""
        if self.transport.get_write_buffer_size():  # the client doesn't read
            self.transport.abort()
        else:
            self._refuse(
                "503 Service Unavailable", f"more than {self.clients.most_new} connections have sent no request"
            )

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._size = None, 0

    def _late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request before it isn't answered yet
            self._expect()
        elif self._in_head:
            self._refuse("408 Request Timeout", f"the head didn't arrive within {HEAD_SECONDS:.0f} seconds")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request, unless it was answered."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _refuse(self, status: str, text: str) -> None:
        body = json.dumps({"error": text})
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        self.transport.write(f"HTTP/1.1 {status}\r\n{head}\r\n\r\n{body}".encode())
        self.transport.close()
        self._arrived()
