"""The models that a server holds, and the sessions of their clients."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack.formats.files import digest_of
from cellstack.formats.state import state_from, state_to_bytes
from cellstack.serve.rows import Records, Rows
from cellstack.serve.worker import Answers, Done, Frames, StoppingError, Worker, call_all

if TYPE_CHECKING:
    from cellstack import Network


NOT_OPEN = "no session with this token is open"


class ServeError(Exception):
    """A request that the server refuses.

    Attributes:
        status: the HTTP status.
        retry: seconds after which the request may succeed; None: unknown.
    """

    def __init__(self, status: int, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        sessions: open sessions per model.
        idle: seconds without a frame or a connection after which a session is closed.
        waiting: frames of a connection, or of a session without one, that wait for their step; a connection that sends
            more is not read until its frames were stepped, and an HTTP request is refused.
        message: bytes of a WebSocket message or an HTTP body.
        rate: frames per second of a connection or of a session; None: no limit.
        kept: answers per session that are stored for clients that reconnect.
    """

    sessions: int = 10_000
    idle: float = 300.0
    waiting: int = 4096
    message: int = 16 << 20
    rate: float | None = None
    kept: int = 16


class Owner(Protocol):
    """A connection that sends the frames of sessions."""

    def lost(self, session: Session, why: str) -> None:
        """Stop using a session, which was closed or belongs to another connection now."""


@dataclass(eq=False)
class Session:
    """One client's sequence.

    Attributes:
        token: the secret that identifies it in requests.
        model: its model.
        number: its number in the model's pool.
        owner: the connection that currently sends its frames, None for HTTP; only this connection receives answers.
        due: `time.monotonic()` until which its frames without a connection were sent at the limit's rate.
    """

    token: str
    model: Model
    number: int
    owner: Owner | None = None
    due: float = 0.0

    @property
    def slot(self) -> int:
        """Its place in the pool."""
        return self.number % self.model.capacity

    @property
    def processed(self) -> int:
        """The number of the last frame that was processed."""
        return int(self.model.worker.count[self.slot])

    @property
    def accepted(self) -> int:
        """The number of the last frame that was queued."""
        return int(self.model.accepted[self.slot])

    @accepted.setter
    def accepted(self, number: int) -> None:
        self.model.accepted[self.slot] = number

    @property
    def used(self) -> float:
        """`time.monotonic()` of the last use."""
        return float(self.model.used[self.slot])

    def touch(self) -> None:
        """Note that it is in use now."""
        self.model.used[self.slot] = time.monotonic()

    def take(self, owner: Owner | None) -> None:
        """Give the session to a connection, or to requests over HTTP; a connection that has it loses it."""
        before, self.owner = self.owner, owner
        self.touch()
        if before is not None and before is not owner:
            before.lost(self, "another connection has resumed the session")


class _Opening(NamedTuple):
    """A session that is being opened; `number` receives its number in the pool."""

    state: Any
    token: str
    frames: int
    number: asyncio.Future[int]


class Model:
    """A network that is served, with its sessions.

    All methods are called on the event loop's thread.

    Args:
        name: the name in requests: the stem of the file's name.
        network: the network.
        limits: see `Limits`.
        version: a number from 1, one more each time that the file is loaded again.
        digest: of the file and options, hexadecimal; identifies the network in stored sessions.
        threads: the threads of a step.
        options: the keyword arguments of `cellstack.load` with which the file was loaded.

    Attributes:
        sessions: the open sessions by token.
        rows: the records of a step, or None for a network that can't run step by step; `why_not` is the reason.
        accepted: the number of the last queued frame of each slot of the pool.
        used: `time.monotonic()` of the last use of each slot of the pool.
        initial: the state of a new session.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        limits: Limits,
        version: int = 1,
        digest: str = "",
        threads: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.network, self.limits, self.version, self.digest = name, network, limits, version, digest
        self.options = dict(options or {})
        self.capacity = limits.sessions
        self.sessions: dict[str, Session] = {}
        self.rows: Rows | None = None
        self.why_not: str | None = None
        self.opened = self.closed = 0
        self._opening: list[_Opening] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runs = ThreadPoolExecutor(1, f"cellstack-{name}")  # of whole sequences
        try:
            self.rows = Rows(network)
            self.pool = network.pool(self.capacity, threads)
        except ValueError as error:
            self.rows, self.why_not = None, str(error).removeprefix("Sessions: ")
            return
        self.accepted = np.zeros(self.capacity, np.int64)
        self.used = np.zeros(self.capacity)
        example = self.pool.open()
        self.initial = self.pool.state(example)
        self.pool.close(example)
        self.worker = Worker(self.pool, self.rows, self._deliver, limits.kept)

    @classmethod
    def load(cls, path: Path, limits: Limits, version: int = 1, threads: int = 1, **options: Any) -> Model:
        """Load a model from a file in any format that `cellstack.load` reads.

        Raises:
            FormatError, OSError: see `cellstack.load`.
        """
        from cellstack.formats import load_network

        return cls(
            path.stem, load_network(path, **options), limits, version, digest_of(path, options), threads, options
        )

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver answers on this event loop from now on."""
        self._loop = loop
        if self.rows is not None:
            self.worker.soon = loop.call_soon

    def stop(self) -> None:
        """Process the queued frames and end the model's threads."""
        if self.rows is not None:
            self.worker.stop()
        self._runs.shutdown()

    def _deliver(self, done: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call_all, done)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the worker's thread, after all frames that were submitted before."""
        future = asyncio.get_running_loop().create_future()

        def done(result: Any) -> None:
            if future.cancelled():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.worker.call(function, done)
        return await future

    # ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, state: bytes | None = None, owner: Any = None, token: str | None = None) -> Session:
        """Open a session.

        Args:
            state: what `state` returned, of this or another server; None: the initial state.
            owner: see `Session`.
            token: of a session that moves here from another server; None: a new one.

        Raises:
            ServeError: no sessions are possible, all are in use, the token is, or the state is of another network.
        """
        if self.rows is None:
            raise ServeError(400, f"{self.name} has no sessions: {self.why_not}")
        if token is not None and token in self.sessions:
            raise ServeError(409, "a session with this token is open")
        entries, frames = None, 0
        if state is not None:
            try:
                entries, found = state_from(state, self.network, self.initial)
            except ValueError as error:
                raise ServeError(400, str(error)) from None
            count = found.get("frames", "0")
            if not (count.isascii() and count.isdigit() and len(count) < 19):
                raise ServeError(400, f"state: expected frames to be the number of a frame, got {count!r:.50}")
            frames = int(count)
        token = token or secrets.token_urlsafe(16)

        if not self._opening:
            asyncio.get_running_loop().call_soon(self._open)
        future = asyncio.get_running_loop().create_future()
        self._opening.append(_Opening(entries, token, frames, future))
        number = await future
        session = self.sessions[token] = Session(token, self, number, owner)
        session.accepted = frames
        session.touch()
        self.opened += 1
        return session

    def _open(self) -> None:
        """Open the sessions that were requested in this iteration of the event loop."""
        opening, self._opening = self._opening, []

        def opened() -> list[int | ServeError]:
            found = [self._number_for(one.state) for one in opening]
            new = [(one, number) for one, number in zip(opening, found, strict=True) if isinstance(number, int)]
            self.worker.opened([number for _, number in new], [one.frames for one, _ in new])
            return found

        def done(result: list[int | ServeError] | Exception) -> None:
            found = result if isinstance(result, list) else [result] * len(opening)
            for one, number in zip(opening, found, strict=True):
                if one.number.cancelled():  # its client is gone
                    if isinstance(number, int):
                        with suppress(StoppingError):
                            self.worker.call(partial(self.pool.close, number), lambda _: None)
                elif isinstance(number, int):
                    one.number.set_result(number)
                else:
                    one.number.set_exception(number)

        try:
            self.worker.call(opened, done)
        except StoppingError as error:
            done(error)

    def _number_for(self, state: Any) -> int | ServeError:
        """Open a session in the pool, in the worker's thread; return its number, or why there is none."""
        try:
            return self.pool.open(state)
        except ValueError as error:
            return ServeError(400, f"state: {error}")
        except RuntimeError:
            return ServeError(503, f"all {self.capacity} sessions of {self.name} are in use")

    async def close(self, session: Session, why: str = "the session was closed") -> None:
        """Close a session, after its queued frames; `why` is for the connection that has it."""
        if self.sessions.pop(session.token, None) is None:
            return
        self.closed += 1
        owner, session.owner = session.owner, None
        if owner is not None:
            owner.lost(session, why)

        await self.call(partial(self.pool.close, session.number))

    async def state(self, session: Session) -> bytes:
        """Return a session's state after its queued frames, as the bytes of a file of `cellstack stream --state`."""

        def read() -> bytes:
            entries = self.pool.state(session.number)
            return state_to_bytes(self.network, entries, frames=str(session.processed), model=self.digest)

        return await self.call(read)

    def submit(self, sessions: Sequence[Session] | NDArray[np.int64], rows: Records, done: Done) -> None:
        """Queue frames: the n-th record is the next frame of the n-th session; a session may occur several times.

        Args:
            sessions: `[n]`, sessions, or their numbers as an array.
            rows: `[n]`, records of inputs.
            done: called with the answers on the event loop, see `call_all`.
        """
        if not isinstance(sessions, np.ndarray):
            sessions = np.fromiter((session.number for session in sessions), np.int64, len(sessions))
        if len(sessions) == 1:  # the same at a fraction of the time
            slot = int(sessions[0]) % self.capacity
            self.accepted[slot] += 1
        else:
            slot = sessions % self.capacity
            np.add.at(self.accepted, slot, 1)
        self.used[slot] = time.monotonic()
        self.worker.submit(Frames(sessions, rows, done))

    async def steps(self, session: Session, rows: Records) -> Answers:
        """Step a session by some frames.

        Raises:
            ServeError: the session was closed; too many frames are waiting, or came in the last seconds.
        """
        if self.sessions.get(session.token) is not session:
            raise ServeError(404, NOT_OPEN)
        if session.accepted - session.processed + len(rows) > self.limits.waiting:
            raise ServeError(429, f"more than {self.limits.waiting} frames of the session are waiting", 1)
        if (rate := self.limits.rate) is not None:
            now = time.monotonic()
            if session.due > now:
                wait = math.ceil(session.due - now)
                raise ServeError(429, f"expected at most {rate:g} frames per second: wait {wait} s", wait)
            session.due = max(session.due, now - 1) + len(rows) / rate
        future = asyncio.get_running_loop().create_future()

        def done(answers: Answers) -> None:
            if not future.cancelled():
                future.set_result(answers)

        self.submit([session] * len(rows), rows, done)
        return await future

    async def answers_after(self, session: Session, last: int) -> list[tuple[Records, bool]]:
        """Return the stored answers after frame `last`, see `Worker.answer`.

        Raises:
            ServeError: some are no longer stored, or the session hasn't seen so many frames.
        """

        def read() -> list[tuple[Records, bool]]:
            if not 0 <= last <= session.processed:
                raise ServeError(409, f"the session has processed {session.processed} frames, not {last}")
            try:
                return [self.worker.answer(session.slot, n) for n in range(last + 1, session.processed + 1)]
            except KeyError:
                stored = self.worker.stored_from(session.slot)
                raise ServeError(
                    409,
                    f"answers are stored from frame {stored + 1} to {session.processed}, not from {last + 1}",
                ) from None

        return await self.call(read)

    async def run(self, x: Any) -> Any:
        """Run whole sequences, see `Network.__call__`, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._runs, self.network, x)


class Models:
    """The models of a server by name. Loading a file again adds a version; its sessions stay with their version.

    Args:
        limits: see `Limits`.
        threads: the threads of a step.
        options: keyword arguments of `cellstack.load`.
    """

    def __init__(self, limits: Limits, threads: int = 1, options: Mapping[str, Any] | None = None) -> None:
        self.limits, self.threads, self.options = limits, threads, dict(options or {})
        self.versions: dict[str, list[Model]] = {}
        self.paths: dict[str, Path] = {}

    def load(self, path: Path, options: Mapping[str, Any] | None = None) -> Model:
        """Load a file as the next version of the model with its name; `add` makes it available.

        Args:
            path: the file.
            options: keyword arguments of `cellstack.load`; None: those of all models.
        """
        before = self.versions.get(path.stem, [])
        version = before[-1].version + 1 if before else 1
        return Model.load(path, self.limits, version, self.threads, **(self.options if options is None else options))

    def add(self, path: Path, model: Model | None = None) -> Model:
        """Make a model available for new sessions: the one that `load` returned, or None to load it."""
        model = model or self.load(path)
        self.versions.setdefault(model.name, []).append(model)
        self.paths[model.name] = path
        return model

    def all(self) -> list[Model]:
        """Return every version of every model."""
        return [model for versions in self.versions.values() for model in versions]

    def model(self, name: str, version: str | int | None = None) -> Model:
        """Return a model: its newest version, or the given one.

        Raises:
            ServeError: there is no such model or version.
        """
        versions = self.versions.get(name)
        if not versions:
            raise ServeError(404, f"no model {name!r:.100}: this server has {', '.join(self.versions)}")
        if version in (None, ""):
            return versions[-1]
        for model in versions:
            if str(model.version) == str(version):
                return model
        known = ", ".join(str(model.version) for model in versions)
        raise ServeError(404, f"{name} has no version {version!r:.20}: this server has {known}")

    def session(self, token: str) -> Session:
        """Return the open session with this token.

        Raises:
            ServeError: there is none.
        """
        for model in self.all():
            if (session := model.sessions.get(token)) is not None:
                return session
        raise ServeError(404, NOT_OPEN)

    async def drop_unused(self) -> None:
        """Stop older versions without sessions, and close sessions that were idle for too long."""
        now = time.monotonic()
        for model in self.all():
            for session in list(model.sessions.values()):
                if session.owner is None and now - session.used > self.limits.idle:
                    await model.close(session)
        for versions in self.versions.values():
            for model in versions[:-1]:
                if not model.sessions:
                    versions.remove(model)
                    await asyncio.get_running_loop().run_in_executor(None, model.stop)
