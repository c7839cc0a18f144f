"""The thread that steps sessions: batches, order, refused frames, stored answers."""

import asyncio
import itertools
import threading
import time
import types

import numpy as np
import pytest
from serving import records, with_model

from cellstack import CellSpec, Network
from cellstack.formats.state import state_to_bytes
from cellstack.nodes import Cell, Dense, Embedding, GridPool, Merge, Recurrent
from cellstack.serve import worker
from cellstack.serve.models import ServeError
from cellstack.serve.rows import Rows
from cellstack.serve.worker import turns

WIDTH, H = 3, 5


def network(seed=0):
    new = np.random.default_rng(seed).standard_normal
    cell = Cell(
        CellSpec(WIDTH, H), *(new(shape).astype(np.float32) for shape in ((WIDTH, 4 * H), (H, 4 * H), (4 * H,)))
    )
    return Network([Recurrent((cell,))])


def served(test):
    """Run an asynchronous test with a model."""

    def run():
        with_model(test, network(), sessions=4, kept=3)

    run.__name__ = test.__name__
    return run


@pytest.mark.parametrize("sessions", [[4], [1, 2, 3], [2, 2], [1, 2, 1, 3, 1, 2]])
def test_each_turn_takes_every_session_at_most_once_in_order(sessions):
    sessions = np.array(sessions, np.int64)
    found = turns(sessions) or [np.arange(len(sessions))]
    assert sorted(np.concatenate(found).tolist()) == list(range(len(sessions)))
    for places in found:
        assert len(set(sessions[places].tolist())) == len(places)
    for session in set(sessions.tolist()):
        places = [p for turn in found for p in turn.tolist() if sessions[p] == session]
        assert places == sorted(places)


@served
async def test_frames_of_several_sessions_are_those_of_streams(model):
    x = np.random.default_rng(1).standard_normal((2, 6, WIDTH)).astype(np.float32)
    one, two = await model.open(), await model.open()
    answers = await asyncio.gather(
        model.steps(one, records(model, x[0, :4])),
        model.steps(two, records(model, x[1, :1])),
        model.steps(one, records(model, x[0, 4:])),
        model.steps(two, records(model, x[1, 1:])),
    )
    for b, parts in enumerate(((answers[0], answers[2]), (answers[1], answers[3]))):
        stream = model.network.stream()
        expected = np.concatenate([stream.step(x[b, t : t + 1]) for t in range(6)])
        found = np.concatenate([part.rows[model.rows.outputs.names[0]] for part in parts])
        assert (found == expected).all()
    assert one.processed == two.processed == 6


@pytest.mark.parametrize(("seconds", "in_thread"), [(0.3 * worker.SHORT, False), (1.5 * worker.SHORT, True)])
@pytest.mark.parametrize("frames", [1, 20])
def test_batches_that_take_less_than_a_change_of_threads_stay_on_the_event_loop(
    monkeypatch, seconds, in_thread, frames
):
    clock = itertools.count()
    passing = types.SimpleNamespace(monotonic=lambda: seconds * next(clock), sleep=time.sleep)
    threads = []

    @served
    async def test(model):
        process, session = model.worker.process, await model.open()
        monkeypatch.setattr(
            model.worker, "process", lambda *given: (threads.append(threading.current_thread()), process(*given))[1]
        )
        monkeypatch.setattr(worker, "time", passing)  # each batch takes `seconds`
        for _ in range(60):
            await model.steps(session, records(model, np.zeros((frames, WIDTH), np.float32)))

    test()
    assert {one is not threading.main_thread() for one in threads[-10:]} == {in_thread}


@pytest.mark.parametrize("short", [0.0, 1e-3, 9.0], ids=["in the thread", "where it is faster", "on the event loop"])
def test_frames_and_calls_are_processed_in_their_order(monkeypatch, short):
    monkeypatch.setattr(worker, "SHORT", short)
    x = np.random.default_rng(3).standard_normal((300, WIDTH)).astype(np.float32)

    @served
    async def test(model):
        stream, session, found, counts, done = model.network.stream(), await model.open(), [], [], asyncio.Event()

        def answered(answers):
            found.append(answers.rows[model.rows.outputs.names[0]])
            if sum(map(len, found)) == len(x):
                done.set()

        for t in range(0, len(x), 3):
            model.submit([session] * 3, records(model, x[t : t + 3]), answered)
            if t % 30 == 0:

                def slow():
                    time.sleep(0.002)
                    return session.processed

                model.worker.call(slow, lambda count, before=t + 3: counts.append((count, before)))
            if t % 9 == 0:
                await asyncio.sleep(0)
        await done.wait()
        assert (np.concatenate(found) == np.concatenate([stream.step(row[None]) for row in x])).all()
        assert len(counts) == 10
        assert all(count == before for count, before in counts)

    test()


@served
async def test_functions_that_answers_return_are_called_once_per_batch(model):
    session, calls, done = await model.open(), [], asyncio.Event()

    def after():
        calls.append("after")
        done.set()

    def answered(answers):
        calls.append(len(answers.rows))
        return after

    for count in (1, 2, 3):
        model.submit([session] * count, records(model, np.ones((count, WIDTH))), answered)
    await done.wait()
    assert calls == [1, 2, 3, "after"]


@served
async def test_a_frame_with_nan_is_refused_and_leaves_the_state(model):
    x = np.ones((3, WIDTH), np.float32)
    session = await model.open()
    bad = x.copy()
    bad[1, 0] = np.nan
    answers = await model.steps(session, records(model, bad))
    assert list(answers.refused) == [1]
    stream = model.network.stream()
    expected = np.concatenate([stream.step(x[:1]), np.zeros((1, H), np.float32), stream.step(x[:1])])
    assert (answers.rows[model.rows.outputs.names[0]] == expected).all()
    stored = await model.answers_after(session, 1)
    assert [refused for _, refused in stored] == [True, False]
    assert (stored[1][0][0] == expected[2]).all()


@served
async def test_answers_that_are_no_longer_stored(model):
    session = await model.open()
    await model.steps(session, records(model, np.ones((5, WIDTH))))
    assert len(await model.answers_after(session, 2)) == 3
    with pytest.raises(ServeError, match="answers are stored from frame 3 to 5, not from 2"):
        await model.answers_after(session, 1)
    with pytest.raises(ServeError, match="has processed 5 frames, not 6"):
        await model.answers_after(session, 6)


@served
async def test_a_state_moves_to_another_session(model):
    x = np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32)
    one = await model.open()
    await model.steps(one, records(model, x[:2]))
    two = await model.open(state=await model.state(one))
    assert two.accepted == two.processed == 2
    answers = [await model.steps(session, records(model, x[2:])) for session in (one, two)]
    assert (answers[0].rows == answers[1].rows).all()
    with pytest.raises(ServeError, match="expected a safetensors file"):
        await model.open(state=b"nothing")


def test_a_state_that_its_cells_refuse_stops_no_other_session_from_opening():
    rng = np.random.default_rng(0)
    spec = CellSpec(WIDTH, H, kind="slstm")
    net = Network([Recurrent((Cell(spec, **{k: rng.normal(size=s).astype("f4") for k, s in spec.shapes.items()}),))])

    async def test(model):
        bad = net.stream().state
        bad[0].n[0, 0] = -1
        opened = await asyncio.gather(model.open(state_to_bytes(net, bad)), model.open(), return_exceptions=True)
        assert isinstance(opened[0], ServeError)
        assert (opened[0].status, "expected n to be at least 0" in str(opened[0])) == (400, True)
        assert list(model.sessions.values()) == [opened[1]]

    with_model(test, net, sessions=4)


def test_a_state_of_a_pool_before_its_first_step_is_taken():
    net = Network([GridPool("max", (2,), 1, (3, 1), (1, 1), ((2, 0), (0, 0)))])

    async def test(model):
        one = await model.open()
        two = await model.open(await model.state(one))
        x = records(model, np.full((1, 2), -7, np.float32))
        assert (await model.steps(two, x)).rows.tobytes() == (await model.steps(one, x)).rows.tobytes()

    with_model(test, net, sessions=4)


@served
async def test_all_sessions_in_use(model):
    sessions = [await model.open() for _ in range(4)]
    with pytest.raises(ServeError, match="all 4 sessions of lstm are in use"):
        await model.open()
    await model.close(sessions[0])
    await model.open()
    assert len(model.sessions) == 4


def test_only_numbers_that_are_not_finite_are_refused():
    floats = np.random.default_rng(0).standard_normal
    nodes = [Dense(floats((3, 2)).astype("f4")), Dense(floats((4, 2)).astype("f4"))]
    nodes += [Embedding(floats((9, 2)).astype("f4")), Merge()]
    wires = [("x",), ("y",), ("id",), ("of_x", "of_y", "of_id")]
    net = Network(nodes, ["of_x", "of_y", "of_id", "all"], inputs=("x", "y", "id"), wires=wires)
    rows = Rows(net)
    given = np.zeros(4, rows.inputs)
    assert rows.finite(given) is None
    given["x"][1, 0], given["y"][2, 3], given["id"][3] = np.inf, np.nan, -1
    assert rows.finite(given).tolist() == [True, False, False, True]
    ids = Rows(Network([nodes[2]]))
    assert ids.finite(np.zeros(2, ids.inputs)) is None
