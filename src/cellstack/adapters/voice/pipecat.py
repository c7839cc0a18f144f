"""Silero VAD for pipecat, on the process's pool.

Ref: pipecat, `SileroVADAnalyzer`, whose states this analyzer reproduces, https://docs.pipecat.ai
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from cellstack.adapters.voice.pool import Voice, shared_pool, silero_path

try:
    from pipecat.audio.vad.vad_analyzer import VADAnalyzer, VADParams, VADState  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("PipecatVAD needs pipecat: pip install pipecat-ai", name=error.name) from error

__all__ = ["PipecatVAD"]

RESET_AFTER = 2.0  # seconds of audio, after which the model's state is reset at the next opportunity:
LOW, LOW_WINDOWS = 0.1, 5  # while quiet, once so many windows in a row had a lower probability than this


class PipecatVAD(VADAnalyzer):
    """A `SileroVADAnalyzer` without a thread and a model of its own: all analyzers of a process share one pool.

    Windows that arrive in the same turn of the event loop share one step. The states, the parameters and their defaults
    are those of `SileroVADAnalyzer`.

    Args:
        sample_rate: 8000 or 16000; None: pipecat sets it from the pipeline.
        params: `VADParams`.
        path: Silero's ONNX file; None: the one of the installed pipecat.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: from `set_sample_rate`, for another rate.

    Example::

        LLMUserAggregatorParams(vad_analyzer=PipecatVAD(params=VADParams(stop_secs=0.3)))
    """

    def __init__(
        self, *, sample_rate: int | None = None, params: VADParams | None = None, path: str | Path | None = None
    ) -> None:
        super().__init__(sample_rate=sample_rate, params=params)
        self._path = silero_path(path, "pipecat", "silero_vad")
        self._voice: Voice | None = None
        self._turn = asyncio.Lock()  # calls are answered in order
        self._since_reset = self._low = 0  # windows

    def set_sample_rate(self, sample_rate: int) -> None:
        """Set the sample rate, unless the constructor did.

        Args:
            sample_rate: 8000 or 16000.

        Raises:
            ValueError: another rate.
        """
        pool = shared_pool(self._path, self._init_sample_rate or sample_rate)
        if self._voice is None or self._voice.pool is not pool:
            if self._voice is not None:
                self._voice.close()
            self._voice = pool.open()
        super().set_sample_rate(sample_rate)

    def num_frames_required(self) -> int:
        """Return the samples of a window: 32 ms."""
        return self._opened().pool.size

    def voice_confidence(self, buffer: bytes) -> float:
        """Return the probability of speech of one window, computed alone; `analyze_audio` doesn't call this.

        Args:
            buffer: a window of 16-bit samples.
        """
        voice = self._opened()
        ((confidence, _),) = voice.pool.step_now([(voice, buffer)])
        self._reset_if_due(confidence)
        return confidence

    async def analyze_audio(self, buffer: bytes) -> VADState:
        """Add samples and return the state after their last whole window.

        Args:
            buffer: 16-bit samples, any number.
        """
        if not self._turn.locked() and len(self._vad_buffer) + len(buffer) < self._vad_frames_num_bytes:
            self._vad_buffer += buffer
            return self._vad_state
        async with self._turn:
            self._vad_buffer += buffer
            while len(self._vad_buffer) >= self._vad_frames_num_bytes:
                window = self._vad_buffer[: self._vad_frames_num_bytes]
                self._vad_buffer = self._vad_buffer[self._vad_frames_num_bytes :]
                confidence, volume = await self._opened().step(window)
                self._reset_if_due(confidence)
                self._prev_volume += self._smoothing_factor * (volume - self._prev_volume)
                self._count(confidence >= self._params.confidence and self._prev_volume >= self._params.min_volume)
            # Once per call, as the original does, not once per window.
            if self._vad_state == VADState.STARTING and self._vad_starting_count >= self._vad_start_frames:
                self._vad_state, self._vad_starting_count = VADState.SPEAKING, 0
            if self._vad_state == VADState.STOPPING and self._vad_stopping_count >= self._vad_stop_frames:
                self._vad_state, self._vad_stopping_count = VADState.QUIET, 0
            return self._vad_state

    async def cleanup(self) -> None:
        """Leave the pool."""
        await super().cleanup()
        if self._voice is not None:
            self._voice.close()
            self._voice = None

    def _opened(self) -> Voice:
        if self._voice is None:
            raise RuntimeError("PipecatVAD: no sample rate was set, or cleanup() was called: call set_sample_rate()")
        return self._voice

    def _count(self, speaking: bool) -> None:
        state = self._vad_state
        if state == VADState.QUIET and speaking:
            self._vad_state, self._vad_starting_count = VADState.STARTING, 1
        elif state == VADState.STARTING:
            self._vad_state = VADState.STARTING if speaking else VADState.QUIET
            self._vad_starting_count = self._vad_starting_count + 1 if speaking else 0
        elif state == VADState.SPEAKING and not speaking:
            self._vad_state, self._vad_stopping_count = VADState.STOPPING, 1
        elif state == VADState.STOPPING:
            self._vad_state = VADState.SPEAKING if speaking else VADState.STOPPING
            self._vad_stopping_count = 0 if speaking else self._vad_stopping_count + 1

    def _reset_if_due(self, confidence: float) -> None:
        """Reset the model's state where the original does; the state of speech is still that of the previous window."""
        voice = self._opened()
        self._since_reset += 1
        self._low = self._low + 1 if confidence < LOW else 0
        due = self._since_reset * voice.pool.size >= RESET_AFTER * voice.pool.rate
        if due and self._vad_state == VADState.QUIET and self._low >= LOW_WINDOWS:
            voice.reset()
            self._since_reset = 0
