"""Check the files of this folder with the programs that use them, and talk to a server through nginx and TLS.

It needs systemd-analyze, hadolint, kubernetes-validate, nginx and openssl. Run it with the Python of an environment in
which cellstack[serve] is installed.
"""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import cellstack as cs

HERE = Path(__file__).parent
IDLE = 65  # seconds: longer than nginx waits by default for a message of the server
TOKEN = {"Authorization": "Bearer secret"}


def tool(name, *arguments):
    """Run a program, and fail with what it prints if it complains."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        sys.exit(f"{name} isn't installed")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr.strip():
        sys.exit(f"{name} {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    print("ok:", name)


def files(folder):
    """Check the syntax of systemd's, Docker's and Kubernetes' files."""
    unit = folder / "cellstack@.service"
    text = (HERE / unit.name).read_text()
    unit.write_text(text.replace("/opt/cellstack/%i/bin/cellstack", "/bin/true"))  # which exists here
    tool("systemd-analyze", "verify", unit)
    tool("hadolint", HERE / "Dockerfile")
    tool("kubernetes-validate", "--strict", "--quiet", HERE / "kubernetes.yaml")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def process(command, port, **options):
    """Run a program until the block ends; begin when it listens."""
    running = subprocess.Popen(list(map(str, command)), **options)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield running
    finally:
        running.terminate()
        running.wait()


def proxy(folder):
    """Start a server and nginx in front of it, and use them."""
    cert, key, model = folder / "cert.pem", folder / "key.pem", folder / "tagger.safetensors"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,DNS:example.org"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, *name],
        check=True,
        capture_output=True,
    )
    cell = cs.nodes.Cell(cs.CellSpec(3, 4), *(np.ones(shape, np.float32) / 8 for shape in ((3, 16), (4, 16), (16,))))
    cs.Network([cs.nodes.Recurrent((cell,))]).save(model)
    ports = {name: free_port() for name in ("443", "127.0.0.1:8080")}
    site = (HERE / "nginx.conf").read_text().replace("/etc/ssl/cellstack", str(folder))
    for old, new in ports.items():
        address, _, number = old.rpartition(":")
        wanted = f"//{old}" if address else f"listen {number} "
        assert wanted in site, wanted
        site = site.replace(wanted, f"//{address}:{new}" if address else f"listen {new} ")
    (folder / "site.conf").write_text(site)
    main = f"pid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{ include {folder}/site.conf; }}\n"
    (folder / "nginx.conf").write_text(main)
    port, server_port = ports.values()
    serve = [sys.executable, "-m", "cellstack", "serve", model, "--port", server_port]
    nginx = [shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or sys.exit("nginx isn't installed")]
    nginx += ["-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"]
    trust = ssl.create_default_context(cafile=cert)
    with (
        process(serve, server_port, env={**os.environ, "CELLSTACK_TOKEN": "secret"}) as server,
        process(nginx, port),
    ):
        over_http(f"https://localhost:{port}", trust)
        over_websockets(f"wss://localhost:{port}", trust, server)


def over_http(url, trust):
    """Step a session, and send a large body and one that is too large."""

    def ask(path, body=None, **headers):
        request = urllib.request.Request(url + path, body, {**TOKEN, **headers})
        with urllib.request.urlopen(request, context=trust) as answer:
            return answer.read()

    assert b"cellstack serve" in ask("/", Origin=url)
    token = json.loads(ask("/models/tagger/sessions", b""))["session"]
    assert json.loads(ask(f"/sessions/{token}/step", b'{"x": [1, 2, 3]}'))["frame"] == 1
    long = json.dumps({"x": [[[0.25, 0.5, 0.125]] * 100_000]}).encode()
    assert len(json.loads(ask("/models/tagger/run", long))["y"][0]) == 100_000
    status = 200
    try:
        ask("/models/tagger/run", bytes(17 << 20))
    except urllib.error.HTTPError as error:
        status = error.code
    assert status == 413, f"a body of 17 MB: {status}"
    print(f"ok: HTTP, a body of {len(long) / 1e6:.1f} MB")


def close_code(connection):
    """Wait until the server closes a WebSocket; return the code."""
    with contextlib.suppress(ConnectionClosed):
        connection.recv()
    return connection.close_code


def over_websockets(url, trust, server):
    """Use both WebSocket protocols before and after a time without messages, and while the server stops."""
    x = np.ones(3, "<f4").tobytes()

    def frames(number):
        return np.array([(1, 0, 0, 1)], "<u1, <u1, <u2, <u4").tobytes() + np.array([0, number], "<u4").tobytes() + x

    options = {"additional_headers": TOKEN, "ssl": trust}
    with connect(f"{url}/models/tagger/stream", **options) as one, connect(f"{url}/multiplex", **options) as many:
        assert json.loads(one.recv())["frame"] == 0
        many.send('{"id": 1, "open": "tagger"}')
        assert json.loads(many.recv())["opened"][0]["number"] == 0
        for frame in (1, 2):
            one.send(x)
            many.send(frames(frame))
            assert one.recv() == many.recv()[16:]
            print("ok: WebSockets" + f", after {IDLE} seconds without a message" * (frame == 2))
            time.sleep(IDLE if frame == 1 else 0)
        server.terminate()
        assert close_code(one) == close_code(many) == 1012
        print("ok: WebSockets are closed with code 1012 when the server stops")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        files(Path(made))
        proxy(Path(made))
