"""A process beside ours for code that may take its process along when it fails: what dies there is an error here.

It is started at the first call, kept for the next ones, as runtimes take seconds to import, and ends with ours or when
nobody has asked for a minute. Only JSON and numbers come back from it.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cellstack.nodes.base import Array

IDLE = 60.0  # seconds without a call after which the process ends
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cellstack.formats import worker; worker.serve()"
LENGTH = struct.Struct("<Q")


class WorkerDiedError(Exception):
    """The process ended before it had answered: by which signal, with which status, or that it never started."""


class _Key(NamedTuple):
    path: tuple[str, ...]
    folder: str
    parent: int
    environment: tuple[tuple[str, str], ...]


class _Worker:
    """The process, and what makes it the one that a call needs: module path, folder, our id, its own environment."""

    def __init__(self, key: _Key) -> None:
        self.key, self.errors = key, tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(key.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={**os.environ, **dict(key.environment)},
            )
        except OSError as error:  # no interpreter, where ours is part of another program
            self.errors.close()
            raise WorkerDiedError(f"could not be started: {error}") from None

    def ask(self, function: str, arguments: tuple[Any, ...]) -> tuple[Any, list[Array]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            environment = {**os.environ, **dict(self.key.environment)}
            pickle.dump((function, arguments, environment), self.process.stdin)
            self.process.stdin.flush()
            said = json.loads(_received(self.process.stdout))
            arrays = np.load(io.BytesIO(_received(self.process.stdout)), allow_pickle=False)
        except (BrokenPipeError, EOFError):
            raise WorkerDiedError(self.end()) from None
        return said, [arrays[name] for name in arrays.files]

    def end(self) -> str:
        """Wait for a process that has closed its pipes, and return how it ended."""
        self.process.wait()
        status = self.process.returncode
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:200]}" if last else how

    def close(self) -> None:
        """End it, whatever it is doing; it has nothing to save."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # half a call was in its buffer
                continue


_LOCK = threading.Lock()
_kept: list[_Worker] = []


@atexit.register
def _close() -> None:
    """End the process that is kept; a process that was forked leaves it to the one that started it."""
    while _kept:
        worker = _kept.pop()
        if worker.key.parent == os.getpid():
            worker.close()


def call(function: str, *arguments: Any, **environment: str) -> tuple[Any, list[Array]]:
    """Call a function in the process beside ours.

    Args:
        function: where it is, `module:name`. It returns what JSON can hold, and arrays of numbers.
        *arguments: what it is called with; they are pickled.
        **environment: variables that the process starts with beside ours, which may change from call to call.

    Returns:
        What the function returned.

    Raises:
        WorkerDiedError: the process ended before it had answered, as a runtime may that crashes.
    """
    key = _Key(tuple(map(str, sys.path)), os.getcwd(), os.getpid(), tuple(sorted(environment.items())))
    with _LOCK:
        if _kept and (_kept[0].key != key or _kept[0].process.poll() is not None):
            _close()
        if not _kept:
            _kept.append(_Worker(key))
        try:
            return _kept[0].ask(function, arguments)
        except BaseException:  # Ctrl-C too: an answer that is still to come would be taken for the next one's
            _close()
            raise


def serve() -> None:
    """Answer calls on standard input until it ends, or until nobody has called for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both of us; who waits for the answer ends this one
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer
    while select.select([sys.stdin.buffer], [], [], IDLE)[0]:
        try:
            function, arguments, environment = pickle.load(sys.stdin.buffer)  # what our own parent has written
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        module, _, name = function.partition(":")
        said, arrays = getattr(import_module(module), name)(*arguments)
        buffer = io.BytesIO()
        np.savez(buffer, *arrays)
        for part in (json.dumps(said).encode(), buffer.getvalue()):
            out.write(LENGTH.pack(len(part)) + part)
        out.flush()


def _received(pipe: BinaryIO | Any) -> bytes:
    head = pipe.read(LENGTH.size)
    data = pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if not data:
        raise EOFError
    return data
