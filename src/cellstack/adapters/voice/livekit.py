"""Silero VAD for livekit-agents, on the process's pool.

Ref: livekit-agents, `livekit.plugins.silero.VAD`, whose events these streams reproduce, https://docs.livekit.io/agents
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, fields
from pathlib import Path

from cellstack.adapters.voice.pool import Pool, shared_pool, silero_path

try:
    from livekit import rtc  # pyright: ignore[reportMissingImports]
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
    """One stream of audio: `push_frame`, `flush`, `end_input`, and iteration over its events."""

    def __init__(self, vad: LiveKitVAD, pool: Pool, options: Options) -> None:
        self._options, self._pool = options, pool
        self._voice = pool.open(32767)
        self._rate = 0  # of the audio, from its first frame
        super().__init__(vad)
        self._start()

    def _start(self) -> None:
        """Start a new segment."""
        self._smoothed: float | None = None
        self._speaking = False
        self._speech = self._silence = 0.0  # seconds, as reported in events
        self._speech_run = self._silence_run = 0.0  # seconds without a window of the other kind
        self._index, self._time = 0, 0.0
        self._given, self._resampled = bytearray(), bytearray()  # 16-bit samples that wait for a whole window
        self._fraction = 0.0  # of a sample of the audio that the next window starts late
        self._stored, self._full = bytearray(), False  # the speech, with what precedes it
        self._resampler: rtc.AudioResampler | None = None
        if self._rate not in (0, self._pool.rate):
            self._resampler = rtc.AudioResampler(self._rate, self._pool.rate, quality=rtc.AudioResamplerQuality.QUICK)

    async def _main_task(self) -> None:
        window = 2 * self._pool.size
        try:
            async for frame in self._input_ch:
                if isinstance(frame, self._FlushSentinel):
                    self._voice.reset()
                    self._start()
                    continue
                if frame.num_channels != 1:
                    raise ValueError(f"LiveKitVAD: expected audio with one channel, got {frame.num_channels}")
                if not self._rate:
                    self._rate = frame.sample_rate
                    self._start()
                elif frame.sample_rate != self._rate:
                    logger.error("ignored a frame at %d Hz in a stream at %d Hz", frame.sample_rate, self._rate)
                    continue
                self._given += frame.data.cast("B")
                for part in (frame,) if self._resampler is None else self._resampler.push(frame):
                    self._resampled += part.data.cast("B")
                while len(self._resampled) >= window:
                    samples = bytes(self._resampled[:window])
                    del self._resampled[:window]
                    begun = time.perf_counter()
                    probability, _ = await self._voice.step(samples)
                    self._window(probability, begun)
        finally:
            self._voice.close()

    def _window(self, probability: float, begun: float) -> None:
        """Process the probability of one window, and send its events."""
        options, seconds = self._options, self._pool.size / self._pool.rate
        if self._smoothed is not None:
            probability = SMOOTHING * self._smoothed + (1 - SMOOTHING) * probability
        self._smoothed = probability
        self._index += self._pool.size
        self._time += seconds
        length = self._pool.size * self._rate / self._pool.rate + self._fraction
        count = int(length)
        self._fraction = length - count
        audio = bytes(self._given[: 2 * count])
        del self._given[: 2 * count]
        self._store(audio)
        took = time.perf_counter() - begun
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
        threshold = options.activation_threshold
        if probability >= threshold or (self._speaking and probability > options.deactivation_threshold):
            self._speech_run += seconds
            self._silence_run = 0.0
            if not self._speaking and self._speech_run >= options.min_speech_duration:
                self._speaking = True
                self._silence, self._speech = 0.0, self._speech_run
                self._send(VADEventType.START_OF_SPEECH, bytes(self._stored))
            return
        self._silence_run += seconds
        self._speech_run = 0.0
        if self._speaking and self._silence_run >= options.min_silence_duration:
            self._speaking = False
            self._silence = self._silence_run
            self._speech = max(0.0, self._speech - self._silence_run)
            self._send(VADEventType.END_OF_SPEECH, bytes(self._stored))
            self._speech = 0.0
        if not self._speaking:
            self._forget()

    def _send(self, kind: VADEventType, audio: bytes, **more: float) -> None:
        frame = rtc.AudioFrame(audio, self._rate, 1, len(audio) // 2)
        self._event_ch.send_nowait(
            VADEvent(
                type=kind,
                samples_index=self._index,
                timestamp=self._time,
                speech_duration=self._speech,
                silence_duration=self._silence,
                frames=[frame],
                speaking=self._speaking,
                **more,
            )
        )

    def _padding(self) -> int:
        return 2 * int(self._options.prefix_padding_duration * self._rate)

    def _store(self, audio: bytes) -> None:
        free = 2 * int(self._options.max_buffered_speech * self._rate) + self._padding() - len(self._stored)
        if free > 0:
            self._stored += audio[:free]
        elif not self._full:
            self._full = True
            logger.warning("max_buffered_speech reached: further audio of this speech isn't stored")

    def _forget(self) -> None:
        """Keep only the audio that would precede speech."""
        if len(self._stored) > (padding := self._padding()):
            del self._stored[: len(self._stored) - padding]
            self._full = False
