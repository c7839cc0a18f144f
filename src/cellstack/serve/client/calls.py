"""A client's frames: as records, and in calls until they are answered."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import ShapeError
from cellstack.serve import frames
from cellstack.serve.client.errors import LostError
from cellstack.serve.rows import Records

AHEAD = 16  # frames of a session without an answer: as many answers as a server stores for clients that reconnect
WAITING = 4096  # frames of a connection without an answer, and frames in a message: a server's default limit

Ids = NDArray[np.int64]


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

    def rows(self, x: Any, count: int | None) -> Records:
        """Return one step of each of `count` sessions as records; None: of one session, without that axis."""
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
        rows, lead = np.empty(1 if count is None else count, self.inputs), () if count is None else (count,)
        for name in names:
            array, of = np.asarray(values[name]), self.inputs[name]
            if array.shape != (*lead, *of.shape):
                raise ShapeError(f"expected {name} {[*lead, *of.shape]}, got {array.shape}")
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
        ids: the sessions, as `Calls` numbers them.
        numbers: the frames' numbers.
        left: frames without an answer.
    """

    def __init__(self, form: Form, ids: Ids, numbers: Ids, rows: Records) -> None:
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


def only(y: Any) -> Any:
    """Return the outputs of the only session of a call."""
    return tuple(one[0] for one in y) if isinstance(y, tuple) else y[0]


class Calls:
    """The frames without an answer of all sessions of a client, each of which has an id.

    Attributes:
        sent: the number of the last frame that was sent, by id.
        losses: how often frames were lost, by id.
        progress: is set when a frame was answered.
    """

    def __init__(self) -> None:
        self.sent, self.losses = np.zeros(64, np.int64), np.zeros(64, np.int64)
        # By id and the frame's number modulo AHEAD: its number, its call and its place in it.
        self._pending: Records = np.zeros((64, AHEAD), [("frame", "<i8"), ("call", "<i8"), ("place", "<i8")])
        self._free = list(range(63, -1, -1))  # ids
        self._calls: dict[int, Call] = {}
        self._next = self._unanswered = 0
        self.progress = asyncio.Event()

    def add(self, frame: int) -> int:
        """Return the id of another session, whose last frame has this number."""
        if not self._free:
            count = len(self.sent)
            self.sent, self.losses = (np.concatenate([a, np.zeros_like(a)]) for a in (self.sent, self.losses))
            self._pending = np.concatenate([self._pending, np.zeros_like(self._pending)])
            self._free = list(range(2 * count - 1, count - 1, -1))
        id = self._free.pop()
        self.sent[id] = frame
        return id

    def remove(self, id: int) -> None:
        """Free the id of a session without unanswered frames."""
        self._free.append(id)

    def room(self, ids: Ids) -> bool:
        """Return whether the next frame of each of these sessions may be sent."""
        free = self._pending["frame"][ids, (self.sent[ids] + 1) % AHEAD] == 0
        return bool(free.all()) and (not self._unanswered or self._unanswered + len(ids) <= WAITING)

    def waiting(self, id: int) -> bool:
        """Return whether a session has frames without an answer."""
        return bool(self._pending["frame"][id].any())

    def last(self, id: int) -> int:
        """Return the number of the frame up to which all are answered."""
        numbers = self._pending["frame"][id]
        return int(numbers[numbers > 0].min() - 1 if numbers.any() else self.sent[id])

    def register(self, call: Call) -> Call:
        """Note the frames of a call as unanswered."""
        key, self._next = self._next, self._next + 1
        self._calls[key] = call
        where = call.ids, call.numbers % AHEAD
        for name, value in (("frame", call.numbers), ("call", key), ("place", np.arange(call.left))):
            self._pending[name][where] = value
        self._unanswered += call.left
        return call

    def answered(self, ids: Ids, numbers: Ids, rows: Records | None) -> None:
        """Pass answers to their calls; frames that were answered before are ignored.

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
        self.progress.set()

    def refused(self, id: int, number: int, why: str) -> None:
        """Note that a frame was refused."""
        if self._pending["frame"][id, number % AHEAD] == number:
            _, key, place = self._pending[id, number % AHEAD]
            self._calls[int(key)].refused[int(place)] = why
            self.answered(np.array([id]), np.array([number]), None)

    def lose(self, id: int, error: LostError) -> None:
        """Raise an error in all calls with frames of a session."""
        self.losses[id] += 1
        pending = self._pending[id][self._pending["frame"][id] > 0]
        for key in pending["call"].tolist():
            self._calls[key].lost = error
        self.answered(np.full(len(pending), id), pending["frame"].copy(), None)

    def after(self, id: int, frame: int) -> list[tuple[int, Records]]:
        """Return the unanswered frames of a session after this one, in order: their numbers and records."""
        pending = np.sort(self._pending[id], order="frame")
        rest = pending[pending["frame"] > frame].tolist()
        return [(number, self._calls[key].rows[[place]]) for number, key, place in rest]

    def fail(self, error: Exception) -> None:
        """Raise an error in all calls."""
        for call in self._calls.values():
            call.fail(error)
        self._calls.clear()
        self.progress.set()
