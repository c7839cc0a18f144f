"""Sessions from their files: opens those of a snapshot, and steps the frames of the logs since."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.serve.generations import (
    CLOSED,
    FRAMES,
    OPENED,
    REFUSED,
    DamageError,
    Numbers,
    Record,
    count_log,
    read_log,
    read_snapshot,
)
from cellstack.serve.models import ServeError
from cellstack.serve.worker import MOST_FRAMES

if TYPE_CHECKING:
    from cellstack.serve.journal import Journal
    from cellstack.serve.rows import Records


@dataclass
class Restored:
    """What `Journal.restore` found.

    Attributes:
        sessions, frames: the number of open sessions, and of frames in the log.
        seconds: how long it took.
        damage: with `recover`: descriptions of the files that were damaged.
        lost: with `recover`: the number of frames that a session, by token, is known to have lost; None if the session
            itself is lost. If no descriptions of damage exist, nothing was lost.
    """

    sessions: int = 0
    frames: int = 0
    seconds: float = 0.0
    damage: list[str] = field(default_factory=list)
    lost: dict[str, int | None] = field(default_factory=dict)


def replayed(journal: Journal, snapshots: list[int], logs: list[int], recover: bool) -> Restored:
    """Restore the sessions of a journal's folder from its newest complete snapshot and the logs since.

    Raises:
        DamageError, ServeError: see `Journal.restore`.
    """
    help_ = "start with --recover to keep everything before the damage"
    if not recover:
        try:
            return _Replay(journal, snapshots[-1:], logs, None).run()
        except DamageError as damage:
            raise DamageError(f"{damage}: {help_}") from None
    problems: list[str] = []
    for number in reversed(snapshots):  # an older generation may be complete
        replay = _Replay(journal, [number], logs, None)
        try:
            found = replay.run()
        except DamageError as damage:
            replay.undo()
            problems.append(str(damage))
            continue
        if problems:
            found.damage = [*problems, f"nothing is lost: generation {number} is complete"]
        return found
    for number in reversed(snapshots):
        replay = _Replay(journal, [number], logs, Restored())
        try:
            return replay.run()
        except DamageError:  # it is among the problems
            replay.undo()
    return _Replay(journal, [], logs, Restored(damage=problems)).run()


class _Replay:
    """Opens the sessions of a snapshot, and steps the frames of the logs since.

    Args:
        journal: whose folder is read.
        snapshots: the number of the snapshot, or nothing.
        logs: the numbers of all logs.
        lenient: receives damage; None: it is an error.
    """

    def __init__(self, journal: Journal, snapshots: list[int], logs: list[int], lenient: Restored | None) -> None:
        self.journal, self.model, self.lenient = journal, journal.model, lenient
        self.found = Restored() if lenient is None else lenient
        self.snapshot = snapshots[-1] if snapshots else None
        self.logs = [number for number in logs if self.snapshot is None or number >= self.snapshot]
        self.now: dict[int, int] = {}  # the session's number in this pool by that in the files
        self.lost: dict[int, str] = {}  # sessions whose states are damaged: tokens by number
        self.unknown: dict[int, int] = {}  # frames by number of sessions that aren't in the snapshot
        self.waiting: list[tuple[Numbers, Records]] = []
        self.frames = 0

    def undo(self) -> None:
        """Close the sessions that were opened."""
        for number in self.now.values():
            self.model.pool.close(number)
            self.journal._tokens.pop(number)
        self.now.clear()

    def run(self) -> Restored:
        """Restore what is there.

        Raises:
            DamageError: some of it is damaged.
            ServeError: more sessions are stored than the pool may have.
        """
        try:
            self._open_snapshot()
            self._logs()
            if self.unknown:
                frames = sum(self.unknown.values())
                self._damaged(f"{len(self.unknown)} sessions with {frames} frames in the logs aren't in the snapshot")
        except RuntimeError:
            limit = self.model.capacity
            self.undo()
            raise ServeError(503, f"{self.journal.folder} contains more than {limit} sessions, the limit") from None
        return self.found

    def _open_snapshot(self) -> None:
        journal, worker, rows = self.journal, self.model.worker, self.model.rows
        assert rows is not None
        if self.snapshot is None:
            self._damaged(f"{journal.folder}: there is no readable snapshot")
            return
        damage = None if self.lenient is None else self.lenient.damage
        about, parts = read_snapshot(journal.folder, self.snapshot, journal._about, damage)
        if sum(len(part.about["numbers"]) for part in parts) < about["sessions"] and damage is not None:
            damage.append(f"{about['sessions']} sessions were stored in this snapshot")
        dtype = np.dtype([("refused", "?"), ("row", rows.outputs)])
        for part in parts:
            numbers, tokens, counts, stored_from = (
                part.about[name] for name in ("numbers", "tokens", "counts", "stored_from")
            )
            if part.states is None or part.answers is None:
                self.lost |= zip(numbers, tokens, strict=True)
                self.found.lost |= dict.fromkeys(tokens)
                continue
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

    def _damaged(self, message: str) -> None:
        if self.lenient is None:
            raise DamageError(message)
        self.lenient.damage.append(message)

    def _logs(self) -> None:
        about = self.journal._about
        expected = min(self.logs, default=1) if self.snapshot is None else self.snapshot
        for number in self.logs:
            try:
                if number != expected:
                    raise DamageError(f"{self.journal.folder}: log {expected} is missing")
                for record in read_log(self.journal.folder, number, about):
                    self._record(record, number)
            except DamageError as damage:
                self._step()
                self._damaged(str(damage))
                self._count_lost(damage.counted)
                for later in self.logs:
                    if later > number or later == number != expected:
                        self._count_lost(count_log(self.journal.folder, later, about))
                return
            expected += 1
        if not self.logs:
            self._damaged(f"{self.journal.folder}: log {expected} is missing")
        self._step()

    def _count_lost(self, counted: dict[int, int]) -> None:
        for number, frames in counted.items():
            if number in self.now:
                token = self.journal._tokens[self.now[number]]
                self.found.lost[token] = (self.found.lost.get(token) or 0) + frames

    def _record(self, record: Record, log: int) -> None:
        """Apply a record of a log."""
        model, worker = self.model, self.model.worker
        where = f"log {log} of {self.journal.folder}"
        if record.kind == FRAMES:
            assert model.rows is not None
            sessions, rows = record.sessions, np.frombuffer(record.data, model.rows.inputs)
            if len(rows) != len(sessions):
                raise DamageError(f"{where}: a record has {len(sessions)} sessions and {len(rows)} frames")
            sessions, known = self._known(sessions, where)
            self.waiting.append((sessions, rows[known]))
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
            number = int(record.sessions[0])
            if number in self.lost:
                self.found.lost.pop(self.lost.pop(number), None)
                return
            for new in self._known(record.sessions, where)[0].tolist():
                model.pool.close(new)
                del self.now[number], self.journal._tokens[new]
        elif record.kind == REFUSED:
            sessions, known = self._known(record.sessions, where)
            counts = np.frombuffer(record.data, np.int64)[known]
            worker.count[sessions % model.capacity] += np.maximum(counts - worker.kept, 0)
            for turn in range(min(worker.kept, int(counts.max(initial=0)))):
                worker.refuse(sessions[counts > turn])
        else:
            raise DamageError(f"{where}: expected a kind of record from 0 to 3, found {record.kind}")

    def _known(self, sessions: Numbers, where: str) -> tuple[Numbers, Any]:
        """Return numbers in this pool, and which of the sessions they are; others are damage."""
        new = np.array([self.now.get(number, -1) for number in sessions.tolist()], np.int64)
        known = new >= 0
        if not known.all():
            unknown = [number for number in sessions[~known].tolist() if number not in self.lost]
            if self.lenient is None and unknown:
                raise DamageError(f"{where}: session {unknown[0]} isn't open")
            for number in unknown:
                self.unknown[number] = self.unknown.get(number, 0) + 1
        return new[known], known

    def _step(self) -> None:
        """Step the frames that wait for it."""
        if not self.frames:
            return
        sessions, rows = (np.concatenate(arrays) for arrays in zip(*self.waiting, strict=True))
        self.found.frames += len(sessions)
        self.waiting.clear()
        self.frames = 0
        self.model.worker.process(sessions, rows)
