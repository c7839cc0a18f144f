"""A server in a thread of the test's process, with a small LSTM."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time

import numpy as np

from cellstack import CellSpec, Network
from cellstack.nodes import Cell, Recurrent
from cellstack.serve import Limits, Model, Models, frames
from cellstack.serve.server import Server, ServerSettings, listen

WIDTH, UNITS = 3, 5


def lstm(width=WIDTH, units=UNITS, seed=0):
    new = np.random.default_rng(seed).standard_normal
    shapes = (width, 4 * units), (units, 4 * units), (4 * units,)
    return Network([Recurrent((Cell(CellSpec(width, units), *(new(shape).astype(np.float32) for shape in shapes)),))])


def records(model, x):
    rows = np.zeros(len(x), model.rows.inputs)
    rows["x"] = x
    return rows


def wait_until(condition, seconds=60):
    """Wait until a condition holds; the limit is far above what a busy machine needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.002)


def with_model(test, network, **limits):
    """Run an asynchronous test with a model without a server."""

    async def all_of_it():
        model = Model("lstm", network, Limits(**limits))
        model.start(asyncio.get_running_loop())
        try:
            await test(model)
        finally:
            model.stop()

    asyncio.run(all_of_it())


@dataclasses.dataclass
class Running:
    """A running server with the socket that listens: `call` runs a coroutine function on its event loop."""

    server: Server
    socket: socket.socket
    loop: asyncio.AbstractEventLoop
    port: int
    reports: list

    @property
    def http(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self):
        return f"ws://127.0.0.1:{self.port}"

    @property
    def models(self):
        return self.server.models

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextlib.contextmanager
def running(*paths, limits=None, threads=1, options=None, **settings):
    """Serve the models in these files while the context is open."""
    limits = limits or Limits(sessions=64)
    models = Models(limits, threads, options)
    for path in paths:
        models.add(path)
    chosen = ServerSettings(port=0, limits=limits, threads=threads, **settings)
    listening, reports = listen(chosen.host, chosen.port), []
    server = Server(models, chosen, reports.append)
    loops = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve([listening])

    port = listening.getsockname()[1]
    factory = server.config.get_loop_factory()

    def run():
        loop = factory()
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    while not server.ready:
        assert thread.is_alive()
        time.sleep(0.001)
    try:
        yield Running(server, listening, loops[0], port, reports)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def unpack_refused(message):
    """Return what `frames.pack_refused` was given."""
    start = frames.HEADER.size + frames.header(message)[2] * frames.REFUSAL.itemsize
    records = frames.unpack(message[:start], frames.REFUSAL)
    ends = start + np.cumsum(records["length"], dtype=np.int64)
    if len(message) != (ends[-1] if len(ends) else start):
        raise ValueError("expected a message that ends with its last reason")
    found = zip(records["number"].tolist(), records["frame"].tolist(), records["length"].tolist(), ends, strict=True)
    return [(number, frame, message[end - length : end].decode()) for number, frame, length, end in found]
