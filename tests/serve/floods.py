"""Clients that send much, or little for long, to one server; each is limited in time and in bytes, and ends by itself.

    python tests/serve/floods.py [--only NAME;NAME] [--seconds 3] [--loop uvloop|asyncio] [options of cellstack serve]

For each flood: the longest step of another session, and the most processor time of the server within a step, which
doesn't depend on what else runs on the machine; the server's memory before, at most and afterwards; whether the
session's outputs differ from a stream's; and the exit status after SIGTERM with the flood's connections open.
"""

import argparse
import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serving import WIDTH, lstm
from websockets.sync.client import connect

TOKEN = "secret"
BYTES = 64 << 20  # that a flood sends at most
BOUND = f"Authorization: Bearer {TOKEN}\r\n".encode()


def request(line, *headers):
    return b"\r\n".join([line + b" HTTP/1.1", b"Host: localhost", *headers, b"", b""])


def upgrade(*headers, path=b"/multiplex"):
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    return request(
        b"GET " + path, b"Upgrade: websocket", b"Connection: Upgrade", key, b"Sec-WebSocket-Version: 13", *headers
    )


def frame(first, data=b""):
    return bytes([first, 0x80 + len(data), 0, 0, 0, 0]) + data


def with_token(data):
    return data.replace(b"\r\n\r\n", b"\r\n" + BOUND + b"\r\n", 1)


@dataclass(frozen=True)
class Flood:
    """Connections of one client.

    Attributes:
        begin: what each sends first.
        block: what each sends then, again and again.
        count: connections that are open together; one that the server closes is opened again.
        gap: seconds between two blocks of a connection; 0: as fast as the server reads.
        reads: whether the client reads answers.
        path: of a WebSocket, whose handshake with a token precedes all this; None: no WebSocket.
    """

    begin: bytes = b""
    block: bytes = b""
    count: int = 1
    gap: float = 0.0
    reads: bool = True
    path: bytes | None = None


MULTIPLEX, STREAM = b"/multiplex", b"/models/lstm/stream"
GET, LONG = request(b"GET /health"), b"\x82\xff" + (16 << 20).to_bytes(8, "big") + bytes(4)
WITHOUT_TOKEN = {
    "nothing": Flood(count=100),
    "heads that stop midway": Flood(b"GET /models HTTP/1.1\r\nHost: loc", count=100),
    "heads byte by byte": Flood(b"GET /models HTTP/1.1\r\nX: ", b"x", 100, 0.05),
    "headers one by one": Flood(b"GET /models HTTP/1.1\r\n", b"a:b\r\n" * 200, 100, 0.05),
    "long heads in one piece": Flood(b"", request(b"GET /models", b"X: " + b"x" * 100_000), 10),
    "handshake with a long line": Flood(upgrade(b"Cookie: " + b"x" * 9000), count=50),
    "handshake with many headers": Flood(upgrade(*[b"a: b"] * 150), count=50),
    "handshake with a body that never comes": Flood(upgrade(b"Content-Length: 1000"), count=50),
    "handshake of a path that is no ASCII": Flood(upgrade(path=b"/\xff"), count=50),
    "handshake of another method": Flood(upgrade().replace(b"GET", b"POST", 1), count=50),
    "handshake without a token": Flood(b"", upgrade(), 50),
    "upgrade to something else": Flood(request(b"GET /health", b"Upgrade: a", b"Connection: Upgrade"), b"x", 50, 0.05),
    "bodies that never come": Flood(request(b"POST /models/lstm/run", b"Content-Length: 1000"), count=100),
    "bodies that never end": Flood(request(b"POST /health", b"Content-Length: 1000000000000"), b"x" * 65536, 10),
    "bodies in chunks of a byte": Flood(
        request(b"POST /health", b"Transfer-Encoding: chunked"), b"1\r\nx\r\n" * 5000, 10
    ),
    "line ends between requests": Flood(GET, b"\r\n", 100, 0.05),
    "pipelined requests": Flood(b"", GET * 2000, 10),
    "pipelined requests without a token": Flood(b"", request(b"GET /models") * 2000, 10),
    "pipelined requests, answers unread": Flood(b"", GET * 2000, 10, reads=False),
    "the page, unread": Flood(request(b"GET /"), count=100, reads=False),
    "connections": Flood(b"x\r\n\r\n", count=200),
}
WITH_TOKEN = {
    "pongs": Flood(b"", frame(0x8A) * 10000, path=MULTIPLEX),
    "pings": Flood(b"", frame(0x89) * 10000, path=MULTIPLEX),
    "pings, pongs unread": Flood(b"", frame(0x89, b"x" * 125) * 1000, reads=False, path=MULTIPLEX),
    "empty fragments": Flood(frame(0x02), frame(0x00) * 10000, path=MULTIPLEX),
    "fragments of a byte": Flood(frame(0x02, b"x"), frame(0x00, b"x") * 10000, path=MULTIPLEX),
    "a continuation without a start": Flood(b"", frame(0x00, b"x") * 100, 10, path=MULTIPLEX),
    "messages of a byte": Flood(b"", frame(0x82, b"x") * 10000, path=MULTIPLEX),
    "messages of a byte to a stream": Flood(b"", frame(0x82, b"x") * 10000, path=STREAM),
    "messages of a byte, answers unread": Flood(b"", frame(0x82, b"x") * 10000, reads=False, path=STREAM),
    "a frame without its payload": Flood(LONG, count=50, path=MULTIPLEX),
    "a payload byte by byte": Flood(LONG, b"x", 50, 0.05, path=MULTIPLEX),
    "pongs of 100 clients": Flood(b"", frame(0x8A) * 1000, 100, path=MULTIPLEX),
    "silent WebSockets": Flood(count=100, reads=False, path=MULTIPLEX),
    "idle HTTP": Flood(with_token(GET), count=100),
    "pipelined requests with a token": Flood(b"", with_token(request(b"GET /models")) * 2000, 10),
}
FLOODS = {**WITHOUT_TOKEN, **WITH_TOKEN}


# ── the client ──────────────────────────────────────────────────────────────────────────────────────────────────────


class One:
    """A connection of a flood."""

    def __init__(self, port, flood):
        self.flood, self.due = flood, 0.0
        self.socket = socket.create_connection(("127.0.0.1", port))
        if not flood.reads:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if flood.path is not None:
            self.socket.settimeout(20)
            self.socket.sendall(with_token(upgrade(path=flood.path)))
            self.socket.recv(4096)
        self.socket.setblocking(False)
        self.left = memoryview(flood.begin)

    def go_on(self, readable, now):
        """Read and send what is possible; return the number of bytes sent, None if the server has closed it."""
        try:
            if readable and self.flood.reads and not self.socket.recv(1 << 16):
                return None
            if not self.left and self.flood.block and now >= self.due:
                self.left, self.due = memoryview(self.flood.block), now + self.flood.gap
            sent = self.socket.send(self.left) if self.left else 0
        except BlockingIOError:
            return 0
        except OSError:
            return None
        self.left = self.left[sent:]
        return sent


def flooded(port, flood, seconds):
    """Flood a server; return the number of bytes sent, and how many connections the server has closed."""
    end, sent, closed, ones = time.monotonic() + seconds, 0, 0, []
    with contextlib.suppress(OSError):
        while (now := time.monotonic()) < end:
            while len(ones) < flood.count and closed < 20_000:
                ones.append(One(port, flood))
            sockets = {one.socket: one for one in ones}
            wanted = [one.socket for one in ones if one.left or (flood.block and now >= one.due)]
            readable, writable, _ = select.select(list(sockets), wanted if sent < BYTES else [], [], 0.02)
            for found in {*readable, *writable} if flood.reads else writable:
                count = sockets[found].go_on(found in readable, now)
                if count is None:
                    found.close()
                    ones.remove(sockets[found])
                    closed += 1
                else:
                    sent += count
            if not flood.reads:
                time.sleep(0.001)
    return sent, closed, ones


# ── the measurement ─────────────────────────────────────────────────────────────────────────────────────────────────


def resident(pid, key="VmRSS"):
    return int(Path(f"/proc/{pid}/status").read_text().partition(key + ":")[2].split()[0]) / 1024


def processor(pid):
    """Return the seconds that the server's event loop has worked."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextlib.contextmanager
def serving(model, *options, loop="uvloop"):
    """Run `cellstack serve` as a process; yield it and its port. It is killed if it still runs."""
    program = "import sys; from cellstack.cli.main import main; sys.exit(main(sys.argv[1:]))"
    if loop == "asyncio":
        program = "import uvicorn; uvicorn.Config.get_loop_factory = lambda self: None; " + program
    command = [sys.executable, "-c", program, "serve", str(model), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(json.loads(process.stdout.readline())["port"])
        finally:
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--loop", default="uvloop")
    parser.add_argument("--client", metavar="PORT", type=int, help="only the flood, on a server")
    args, options = parser.parse_known_args()
    names = args.only.split(";") if args.only else list(FLOODS)
    if args.client:
        sent, closed, ones = flooded(args.client, FLOODS[names[0]], args.seconds)
        print(json.dumps([sent, closed, len(ones)]), flush=True)
        time.sleep(20)  # the connections stay open while the server stops
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lstm.safetensors")
        lstm().save(path)
        for name in names:
            print(f"{name:42}", measured(path, name, args.seconds, args.loop, options), flush=True)


def measured(path, name, seconds, loop, options):
    x = np.random.default_rng(0).standard_normal((100_000, WIDTH)).astype(np.float32)
    with serving(path, "--token", TOKEN, *options, loop=loop) as (process, port):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with connect(
            f"ws://127.0.0.1:{port}/models/lstm/stream", additional_headers=headers, ping_interval=None
        ) as own:
            own.recv()
            stream, times, works, differs = lstm().stream(), [], [], 0

            def step():
                nonlocal differs
                begun, worked = time.monotonic(), processor(process.pid)
                row = x[len(times)]
                own.send(row.tobytes())
                answer = own.recv(timeout=120)
                times.append(time.monotonic() - begun)
                works.append(processor(process.pid) - worked)
                differs += answer != stream.step(row[None])[0].tobytes()

            for _ in range(200):
                step()
            memory = resident(process.pid)
            command = [sys.executable, __file__, "--client", str(port), "--only", name, "--seconds", str(seconds)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                try:
                    most, until = memory, time.monotonic() + 60
                    while not select.select([client.stdout], [], [], 0.003)[0] and time.monotonic() < until:
                        step()
                        most = max(most, resident(process.pid))
                    sent, closed, left = json.loads(client.stdout.readline() or "[0, 0, 0]")
                    for _ in range(20):
                        step()
                    after = resident(process.pid)
                    process.send_signal(signal.SIGTERM)
                    begun = time.monotonic()
                    try:
                        _, errors = process.communicate(timeout=30)
                        status = process.returncode
                    except subprocess.TimeoutExpired:
                        errors, status = "", "hangs"
                    ended = time.monotonic() - begun
                finally:
                    client.kill()
    others, works = sorted(times[200:]), sorted(works[200:])
    last = errors.strip().splitlines()[-1][:60] if errors and status else ""
    return (
        f"longest {1e3 * others[-1]:5.0f} ms, processor {1e3 * works[-1]:5.0f} ms, "
        f"p99 {1e3 * works[int(len(works) * 0.99)]:4.1f}; steps {len(others)}, differ {differs}; "
        f"MB {memory:.0f} {most:.0f} {after:.0f}; sent {sent / 1e6:.1f} MB, closed {closed}, open {left}; "
        f"status {status} in {ended:.1f} s {last}"
    )


if __name__ == "__main__":
    main()
