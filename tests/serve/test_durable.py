"""Durable sessions: kill -9, restarts, full disks, damaged files, the levels."""

import asyncio
import errno
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from durable_server import H, KEPT, WIDTH, model, network, records

from cellstack.serve import durable, generations
from cellstack.serve.durable import Store
from cellstack.serve.models import ServeError
from cellstack.spec import FormatError

SERVER = Path(__file__).with_name("durable_server.py")


class Process:
    """A process of durable_server.py."""

    def __init__(self, folder, **options):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, self.counts, self.restored = self.read()

    def read(self):
        return pickle.load(self.process.stdout)

    def send(self, *message):
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def ask(self, *message):
        self.send(*message)
        return self.read()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Client:
    """Sessions that step frame after frame, with the answers of uninterrupted streams."""

    def __init__(self, seed, sessions):
        self.random = np.random.default_rng(seed)
        self.streams = {f"token-{n}": network().stream() for n in range(sessions)}
        self.x = {token: [] for token in self.streams}
        self.y = {token: [] for token in self.streams}
        self.acknowledged = dict.fromkeys(self.streams, 0)
        self.open = set()

    def frame(self, token, number):
        """Return the input of a frame, from 1."""
        while len(self.x[token]) < number:
            x = self.random.standard_normal(WIDTH).astype(np.float32)
            self.x[token].append(x)
            self.y[token].append(self.streams[token].step(x[None])[0])
        return self.x[token][number - 1]

    def check(self, token, number, answer):
        assert np.array_equal(answer, self.y[token][number - 1]), f"frame {number} of {token}"
        self.acknowledged[token] = max(self.acknowledged[token], number)

    def reconnect(self, process):
        """Compare the restored sessions with what was acknowledged; return the number of the last frame of each."""
        assert self.open <= process.counts.keys()
        for token, count in process.counts.items():
            last = self.acknowledged[token]
            assert last <= count <= len(self.x[token])
            assert count - last <= KEPT
            self.open.add(token)
            process.send("answers", token, last)
        for _ in process.counts:
            _, token, last, answers = process.read()
            assert len(answers) == process.counts[token] - last
            for n, answer in enumerate(answers):
                self.check(token, last + 1 + n, answer)
        return dict(process.counts)

    def run(self, process, seconds):
        """Send frames until the process is killed after some time."""
        sent = self.reconnect(process)
        for token in list(self.streams)[: len(self.open) + 8]:
            if token not in self.open:
                assert process.ask("open", token) == ("opened", token)
                self.open.add(token)
                sent[token] = 0
        killer = threading.Timer(seconds, process.process.kill)
        killer.start()
        waiting = 0
        try:
            while True:
                for _ in range(2 - waiting):
                    tokens = self.random.choice(sorted(self.open), self.random.integers(1, 2 * len(self.open))).tolist()
                    tokens = [t for n, t in enumerate(tokens) if tokens[:n].count(t) < KEPT // 2]
                    x = []
                    for token in tokens:
                        sent[token] += 1
                        x.append(self.frame(token, sent[token]))
                    waiting += 1
                    process.send("step", tokens, np.array(x))
                _, tokens, numbers, answers, refused = process.read()
                waiting -= 1
                assert not refused
                for token, number, answer in zip(tokens, numbers, answers, strict=True):
                    self.check(token, number, answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            killer.join()
            process.process.wait()
            for stream in (process.process.stdin, process.process.stdout):
                try:
                    stream.close()
                except BrokenPipeError:  # what it still buffers
                    stream.close()


def kill_at_random_moments(folder, times, seed):
    client = Client(seed, 40)
    generations = set()
    for _ in range(times):
        # A generation lasts some 20 batches, so that many are killed while a snapshot is written.
        process = Process(folder, constants={"LARGEST": 400_000})
        client.run(process, client.random.uniform(0.02, 0.35))
        generations |= {path.name for path in folder.glob("lstm-*/*.log")}
    process = Process(folder)
    client.reconnect(process)
    process.kill()
    assert sum(client.acknowledged.values()) > 100 * times
    assert len(generations) > times  # more than the one that every start begins


def test_every_session_continues_after_kills(tmp_path):
    kill_at_random_moments(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_every_session_continues_after_many_kills(tmp_path):
    kill_at_random_moments(tmp_path, 100, seed=1)
