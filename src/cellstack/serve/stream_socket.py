"""One session per WebSocket: each message is a step."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import numpy as np
from starlette.requests import HTTPConnection

from cellstack.serve.models import ServeError, Session
from cellstack.serve.sockets import CLOSED, CONFLICT, TAKEN, Connection
from cellstack.serve.texts import check_keys, described, parsed, text_of
from cellstack.serve.worker import Answers


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
        assert self.session.model.rows is not None
        self._rows = self.session.model.rows
        self._number = np.array([self.session.number])

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
        self.say(found)
        for row, refused in stored:
            self._unanswered += 1
            self._answer(row, "the frame was refused" if refused else None, self.json)
        self.flush()

    def sessions(self) -> list[Session]:
        """Return the session."""
        return [self.session]

    def lost(self, session: Session, why: str) -> None:
        """Close the connection."""
        self.end(TAKEN, why)

    def binary(self, data: bytes) -> int:
        """Queue a step in binary form."""
        inputs = self._rows.inputs
        if len(data) != inputs.itemsize:
            raise ValueError(f"expected {inputs.itemsize} bytes per step, got {len(data)}")
        self._unanswered += 1
        self.session.model.submit(self._number, np.frombuffer(data, inputs), self._answered_binary)
        return 1

    def text(self, text: str) -> Coroutine[Any, Any, None] | None:
        """Queue a step in JSON, or close the session."""
        found = parsed(text)
        if isinstance(found, dict) and found.get("close") is True:
            check_keys(found, "close")
            return self._close()
        if not (isinstance(found, dict) and "x" in found):
            raise ServeError(400, 'expected {"x": …} or {"close": true}')
        check_keys(found, "x")
        row = self._rows.parse(found["x"])
        self._unanswered += 1
        self.session.model.submit(self._number, row, self._answered_json)
        return None

    async def _close(self) -> None:
        self.session.owner = None
        await self.session.model.close(self.session)
        self.end(CLOSED, "the session was closed")

    def refuse(self, why: str) -> None:
        """Answer in the order of the messages: after the frames that are queued."""
        self._unanswered += 1

        def done(_: Any) -> None:
            self.put(text_of({"error": why}))

        self.session.model.worker.call(lambda: None, done)

    def _answered_binary(self, answers: Answers) -> Callable[[], None]:
        self._answer(answers.rows, answers.refused.get(0), False)
        return self.flush

    def _answered_json(self, answers: Answers) -> Callable[[], None]:
        self._answer(answers.rows[0], answers.refused.get(0), True)
        return self.flush

    def _answer(self, row: Any, refused: str | None, as_json: bool) -> None:
        self._frame += 1
        if refused is not None:
            self._out.append(text_of({"frame": self._frame, "error": refused}))
        elif as_json:
            self._out.append(text_of({"frame": self._frame, "y": self._rows.plain(row)}))
        else:
            self._out.append(row.tobytes())

    def messages(self, out: list[Any]) -> Iterable[tuple[bytes | str, int]]:
        """Return a message per frame."""
        return [(message, 1) for message in out]
