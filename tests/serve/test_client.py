"""The clients: steps, several sessions, errors, and connections that are cut while frames are in flight."""

import asyncio
import contextlib
import dataclasses
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from serving import UNITS, WIDTH, lstm, running

from cellstack import Network, ShapeError
from cellstack.nodes import Dense
from cellstack.serve import Limits, ServeError
from cellstack.serve.client import AsyncClient, Client, LostError, RefusedError, server
from cellstack.serve.client.calls import AHEAD


def outputs(x):
    """Return the outputs of a stream for steps `[T, I]`."""
    stream = lstm().stream()
    return np.array([stream.step(np.float32(step)[None])[0] for step in x])


def steps(rng, count, *shape):
    return rng.standard_normal((count, *shape, WIDTH)).astype(np.float32)


@dataclasses.dataclass
class Proxy:
    """Forwards connections to a server; `cut` breaks them, and `open` says whether new ones are taken."""

    port: int = 0
    to: int = 0
    open: bool = True
    hold: bool = False  # whether what the server sends is thrown away
    count: int = 0
    writers: set = dataclasses.field(default_factory=set)

    async def take(self, reader, writer):
        if not self.open:
            writer.close()
            return
        self.count += 1
        there, back = await asyncio.open_connection("127.0.0.1", self.to)
        pair = {writer, back}
        self.writers |= pair

        async def forward(source, target, answers):
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    if not (answers and self.hold):
                        target.write(data)
                        await target.drain()
            for one in pair:
                one.close()

        await asyncio.gather(forward(reader, back, False), forward(there, writer, True))
        self.writers -= pair

    def cut(self):
        for writer in list(self.writers):
            writer.transport.abort()


@contextlib.asynccontextmanager
async def proxy_to(port):
    proxy = Proxy(to=port)
    server = await asyncio.start_server(proxy.take, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def client_of_two(model_file):
    """A client of a server, the proxy between them, and a second server."""
    with running(model_file) as first, running(model_file) as second:
        async with proxy_to(first.port) as proxy, AsyncClient(f"ws://127.0.0.1:{proxy.port}") as client:
            yield client, proxy, second


async def moved(proxy, port, *calls):
    """Lead a client to another server while calls wait for answers that are lost; return what they raise."""
    proxy.to, proxy.hold = port, True
    waiting = asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(0.02)
    proxy.cut()
    proxy.hold = False
    return await waiting


def run(work):
    return asyncio.run(asyncio.wait_for(work, 120))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_of_a_session_are_those_of_a_stream(served, rng):
    x = steps(rng, 40)

    async def work():
        async with AsyncClient(served.ws) as client:
            session = await client.open("lstm")
            one_by_one = [await session.step(step) for step in x[:10]]
            in_flight = await asyncio.gather(*(session.step(step) for step in x[10:]))  # more than may be in flight
            assert (session.frame, session.model) == (40, "lstm")
            await session.close()
            with pytest.raises(RuntimeError, match="is closed"):
                await session.step(x[0])
            return one_by_one + in_flight

    np.testing.assert_array_equal(run(work()), outputs(x))
    assert not served.models.all()[0].sessions


def test_several_sessions_step_in_one_message_and_join_those_of_one_turn(served, rng):
    x, alone = steps(rng, 6, 5), steps(rng, 6)

    async def work():
        async with AsyncClient(served.ws) as client:
            sessions, other = await client.open("lstm", count=5), await client.open("lstm")
            messages = []
            send = client._link.socket.send

            async def recorded(message):
                messages.append(message)
                await send(message)

            client._link.socket.send = recorded
            both = [await asyncio.gather(client.step(sessions, x[t]), other.step(alone[t])) for t in range(6)]
            assert len(messages) == 6
            for session in [*sessions, other]:
                await session.close()
            return np.array([y for y, _ in both]), np.array([y for _, y in both])

    y, single = run(work())
    for n in range(5):
        np.testing.assert_array_equal(y[:, n], outputs(x[:, n]))
    np.testing.assert_array_equal(single, outputs(alone))


def test_the_synchronous_client_does_the_same_from_several_threads(served, rng):
    x, found = steps(rng, 8, 3), {}
    with Client(served.ws) as client:
        sessions = client.open("lstm", count=3)

        def one(n):
            found[n] = [sessions[n].step(step) for step in x[:4, n]]

        threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        later = [client.step(sessions, step) for step in x[4:]]
        state = sessions[0].state()
        copy = client.open("lstm", state=state)
        assert copy.frame == 8
        np.testing.assert_array_equal(copy.step(x[0, 0]), sessions[0].step(x[0, 0]))
        assert sessions[1].frame == 8
        for session in [*sessions, copy]:
            session.close()
    for n in range(3):
        np.testing.assert_array_equal([*found[n], *(y[n] for y in later)], outputs(x[:, n]))


def test_the_synchronous_client_runs_beside_an_event_loop_as_in_a_notebook(served, rng):
    x = steps(rng, 2)

    async def cell():
        with Client(served.ws) as client:
            session = client.open("lstm")
            return [session.step(step) for step in x]

    np.testing.assert_array_equal(asyncio.run(cell()), outputs(x))


def test_another_client_resumes_a_session_with_its_stored_answers(served, rng):
    x = steps(rng, 12)

    async def work():
        async with AsyncClient(served.ws) as first, AsyncClient(served.ws) as second:
            session = await first.open("lstm")
            y = [await session.step(step) for step in x[:8]]
            taken = await second.resume(session.token, 5)
            assert list(taken.answers) == [6, 7, 8]
            np.testing.assert_array_equal(list(taken.answers.values()), y[5:])
            y += [await taken.step(step) for step in x[8:]]
            with pytest.raises(LostError, match="another connection has resumed the session"):
                await session.step(x[0])
            with pytest.raises(ServeError, match="no session with this token is open"):
                await second.resume("unknown")
            await taken.close()
            return y

    np.testing.assert_array_equal(run(work()), outputs(x))


def test_the_clients_of_the_docs_run(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```py\n(.*?)```", page.split("\n## Clients\n")[1].split("\n## ")[0], re.DOTALL)
    net = Network([*lstm().nodes, Dense(np.ones((UNITS, 2), np.float32))])
    net.save(tmp_path / "tagger.safetensors")
    with running(tmp_path / "tagger.safetensors") as server:
        for block in blocks:
            exec(block.replace("ws://127.0.0.1:8080", server.ws), {"__name__": "block"})
        assert len(blocks) == 3


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_refused_frames_leave_states_unchanged_and_the_others_answers(served, rng):
    x = steps(rng, 2, 3)
    bad = x[0].copy()
    bad[1, 0] = np.nan

    async def work():
        async with AsyncClient(served.ws) as client:
            sessions = await client.open("lstm", count=3)
            with pytest.raises(RefusedError, match="frame 1: the frame contains NaN") as caught:
                await client.step(sessions, bad)
            y = await client.step(sessions, x[1])
            for session in sessions:
                await session.close()
            return caught.value, y

    error, y = run(work())
    assert list(error.refused) == [1]
    np.testing.assert_array_equal(error.y[[0, 2]], [outputs(x[:1, n])[0] for n in (0, 2)])
    np.testing.assert_array_equal(y[1], outputs(x[1:, 1])[0])
    np.testing.assert_array_equal(y[0], outputs(x[:, 0])[1])


def test_wrong_arguments_are_refused_before_they_are_sent(served):
    async def work():
        async with AsyncClient(served.ws) as client, AsyncClient(served.ws) as other:
            session, foreign = await client.open("lstm"), await other.open("lstm")
            with pytest.raises(ShapeError, match=r"expected x \[3\], got \(2,\)"):
                await session.step([1, 2])
            with pytest.raises(TypeError, match="expected x as float32, got <U1"):
                await session.step(["a", "b", "c"])
            with pytest.raises(ValueError, match="different sessions"):
                await client.step([session, session], np.zeros((2, WIDTH)))
            with pytest.raises(ValueError, match="of another client"):
                await client.step([session, foreign], np.zeros((2, WIDTH)))
            with pytest.raises(ValueError, match="expected the inputs x, got z"):
                await session.step({"z": [1, 2, 3]})
            assert (await session.step([1, 2, 3])).shape == (UNITS,)
            with pytest.raises(ServeError, match="unknown model: 'none'"):
                await client.open("none")
            await session.close()
            await foreign.close()

    run(work())


def test_tokens_and_addresses_are_checked(model_file):
    async def work(port):
        with pytest.raises(ServeError) as caught:
            await AsyncClient(f"ws://127.0.0.1:{port}", token="wrong").__aenter__()
        assert caught.value.status == 401
        async with AsyncClient(f"ws://127.0.0.1:{port}", token="secret") as client:
            session = await client.open("lstm")
            assert len(await session.state()) > 100

    with running(model_file, tokens=("secret",)) as server:
        run(work(server.port))
    with pytest.raises(ValueError, match="expected a URL such as ws://localhost:8080, got 'localhost'"):
        AsyncClient("localhost")
    with pytest.raises(ConnectionError), Client(f"ws://127.0.0.1:{server.port}"):
        pass


def test_a_client_that_is_used_wrongly_says_how(served):
    async def work():
        with pytest.raises(RuntimeError, match="use it in a `with` block"):
            await AsyncClient(served.ws).open("lstm")
        async with AsyncClient(served.ws) as client:
            session = await client.open("lstm")
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await asyncio.to_thread(asyncio.run, session.step([1, 2, 3]))
            await session.close()

    run(work())
    client = Client(served.ws)
    with pytest.raises(RuntimeError, match="use it in a `with` block"):
        client.open("lstm")
    with client:
        client.open("lstm").close()
    with pytest.raises(ConnectionError, match="the client was closed"):
        client.open("lstm")
    with pytest.raises(RuntimeError, match="make a new one"):
        client.__enter__()


def test_the_ids_of_closed_sessions_are_used_again(served):
    with Client(served.ws) as client:
        for n in range(70):
            session = client.open("lstm")
            session.step([1, 2, n])
            session.close()
            assert session.frame == 1
        other = client.open("lstm")
        other.step([1, 2, 3])
        other.step([1, 2, 3])
        assert (session.frame, other.frame) == (1, 2)
        assert len(client._core._calls.sent) == 64
        other.close()


# ── lost connections ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_cut_connections_only_delay_answers(served, seed):
    rng = np.random.default_rng(seed)
    x = steps(rng, 60, 4)

    async def work():
        async with proxy_to(served.port) as proxy, AsyncClient(f"ws://127.0.0.1:{proxy.port}") as client:
            sessions = await client.open("lstm", count=4)
            stop = asyncio.Event()

            async def cuts():
                while not stop.is_set():
                    await asyncio.sleep(rng.uniform(0.001, 0.03))
                    proxy.hold = True
                    await asyncio.sleep(rng.uniform(0, 0.003))
                    proxy.cut()
                    proxy.hold = False

            async def single(n):
                answers = []
                for t in range(0, 60, 6):
                    answers += await asyncio.gather(*(sessions[n].step(step) for step in x[t : t + 6, n]))
                    await asyncio.sleep(0.005)
                return answers

            async def joined():
                return [await client.step(sessions[2:], x[t, 2:]) for t in range(60)]

            cutting = asyncio.ensure_future(cuts())
            first, second, both = await asyncio.gather(single(0), single(1), joined())
            stop.set()
            await cutting
            for session in sessions:
                await session.close()
            assert proxy.count > 2
            assert not client._calls._unanswered
            assert not client._calls._calls
            return first, second, *np.array(both).swapaxes(0, 1)

    for n, y in enumerate(run(work())):
        np.testing.assert_array_equal(y, outputs(x[:, n]))


def test_frames_wait_while_the_server_is_away_and_their_number_is_bounded(served, rng):
    x = steps(rng, 30)

    async def work():
        async with proxy_to(served.port) as proxy, AsyncClient(f"ws://127.0.0.1:{proxy.port}") as client:
            session = await client.open("lstm")
            proxy.open = False
            proxy.cut()
            calls = [asyncio.ensure_future(session.step(step)) for step in x]
            await asyncio.sleep(0.1)
            assert session.frame == AHEAD
            assert not any(call.done() for call in calls)
            proxy.open = True
            y = await asyncio.gather(*calls)
            await session.close()
            return y

    np.testing.assert_array_equal(run(work()), outputs(x))


def test_a_server_that_stays_away_is_given_up(served, rng):
    async def work():
        async with proxy_to(served.port) as proxy, AsyncClient(f"ws://127.0.0.1:{proxy.port}", give_up=0.1) as client:
            session = await client.open("lstm")
            proxy.open = False
            proxy.cut()
            for _ in range(2):
                with pytest.raises(ConnectionError, match=r"given up after 0 seconds: ws://127"):
                    await session.step(np.zeros(WIDTH))
            with pytest.raises(ConnectionError):
                await client.open("lstm")

    run(work())


def test_a_server_without_the_sessions_says_so_in_each_call(model_file, rng):
    x = steps(rng, 3)

    async def work():
        async with client_of_two(model_file) as (client, proxy, second):
            session = await client.open("lstm")
            await session.step(x[0])
            errors = await moved(proxy, second.port, session.step(x[1]))
            calls = session.step(x[2]), session.state(), session.close()
            errors += await asyncio.gather(*calls, return_exceptions=True)
            assert {type(error) for error in errors} == {LostError}
            assert {(error.frame, error.open) for error in errors} == {(1, False)}
            assert all("was lost; send from frame 1 to a new session" in str(error) for error in errors)
            new = await client.open("lstm")
            return [await new.step(step) for step in x]

    np.testing.assert_array_equal(run(work()), outputs(x))


def test_a_server_with_an_earlier_state_says_from_which_frame_to_send_again(model_file, rng):
    x = steps(rng, 9)

    async def work():
        async with client_of_two(model_file) as (client, proxy, second):
            session = await client.open("lstm")
            y = [await session.step(step) for step in x[:4]]
            state = await session.state()
            await asyncio.gather(*(session.step(step) for step in x[4:7]))
            second.call(second.models.all()[0].open(state, token=session.token))
            errors = await moved(proxy, second.port, *(session.step(x[7]) for _ in range(20)))
            assert {type(error) for error in errors} == {LostError}
            assert {(error.frame, error.open) for error in errors} == {(5, True)}
            assert "send again from frame 5 (the session has processed 4 frames, not 7)" in str(errors[0])
            return y + [await session.step(step) for step in x[4:]]

    np.testing.assert_array_equal(run(work()), outputs(x))


def test_a_session_that_was_closed_before_the_connection_was_lost_is_closed(served, rng):
    async def work():
        async with proxy_to(served.port) as proxy, AsyncClient(f"ws://127.0.0.1:{proxy.port}") as client:
            session = await client.open("lstm")
            proxy.hold = True
            closing = asyncio.ensure_future(session.close())
            while session.token in served.models.all()[0].sessions:
                await asyncio.sleep(0.001)
            proxy.cut()
            proxy.hold = False
            await closing
            with pytest.raises(RuntimeError, match="is closed"):
                await session.step(np.zeros(WIDTH))

    run(work())


def test_a_stopping_server_answers_what_it_received(model_file, rng):
    x = steps(rng, 4)

    async def work():
        with running(model_file, limits=Limits(sessions=2)) as server:
            client = AsyncClient(server.ws, give_up=0.1)
            await client.__aenter__()
            session = await client.open("lstm")
            y = await asyncio.gather(*(session.step(step) for step in x))
        with pytest.raises(ConnectionError, match="can't be reached"):
            await session.step(x[0])
        await client.__aexit__()
        return y

    np.testing.assert_array_equal(run(work()), outputs(x))


@pytest.mark.slow  # starts two processes
def test_a_killed_server_with_stored_sessions_only_delays_answers(model_file, tmp_path, rng):
    x = steps(rng, 40, 2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def started():
        command = [
            sys.executable,
            "-m",
            "cellstack",
            "serve",
            model_file,
            "--port",
            port,
            "--durable",
            tmp_path / "stored",
        ]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)

    async def entered(client):
        for _ in range(1000):
            with contextlib.suppress(OSError):
                return await client.__aenter__()
            await asyncio.sleep(0.02)
        raise AssertionError("the server doesn't start")

    async def work():
        nonlocal process
        client = await entered(AsyncClient(f"ws://127.0.0.1:{port}"))
        session, other = await client.open("lstm", count=2)
        y = [await client.step([session, other], step) for step in x[:10]]
        waiting = [asyncio.ensure_future(client.step([session, other], step)) for step in x[10:]]
        await asyncio.sleep(0)
        process.kill()
        process.wait()
        process = started()
        y += await asyncio.gather(*waiting)
        await client.__aexit__()
        return np.array(y)

    process = started()
    try:
        y = run(work())
    finally:
        process.kill()
        process.wait()
    for n in range(2):
        np.testing.assert_array_equal(y[:, n], outputs(x[:, n]))
