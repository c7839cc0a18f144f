"""Silero VAD for voice agents, on one pool in the process: a stream needs no thread and no model of its own.

`PipecatVAD` is for pipecat: `LLMUserAggregatorParams(vad_analyzer=PipecatVAD())`. It needs pipecat-ai, and
`cellstack[onnx]` to read Silero's file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellstack.adapters.voice.pipecat import PipecatVAD

__all__ = ["PipecatVAD"]


def __getattr__(name: str) -> Any:
    if name != "PipecatVAD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cellstack.adapters.voice.pipecat import PipecatVAD

    return PipecatVAD
