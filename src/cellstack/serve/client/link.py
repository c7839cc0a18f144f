"""One connection of a client: the numbers that the server gave its sessions, and requests to it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from cellstack.serve import frames
from cellstack.serve.client.calls import WAITING, Form, Ids
from cellstack.serve.client.errors import DisconnectedError
from cellstack.serve.rows import Records

Sent = tuple[Ids, Ids, Records]  # frames of one model: their sessions' ids, their numbers, their inputs


class Link:
    """A connection.

    Attributes:
        forms: by the model's number.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.forms: dict[int, Form] = {}
        self._ids = np.full(64, -1, np.int64)  # by number
        self._numbers = np.full(64, -1, np.int64)  # by id
        self._models: dict[int, int] = {}  # the model's number, by id
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0

    # ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, id: int, found: dict[str, Any], form: Form) -> None:
        """Note a session's number."""
        number = found["number"]
        self._ids, self._numbers = _reaching(self._ids, number), _reaching(self._numbers, id)
        self._ids[number], self._numbers[id] = id, number
        self._models[id] = found["model"]
        self.forms.setdefault(found["model"], form)

    def remove(self, id: int) -> None:
        """Drop a session's number, if it has one."""
        if self._models.pop(id, None) is not None:
            self._ids[self._numbers[id]] = -1

    def number(self, id: int) -> int:
        """Return a session's number."""
        return int(self._numbers[id])

    def ids(self, numbers: NDArray[Any]) -> Ids:
        """Return the ids of sessions, -1 where unknown."""
        known = numbers < len(self._ids)
        return np.where(known, self._ids[np.where(known, numbers, 0)], -1)

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def messages(self, sent: list[Sent]) -> list[bytes]:
        """Return the messages of frames, joined by model."""
        messages: list[bytes] = []
        groups: dict[int, list[Sent]] = {}
        for one in sent:
            groups.setdefault(self._models[int(one[0][0])], []).append(one)
        for model, group in groups.items():
            ids, numbers, rows = group[0] if len(group) == 1 else map(np.concatenate, zip(*group, strict=True))
            records = np.empty(len(ids), self.forms[model].frames)
            records["number"], records["frame"], records["row"] = self._numbers[ids], numbers, rows
            parts = (records[start : start + WAITING] for start in range(0, len(records), WAITING))
            messages += [frames.pack(frames.FRAMES, model, part) for part in parts]
        return messages

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the server's answer.

        Raises:
            DisconnectedError: the connection was lost.
        """
        id, self._next = self._next, self._next + 1
        self._asked[id] = answer = asyncio.get_running_loop().create_future()
        try:
            await self.socket.send(json.dumps({"id": id, **message}))
            return await answer
        except ConnectionClosed:
            raise DisconnectedError from None
        finally:
            del self._asked[id]

    def answered(self, found: dict[str, Any]) -> None:
        """Pass the answer to its request."""
        if (answer := self._asked.get(found["id"])) is not None and not answer.done():
            answer.set_result(found)

    def lost(self) -> None:
        """Tell the requests that the connection was lost."""
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(DisconnectedError())


def _reaching(array: Ids, place: int) -> Ids:
    """Return an array that has this place, padded with -1."""
    if place < len(array):
        return array
    return np.concatenate([array, np.full(max(place + 1, len(array)), -1, np.int64)])
