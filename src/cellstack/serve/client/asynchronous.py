"""The client for asyncio."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import numpy as np

from cellstack.serve.client import server
from cellstack.serve.client.calls import AHEAD, Call, Form, only
from cellstack.serve.client.connection import Connection
from cellstack.serve.client.errors import DisconnectedError, LostError, RefusedError
from cellstack.serve.client.sessions import AsyncSession, OpenSession
from cellstack.serve.models import ServeError


class AsyncClient(Connection):
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
