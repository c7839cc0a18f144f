"""The client for asyncio."""

from __future__ import annotations

import asyncio
import json
import ssl as tls
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from cellstack.serve import frames
from cellstack.serve.client import server
from cellstack.serve.client.calls import AHEAD, Call, Calls, Form, only
from cellstack.serve.client.errors import DisconnectedError, LostError, RefusedError
from cellstack.serve.client.link import Link, Sent
from cellstack.serve.models import ServeError

FATAL = (1002, 1003, 1007, 1008, 1009)  # close codes: the same messages would be refused again


class OpenSession:
    """What sessions of both clients have.

    Attributes:
        token: the secret with which the session is resumed, also by other clients.
        model: the model's name.
        answers: what `resume` found: outputs by the frame's number, None for a refused frame.
    """

    def __init__(self, client: AsyncClient, id: int, token: str, form: Form) -> None:
        self._client, self._id, self._form = client, id, form
        self.token, self.model = token, form.model
        self.answers: dict[int, Any] = {}
        self._error: Exception | None = None  # of every further call
        self._lost: LostError | None = None  # the last one
        self._last = 0  # the last frame's number, once the session has ended

    @property
    def frame(self) -> int:
        """The number of the last frame that was sent."""
        return self._last if self._error is not None else int(self._client._calls.sent[self._id])


class AsyncSession(OpenSession):
    """A session of an `AsyncClient`, which opens it.

    Attributes:
        token: the secret with which the session is resumed, also by other clients.
        model: the model's name.
        frame: the number of the last frame that was sent.
        answers: what `AsyncClient.resume` found: outputs by the frame's number, None for a refused frame.
    """

    async def step(self, x: Any) -> Any:
        """Send the next frame, and return its answer.

        Further frames may be sent before the answer is there; frames of one turn of the event loop share a message.

        Args:
            x: `[I]`, or an id; several inputs are a dict by name, or a tuple in order.

        Returns:
            `[W]`, or a tuple if there are several outputs.

        Raises:
            RefusedError: the server has refused the frame, such as one with NaN.
            LostError: the server has lost earlier frames, or the session.
            ConnectionError: the server could not be reached again.
            ValueError, TypeError: a wrong shape, or values that aren't numbers.
        """
        return await self._client._step_one(self, x)

    async def state(self) -> bytes:
        """Return the state after all frames that were sent, for `AsyncClient.open`, also of another server."""
        return await self._client._state(self)

    async def close(self) -> None:
        """Close the session, after the answers to its frames."""
        await self._client._close(self)


class AsyncClient:
    """Sessions on a server, all over one connection.

    If the connection is lost, it is made again, after pauses that grow to 2 seconds. The sessions are resumed, and
    frames without an answer are sent again, so that callers only see a delay. Leaving the `async with` block keeps the
    sessions on the server, until they were idle for too long; `close` ends one.

    Args:
        url: the server's, such as `ws://localhost:8080`.
        token: the server's token.
        give_up: seconds without a connection after which calls raise ConnectionError.
        ssl: for `wss`: the TLS settings; None: the default.

    Raises:
        ConnectionError, OSError: on entering the block, if the server can't be reached.
        ServeError: there, if it refuses the token.

    Example::

        async with AsyncClient("ws://localhost:8080") as client:
            session = await client.open("model")
            y = await session.step(x)
    """

    _session: Callable[..., Any] = AsyncSession

    def __init__(
        self, url: str, token: str | None = None, *, give_up: float = 60.0, ssl: tls.SSLContext | None = None
    ) -> None:
        self._server = server.Server(url, token, give_up, ssl)
        self._sessions: dict[int, Any] = {}  # by id
        self._calls = Calls()
        self._outbox: list[Sent] = []
        self._resuming = 0  # requests to resume sessions
        self._early: list[bytes] = []  # answers of sessions whose numbers aren't known yet
        self._order = asyncio.Lock()  # of calls that wait for their turn
        self._connected, self._to_send = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: Exception | None = RuntimeError("the client isn't open: use it in a `with` block")

    async def __aenter__(self) -> Any:
        if self._loop is not None:
            raise RuntimeError("a client is opened once: make a new one")
        self._loop = asyncio.get_running_loop()
        try:
            socket = await self._server.connect()
        except BaseException:
            self._loop = None
            raise
        self._error = None
        self._task = asyncio.ensure_future(self._run(socket))
        await self._ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._fail(ConnectionError("the client was closed"))

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(
        self, model: str, count: int | None = None, version: int | None = None, state: bytes | None = None
    ) -> Any:
        """Open a session, or several.

        Args:
            model: the model's name.
            count: None: return one session; a number: return a list of so many.
            version: of the model; None: the newest.
            state: what `AsyncSession.state` returned; None: the initial state.

        Raises:
            ServeError: there is no such model, no session is free, or the state is of another network.
            ConnectionError: the server could not be reached again.
        """
        if state is not None:
            query = "" if version is None else f"?version={version}"
            path = f"/models/{quote(model, safe='')}/sessions{query}"
            tokens = [json.loads(await self._http("POST", path, state))["session"] for _ in range(count or 1)]
            sessions = [await self.resume(token) for token in tokens]
            return sessions if count is not None else sessions[0]
        asked = {"open": model, "count": 1 if count is None else count}
        found = await self._ask(lambda: asked if version is None else {**asked, "version": version})
        form = Form(model, found)
        sessions = [self._add(one, form) for one in found["opened"]]
        return sessions if count is not None else sessions[0]

    async def resume(self, token: str, last: int | None = None) -> Any:
        """Continue a session that was opened before, perhaps by another client, which loses it.

        Args:
            token: `AsyncSession.token`.
            last: the last frame whose answer is known: the stored answers after it are in the session's `answers`;
                None: the last frame of the session.

        Raises:
            ServeError: no such session is open, or the answers after `last` aren't stored.
            ConnectionError: the server could not be reached again.
        """
        about = json.loads(await self._http("GET", f"/sessions/{quote(token, safe='')}"))
        path = f"/models/{quote(about['model'], safe='')}?version={about['version']}"
        form = Form(about["model"], json.loads(await self._http("GET", path)))
        wanted = {"session": token} if last is None else {"session": token, "last": last}
        self._resuming += 1
        try:
            (found,) = (await self._ask(lambda: {"resume": [wanted]}))["resumed"]
            if "error" in found:
                raise ServeError(found["status"], found["error"])
            session = self._add(found, form)
            stored = range(found["frame"] + 1 if last is None else last + 1, found["frame"] + 1)[-AHEAD:]
            ids, nothing = np.array([session._id]), np.zeros(1, form.inputs)
            calls = {n: self._calls.register(Call(form, ids, np.array([n]), nothing)) for n in stored}
            self._look_again()
        finally:
            self._resuming -= 1
        for number, call in calls.items():
            await call.done
            session.answers[number] = None if call.refused else only(form.plain(call.answers))
        return session

    async def step(self, sessions: Sequence[Any], x: Any) -> Any:
        """Send the next frame of each of some sessions of one model in one message, and return their answers.

        Args:
            sessions: n different sessions of this client.
            x: `[n, I]`, one step per session; ids are `[n]`. Several inputs are a dict by name, or a tuple in order.

        Returns:
            `[n, W]`, or a tuple if there are several outputs.

        Raises:
            RefusedError, LostError, ConnectionError, ValueError, TypeError: see `AsyncSession.step`.
        """
        if not sessions:
            raise ValueError("expected at least one session")
        form = sessions[0]._form
        for session in sessions:
            if session._client is not self:
                raise ValueError(f"session {session.token} is of another client")
            other = session._form
            if other is not form and (other.model, other.version) != (form.model, form.version):
                both = f"{form.model} version {form.version} and {other.model} version {other.version}"
                raise ValueError(f"expected sessions of one model, got {both}")
        if len({session._id for session in sessions}) < len(sessions):
            raise ValueError("expected different sessions in one step")
        return await self._step(sessions, form, x, len(sessions))

    # ── helpers of calls ────────────────────────────────────────────────────────────────────────────────────────────

    async def _step_one(self, session: OpenSession, x: Any) -> Any:
        return only(await self._step((session,), session._form, x, None))

    async def _step(self, sessions: Sequence[OpenSession], form: Form, x: Any, count: int | None) -> Any:
        self._check(sessions)
        rows, calls = form.rows(x, count), self._calls
        ids = np.fromiter((session._id for session in sessions), np.int64, len(sessions))
        losses = calls.losses[ids]
        async with self._order:
            while True:
                self._check(sessions)
                if (calls.losses[ids] != losses).any():  # earlier frames of the caller, which this one must follow
                    raise next(one._lost for one in sessions if one._lost is not None)
                if calls.room(ids):
                    break
                calls.progress.clear()
                await calls.progress.wait()
            calls.sent[ids] += 1
            call = calls.register(Call(form, ids, calls.sent[ids], rows))
            self._outbox.append((ids, call.numbers, rows))
            self._to_send.set()
        await call.done
        if call.lost is not None:
            raise call.lost
        y = form.plain(call.answers)
        if call.refused:
            raise RefusedError(call.refused, y)
        return y

    async def _state(self, session: OpenSession) -> bytes:
        await self._answered(session)
        return await self._http("GET", f"/sessions/{session.token}/state")

    async def _close(self, session: OpenSession) -> None:
        await self._answered(session)
        asked = []

        def message() -> dict[str, Any]:
            asked.append(self._link.number(session._id))
            return {"close": asked[-1:]}

        try:
            await self._ask(message, session)
        except LostError:
            if not asked:
                raise  # else the connection was lost before the server's answer, but after it had closed the session
        self._forget(session, RuntimeError(f"session {session.token} is closed"))

    async def _answered(self, session: OpenSession) -> None:
        while self._check([session]) or self._calls.waiting(session._id):
            self._calls.progress.clear()
            await self._calls.progress.wait()

    def _check(self, sessions: Iterable[OpenSession]) -> None:
        for session in sessions:
            if (error := self._error or session._error) is not None:
                raise error.with_traceback(None)
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this client belongs to another event loop; threads may share a Client")

    def _add(self, found: dict[str, Any], form: Form) -> Any:
        id = self._calls.add(found["frame"])
        self._sessions[id] = session = self._session(self, id, found["session"], form)
        self._link.add(id, found, form)
        return session

    def _forget(self, session: OpenSession, error: Exception) -> None:
        """End a session: its further calls raise the error."""
        ended, id = session._error is not None, session._id
        session._last, session._error = session.frame, error
        if ended:
            return
        del self._sessions[id]
        self._link.remove(id)
        self._outbox = [
            (ids[kept], numbers[kept], rows[kept])  # without frames of a lost session, whose id may be used again
            for ids, numbers, rows in self._outbox
            if (kept := ids != id).any()
        ]
        self._calls.remove(id)

    async def _ask(self, message: Callable[[], dict[str, Any]], *sessions: OpenSession) -> dict[str, Any]:
        """Send a request and return the server's answer; after a lost connection, send it again."""
        while True:
            await self._ready()
            self._check(sessions)
            try:
                found = await self._link.request(message())
            except DisconnectedError:
                continue
            if "error" in found:
                raise ServeError(found.get("status", 400), found["error"])
            return found

    async def _http(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the body of an HTTP answer; while the server can't be reached, try again."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._server.give_up
        while True:
            await self._ready()
            try:
                return await loop.run_in_executor(None, partial(self._server.http, method, path, body))
            except OSError as error:
                if loop.time() > end:
                    raise ConnectionError(f"{self._server.url} can't be reached: {error}") from None
            await asyncio.sleep(server.FIRST_PAUSE)

    async def _ready(self) -> None:
        if self._error is None:
            self._check(())
            await self._connected.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)

    # ── the connection ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, socket: ClientConnection) -> None:
        """Keep a connection until the client is closed."""
        try:
            while True:
                async with socket:
                    await self._serve(socket)
                socket = await self._server.connect_again()
        except Exception as error:  # every caller that waits receives it
            self._fail(error)

    async def _serve(self, socket: ClientConnection) -> None:
        """Use a connection until it is lost."""
        self._link, self._early = Link(socket), []
        tasks = [asyncio.ensure_future(one) for one in (self._read(socket), self._write(socket))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (ConnectionClosed, DisconnectedError):
            pass  # the sessions are resumed in the next connection
        finally:
            self._connected.clear()
            for task in tasks:
                task.cancel()
            self._link.lost()
            await asyncio.gather(*tasks, return_exceptions=True)
        if socket.close_code in FATAL:
            raise ServeError(400, f"the server has closed the connection: {socket.close_code} {socket.close_reason}")

    async def _read(self, socket: ClientConnection) -> None:
        async for message in socket:
            if isinstance(message, bytes):
                self._binary(message)
                continue
            found = json.loads(message)
            if "lost" in found:
                (id,) = self._link.ids(np.array([found["lost"]])).tolist()
                session = self._sessions[id]
                frame = self._calls.last(id) + 1
                self._lose(
                    session, LostError(f"session {session.token}: {found['error']}", session.token, frame, False)
                )
            elif "id" not in found:
                raise ServeError(found.get("status", 400), found.get("error", message))
            else:
                self._link.answered(found)

    async def _write(self, socket: ClientConnection) -> None:
        await self._resume_all()
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            sent, self._outbox = self._outbox, []
            for message in self._link.messages(sent):
                await socket.send(message)

    def _binary(self, message: bytes) -> None:
        """Pass answers to their calls; keep those that arrive before their session's number."""
        kind, model, _ = frames.header(message)
        form = self._link.forms.get(model)
        early = []
        if form is None:
            early = [message]
        elif kind == frames.REFUSED:
            unknown = []
            for number, frame, why in frames.unpack_refused(message):
                (id,) = self._link.ids(np.array([number])).tolist()
                if id < 0:
                    unknown.append((number, frame, why))
                else:
                    self._calls.refused(id, frame, why)
            early = [frames.pack_refused(model, unknown)] if unknown else []
        else:
            records = frames.unpack(message, form.answers)
            ids = self._link.ids(records["number"])
            if (ids < 0).any():
                early = [frames.pack(kind, model, records[ids < 0])]
                records, ids = records[ids >= 0], ids[ids >= 0]
            if len(ids):
                self._calls.answered(ids, records["frame"].astype(np.int64), records["row"])
        if self._resuming:
            self._early += early

    def _look_again(self) -> None:
        early, self._early = self._early, []
        for message in early:
            self._binary(message)

    def _lose(self, session: OpenSession, error: LostError) -> None:
        """Raise an error in all calls with frames of a session; unless it is open, its further calls raise it too."""
        session._lost = error
        self._calls.lose(session._id, error)
        if not error.open:
            self._forget(session, error)

    def _fail(self, error: Exception) -> None:
        """Raise an error in all calls, those of the future included."""
        self._error = error
        self._calls.fail(error)
        self._connected.set()

    # ── after a lost connection ─────────────────────────────────────────────────────────────────────────────────────

    async def _resume_all(self) -> None:
        """Resume all sessions, and send again what the server hasn't received."""
        sessions = list(self._sessions.values())
        self._resuming += 1
        try:
            last = [self._calls.last(session._id) for session in sessions]
            found = await self._resume([{"session": s.token, "last": n} for s, n in zip(sessions, last, strict=True)])
            again = [n for n, one in enumerate(found) if one.get("status") == 409]
            # The server knows these sessions, but not all of their frames or answers.
            states = await self._resume([{"session": sessions[n].token} for n in again])
            for n, state in zip(again, states, strict=True):
                found[n] = {"why": found[n]["error"], **state}
            self._outbox.clear()
            for session, one, n in zip(sessions, found, last, strict=True):
                if session._error is None:
                    self._resumed(session, one, n)
            self._look_again()
        finally:
            self._resuming -= 1
        self._to_send.set()
        self._connected.set()

    async def _resume(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not asked:
            return []
        found = await self._link.request({"resume": asked})
        if "error" in found:
            raise ServeError(found.get("status", 400), found["error"])
        return found["resumed"]

    def _resumed(self, session: OpenSession, found: dict[str, Any], last: int) -> None:
        """Continue a session in this connection; if it or frames of it were lost, raise that in its calls."""
        token, id = session.token, session._id
        if "frame" not in found:
            text = f"session {token} was lost; send from frame 1 to a new session ({found['error']})"
            self._lose(session, LostError(text, token, 1, False))
            return
        self._link.add(id, found, session._form)
        frame = found["frame"]
        if "why" in found:
            text = f"send again from frame {frame + 1}"
            if frame >= last:
                text = f"the answers to frames {last + 1} to {frame} were lost; " + text
            self._lose(session, LostError(f"session {token}: {text} ({found['why']})", token, frame + 1, True))
            self._calls.sent[id] = frame
            return
        for number, row in self._calls.after(id, frame):
            self._outbox.append((np.array([id]), np.array([number]), row))
