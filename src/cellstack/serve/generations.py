"""The files of durable sessions: SQLite databases with a snapshot of all sessions, and logs of what happened since.

A generation k consists of `k.snapshot`, the sessions at one moment; `k.log`, the frames since; and `k.mark`, the number
of the last record of the log: SQLite itself treats a damaged end of a log as if it had never been written.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import FormatError
from cellstack.formats.files import flush_folder

APPLICATION = 0x63737373  # SQLite's application_id of these files
FORMAT = 1
PAGE = 8192  # bytes: smaller pages cost more per large batch, larger ones fill the disk with single frames
FRAMES, OPENED, CLOSED, REFUSED = range(4)  # the kinds of records in a log
SUFFIXES = ("snapshot", "log", "log-wal", "log-shm", "mark", "snapshot-new", "log-new", "log-new-wal", "log-new-shm")

Numbers = NDArray[np.int64]


class DamageError(FormatError):
    """A file of durable sessions can't be read."""


class Record(NamedTuple):
    """A record of a log.

    Attributes:
        kind: FRAMES, OPENED, CLOSED or REFUSED.
        sessions: the sessions' numbers in the pool.
        data: FRAMES: the records of inputs; OPENED: `opening`; CLOSED: nothing; REFUSED: counts, int64.
    """

    kind: int
    sessions: Numbers
    data: bytes | NDArray[Any]


class Part(NamedTuple):
    """Some sessions of a snapshot.

    Attributes:
        about: the lists `numbers`, `tokens`, `counts`, `stored_from`.
        states, answers: as bytes, one session after the other in each array.
    """

    about: dict[str, list[Any]]
    states: bytes
    answers: bytes | NDArray[np.uint8]


def disk_error(error: sqlite3.Error) -> OSError:
    """Return an error of SQLite while writing as an OSError."""
    if "full" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(errno.EIO, str(error))


def path_of(folder: Path, number: int, suffix: str) -> Path:
    """Return the path of a file of a generation."""
    return folder / f"{number:06}.{suffix}"


def numbers_of(folder: Path, suffix: str) -> list[int]:
    """Return the numbers of the generations of which there is such a file, ascending."""
    found = (re.fullmatch(rf"(\d{{6,}})\.{suffix}", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def files_before(folder: Path, number: int) -> list[Path]:
    """Return the files of all generations before this one, oldest first."""
    names = re.compile(rf"(\d{{6,}})\.({'|'.join(SUFFIXES)})")
    found = ((names.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m and int(m[1]) < number)]


def as_bytes(data: Any) -> Any:
    """Return an array of numbers or records as one of bytes, which may share its memory; other data as they are."""
    return np.ascontiguousarray(data).view(np.uint8).ravel() if isinstance(data, np.ndarray) else data


def _check(number: int, kind: int, sessions: Any, data: Any) -> int:
    return zlib.crc32(data, zlib.crc32(sessions, zlib.crc32(b"%d %d" % (number, kind))))


def _create(path: Path, about: dict[str, Any], table: str) -> sqlite3.Connection:
    """Create a database with a description, in which nothing is protected from crashes so far."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (f"page_size={PAGE}", "journal_mode=OFF", "synchronous=OFF", f"application_id={APPLICATION}"):
            database.execute(f"PRAGMA {pragma}")
        database.execute("BEGIN")
        database.execute("CREATE TABLE about(json TEXT, crc INTEGER)")
        database.execute(table)
        text = json.dumps({"format": FORMAT, **about})
        database.execute("INSERT INTO about VALUES (?, ?)", (text, zlib.crc32(text.encode())))
    except BaseException:
        database.close()
        raise
    return database


def _open(path: Path, about: dict[str, Any]) -> tuple[sqlite3.Connection, dict[str, Any]]:
    """Open a database that `_create` made, and compare its description with `about`."""
    if not path.is_file():
        raise DamageError(f"{path} is missing")
    with path.open("rb") as file:
        begin = file.read(16)
    if begin != b"SQLite format 3\0":
        raise DamageError(f"{path}: expected a SQLite file, found {begin!r} at its start")
    # Read-only: closing it must not move a damaged log into the database.
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION:
            raise DamageError(f"{path} is a SQLite file of another program")
        ((text, crc),) = database.execute("SELECT json, crc FROM about").fetchall()
        if not isinstance(text, str) or zlib.crc32(text.encode()) != crc:
            raise DamageError(f"{path}: the description doesn't match its checksum")
        found = json.loads(text)
        for key, value in {"format": FORMAT, **about}.items():
            if found.get(key) != value:
                raise DamageError(f"{path}: expected {key} {value!s:.80}, found {found.get(key)!s:.80}")
    except (sqlite3.Error, ValueError) as error:
        database.close()
        if isinstance(error, DamageError):
            raise
        raise DamageError(f"{path}: {error}") from None
    return database, found


class Log:
    """The log of a generation, to write.

    Args:
        folder, number: where, and the generation.
        about: what a reader compares or needs.
        synced: whether a record is on the disk, and not only in the system's memory, when `write` returns.

    Attributes:
        bytes: about the size of the file.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, folder: Path, number: int, about: dict[str, Any], synced: bool) -> None:
        self.folder, self.number, self.bytes, self._last = folder, number, 0, 0
        table = "CREATE TABLE log(id INTEGER PRIMARY KEY, kind INTEGER, crc INTEGER, sessions BLOB, data BLOB)"
        new, path, mark = (path_of(folder, number, suffix) for suffix in ("log-new", "log", "mark"))
        try:
            new.unlink(missing_ok=True)  # of a process that was killed
            with closing(_create(new, {**about, "generation": number}, table)) as database:
                database.execute("COMMIT")
                database.execute("PRAGMA journal_mode=WAL").fetchall()
            mark.write_bytes(bytes(8))
            for complete in (mark, new) if synced else ():
                with complete.open("rb+") as file:
                    os.fsync(file.fileno())
            new.rename(path)  # it appears in the folder when it is complete, so that a kill never leaves half of it
            if synced:
                flush_folder(folder)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                flushes = "FULL" if synced else "OFF"  # without, what was written survives the process all the same
                for pragma in ("wal_autocheckpoint=0", f"synchronous={flushes}"):
                    self._database.execute(f"PRAGMA {pragma}").fetchall()
                with mark.open("rb+") as file:
                    self._mark = mmap.mmap(file.fileno(), 8)
            except BaseException:
                self._database.close()
                raise
        except sqlite3.Error as error:
            raise disk_error(error) from None

    def write(self, records: Sequence[Record]) -> None:
        """Write records, all or none.

        Raises:
            OSError: they can't be written.
        """
        execute, last = self._database.execute, self._last
        try:
            if len(records) > 1:
                execute("BEGIN")
            for kind, sessions, data in records:
                last += 1
                some, own = as_bytes(sessions), as_bytes(data)
                crc = _check(last, kind, some, own)
                execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", (last, kind, crc, some, own))
                self.bytes += len(some) + len(own) + PAGE
            if len(records) > 1:
                execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                execute("ROLLBACK")
            raise disk_error(error) from None
        self._last = last
        self._mark[:] = last.to_bytes(8, "little")

    def close(self) -> None:
        """Close it. If its files are deleted before, SQLite doesn't copy the records into the database first."""
        self._mark.close()
        self._database.close()


def read_log(folder: Path, number: int, about: dict[str, Any]) -> Iterator[Record]:
    """Read a log record by record.

    Raises:
        DamageError: at the first damaged record, or after the last if some are missing.
    """
    path, mark = path_of(folder, number, "log"), path_of(folder, number, "mark")
    database, _ = _open(path, about)
    with closing(database):
        last = 0
        for last, kind, crc, sessions, data in _rows(database, path):
            if not isinstance(sessions, bytes) or not isinstance(data, bytes):
                raise DamageError(f"{path}: record {last} has a wrong type")
            if _check(last, kind, sessions, data) != crc:
                raise DamageError(f"{path}: record {last} doesn't match its checksum")
            yield Record(kind, np.frombuffer(sessions, np.int64), data)
        if not mark.is_file() or mark.stat().st_size != 8:
            raise DamageError(f"{mark}: expected a file of 8 bytes")
        written = int.from_bytes(mark.read_bytes(), "little")
        if written > last:
            raise DamageError(f"{path}: {written - last} records after record {last} are damaged or missing")


def _rows(database: sqlite3.Connection, path: Path) -> Iterator[tuple[Any, ...]]:
    expected = 1
    try:
        for row in database.execute("SELECT id, kind, crc, sessions, data FROM log ORDER BY id"):
            if row[0] != expected:
                raise DamageError(f"{path}: record {expected} is missing")
            yield row
            expected += 1
    except sqlite3.Error as error:
        raise DamageError(f"{path}: {error} after record {expected - 1}") from None


def write_snapshot(folder: Path, number: int, about: dict[str, Any], parts: Iterable[Part]) -> None:
    """Write a snapshot to disk; it appears in the folder when it is complete.

    Raises:
        OSError: it can't be written.
    """
    new, path = path_of(folder, number, "snapshot-new"), path_of(folder, number, "snapshot")
    new.unlink(missing_ok=True)
    table = "CREATE TABLE part(id INTEGER PRIMARY KEY, sessions TEXT, crc INTEGER, states BLOB, answers BLOB, data_crc)"
    try:
        try:
            with closing(_create(new, {**about, "generation": number}, table)) as database:
                for place, (sessions, states, answers) in enumerate(parts):
                    text = json.dumps(sessions)
                    crc, data_crc = zlib.crc32(text.encode()), _check(place, 0, states, answers)
                    row = (place, text, crc, states, answers, data_crc)
                    database.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?, ?)", row)
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise disk_error(error) from None
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.rename(path)
        flush_folder(folder)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def read_snapshot(folder: Path, number: int, about: dict[str, Any]) -> tuple[dict[str, Any], list[Part]]:
    """Read a snapshot: what it was described as, and its parts. For the arguments see `Log`.

    Raises:
        DamageError: it can't be read.
    """
    path = path_of(folder, number, "snapshot")
    database, described = _open(path, about)
    with closing(database):
        return described, [_part(database, path, place) for place in range(described["parts"])]


def _part(database: sqlite3.Connection, path: Path, place: int) -> Part:
    """Read a part of a snapshot."""
    try:
        row = database.execute("SELECT sessions, crc, states, answers, data_crc FROM part WHERE id = ?", (place,))
        ((text, crc, states, answers, data_crc),) = row.fetchall() or ((None,) * 5,)
    except sqlite3.Error as error:
        raise DamageError(f"{path}: {error} in part {place}") from None
    if not isinstance(text, str) or zlib.crc32(text.encode()) != crc:
        raise DamageError(f"{path}: the list of sessions in part {place} is missing or doesn't match its checksum")
    if not isinstance(states, bytes) or not isinstance(answers, bytes):
        raise DamageError(f"{path}: the states in part {place} are missing")
    if _check(place, 0, states, answers) != data_crc:
        raise DamageError(f"{path}: the states in part {place} don't match their checksum")
    return Part(json.loads(text), states, answers)
