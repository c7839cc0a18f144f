"""Which modules are not searched for examples: those of libraries that the tests don't install."""

from importlib.util import find_spec

VOICE = "cellstack/adapters/voice"
collect_ignore = [f"{VOICE}/{name}.py" for name in ("livekit", "pipecat") if find_spec(name) is None]
