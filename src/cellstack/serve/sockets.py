"""Both WebSocket protocols: one session per connection, and many sessions per connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from cellstack.serve import frames
from cellstack.serve.models import Model, Models, ServeError, Session
from cellstack.serve.rows import Records
from cellstack.serve.texts import described, parsed, text_of
from cellstack.serve.worker import Answers

CLOSED, RESTARTING, CONFLICT, TAKEN = 1000, 1012, 4409, 4410  # close codes
FINISH_SECONDS = 5.0  # for the answers to queued frames when the server stops
MOST_BYTES = 1 << 20  # of a message to a client: what clients accept by default
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
        connection = self.kind(self.models, receive, send)
        try:
            await connection.start(HTTPConnection(scope))
        except ServeError as error:
            await JSONResponse({"error": str(error)}, error.status)(scope, receive, send)
            return
        self.connections.open.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.open.discard(connection)


class Connection:
    """A WebSocket: reads messages, and sends answers in order.

    It is not read while more than `Limits.waiting` of its frames and messages have no answer that was sent. So a client
    that doesn't read its answers blocks only itself.

    Attributes:
        ended: set when it is closed.
    """

    def __init__(self, models: Models, receive: Receive, send: Send) -> None:
        self.models, self.limits = models, models.limits
        self.ended = asyncio.Event()
        self._receive, self._send = receive, send
        self._unanswered = 0
        self._due = 0.0  # the time until which its frames were sent at the limit's rate
        self._answered, self._to_send = asyncio.Event(), asyncio.Event()
        self._out: list[Any] = []  # what is to be sent: texts, and what `messages` converts
        self._ending: tuple[int, str] | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, request: HTTPConnection) -> None:
        """Prepare the connection, which isn't accepted yet.

        Raises:
            ServeError: it is refused.
        """

    async def greet(self) -> None:
        """Send what the protocol begins with."""

    async def text(self, text: str) -> None:
        """Process a text message."""
        raise NotImplementedError

    def binary(self, data: bytes) -> int:
        """Process a binary message; return the number of its frames."""
        raise NotImplementedError

    def messages(self, answers: list[Any]) -> Iterator[tuple[bytes, int]]:
        """Return answers as binary messages, and the number of answers in each."""
        raise NotImplementedError

    def sessions(self) -> list[Session]:
        """Return the sessions whose frames it sends."""
        raise NotImplementedError

    def lost(self, session: Session, why: str) -> None:
        """See `models.Owner`."""
        raise NotImplementedError

    def end(self, code: int, reason: str) -> None:
        """Close it: after the answers to all frames, or immediately if others have its session now."""
        if self._ending is None:
            self._ending = (code, reason)
            if self._reader is not None:
                self._reader.cancel()
            self._to_send.set()

    def say(self, value: Any) -> None:
        """Send a text message."""
        self._unanswered += 1
        self.put(text_of(value))

    def put(self, *out: Any) -> None:
        """Send texts and answers, after those before."""
        self._out += out
        self._to_send.set()

    async def run(self) -> None:
        """Serve the client until the connection ends."""
        await self._receive()  # the event that the client wants to connect
        await self._send({"type": "websocket.accept"})
        await self.greet()
        self._reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write())
        if self._ending is not None:
            self._reader.cancel()
        try:
            await asyncio.wait((self._reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if self._ending is not None:  # then the writer ends too
                await writer
        finally:
            self._reader.cancel()
            writer.cancel()
            for session in self.sessions():
                if session.owner is self:
                    session.take(None)
            results = await asyncio.gather(self._reader, writer, return_exceptions=True)
            self.ended.set()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, OSError):  # OSError: the client is gone
                raise result

    async def _read(self) -> None:
        while self._ending is None and (message := await self._receive())["type"] != "websocket.disconnect":
            try:
                if (data := message.get("bytes")) is not None:
                    count = self.binary(data)
                else:
                    count = 1
                    await self.text(message["text"])
            except (ServeError, ValueError) as error:
                self.refuse(str(error))
                count = 1
            while self._unanswered > self.limits.waiting:
                self._answered.clear()
                await self._answered.wait()
            if self.limits.rate is not None:
                now = time.monotonic()
                self._due = max(self._due, now - 1) + count / self.limits.rate
                if self._due > now:
                    await asyncio.sleep(self._due - now)

    def refuse(self, why: str) -> None:
        """Answer a message that isn't understood."""
        self.say({"error": why})

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            if self._ending is not None and self._ending[0] in (CONFLICT, TAKEN):
                break
            out, self._out = self._out, []
            for is_text, some in groupby(out, lambda one: isinstance(one, str)):
                for message, count in ((text, 1) for text in some) if is_text else self.messages(list(some)):
                    await self._send({"type": "websocket.send", "text" if is_text else "bytes": message})
                    self._unanswered -= count
                    self._answered.set()
            if self._ending is not None and not self._unanswered:
                break
        code, reason = self._ending or (CLOSED, "")
        await self._send({"type": "websocket.close", "code": code, "reason": reason[:MOST_REASON]})


class Stream(Connection):
    """One session: each message is a step."""

    session: Session

    async def start(self, request: HTTPConnection) -> None:
        """Open the session, or find the one to resume."""
        query = request.query_params
        model = self.models.model(request.path_params["name"], query.get("version"))
        token, last = query.get("session"), query.get("last")
        self.json = query.get("form") == "json"
        self._last: int | None = None
        if token is None:
            self.session = await model.open(owner=self)
        else:
            self.session = self.models.session(token)
            if self.session.model.name != model.name:
                raise ServeError(404, f"this session is of {self.session.model.name}, not {model.name}")
            if last is not None and not (last.isascii() and last.isdigit() and len(last) < 19):
                raise ServeError(400, f"expected last to be the number of a frame, got {last!r}")
            self.session.take(self)
            self._last = self.session.accepted if last is None else int(last)
        self._number = np.array([self.session.number])
        assert self.session.model.rows is not None
        self._rows = self.session.model.rows

    async def greet(self) -> None:
        """Send what the session is, and the stored answers."""
        session, stored = self.session, []
        if self._last is not None:
            try:
                stored = await session.model.answers_after(session, self._last)
            except ServeError as error:
                self.end(CONFLICT, str(error))
                return
        self._frame = session.accepted - len(stored)
        about = described(session.model)
        found = {"session": session.token, "model": about["name"], "version": about["version"]}
        found |= {"frame": session.accepted, "inputs": about["inputs"], "outputs": about["outputs"]}
        await self._send({"type": "websocket.send", "text": text_of(found)})
        for row, refused in stored:
            self._unanswered += 1
            self._answer(row, "the frame was refused" if refused else None, self.json)

    def sessions(self) -> list[Session]:
        """Return the session."""
        return [self.session]

    def lost(self, session: Session, why: str) -> None:
        """Close the connection."""
        self.end(TAKEN, why)

    def binary(self, data: bytes) -> int:
        """Queue a step in binary form."""
        size = self._rows.inputs.itemsize
        if len(data) != size:
            raise ValueError(f"expected {size} bytes per step, got {len(data)}")
        self._submit(np.frombuffer(data, self._rows.inputs), False)
        return 1

    async def text(self, text: str) -> None:
        """Queue a step in JSON, or close the session."""
        found = parsed(text)
        if isinstance(found, dict) and found.get("close") is True:
            self.session.owner = None
            await self.session.model.close(self.session)
            self._ending = (CLOSED, "the session was closed")
            self._to_send.set()
        elif isinstance(found, dict) and "x" in found:
            self._submit(self._rows.parse(found["x"]), True)
        else:
            raise ServeError(400, 'expected {"x": …} or {"close": true}')

    def refuse(self, why: str) -> None:
        """Answer in the order of the messages: after the frames that are queued."""
        self._unanswered += 1

        def done(_: Any) -> None:
            self.put(text_of({"error": why}))

        self.session.model.worker.call(lambda: None, done)

    def _submit(self, row: Records, as_json: bool) -> None:
        def done(answers: Answers) -> None:
            self._answer(answers.rows[0], answers.refused.get(0), as_json)

        self._unanswered += 1
        self.session.model.submit(self._number, row, done)

    def _answer(self, row: Any, refused: str | None, as_json: bool) -> None:
        self._frame += 1
        if refused is not None:
            self.put(text_of({"frame": self._frame, "error": refused}))
        elif as_json:
            self.put(text_of({"frame": self._frame, "y": self._rows.plain(row)}))
        else:
            self.put(row.tobytes())

    def messages(self, answers: list[Any]) -> Iterator[tuple[bytes, int]]:
        """Return a message per frame."""
        return ((message, 1) for message in answers)


class Group(NamedTuple):
    """Answers to frames of one model that were queued together."""

    model: int
    numbers: NDArray[np.uint32]
    frames: NDArray[np.uint32]
    rows: Records
    refused: dict[int, str]


class Multiplex(Connection):
    """Many sessions: text messages open and close them, binary messages have frames of many of them.

    The work per message doesn't depend on its number of frames, but in NumPy.
    """

    def __init__(self, models: Models, receive: Receive, send: Send) -> None:
        super().__init__(models, receive, send)
        self._models: list[Model] = []  # by their numbers in this connection
        self._inputs: list[np.dtype] = []
        self._outputs: list[np.dtype] = []
        self._sessions: list[Session | None] = []  # by their numbers in this connection; None: closed or lost
        self._number_of: dict[Session, int] = {}
        self._pool = np.full(64, -1, np.int64)  # their numbers in the pool; -1: none
        self._model_of = np.zeros(64, np.int64)

    def sessions(self) -> list[Session]:
        """Return all open sessions."""
        return list(self._number_of)

    def lost(self, session: Session, why: str) -> None:
        """Tell the client that a session is no longer its own."""
        number = self._forget(session)
        if number is not None:
            self.say({"lost": number, "error": why})

    def _forget(self, session: Session) -> int | None:
        number = self._number_of.pop(session, None)
        if number is not None:
            self._sessions[number], self._pool[number] = None, -1
        return number

    def _add(self, session: Session) -> dict[str, Any]:
        """Number a session; return what the client needs to know of it."""
        if session.model not in self._models:
            rows = session.model.rows
            assert rows is not None
            self._models.append(session.model)
            self._inputs.append(frames.numbered(rows.inputs))
            self._outputs.append(frames.numbered(rows.outputs))
        number = len(self._sessions)
        if number == len(self._pool):
            self._pool = np.concatenate([self._pool, np.full(number, -1, np.int64)])
            self._model_of = np.concatenate([self._model_of, np.zeros(number, np.int64)])
        self._sessions.append(session)
        self._number_of[session] = number
        self._pool[number] = session.number
        self._model_of[number] = model = self._models.index(session.model)
        return {"session": session.token, "number": number, "model": model, "frame": session.accepted}

    # ── text messages ───────────────────────────────────────────────────────────────────────────────────────────────

    async def text(self, text: str) -> None:
        """Open, resume or close sessions."""
        asked = parsed(text)
        given = {"id": asked.get("id")} if isinstance(asked, dict) else {}
        try:
            if isinstance(asked, dict) and isinstance(asked.get("open"), str):
                self.say(given | await self._open(asked))
            elif isinstance(asked, dict) and isinstance(asked.get("resume"), list):
                found, groups = await self._resume(asked["resume"])
                self.say(given | {"resumed": found})
                self.put(*groups)
            elif isinstance(asked, dict) and isinstance(asked.get("close"), list):
                self.say(given | {"closed": await self._close(asked["close"])})
            else:
                raise ServeError(400, 'expected {"id": …} with "open": MODEL, "resume": […] or "close": […]')
        except ServeError as error:
            self.say(given | {"error": str(error), "status": error.status})

    async def _open(self, asked: dict[str, Any]) -> dict[str, Any]:
        model, count = self.models.model(asked["open"], asked.get("version")), asked.get("count", 1)
        if not (type(count) is int and 1 <= count <= model.capacity):
            raise ServeError(400, f"count: expected a number from 1 to {model.capacity}, got {count!r:.50}")
        if count > model.capacity - len(model.sessions):
            raise ServeError(503, f"{model.name} has {model.capacity - len(model.sessions)} free sessions, not {count}")
        opened = await asyncio.gather(*(model.open(owner=self) for _ in range(count)), return_exceptions=True)
        for error in opened:
            if isinstance(error, BaseException):
                await asyncio.gather(*(one.model.close(one) for one in opened if isinstance(one, Session)))
                raise error
        found = [self._add(session) for session in opened if isinstance(session, Session)]
        about = described(model)
        return {
            "opened": found,
            "model": found[0]["model"],
            "version": model.version,
            "inputs": about["inputs"],
            "outputs": about["outputs"],
        }

    async def _resume(self, asked: list[Any]) -> tuple[list[dict[str, Any]], list[Group]]:
        if len(asked) > self.limits.sessions:
            raise ServeError(400, f"resume: expected at most {self.limits.sessions} sessions, got {len(asked)}")
        groups: list[Group] = []

        async def one(wanted: Any) -> dict[str, Any]:
            token = wanted.get("session") if isinstance(wanted, dict) else None
            last = wanted.get("last") if isinstance(wanted, dict) else None
            if not isinstance(token, str) or not (last is None or type(last) is int):
                return {"error": 'expected {"session": TOKEN, "last": NUMBER}', "status": 400}
            try:
                session = self.models.session(token)
                if session in self._number_of:
                    raise ServeError(409, "this connection has the session")
                session.take(self)
                try:
                    stored = await session.model.answers_after(session, session.accepted if last is None else last)
                except ServeError:
                    session.owner = None
                    raise
            except ServeError as error:
                return {"session": token, "error": str(error), "status": error.status}
            found = self._add(session)
            if stored:
                first = found["frame"] - len(stored) + 1
                why = {n: "the frame was refused" for n, (_, refused) in enumerate(stored) if refused}
                numbers = np.full(len(stored), found["number"], np.uint32)
                given = np.arange(first, first + len(stored), dtype=np.uint32)
                rows = np.stack([row for row, _ in stored])
                groups.append(Group(found["model"], numbers, given, rows, why))
                self._unanswered += len(stored)
            return found

        return [await one(wanted) for wanted in asked], groups

    async def _close(self, numbers: list[Any]) -> list[int]:
        sessions = []
        for number in numbers:
            valid = type(number) is int and 0 <= number < len(self._sessions)
            session = self._sessions[number] if valid else None
            if session is None:
                raise ServeError(404, f"no session of this connection has the number {number!r:.50}")
            sessions.append(session)
        for session in sessions:
            self._forget(session)
            session.owner = None
        await asyncio.gather(*(session.model.close(session) for session in dict.fromkeys(sessions)))
        return numbers

    # ── binary messages ─────────────────────────────────────────────────────────────────────────────────────────────

    def binary(self, data: bytes) -> int:
        """Queue frames."""
        kind, model, count = frames.header(data)
        if kind != frames.FRAMES:
            raise ValueError(f"expected a message of kind {frames.FRAMES} (frames), got kind {kind}")
        if model >= len(self._models):
            raise ValueError(f"no model of this connection has the number {model}")
        if count > self.limits.waiting:
            raise ValueError(f"expected at most {self.limits.waiting} frames per message, got {count}")
        records = frames.unpack(data, self._inputs[model])
        if count:
            self._frames(model, records)
        return count

    def _frames(self, model: int, records: Records) -> None:
        numbers, given = records["number"], records["frame"]
        self._unanswered += len(records)
        places = np.minimum(numbers, len(self._pool) - 1)
        pool = self._pool[places]
        of = self._models[model]
        expected = of.accepted[pool % of.capacity] + 1 + occurrence(numbers)
        fine = (given == expected) & (pool >= 0) & (numbers == places) & (self._model_of[places] == model)
        if not fine.all():
            fine = self._check(model, records)
            if not fine.any():
                return
            records, pool = records[fine], pool[fine]
            numbers, given = records["number"], records["frame"]

        def done(answers: Answers) -> None:
            self.put(Group(model, numbers, given, answers.rows, answers.refused))

        of.submit(pool, records["row"], done)

    def _check(self, model: int, records: Records) -> NDArray[np.bool_]:
        """Return which frames are the next ones of their sessions, and answer all others."""
        of, fine = self._models[model], np.zeros(len(records), bool)
        expected: dict[int, int] = {}
        refused: dict[int, str] = {}
        again: dict[int, tuple[Session, int]] = {}
        for n, (number, given) in enumerate(zip(records["number"].tolist(), records["frame"].tolist(), strict=True)):
            session = self._sessions[number] if number < len(self._sessions) else None
            if session is None:
                refused[n] = f"no session of this connection has the number {number}"
                continue
            if session.model is not of:
                refused[n] = f"session {number} is of another model"
                continue
            wanted = expected.setdefault(number, session.accepted + 1)
            if given == wanted:
                fine[n] = True
                expected[number] += 1
            elif 0 < given < wanted:
                again[n] = session, wanted
            else:
                refused[n] = f"expected frame {wanted}, got {given}"

        def read() -> Records:
            rows: Records = np.zeros(len(records), of.worker.rows.outputs)
            for n, (session, wanted) in again.items():
                given = int(records["frame"][n])
                try:
                    rows[n], was_refused = of.worker.answer(session.slot, given)
                except KeyError:
                    refused[n] = f"expected frame {wanted}, got {given}"
                else:
                    if was_refused:
                        refused[n] = "the frame was refused"
            return rows

        def done(rows: Records) -> None:
            places = np.flatnonzero(~fine)
            why = {k: refused[n] for k, n in enumerate(places.tolist()) if n in refused}
            self.put(Group(model, records["number"][places], records["frame"][places], rows[places], why))

        def after_the_new_frames() -> None:
            of.worker.call(read, done)

        if not fine.all():
            asyncio.get_running_loop().call_soon(after_the_new_frames)
        return fine

    def messages(self, answers: list[Any]) -> Iterator[tuple[bytes, int]]:
        """Return one message per model."""
        for model in sorted({group.model for group in answers}):
            some = [group for group in answers if group.model == model]
            records: Records = np.empty(sum(len(group.rows) for group in some), self._outputs[model])
            start, refused = 0, []
            for group in some:
                part = records[start : start + len(group.rows)]
                part["number"], part["frame"], part["row"] = group.numbers, group.frames, group.rows
                refused += [(start + n, why) for n, why in group.refused.items()]
                start += len(group.rows)
            if refused:
                why = [(int(records["number"][n]), int(records["frame"][n]), text) for n, text in refused]
                records = np.delete(records, [n for n, _ in refused])
                yield frames.pack_refused(model, why), len(why)
            most = max(1, MOST_BYTES // self._outputs[model].itemsize - 1)
            for start in range(0, len(records), most):
                part = records[start : start + most]
                yield frames.pack(frames.ANSWERS, model, part), len(part)


def occurrence(numbers: NDArray[Any]) -> Any:
    """Return how often each number occurs before its place: 0 if all are different."""
    if len(numbers) == 1:
        return 0
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    if new.all():
        return 0
    starts = np.flatnonzero(new)
    found = np.empty(len(numbers), np.int64)
    found[order] = np.arange(len(numbers)) - np.repeat(starts, np.diff(np.r_[starts, len(numbers)]))
    return found
