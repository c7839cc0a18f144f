"""A worker process for code that may crash its process: a crash there is an exception here.

It starts at the first call and is kept for further calls, as runtimes take seconds to import. It ends with our process
or after a minute without a call. It returns only JSON and arrays of numbers.
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
    """The process never started or ended before it had answered; the message gives the signal or the exit status."""


class _Key(NamedTuple):
    path: tuple[str, ...]
    folder: str
    parent: int
    environment: tuple[tuple[str, str], ...]


class _Worker:
    """The process, and the key that a call has to match: module path, folder, our process id, extra environment."""

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
        """Wait for the process, which has closed its pipes, and return how it ended."""
        self.process.wait()
        status = self.process.returncode
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:200]}" if last else how

    def close(self) -> None:
        """Kill the process; it has nothing to save."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # part of a call was still in its buffer
                continue


_LOCK = threading.Lock()
_kept: list[_Worker] = []


@atexit.register
def _close() -> None:
    """End the process; a fork of ours leaves that to the process that started it."""
    while _kept:
        worker = _kept.pop()
        if worker.key.parent == os.getpid():
            worker.close()


def call(function: str, *arguments: Any, **environment: str) -> tuple[Any, list[Array]]:
    """Call a function in the worker process.

    Args:
        function: the function as `module:name`. It returns a value that JSON can hold, and a list of numeric arrays.
        *arguments: its arguments; they are pickled.
        **environment: environment variables to set in addition to ours. Other values start a new process.

    Returns:
        What the function returned.

    Raises:
        WorkerDiedError: the process ended before it had answered, as when a runtime crashes.
    """
    key = _Key(tuple(map(str, sys.path)), os.getcwd(), os.getpid(), tuple(sorted(environment.items())))
    with _LOCK:
        if _kept and (_kept[0].key != key or _kept[0].process.poll() is not None):
            _close()
        if not _kept:
            _kept.append(_Worker(key))
        try:
            return _kept[0].ask(function, arguments)
        except BaseException:  # Ctrl-C too: a late answer would be taken for that of the next call
            _close()
            raise


def serve() -> None:
    """Answer calls on standard input until it ends, or until none has come for `IDLE` seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the caller ends this one
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what a runtime prints apart from the answers
    while select.select([sys.stdin.buffer], [], [], IDLE)[0]:
        try:
            function, arguments, environment = pickle.load(sys.stdin.buffer)  # written by our parent process
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
