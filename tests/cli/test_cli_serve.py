"""`cellstack serve` in a process of its own: what it prints, its errors, and how it stops."""

import json
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest

from cellstack import CellSpec, Network
from cellstack.cli.main import main
from cellstack.nodes import Cell, Recurrent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    new = np.random.default_rng(0).standard_normal
    cell = Cell(CellSpec(2, 3), *(new(shape).astype(np.float32) for shape in ((2, 12), (3, 12), (12,))))
    Network([Recurrent((cell,))]).save(path)
    return path


def started(*arguments, **options):
    command = [sys.executable, "-m", "cellstack", "serve", *map(str, arguments), "--port", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.long
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal(model, number, status):
    server = started(model, "--json")
    try:
        said = json.loads(server.stdout.readline())
        assert said["models"][0]["inputs"] == [{"name": "x", "width": 2, "dtype": "float32"}]
        token = httpx.post(f"{said['url']}/models/small/sessions").json()["session"]
        assert httpx.post(f"{said['url']}/sessions/{token}/step", json={"x": [1, 2]}).json()["frame"] == 1
        server.send_signal(signal.SIGHUP)
        assert "small.safetensors hasn't changed" in server.stderr.readline()
        server.send_signal(number)
        rest, errors = server.communicate(timeout=20)
        assert (server.returncode, rest, errors) == (status, "", "")
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no such file"),
        ([__file__], "expected one of safetensors"),
        (["--sessions", "0"], "expected --sessions of at least 1, got 0"),
        (["--connections", "0"], "expected --connections of at least 1, got 0"),
        (["--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
        (["--tls-cert", "nothing.pem"], "--tls-cert: nothing.pem: no such file"),
        (["--tls-cert", __file__], "needs --tls-key"),
        (["--token", ""], "expected a token"),
        (["--host", "203.0.113.1"], "203.0.113.1"),
    ],
)
def test_errors_are_one_line(model, capsys, monkeypatch, arguments, message):
    from cellstack.serve import server

    monkeypatch.setattr(server, "prepare_process", lambda connections: connections)  # this process goes on
    models = [] if not arguments[0].startswith("--") else [str(model)]
    assert main(["serve", *models, *arguments, "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_port_that_is_in_use(model, capsys, monkeypatch):
    from cellstack.serve import server

    monkeypatch.setattr(server, "prepare_process", lambda connections: connections)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"cellstack serve: error: 127.0.0.1:{port}: Address already in use\n"


def test_models_of_the_same_name(model, tmp_path, capsys, monkeypatch):
    from cellstack.serve import server

    monkeypatch.setattr(server, "prepare_process", lambda connections: connections)
    other = tmp_path / model.name
    other.write_bytes(model.read_bytes())
    assert main(["serve", str(model), str(other), "--port", "0"]) == 2
    assert "have the same name, small" in capsys.readouterr().err
