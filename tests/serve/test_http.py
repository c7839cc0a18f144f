"""The HTTP API of a real server."""

import json
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from serving import UNITS, WIDTH, lstm, running, wait_until

from cellstack import Network
from cellstack.formats.state import state_to_bytes
from cellstack.nodes import Bidirectional, Recurrent
from cellstack.serve import Limits, texts


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.http) as found:
        yield found


def stepped(x, seed=0):
    stream = lstm(seed=seed).stream()
    return np.stack([stream.step(np.asarray(row, np.float32)[None])[0] for row in x])


def opened(client):
    answer = client.post("/models/lstm/sessions")
    assert answer.status_code == 201
    return answer.json()["session"]


def test_a_model_is_described(client):
    model = client.get("/models/lstm").json()
    assert client.get("/models").json()["models"][0]["name"] == "lstm"
    assert model["inputs"] == [{"name": "x", "width": WIDTH, "dtype": "float32"}]
    assert (model["outputs"][0]["width"], model["streams"], model["why_not"]) == (UNITS, True, None)


def test_health_and_readiness(client, served):
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    served.server.ready = False
    try:
        assert client.get("/ready").status_code == 503
    finally:
        served.server.ready = True


def test_steps_have_the_bits_of_a_stream(client):
    x = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    token = opened(client)
    first = client.post(f"/sessions/{token}/step", json={"x": x[0].tolist()}).json()
    rest = client.post(f"/sessions/{token}/steps", json={"x": x[1:].tolist()}).json()
    assert (first["frame"], rest["frame"]) == (1, 5)
    assert (np.float32([first["y"], *rest["y"]]) == stepped(x)).all()
    assert client.get(f"/sessions/{token}").json()["frames"] == 5


def test_whole_sequences(client):
    x = np.random.default_rng(1).standard_normal((2, 4, WIDTH)).astype(np.float32)
    y = client.post("/models/lstm/run", json={"x": x.tolist()}).json()["y"]
    assert (np.float32(y) == lstm()(x)).all()


def test_a_state_moves_to_another_session(client):
    x = np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32)
    one = opened(client)
    client.post(f"/sessions/{one}/steps", json={"x": x[:2].tolist()})
    two = client.post("/models/lstm/sessions", content=client.get(f"/sessions/{one}/state").content).json()
    assert two["frames"] == 2
    y = client.post(f"/sessions/{two['session']}/steps", json={"x": x[2:].tolist()}).json()["y"]
    assert (np.float32(y) == stepped(x)[2:]).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_a_state_that_is_not_finite_is_refused(client, number, part):
    net = lstm()
    state = net.stream().state
    state[0][part][0, 2] = number
    answer = client.post("/models/lstm/sessions", content=state_to_bytes(net, state))
    error = f"state: tensor 'cell_0/{'hc'[part]}': expected finite numbers, found NaN or infinity"
    assert (answer.status_code, answer.json()) == (400, {"error": error})


@pytest.mark.parametrize("frames", ["-1", "1.5", "x", "9" * 19])
def test_a_state_with_an_impossible_number_of_frames_is_refused(client, frames):
    net = lstm()
    answer = client.post("/models/lstm/sessions", content=state_to_bytes(net, net.stream().state, frames=frames))
    error = f"state: expected frames to be the number of a frame, got {frames!r}"
    assert (answer.status_code, answer.json()) == (400, {"error": error})


def test_a_session_keeps_its_token(client):
    token = "0123456789abcdef"
    assert client.post(f"/models/lstm/sessions?token={token}").json()["session"] == token
    assert client.post("/models/lstm/sessions", headers={"token": token}).status_code == 409
    assert client.delete(f"/sessions/{token}").status_code == 204
    answer = client.get(f"/sessions/{token}")
    assert (answer.status_code, answer.json()) == (404, {"error": "no session with this token is open"})


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("step", {"x": [1, 2]}, 400, "x: expected 3 numbers, got shape [2]"),
        ("step", {"x": [1, None, 2]}, 400, "x: expected 3 numbers, got values that aren't numbers"),
        ("step", {"y": [1, 2, 3]}, 400, 'expected a JSON object with the key "x"'),
        ("step", {"x": [True, 0, 1]}, 400, "x: expected 3 numbers, got values that aren't numbers"),
        (
            "steps",
            {"x": [[1, 0, 1], [1, 0, False]]},
            400,
            "step 1: x: expected 3 numbers, got values that aren't numbers",
        ),
        ("step", {"x": [1, 0, 1], "y": 2}, 400, "expected no other keys than x, got 'y'"),
        ("step", {"x": [1, float("nan"), 2]}, 400, "the frame contains NaN or infinity"),
        ("step", {"x": [1, 1e300, 2]}, 400, "the frame contains NaN or infinity"),
        ("step", {"x": [1, 10**400, 2]}, 400, "x: expected 3 numbers, got values that aren't numbers"),
        ("steps", {"x": []}, 400, "x: expected a list of one or more steps"),
        ("steps", {"x": [[1, 2, 3], [1]]}, 400, "step 1: x: expected 3 numbers, got shape [1]"),
    ],
)
def test_refused_steps(client, path, body, status, message):
    token = opened(client)
    text = (
        repr(body)
        .replace("'", '"')
        .replace("nan", "NaN")
        .replace("None", "null")
        .replace("True", "true")
        .replace("False", "false")
    )
    answer = client.post(f"/sessions/{token}/{path}", content=text)
    assert (answer.status_code, answer.json()["error"]) == (status, message)


@pytest.mark.parametrize("path", ["step", "steps", "run"])
def test_a_key_that_occurs_twice_is_refused(client, path):
    of = "models/lstm" if path == "run" else f"sessions/{opened(client)}"
    answer = client.post(f"/{of}/{path}", content='{"x": [[[0, 0, 0]]], "x": [[[1, 1, 1]]]}')
    error = "expected JSON: the key 'x' occurs more than once"
    assert (answer.status_code, answer.json()) == (400, {"error": error})


def test_a_refused_frame_counts_and_a_step_that_is_no_frame_does_not(client):
    token = opened(client)
    for content in ('{"x": [1, NaN, 1]}', '{"x": [1, 1]}', '{"x": [1, 1, true]}'):
        assert client.post(f"/sessions/{token}/step", content=content).status_code == 400
    found = client.post(f"/sessions/{token}/step", json={"x": [1, 1, 1]}).json()
    assert found["frame"] == 2
    assert (np.float32([found["y"]]) == stepped(np.ones((1, WIDTH)))).all()


def test_refused_frames_among_others_leave_the_state(client):
    token = opened(client)
    text = '{"x": [[1, 1, 1], [1, NaN, 1], [1, 1, 1]]}'
    found = client.post(f"/sessions/{token}/steps", content=text).json()
    assert found["refused"] == {"1": "the frame contains NaN or infinity"}
    assert found["y"][1] is None
    assert (np.float32([found["y"][0], found["y"][2]]) == stepped(np.ones((2, WIDTH)))).all()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("GET", "/models/other", None, 404),
        ("PUT", "/models", None, 405),
        ("POST", "/sessions/none/step", b'{"x": 1}', 404),
        ("POST", "/models/lstm/run", b"{", 400),
        ("POST", "/models/lstm/run", b"[" * 100_000, 400),
        ("POST", "/models/lstm/run", b'{"x": [[[1, 2], [1]]]}', 400),
        ("POST", "/models/lstm/run", b'{"x": [[["a"]]]}', 400),
        ("POST", "/models/lstm/run", b'{"x": [[[1, true, 0]]]}', 400),
        ("POST", "/models/lstm/run", b'{"x": [[[1, 2, 0]]], "mask": [[true]]}', 400),
        ("POST", "/models/lstm/run", b'{"x": {"z": 1}}', 400),
        ("POST", "/models/lstm/run", b'{"x": [[[1, 2]]]}', 400),
        ("POST", "/models/lstm/sessions", b"not a state", 400),
        ("POST", "/models/lstm/sessions?token=short", None, 400),
    ],
)
def test_errors_are_json(client, method, path, body, status):
    answer = client.request(method, path, content=body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/models/other", "no model 'other': this server has lstm"),
        ("/models/lstm?version=7", "lstm has no version '7': this server has 1"),
    ],
)
def test_an_unknown_model(client, path, error):
    answer = client.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": error})


def test_a_network_without_sessions_runs_whole_sequences(tmp_path):
    forward, backward = (Recurrent((lstm(seed=n).cells[0],), go_backwards=n == 1) for n in range(2))
    Network([Bidirectional(forward, backward)]).save(tmp_path / "both.safetensors")
    with running(tmp_path / "both.safetensors") as served, httpx.Client(base_url=served.http) as client:
        model = client.get("/models/both").json()
        assert not model["streams"]
        assert model["why_not"].startswith("layer_0 can't run step by step")
        assert client.post("/models/both/sessions").status_code == 400
        assert np.shape(client.post("/models/both/run", json={"x": [[[1, 2, 3]]]}).json()["y"]) == (1, 1, 2 * UNITS)


def test_more_sessions_than_allowed(model_file):
    with running(model_file, limits=Limits(sessions=2)) as served, httpx.Client(base_url=served.http) as client:
        tokens = [opened(client) for _ in range(2)]
        answer = client.post("/models/lstm/sessions")
        assert (answer.status_code, answer.json()) == (503, {"error": "all 2 sessions of lstm are in use"})
        client.delete(f"/sessions/{tokens[0]}")
        opened(client)


def test_a_reload_leaves_open_sessions_with_their_version(tmp_path):
    path = tmp_path / "lstm.safetensors"
    lstm().save(path)
    with running(path) as served, httpx.Client(base_url=served.http) as client:
        old = opened(client)
        served.call(served.server.reload())
        path.write_bytes(b"damaged")
        served.call(served.server.reload())
        lstm(seed=5).save(path)
        served.call(served.server.reload())
        new = opened(client)
        assert [text.split(": ", 1)[1] for text in served.reports[::2]] == [
            f"{path} hasn't changed",
            "loaded version 2 for new sessions",
        ]
        assert "version 1 stays" in served.reports[1]
        for token, seed in ((old, 0), (new, 5)):
            y = client.post(f"/sessions/{token}/step", json={"x": [1, 1, 1]}).json()["y"]
            assert (np.float32(y) == stepped(np.ones((1, WIDTH)), seed)[0]).all()
        client.delete(f"/sessions/{old}")
        served.call(served.models.drop_unused())
        assert [model.version for model in served.models.all()] == [2]


def test_idle_sessions_are_closed(model_file):
    with running(model_file, limits=Limits(sessions=4, idle=0.05)) as served, httpx.Client(base_url=served.http) as c:
        token = opened(c)
        wait_until(lambda: c.get(f"/sessions/{token}").status_code != 200)


def test_the_rate_of_a_session_is_limited(model_file):
    limits = Limits(sessions=4, rate=10)
    with running(model_file, limits=limits) as served, httpx.Client(base_url=served.http) as client:
        token, other = opened(client), opened(client)
        assert client.post(f"/sessions/{token}/steps", json={"x": [[0, 0, 0]] * 20}).json()["frame"] == 20
        answer = client.post(f"/sessions/{token}/step", json={"x": [0, 0, 0]})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"] == "expected at most 10 frames per second: wait 1 s"
        assert client.post(f"/sessions/{other}/step", json={"x": [0, 0, 0]}).status_code == 200
        served.models.session(token).due -= 1  # a second later
        assert client.post(f"/sessions/{token}/step", json={"x": [0, 0, 0]}).json()["frame"] == 21


# ── long bodies ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_long_sequences(client):
    x = np.random.default_rng(3).standard_normal((2, 3000, WIDTH)).astype(np.float32)
    expected = lstm()(x)
    y = client.post("/models/lstm/run", json={"x": x.tolist()}).json()["y"]
    assert (np.float32(y) == expected).all()
    y = client.post(f"/sessions/{opened(client)}/steps", json={"x": x[0].tolist()}).json()["y"]
    assert (np.float32(y) == expected[0]).all()


@pytest.mark.parametrize("shape", [(), (3,), (10_000,), (2, 5000), (5000, 2), (1, 3, 4000), (5000, 1, 1), (0,), (2, 0)])
def test_conversion_in_pieces(shape):
    values = np.random.default_rng(0).standard_normal(shape)
    assert json.loads(texts.text_of_array(values)) == values.tolist()
    assert texts.array_of(values.tolist()).tolist() == values.tolist()
    assert texts.loads(json.dumps(values.tolist())) == values.tolist()


@pytest.mark.parametrize("values", [[[1.0] * 5000, [1.0]], [[1.0]] * 5000 + [[]]])
def test_lists_of_different_lengths_in_pieces(values):
    with pytest.raises(ValueError, match=r"must match|same shape|inhomogeneous"):
        texts.array_of(values)


def test_other_threads_run_while_a_long_text_is_read():
    text, count, interval = json.dumps([0.123456] * 300_000), 0, sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        reading = threading.Thread(target=texts.loads, args=(text,))
        reading.start()
        while reading.is_alive():
            time.sleep(0.0005)
            count += 1
    finally:
        sys.setswitchinterval(interval)
    assert count > 5  # one with json.loads, which holds the interpreter's lock
