"""Stores the sessions of a model while they are stepped: a snapshot of all of them, and a log of the frames since."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.serve.generations import (
    CLOSED,
    FRAMES,
    OPENED,
    REFUSED,
    DamageError,
    Log,
    Numbers,
    Record,
    SnapshotPart,
    as_bytes,
    files_before,
    numbers_of,
    write_snapshot,
)
from cellstack.serve.models import Model, ServeError, Session
from cellstack.serve.replay import Replay, Restored

if TYPE_CHECKING:
    from cellstack.serve.rows import Records

OPTIONS = "options.json"  # in the folder of a model
REPLAY = 0.5  # seconds of steps in a log, after which the next snapshot is due
LARGEST = 128 << 20  # bytes of a log, after which the next snapshot is due
RETRY = 1.0  # seconds after a snapshot that couldn't be written
PART = 128  # sessions per row of a snapshot: copying their answers blocks the worker for well below a millisecond

_log = logging.getLogger(__name__)


class _Moment(NamedTuple):
    """The sessions between two batches."""

    numbers: Numbers
    tokens: list[str]
    counts: Numbers
    stored_from: Numbers
    states: list[np.ndarray[Any, Any]]


class Journal:
    """Stores the sessions of a model in a folder, see `Store`. The methods of a `worker.Journal` run in its thread.

    Args:
        folder: of this version of the model.
        model: the model, which has sessions.
        synced: see `Store`.

    Attributes:
        problem: why the last snapshot couldn't be written, or None. The log grows until one can be; nothing is lost.
        snapshots: the number of snapshots written.

    Raises:
        ServeError: the network has patches.
    """

    def __init__(self, folder: Path, model: Model, synced: bool = False) -> None:
        assert model.rows is not None
        if model.network.patches:
            raise ServeError(400, f"{model.name} has patches, whose progress in a session can't be stored")
        self.folder, self.model, self.synced = folder, model, synced
        self.problem: str | None = None
        self.snapshots = 0
        self._tokens: dict[int, str] = {}  # of the open sessions, by number
        self._late: list[Record] = []  # sessions closed when the disk was full
        self._refused = np.zeros(model.capacity, np.int64)  # frames refused when the disk was full, by slot
        self._log: Log | None = None
        self._spare: Log | None = None  # of the next generation
        self._old: list[Log] = []  # needed until the next snapshot is complete
        self._next = 1  # generation
        self._stepping: float | None = None  # since when the last stored frames are stepped
        self._stepped = 0.0  # seconds of steps in the log
        self._not_before = 0.0
        self._job: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, f"cellstack-{model.name}-snapshots")
        self._ended = threading.Event()
        like = model.initial
        self._shapes = [(array.dtype, array.shape[1:]) for entry in like for array in entry]
        self._like = like
        self._about = {
            "model": model.name,
            "digest": model.digest,
            "inputs": str(model.rows.inputs),
            "outputs": str(model.rows.outputs),
            "state": [f"{dtype}{list(shape)}" for dtype, shape in self._shapes],
        }

    # ── called by the worker ────────────────────────────────────────────────────────────────────────────────────────

    def opened(self, sessions: Sequence[int], tokens: Sequence[str]) -> None:
        """See `worker.Journal`.

        Raises:
            OSError: they can't be stored.
        """
        new = dict(zip(sessions, tokens, strict=True))
        self._write(*(self._opening(session, token) for session, token in new.items()))
        self._tokens |= new

    def _opening(self, session: int, token: str) -> Record:
        frames = int(self.model.worker.count[session % self.model.capacity])
        about = json.dumps({"token": token, "frames": frames}).encode()
        state = b"".join(array.tobytes() for entry in self.model.pool.state(session) for array in entry)
        return Record(OPENED, np.array([session]), about + b"\n" + state)

    def closed(self, session: int) -> None:
        """See `worker.Journal`. If it can't be stored now, it is later."""
        self._tokens.pop(session, None)
        self._refused[session % self.model.capacity] = 0
        record = Record(CLOSED, np.array([session]), b"")
        try:
            self._write(record)
        except OSError:
            self._late.append(record)

    def append(self, sessions: Numbers, rows: Records) -> None:
        """See `worker.Journal`.

        Raises:
            OSError: they can't be stored.
        """
        self._add_time()
        try:
            self._write(Record(FRAMES, sessions, rows))
        except OSError:
            np.add.at(self._refused, sessions % self.model.capacity, 1)
            raise
        self._stepping = time.perf_counter()

    def after_batch(self) -> None:
        """See `worker.Journal`: start the next generation if it is due, or report on the last."""
        self._add_time()
        job = self._job
        if job is not None:
            if not job.done():
                return
            self._job, error = None, job.exception()
            if error is not None:
                self._failed(error)
        if self._due():
            self._advance()

    def close(self) -> None:
        """See `worker.Journal`: write a last snapshot; without open sessions, delete the files instead."""
        self._ended.set()
        try:
            if self._job is not None:
                self._job.exception()  # wait for it; the snapshot below replaces its own
                self._job = None
            if self._tokens:
                self._advance()
                if self._job is not None:
                    self._job.result()
        except OSError as error:
            self._failed(error)
        finally:
            self._writer.shutdown()
            logs = [log for log in (self._log, self._spare, *self._old) if log is not None]
            if not self._tokens:
                self._delete_before(self._next)
            for log in logs:
                log.close()
        if not self._tokens:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            (self.folder / OPTIONS).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    # ── generations ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, *records: Record) -> None:
        assert self._log is not None
        if self._late or self._refused.any():
            self._write_late(*records)
        else:
            self._log.write(records)

    def _write_late(self, *records: Record) -> None:
        """Write records, and before them what could not be written earlier."""
        assert self._log is not None
        slots = np.flatnonzero(self._refused)
        late = list(self._late)
        if len(slots):
            by_slot = {number % self.model.capacity: number for number in self._tokens}
            numbers = np.array([by_slot[slot] for slot in slots.tolist()], np.int64)
            late.append(Record(REFUSED, numbers, self._refused[slots]))
        if late or records:
            self._log.write([*late, *records])
        self._late.clear()
        self._refused[slots] = 0

    def _add_time(self) -> None:
        if self._stepping is not None:
            self._stepped += time.perf_counter() - self._stepping
            self._stepping = None

    def _due(self) -> bool:
        assert self._log is not None
        late = self._stepped > REPLAY or self._log.bytes > LARGEST
        return late and time.monotonic() >= self._not_before

    def _failed(self, error: BaseException) -> None:
        self.problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self._not_before = time.monotonic() + RETRY
        _log.warning("%s: the snapshot can't be written: %s", self.folder, self.problem)

    def _advance(self) -> None:
        """Begin the next generation, or first prepare its log, in another thread."""
        assert self._log is not None
        if self._spare is None:
            self._job = self._writer.submit(self._prepare)
            if not self._ended.is_set():
                return
            self._job.result()
        try:
            self._write_late()  # the snapshot contains it, but the log is needed if the snapshot fails
        except OSError as error:
            self._failed(error)
            return
        moment = self._moment()
        assert self._spare is not None
        self._old.append(self._log)
        self._log, self._spare = self._spare, None
        self._stepped = 0.0
        self._job = self._writer.submit(self._complete, self._log.number, moment)

    def _prepare(self) -> None:
        number, self._next = self._next, self._next + 1
        self._spare = Log(self.folder, number, self._described(), self.synced)

    def _complete(self, number: int, moment: _Moment) -> None:
        """Write a snapshot, delete what it replaces, and prepare the next log."""
        parts = -(-len(moment.numbers) // PART)
        about = self._described() | {"sessions": len(moment.numbers), "parts": parts}
        write_snapshot(self.folder, number, about, (self._part(moment, n * PART) for n in range(parts)))
        self.problem = None
        self.snapshots += 1
        self._delete_before(number)
        for log in [old for old in self._old if old.number < number]:
            log.close()
            self._old.remove(log)
        if not self._ended.is_set():
            self._prepare()

    def _delete_before(self, number: int) -> None:
        for path in files_before(self.folder, number):
            path.unlink(missing_ok=True)

    def _described(self) -> dict[str, Any]:
        return self._about | {"capacity": self.model.capacity, "kept": self.model.worker.kept}

    def _moment(self) -> _Moment:
        numbers, tokens = np.array(list(self._tokens), np.int64), list(self._tokens.values())
        worker, slots = self.model.worker, numbers % self.model.capacity
        states = [array for entry in self.model.pool.state(numbers) for array in entry]
        return _Moment(numbers, tokens, worker.count[slots], worker.all_stored_from(slots), states)

    def _part(self, moment: _Moment, start: int) -> SnapshotPart:
        """Return some sessions of a snapshot, while the worker may already step them further.

        Answers that this overwrites in the meantime are those that the frames of the next log write again.
        """
        some = slice(start, start + PART)
        numbers, counts = moment.numbers[some], moment.counts[some]
        after, answers = self.model.worker.stored_answers(numbers % self.model.capacity)
        # If the log is lost, such as in a power cut, overwritten answers must not count as stored.
        stored_from = np.maximum(moment.stored_from[some], after - self.model.worker.kept)
        is_open = np.array([number in self._tokens for number in numbers.tolist()])
        stored_from = np.where(is_open, np.minimum(stored_from, counts), counts)
        about = {
            "numbers": numbers.tolist(),
            "tokens": moment.tokens[some],
            "counts": counts.tolist(),
            "stored_from": stored_from.tolist(),
        }
        states = b"".join(array[some].tobytes() for array in moment.states)
        return SnapshotPart(about, states, as_bytes(answers))  # `tobytes` takes 20 times as long for records

    def states_from(self, data: bytes, count: int) -> list[list[np.ndarray[Any, Any]]]:
        """Return the states of `count` sessions from bytes, as lists of the arrays of each entry of a state."""
        arrays, at = [], 0
        for dtype, shape in self._shapes:
            size = count * int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(data, dtype, size, at).reshape(count, *shape))
            at += size * dtype.itemsize
        rest = iter(arrays)
        return [[next(rest) for _ in entry] for entry in self._like]

    # ── restoring ───────────────────────────────────────────────────────────────────────────────────────────────────

    def restore(self) -> Restored:
        """Restore the sessions, and store them from now on.

        Returns:
            what was found.

        Raises:
            FormatError: a file is damaged, of another model, or missing.
            ServeError: more sessions are stored than the model may have.
            OSError: the next snapshot can't be written.
        """
        begun = time.perf_counter()
        found = Restored()
        snapshots, logs = numbers_of(self.folder, "snapshot"), numbers_of(self.folder, "log")
        if snapshots or logs:
            try:
                found = Replay(self, snapshots, logs).run()
            except DamageError as damage:
                raise DamageError(f"{damage}: move {self.folder} away to give up its sessions") from None
        self._next = max([*snapshots, *logs, 0]) + 1
        self._prepare()
        assert self._spare is not None
        self._log, self._spare = self._spare, None
        self._writer.submit(self._complete, self._log.number, self._moment()).result()
        found.sessions, found.seconds = len(self._tokens), time.perf_counter() - begun
        for number, token in self._tokens.items():
            session = Session(token, self.model, number)
            session.accepted = session.processed
            session.touch()
            self.model.sessions[token] = session
        self.model.worker.journal = self
        return found
