"""The load that `cellstack serve` carries, compared with ONNX Runtime behind Starlette with a dict of states.

    python benchmarks/serve.py [--parts multiplexed,single,round_trip,memory] [--sessions 2000] [--rate 31]
                               [--seconds 20] [--units 128] [--levels 100,250,500,1000,2000] [--clients 1]
                               [--json FILE] [-- options of cellstack serve]

Each server is a subprocess and so is each client. A network of one LSTM layer; frames and answers are 4 x units bytes.
The outputs of both servers are first compared with a stream's, to 1e-5.

multiplexed  open loop: every session sends at the rate, at phases spread evenly; the client sends each millisecond what
             is due. Levels of sessions up to --sessions.
single       the same with a WebSocket per session.
round_trip   one session, the next frame after the answer, over both protocols.
memory       resident memory of the server over 100,000 sessions opened and closed, and over 1,000,000 frames.

Latency is from the time when a frame was due to its answer in the client, so that a late client or server counts. CPU
time is that of all threads, by the kernel's scheduler (Linux); the server's is divided by the frames answered.
"""

import argparse
import asyncio
import collections
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from cellstack_bench import engines

HEADER = struct.Struct("<BBHI")
WARM = 2.0  # seconds before the measured interval
STARTED = 20.0  # seconds in which clients must have opened their sessions
LATE = 0.010  # seconds: a level is carried if the 99th percentile is below
TICK = 1e-3
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def record(units):
    """The records of frames and answers: of `cellstack serve`, and of the baseline, which uses the same."""
    return np.dtype([("number", "<u4"), ("frame", "<u4"), ("row", "<f4", (units,))])


# ── processor time and memory of a process ────────────────────────────────────────────────────────────────────────────


def cpu(pid):
    """CPU seconds of a process: of its first thread and of the others."""
    seconds = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            text = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
            continue
        seconds[int(thread)] = int(text.split()[0]) / 1e9
    first = seconds.pop(pid)
    return np.array([first, sum(seconds.values())])


def megabytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# ── a WebSocket client that costs little ──────────────────────────────────────────────────────────────────────────────


class Wire(asyncio.Protocol):
    """A WebSocket connection; `received(message)` gets bytes, or a str."""

    def __init__(self, path, received):
        self.path, self.received = path, received
        self.upgraded = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()
        self.data = bytearray()

    def connection_made(self, transport):
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [f"GET {self.path} HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]
        transport.write("\r\n".join(lines).encode())

    def data_received(self, data):
        self.data += data
        if not self.upgraded.done():
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            if b" 101 " not in self.data[:end]:
                self.upgraded.set_exception(RuntimeError(self.data[:500].decode()))
                return
            self.upgraded.set_result(None)
            del self.data[: end + 4]
        at, size = 0, len(self.data)
        while size - at >= 2:
            length, start = self.data[at + 1], at + 2
            if length == 126:
                if size - at < 4:
                    break
                length, start = int.from_bytes(self.data[at + 2 : at + 4], "big"), at + 4
            elif length == 127:
                if size - at < 10:
                    break
                length, start = int.from_bytes(self.data[at + 2 : at + 10], "big"), at + 10
            if size - start < length:
                break
            opcode, message = self.data[at] & 15, bytes(self.data[start : start + length])
            at = start + length
            if opcode == PING:
                self.send(message, PONG)
            elif opcode == CLOSE:
                self.fail(RuntimeError(f"the server closed the connection: {message[:2].hex()} {message[2:].decode()}"))
            elif opcode != PONG:
                self.received(message.decode() if opcode == TEXT else message)
        del self.data[:at]

    def connection_lost(self, error):
        self.fail(RuntimeError("the connection was lost"))

    def fail(self, error):
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()  # it is reported where somebody waits

    def send(self, message, opcode=BINARY):
        """Send a message; the mask is zero, as hiding the content from proxies isn't needed here."""
        length = len(message)
        if length < 126:
            head = bytes((128 | opcode, 128 | length))
        elif length < 1 << 16:
            head = bytes((128 | opcode, 128 | 126)) + length.to_bytes(2, "big")
        else:
            head = bytes((128 | opcode, 128 | 127)) + length.to_bytes(8, "big")
        self.transport.write(b"".join((head, bytes(4), message)))


async def connected(port, path, received):
    _, wire = await asyncio.get_running_loop().create_connection(lambda: Wire(path, received), "127.0.0.1", port)
    await asyncio.wait_for(wire.upgraded, 20)
    return wire


class Inbox:
    """The messages of a connection that a client awaits one by one."""

    def __init__(self):
        self.messages = asyncio.Queue()

    def __call__(self, message):
        self.messages.put_nowait(message)

    async def get(self):
        return await asyncio.wait_for(self.messages.get(), 30)


# ── clients: functions that run in processes of their own ─────────────────────────────────────────────────────────────


def in_process(of, *arguments):
    """Start a client; returns its process and a connection that receives its result."""
    mine, its = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_client, args=(of, its, arguments))
    process.start()
    return process, mine


def _client(of, pipe, arguments):
    import uvloop

    try:
        pipe.send(uvloop.run(of(pipe, *arguments)))
    except Exception as error:  # reported by the parent
        pipe.send(error)


def result(pipe, seconds):
    if not pipe.poll(seconds):
        raise RuntimeError("a client didn't answer in time")
    found = pipe.recv()
    if isinstance(found, Exception):
        raise found
    return found


async def opened(wire, inbox, model, count):
    wire.send(json.dumps({"id": 1, "open": model, "count": count}).encode(), TEXT)
    answer = json.loads(await inbox.get())
    if len(answer.get("opened", ())) != count:
        raise RuntimeError(f"expected {count} sessions, got {str(answer)[:500]}")
    return np.array([session["number"] for session in answer["opened"]])


class Latencies:
    """When frames were due, and how long after that their answers arrived, in the measured interval."""

    def __init__(self, start, rate, phases, seconds):
        self.start, self.rate, self.phases = start + phases / rate, rate, phases
        self.begin, self.end = start + WARM, start + WARM + seconds
        self.found = []

    def add(self, sessions, frames, now):
        due = self.start[sessions] + (frames - 1) / self.rate
        inside = (due >= self.begin) & (due < self.end)
        self.found.append((now - due)[inside])

    def array(self):
        return np.concatenate(self.found) if self.found else np.zeros(0)


async def pace(latencies, wires, send):
    """Call `send(sessions, frame)` for what is due, each millisecond until the end; one frame per session at a time."""
    count = len(latencies.phases)
    sent, order = np.zeros(count, np.int64), np.arange(count)
    until = latencies.end + 0.2
    while (now := time.monotonic()) < until:
        due = np.floor((now - latencies.start) * latencies.rate).astype(np.int64) + 1
        late = order[due > sent]
        while len(late):
            sent[late] += 1
            send(late, sent[late])
            late = late[due[late] > sent[late]]
        for wire in wires:
            if wire.lost.done():
                wire.lost.result()
        await asyncio.sleep(max(0.0, TICK - (time.monotonic() - now)))
    return sent


async def multiplexed(pipe, port, model, count, rate, units, seconds, offset, total):
    """Many sessions over one connection. `model` None: the baseline."""
    inbox = Inbox()
    wire = await connected(port, "/multiplex", inbox)
    numbers = np.arange(count) if model is None else await opened(wire, inbox, model, count)
    dtype = record(units)
    place = np.zeros(numbers.max() + 1, np.int64)
    place[numbers] = np.arange(count)
    rows = np.zeros(count, dtype)
    rows["number"], rows["row"] = numbers, np.random.default_rng(offset).standard_normal((count, units))
    pipe.send("ready")
    start = await asyncio.to_thread(pipe.recv)
    latencies = Latencies(start, rate, (offset + np.arange(count)) / total, seconds)
    answered = 0

    def received(message):
        nonlocal answered
        now = time.monotonic()
        _, kind, _, n = HEADER.unpack_from(message)
        if kind != 1:
            raise RuntimeError(f"expected answers, got {message[:300]}")
        found = np.frombuffer(message, dtype, n, HEADER.size)
        answered += n
        latencies.add(place[found["number"]], found["frame"], now)

    wire.received = received

    def send(sessions, frames):
        some = rows[sessions]
        some["frame"] = frames
        wire.send(HEADER.pack(1, 0, 0, len(some)) + some.tobytes())

    await asyncio.sleep(max(0.0, start - time.monotonic()))
    sent = await pace(latencies, [wire], send)
    await drained(lambda: answered >= sent.sum())
    return latencies.array()


async def drained(done):
    """Wait for the last answers, at most 5 seconds; those that don't arrive are missing from the result."""
    for _ in range(500):
        if done():
            return
        await asyncio.sleep(0.01)


async def single(pipe, port, model, count, rate, units, seconds, offset, total):
    """A WebSocket per session."""
    path = "/stream" if model is None else f"/models/{model}/stream"
    frames, latencies, ready = np.zeros(count, np.int64), None, []

    def receiver(n):
        def received(message):
            if isinstance(message, str):  # the server's first message, or why a frame was refused
                if latencies is not None:
                    raise RuntimeError(message)
                ready.append(n)
                return
            frames[n] += 1
            latencies.add(n, frames[n], time.monotonic())

        return received

    wires = [await connected(port, path, receiver(n)) for n in range(count)]
    while len(ready) < count:
        await asyncio.sleep(0.01)
    bodies = [row.tobytes() for row in np.random.default_rng(offset).standard_normal((count, units)).astype("<f4")]
    pipe.send("ready")
    start = await asyncio.to_thread(pipe.recv)
    latencies = Latencies(start, rate, (offset + np.arange(count)) / total, seconds)
    latencies.add = _scalar_add(latencies)

    def send(sessions, _):
        for n in sessions.tolist():
            wires[n].send(bodies[n])

    await asyncio.sleep(max(0.0, start - time.monotonic()))
    sent = await pace(latencies, wires, send)
    await drained(lambda: (frames >= sent).all())
    return np.array(latencies.found)


def _scalar_add(latencies):
    start, rate, begin, end, found = latencies.start.tolist(), latencies.rate, latencies.begin, latencies.end, []
    latencies.found = found

    def add(n, frame, now):
        due = start[n] + (frame - 1) / rate
        if begin <= due < end:
            found.append(now - due)

    return add


async def round_trip(pipe, port, model, units, seconds, many):
    """One session that sends the next frame after the answer."""
    inbox, dtype = Inbox(), record(units)
    if many:
        wire = await connected(port, "/multiplex", inbox)
        number = 0 if model is None else int((await opened(wire, inbox, model, 1))[0])
        row = np.zeros(1, dtype)
        row["number"] = number
    else:
        wire = await connected(port, "/stream" if model is None else f"/models/{model}/stream", inbox)
        await inbox.get()
        body = np.zeros(units, "<f4").tobytes()
    pipe.send("ready")
    start = await asyncio.to_thread(pipe.recv)
    answered, found, frame = asyncio.Event(), [], 0

    def received(message):
        if isinstance(message, str):
            raise RuntimeError(message)
        answered.set()

    wire.received = received
    await asyncio.sleep(max(0.0, start - time.monotonic()))
    end = start + WARM + seconds
    while (sent := time.monotonic()) < end:
        frame += 1
        if many:
            row["frame"] = frame
            wire.send(HEADER.pack(1, 0, 0, 1) + row.tobytes())
        else:
            wire.send(body)
        await asyncio.wait_for(answered.wait(), 10)
        answered.clear()
        if sent >= start + WARM:
            found.append(time.monotonic() - sent)
    return np.array(found)


async def answers(port, model, x, many):
    """The outputs of frames `[sessions, T, I]` of some sessions, as `[sessions, T, H]`."""
    count, steps, units = x.shape
    dtype, found = record(units), np.zeros_like(x)
    if many:
        inbox = Inbox()
        wire = await connected(port, "/multiplex", inbox)
        numbers = np.arange(count) if model is None else await opened(wire, inbox, model, count)
        rows = np.zeros(count, dtype)
        for step in range(steps):
            rows["number"], rows["frame"], rows["row"] = numbers, step + 1, x[:, step]
            wire.send(HEADER.pack(1, 0, 0, count) + rows.tobytes())
            left = count
            while left:
                message = await inbox.get()
                got = np.frombuffer(message, dtype, -1, HEADER.size)
                found[np.searchsorted(numbers, got["number"]), step] = got["row"]
                left -= len(got)
        wire.transport.close()
        return found
    for n in range(count):
        inbox = Inbox()
        wire = await connected(port, "/stream" if model is None else f"/models/{model}/stream", inbox)
        await inbox.get()
        for step in range(steps):
            wire.send(x[n, step].tobytes())
            found[n, step] = np.frombuffer(await inbox.get(), "<f4")
        wire.transport.close()
    return found


async def churn(pipe, port, model, units, sessions, frames, at_once=1000):
    """Open and close sessions, then step some; reports where it is."""
    inbox = Inbox()
    wire = await connected(port, "/multiplex", inbox)
    pipe.send("ready")
    await asyncio.to_thread(pipe.recv)
    for turn in range(sessions // at_once):
        numbers = await opened(wire, inbox, model, at_once)
        wire.send(json.dumps({"id": 2, "close": numbers.tolist()}).encode(), TEXT)
        await inbox.get()
        pipe.send(("sessions", (turn + 1) * at_once))
    numbers = await opened(wire, inbox, model, at_once)
    rows = np.zeros(at_once, record(units))
    rows["number"] = numbers
    for turn in range(frames // at_once):
        rows["frame"] = turn + 1
        wire.send(HEADER.pack(1, 0, 0, at_once) + rows.tobytes())
        left = at_once
        while left:
            left -= HEADER.unpack_from(await inbox.get())[3]
        if turn % 10 == 9:
            pipe.send(("frames", (turn + 1) * at_once))


# ── servers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def baseline(file, port):
    """What people write: an ONNX Runtime session, a dict of states, and a call per frame."""
    import onnxruntime
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocketDisconnect

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    units = session.get_inputs()[1].shape[-1]
    dtype, states = record(units), {}
    fresh = np.zeros((1, 1, units), np.float32)

    def step(key, x):
        h, c = states.get(key) or (fresh, fresh)
        states[key] = h, c = session.run(None, {"x": x.reshape(1, 1, -1), "h": h, "c": c})
        return h

    async def stream(socket):
        await socket.accept()
        await socket.send_text(json.dumps({"session": id(socket)}))
        try:
            while True:
                x = np.frombuffer(await socket.receive_bytes(), "<f4")
                await socket.send_bytes(step(id(socket), x).tobytes())
        except WebSocketDisconnect:
            states.pop(id(socket), None)

    async def multiplex(socket):
        await socket.accept()
        try:
            while True:
                message = await socket.receive_bytes()
                rows = np.frombuffer(message, dtype, -1, HEADER.size)
                found = rows.copy()
                for n, number in enumerate(rows["number"].tolist()):
                    found["row"][n] = step((id(socket), number), rows["row"][n])
                await socket.send_bytes(HEADER.pack(1, 1, 0, len(found)) + found.tobytes())
        except WebSocketDisconnect:
            for key in [key for key in states if isinstance(key, tuple) and key[0] == id(socket)]:
                del states[key]

    routes = [
        Route("/ready", lambda request: PlainTextResponse("ready")),
        WebSocketRoute("/stream", stream),
        WebSocketRoute("/multiplex", multiplex),
    ]
    uvicorn.run(
        Starlette(routes=routes), host="127.0.0.1", port=port, log_level="warning", ws="websockets-sansio",
        ws_per_message_deflate=False,
    )  # fmt: skip


class Server:
    """A server as a subprocess, ready on leaving `__enter__`."""

    def __init__(self, name, model, *command):
        self.name, self.model, self.command = name, model, command
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def __enter__(self):
        command = [sys.executable, *self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} didn't start")
            time.sleep(0.05)
        return self

    def ready(self):
        try:
            urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).close()
        except OSError:
            return False
        return True

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)

    @property
    def pid(self):
        return self.process.pid


# ── measurements ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load(server, of, count, args):
    """Run clients at a number of sessions; returns the figures."""
    clients = min(args.clients, count)
    shares = [len(part) for part in np.array_split(np.arange(count), clients)]
    firsts = np.cumsum([0, *shares[:-1]]).tolist()
    started = [
        in_process(of, server.port, server.model, share, args.rate, args.units, args.seconds, first, count)
        for share, first in zip(shares, firsts, strict=True)
    ]
    return measured(server, started, args.seconds, args.rate * count * args.seconds)


def measured(server, started, seconds, expected=None):
    try:
        for _, pipe in started:
            result(pipe, STARTED + 60)  # "ready"
        start = time.monotonic() + 0.3
        for _, pipe in started:
            pipe.send(start)
        pids = [process.pid for process, _ in started]
        time.sleep(max(0.0, start + WARM - time.monotonic()))
        before, own = cpu(server.pid), sum(cpu(pid) for pid in pids)
        time.sleep(max(0.0, start + WARM + seconds - time.monotonic()))
        after, own = cpu(server.pid) - before, sum(cpu(pid) for pid in pids) - own
        found = np.concatenate([result(pipe, 60) for _, pipe in started])
    finally:
        for process, _ in started:
            process.terminate()
            process.join()
    if not len(found):
        return {"answered": 0.0}
    p50, p99, most = np.quantile(found, (0.5, 0.99, 1.0)) * 1e3
    figures = {
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": most,
        "server_us_per_frame": after.sum() / len(found) * 1e6,
        "server_first_thread_share": after[0] / after.sum(),
        "server_cores": after.sum() / seconds,
        "client_us_per_frame": own.sum() / len(found) * 1e6,
        "client_cores": own.sum() / seconds,
        "frames": len(found),
    }
    if expected is not None:
        figures["answered"] = len(found) / expected
    return {name: float(value) for name, value in figures.items()}


def show(what, server, figures):
    if "p50_ms" not in figures:
        print(f"{what:28}{server.name:13}no answers", flush=True)
        return
    print(
        f"{what:28}{server.name:13}p50 {figures['p50_ms']:8.2f}  p99 {figures['p99_ms']:8.2f}  max "
        f"{figures['max_ms']:8.1f} ms   server {figures['server_us_per_frame']:6.1f} us/frame, "
        f"{figures['server_cores']:.2f} cores ({figures['server_first_thread_share']:.0%} in the first thread)   "
        f"client {figures['client_us_per_frame']:5.1f} us, {figures['client_cores']:.2f} cores   "
        f"answered {figures.get('answered', 1.0):.1%}",
        flush=True,
    )


def levels(part, of, servers, args):
    """Raise the number of sessions until the 99th percentile is above 10 ms."""
    found = {}
    for server in servers:
        rows = found[server.name] = []
        for count in [level for level in args.levels if level < args.sessions] + [args.sessions]:
            figures = load(server, of, count, args)
            show(f"{part}, {count} sessions", server, figures)
            rows.append({"sessions": count, **figures})
            if figures["answered"] < 0.99 or figures["p99_ms"] > LATE * 1e3:
                break
    return found


def memory(server, args):
    process, pipe = in_process(churn, server.port, server.model, args.units, args.opened, args.frames)
    found = collections.defaultdict(list)
    result(pipe, 60)
    pipe.send(0)
    while (progress := result(pipe, 120)) is not None:
        what, count = progress
        found[what].append((count, megabytes(server.pid)))
    process.join()
    figures = {}
    for what, rows in found.items():
        early, late = rows[len(rows) // 10], rows[-1]
        figures[what] = {"from": early[0], "to": late[0], "from_mb": early[1], "to_mb": late[1]}
        print(
            f"memory, {what:20}{server.name:13}{early[1]:8.1f} MB after {early[0]:,}, {late[1]:8.1f} MB after "
            f"{late[0]:,}",
            flush=True,
        )
    return figures


def compare(servers, network, units):
    """Compare the outputs of all servers with a stream's."""
    import uvloop

    x = np.random.default_rng(1).standard_normal((3, 20, units)).astype(np.float32)
    expected = network.stream(3).run(x)
    for server in servers:
        for many in (True, False):
            found = uvloop.run(answers(server.port, server.model, x, many))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=server.name)
    print("outputs: equal to a stream's to 1e-5, over both protocols", flush=True)


def main():
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("multiplexed", "single", "round_trip", "memory")
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--levels", default="100,250,500,1000")
    parser.add_argument("--rate", type=float, default=31.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--opened", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--baseline", metavar="FILE", help=argparse.SUPPRESS)  # this process is the baseline's server
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.baseline is not None:
        baseline(args.baseline, args.port)
        return
    args.levels = [int(level) for level in args.levels.split(",") if level]
    if unknown := set(args.parts.split(",")) - set(parts):
        parser.error(f"--parts: expected some of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    cells = engines.weights(args.units, args.units, 1)
    network = engines.network(cells)
    found = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "options": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        model, onnx = Path(folder) / "lstm.safetensors", Path(folder) / "lstm.onnx"
        network.save(model)
        onnx.write_bytes(engines.onnx_step(cells[0]))
        ours = Server("cellstack", "lstm", "-m", "cellstack", "serve", str(model), *options)
        theirs = Server("onnxruntime", None, __file__, "--baseline", str(onnx))
        servers = [ours] if args.no_baseline else [ours, theirs]
        with ours:
            if args.no_baseline:
                measure(args, network, servers, found)
            else:
                with theirs:
                    measure(args, network, servers, found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


def measure(args, network, servers, found):
    compare(servers, network, args.units)
    for part in args.parts.split(","):
        if part in ("multiplexed", "single"):
            found[part] = levels(part, {"multiplexed": multiplexed, "single": single}[part], servers, args)
        elif part == "round_trip":
            found[part] = {}
            for server in servers:
                for many in (True, False):
                    started = [in_process(round_trip, server.port, server.model, args.units, args.seconds, many)]
                    figures = measured(server, started, args.seconds)
                    name = "multiplexed" if many else "single"
                    show(f"round trip, {name}", server, figures)
                    found[part].setdefault(server.name, {})[name] = figures
        elif part == "memory":
            found[part] = memory(servers[0], args)


if __name__ == "__main__":
    main()
