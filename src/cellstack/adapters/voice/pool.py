"""One pool for the voice detection of all streams in a process: windows that arrive together share one step."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cellstack.adapters.voice.loudness import Loudness
from cellstack.formats import load

CAPACITY = 10_000  # streams; memory is allocated for those in use
MANY, PAUSE = 8, 0.004  # after a step of so many streams, the next one waits so many seconds for further streams
SIZES = {16000: (512, 64), 8000: (256, 32)}  # samples of a window by rate, and those repeated from the one before
MODELS = {  # by package, where its wheel has Silero's file
    "pipecat": "audio/vad/data/silero_vad.onnx",
    "silero_vad": "data/silero_vad.onnx",
}
SCALE = np.float32(32768)  # what 16-bit samples are divided by
Result = tuple[float, float]  # the probability of speech and the volume
Answer = asyncio.Future[Result]


class Pool:
    """Silero VAD at one rate for many streams, without threads: it steps them on the event loop that they belong to.

    Args:
        path: Silero's ONNX file.
        rate: 8000 or 16000.

    Raises:
        ValueError: another rate.
        FormatError, OSError: see `cellstack.load`.
    """

    def __init__(self, path: str, rate: int) -> None:
        if rate not in SIZES:
            raise ValueError(f"Silero VAD: expected a sample rate of 8000 or 16000, got {rate}")
        self.rate = rate
        self.size, context = SIZES[rate]
        network = load(path, frames={"input": self.size}, context={"input": context}, constants={"sr": rate})
        self.sessions = network.pool(CAPACITY)
        self.loudness = Loudness(rate, self.size, CAPACITY)
        self._waiting: dict[asyncio.AbstractEventLoop, dict[Voice, tuple[bytes, Answer]]] = {}
        self._next = 0.0  # when the next step may start, by the event loop's clock
        self._dropped: deque[int] = deque()  # sessions that aren't needed any more

    def open(self) -> Voice:
        """Return a new stream.

        Raises:
            RuntimeError: `CAPACITY` streams are open.
        """
        return Voice(self)

    def session(self) -> int:
        """Open a session, after those passed to `drop` were closed."""
        while self._dropped:
            self.sessions.close(self._dropped.popleft())
        return self.sessions.open()

    def drop(self, session: int) -> None:
        """Close a session before the next one is opened. A finaliser may call this at any time."""
        self._dropped.append(session)

    def step(self, voice: Voice, samples: bytes) -> Answer:
        """Step a stream by a window, with all others for which this is called before the step.

        The step is in the next turn of the event loop, or `PAUSE` after the last one if that stepped `MANY` streams.

        Args:
            voice: the stream.
            samples: a window of 16-bit samples.
        """
        loop = asyncio.get_running_loop()
        waiting = self._waiting.get(loop)
        if waiting is not None and voice in waiting:  # its previous caller was cancelled
            self._step_waiting(loop)
            waiting = self._waiting.get(loop)
        if waiting is None:
            for other in [other for other in list(self._waiting) if other.is_closed()]:
                self._waiting.pop(other, None)
            waiting = self._waiting[loop] = {}
            loop.call_later(max(0.0, self._next - loop.time()), self._step_waiting, loop)
        waiting[voice] = samples, loop.create_future()
        return waiting[voice][1]

    def remove(self, voice: Voice) -> None:
        """Take a stream that ends out of the next step."""
        for waiting in list(self._waiting.values()):
            if (found := waiting.pop(voice, None)) is not None:
                error = RuntimeError("Silero VAD: the stream was closed before its last window was stepped")
                _answer(found[1], error)

    def step_now(self, windows: list[tuple[Voice, bytes]]) -> list[Result]:
        """Step different streams by one window each and return what `Voice.step` does."""
        numbers = np.frombuffer(b"".join([samples for _, samples in windows]), "<i2").reshape(-1, self.size)
        x = numbers / SCALE  # float32
        speech = self.sessions.step([voice.session for voice, _ in windows], x)[:, 0]
        slots = np.array([voice.slot for voice, _ in windows])
        return list(zip(speech.tolist(), self.loudness.measure(slots, x.astype(np.float64)).tolist(), strict=True))

    def _step_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._waiting.pop(loop, None)
        if not waiting:
            return
        self._next = loop.time() + PAUSE if len(waiting) >= MANY else 0.0
        results: list[Result] | list[Exception]
        try:
            results = self.step_now([(voice, samples) for voice, (samples, _) in waiting.items()])
        except Exception as error:  # of the step that these callers share
            results = [error] * len(waiting)
        for (_, answer), result in zip(waiting.values(), results, strict=True):
            _answer(answer, result)


class Voice:
    """One stream in a pool, which ends when the object is deleted, or by `close`.

    Attributes:
        slot: of its volume.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.session = pool.session()
        self._close_session = weakref.finalize(self, pool.drop, self.session)
        self.slot = pool.loudness.open()
        self._close_slot = weakref.finalize(self, pool.loudness.close, self.slot)

    def step(self, samples: bytes) -> Answer:
        """Step the stream by one window; the result is the probability of speech and the volume.

        Args:
            samples: a window of 16-bit samples.
        """
        return self.pool.step(self, samples)

    def reset(self) -> None:
        """Set the model's state to the initial one; the volume continues."""
        self._close_session()
        self.session = self.pool.session()
        self._close_session = weakref.finalize(self, self.pool.drop, self.session)

    def close(self) -> None:
        """End the stream."""
        self.pool.remove(self)
        self._close_session()
        self._close_slot()


def _answer(answer: Answer, result: Result | Exception) -> None:
    if answer.done():  # its caller was cancelled
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


@cache
def shared_pool(path: str, rate: int) -> Pool:
    """Return the process's pool for a file and a rate."""
    return Pool(path, rate)


def silero_path(path: str | Path | None, *packages: str) -> str:
    """Return the path of Silero's ONNX file.

    Args:
        path: a path, or None: the file inside the first installed package of `packages`.

    Raises:
        FileNotFoundError: there is no such file, or none of the packages is installed.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"Silero VAD: there is no file {path}")
        return str(Path(path).resolve())
    for package in packages:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (found := Path(folder) / MODELS[package]).is_file():
                return str(found)
    raise FileNotFoundError(
        "Silero VAD: no model file is installed: pip install silero-vad, or pass path= with the path of silero_vad.onnx"
    )
