"""Sessions that survive the process: a snapshot of all of them, and a log of the frames since.

A frame is stored before it is stepped. After `kill -9` the next process reads the last snapshot and steps the frames of
the log again, so that every session has the same state, count and stored answers as before.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.formats.files import digest_of, options_text
from cellstack.serve.generations import (
    CLOSED,
    FRAMES,
    OPENED,
    REFUSED,
    DamageError,
    Log,
    Numbers,
    Part,
    Record,
    as_bytes,
    count_log,
    files_before,
    numbers_of,
    read_log,
    read_snapshot,
    write_snapshot,
)
from cellstack.serve.models import Model, ServeError, Session
from cellstack.serve.worker import MOST_FRAMES

if TYPE_CHECKING:
    from cellstack.serve.rows import Records

LEVELS = ("none", "snapshot", "frames", "synced")
"""What survives `kill -9`: nothing; the sessions as of some seconds ago; every frame; every frame, also a power cut."""

OPTIONS = "options.json"  # in the folder of a model
REPLAY = 0.5  # seconds of steps in a log, after which the next snapshot is due
LARGEST = 128 << 20  # bytes of a log, after which the next snapshot is due
RETRY = 1.0  # seconds after a snapshot that couldn't be written
PART = 128  # sessions per row of a snapshot: copying their answers blocks the worker for well below a millisecond

_log = logging.getLogger(__name__)


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


class _Moment(NamedTuple):
    """The sessions between two batches."""

    numbers: Numbers
    tokens: list[str]
    counts: Numbers
    stored_from: Numbers
    states: list[np.ndarray[Any, Any]]


class Store:
    """A durable folder, which one server uses at a time. It has a subfolder for each version of a model.

    Args:
        folder: is created if it doesn't exist.
        level: one of `LEVELS`, but not `"none"`.
        every: seconds between snapshots at the level `"snapshot"`.
        wait: seconds to wait for another server that is about to exit, after `request_handover`.

    Raises:
        ServeError: another server uses the folder.
        OSError: it can't be created.
    """

    def __init__(self, folder: Path, level: str = "frames", every: float = 5.0, wait: float = 0.0) -> None:
        if level not in LEVELS[1:]:
            raise ValueError(f"Store: expected level to be one of {', '.join(LEVELS[1:])}, got {level!r}")
        try:
            import fcntl
        except ImportError:
            raise ServeError(503, "durable sessions need a system with file locks, such as Linux or macOS") from None
        self.folder, self.level, self.every = folder, level, every
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "a+")  # noqa: SIM115  (kept open while the folder is in use)
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                self._lock.seek(0)
                process = self._lock.read(20).strip() or "unknown"
                self._lock.close()
                raise ServeError(
                    409, f"{folder} is in use by another server (process {process}): stop it, or use another folder"
                ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def stored_models(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the stored copies of model files of which there are stored sessions, oldest first, and their options.

        These are the model files of the last process, whose sessions need their version of the model, loaded with the
        same options.

        Raises:
            FormatError: a copy was changed, or is missing.
        """
        found: list[tuple[float, Path, dict[str, Any]]] = []
        for folder in self.folder.iterdir():
            if not folder.is_dir() or not numbers_of(folder, "snapshot"):
                continue
            paths = list((folder / "model").iterdir()) if (folder / "model").is_dir() else []
            options = json.loads((folder / OPTIONS).read_text()) if (folder / OPTIONS).is_file() else {}
            if len(paths) != 1 or digest_of(paths[0], options)[:16] != folder.name[-16:]:
                raise DamageError(
                    f"{folder / 'model'}: expected the unchanged model file of the sessions in {folder}: put it back, "
                    "or move the folder away to give up its sessions"
                )
            found.append((paths[0].stat().st_mtime, paths[0], options))
        return [(path, options) for _, path, options in sorted(found, key=lambda one: one[:2])]

    def restore(self, model: Model, path: Path | None = None, recover: bool = False) -> Restored | None:
        """Restore a model's sessions, and store them from now on. Must be called before the model accepts frames.

        Args:
            model: the model.
            path: its file, which is copied into the folder, so that the sessions survive when the file changes.
            recover: see `Journal.restore`.

        Returns:
            what was found; None for a model without sessions.

        Raises:
            FormatError, ServeError, OSError: see `Journal.restore`.
        """
        if model.rows is None:
            return None
        folder = self.folder / f"{model.name}-{model.digest[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if path is not None and not (folder / "model").exists():
            _copy(path, folder, model)
        return Journal(folder, model, self.level, self.every).restore(recover)

    def close(self) -> None:
        """Let other servers use the folder. The models must have been stopped before."""
        self._lock.close()


def _copy(path: Path, folder: Path, model: Model) -> None:
    """Copy a model's file or folder to `folder/model/`, and its options."""
    new = folder / "model-new"
    if new.exists():  # of a process that was killed
        shutil.rmtree(new)
    new.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, new / path.name)
    if digest_of(new / path.name, model.options) != model.digest:
        shutil.rmtree(new)
        raise ServeError(503, f"{path} changed while it was loaded: load it again")
    if model.options:
        (folder / OPTIONS).write_text(options_text(model.options))
    new.rename(folder / "model")


class Journal:
    """Stores the sessions of a model in a folder, see `Store`. The methods of a `worker.Journal` run in its thread.

    Args:
        folder: of this version of the model.
        model: the model, which has sessions.
        level, every: see `Store`.

    Attributes:
        problem: why the last snapshot couldn't be written, or None. The log grows until one can be; nothing is lost,
            but for the level `"snapshot"` if the process is killed.
        snapshots: the number of snapshots written.

    Raises:
        ServeError: the network has patches.
    """

    def __init__(self, folder: Path, model: Model, level: str = "frames", every: float = 5.0) -> None:
        assert model.rows is not None
        if model.network.patches:
            raise ServeError(400, f"{model.name} has patches, whose progress in a session can't be stored")
        self.folder, self.model, self.level, self.every = folder, model, level, every
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
        self._unsaved = 0  # frames since the snapshot, at the level "snapshot"
        self._last, self._not_before = time.monotonic(), 0.0
        self._job: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, f"cellstack-{model.name}-snapshots")
        self._damaged: Path | None = None  # where damaged files are kept when they are replaced
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
        if self.level == "snapshot":
            self._unsaved += len(rows)
        else:
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
        now = time.monotonic()
        if now < self._not_before:
            return False
        late = self.level == "snapshot" and self._unsaved > 0 and now - self._last >= self.every
        return late or self._stepped > REPLAY or self._log.bytes > LARGEST

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
        self._stepped, self._unsaved, self._last = 0.0, 0, time.monotonic()
        self._job = self._writer.submit(self._complete, self._log.number, moment)

    def _prepare(self) -> None:
        number, self._next = self._next, self._next + 1
        self._spare = Log(self.folder, number, self._described(), self.level == "synced")

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
            if self._damaged is None:
                path.unlink(missing_ok=True)
            else:
                path.rename(self._damaged / path.name)
        self._damaged = None

    def _described(self) -> dict[str, Any]:
        return self._about | {"capacity": self.model.capacity, "kept": self.model.worker.kept}

    def _moment(self) -> _Moment:
        numbers, tokens = np.array(list(self._tokens), np.int64), list(self._tokens.values())
        worker, slots = self.model.worker, numbers % self.model.capacity
        states = [array for entry in self.model.pool.state(numbers) for array in entry]
        return _Moment(numbers, tokens, worker.count[slots], worker.all_stored_from(slots), states)

    def _part(self, moment: _Moment, start: int) -> Part:
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
        return Part(about, states, as_bytes(answers))  # `tobytes` takes 20 times as long for records

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

    def restore(self, recover: bool = False) -> Restored:
        """Restore the sessions, and store them from now on.

        Args:
            recover: keep all that precedes the first damage, instead of raising an error. The damaged files are moved
                to a subfolder.

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
            found = self._restore(snapshots, logs, recover)
        self._next = max([*snapshots, *logs, 0]) + 1
        self._prepare()
        assert self._spare is not None
        self._log, self._spare = self._spare, None
        if found.damage:
            self._damaged = self.folder / f"damaged-{self._log.number:06}"
            self._damaged.mkdir()
            found.damage.append(f"the files are kept in {self._damaged}")
        self._writer.submit(self._complete, self._log.number, self._moment()).result()
        found.sessions, found.seconds = len(self._tokens), time.perf_counter() - begun
        for number, token in self._tokens.items():
            session = Session(token, self.model, number)
            session.accepted = session.processed
            session.touch()
            self.model.sessions[token] = session
        self.model.worker.journal = self
        if self.level == "snapshot":
            threading.Thread(target=self._call_regularly, name="cellstack-regular", daemon=True).start()
        return found

    def _call_regularly(self) -> None:
        """Let the worker call `after_batch` also when no frames arrive."""
        while not self._ended.wait(self.every):
            if self._unsaved:
                try:
                    self.model.worker.call(self.after_batch, lambda result: None)
                except RuntimeError:  # it stops, and then calls `close`
                    return

    def _restore(self, snapshots: list[int], logs: list[int], recover: bool) -> Restored:
        help_ = "start with --recover to keep everything before the damage"
        if not recover:
            try:
                return _Replay(self, snapshots[-1:], logs, None).run()
            except DamageError as damage:
                raise DamageError(f"{damage}: {help_}") from None
        problems: list[str] = []
        for number in reversed(snapshots):  # an older generation may be complete
            replay = _Replay(self, [number], logs, None)
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
            replay = _Replay(self, [number], logs, Restored())
            try:
                return replay.run()
            except DamageError:  # it is among the problems
                replay.undo()
        return _Replay(self, [], logs, Restored(damage=problems)).run()


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
