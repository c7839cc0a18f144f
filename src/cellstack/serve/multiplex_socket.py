"""Many sessions over one WebSocket, for gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.serve import frames
from cellstack.serve.models import Model, Models, ServeError, Session
from cellstack.serve.rows import Records
from cellstack.serve.sockets import Connection
from cellstack.serve.texts import check_keys, described, parsed
from cellstack.serve.websocket import WebSocket
from cellstack.serve.worker import Answers, occurrence

MOST_BYTES = 1 << 20  # of a message to a client: what clients accept by default


class Group(NamedTuple):
    """Answers to frames of one model that were queued together.

    Attributes:
        model: its number in the connection.
        heads: the numbers of sessions and frames, see `frames.heads`.
        rows, refused: see `Answers`.
    """

    model: int
    heads: NDArray[np.uint8]
    rows: Records
    refused: dict[int, str]


class Multiplex(Connection):
    """Many sessions: text messages open and close them, binary messages have frames of many of them.

    The work per message doesn't depend on its number of frames, but in NumPy.
    """

    def __init__(self, models: Models, websocket: WebSocket) -> None:
        super().__init__(models, websocket)
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

    def text(self, text: str) -> Coroutine[Any, Any, None]:
        """Open, resume or close sessions."""
        return self._manage(parsed(text))

    async def _manage(self, asked: Any) -> None:
        given = {"id": asked.get("id")} if isinstance(asked, dict) else {}
        try:
            if isinstance(asked, dict) and isinstance(asked.get("open"), str):
                check_keys(asked, "id", "open", "count", "version")
                self.say(given | await self._open(asked))
            elif isinstance(asked, dict) and isinstance(asked.get("resume"), list):
                check_keys(asked, "id", "resume")
                found, groups = await self._resume(asked["resume"])
                self.say(given | {"resumed": found})
                self.put(*groups)
            elif isinstance(asked, dict) and isinstance(asked.get("close"), list):
                check_keys(asked, "id", "close")
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
                why = {n: "the frame was refused" for n, (_, refused) in enumerate(stored) if refused}
                records: Records = np.zeros(len(stored), self._outputs[found["model"]])
                records["number"] = found["number"]
                records["frame"] = np.arange(found["frame"] - len(stored) + 1, found["frame"] + 1)
                rows = np.stack([row for row, _ in stored])
                groups.append(Group(found["model"], frames.heads(records), rows, why))
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
        self._unanswered += len(records)
        of, pool = self._models[model], self._next(model, records)
        if pool is None:
            fine = self._check(model, records)
            if not fine.any():
                return
            records = records[fine]
            pool = self._pool[records["number"]]
        heads = frames.heads(records)

        def done(answers: Answers) -> Callable[[], None]:
            self._out.append(Group(model, heads, answers.rows, answers.refused))
            return self.flush

        of.submit(pool, records["row"], done)

    def _next(self, model: int, records: Records) -> NDArray[np.int64] | None:
        """Return the numbers of the frames' sessions in the pool if each frame is the next one of its session."""
        of, numbers, given = self._models[model], records["number"], records["frame"]
        if len(records) == 1:  # the same as below, at a fraction of the time
            number = int(numbers[0])
            session = self._sessions[number] if number < len(self._sessions) else None
            fine = session is not None and session.model is of and given[0] == session.accepted + 1
            return self._pool[number : number + 1].copy() if fine else None
        places = np.minimum(numbers, len(self._pool) - 1)
        pool = self._pool[places]
        expected = of.accepted[pool % of.capacity] + 1 + occurrence(numbers)
        fine = (given == expected) & (pool >= 0) & (numbers == places) & (self._model_of[places] == model)
        return pool if fine.all() else None

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
            self.put(Group(model, frames.heads(records[places]), rows[places], why))

        def after_the_new_frames() -> None:
            of.worker.call(read, done)

        if not fine.all():
            asyncio.get_running_loop().call_soon(after_the_new_frames)
        return fine

    def messages(self, out: list[Any]) -> Iterable[tuple[bytes | str, int]]:
        """Return a message per text, and one per model for groups of answers that follow each other."""
        if len(out) == 1 and isinstance(out[0], Group):  # the same as below, in less time
            return self._answers(out[0].model, out)
        return self._joined(out)

    def _joined(self, out: list[Any]) -> Iterator[tuple[bytes | str, int]]:
        for is_text, some in groupby(out, lambda one: isinstance(one, str)):
            if is_text:
                yield from ((text, 1) for text in some)
                continue
            groups = list(some)
            for model in sorted({group.model for group in groups}):
                yield from self._answers(model, [group for group in groups if group.model == model])

    def _answers(self, model: int, groups: list[Group]) -> Iterator[tuple[bytes, int]]:
        count = sum([len(group.rows) for group in groups])
        if count == 1 and not groups[0].refused:  # the same as below, in less time
            head = frames.HEADER.pack(frames.VERSION, frames.ANSWERS, model, 1)
            yield head + groups[0].heads.tobytes() + groups[0].rows.tobytes(), 1
            return
        records = np.empty((count, self._outputs[model].itemsize), np.uint8)
        start, refused = 0, []
        for group in groups:
            end = start + len(group.rows)
            records[start:end, : frames.HEAD] = group.heads
            records[start:end, frames.HEAD :] = group.rows.view(np.uint8).reshape(end - start, -1)
            refused += [(start + n, why) for n, why in group.refused.items()]
            start = end
        if refused:
            heads = records[:, : frames.HEAD].copy().view("<u4").tolist()
            why = [(*heads[n], text) for n, text in refused]
            records = np.delete(records, [n for n, _ in refused], axis=0)
            yield frames.pack_refused(model, why), len(why)
        most = max(1, MOST_BYTES // self._outputs[model].itemsize - 1)
        for start in range(0, len(records), most):
            part = records[start : start + most]
            yield frames.pack(frames.ANSWERS, model, part), len(part)
