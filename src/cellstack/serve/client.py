"""Clients of a server: many sessions over one connection, which is made again after it is lost."""

from __future__ import annotations

import asyncio
import json
import random
import ssl as tls
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"cellstack.serve.client needs {error.name}: pip install 'cellstack[serve]'", name=error.name
    ) from error
from cellstack.serve import frames
from cellstack.serve.models import ServeError
from cellstack.serve.rows import Records
from cellstack.spec import ShapeError

AHEAD = 16  # frames of a session without an answer: as many answers as a server stores for clients that reconnect
WAITING = 4096  # frames of a connection without an answer, and frames in a message: a server's default limit
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds before a connection is tried again; they double
SECONDS = 20.0  # for an HTTP request
RETRIED = (429, 500, 502, 503, 504)  # HTTP statuses of a server that is starting or stopping, or of its proxy

FATAL = (1002, 1003, 1007, 1008, 1009)  # close codes: the same messages would be refused again

T = TypeVar("T")


class LostError(Exception):
    """The server has lost frames of a session, or the session.

    Attributes:
        token: the session.
        frame: the number of the first lost frame: the session continues with this one, if it still exists.
        open: whether it does. If not, `frame` is 1 and all frames have to be sent to a new session.
    """

    def __init__(self, message: str, token: str, frame: int, open: bool) -> None:
        super().__init__(message)
        self.token, self.frame, self.open = token, frame, open


class RefusedError(ServeError):
    """The server has refused frames: they count, but left the states of their sessions unchanged.

    Attributes:
        refused: the reasons, by position in the call.
        y: the outputs of the call, zeros where a frame was refused.
    """

    def __init__(self, refused: dict[int, str], y: Any) -> None:
        (place, why), *more = refused.items()
        text = f"frame {place}: {why}" + (f", and {len(more)} more" if more else "")
        super().__init__(400, text)
        self.refused, self.y = refused, y


class Form:
    """The records of a model's steps, as the server describes it."""

    def __init__(self, model: str, described: dict[str, Any]) -> None:
        self.model, self.version = model, described["version"]

        def row(tensors: list[dict[str, Any]]) -> np.dtype:
            return np.dtype(
                [
                    (one["name"], "<i8")
                    if one["width"] is None
                    else (one["name"], np.dtype(one["dtype"]).newbyteorder("<"), (one["width"],))
                    for one in tensors
                ]
            )

        self.inputs, self.outputs = row(described["inputs"]), row(described["outputs"])
        self.frames, self.answers = frames.numbered(self.inputs), frames.numbered(self.outputs)

    def rows(self, x: Any, count: int) -> Records:
        """Return one step of each of some sessions as records."""
        names = self.inputs.names or ()
        if isinstance(x, dict):
            if x.keys() != set(names):
                raise ValueError(f"expected the inputs {', '.join(names)}, got {', '.join(map(str, x)) or 'none'}")
            values = x
        else:
            several = x if len(names) > 1 else (x,)
            if len(several) != len(names):
                raise ValueError(f"expected {len(names)} inputs, got {len(several)}")
            values = dict(zip(names, several, strict=True))
        rows = np.empty(count, self.inputs)
        for name in names:
            array, of = np.asarray(values[name]), self.inputs[name]
            if array.shape != (count, *of.shape):
                raise ShapeError(f"expected {name} {[count, *of.shape]}, got {array.shape}")
            if array.dtype.kind not in ("iu" if of.kind == "i" else "iuf"):
                raise TypeError(f"expected {name} as {of.base.name}, got {array.dtype}")
            rows[name] = array
        return rows

    def plain(self, rows: Records) -> Any:
        """Return records of outputs as an array, or a tuple of them if there are several outputs."""
        arrays = tuple(np.ascontiguousarray(rows[name]) for name in self.outputs.names or ())
        return arrays[0] if len(arrays) == 1 else arrays


class Call:
    """Frames that were sent together, at most one per session, until they are answered.

    Attributes:
        ids: the sessions, as `AsyncClient` numbers them.
        numbers: the frames' numbers.
        left: frames without an answer.
    """

    def __init__(self, form: Form, ids: NDArray[np.int64], numbers: NDArray[np.int64], rows: Records) -> None:
        self.form, self.ids, self.numbers, self.rows = form, ids, numbers, rows
        self.answers: Records = np.zeros(len(ids), form.outputs)
        self.refused: dict[int, str] = {}
        self.lost: LostError | None = None
        self.left = len(ids)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, count: int) -> None:
        """Note answers; after the last one the caller gets them."""
        self.left -= count
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raise an error in the caller, unless it has gone."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # so that nothing is logged if nobody waits


class DisconnectedError(Exception):
    """The connection was lost during a request, which is sent again in the next one; callers don't see this."""


class AsyncSession:
    """A session of an `AsyncClient`, which opens it.

    Attributes:
        token: the secret with which the session is resumed, also by other clients.
        model: the model's name.
        answers: what `AsyncClient.resume` found: outputs by the frame's number, None for a refused frame.
    """

    def __init__(self, client: AsyncClient, id: int, token: str, form: Form) -> None:
        self._client, self._id, self._form = client, id, form
        self.token, self.model = token, form.model
        self.answers: dict[int, Any] = {}
        self._error: Exception | None = None  # of every further call
        self._lost: LostError | None = None  # the last one

    @property
    def frame(self) -> int:
        """The number of the last frame that was sent."""
        return int(self._client._sent[self._id])

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
        if isinstance(x, dict):
            x = {name: np.asarray(value)[None] for name, value in x.items()}
        elif len(self._form.inputs.names or ()) > 1:
            x = tuple(np.asarray(value)[None] for value in x)
        else:
            x = np.asarray(x)[None]
        return _only(await self._client.step((self,), x))

    async def state(self) -> bytes:
        """Return the state after all frames that were sent, for `AsyncClient.open`, also of another server."""
        await self._client._answered(self)
        return await self._client._http("GET", f"/sessions/{self.token}/state")

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
    """

    def __init__(
        self, url: str, token: str | None = None, *, give_up: float = 60.0, ssl: tls.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.netloc:
            raise ValueError(f"expected a URL such as ws://localhost:8080, got {url!r}")
        path = parts.path.rstrip("/")
        self._url = urlunsplit((parts.scheme, parts.netloc, f"{path}/multiplex", "", ""))
        self._http_url = urlunsplit(("http" + parts.scheme[2:], parts.netloc, path, "", ""))
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._tls, self._give_up = ssl, give_up
        self._sessions: list[AsyncSession | None] = []  # by id; None: closed
        self._sent = np.zeros(64, np.int64)  # the last frame's number, by id
        self._losses = np.zeros(64, np.int64)  # how often frames were lost, by id
        self._number = np.full(64, -1, np.int64)  # in this connection, by id
        # Frames without an answer, by id and the frame's number modulo AHEAD: their number, call and place in it.
        self._pending = np.zeros((64, AHEAD), [("frame", "<i8"), ("call", "<i8"), ("place", "<i8")])
        self._calls: dict[int, Call] = {}
        self._next_call = self._unanswered = 0
        self._outbox: list[tuple[NDArray[np.int64], NDArray[np.int64], Records]] = []  # ids, numbers, rows
        self._resuming = 0  # requests to resume sessions
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._error: Exception | None = None  # after which nothing works any more

    async def __aenter__(self) -> AsyncClient:
        self._order = asyncio.Lock()  # of calls that wait for their turn
        self._progress = asyncio.Event()
        self._connected, self._to_send = asyncio.Event(), asyncio.Event()
        socket = await self._connect()
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

    async def resume(self, token: str, last: int | None = None) -> AsyncSession:
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
            calls = {n: self._register(Call(form, ids, np.array([n]), nothing)) for n in stored}
            self._look_again()
        finally:
            self._resuming -= 1
        for number, call in calls.items():
            await call.done
            session.answers[number] = None if call.refused else _only(form.plain(call.answers))
        return session

    async def step(self, sessions: Sequence[AsyncSession], x: Any) -> Any:
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
        ids = np.fromiter((session._id for session in sessions), np.int64, len(sessions))
        if len(ids) > 1 and len(np.unique(ids)) < len(ids):
            raise ValueError("expected different sessions in one step")
        rows = form.rows(x, len(ids))
        losses = self._losses[ids]
        async with self._order:
            while True:
                self._check(sessions)
                if (self._losses[ids] != losses).any():  # earlier frames of the caller, which this one must follow
                    raise next(one._lost for one in sessions if one._lost is not None)
                free = self._pending["frame"][ids, (self._sent[ids] + 1) % AHEAD] == 0
                if free.all() and (not self._unanswered or self._unanswered + len(ids) <= WAITING):
                    break
                self._progress.clear()
                await self._progress.wait()
            self._sent[ids] += 1
            call = self._register(Call(form, ids, self._sent[ids], rows))
            self._outbox.append((ids, call.numbers, rows))
            self._to_send.set()
        await call.done
        if call.lost is not None:
            raise call.lost
        y = form.plain(call.answers)
        if call.refused:
            raise RefusedError(call.refused, y)
        return y

    # ── helpers of calls ────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self, sessions: Iterable[AsyncSession]) -> None:
        for session in sessions:
            if (error := self._error or session._error) is not None:
                raise error

    def _add(self, found: dict[str, Any], form: Form) -> AsyncSession:
        id = len(self._sessions)
        if id == len(self._sent):
            self._sent = np.concatenate([self._sent, np.zeros_like(self._sent)])
            self._losses = np.concatenate([self._losses, np.zeros_like(self._losses)])
            self._number = np.concatenate([self._number, np.full_like(self._number, -1)])
            self._pending = np.concatenate([self._pending, np.zeros_like(self._pending)])
        session = AsyncSession(self, id, found["session"], form)
        self._sessions.append(session)
        self._sent[id] = found["frame"]
        self._connect_session(session, found)
        return session

    def _connect_session(self, session: AsyncSession, found: dict[str, Any]) -> None:
        """Note a session's number in this connection."""
        number = found["number"]
        if number >= len(self._ids):
            self._ids = np.concatenate([self._ids, np.full(max(number + 1, len(self._ids)), -1, np.int64)])
        self._ids[number], self._number[session._id] = session._id, number
        self._model_of[session._id] = found["model"]
        self._forms.setdefault(found["model"], session._form)

    def _register(self, call: Call) -> Call:
        key, self._next_call = self._next_call, self._next_call + 1
        self._calls[key] = call
        places = self._pending
        where = call.ids, call.numbers % AHEAD
        places["frame"][where], places["call"][where], places["place"][where] = call.numbers, key, np.arange(call.left)
        self._unanswered += call.left
        return call

    async def _answered(self, session: AsyncSession) -> None:
        while self._check([session]) or self._pending["frame"][session._id].any():
            self._progress.clear()
            await self._progress.wait()

    async def _close(self, session: AsyncSession) -> None:
        await self._answered(session)
        asked = []

        def message() -> dict[str, Any]:
            asked.append(int(self._number[session._id]))
            return {"close": asked[-1:]}

        try:
            await self._ask(message, session)
        except LostError:
            if not asked:
                raise  # else the connection was lost before the server's answer, but after it had closed the session
        self._forget(session, RuntimeError(f"session {session.token} is closed"))

    def _forget(self, session: AsyncSession, error: Exception) -> None:
        session._error = error
        self._sessions[session._id] = None
        if (number := self._number[session._id]) >= 0:
            self._ids[number], self._number[session._id] = -1, -1

    async def _ask(self, message: Callable[[], dict[str, Any]], *sessions: AsyncSession) -> dict[str, Any]:
        """Send a request and return the server's answer; after a lost connection, send it again."""
        while True:
            await self._ready()
            self._check(sessions)
            try:
                found = await self._request(message())
            except DisconnectedError:
                continue
            if "error" in found:
                raise ServeError(found.get("status", 400), found["error"])
            return found

    async def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        id, self._next_id = self._next_id, self._next_id + 1
        self._asked[id] = answer = asyncio.get_running_loop().create_future()
        try:
            await self._socket.send(json.dumps({"id": id, **message}))
            return await answer
        except ConnectionClosed:
            raise DisconnectedError from None
        finally:
            del self._asked[id]

    async def _http(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the body of an HTTP answer; while the server can't be reached, try again."""

        def send() -> bytes:
            request = urllib.request.Request(self._http_url + path, body, self._headers, method=method)
            with urllib.request.urlopen(request, timeout=SECONDS, context=self._tls) as answer:
                return answer.read()

        loop = asyncio.get_running_loop()
        end = loop.time() + self._give_up
        while True:
            await self._ready()
            try:
                return await loop.run_in_executor(None, send)
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read()
                try:
                    why = json.loads(text)["error"]
                except (ValueError, KeyError, TypeError):
                    why = f"{error.code} {error.reason}"
                raise ServeError(error.code, why) from None
            except OSError as error:
                if loop.time() > end:
                    raise ConnectionError(f"{self._http_url} can't be reached: {error}") from None
            await asyncio.sleep(FIRST_PAUSE)

    async def _ready(self) -> None:
        if self._error is None:
            await self._connected.wait()
        if self._error is not None:
            raise self._error

    # ── the connection ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _connect(self) -> ClientConnection:
        try:
            options: dict[str, Any] = {"ssl": self._tls} if self._tls is not None else {}
            return await connect(
                self._url, additional_headers=self._headers, compression=None, max_size=None, **options
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in RETRIED:
                raise ConnectionError(f"the server answered {status}") from None
            try:
                why = json.loads(error.response.body or b"")["error"]
            except (ValueError, KeyError, TypeError):
                why = f"the server answered {status}"
            raise ServeError(status, why) from None
        except InvalidHandshake as error:
            raise ConnectionError(str(error)) from None

    async def _run(self, socket: ClientConnection) -> None:
        """Keep a connection until the client is closed."""
        try:
            while True:
                async with socket:
                    await self._serve(socket)
                socket = await self._connect_again()
        except Exception as error:  # every caller that waits receives it
            self._fail(error)

    async def _connect_again(self) -> ClientConnection:
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE
        lost = loop.time()
        while True:
            try:
                return await self._connect()
            except (OSError, asyncio.TimeoutError) as error:
                if (seconds := loop.time() - lost) > self._give_up:
                    raise ConnectionError(
                        f"{self._url} can't be reached since {seconds:.0f} seconds: {error}"
                    ) from None
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # so that clients don't come all at once
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _serve(self, socket: ClientConnection) -> None:
        """Use a connection until it is lost."""
        self._socket = socket
        self._ids = np.full(64, -1, np.int64)  # by number in this connection
        self._forms: dict[int, Form] = {}  # by the model's number in this connection
        self._model_of: dict[int, int] = {}  # its number, by id
        self._early: list[bytes] = []  # answers of sessions whose numbers aren't known yet
        self._number[:] = -1
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
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(DisconnectedError())
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
                session = self._sessions[self._ids[found["lost"]]]
                assert session is not None
                frame = self._last(session) + 1
                error = LostError(f"session {session.token}: {found['error']}", session.token, frame, False)
                self._drop(session, error)
                self._forget(session, error)
            elif "id" not in found:
                raise ServeError(found.get("status", 400), found.get("error", message))
            elif (answer := self._asked.get(found["id"])) is not None and not answer.done():
                answer.set_result(found)

    async def _write(self, socket: ClientConnection) -> None:
        await self._resume_all()
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            groups: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64], Records]]] = {}
            for one in self._outbox:
                groups.setdefault(self._model_of[int(one[0][0])], []).append(one)
            self._outbox = []
            for model, group in groups.items():
                ids, numbers, rows = group[0] if len(group) == 1 else map(np.concatenate, zip(*group, strict=True))
                records = np.empty(len(ids), self._forms[model].frames)
                records["number"], records["frame"], records["row"] = self._number[ids], numbers, rows
                for start in range(0, len(records), WAITING):
                    await socket.send(frames.pack(frames.FRAMES, model, records[start : start + WAITING]))

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _binary(self, message: bytes) -> None:
        """Pass answers to their calls."""
        kind, model, _ = frames.header(message)
        form = self._forms.get(model)
        if form is None:
            self._keep(message)
        elif kind == frames.REFUSED:
            unknown = []
            for number, frame, why in frames.unpack_refused(message):
                (id,) = self._ids_of(np.array([number]))
                if id < 0:
                    unknown.append((number, frame, why))
                elif self._pending["frame"][id, frame % AHEAD] == frame:
                    _, key, place = self._pending[id, frame % AHEAD]
                    self._calls[key].refused[int(place)] = why
                    self._done(np.array([id]), np.array([frame]), None)
            if unknown:
                self._keep(frames.pack_refused(model, unknown))
        else:
            records = frames.unpack(message, form.answers)
            ids = self._ids_of(records["number"])
            if (ids < 0).any():
                self._keep(frames.pack(kind, model, records[ids < 0]))
                records, ids = records[ids >= 0], ids[ids >= 0]
            if len(ids):
                self._done(ids, records["frame"].astype(np.int64), records["row"])

    def _ids_of(self, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """Return the ids of sessions by their numbers in this connection, -1 where unknown."""
        known = numbers < len(self._ids)
        return np.where(known, self._ids[np.where(known, numbers, 0)], -1)

    def _keep(self, message: bytes) -> None:
        """Keep stored answers that arrive before the session's number."""
        if self._resuming:
            self._early.append(message)

    def _look_again(self) -> None:
        early, self._early = self._early, []
        for message in early:
            self._binary(message)

    def _done(self, ids: NDArray[np.int64], numbers: NDArray[np.int64], rows: Records | None) -> None:
        """Note that frames are answered; frames that were answered before are ignored.

        Args:
            ids, numbers: of the frames, `[n]`.
            rows: their records of outputs; None: without any.
        """
        slots = numbers % AHEAD
        pending = self._pending[ids, slots]
        new = pending["frame"] == numbers
        if not new.all():
            ids, slots, pending = ids[new], slots[new], pending[new]
            rows = None if rows is None else rows[new]
        self._pending["frame"][ids, slots] = 0
        keys, places = pending["call"], pending["place"]
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(np.diff(keys[order])) + 1
        for part in np.split(order, ends) if len(order) else ():
            call = self._calls[key := int(keys[part[0]])]
            if rows is not None:
                call.answers[places[part]] = rows[part]
            call.answered(len(part))
            if not call.left:
                del self._calls[key]
        self._unanswered -= len(ids)
        self._progress.set()

    def _drop(self, session: AsyncSession, error: LostError) -> None:
        """Raise an error in all calls with frames of a session."""
        id = session._id
        session._lost = error
        self._losses[id] += 1
        pending = self._pending[id]
        for key in pending["call"][pending["frame"] > 0].tolist():
            self._calls[key].lost = error
        numbers = pending["frame"][pending["frame"] > 0]
        self._done(np.full(len(numbers), id), numbers, None)

    def _fail(self, error: Exception) -> None:
        """Raise an error in all calls, those of the future included."""
        self._error = error
        for call in self._calls.values():
            call.fail(error)
        self._calls.clear()
        self._connected.set()
        self._progress.set()

    # ── after a lost connection ─────────────────────────────────────────────────────────────────────────────────────

    async def _resume_all(self) -> None:
        """Resume all sessions, and send again what the server hasn't received."""
        sessions = [session for session in self._sessions if session is not None]
        self._resuming += 1
        try:
            last = [self._last(session) for session in sessions]
            found = await self._resume([{"session": s.token, "last": n} for s, n in zip(sessions, last, strict=True)])
            again = [n for n, one in enumerate(found) if one.get("status") == 409]
            # The server knows these sessions, but not all of their frames or answers.
            states = await self._resume([{"session": sessions[n].token} for n in again])
            for n, state in zip(again, states, strict=True):
                found[n] = {"why": found[n]["error"], **state}
            self._outbox.clear()
            for session, one, n in zip(sessions, found, last, strict=True):
                self._resumed(session, one, n)
            self._look_again()
        finally:
            self._resuming -= 1
        self._to_send.set()
        self._connected.set()

    async def _resume(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not asked:
            return []
        found = await self._request({"resume": asked})
        if "error" in found:
            raise ServeError(found.get("status", 400), found["error"])
        return found["resumed"]

    def _last(self, session: AsyncSession) -> int:
        """Return the number of the frame up to which all are answered."""
        numbers = self._pending["frame"][session._id]
        return int(numbers[numbers > 0].min() - 1 if numbers.any() else self._sent[session._id])

    def _resumed(self, session: AsyncSession, found: dict[str, Any], last: int) -> None:
        """Continue a session in this connection; if it or frames of it were lost, raise that in its calls."""
        token, id = session.token, session._id
        if "frame" not in found:
            text = f"session {token} was lost; send from frame 1 to a new session ({found['error']})"
            error = LostError(text, token, 1, False)
            self._drop(session, error)
            self._forget(session, error)
            return
        self._connect_session(session, found)
        frame = found["frame"]
        if "why" in found:
            text = f"send again from frame {frame + 1}"
            if frame >= last:
                text = f"the answers to frames {last + 1} to {frame} were lost; " + text
            self._drop(session, LostError(f"session {token}: {text} ({found['why']})", token, frame + 1, True))
            self._sent[id] = frame
            return
        pending = np.sort(self._pending[id], order="frame")
        for number, key, place in pending[pending["frame"] > frame].tolist():
            self._outbox.append((np.array([id]), np.array([number]), self._calls[key].rows[[place]]))


def _only(y: Any) -> Any:
    """Return the outputs of the only session of a call."""
    return tuple(one[0] for one in y) if isinstance(y, tuple) else y[0]


class Session:
    """A session of a `Client`; the methods are those of `AsyncSession`, which wait for the result."""

    def __init__(self, client: Client, session: AsyncSession) -> None:
        self._client, self._session = client, session

    @property
    def token(self) -> str:
        """The secret with which the session is resumed."""
        return self._session.token

    @property
    def model(self) -> str:
        """The model's name."""
        return self._session.model

    @property
    def frame(self) -> int:
        """The number of the last frame that was sent."""
        return self._session.frame

    @property
    def answers(self) -> dict[int, Any]:
        """See `AsyncSession`."""
        return self._session.answers

    def step(self, x: Any) -> Any:
        """Send the next frame, and return its answer; see `AsyncSession.step`."""
        return self._client._wait(self._session.step(x))

    def state(self) -> bytes:
        """Return the state, for `Client.open`."""
        return self._client._wait(self._session.state())

    def close(self) -> None:
        """Close the session."""
        self._client._wait(self._session.close())


class Client:
    """`AsyncClient` for programs without an event loop, which runs in a thread of its own.

    Threads may share a client: their steps share messages.

    Args:
        url, token, give_up, ssl: see `AsyncClient`.

    Raises:
        ConnectionError, OSError, ServeError: on entering the `with` block, see `AsyncClient`.

    Example::

        with Client("ws://localhost:8080") as client:
            session = client.open("model")
            y = session.step(x)
    """

    def __init__(
        self, url: str, token: str | None = None, *, give_up: float = 60.0, ssl: tls.SSLContext | None = None
    ) -> None:
        self._client = AsyncClient(url, token, give_up=give_up, ssl=ssl)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cellstack-client", daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._client.__aexit__())
        self._end()

    def open(self, model: str, count: int | None = None, version: int | None = None, state: bytes | None = None) -> Any:
        """Open a session, or a list of several; see `AsyncClient.open`."""
        found = self._wait(self._client.open(model, count, version, state))
        return [Session(self, one) for one in found] if count is not None else Session(self, found)

    def resume(self, token: str, last: int | None = None) -> Session:
        """Continue a session; see `AsyncClient.resume`."""
        return Session(self, self._wait(self._client.resume(token, last)))

    def step(self, sessions: Sequence[Session], x: Any) -> Any:
        """Send the next frame of each of some sessions in one message; see `AsyncClient.step`."""
        return self._wait(self._client.step([session._session for session in sessions], x))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
