"""Clients that break rules: each gets a clear answer, or is disconnected, and another session keeps its bits."""

import contextlib
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import UNITS, WIDTH, lstm, running, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from cellstack.serve import Limits, clients, frames, http, server

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SENT = frames.numbered([("x", "<f4", (WIDTH,))])


@pytest.fixture(scope="module")
def short(model_file):
    """Serve with short times and small limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "HEAD_SECONDS", 0.2)
        limits = Limits(sessions=400, message=1 << 20, waiting=64)
        with running(model_file, limits=limits, connections=20) as served:
            yield served


@pytest.fixture
def other(short):
    """Check that a session in another connection steps before and after the test."""
    x = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
    stream = lstm().stream()
    with connect(f"{short.ws}/models/lstm/stream") as own:
        own.recv()
        for n, row in enumerate(x):
            own.send(row.tobytes())
            assert own.recv(timeout=60) == stream.step(row[None])[0].tobytes()
            if n == 1:
                yield


@contextlib.contextmanager
def raw(served, data=b""):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as found:
        found.sendall(data)
        yield found


def answer(connection):
    """Return the status and the error of an answer that the server sends before it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"], head.lower()


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("head", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_a_body_of_a_gigabyte(short, other, head):
    before = memory()
    with raw(short, b"POST /models/lstm/run HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n") as connection:
        if b"chunked" in head:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        status, error, lines = answer(connection)
    assert (status, error) == (413, "the body is larger than 1048576 bytes")
    assert b"connection: close" in lines
    assert memory() - before < 50e6


@pytest.mark.parametrize("value", [b"-1", b"+5", b"x", b"9" * 30])
def test_a_body_of_no_length(short, other, value):
    with raw(
        short, b"POST /models/lstm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + value + b"\r\n\r\n"
    ) as found:
        assert found.recv(1000).split()[1] == b"400"


@pytest.mark.long
@pytest.mark.parametrize("path", ["models/lstm/stream", "multiplex"])
def test_a_text_of_a_hundred_megabytes(short, other, path):
    before = memory()
    with connect(f"{short.ws}/{path}") as found:
        with contextlib.suppress(ConnectionClosed):
            found.send("x" * 100_000_000)
            while True:
                found.recv(timeout=60)
        assert found.protocol.close_code in (1009, 1006)  # 1006: the client was still sending
    assert memory() - before < 300e6  # the client's text is in this process too


def test_a_head_that_does_not_arrive(short, other):
    for data in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
        with raw(short, data) as connection:
            assert answer(connection)[:2] == (408, "the head didn't arrive within 10 seconds".replace("10", "0"))


def test_a_head_that_does_not_arrive_after_another_request(short, other):
    with raw(short, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert answer(connection)[0] == 408


def test_the_rest_of_a_body_that_nobody_reads(short, other):
    post = b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    with raw(short, post + b"1000000000000\r\n\r\n") as connection:
        assert b" 405 " in connection.recv(1000)
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):  # noqa: PT012
            for _ in range(1000):
                connection.sendall(bytes(1 << 20))
    with raw(short, post + b"10\r\n\r\n") as connection:
        assert b" 405 " in connection.recv(1000)
        connection.sendall(b"12345")
        with contextlib.suppress(ConnectionResetError):
            assert not connection.recv(1000)  # the rest doesn't arrive in time
    with raw(short, post + b"10\r\n\r\n") as connection:
        assert b" 405 " in connection.recv(1000)
        connection.sendall(b"1234567890" + GET)
        assert b" 200 " in connection.recv(1000)


def test_pipelined_requests_are_answered_in_order(short, other):
    names = [b"/health", b"/ready", b"/models"] * 300
    sent = b"".join(b"GET " + name + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" for name in names)
    with raw(short, sent) as connection:
        data = b""
        while data.count(b"HTTP/1.1 200") < len(names) or not data.endswith(b"}]}"):
            part = connection.recv(1 << 16)
            assert part
            data += part
    kinds = re.findall(rb'"(status": "ok|status":"ok|status":"ready|models)"', data)
    assert [b"ok" in one for one in kinds] == [True, False, False] * 300
    assert [b"models" in one for one in kinds] == [False, False, True] * 300


def test_a_body_in_many_portions(short, other):
    x = np.random.default_rng(0).standard_normal((1, 3000, WIDTH)).astype(np.float32)
    found = httpx.post(f"{short.http}/models/lstm/run", json={"x": x.tolist()}, timeout=60)
    assert (np.float32(found.json()["y"]) == lstm().run(x)[0]).all()


@pytest.mark.parametrize("protocol", ["Upgrade: h2c", "Upgrade: websocket\r\nContent-Length: 10"])
def test_an_upgrade_that_does_not_exist(short, other, protocol):
    head = f"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n{protocol}\r\n\r\n"
    with raw(short, head.encode()) as connection:
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1000):
                found += part
        assert found.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in found


def test_a_head_that_does_not_end(short, other):
    with raw(short, b"GET /health HTTP/1.1\r\n") as connection, contextlib.suppress(OSError):
        for n in range(600):
            connection.sendall(b"X%d: " % n + b"x" * 100_000 + b"\r\n")
        pytest.fail("60 MB were accepted")


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n"])
def test_no_http(short, other, data):
    with raw(short, data) as connection:
        assert connection.recv(1000).split()[1] in (b"400", b"408")


def handshake(*headers, path=b"/multiplex"):
    known = b"Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", known, key, *headers, b"", b""])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (handshake(b"Cookie: " + b"x" * 60_000), b"101"),
        (handshake(*[b"a: b"] * 200), b"101"),
        (handshake(path=b"/multiplex?" + b"x" * 60_000), b"101"),
        (handshake(b"Cookie: \xe9"), b"101"),
        (handshake(b"Cookie: " + b"x" * 80_000), b"431"),
        (handshake(b"Cookie: " + b"x" * 10_000_000), b"431"),
        (handshake(*[b"a: b"] * 300), b"431"),
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 300, b"431"),
        (handshake(path=b"/\xff"), b"400"),
        (handshake(b"Sec-WebSocket-Key: other"), b"400"),
        (handshake().replace(b"GET", b"POST", 1), b"404"),
        (handshake().replace(b"HTTP/1.1", b"HTTP/1.0", 1), b"404"),
    ],
)
def test_heads_of_handshakes(short, other, data, status):
    """Each is answered, and if it is refused the connection ends."""
    with raw(short) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        assert connection.recv(12) == b"HTTP/1.1 " + status
        if status != b"101":
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(1 << 16):
                    pass


def test_headers_reach_the_application_unchanged(model_file):
    with running(model_file, tokens=("é",)) as served:
        for token, status in ((b"\xe9", b"101"), (b"\xe8", b"401")):
            with raw(served, handshake(b"Authorization: Bearer " + token)) as connection:
                assert connection.recv(12) == b"HTTP/1.1 " + status


def test_the_end_of_a_server_whose_clients_do_not_go_on(model_file, monkeypatch):
    monkeypatch.setattr(server, "FLUSH_SECONDS", 0.2)
    with running(model_file) as served, contextlib.ExitStack() as stack:
        for data in (
            b"",
            b"GET /health HT",
            b"POST /models/lstm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n",
            handshake(b"Cookie: " + b"x" * 9000),
            handshake() + b"\x82\xfe",
            handshake(b"Content-Length: 10"),
            handshake(),
        ):
            stack.enter_context(raw(served, data))
        wait_until(lambda: len(served.server.server_state.connections) >= 6)
        served.server.should_exit = True
        wait_until(served.loop.is_closed)


def test_the_end_of_a_server_whose_client_does_not_read(model_file, monkeypatch, caplog):
    monkeypatch.setattr(server, "FLUSH_SECONDS", 0.2)
    with running(model_file) as served, raw(served, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100):
        wait_until(lambda: any(one.flow.write_paused for one in served.server.server_state.connections))
        served.server.should_exit = True
        wait_until(served.loop.is_closed)
    assert not caplog.records


def test_the_end_of_a_server_whose_client_still_sends(model_file):
    with running(model_file) as served, raw(served, handshake()) as connection:
        connection.recv(4096)
        served.server.should_exit = True
        assert b"the server is stopping" in connection.recv(4096)
        for _ in range(5):  # a closed connection would be reset by the first
            connection.sendall(b"\x81\x80\0\0\0\0")
            time.sleep(0.05)
        connection.sendall(b"\x88\x80\0\0\0\0")
        assert connection.recv(4096) == b""


@contextlib.contextmanager
def upgraded(served):
    """Open a WebSocket that reads nothing: yield a function that sends data until the server reads no longer."""
    with raw(served, handshake()) as found:
        assert b" 101 " in found.recv(1000)
        found.settimeout(0.3)

        def send_all(messages):
            for data in messages:
                found.sendall(data)

        yield send_all


@pytest.mark.long
def test_a_client_that_reads_no_answers_blocks_only_itself(short, other):
    def messages():
        text = b'{"id": 1, "open": "lstm"}'
        yield bytes([0x81, 0x80 + len(text), 0, 0, 0, 0]) + text
        records = np.zeros(64, SENT)
        for sent in range(0, 10_000_000, 64):
            records["frame"] = np.arange(sent + 1, sent + 65)
            data = frames.pack(frames.FRAMES, 0, records)
            yield b"\x82\xfe" + len(data).to_bytes(2, "big") + b"\0\0\0\0" + data

    before = memory()
    with upgraded(short) as send_all, pytest.raises(TimeoutError):
        send_all(messages())
    assert memory() - before < 30e6


def test_pings_without_reading(short, other):
    before = memory()
    with upgraded(short) as send_all, pytest.raises(TimeoutError):
        send_all([(b"\x89\xfd\0\0\0\0" + b"x" * 125) * 1000] * 1000)
    assert memory() - before < 50e6


def test_more_connections_than_allowed(short, other):
    """Those that have sent no request give way, the oldest first."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(raw(short)) for _ in range(30)]
        assert answer(connections[0])[:2] == (503, "more than 20 connections have sent no request")
        connections[-1].sendall(GET)
        assert b"200 OK" in connections[-1].recv(1000)
    with contextlib.ExitStack() as stack:
        known = [stack.enter_context(raw(short, GET)) for _ in range(19)]  # beside that of `other`
        for connection in known:
            assert b"200 OK" in connection.recv(1000)
        assert answer(stack.enter_context(raw(short, GET)))[:2] == (503, "more than 20 connections are open")


def test_connections_without_a_token_take_none_of_those_with_one(model_file):
    with running(model_file, tokens=("secret",), connections=3) as served, contextlib.ExitStack() as stack:
        for data in (b"", b"GET / HT", handshake(b"Cookie: " + b"x" * 9000)) * 8:
            stack.enter_context(raw(served, data))
        found = [stack.enter_context(connect(f"{served.ws}/multiplex?access_token=secret")) for _ in range(3)]
        assert refused(f"{served.ws}/multiplex?access_token=secret")[0] == 503
        for connection in found:
            connection.send('{"open": "lstm"}')
            assert "opened" in json.loads(connection.recv(timeout=60))


def test_connections_without_a_token_end_after_their_answer(guarded):
    for path, status in ((b"/health", 200), (b"/", 200), (b"/models", 401)):
        data = b""
        with raw(guarded, GET.replace(b"/health", path) * 2) as connection:
            while part := connection.recv(1 << 20):
                data += part
        assert int(data.split()[1]) == status
        assert data.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in data.partition(b"\r\n\r\n")[0]


def test_connections_to_slow_readers_end(guarded, monkeypatch):
    with raw(guarded) as connection:
        wait_until(lambda: guarded.server.clients._new)
        monkeypatch.setattr(clients, "NEW_SECONDS", 0.0)

        async def drop():
            guarded.server.clients.drop_late()

        guarded.call(drop())
        with contextlib.suppress(ConnectionResetError):
            assert not connection.recv(1000)
        wait_until(lambda: not guarded.server.clients._new)


def test_a_client_that_is_killed(short, other):
    program = (
        "import sys, time\nfrom websockets.sync.client import connect\n"
        f"with connect('{short.ws}/models/lstm/stream') as s:\n    print(s.recv(), flush=True)\n    time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    token = json.loads(client.stdout.readline())["session"]
    session = short.models.session(token)
    assert session.owner is not None
    client.kill()
    client.communicate()
    wait_until(lambda: session.owner is None)
    with connect(f"{short.ws}/models/lstm/stream?session={token}&last=0") as again:
        assert json.loads(again.recv())["session"] == token


def test_connects_and_disconnects(short, other, caplog):
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(150):
        with raw(short, b"GET /health HTTP/1.1\r\n"):
            pass
        with raw(short, b"POST /models/lstm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"):
            pass
        with raw(short, b"GET /multiplex HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"):
            pass
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    assert not caplog.records


ABRUPT = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


def client_that_ends(port, n):
    """Connect in one of several ways, and leave without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as found:
        if n % 2:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)
        if n % 5 == 0:
            found.sendall(b"GET /health HTTP/1.1\r\n")
        elif n % 5 == 1:
            found.sendall(b"POST /models/lstm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        elif n % 5 < 4:
            path = ("/multiplex", "/models/lstm/stream")[n % 5 - 2]
            headers = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {'a' * 22}=="
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\nSec-WebSocket-Version: 13\r\n\r\n"
            found.sendall(head.encode())
            if n % 3:
                assert found.recv(12) == b"HTTP/1.1 101"
                found.sendall(b"\x82\x8c" + bytes(4 + 3))  # a part of a frame


@pytest.mark.long
def test_clients_that_leave_before_the_handshake_is_answered(model_file):
    with running(model_file, limits=Limits(sessions=400, idle=0.05)) as served:
        for n in range(300):
            client_that_ends(served.port, 15 * n + 3)
        wait_until(lambda: not served.models.model("lstm").sessions)


KILLED = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1]) as found:
    found.recv()
    while True:
        found.send(bytes(12))
        print(len(found.recv()), flush=True)
"""


@pytest.mark.slow
def test_ten_thousand_clients_that_end_beside_others(model_file):
    command = [
        sys.executable,
        "-m",
        "cellstack",
        "serve",
        str(model_file),
        "--port",
        "0",
        "--json",
        "--idle",
        "0.2",
        "--sessions",
        "1000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        url = json.loads(process.stdout.readline())["url"].replace("http", "ws")
        port, files = int(url.rsplit(":", 1)[1]), f"/proc/{process.pid}/fd"
        own, stream = stack.enter_context(connect(f"{url}/models/lstm/stream")), lstm().stream()
        own.recv()
        random, measured = np.random.default_rng(0), []
        for n in range(11_000):
            client_that_ends(port, n)
            if n % 50 == 0:
                x = random.standard_normal(WIDTH).astype(np.float32)
                own.send(x.tobytes())
                assert own.recv(timeout=60) == stream.step(x[None])[0].tobytes()
            if n % 1000 == 0:  # half-open connections, and a client that is killed
                for data in (b"", b"GET / HT", b"GET /multiplex HTTP/1.1\r\nUpgrade: webs"):
                    half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    half.sendall(data)
                killed = subprocess.Popen(
                    [sys.executable, "-c", KILLED, f"{url}/models/lstm/stream"], stdout=subprocess.PIPE
                )
                assert killed.stdout.readline() == b"20\n"
                killed.kill()
                killed.communicate()
            if n in (1000, 10_999):
                time.sleep(http.HEAD_SECONDS + 6)  # until half-open connections are refused, and sessions closed
                status = Path(f"/proc/{process.pid}/status").read_text()
                measured.append((int(status.partition("VmRSS:")[2].split()[0]), len(os.listdir(files))))
        (memory_before, files_before), (memory_after, _) = measured
        wait_until(lambda: len(os.listdir(files)) <= files_before, 90)  # those of other clients remain for a minute
        assert memory_after < memory_before + 4_000, "KB"
        assert httpx.get(f"{url.replace('ws', 'http')}/models/lstm").json()["sessions"] == 1


def test_the_model_file_changes_under_the_server(tmp_path):
    path = tmp_path / "lstm.safetensors"
    lstm().save(path)
    with running(path) as served, connect(f"{served.ws}/models/lstm/stream") as found:
        found.recv()
        os.truncate(path, 10)
        found.send(np.ones(WIDTH, "<f4").tobytes())
        assert found.recv(timeout=60) == lstm().stream().step(np.ones((1, WIDTH), np.float32))[0].tobytes()
        path.unlink()
        served.call(served.server.reload())
        assert "version 1 stays" in served.reports[0]
        found.send(np.ones(WIDTH, "<f4").tobytes())
        assert len(found.recv(timeout=60)) == 4 * UNITS


def test_a_session_that_is_closed_while_the_body_of_its_step_arrives(short, other):
    token = httpx.post(f"{short.http}/models/lstm/sessions").json()["session"]
    body = b'{"x": [1, 2, 3]}'
    head = f"POST /sessions/{token}/step HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with raw(short, head.encode() + body[:5]) as connection:
        time.sleep(0.05)
        assert httpx.delete(f"{short.http}/sessions/{token}").status_code == 204
        connection.sendall(body[5:])
        assert connection.recv(100).startswith(b"HTTP/1.1 404")


# ── who may use the server ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def guarded(model_file):
    with running(model_file, tokens=("first", "second"), allow_origins=("https://example.org",)) as served:
        yield served


def refused(url, **options):
    with pytest.raises(InvalidStatus) as found, connect(url, **options):
        pass
    return found.value.response.status_code, json.loads(found.value.response.body)["error"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}])
def test_a_missing_or_wrong_token(guarded, headers):
    for method, path in (("GET", "/models"), ("POST", "/models/lstm/sessions"), ("GET", "/sessions/x")):
        found = httpx.request(method, guarded.http + path, headers=headers)
        assert (found.status_code, list(found.json())) == (401, ["error"])
    for path in ("/multiplex", "/models/lstm/stream", "/multiplex?access_token=wrong"):
        assert refused(guarded.ws + path, additional_headers=headers)[0] == 401
    assert httpx.get(f"{guarded.http}/health", headers=headers).status_code == 200


@pytest.mark.parametrize("token", ["first", "second"])
def test_a_valid_token(guarded, token):
    assert httpx.get(f"{guarded.http}/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    with connect(f"{guarded.ws}/models/lstm/stream?access_token={token}") as found:
        assert "session" in json.loads(found.recv())


def test_pages_of_other_origins(short, guarded):
    status, error = refused(f"{short.ws}/multiplex", origin="https://evil.example")
    assert status == 403
    assert "--allow-origin" in error
    found = httpx.post(f"{short.http}/models/lstm/sessions", headers={"Origin": "https://evil.example"})
    assert found.status_code == 403
    with connect(f"{short.ws}/multiplex", origin=short.http):
        pass
    with connect(f"{guarded.ws}/multiplex?access_token=first", origin="https://example.org"):
        pass


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "localhost.evil.example", "[::2]:80", "[", ""])
def test_other_names_of_the_server(short, guarded, name):
    own = {"Host": name, "Origin": f"http://{name}"}
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "a" * 22 + "=="}
    for path, headers in (
        ("/models", own),
        ("/", own),
        ("/multiplex", own | upgrade | {"Sec-WebSocket-Version": "13"}),
    ):
        found = httpx.get(f"{short.http}{path}", headers=headers)
        assert (found.status_code, found.json()["error"]) == (
            403,
            f"the host {name or repr(name)} isn't allowed: see --allow-host",
        )
    allowed = {"Host": name, "Authorization": "Bearer first"}  # a page of another site doesn't know the token
    assert httpx.get(f"{guarded.http}/models", headers=allowed).status_code == 200


def test_names_of_the_server(short):
    for name in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8080"):
        assert httpx.get(f"{short.http}/models", headers={"Host": name}).status_code == 200
    with raw(short, b"GET /models HTTP/1.0\r\n\r\n") as connection:  # without a name: no browser
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    local = {"localhost", "127.0.0.1", "[::1]"}
    assert server.hosts(server.ServerSettings(allow_hosts=("Example.org",))) == {*local, "example.org"}
    assert server.hosts(server.ServerSettings(host="127.1.2.3")) == {*local, "127.1.2.3"}
    assert server.hosts(server.ServerSettings(host="::1")) == local
    for settings in (
        server.ServerSettings(host="0.0.0.0"),
        server.ServerSettings(host=""),
        server.ServerSettings(tokens=("a",)),
    ):
        assert not server.hosts(settings)


def test_unknown_models_and_sessions_are_refused_before_the_handshake(short):
    assert refused(f"{short.ws}/models/other/stream")[0] == 404
    assert refused(f"{short.ws}/models/lstm/stream?session=none") == (404, "no session with this token is open")
    with connect(f"{short.ws}/models/lstm/stream") as found:
        token = json.loads(found.recv())["session"]
        assert refused(f"{short.ws}/models/lstm/stream?session={token}&last=x")[0] == 400
