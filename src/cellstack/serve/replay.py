"""Sessions from their files: opens those of a snapshot, and steps the frames of the logs since."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cellstack.serve.generations import (
    CLOSED,
    FRAMES,
    OPENED,
    REFUSED,
    DamageError,
    Numbers,
    Record,
    read_log,
    read_snapshot,
)
from cellstack.serve.models import Model, ServeError
from cellstack.serve.worker import MOST_FRAMES

if TYPE_CHECKING:
    from cellstack.serve.rows import Records


@dataclass
class Restored:
    """What `Journal.restore` found.

    Attributes:
        sessions, frames: the number of open sessions, and of frames in the log.
        seconds: how long it took.
    """

    sessions: int = 0
    frames: int = 0
    seconds: float = 0.0


class Stored(Protocol):
    """What a replay uses of a journal: its folder, its model, and its open sessions."""

    folder: Path
    model: Model
    _about: dict[str, Any]
    _like: Any
    _tokens: dict[int, str]

    def states_from(self, data: bytes, count: int) -> list[list[np.ndarray[Any, Any]]]:
        """Return the states of `count` sessions from bytes, as lists of the arrays of each entry of a state."""
        ...


class Replay:
    """Opens the sessions of the newest snapshot of a journal's folder, and steps the frames of the logs since.

    Args:
        journal: whose folder is read.
        snapshots: the numbers of all snapshots, ascending.
        logs: the numbers of all logs, ascending.
    """

    def __init__(self, journal: Stored, snapshots: list[int], logs: list[int]) -> None:
        self.journal, self.model = journal, journal.model
        self.found = Restored()
        self.snapshots, self.logs = snapshots, [number for number in logs if number >= max(snapshots, default=0)]
        self.now: dict[int, int] = {}  # the session's number in this pool by that in the files
        self.waiting: list[tuple[Numbers, Records]] = []
        self.frames = 0

    def run(self) -> Restored:
        """Restore what is there.

        Raises:
            DamageError: some of it is damaged.
            ServeError: more sessions are stored than the pool may have.
        """
        try:
            self._open_snapshot()
            self._logs()
        except RuntimeError:
            limit = self.model.capacity
            for number in self.now.values():
                self.model.pool.close(number)
            raise ServeError(503, f"{self.journal.folder} contains more than {limit} sessions, the limit") from None
        return self.found

    def _open_snapshot(self) -> None:
        journal, worker, rows = self.journal, self.model.worker, self.model.rows
        assert rows is not None
        if not self.snapshots:
            raise DamageError(f"{journal.folder}: there is no readable snapshot")
        about, parts = read_snapshot(journal.folder, self.snapshots[-1], journal._about)
        dtype = np.dtype([("refused", "?"), ("row", rows.outputs)])
        for part in parts:
            numbers, tokens, counts, stored_from = (
                part.about[name] for name in ("numbers", "tokens", "counts", "stored_from")
            )
            states = journal.states_from(part.states, len(numbers))
            new = []
            for place, (number, token) in enumerate(zip(numbers, tokens, strict=True)):
                one = slice(place, place + 1)
                new.append(self._opened(number, token, [[array[one] for array in entry] for entry in states]))
            answers = np.frombuffer(part.answers, dtype).reshape(len(numbers), about["kept"])
            slots = np.array(new, np.int64) % self.model.capacity
            worker.restored(slots, np.array(counts, np.int64), np.array(stored_from, np.int64), answers)

    def _opened(self, number: int, token: str, state: list[list[Any]]) -> int:
        like = self.journal._like
        entries = tuple(type(entry)(*arrays) for entry, arrays in zip(like, state, strict=True))
        new = self.now[number] = self.model.pool.open(entries)
        self.journal._tokens[new] = token
        return new

    def _logs(self) -> None:
        for expected, number in enumerate(self.logs, self.snapshots[-1]):
            if number != expected:
                raise DamageError(f"{self.journal.folder}: log {expected} is missing")
            for record in read_log(self.journal.folder, number, self.journal._about):
                self._record(record, number)
        if not self.logs:
            raise DamageError(f"{self.journal.folder}: log {self.snapshots[-1]} is missing")
        self._step()

    def _record(self, record: Record, log: int) -> None:
        """Apply a record of a log."""
        model, worker = self.model, self.model.worker
        where = f"log {log} of {self.journal.folder}"
        if record.kind == FRAMES:
            assert model.rows is not None
            sessions, rows = record.sessions, np.frombuffer(record.data, model.rows.inputs)
            if len(rows) != len(sessions):
                raise DamageError(f"{where}: a record has {len(sessions)} sessions and {len(rows)} frames")
            self.waiting.append((self._known(sessions, where), rows))
            self.frames += len(sessions)
            if self.frames >= MOST_FRAMES:
                self._step()
            return
        self._step()
        if record.kind == OPENED:
            about, _, state = bytes(record.data).partition(b"\n")
            found = json.loads(about)
            entries = [list(entry) for entry in self.journal.states_from(state, 1)]
            worker.opened([self._opened(int(record.sessions[0]), found["token"], entries)], [""], [found["frames"]])
        elif record.kind == CLOSED:
            (new,) = self._known(record.sessions, where).tolist()
            model.pool.close(new)
            del self.now[int(record.sessions[0])], self.journal._tokens[new]
        elif record.kind == REFUSED:
            sessions, counts = self._known(record.sessions, where), np.frombuffer(record.data, np.int64)
            worker.count[sessions % model.capacity] += np.maximum(counts - worker.kept, 0)
            for turn in range(min(worker.kept, int(counts.max(initial=0)))):
                worker.refuse(sessions[counts > turn])
        else:
            raise DamageError(f"{where}: expected a kind of record from 0 to 3, found {record.kind}")

    def _known(self, sessions: Numbers, where: str) -> Numbers:
        """Return the numbers of sessions in this pool."""
        new = [self.now.get(number, -1) for number in sessions.tolist()]
        if -1 in new:
            raise DamageError(f"{where}: session {sessions[new.index(-1)]} isn't open")
        return np.array(new, np.int64)

    def _step(self) -> None:
        """Step the frames that wait for it."""
        if not self.frames:
            return
        sessions, rows = (np.concatenate(arrays) for arrays in zip(*self.waiting, strict=True))
        self.found.frames += len(sessions)
        self.waiting.clear()
        self.frames = 0
        self.model.worker.process(sessions, rows)
