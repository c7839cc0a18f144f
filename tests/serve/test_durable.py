"""Durable sessions: kill -9, restarts, full disks, damaged files."""

import asyncio
import errno
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from durable_server import KEPT, WIDTH, model, network, records

from cellstack.cells.errors import FormatError
from cellstack.serve import generations, journal
from cellstack.serve.durable import Store
from cellstack.serve.models import Limits, Model, Models, ServeError
from cellstack.serve.server import Server, ServerSettings

SERVER = Path(__file__).with_name("durable_server.py")


class Process:
    """A process of durable_server.py."""

    def __init__(self, folder, **options):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, self.counts, self.restored = self.read()

    def read(self):
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            said = self.process.stderr.read().decode()
            raise EOFError(f"the process ended with status {self.process.wait()}: {said}") from None

    def send(self, *message):
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def ask(self, *message):
        self.send(*message)
        return self.read()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self):
        """Close the pipes of a process that has ended."""
        with suppress(BrokenPipeError):  # what it still buffers
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()


class Client:
    """Sessions that step frame after frame, with the answers of uninterrupted streams."""

    def __init__(self, seed, sessions):
        self.random = np.random.default_rng(seed)
        self.streams = {f"token-{n}": network().stream() for n in range(sessions)}
        self.x = {token: [] for token in self.streams}
        self.y = {token: [] for token in self.streams}
        self.acknowledged = dict.fromkeys(self.streams, 0)
        self.open = set()

    def frame(self, token, number):
        """Return the input of a frame, from 1."""
        while len(self.x[token]) < number:
            x = self.random.standard_normal(WIDTH).astype(np.float32)
            self.x[token].append(x)
            self.y[token].append(self.streams[token].step(x[None])[0])
        return self.x[token][number - 1]

    def check(self, token, number, answer):
        assert np.array_equal(answer, self.y[token][number - 1]), f"frame {number} of {token}"
        self.acknowledged[token] = max(self.acknowledged[token], number)

    def reconnect(self, process):
        """Compare the restored sessions with what was acknowledged; return the number of the last frame of each."""
        assert self.open <= process.counts.keys()
        for token, count in process.counts.items():
            last = self.acknowledged[token]
            assert last <= count <= len(self.x[token])
            assert count - last <= KEPT
            self.open.add(token)
            process.send("answers", token, last)
        for _ in process.counts:
            _, token, last, answers = process.read()
            assert len(answers) == process.counts[token] - last
            for n, answer in enumerate(answers):
                self.check(token, last + 1 + n, answer)
        return dict(process.counts)

    def run(self, process, seconds):
        """Send frames until the process is killed after some time."""
        sent = self.reconnect(process)
        for token in list(self.streams)[: len(self.open) + 8]:
            if token not in self.open:
                assert process.ask("open", token) == ("opened", token)
                self.open.add(token)
                sent[token] = 0
        killer = threading.Timer(seconds, process.process.kill)
        killer.start()
        waiting = 0
        try:
            while True:
                for _ in range(2 - waiting):
                    tokens = self.random.choice(sorted(self.open), self.random.integers(1, 2 * len(self.open))).tolist()
                    tokens = [t for n, t in enumerate(tokens) if tokens[:n].count(t) < KEPT // 2]
                    x = []
                    for token in tokens:
                        sent[token] += 1
                        x.append(self.frame(token, sent[token]))
                    waiting += 1
                    process.send("step", tokens, np.array(x))
                _, tokens, numbers, answers, refused = process.read()
                waiting -= 1
                assert not refused
                for token, number, answer in zip(tokens, numbers, answers, strict=True):
                    self.check(token, number, answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            killer.join()
            assert process.process.wait() == -signal.SIGKILL
            process.close()


def kill_at_random_moments(folder, times, seed):
    client = Client(seed, 40)
    generations = set()
    for _ in range(times):
        # A generation lasts some 20 batches, so that many are killed while a snapshot is written.
        process = Process(folder, constants={"LARGEST": 400_000})
        client.run(process, client.random.uniform(0.02, 0.35))
        generations |= {path.name for path in folder.glob("lstm-*/*.log")}
    process = Process(folder)
    client.reconnect(process)
    process.kill()
    assert sum(client.acknowledged.values()) > 100 * times
    assert len(generations) > times  # more than the one that every start begins


def test_every_session_continues_after_kills(tmp_path):
    kill_at_random_moments(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_every_session_continues_after_many_kills(tmp_path):
    kill_at_random_moments(tmp_path, 100, seed=1)


# ── within one process ──────────────────────────────────────────────────────────────────────────────────────────────


class Served:
    """A model with durable sessions. `kill` forgets it as `kill -9` does: nothing is written any more."""

    def __init__(self, folder, synced=False, path=None, **options):
        self.model = model(**options)
        self.store = Store(folder, synced)
        try:
            self.restored = self.store.restore(self.model, path)
        except BaseException:
            self.store.close()
            self.model.stop()
            raise
        self.journal = self.model.worker.journal
        self.loop = asyncio.new_event_loop()
        self.model.start(self.loop)

    def now(self, function):
        """Run a function in the worker's thread."""
        return self.run(self.model.call(function))

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    def open(self, token):
        return self.run(self.model.open(token=token))

    def close(self, token):
        self.run(self.model.close(self.model.sessions[token]))

    def step(self, token, x):
        return self.run(self.model.steps(self.model.sessions[token], records(self.model, x)))

    def advance(self):
        """Write the next snapshot."""
        self.now(self.journal._advance)
        self.journal._writer.submit(int).result()

    def contents(self):
        """Return everything that a restart must not change."""
        worker, found = self.model.worker, {}
        for token, session in self.model.sessions.items():
            first = worker.stored_from(session.slot) + 1
            answers = [worker.answer(session.slot, n) for n in range(first, session.processed + 1)]
            state = [array.tobytes() for entry in self.model.pool.state(session.number) for array in entry]
            found[token] = (session.processed, first, [(row.tobytes(), bad) for row, bad in answers], state)
        return found

    def kill(self):
        self.journal._writer.submit(int).result()
        self.model.worker.journal = None
        self.stop()
        # As if the process had ended: closing must not touch the files.
        folder = self.journal.folder
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        for log in (self.journal._log, self.journal._spare, *self.journal._old):
            if log is not None:
                log.close()
        shutil.rmtree(folder)
        copy.rename(folder)

    def stop(self):
        self.model.stop()
        self.store.close()
        self.loop.close()


def steps(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def with_frames(folder, **options):
    """Sessions: idle, with frames before and after the last snapshot, refused ones too, closed, and new."""
    served = Served(folder, **options)
    for token in ("idle", "busy", "closed", "fresh"):
        served.open(token)
    served.step("idle", steps(5))
    served.step("busy", steps(20))
    served.advance()
    served.close("closed")
    served.open("late")  # in the slot of the closed one
    for token in ("busy", "late"):
        x = steps(7, 1)
        x[3, 1] = np.nan
        assert list(served.step(token, x).refused) == [3]
    return served


@pytest.mark.parametrize("synced", [False, True])
def test_sessions_that_are_opened_together_are_stored_together(tmp_path, monkeypatch, synced):
    served, writes = Served(tmp_path, synced, sessions=8), []
    write = generations.Log.write
    monkeypatch.setattr(
        generations.Log, "write", lambda log, records: writes.append(len(records)) or write(log, records)
    )

    async def opened(count, cancelled=()):
        tasks = [asyncio.ensure_future(served.model.open(token=f"{count}-{n}")) for n in range(count)]
        await asyncio.sleep(0)
        for n in cancelled:
            tasks[n].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = served.run(opened(5, cancelled=(1, 3)))  # such as clients that are gone
    assert [type(one).__name__ for one in found] == ["Session", "CancelledError"] * 2 + ["Session"]
    served.now(int)
    assert writes == [5, 1, 1]  # the others are closed
    assert len(served.model.pool) == 3
    found = served.run(opened(6))
    assert [type(one).__name__ for one in found] == ["Session"] * 5 + ["ServeError"]
    assert str(found[-1]) == "all 8 sessions of lstm are in use"
    contents = served.contents()
    assert len(contents) == 8
    served.kill()
    after = Served(tmp_path, synced)
    assert after.contents() == contents
    after.stop()


def test_a_kill_at_any_moment_of_the_next_generation(tmp_path, monkeypatch):
    served = with_frames(tmp_path / "0")
    contents, folders, seen = served.contents(), [], set()
    functions = {generations.Log.__init__.__code__, generations._create.__code__, journal.write_snapshot.__code__}

    def trace(frame, event, argument):
        now = tuple(sorted((path.name, path.stat().st_size) for path in served.journal.folder.iterdir()))
        if frame.f_code in functions and event == "line" and now not in seen:
            seen.add(now)
            folders.append(tmp_path / str(len(folders) + 1))
            shutil.copytree(tmp_path / "0", folders[-1])
        return trace if frame.f_code in functions else None

    def submit(function, *args):
        sys.settrace(trace)
        try:
            function(*args)
        finally:
            sys.settrace(None)

    with monkeypatch.context() as patch:
        patch.setattr(served.journal._writer, "submit", submit)
        served.now(served.journal._advance)
    served.stop()
    assert len(folders) > 10
    for folder in folders:
        after = Served(folder)
        assert after.contents() == contents
        after.stop()


@pytest.mark.parametrize("synced", [False, True])
def test_a_restart_changes_nothing(tmp_path, synced):
    before = with_frames(tmp_path, synced=synced)
    contents = before.contents()
    assert contents["busy"][:2] == (27, 27 - KEPT + 1)
    before.kill()
    after = Served(tmp_path, synced)
    assert after.contents() == contents
    assert after.restored.sessions == 4
    assert after.restored.frames == 14
    answers = after.step("busy", steps(3, 2))
    stream = network().stream()
    x = np.concatenate([steps(20), np.delete(steps(7, 1), 3, 0), steps(3, 2)])
    expected = np.concatenate([stream.step(one[None]) for one in x])
    assert np.array_equal(answers.rows[after.model.rows.outputs.names[0]], expected[-3:])
    contents = after.contents()
    after.stop()  # in order
    again = Served(tmp_path, synced)
    assert again.contents() == contents
    assert again.restored.frames == 0  # all are in the last snapshot
    again.stop()


def test_the_last_answers_are_stored_when_a_restart_stores_more_or_fewer(tmp_path):
    before = with_frames(tmp_path)
    contents = before.contents()
    before.stop()
    for kept, sessions in ((5, 10), (40, 100)):
        after = Served(tmp_path, kept=kept, sessions=sessions)
        for token, (count, first, answers, state) in after.contents().items():
            assert (count, state) == (contents[token][0], contents[token][3])
            assert first == max(contents[token][1], count - 5 + 1)
            assert answers == contents[token][2][len(contents[token][2]) - len(answers) :]
        after.stop()


def test_without_sessions_nothing_is_left(tmp_path):
    served = with_frames(tmp_path)
    for token in list(served.model.sessions):
        served.close(token)
    served.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_is_used_by_one_server_at_a_time(tmp_path):
    served = Served(tmp_path)
    with pytest.raises(ServeError, match=rf"is in use by another server \(process {os.getpid()}\)"):
        Store(tmp_path)
    served.stop()
    Store(tmp_path).close()


def test_fewer_sessions_than_are_stored(tmp_path):
    with_frames(tmp_path).stop()
    with pytest.raises(ServeError, match="contains more than 3 sessions, the limit"):
        Served(tmp_path, sessions=3)
    Served(tmp_path).stop()


def test_versions_of_a_model_keep_their_sessions(tmp_path):
    file, limits = tmp_path / "lstm.safetensors", Limits(sessions=8)
    network(0).save(file)

    async def old_and_new():
        store = Store(tmp_path / "durable")
        old = Model.load(file, limits)
        store.restore(old, file)
        old.start(asyncio.get_running_loop())
        await old.open(token="a")
        network(1).save(file)
        new = Model.load(file, limits, version=2)
        assert new.digest != old.digest
        store.restore(new, file)
        old.stop()
        new.stop()
        store.close()
        return old.digest

    async def old_again(digest):
        store = Store(tmp_path / "durable")
        ((path, options),) = store.stored_models()
        assert (path.name, options) == (file.name, {})
        old = Model.load(path, limits)
        assert old.digest == digest
        assert store.restore(old, path).sessions == 1
        old.start(asyncio.get_running_loop())
        await old.close(old.sessions["a"])
        old.stop()
        assert store.stored_models() == []
        with pytest.raises(ServeError, match="changed while it was loaded"):
            store.restore(old, file)
        store.close()

    asyncio.run(old_again(asyncio.run(old_and_new())))


def test_other_options_of_a_model_are_another_version(tmp_path, monkeypatch):
    file = tmp_path / "lstm.safetensors"
    network().save(file)
    monkeypatch.setattr("cellstack.formats.load", lambda path, order=(): network(len(order)))
    settings = ServerSettings(durable=tmp_path / "durable", limits=Limits(sessions=8))
    x = steps(4)

    async def serve(options, begin, length):
        models = Models(settings.limits, options=options)
        models.add(file)
        server = Server(models, settings, lambda text: None)
        server._restore(settings.durable)
        for served in models.all():
            served.start(asyncio.get_running_loop())
        session = await models.model("lstm").open(token="a") if not begin else models.session("a")
        answers = await session.model.steps(session, records(session.model, x[begin : begin + length]))
        found = [(served.version, served.options, len(served.sessions)) for served in models.all()]
        for served in models.all():
            served.stop()
        server._store.close()
        return answers.rows[session.model.rows.outputs.names[0]], found

    given = {"order": ["lstm", "last"]}
    first, found = asyncio.run(serve(given, 0, 2))
    assert found == [(1, given, 1)]
    second, found = asyncio.run(serve({}, 2, 2))
    assert found == [(1, given, 1), (2, {}, 0)]
    stream = network(2).stream()
    assert np.array_equal(np.concatenate([first, second]), np.concatenate([stream.step(one[None]) for one in x]))


def test_a_stored_model_file_that_was_changed(tmp_path):
    file = tmp_path / "lstm.safetensors"
    network(0).save(file)
    store = Store(tmp_path / "durable")
    served = Model.load(file, Limits(sessions=8))
    store.restore(served, file)
    ((copy, _),) = store.stored_models()
    copy.write_bytes(b"")
    with pytest.raises(FormatError, match="expected the unchanged model file of the sessions"):
        store.stored_models()
    served.stop()
    store.close()


# ── full disks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_refuses_frames_until_there_is_space(tmp_path, monkeypatch):
    served = with_frames(tmp_path)
    states = {token: state for token, (_, _, _, state) in served.contents().items()}
    write = generations.Log.write

    def full(log, records):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(generations.Log, "write", full)
    for _ in range(20):
        answers = served.step("busy", steps(2, 3))
        assert answers.refused == dict.fromkeys(range(2), "the frame can't be stored: No space left on device")
    with pytest.raises(ServeError, match="the session can't be stored: No space left on device"):
        served.open("another")
    assert len(served.model.pool) == 4
    served.close("fresh")
    served.advance()  # isn't possible
    assert served.journal.problem == "No space left on device"
    found = served.contents()
    assert {token: state for token, (_, _, _, state) in found.items()} == {t: states[t] for t in found}
    assert found["busy"][0] == 27 + 40
    monkeypatch.setattr(generations.Log, "write", write)
    assert not served.step("busy", steps(4, 4)).refused
    served.open("another")
    contents = served.contents()
    served.kill()
    after = Served(tmp_path)
    assert after.contents() == contents
    after.stop()


def test_a_disk_that_is_really_full(tmp_path):
    process = Process(tmp_path, largest_file=150_000)
    stream, counted = network().stream(), 0
    process.ask("open", "a")
    refused = None
    for _ in range(2000):
        x = np.random.default_rng(counted).standard_normal((8, WIDTH)).astype(np.float32)
        _, _, numbers, answers, refused = process.ask("step", ["a"] * 8, x)
        counted = numbers[-1]
        if refused:
            break
        assert np.array_equal(answers, np.concatenate([stream.step(one[None]) for one in x]))
    assert set(refused.values()) == {"the frame can't be stored: disk I/O error"}
    process.kill()
    process = Process(tmp_path)  # with space
    assert counted - process.counts["a"] == 8  # their refusal could not be stored either
    x = steps(3)
    answers = process.ask("step", ["a"] * 3, x)[3]
    assert np.array_equal(answers, np.concatenate([stream.step(one[None]) for one in x]))
    process.kill()


def test_a_snapshot_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    served = with_frames(tmp_path)
    write = journal.write_snapshot

    def full(folder, number, about, parts):
        def some():
            yield from parts
            raise sqlite3.OperationalError("database or disk is full")

        write(folder, number, about, some())

    monkeypatch.setattr(journal, "write_snapshot", full)
    served.advance()
    served.now(served.journal.after_batch)
    assert served.journal.problem == "No space left on device"
    served.step("busy", steps(2, 5))
    served.now(served.journal._advance)  # prepares a log
    served.journal._writer.submit(int).result()
    served.advance()
    served.step("busy", steps(2, 6))
    contents = served.contents()
    assert len(list(served.journal.folder.glob("*.log"))) == 3
    assert not list(served.journal.folder.glob("*-new"))
    monkeypatch.setattr(journal, "write_snapshot", write)
    served.kill()
    after = Served(tmp_path)
    assert after.contents() == contents
    assert len(list(after.journal.folder.glob("*.log"))) == 2  # one of them for the next generation
    after.stop()


# ── damaged files ───────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path, at):
    """Change a byte of a file: at a place, or at the last one where these bytes are."""
    data = bytearray(path.read_bytes())
    if isinstance(at, bytes):
        at = data.rindex(at)
    data[at] ^= 1
    path.write_bytes(data)


def of(folder, suffix):
    """Return the first file with a suffix."""
    return min(folder.glob(f"lstm-*/*.{suffix}"))


DAMAGE = {
    "a snapshot's state": (lambda f: flip(of(f, "snapshot"), steps_state()), "states in part 0 don't match"),
    "a snapshot's list": (lambda f: flip(of(f, "snapshot"), b"stored_from"), "list of sessions in part 0"),
    "a snapshot's description": (lambda f: flip(of(f, "snapshot"), b'"digest"'), "doesn't match its checksum"),
    "a truncated snapshot": (lambda f: os.truncate(of(f, "snapshot"), 5000), "snapshot: "),
    "an empty snapshot": (lambda f: os.truncate(of(f, "snapshot"), 0), "expected a SQLite file, found b''"),
    "no snapshot": (lambda f: of(f, "snapshot").unlink(), "there is no readable snapshot"),
    "a frame in the log": (lambda f: flip(of(f, "log-wal"), steps(7, 1)[4].tobytes()), "records after record"),
    "a truncated log": (lambda f: os.truncate(of(f, "log-wal"), of(f, "log-wal").stat().st_size - 9), "records after"),
    "an empty log": (lambda f: os.truncate(of(f, "log-wal"), 0), "records after record 0 are damaged or missing"),
    "no log": (lambda f: of(f, "log").unlink(), "log 2 is missing"),
    "a log of something else": (
        lambda f: of(f, "log").write_bytes(b"a" * 9000),
        "expected a SQLite file, found b'aaaa",
    ),
    "no mark": (lambda f: of(f, "mark").unlink(), "mark: expected a file of 8 bytes"),
}


def steps_state():
    stream = network().stream()
    for one in steps(5):
        stream.step(one[None])
    return stream.state[0].h.tobytes()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_reported_and_kept(tmp_path, name):
    damage, message = DAMAGE[name]
    with_frames(tmp_path).kill()
    damage(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.glob("lstm-*/*") if p.suffix != ".log-shm"}
    with pytest.raises(FormatError, match=message) as caught:
        Served(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "to give up its sessions" in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("lstm-*/*") if p.suffix != ".log-shm"} == files


def test_a_damaged_record_is_reported(tmp_path):
    with_frames(tmp_path).kill()
    path = of(tmp_path, "log")
    database = sqlite3.connect(path)
    (number,) = database.execute("SELECT max(id) - 2 FROM log").fetchone()
    database.execute("UPDATE log SET crc = crc + 1 WHERE id = ?", (number,))
    database.commit()
    database.close()
    with pytest.raises(FormatError, match=f"record {number} doesn't match its checksum"):
        Served(tmp_path)


def test_files_of_another_model(tmp_path):
    served = with_frames(tmp_path)
    served.kill()
    (folder,) = tmp_path.glob("lstm-*")
    other = tmp_path / "lstm-0000000000000000"
    shutil.move(folder, other)
    moved = Served(tmp_path)  # the same digest
    moved.stop()
    with pytest.raises(FormatError, match=r"expected digest 0*1, found 0*0"):
        Served(tmp_path, seed=1)
