"""Clients that send much, or little for long: a session beside them keeps its bits, and the server its memory."""

import threading

import numpy as np
import pytest
from floods import FLOODS, TOKEN, flooded, resident, serving
from serving import WIDTH, lstm
from websockets.sync.client import connect

QUICK = ("handshake with a long line", "pipelined requests", "empty fragments")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "loop"),
    [(name, "uvloop") if name in QUICK else pytest.param(name, "uvloop", marks=pytest.mark.slow) for name in FLOODS]
    + [pytest.param(name, "asyncio", marks=pytest.mark.slow) for name in FLOODS],
)
def test_a_flood(model_file, name, loop):
    stream, seconds = lstm().stream(), 0.5
    url, headers = "ws://127.0.0.1:{}/models/lstm/stream", {"Authorization": f"Bearer {TOKEN}"}
    with serving(model_file, "--token", TOKEN, loop=loop) as (process, port):
        with connect(url.format(port), additional_headers=headers, ping_interval=None) as own:
            own.recv()
            before, left = resident(process.pid), []
            flood = threading.Thread(target=lambda: left.extend(flooded(port, FLOODS[name], seconds)[2]))
            flood.start()
            while flood.is_alive():
                x = np.random.default_rng(0).standard_normal((1, WIDTH)).astype(np.float32)
                own.send(x.tobytes())
                assert own.recv(timeout=60) == stream.step(x)[0].tobytes()
            flood.join()
            assert resident(process.pid, "VmHWM") < before + 40, "MB"
            process.terminate()  # while the flood's connections are open
            assert process.wait(60) == 0
        for one in left:
            one.socket.close()
