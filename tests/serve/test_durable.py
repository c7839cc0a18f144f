"""Durable sessions: they continue after a restart, with the same token, number of frames, answers and bits."""

import asyncio
import os

import numpy as np
import pytest
from serving import WIDTH, lstm, records, running

from cellstack.cells.errors import FormatError
from cellstack.serve import Client
from cellstack.serve.durable import Store
from cellstack.serve.models import Limits, Model, Models, ServeError

KEPT = 16


def steps(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


class Served:
    """A model with durable sessions."""

    def __init__(self, folder, network=None, **limits):
        self.loop = asyncio.new_event_loop()
        limits = Limits(**{"sessions": 64, "kept": KEPT, **limits})
        self.model = Model("lstm", network or lstm(), limits, digest="0" * 64 if network is None else "1" * 64)
        self.store = Store(folder)
        try:
            self.restored = self.store.restore(self.model)
        except BaseException:
            self.model.stop()
            self.store.close()
            self.loop.close()
            raise
        self.model.start(self.loop)

    def call(self, work):
        return self.loop.run_until_complete(work)

    def open(self, token):
        self.call(self.model.open(token=token))

    def step(self, token, x):
        answers = self.call(self.model.steps(self.model.sessions[token], records(self.model, x)))
        return answers.rows[answers.rows.dtype.names[0]]

    def contents(self):
        """Return everything that a restart must not change."""
        worker, found = self.model.worker, {}
        for token, session in self.model.sessions.items():
            first = worker.stored_from(session.slot) + 1
            answers = [worker.answer(session.slot, n) for n in range(first, session.processed + 1)]
            state = [array.tobytes() for entry in self.model.pool.state(session.number) for array in entry]
            stored = [(row.tobytes(), refused) for row, refused in answers]
            found[token] = session.processed, session.accepted, first, stored, state
        return found

    def stop(self):
        self.model.stop()
        self.store.save(self.model)
        self.store.close()
        self.loop.close()


def with_frames(folder, **limits):
    """Sessions: without frames, with some, with more than the stored answers, with a refused one, and a closed one."""
    served = Served(folder, **limits)
    for token in ("idle", "some", "busy", "refused", "closed"):
        served.open(token)
    served.step("some", steps(3))
    served.step("busy", steps(27))
    served.step("refused", np.where(np.arange(4)[:, None] == 2, np.nan, steps(4)).astype(np.float32))
    served.call(served.model.close(served.model.sessions["closed"]))
    return served


def test_a_restart_changes_nothing(tmp_path):
    before = with_frames(tmp_path)
    contents = before.contents()
    assert contents["busy"][:3] == (27, 27, 27 - KEPT + 1)
    before.stop()
    after = Served(tmp_path)
    assert (after.contents(), after.restored) == (contents, 4)
    stream = lstm().stream()
    expected = [stream.step(one[None])[0] for one in np.concatenate([steps(27), steps(2, 1)])]
    np.testing.assert_array_equal(after.step("busy", steps(2, 1)), expected[-2:])
    contents = after.contents()
    after.stop()
    again = Served(tmp_path)
    assert again.contents() == contents
    again.stop()


def test_the_last_answers_are_stored_when_a_restart_stores_more_or_fewer(tmp_path):
    before = with_frames(tmp_path)
    contents = before.contents()
    before.stop()
    for kept in (5, 40):
        after = Served(tmp_path, kept=kept)
        for token, (count, _, first, answers, state) in after.contents().items():
            assert (count, state) == (contents[token][0], contents[token][4])
            assert first == max(contents[token][2], count - 5 + 1)
            assert answers == contents[token][3][len(contents[token][3]) - len(answers) :]
        after.stop()


def test_restored_sessions_have_no_file_and_without_sessions_none_is_written(tmp_path):
    with_frames(tmp_path).stop()
    served = Served(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    for session in list(served.model.sessions.values()):
        served.call(served.model.close(session))
    served.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_another_version_of_a_model_leaves_its_sessions(tmp_path):
    before = with_frames(tmp_path)
    contents = before.contents()
    before.stop()
    other = Served(tmp_path, lstm(seed=1))
    assert not other.restored
    other.open("own")
    other.stop()
    after = Served(tmp_path)
    assert after.contents() == contents
    after.stop()


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
    after = Served(tmp_path)
    assert after.restored == 4
    after.stop()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"a" * 999])
def test_a_damaged_file_is_reported_and_kept(tmp_path, damage):
    with_frames(tmp_path).stop()
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    data = path.read_bytes()
    with pytest.raises(FormatError, match="move the file away to give up its sessions") as caught:
        Served(tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == data


def test_a_server_continues_the_sessions_of_the_one_before(tmp_path, model_file):
    x = steps(20)
    with running(model_file, durable=tmp_path) as first:
        session = Client(first.ws).open("lstm")
        found = [session.step(step) for step in x[:10]]
        other = Client(first.ws).open("lstm")
        other.close()
    with running(model_file, durable=tmp_path) as second:
        assert second.reports == ["lstm: restored 1 sessions"]
        with Client(second.ws).resume("lstm", session.token) as again:
            assert again.frame == 10
            found += [again.step(step) for step in x[10:]]
    session.close()
    stream = lstm().stream()
    np.testing.assert_array_equal(found, [stream.step(one[None])[0] for one in x])
    assert Models(Limits()).load(model_file).digest[:16] not in "".join(os.listdir(tmp_path))
