"""Connections over WebSocket: what both protocols share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from cellstack.serve.clients import EXTENSION
from cellstack.serve.models import Models, ServeError, Session
from cellstack.serve.texts import text_of
from cellstack.serve.websocket import WebSocket

CLOSED, RESTARTING, CONFLICT, TAKEN = 1000, 1012, 4409, 4410  # close codes
FINISH_SECONDS = 5.0  # for the answers to queued frames when the server stops
MOST_REASON = 120  # characters of a close frame's reason


class Connections:
    """The open WebSockets of a server."""

    def __init__(self) -> None:
        self.open: set[Connection] = set()

    async def finish(self) -> None:
        """Answer the frames that were received, then close every connection, because the server stops."""
        for connection in self.open:
            connection.end(RESTARTING, "the server is stopping")
        ends = [connection.ended.wait() for connection in self.open]
        if ends:
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=FINISH_SECONDS)


class Endpoint:
    """The ASGI application of one of the protocols."""

    def __init__(self, kind: type[Connection], models: Models, connections: Connections) -> None:
        self.kind, self.models, self.connections = kind, models, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection until it ends."""
        websocket: WebSocket | None = scope.get("extensions", {}).get(EXTENSION)
        if websocket is None:
            raise RuntimeError("expected uvicorn with ws=cellstack.serve.websocket.WebSocket")
        websocket.connection = connection = self.kind(self.models, websocket)
        try:
            await connection.start(HTTPConnection(scope))
        except ServeError as error:
            await JSONResponse({"error": str(error)}, error.status)(scope, receive, send)
            return
        self.connections.open.add(connection)
        try:
            await connection.run(receive, send)
        finally:
            self.connections.open.discard(connection)


class Connection:
    """A WebSocket: processes messages as they arrive, and sends answers in order.

    A message that can't be processed yet waits, and the connection isn't read: while a text message before it is
    processed, while more than `Limits.waiting` of the connection's frames and messages have no answer that was sent,
    and beyond the rate limit. So a client that doesn't read its answers blocks only itself.

    All methods are called on the event loop's thread.

    Attributes:
        ended: set when it is closed.
    """

    def __init__(self, models: Models, websocket: WebSocket) -> None:
        self.models, self.limits, self._websocket = models, models.limits, websocket
        self.ended = asyncio.Event()
        self._received: deque[bytes | str] = deque()  # messages that wait
        self._reading = False  # whether a call processes them
        self._task: asyncio.Task[None] | None = None  # which processes a text message
        self._too_fast = False  # whether the rate limit is exceeded
        self._due = 0.0  # the time until which its frames were sent at the limit's rate
        self._accepted = False
        self._unanswered = 0
        self._out: list[Any] = []  # what is to be sent: texts, and what `messages` converts
        self._messages: deque[tuple[bytes | str, int]] = deque()  # what is sent before it, and the answers in each
        self._ending: tuple[int, str] | None = None
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # when it may be closed

    async def start(self, request: HTTPConnection) -> None:
        """Prepare the connection, which isn't accepted yet.

        Raises:
            ServeError: it is refused.
        """

    async def greet(self) -> None:
        """Send what the protocol begins with."""

    def text(self, text: str) -> Coroutine[Any, Any, None] | None:
        """Process a text message; return what remains to be done before the next message is processed."""
        raise NotImplementedError

    def binary(self, data: bytes) -> int:
        """Process a binary message; return the number of its frames."""
        raise NotImplementedError

    def messages(self, out: list[Any]) -> Iterable[tuple[bytes | str, int]]:
        """Return texts and answers as messages, and the number of answers in each."""
        raise NotImplementedError

    def sessions(self) -> list[Session]:
        """Return the sessions whose frames it sends."""
        raise NotImplementedError

    def lost(self, session: Session, why: str) -> None:
        """See `models.Owner`."""
        raise NotImplementedError

    async def run(self, receive: Receive, send: Send) -> None:
        """Serve the client until the connection ends."""
        gone: asyncio.Future[Any] | None = None
        try:
            await receive()  # the event that the client wants to connect
            await send({"type": "websocket.accept"})
            self._accepted = True
            self._begin(self.greet())
            gone = asyncio.ensure_future(receive())  # the only further event: the client has left
            await asyncio.wait((gone, self._answered), return_when=asyncio.FIRST_COMPLETED)
            if self._answered.done():
                self._answered.result()  # raises the exception of a task
                code, reason = self._ending or (CLOSED, "")
                self._websocket.read(True)  # until the client closes it too
                await send({"type": "websocket.close", "code": code, "reason": reason[:MOST_REASON]})
        finally:
            self.end(CLOSED, "")  # if the client has left
            if gone is not None:
                gone.cancel()
            if self._task is not None:
                await asyncio.wait((self._task,))  # such as sessions that are being opened
            for session in self.sessions():
                if session.owner is self:
                    session.take(None)
            self.ended.set()

    def end(self, code: int, reason: str) -> None:
        """Close it: after the answers to all frames, or immediately if others have its session now."""
        if self._ending is None:
            self._ending = (code, reason)
            self._received.clear()
            self.flush()

    # ── from the client ─────────────────────────────────────────────────────────────────────────────────────────────

    def received(self, message: bytes | str) -> None:
        """Process a message, or let it wait."""
        if self._ending is None:
            self._received.append(message)
            self._read()

    def _read(self) -> None:
        """Process the messages that needn't wait."""
        if self._reading:  # this was called as a message was answered
            return
        self._reading, waiting, websocket = True, self._received, self._websocket
        try:
            while waiting and self._can_process():
                self._process(waiting.popleft())
        finally:
            self._reading = False
        if waiting or self._too_fast:
            websocket.read(False)
        elif websocket.read_paused and websocket.can_write:
            websocket.read(True)

    def _process(self, message: bytes | str) -> None:
        try:
            if isinstance(message, str):
                count, work = 1, self.text(message)
                if work is not None:
                    self._begin(work)
            else:
                count = self.binary(message)
        except (ServeError, ValueError) as error:
            self.refuse(str(error))
            count = 1
        self._count(count)

    def _can_process(self) -> bool:
        free = self._task is None and not self._too_fast and self._unanswered <= self.limits.waiting
        return free and self._accepted and self._ending is None

    def count(self, frames: int) -> None:
        """Apply the rate limit to frames of the WebSocket that complete no message, such as fragments and pings."""
        self._count(frames)
        if self._too_fast:
            self._websocket.read(False)

    def _count(self, frames: int) -> None:
        if self.limits.rate is None:
            return
        now = time.monotonic()
        self._due = max(self._due, now - 1) + frames / self.limits.rate
        if self._due > now and not self._too_fast:
            self._too_fast = True
            asyncio.get_running_loop().call_later(self._due - now, self._at_rate)

    def _at_rate(self) -> None:
        self._too_fast = False
        self._read()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, (ServeError, ValueError)):
            self.refuse(str(error))
        elif error is not None and not self._answered.done():
            self._answered.set_exception(error)
        self._read()

    def refuse(self, why: str) -> None:
        """Answer a message that isn't understood."""
        self.say({"error": why})

    # ── to the client ───────────────────────────────────────────────────────────────────────────────────────────────

    def say(self, value: Any) -> None:
        """Send a text message."""
        self._unanswered += 1
        self.put(text_of(value))

    def put(self, *out: Any) -> None:
        """Send texts and answers, after those before."""
        self._out += out
        self.flush()

    def flush(self) -> None:
        """Send what is to be sent, as far as the client reads it; the rest is sent when it does."""
        now = self._ending is not None and self._ending[0] in (CONFLICT, TAKEN)
        if not now:
            self._send()
            if self._received:
                self._read()
        if self._ending is not None and (now or not self._unanswered) and not self._answered.done():
            self._answered.set_result(None)

    def _send(self) -> None:
        websocket, messages = self._websocket, self._messages
        while websocket.can_write:
            if messages:
                message, count = messages.popleft()
                websocket.write(message)
                self._unanswered -= count
            elif self._out:
                out, self._out = self._out, []
                messages.extend(self.messages(out))
            else:
                break

    def writable(self) -> None:
        """Go on, as the client reads again."""
        self.flush()
        self._read()
