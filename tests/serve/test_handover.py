"""Handover: a new process takes over the ports of a running one, and no request is lost."""

import asyncio
import errno
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, nullcontext
from http.client import HTTPConnection

import grpc
import httpx
import numpy as np
import pytest
from serving import WIDTH, lstm

from cellstack.serve.handover import HandoverServer, is_running, request_handover
from cellstack.serve.inference_protocol.grpc import InferRequest, InferResponse
from cellstack.serve.models import ServeError


class Process:
    """A process of `cellstack serve` with durable sessions."""

    def __init__(self, folder, *options):
        path = folder / "lstm.safetensors"
        if not path.exists():
            lstm().save(path)
        command = [sys.executable, "-m", "cellstack", "serve", path, "--json", "--durable", folder / "sessions"]
        self.process = subprocess.Popen(
            [str(part) for part in (*command, "--port", "0", *options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.stop())
        self.url = json.loads(line)["url"]

    def stop(self, number=signal.SIGKILL):
        """End it; return what it wrote to its standard error."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1].decode()


@pytest.fixture
def start(tmp_path):
    """Starts processes, which end with the test."""
    started = []

    def begin(*options):
        started.append(Process(tmp_path, *options))
        return started[-1]

    yield begin
    for one in started:
        one.stop()


class Clients:
    """Threads that send frames of a session each, until `end`; `found` says of each answer whether it was right.

    Args:
        send: returns a function of a frame, `[WIDTH]`, that returns the answer, and the function that closes it.
    """

    def __init__(self, count, send):
        self.found, self.errors, self._enough, self._turn = [], [], threading.Event(), threading.Semaphore(count)
        self._count = count
        self._threads = [threading.Thread(target=self._run, args=(send, n)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, send, number):
        random, stream = np.random.default_rng(number), lstm().stream()
        try:
            while not self._enough.is_set():
                x = random.standard_normal(WIDTH).astype(np.float32)
                with self._turn:
                    y = np.float32(send(number, x))
                self.found.append((y == stream.step(x[None])[0]).all())
                time.sleep(0.005)  # a process that starts needs the processor too
        except Exception as error:
            self.errors.append(error)

    def wait(self, more):
        """Wait for further answers."""
        wanted = len(self.found) + more
        while len(self.found) < wanted and not self.errors:
            self._threads[0].join(0.005)

    def pause(self):
        """Send no frames until `go_on`; returns when no answer is outstanding."""
        for _ in range(self._count):
            self._turn.acquire()

    def go_on(self):
        """Send frames again."""
        self._turn.release(self._count)

    def end(self):
        """Stop, and assert that all answers were right."""
        self._enough.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors
        assert all(self.found)


def test_no_request_is_lost(start):
    old = start()
    url = httpx.URL(old.url)

    def posted(connection, path, body=None):
        connection.request("POST", path, json.dumps(body) if body else None)
        return json.loads(connection.getresponse().read())

    def connected():
        return closing(HTTPConnection(url.host, url.port, timeout=60))

    with ExitStack() as stack:
        kept = [stack.enter_context(connected()) for _ in range(4)]
        tokens = [posted(one, "/models/lstm/sessions")["session"] for one in kept]

        def send(number, x):  # half of the clients connect for each frame
            with nullcontext(kept[number]) if number % 2 else connected() as connection:
                return posted(connection, f"/sessions/{tokens[number]}/step", {"x": x.tolist()})["y"]

        clients = Clients(4, send)
        clients.wait(20)
        new = start()
        assert old.process.wait(60) == 0
        clients.wait(20)
        clients.end()
    assert new.url == url


def infer(channel, sequence, x, **parameters):
    """Send a frame of a sequence over gRPC; return the answer."""
    given = InferRequest(model_name="lstm", raw_input_contents=[x.tobytes()])
    given.inputs.add(name="x", datatype="FP32", shape=[1, WIDTH])
    given.parameters["sequence_id"].int64_param = sequence
    for name, value in parameters.items():
        given.parameters[name].bool_param = value
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=InferRequest.SerializeToString,
        response_deserializer=InferResponse.FromString,
    )
    try:
        answer = call(given, timeout=60, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
            raise
        # The call arrived when the server was stopping; the next answers show that the step wasn't made.
        return infer(channel, sequence, x, **parameters)
    return np.frombuffer(answer.raw_output_contents[0], np.float32)


def test_sequences_over_grpc_continue_after_a_kill_and_a_handover(start):
    port = str(free_port())
    processes = [start("--grpc-port", port)]
    begun = set()

    def send(number, x):
        is_new = number not in begun
        begun.add(number)
        return infer(channel, 7 + number, x, sequence_start=is_new)

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        clients = Clients(2, send)
        clients.wait(20)
        processes.append(start("--grpc-port", port))
        assert processes[0].process.wait(60) == 0
        clients.wait(20)
        clients.pause()
        processes[1].stop()
        start("--grpc-port", port)
        clients.go_on()
        clients.wait(20)
        clients.end()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_grpc_port_that_is_in_use(start):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            start("--grpc-port", str(port))


# ── the protocol between the processes ──────────────────────────────────────────────────────────────────────────────


def test_nobody_hands_over(tmp_path):
    assert not is_running(tmp_path)
    assert asyncio.run(request_handover(tmp_path)) is None
    with socket.socket(socket.AF_UNIX) as killed:  # whose file stays
        killed.bind(str(tmp_path / "handover"))
    assert not is_running(tmp_path)
    assert asyncio.run(request_handover(tmp_path)) is None


@pytest.mark.parametrize("nested", ["", "a-long-name/" * 12])
def test_many_sockets_are_passed(tmp_path, nested):
    folder = tmp_path / nested
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [socket.socketpair() for _ in range(250)]

    async def stop():
        return [one for one, _ in pairs]

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = HandoverServer(folder, [listening], stop)
            await server.start()
            assert is_running(folder)
            taken = await request_handover(folder)
            await server.done.wait()
            await server.close()
            assert [one.getsockname() for one in taken.sockets] == [listening.getsockname()]
        assert len(taken.connections) == len(pairs)
        for n, (one, (_, other)) in enumerate(zip(taken.connections, pairs, strict=True)):
            one.sendall(n.to_bytes(2, "little"))
            assert int.from_bytes(other.recv(2), "little") == n
        for one in (*taken.sockets, *taken.connections, *(other for _, other in pairs)):
            one.close()

    asyncio.run(main())


def test_a_server_that_cannot_stop_says_so(tmp_path):
    async def stop():
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main():
        server = HandoverServer(tmp_path, [], stop)
        await server.start()
        with pytest.raises(ServeError, match=r"could not hand over: .*No space left on device"):
            await request_handover(tmp_path)
        assert server.done.is_set()
        await server.close()
        assert not list(tmp_path.iterdir())

    asyncio.run(main())


def test_a_server_that_does_not_answer_in_time(tmp_path):
    async def main():
        server = HandoverServer(tmp_path, [], lambda: asyncio.sleep(0.3, []))
        await server.start()
        with socket.socket(socket.AF_UNIX) as other:  # says nothing that is known
            other.connect(str(tmp_path / "handover"))
            other.sendall(b"GET / HTTP/1.0\n")
        with pytest.raises(ServeError, match=r"didn't hand over within 0.1 s"):
            await request_handover(tmp_path, timeout=0.1)
        await server.done.wait()
        await server.close()

    asyncio.run(main())
