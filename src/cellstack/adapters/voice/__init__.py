"""Silero VAD for voice agents, on one pool in the process: a stream needs no thread and no model of its own.

`PipecatVAD` is for pipecat (`LLMUserAggregatorParams(vad_analyzer=PipecatVAD())`), `LiveKitVAD` for livekit-agents
(`AgentSession(vad=LiveKitVAD())`). Each needs its library, and `cellstack[onnx]` to read Silero's file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellstack.adapters.voice.livekit import LiveKitVAD
    from cellstack.adapters.voice.pipecat import PipecatVAD

__all__ = ["LiveKitVAD", "PipecatVAD"]


def __getattr__(name: str) -> Any:
    if name == "PipecatVAD":
        from cellstack.adapters.voice.pipecat import PipecatVAD

        return PipecatVAD
    if name == "LiveKitVAD":
        from cellstack.adapters.voice.livekit import LiveKitVAD

        return LiveKitVAD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
