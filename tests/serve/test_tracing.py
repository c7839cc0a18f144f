"""Traces of live sessions, which leave the sessions as they are."""

import asyncio
import json
import re

import numpy as np
import pytest
import serving
from serving import records

from cellstack import CellSpec, Network
from cellstack.nodes import Cell, Conv1D, Recurrent
from cellstack.serve import ServeError
from cellstack.serve.tracing import MOST_SESSIONS, last_steps, recorder_of, trace_page

WIDTH, H = 3, 5


def network(seed=0, *first):
    new = np.random.default_rng(seed).standard_normal
    shapes = ((WIDTH, 4 * H), (H, 4 * H), (4 * H,))
    cell = Cell(CellSpec(WIDTH, H), *(new(shape).astype(np.float32) for shape in shapes))
    return Network([*first, Recurrent((cell,))])


def with_model(test, net=None, sessions=64):
    serving.with_model(test, net or network(), sessions=sessions)


def test_a_session_that_is_traced_answers_as_an_undisturbed_stream():
    async def test(model):
        x = np.random.default_rng(1).standard_normal((60, WIDTH)).astype(np.float32)
        session, other = await model.open(), await model.open()
        found = [await model.steps(session, records(model, x[:20]))]
        with pytest.raises(ServeError, match="are recorded from frame 21 on: request the trace again"):
            await trace_page(model, session, 7)
        for start in range(20, 60, 5):
            part = records(model, x[start : start + 5])
            answers, _ = await asyncio.gather(model.steps(session, part), trace_page(model, session, 7))
            await model.steps(other, records(model, -x[start : start + 5]))
            found.append(answers)
        page = await trace_page(model, session, 7)
        assert re.search(r"<title>lstm, version 1: the last 7 steps, until frame 60</title>", page)
        assert len(json.loads(re.search(r'id="description">(.*?)</script>', page)[1])["steps"]) == 7
        stream = model.network.stream()
        expected = np.stack([stream.step(one[None])[0] for one in x])
        assert (np.concatenate([part.rows["layer_0"] for part in found]) == expected).all()
        kept = await model.call(lambda: recorder_of(model).request(session.number, 7).kept())
        t = last_steps(model.network, kept, 7)
        assert (t.y[0] == expected[-7:]).all()

    with_model(test)


def test_refused_frames_are_not_in_a_trace():
    async def test(model):
        x = np.ones((4, WIDTH), np.float32)
        session = await model.open()
        with pytest.raises(ServeError) as refused:
            await trace_page(model, session)
        assert refused.value.status == 202
        x[1] = np.nan
        await model.steps(session, records(model, x))
        assert "the last 3 steps, until frame 4" in await trace_page(model, session)

    with_model(test)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range(steps):
    async def test(model):
        with pytest.raises(ServeError, match=f"steps: expected a number from 1 to 1000, got {steps}") as refused:
            await trace_page(model, await model.open(), steps)
        assert refused.value.status == 400

    with_model(test)


def test_a_network_that_cannot_run_from_an_intermediate_state():
    async def test(model):
        with pytest.raises(ServeError, match="doesn't support nodes with a memory") as no:
            await trace_page(model, await model.open())
        assert no.value.status == 501

    kernel = np.ones((2, WIDTH, WIDTH), np.float32)
    with_model(test, network(0, Conv1D(kernel, padding="causal")))


def test_few_sessions_are_recorded_and_closed_ones_are_forgotten():
    async def test(model):
        sessions = [await model.open() for _ in range(MOST_SESSIONS + 1)]
        for session in sessions:
            with pytest.raises(ServeError, match="recorded from frame 1 on"):
                await trace_page(model, session)
        for session in sessions:
            await model.steps(session, records(model, np.ones((2, WIDTH))))
        with pytest.raises(ServeError, match="recorded from frame 3 on"):
            await trace_page(model, sessions[0])
        with pytest.raises(ServeError, match="recorded from frame 3 on"):  # dropped for sessions[0]
            await trace_page(model, sessions[1])
        assert "the last 2 steps" in await trace_page(model, sessions[-1])
        for session in sessions:
            await model.close(session)
        assert recorder_of(model)._histories == {}

    with_model(test)


def test_a_longer_trace_keeps_what_was_recorded():
    async def test(model):
        session = await model.open()
        with pytest.raises(ServeError):
            await trace_page(model, session, 2)
        await model.steps(session, records(model, np.ones((3, WIDTH))))
        assert "the last 3 steps" in await trace_page(model, session, 50)
        await model.steps(session, records(model, np.ones((37, WIDTH))))
        assert "the last 40 steps" in await trace_page(model, session, 50)

    with_model(test)
