"""A WebSocket whose messages go to a `Connection` directly, without a task or a queue per message.

Frames are parsed here and not by websockets, which parses all at once what has been read: 40,000 empty frames have room
in one read, and take half a second, in which nobody else is served.
"""

from __future__ import annotations

from typing import Any, Protocol

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.exceptions import ProtocolError
from websockets.frames import (
    Close,
    CloseCode,
    Frame,
    Opcode,
    apply_mask,  # type: ignore[attr-defined]  # in C if websockets was compiled
)
from websockets.http11 import Request

from cellstack.serve.clients import EXTENSION, Clients

FRAMES = 64  # that are parsed before other connections have their turn
MOST_FRAGMENTS = 16384  # of a message
FIN, RESERVED, CONTROL, OPCODE, MASKED = 0x80, 0x70, 0x08, 0x0F, 0x80  # bits of a frame's first two bytes
EXTENDED = {126: 2, 127: 8}  # bytes of longer lengths


class FrameError(Exception):
    """A frame that isn't allowed.

    Attributes:
        code: with which the WebSocket is closed.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Receiver(Protocol):
    """What receives the messages of a WebSocket: a `sockets.Connection`."""

    def received(self, message: bytes | str) -> None:
        """Process a message."""

    def count(self, frames: int) -> None:
        """Apply the rate limit to frames that complete no message."""

    def writable(self) -> None:
        """Go on sending."""


class WebSocket(WebSocketsSansIOProtocol):
    """The protocol of a transport: uvicorn's, except for frames.

    The application accepts, refuses and closes the WebSocket over ASGI, as any other.

    Attributes:
        clients: of the server; set by a subclass.
        connection: receives the messages; set by the application before it accepts.
    """

    clients: Clients
    connection: Receiver | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._buffer = bytearray()  # frames that wait, and a part of one
        self._waiting = False  # whether there are whole frames in it
        self._is_text = False
        self._parts: bytearray | None = None  # of a message whose last fragment hasn't arrived
        self._fragments = 0

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self.clients.discard(self.transport)
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Close the connection, as others need its place."""
        self.transport.abort()

    def shutdown(self) -> None:
        """Close the connection as the server stops, unless the client still has to answer its close.

        If it were closed while the client sends, TCP would reset it, and the client might not get the close frame.
        """
        if self.close_timer is None:
            super().shutdown()

    def handshake(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Call the application with a request to connect, which it answers."""
        known = Headers()
        for name, value in headers:
            known[name.decode("ascii")] = value.decode("ascii", "backslashreplace")
        self.handle_connect(Request(url.decode("ascii"), known))
        if not self.handshake_complete:  # otherwise the request was refused
            scope: Any = self.scope
            scope["headers"] = headers
            scope["extensions"][EXTENSION] = self

    async def send(self, message: Any) -> None:
        """Send an event of ASGI."""
        await super().send(message)
        if self.close_sent:  # also a handshake that was refused is complete, which uvicorn would report as an error
            self.handshake_complete = True

    # ── messages to the client ──────────────────────────────────────────────────────────────────────────────────────

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

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self.connection is None:
            self.read(True)
        else:
            self.connection.writable()

    # ── frames from the client ──────────────────────────────────────────────────────────────────────────────────────

    def read(self, wanted: bool) -> None:
        """Read further messages, or pause."""
        if wanted == self.read_paused and not self.transport.is_closing():
            self.read_paused = not wanted
            if not self._waiting:
                (self.transport.resume_reading if wanted else self.transport.pause_reading)()
            elif wanted:
                self.clients.later(self._go_on)

    def data_received(self, data: bytes) -> None:
        """Process frames."""
        if not self.handshake_complete:  # a client that didn't wait for the answer
            self.transport.close()
        elif self._buffer:
            self._buffer += data
            if self._waiting:
                self.transport.pause_reading()  # such as of data that TLS had decrypted already
            else:
                self._frames(self._buffer)
        else:
            self._frames(data)

    def _go_on(self) -> None:
        """Process frames that wait."""
        if self._waiting and not self.read_paused:
            self._frames(self._buffer)

    def _frames(self, data: bytes | bytearray) -> None:
        """Process the first frames of the data, and keep what follows them."""
        start, count, others, found = 0, 0, 0, None
        try:
            while count < FRAMES and not self.read_paused and not self.transport.is_closing():
                found = self._next(data, start)
                if found is None:
                    break
                first, payload, start = found
                count += 1
                if not self._frame(first, payload):
                    others += 1
        except FrameError as error:
            self.conn.fail(error.code, str(error))
            self.handle_parser_exception()
        if self.transport.is_closing():
            self._buffer.clear()
            return
        if self.connection is not None and others:
            self.connection.count(others)
        if data is self._buffer:
            del self._buffer[:start]
        else:
            self._buffer += memoryview(data)[start:]
        waited, self._waiting = self._waiting, found is not None and len(self._buffer) > 0
        if not self.read_paused:
            if waited != self._waiting:
                (self.transport.pause_reading if self._waiting else self.transport.resume_reading)()
            if self._waiting:
                self.clients.later(self._go_on)

    def _next(self, data: bytes | bytearray, start: int) -> tuple[int, bytes, int] | None:
        """Return the first byte of a frame, its payload and its end; None if it isn't complete.

        Raises:
            FrameError: it isn't allowed.
        """
        size = len(data)
        if size < start + 2:
            return None
        first, length, end = data[start], data[start + 1], start + 2
        if first & RESERVED:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "reserved bits must be 0")
        if not length & MASKED:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "frames of a client must be masked")
        length &= ~MASKED
        if first & CONTROL:
            if length > 125 or not first & FIN:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "a control frame has at most 125 bytes and no fragments")
        else:
            if length in EXTENDED:
                end += EXTENDED[length]
                if size < end:
                    return None
                length = int.from_bytes(data[start + 2 : end], "big")
            most = self.config.ws_max_size
            if length + len(self._parts or b"") > most:
                raise FrameError(CloseCode.MESSAGE_TOO_BIG, f"a message has at most {most} bytes")
        mask, end = end, end + 4 + length
        if size < end:
            return None
        return first, apply_mask(data[mask + 4 : end], data[mask : mask + 4]), end

    def _frame(self, first: int, payload: bytes) -> bool:
        """Process a frame; return whether it is the last one of a message.

        Raises:
            FrameError: it isn't allowed here.
        """
        opcode, last = first & OPCODE, bool(first & FIN)
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            if self._parts is not None:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "expected a continuation frame")
            self._is_text = opcode == Opcode.TEXT
            if last:
                self._message(payload)
                return True
            self._parts, self._fragments = bytearray(payload), 1
        elif opcode == Opcode.CONT:
            if self._parts is None:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "unexpected continuation frame")
            self._parts += payload
            self._fragments += 1
            if last:
                data, self._parts = bytes(self._parts), None
                self._message(data)
                return True
            if self._fragments == MOST_FRAGMENTS:
                raise FrameError(CloseCode.MESSAGE_TOO_BIG, f"a message has at most {MOST_FRAGMENTS} fragments")
        elif opcode == Opcode.PING:
            self.conn.send_pong(payload)
            self.handle_ping()
        elif opcode == Opcode.PONG:
            self.handle_pong(Frame(Opcode.PONG, payload))
        elif opcode == Opcode.CLOSE:
            self._close(payload)
        else:
            raise FrameError(CloseCode.PROTOCOL_ERROR, f"unknown opcode {opcode}")
        return False

    def handle_ping(self) -> None:
        """Answer a ping; read no further ones while the client doesn't read the answers."""
        super().handle_ping()
        if not self.writable.is_set():
            self.read(False)

    def keepalive_timeout(self) -> None:
        """Close the WebSocket as a ping wasn't answered, unless the answer may wait as frames before it do."""
        if self.can_write and self.read_paused and self.ping_timeout is not None:
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
        else:
            super().keepalive_timeout()

    def _close(self, payload: bytes) -> None:
        """Answer the client's close, or note its answer."""
        try:
            close = Close.parse(payload)
        except UnicodeDecodeError:
            raise FrameError(CloseCode.INVALID_DATA, "expected UTF-8") from None
        except ProtocolError as error:
            raise FrameError(CloseCode.PROTOCOL_ERROR, str(error)) from None
        if self._parts is not None:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "incomplete fragmented message")
        if not self.close_sent:
            self.conn.send_close(*(() if close.code == CloseCode.NO_STATUS_RCVD else (close.code, close.reason)))
        self.conn.close_rcvd = close
        self.handle_close(Frame(Opcode.CLOSE, payload))
        self.close_sent = True

    def _message(self, data: bytes) -> None:
        if self.close_sent:
            return
        assert self.connection is not None  # the application has set it before it accepted
        if not self._is_text:
            self.connection.received(data)
            return
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise FrameError(CloseCode.INVALID_DATA, "expected UTF-8") from None
        self.connection.received(text)
