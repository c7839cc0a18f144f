"""The connection of a client: it is made again after it was lost, and its sessions are resumed."""

from __future__ import annotations

import asyncio
import json
import ssl as tls
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from cellstack.serve import frames
from cellstack.serve.client import server
from cellstack.serve.client.calls import Calls
from cellstack.serve.client.errors import DisconnectedError, LostError
from cellstack.serve.client.link import Link, Sent
from cellstack.serve.client.sessions import OpenSession
from cellstack.serve.models import ServeError

FATAL = (1002, 1003, 1007, 1008, 1009)  # close codes: the same messages would be refused again


class Connection:
    """Keeps a connection to a server, sends the frames in its outbox and passes answers to their calls.

    Args:
        url, token, give_up, ssl: see `AsyncClient`.
    """

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
