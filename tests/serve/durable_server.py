"""A process with durable sessions and without a port, for test_durable.py: messages over its standard streams."""

import asyncio
import json
import os
import pickle
import sys
import threading
import traceback
from pathlib import Path

import numpy as np

from cellstack import CellSpec, Network
from cellstack.nodes import Cell, Recurrent
from cellstack.serve import durable, journal
from cellstack.serve.models import Limits, Model

WIDTH, H, KEPT = 4, 8, 16


def network(seed=0):
    new = np.random.default_rng(seed).standard_normal
    cell = Cell(
        CellSpec(WIDTH, H), *(new(shape).astype(np.float32) for shape in ((WIDTH, 4 * H), (H, 4 * H), (4 * H,)))
    )
    return Network([Recurrent((cell,))])


def model(seed=0, sessions=64, kept=KEPT):
    return Model("lstm", network(seed), Limits(sessions=sessions, kept=kept), digest=f"{seed:064}")


def records(model, x):
    rows = np.zeros(len(x), model.rows.inputs)
    rows["x"] = x
    return rows


def say(message):
    pickle.dump(message, sys.stdout.buffer)
    sys.stdout.buffer.flush()


class Server:
    """Answers messages `(what, …)`."""

    def __init__(self, model):
        self.model, self.tasks = model, set()

    def on_message(self, message):
        task = asyncio.get_running_loop().create_task(getattr(self, message[0])(*message[1:]))
        task.add_done_callback(self.done)
        self.tasks.add(task)

    def done(self, task):
        if error := task.exception():  # the test waits for an answer
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)

    async def open(self, token):
        await self.model.open(token=token)
        say(("opened", token))

    async def close(self, token):
        await self.model.close(self.model.sessions[token])
        say(("closed", token))

    async def step(self, tokens, x):
        sessions = [self.model.sessions[token] for token in tokens]
        numbers = []
        for session in sessions:
            numbers.append(session.accepted + 1 + sessions[: len(numbers)].count(session))
        name = self.model.rows.outputs.names[0]
        self.model.submit(
            sessions,
            records(self.model, x),
            lambda answers: say(("stepped", tokens, numbers, answers.rows[name].copy(), answers.refused)),
        )

    async def answers(self, token, last):
        name = self.model.rows.outputs.names[0]
        stored = await self.model.answers_after(self.model.sessions[token], last)
        say(("answers", token, last, [np.array(row[name]) for row, _ in stored]))

    async def stop(self):
        await asyncio.get_running_loop().run_in_executor(None, self.model.stop)
        say(("ended",))


async def main(folder, options):
    served = model(**options.pop("model", {}))
    store = durable.Store(folder, **options)
    restored = store.restore(served)
    served.start(asyncio.get_running_loop())
    server, loop = Server(served), asyncio.get_running_loop()
    ended = asyncio.Event()

    def read():
        try:
            while True:
                message = pickle.load(sys.stdin.buffer)
                loop.call_soon_threadsafe(server.on_message, message)
                if message[0] == "stop":
                    break
        except EOFError:
            pass
        loop.call_soon_threadsafe(ended.set)

    say(("started", {token: session.processed for token, session in served.sessions.items()}, restored))
    threading.Thread(target=read, daemon=True).start()
    await ended.wait()
    await asyncio.gather(*server.tasks)
    store.close()


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    for name, value in given.pop("constants", {}).items():
        setattr(journal, name, value)
    if (limit := given.pop("largest_file", None)) is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    asyncio.run(main(Path(sys.argv[1]), given))
