"""Both WebSocket protocols against a real server."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time

import numpy as np
import pytest
import uvicorn
from serving import UNITS, WIDTH, lstm, running, unpack_refused, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cellstack.serve import Limits, clients, frames, websocket

SENT, ANSWERED = frames.numbered([("x", "<f4", (WIDTH,))]), frames.numbered([("layer_0", "<f4", (UNITS,))])


def stepped(x, seed=0):
    stream = lstm(seed=seed).stream()
    return np.stack([stream.step(np.asarray(row, np.float32)[None])[0] for row in x])


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stream(served, query=""):
    return connect(f"{served.ws}/models/lstm/stream{query}", max_queue=None)


@contextlib.contextmanager
def multiplexed(served, count=0):
    with connect(f"{served.ws}/multiplex", max_queue=None) as socket:
        if count:
            asked(socket, {"open": "lstm", "count": count})
        yield socket


def asked(socket, message):
    socket.send(json.dumps({"id": 7, **message}))
    answer = json.loads(socket.recv(timeout=60))
    assert answer.pop("id") == 7
    return answer


def message(numbers, given, x, model=0):
    records = np.zeros(len(numbers), SENT)
    records["number"], records["frame"], records["row"]["x"] = numbers, given, x
    return frames.pack(frames.FRAMES, model, records)


def received(socket, count):
    """Return `count` answers by (number, frame): outputs, or the reason of the refusal."""
    found = {}
    while len(found) < count:
        data = socket.recv(timeout=60)
        if frames.header(data)[0] == frames.REFUSED:
            found |= {(number, frame): why for number, frame, why in unpack_refused(data)}
        else:
            for record in frames.unpack(data, ANSWERED):
                found[int(record["number"]), int(record["frame"])] = record["row"]["layer_0"].copy()
    assert len(found) == count
    return found


# ── one session per connection ──────────────────────────────────────────────────────────────────────────────────────


def test_binary_and_json_frames_have_the_bits_of_a_stream(served):
    x = random(6, WIDTH)
    with stream(served) as socket:
        hello = json.loads(socket.recv())
        assert (hello["frame"], hello["inputs"][0]["width"]) == (0, WIDTH)
        for n, row in enumerate(x):  # several are in flight
            socket.send(row.tobytes() if n % 2 else json.dumps({"x": row.tolist()}))
        answers = [socket.recv() for _ in x]
    assert [json.loads(answer)["frame"] for answer in answers[::2]] == [1, 3, 5]
    found = [np.float32(json.loads(a)["y"]) if isinstance(a, str) else np.frombuffer(a, "<f4") for a in answers]
    assert (np.stack(found) == stepped(x)).all()


def test_refused_frames_are_answered_in_order(served):
    with stream(served) as socket:
        socket.recv()
        nan = np.full(WIDTH, np.nan, np.float32).tobytes()
        more = '{"x": [1, true, 1]}', '{"x": [1, 1, 1], "y": 1}', '{"x": 1, "x": [1, 1, 1]}', '{"close": true, "x": 1}'
        for sent in (np.ones(WIDTH, "<f4").tobytes(), nan, b"short", '{"x": [1]}', "{", *more, '{"x": [1, 1, 1]}'):
            socket.send(sent)
        first, *others, last = [socket.recv() for _ in range(6 + len(more))]
        said = [json.loads(text) for text in others]
    assert said[0] == {"frame": 2, "error": "the frame contains NaN or infinity"}
    assert [(set(one), one["error"][:14]) for one in said[1:]] == [
        ({"error"}, "expected 12 by"),
        ({"error"}, "x: expected 3 "),
        ({"error"}, "expected JSON:"),
        ({"error"}, "x: expected 3 "),
        ({"error"}, "expected no ot"),
        ({"error"}, "expected JSON:"),
        ({"error"}, "expected no ot"),
    ]
    assert json.loads(last)["frame"] == 3
    found = np.stack([np.frombuffer(first, "<f4"), np.float32(json.loads(last)["y"])])
    assert (found == stepped(np.ones((2, WIDTH)))).all()


def test_a_session_is_resumed(served):
    x = random(5, WIDTH)
    with stream(served) as socket:
        token = json.loads(socket.recv())["session"]
        for row in x[:4]:
            socket.send(row.tobytes())
            socket.recv()
    with stream(served, f"?session={token}&last=1") as socket:
        assert json.loads(socket.recv())["frame"] == 4
        stored = [socket.recv() for _ in range(3)]
        socket.send(x[4].tobytes())
        found = np.stack([np.frombuffer(answer, "<f4") for answer in [*stored, socket.recv()]])
    assert (found == stepped(x)[1:]).all()


def test_resuming_takes_the_session_from_its_connection(served):
    with stream(served) as old:
        token = json.loads(old.recv())["session"]
        with stream(served, f"?session={token}&last=0") as new:
            new.recv()
            with pytest.raises(ConnectionClosed) as closed:
                old.recv(timeout=60)
            assert closed.value.rcvd.code == 4410
            new.send(np.ones(WIDTH, "<f4").tobytes())
            assert len(new.recv()) == 4 * UNITS


def test_answers_that_are_no_longer_stored(served):
    with stream(served) as socket:
        token = json.loads(socket.recv())["session"]
        for _ in range(20):
            socket.send(np.ones(WIDTH, "<f4").tobytes())
            socket.recv()
    for last in (3, 21):
        with stream(served, f"?session={token}&last={last}") as socket:
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=60)
            assert closed.value.rcvd.code == 4409


def test_a_session_is_closed_by_its_client(served):
    with stream(served) as socket:
        token = json.loads(socket.recv())["session"]
        socket.send(np.ones(WIDTH, "<f4").tobytes())
        socket.send('{"close": true}')
        assert len(socket.recv()) == 4 * UNITS
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=60)
    assert closed.value.rcvd.code == 1000
    assert token not in served.models.model("lstm").sessions


# ── many sessions per connection ────────────────────────────────────────────────────────────────────────────────────


def test_frames_of_many_sessions_have_the_bits_of_streams(served):
    x = random(6, 8, WIDTH)  # step, session
    with multiplexed(served, 8) as socket:
        for t in range(4):
            socket.send(message(range(8), [t + 1] * 8, x[t]))
        socket.send(message([*range(8)] * 2, [5] * 8 + [6] * 8, x[4:].reshape(-1, WIDTH)))  # two frames of each
        found = received(socket, 48)
    for number in range(8):
        y = np.stack([found[number, t + 1] for t in range(6)])
        assert (y == stepped(x[:, number])).all()


def test_frames_out_of_order_are_refused_and_others_are_not(served):
    with multiplexed(served, 3) as socket:
        asked(socket, {"close": [2]})
        x = np.ones((6, WIDTH), np.float32)
        x[3] = np.nan
        socket.send(message([0, 1, 9, 1, 0, 2], [1, 2, 1, 1, 2, 1], x))
        found = received(socket, 6)
        assert found[1, 2] == "expected frame 1, got 2"
        assert found[9, 1] == "no session of this connection has the number 9"
        assert found[2, 1] == "no session of this connection has the number 2"
        assert found[1, 1] == "the frame contains NaN or infinity"
        y = stepped(x[:3])
        assert (np.stack([found[0, 1], found[0, 2]]) == y[:2]).all()
        socket.send(message([0, 0, 1, 0], [2, 1, 1, 3], x[:1]))  # the first three again
        found = received(socket, 4)
        assert (np.stack([found[0, 1], found[0, 2], found[0, 3]]) == y).all()
        assert found[1, 1] == "the frame was refused"


def test_sessions_are_resumed_in_another_connection(served):
    x = random(4, WIDTH)
    with multiplexed(served) as old, multiplexed(served) as new:
        opened = asked(old, {"open": "lstm", "count": 2})["opened"]
        assert [one["number"] for one in opened] == [0, 1]
        for t in range(3):
            old.send(message([0, 1], [t + 1] * 2, x[t]))
            received(old, 2)
        wanted = [{"session": one["session"], "last": last} for one, last in zip(opened, (1, 3), strict=True)]
        found = asked(new, {"resume": [*wanted, {"session": "none", "last": 0}, 5]})["resumed"]
        assert [one.get("number") for one in found] == [0, 1, None, None]
        assert [one.get("status") for one in found] == [None, None, 404, 400]
        stored = received(new, 2)
        assert (np.stack([stored[0, 2], stored[0, 3]]) == stepped(x)[1:3]).all()
        assert [json.loads(old.recv(timeout=60))["lost"] for _ in opened] == [0, 1]
        old.send(message([0], [4], x[3]))
        assert received(old, 1)[0, 4] == "no session of this connection has the number 0"
        new.send(message([0], [4], x[3]))
        assert (received(new, 1)[0, 4] == stepped(x)[3]).all()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"open": "other"}, 404),
        ({"open": "lstm", "count": 0}, 400),
        ({"open": "lstm", "count": True}, 400),
        ({"open": "lstm", "count": 10**9}, 400),
        ({"open": "lstm", "count": 64}, 503),
        ({"open": "lstm", "cuont": 2}, 400),
        ({"close": [4]}, 404),
        ({"close": [0], "resume": []}, 400),
        ({"close": [0], "open": 1}, 400),
        ({"close": ["0"]}, 404),
        ({"close": [-1]}, 404),
        ({"nothing": 1}, 400),
    ],
)
def test_refused_requests(served, sent, status):
    with multiplexed(served, 1) as socket:
        answer = asked(socket, sent)
        assert answer["status"] == status
        assert answer["error"]


def test_malformed_messages_are_answered(served):
    good = message([0], [1], np.ones(WIDTH))
    bad = [b"", b"abc", b"\2" + good[1:], b"\1\1" + good[2:], b"\1\0\5\0" + good[4:], good[:-1], good + b"x", good[:8]]
    with multiplexed(served, 1) as socket:
        for data in [*bad, "{", "[]", '"text"']:
            socket.send(data)
            assert json.loads(socket.recv(timeout=60))["error"]
        socket.send(good[:4] + b"\xff\xff\xff\xff" + good[8:])
        assert "at most 4096 frames" in json.loads(socket.recv(timeout=60))["error"]
        socket.send(good)
        assert (received(socket, 1)[0, 1] == stepped(np.ones((1, WIDTH)))[0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_mutated_messages_leave_other_sessions_as_they_are(served, seed):
    draw = np.random.default_rng(seed)
    x = random(40, WIDTH, seed=seed)
    good = [message([0, 1], [1, 1], np.ones((2, WIDTH))), b'{"id": 1, "open": "lstm", "count": 2}', x[0].tobytes()]
    good += [b'{"id": 2, "close": [0]}', b'{"x": [1, 2, 3]}', b'{"id": 3, "resume": [{"session": "a", "last": 1}]}']
    with multiplexed(served, 1) as other, contextlib.ExitStack() as stack:
        begin = [lambda: stack.enter_context(multiplexed(served, 2)), lambda: stack.enter_context(stream(served))]
        sockets = [one() for one in begin]
        for t in range(len(x)):
            for n, socket in enumerate(sockets):
                data = bytearray(good[draw.integers(len(good))])
                for _ in range(draw.integers(4)):
                    data[draw.integers(len(data))] = draw.integers(256)
                data = bytes(data[: draw.integers(len(data) + 1)] if draw.random() < 0.3 else data)
                text = data.decode(errors="replace")
                try:
                    socket.send(text if draw.random() < 0.5 else data)
                except ConnectionClosed:  # such as after {"close": true}
                    sockets[n] = begin[n]()
            other.send(message([0], [t + 1], x[t]))
            assert (received(other, 1)[0, t + 1] == stepped(x[: t + 1])[-1]).all()
    wait_until(lambda: not served.server.app.state.connections.open)


# ── the end of the server ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_stops_answers_what_it_received(model_file):
    x = random(50, WIDTH)
    with (
        running(model_file, limits=Limits(sessions=4)) as served,
        multiplexed(served, 1) as socket,
        stream(served) as other,
    ):
        other.recv()
        for t, row in enumerate(x):
            socket.send(message([0], [t + 1], row))
        found = [socket.recv(timeout=60)]
        served.server.should_exit = True
        with contextlib.suppress(ConnectionClosed):
            while True:
                found.append(socket.recv(timeout=60))
        assert frames.unpack(found[-1], ANSWERED)["frame"][-1] == len(x)
        assert socket.protocol.close_code == 1012
        with pytest.raises(ConnectionClosed) as closed:
            other.recv(timeout=60)
        assert closed.value.rcvd.code == 1012


@pytest.mark.long
def test_the_rate_of_a_connection_is_limited(model_file):
    with running(model_file, limits=Limits(sessions=4, rate=200)) as served, multiplexed(served, 1) as socket:
        begun = time.monotonic()
        for t in range(6):
            socket.send(message([0] * 50, range(50 * t + 1, 50 * t + 51), np.ones(WIDTH)))
        received_frames = 0
        while received_frames < 300:
            received_frames += frames.header(socket.recv(timeout=60))[2]
        assert time.monotonic() - begun > 0.2  # the message beyond 200 frames is the last that is read at once


# ── messages in every form that the protocol allows ─────────────────────────────────────────────────────────────────


def test_messages_in_fragments(served):
    x = random(3, WIDTH)
    with stream(served) as single, multiplexed(served, 1) as many:
        single.recv()
        for n, row in enumerate(x):
            data, text = row.tobytes(), json.dumps({"x": row.tolist()})
            parts = [data[:5], data[5:5], data[5:]] if n != 1 else [text[:7], text[7:]]
            single.send(iter(parts))
            single.ping()
        found = [single.recv(timeout=60) for _ in x]
        found[1] = np.float32(json.loads(found[1])["y"]).tobytes()
        assert b"".join(found) == stepped(x).tobytes()
        data = message([0, 0, 0], [1, 2, 3], x)
        many.send(data[n : n + 3] for n in range(0, len(data), 3))
        found = received(many, 3)
        assert (np.stack([found[0, t + 1] for t in range(3)]) == stepped(x)).all()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x82\0\0\0\0\xff\xff", 1007),  # text that isn't UTF-8
        (b"\x82\x02ab", 1002),  # without a mask
        (b"\x80\x82\0\0\0\0ab", 1002),  # the end of a message that didn't begin
        (b"\x02\x82\0\0\0\0ab\x82\x82\0\0\0\0ab", 1002),  # a message within a message
        (b"\x83\x80\0\0\0\0", 1002),  # an unknown kind of frame
        (b"\x82\xff\0\0\0\0\1\0\0\1", 1009),  # a length of 16 MB and a byte
    ],
)
def test_what_the_protocol_forbids(served, sent, code):
    with contextlib.suppress(ConnectionClosed), stream(served) as socket:
        token = json.loads(socket.recv())["session"]
        socket.socket.sendall(sent)
        socket.recv(timeout=60)
    assert socket.protocol.close_rcvd.code == code
    with stream(served, f"?session={token}&last=0") as again:  # the session itself is as before
        assert json.loads(again.recv())["frame"] == 0


def masked(first, data=b""):
    length = bytes([0x80 + len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return bytes([first]) + length + b"\0\0\0\0" + data


TINY = {
    "pongs": (b"", masked(0x8A)),
    "empty fragments": (masked(0x02), masked(0x00)),
    "fragments of a byte": (masked(0x02, b"x"), masked(0x00, b"x")),
    "messages of a byte": (b"", masked(0x82, b"x")),
}


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("kind", TINY)
def test_others_have_their_turn_between_tiny_frames(model_file, monkeypatch, loop, kind):
    """As many as one read takes: of a connection, at most `FRAMES` are processed in a turn of the event loop."""
    if loop == "asyncio":
        monkeypatch.setattr(uvicorn.Config, "get_loop_factory", lambda self: asyncio.new_event_loop)
    begin, block = TINY[kind]
    count, counts = 6000, []
    frame = websocket.WebSocket._frame

    def counted(self, first, payload):
        counts[-1] += 1
        return frame(self, first, payload)

    monkeypatch.setattr(websocket.WebSocket, "_frame", counted)
    with (
        running(model_file, limits=Limits(sessions=4)) as served,
        stream(served) as other,
        multiplexed(served) as flood,
    ):
        other.recv()

        async def watch():  # wakes once in each turn
            while sum(counts) < count:
                counts.append(0)
                await asyncio.sleep(0)

        counts.append(0)
        watching = asyncio.run_coroutine_threadsafe(watch(), served.loop)
        flood.socket.sendall(begin + block * count)
        x = random(5, WIDTH)
        for row in x:
            other.send(row.tobytes())
        found = [other.recv(timeout=60) for _ in x]
        watching.result(60)
    assert b"".join(found) == stepped(x).tobytes()
    assert max(counts) <= 2 * websocket.FRAMES + len(x)  # what has arrived, and what waits


def test_connections_share_the_time_for_frames_that_wait(model_file, monkeypatch):
    with running(model_file, limits=Limits(sessions=4)) as served:
        monkeypatch.setattr(clients, "TURN_SECONDS", 0.0)  # then one of them has its turn
        turns, all_sent = [], threading.Event()
        go_on = websocket.WebSocket._go_on
        monkeypatch.setattr(websocket.WebSocket, "_go_on", lambda self: (turns.append(self), go_on(self))[1])
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(multiplexed(served)) for _ in range(4)]
            served.loop.call_soon_threadsafe(all_sent.wait)
            for socket in sockets:
                socket.socket.sendall(masked(0x8A) * 4000)  # few enough for the system's buffers
            all_sent.set()
            wait_until(lambda: len(turns) >= 160)  # of the 250 that they take
        assert len(set(turns[:40])) == len(set(turns[120:160])) == 4


def test_a_message_of_many_fragments_takes_no_more_memory_than_its_bytes(served):
    with multiplexed(served) as socket:
        (connection,) = served.server.app.state.connections.open
        parts = connection._websocket
        socket.socket.sendall(masked(0x02) + masked(0x00, b"x") * 5000 + masked(0x00) * 5000)
        wait_until(lambda: parts._fragments == 10_001)
        assert parts._parts == b"x" * 5000
        assert sys.getsizeof(parts._parts) < 10_000
        socket.socket.sendall(masked(0x00) * (websocket.MOST_FRAGMENTS - 10_001))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
    assert socket.protocol.close_rcvd.code == 1009
    assert socket.protocol.close_rcvd.reason == "a message has at most 16384 fragments"


@pytest.mark.long
@pytest.mark.parametrize("sent", [masked(0x8A) * 300, masked(0x02) + masked(0x00) * 299])
def test_frames_that_complete_no_message_count_for_the_rate(model_file, sent):
    with running(model_file, limits=Limits(sessions=4, rate=100)) as served, multiplexed(served) as socket:
        (connection,) = served.server.app.state.connections.open
        begun = time.monotonic()
        socket.socket.sendall(sent)
        wait_until(lambda: connection._due > begun + 0.5)
        assert connection._websocket.read_paused
        wait_until(lambda: connection._due - begun > 1.9 and not connection._too_fast)  # 300 frames, 1 s in advance
        assert time.monotonic() - begun > 1.8


@pytest.mark.long
def test_a_client_whose_frames_wait_for_the_rate_is_not_disconnected(model_file):
    """It can't answer pings meanwhile, since the answer comes after the frames."""
    with running(model_file, limits=Limits(sessions=4, rate=100)) as served, multiplexed(served, 1) as socket:
        (connection,) = served.server.app.state.connections.open
        parts = connection._websocket
        parts.ping_timeout = 2  # less than the frames wait
        for t in range(4):
            socket.send(message([0] * 100, range(100 * t + 1, 100 * t + 101), np.ones(WIDTH)))
        wait_until(lambda: parts.read_paused)
        served.loop.call_soon_threadsafe(parts.send_keepalive_ping)
        assert len(received(socket, 400)) == 400
        wait_until(lambda: parts.pending_ping_payload is None)
        assert socket.protocol.state.name == "OPEN"


def test_messages_wait_for_those_before_them(served):
    x = random(2, WIDTH)
    with multiplexed(served) as socket:
        for t in range(40):  # the next frames are under way while sessions are opened
            socket.send(json.dumps({"open": "lstm"}))
            socket.send(message([t], [1], x[0]))
            socket.send(message([t], [2], x[1]))
            socket.send(json.dumps({"close": [t]}))
            socket.send(message([t], [3], x[0]))
        for t in range(40):
            assert json.loads(socket.recv(timeout=60))["opened"][0]["number"] == t
            said, found = [], {}
            while len(said) + len(found) < 4:
                data = socket.recv(timeout=60)
                if isinstance(data, str):
                    said.append(json.loads(data))
                elif frames.header(data)[0] == frames.REFUSED:
                    said += unpack_refused(data)
                else:
                    found |= {int(one["frame"]): one["row"]["layer_0"] for one in frames.unpack(data, ANSWERED)}
            assert said == [{"id": None, "closed": [t]}, (t, 3, f"no session of this connection has the number {t}")]
            assert (np.stack([found[1], found[2]]) == stepped(x)).all()


@pytest.mark.long
@pytest.mark.parametrize("path", ["models/lstm/stream", "multiplex"])
def test_a_client_that_reads_late_receives_every_answer_in_order(model_file, path):
    count, together, x = 0, 100, random(1, WIDTH)[0]
    many = path == "multiplex"
    with running(model_file, limits=Limits(sessions=4, waiting=128)) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)  # small buffers, of which connections learn
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        client.connect(("127.0.0.1", served.port))
        with connect(f"{served.ws}/{path}", sock=client, max_queue=1) as one:
            if many:
                asked(one, {"open": "lstm"})
            else:
                one.recv()
            (connection,) = served.server.app.state.connections.open
            parts = connection._websocket
            while parts.can_write or not parts.read_paused:
                served.call(asyncio.sleep(0))
                if parts.read_paused:
                    continue  # a client whose frames aren't read fills the buffers, and then `send` never returns
                if many:
                    one.send(message([0] * together, range(count + 1, count + together + 1), x))
                else:
                    for _ in range(together):
                        one.send(x.tobytes())
                count += together
            assert connection._unanswered <= 128 + together
            answered, last = 0, b""
            while answered < count:
                data = one.recv(timeout=60)
                if many:
                    found = frames.unpack(data, ANSWERED)
                    assert (found["frame"] == np.arange(answered + 1, answered + len(found) + 1)).all()
                    answered, last = answered + len(found), found[-1]["row"].tobytes()
                else:
                    answered, last = answered + 1, data
    assert last == stepped(np.broadcast_to(x, (count, WIDTH)))[-1].tobytes()
