"""A WebSocket whose messages go to a `Connection` directly, without a task or a queue per message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from cellstack.serve.sockets import Connection

EXTENSION = "cellstack.websocket"  # of the scope, in which the application finds the WebSocket


class WebSocket(WebSocketsSansIOProtocol):
    """The protocol of a transport: uvicorn's, except for messages.

    The application accepts, refuses and closes the WebSocket over ASGI, as any other.

    Attributes:
        connection: receives the messages; set by the application before it accepts.
    """

    connection: Connection | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_text = False
        self._parts: list[bytes] = []  # of a message whose last fragment hasn't arrived

    @property
    def can_write(self) -> bool:
        """Whether a message can be sent now: it is open, and its client reads."""
        return self.writable.is_set() and not self.close_sent and not self.transport.is_closing()

    def write(self, message: bytes | str) -> None:
        """Send a message."""
        if isinstance(message, str):
            self.conn.send_text(message.encode())
        else:
            self.conn.send_binary(message)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def read(self, wanted: bool) -> None:
        """Read further messages, or pause."""
        if wanted == self.read_paused and not self.transport.is_closing():
            self.read_paused = not wanted
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    def handle_connect(self, event: Any) -> None:
        """Call the application."""
        super().handle_connect(event)
        if not self.handshake_complete:  # otherwise the request was refused
            scope: Any = self.scope
            scope["extensions"][EXTENSION] = self

    def handle_ping(self) -> None:
        """Answer a ping; read no further ones while the client doesn't read the answers."""
        super().handle_ping()
        if not self.writable.is_set():
            self.read(False)

    def handle_text(self, event: Any) -> None:
        """Receive a text message, or its first fragment."""
        self._is_text = True
        self.handle_cont(event)

    def handle_bytes(self, event: Any) -> None:
        """Receive a binary message, or its first fragment."""
        self._is_text = False
        self.handle_cont(event)

    def handle_cont(self, event: Any) -> None:
        """Receive a fragment of a message."""
        if self._parts or not event.fin:
            self._parts.append(event.data)
            if event.fin:
                data, self._parts = b"".join(self._parts), []
                self._message(data)
        else:
            self._message(event.data)

    def _message(self, data: bytes) -> None:
        if self.close_sent:
            return
        if self.connection is None:  # a client that didn't wait for the end of the handshake
            self.transport.close()
        elif not self._is_text:
            self.connection.received(data)
        else:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                self.conn.fail(1007, "expected UTF-8")
                self.handle_parser_exception()
            else:
                self.connection.received(text)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self.connection is None:
            self.read(True)
        else:
            self.connection.writable()
