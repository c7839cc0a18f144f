"""The client: steps, errors, and connections that are cut while a frame is in flight."""

import asyncio
import contextlib
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
from cellstack.serve import Client, ServeError, client


def outputs(x):
    """Return the outputs of a stream for steps `[T, I]`."""
    stream = lstm().stream()
    return np.array([stream.step(np.float32(step)[None])[0] for step in x])


def steps(rng, count, *shape):
    return rng.standard_normal((count, *shape, WIDTH)).astype(np.float32)


class Proxy:
    """Forwards connections to a server in a thread of its own; `cut` breaks them."""

    def __init__(self, to):
        self.to, self.hold, self.writers = to, False, set()  # hold: what the server sends is thrown away
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.call(asyncio.start_server(self.take, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def take(self, reader, writer):
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
        async def all_of_them():
            for writer in list(self.writers):
                writer.transport.abort()
            self.hold = False

        self.call(all_of_them())

    def end(self):
        async def close():
            self.server.close()
            await asyncio.sleep(0.02)

        self.cut()
        self.call(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def proxy(served):
    proxy = Proxy(served.port)
    yield proxy
    proxy.end()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def test_steps_of_a_session_are_those_of_a_stream(served, rng):
    x = steps(rng, 20)
    with Client(served.ws).open("lstm") as session:
        np.testing.assert_array_equal([session.step(step) for step in x], outputs(x))
        assert (session.frame, session.model) == (20, "lstm")
        assert len(served.models.all()[0].sessions) == 1
    with pytest.raises(ServeError, match="closed"):
        session.step(x[0])
    assert not served.models.all()[0].sessions


def test_another_client_resumes_a_session(served, rng):
    x = steps(rng, 6)
    first = Client(served.ws).open("lstm")
    found = [first.step(step) for step in x[:3]]
    second = Client(served.ws).resume("lstm", first.token)
    found += [second.step(step) for step in x[3:]]
    np.testing.assert_array_equal(found, outputs(x))
    with pytest.raises(ServeError, match="another connection"):
        first.step(x[0])
    for session in (first, second):
        session.close()


def test_a_refused_frame_leaves_the_state_unchanged(served, rng):
    x = steps(rng, 2)
    with Client(served.ws).open("lstm") as session:
        found = [session.step(x[0])]
        with pytest.raises(ServeError, match="NaN"):
            session.step(np.full(WIDTH, np.nan, np.float32))
        found.append(session.step(x[1]))
        assert session.frame == 3
    np.testing.assert_array_equal(found, outputs(x))


def test_wrong_arguments_are_refused_before_they_are_sent(served):
    with pytest.raises(ValueError, match="expected a URL such as ws://localhost:8080, got 'http://localhost'"):
        Client("http://localhost")
    with Client(served.ws).open("lstm") as session:
        with pytest.raises(ShapeError, match=r"expected x \[3\] float32, got \[4\] float64"):
            session.step(np.zeros(4))
        with pytest.raises(ShapeError, match="expected the inputs x, got z"):
            session.step({"z": np.zeros(3)})
        assert session.frame == 0


def test_several_inputs_and_outputs(tmp_path, rng):
    net = Network(
        [Dense(rng.normal(size=(2, 3)).astype("f4")), Dense(rng.normal(size=(1, 4)).astype("f4"))],
        ["a", "b"],
        inputs={"one": (None, 2), "other": (None, 1)},
        wires=[("one",), ("other",)],
        outputs=["a", "b"],
    )
    net.save(tmp_path / "two.safetensors")
    with running(tmp_path / "two.safetensors") as served, Client(served.ws).open("two") as session:
        x = {"one": np.float32([1, 2]), "other": np.float32([3])}
        for own, expected in zip(session.step(x), net.stream().step({k: v[None] for k, v in x.items()}), strict=True):
            np.testing.assert_array_equal(own, expected[0])


def test_tokens_and_addresses_are_checked(model_file):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionError, match="can't be reached"):
        Client(f"ws://127.0.0.1:{port}").open("lstm")
    with running(model_file, tokens=("secret",)) as served:
        with pytest.raises(ServeError, match="a valid token is required") as caught:
            Client(served.ws).open("lstm")
        assert caught.value.status == 401
        Client(served.ws, "secret").open("lstm").close()
        with pytest.raises(ServeError) as caught:
            Client(served.ws, "secret").open("nothing")
        assert caught.value.status == 404


@pytest.mark.parametrize("arrived", [False, True])
def test_a_cut_connection_only_delays_an_answer(proxy, rng, arrived):
    x = steps(rng, 12)
    with Client(f"ws://127.0.0.1:{proxy.port}").open("lstm") as session:
        found = [session.step(step) for step in x[:4]]
        if arrived:  # the server steps the frame, and its answer is lost
            proxy.hold = True
            cut = threading.Timer(0.1, proxy.cut)
            cut.start()
        else:
            proxy.cut()
        found += [session.step(step) for step in x[4:]]
        assert session.frame == 12
    np.testing.assert_array_equal(found, outputs(x))


def test_a_server_that_stays_away_is_given_up(model_file):
    with running(model_file) as served:
        session = Client(served.ws, give_up=0.1).open("lstm")
        session.step(np.zeros(WIDTH))
    with session, pytest.raises(ConnectionError, match=r"given up after 0\.1 seconds"):
        session.step(np.zeros(WIDTH))


def test_a_server_without_the_session_says_so(model_file, rng):
    with running(model_file) as first:
        proxy = Proxy(first.port)
        session = Client(f"ws://127.0.0.1:{proxy.port}").open("lstm")
        session.step(steps(rng, 1)[0])
        with running(model_file) as second:
            proxy.to = second.port
            proxy.cut()
            with session, pytest.raises(ServeError, match="no session with this token is open"):
                session.step(steps(rng, 1)[0])
        proxy.end()


@pytest.mark.long
def test_a_restart_with_stored_sessions_only_delays_answers(model_file, tmp_path, rng):
    def serve(port):
        options = ["--durable", str(tmp_path / "sessions"), "--port", str(port)]
        command = [sys.executable, "-m", "cellstack", "serve", str(model_file), *options]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = next(line for line in server.stderr if "listening on" in line)
        return server, int(line.rsplit(":", 1)[1])

    x = steps(rng, 20)
    server, port = serve(0)
    try:
        found = []
        with Client(f"ws://127.0.0.1:{port}").open("lstm") as session:
            for number, step in enumerate(x):
                if number == 10:
                    server.terminate()
                    server.communicate()
                    server, _ = serve(port)
                found.append(session.step(step))
            assert session.frame == 20
    finally:
        server.kill()
        server.communicate()
    np.testing.assert_array_equal(found, outputs(x))


def test_the_client_of_the_docs_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(0)
    net = lstm()
    Network([*net.nodes, Dense(rng.normal(size=(UNITS, 2)).astype("f4"))]).save(tmp_path / "tagger.safetensors")
    with running(tmp_path / "tagger.safetensors") as served:
        exec(code.replace("ws://127.0.0.1:8080", served.ws), {})
