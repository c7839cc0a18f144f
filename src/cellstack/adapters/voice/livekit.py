"""Silero VAD for livekit-agents, on the process's pool.

Ref: livekit-agents, `livekit.plugins.silero.VAD`, whose events these streams reproduce, https://docs.livekit.io/agents
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from cellstack.adapters.voice.pool import Pool, Result, shared_pool, silero_path

try:
    from livekit import rtc  # pyright: ignore[reportMissingImports]
    from livekit.agents.metrics import VADMetrics  # pyright: ignore[reportMissingImports]
    from livekit.agents.metrics.base import Metadata  # pyright: ignore[reportMissingImports]
    from livekit.agents.vad import VAD, VADCapabilities, VADEvent, VADEventType, VADStream  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("LiveKitVAD needs livekit-agents: pip install livekit-agents", name=error.name) from error

__all__ = ["LiveKitVAD"]

SMOOTHING = 0.35  # the share of the previous probability in the smoothed one
SLOW = 0.2  # seconds for a window that are reported

logger = logging.getLogger("cellstack.adapters.voice")


@dataclass
class Options:
    """The parameters of `LiveKitVAD` that may change while its streams run."""

    min_speech_duration: float
    min_silence_duration: float
    prefix_padding_duration: float
    max_buffered_speech: float
    activation_threshold: float
    deactivation_threshold: float


class LiveKitVAD(VAD):
    """`livekit.plugins.silero.VAD` without calls to a thread pool: the streams of a process share one pool of sessions.

    Windows that arrive in the same turn of the event loop share one step. The events, the parameters and their defaults
    are those of `silero.VAD.load`.

    Args:
        min_speech_duration: seconds of speech before it is reported.
        min_silence_duration: seconds of silence that end speech.
        prefix_padding_duration: seconds of audio before the speech that its events contain.
        max_buffered_speech: seconds of speech that are stored for its events.
        activation_threshold: the smoothed probability from which a window is speech.
        sample_rate: 8000 or 16000, of the model; audio of another rate is resampled.
        onnx_file_path: Silero's file; None: the one in the installed livekit-plugins-silero or silero-vad.
        deactivation_threshold: during speech, the probability above which a window is speech; None:
            `activation_threshold - 0.15`, at least 0.01.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another sample rate, or a deactivation threshold that isn't positive.

    Example::

        AgentSession(vad=LiveKitVAD(min_silence_duration=0.3))
    """

    def __init__(
        self,
        *,
        min_speech_duration: float = 0.05,
        min_silence_duration: float = 0.55,
        prefix_padding_duration: float = 0.5,
        max_buffered_speech: float = 60.0,
        activation_threshold: float = 0.5,
        sample_rate: int = 16000,
        onnx_file_path: str | Path | None = None,
        deactivation_threshold: float | None = None,
    ) -> None:
        super().__init__(capabilities=VADCapabilities(update_interval=0.032))
        if deactivation_threshold is None:
            deactivation_threshold = max(activation_threshold - 0.15, 0.01)
        if deactivation_threshold <= 0:
            raise ValueError(f"LiveKitVAD: expected deactivation_threshold > 0, got {deactivation_threshold}")
        self._pool = shared_pool(silero_path(onnx_file_path, "livekit", "silero_vad", "pipecat"), sample_rate)
        self._options = Options(
            min_speech_duration,
            min_silence_duration,
            prefix_padding_duration,
            max_buffered_speech,
            activation_threshold,
            deactivation_threshold,
        )

    @property
    def model(self) -> str:
        """The model's name, for metrics."""
        return "silero"

    @property
    def provider(self) -> str:
        """The engine's name, for metrics."""
        return "cellstack"

    @property
    def min_silence_duration(self) -> float:
        """Seconds of silence that end speech."""
        return self._options.min_silence_duration

    def stream(self) -> Stream:
        """Return a new stream; the event loop must be running."""
        return Stream(self, self._pool, self._options)

    def update_options(self, **options: float) -> None:
        """Change parameters, also of the streams that are open.

        Args:
            options: parameters of the constructor, but for `sample_rate` and `onnx_file_path`.

        Raises:
            TypeError: another name.
        """
        for name, value in options.items():
            if name not in (field.name for field in fields(Options)):
                raise TypeError(f"LiveKitVAD: {name} can't be changed")
            setattr(self._options, name, value)


class Stream(VADStream):
    """One stream of audio: `push_frame`, `flush`, `end_input`, and iteration over its events.

    Frames are processed in `push_frame`, and windows when the pool has stepped them, so that no task runs per stream.
    """

    def __init__(self, vad: LiveKitVAD, pool: Pool, options: Options) -> None:
        self._options, self._pool = options, pool
        self._voice = pool.open(32767)
        self._bytes, self._seconds = 2 * pool.size, pool.size / pool.rate  # of a window
        self._rate = 0  # of the audio, from its first frame
        self._frames: deque[rtc.AudioFrame | None] = deque()  # pushed while a window is stepped; None: a flush
        self._stepping = self._ended = False
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events: deque[VADEvent] = deque()
        self._reader: asyncio.Future[None] | None = None  # who waits for the next event
        self._measured, self._total = 0, 0.0  # windows since the last metrics, and their seconds
        self._most_measured = math.ceil(1 / vad.capabilities.update_interval)
        super().__init__(vad)
        self._start()

    # ── audio ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def push_frame(self, frame: rtc.AudioFrame) -> None:
        """Add audio.

        Args:
            frame: one channel, 16 bits, of the sampling rate of the first frame; one of another rate is ignored.
        """
        self._push(frame)

    def flush(self) -> None:
        """Start a new segment."""
        self._push(None)

    def end_input(self) -> None:
        """Add no more audio: iteration ends after its events."""
        self._push(None)
        self._input_ch.close()
        self._ended = True
        self._proceed()

    async def aclose(self) -> None:
        """Close the stream at once."""
        self._finished.cancel()
        self._voice.close()
        await super().aclose()
        self._wake()

    async def _main_task(self) -> None:
        try:
            await self._finished
        finally:
            self._voice.close()
            self._wake()

    def _push(self, frame: rtc.AudioFrame | None) -> None:
        if self._ended or self._finished.done():
            self._check_input_not_ended()
            self._check_not_closed()
            return  # it has failed, which the reader is about to learn
        self._frames.append(frame)
        self._proceed()

    def _proceed(self) -> None:
        if self._stepping or self._finished.done():
            return
        try:
            self._advance()
        except Exception as error:  # iteration raises it
            self._finished.set_exception(error)

    def _advance(self) -> None:
        """Process the frames that were pushed, up to the next whole window, which is stepped."""
        while len(self._resampled) < self._bytes:
            if not self._frames:
                if self._ended:
                    self._finished.set_result(None)
                return
            self._take(self._frames.popleft())
        samples = bytes(self._resampled[: self._bytes])
        del self._resampled[: self._bytes]
        self._stepping = True
        self._pool.add(self._voice, samples, partial(self._stepped, samples, time.perf_counter()))

    def _take(self, frame: rtc.AudioFrame | None) -> None:
        if frame is None:
            self._voice.reset()
            self._start()
            return
        if frame.num_channels != 1:
            raise ValueError(f"LiveKitVAD: expected audio with one channel, got {frame.num_channels}")
        if not self._rate:
            self._rate = frame.sample_rate
            self._start()
        elif frame.sample_rate != self._rate:
            logger.error("ignored a frame at %d Hz in a stream at %d Hz", frame.sample_rate, self._rate)
            return
        if self._resampler is None:
            self._resampled += frame.data
            return
        self._given += frame.data
        for part in self._resampler.push(frame):
            self._resampled += part.data

    def _start(self) -> None:
        """Start a new segment."""
        self._smoothed: float | None = None
        self._speaking = False
        self._speech = self._silence = 0.0  # seconds, as reported in events
        self._speech_run = self._silence_run = 0.0  # seconds without a window of the other kind
        self._index, self._time = 0, 0.0
        self._resampled = bytearray()  # 16-bit samples that wait for a whole window
        self._given = bytearray()  # the same before resampling
        self._fraction = 0.0  # of a sample of the audio that the next window starts late
        # The speech, with what precedes it: the audio of windows, its bytes, and how many of them are skipped.
        self._stored: deque[bytes] = deque()
        self._stored_bytes = self._skipped = 0
        self._full = False
        self._resampler: rtc.AudioResampler | None = None
        if self._rate not in (0, self._pool.rate):
            self._resampler = rtc.AudioResampler(self._rate, self._pool.rate, quality=rtc.AudioResamplerQuality.QUICK)

    # ── windows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stepped(self, samples: bytes, begun: float, result: Result | Exception) -> None:
        """Process the result of a window, and what was pushed since."""
        self._stepping = False
        if self._finished.done():  # it was closed
            return
        try:
            if isinstance(result, Exception):
                raise result
            self._window(samples, result[0], time.perf_counter() - begun)
            self._advance()
        except Exception as error:  # ends this stream, and not the others of the step
            self._finished.set_exception(error)

    def _window(self, samples: bytes, probability: float, took: float) -> None:
        """Process the probability of one window, and send its events."""
        options, seconds = self._options, self._seconds
        if self._smoothed is not None:
            probability = SMOOTHING * self._smoothed + (1 - SMOOTHING) * probability
        self._smoothed = probability
        self._index += self._pool.size
        self._time += seconds
        audio = samples if self._resampler is None else self._audio()
        self._store(audio)
        if took > SLOW:
            logger.warning("a window of %d ms took %d ms", 1000 * seconds, 1000 * took)
        if self._speaking:
            self._speech += seconds
        else:
            self._silence += seconds
        self._send(
            VADEventType.INFERENCE_DONE,
            audio,
            probability=probability,
            inference_duration=took,
            raw_accumulated_silence=self._silence_run,
            raw_accumulated_speech=self._speech_run,
        )
        self._measure(took)
        threshold = options.activation_threshold
        if probability >= threshold or (self._speaking and probability > options.deactivation_threshold):
            self._speech_run += seconds
            self._silence_run = 0.0
            if not self._speaking and self._speech_run >= options.min_speech_duration:
                self._speaking = True
                self._silence, self._speech = 0.0, self._speech_run
                self._send(VADEventType.START_OF_SPEECH, self._speech_audio())
            return
        self._silence_run += seconds
        self._speech_run = 0.0
        if self._speaking and self._silence_run >= options.min_silence_duration:
            self._speaking = False
            self._silence = self._silence_run
            self._speech = max(0.0, self._speech - self._silence_run)
            self._send(VADEventType.END_OF_SPEECH, self._speech_audio())
            self._speech = 0.0
        if not self._speaking:
            self._forget()

    def _audio(self) -> bytes:
        """Return the audio of a window before resampling."""
        length = self._pool.size * self._rate / self._pool.rate + self._fraction
        count = int(length)
        self._fraction = length - count
        audio = bytes(self._given[: 2 * count])
        del self._given[: 2 * count]
        return audio

    def _padding(self) -> int:
        return 2 * int(self._options.prefix_padding_duration * self._rate)

    def _store(self, audio: bytes) -> None:
        most = 2 * int(self._options.max_buffered_speech * self._rate) + self._padding()
        free = most - (self._stored_bytes - self._skipped)
        if free > 0:
            audio = audio[:free]
            self._stored.append(audio)
            self._stored_bytes += len(audio)
        elif not self._full:
            self._full = True
            logger.warning("max_buffered_speech reached: further audio of this speech isn't stored")

    def _forget(self) -> None:
        """Keep only the audio that would precede speech."""
        skipped = self._stored_bytes - self._padding()
        if skipped <= self._skipped:
            return
        while self._stored and len(self._stored[0]) <= skipped:
            dropped = len(self._stored.popleft())
            self._stored_bytes -= dropped
            skipped -= dropped
        self._skipped, self._full = skipped, False

    def _speech_audio(self) -> bytes:
        return b"".join(self._stored)[self._skipped :]

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def __anext__(self) -> VADEvent:
        while not self._events:
            if self._task.done():
                return await super().__anext__()  # the end, or the error
            if self._reader is not None:
                raise RuntimeError("LiveKitVAD: another task waits for the next event of this stream")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._events.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _send(self, kind: VADEventType, audio: bytes, **more: float) -> None:
        if kind is not VADEventType.INFERENCE_DONE:
            self._last_activity_time = time.perf_counter()
        self._events.append(
            VADEvent(
                type=kind,
                samples_index=self._index,
                timestamp=self._time,
                speech_duration=self._speech,
                silence_duration=self._silence,
                frames=[rtc.AudioFrame(audio, self._rate, 1, len(audio) // 2)],
                speaking=self._speaking,
                **more,
            )
        )
        self._wake()

    def _measure(self, took: float) -> None:
        """Count a window in the metrics, which are sent about once per second."""
        self._measured += 1
        self._total += took
        if self._measured < self._most_measured:
            return
        metrics = VADMetrics(
            label=self._vad._label,
            timestamp=time.time(),
            idle_time=time.perf_counter() - self._last_activity_time,
            inference_duration_total=self._total,
            inference_count=self._measured,
            metadata=Metadata(model_name=self._vad.model, model_provider=self._vad.provider),
        )
        self._vad.emit("metrics_collected", metrics)
        self._measured, self._total = 0, 0.0
