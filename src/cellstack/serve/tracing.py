"""The last steps of live sessions: their trace pages, and the samples that `metrics.py` examines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.inspect import html
from cellstack.serve.models import Model, ServeError, Session
from cellstack.serve.rows import Records
from cellstack.streaming.history import History

if TYPE_CHECKING:
    from cellstack import Network
    from cellstack.inspect.trace import NetworkTrace
    from cellstack.streaming.sessions import Sessions

MOST_STEPS = 1000  # of a trace
MOST_SESSIONS = 16  # per model whose steps are recorded; the one whose trace was requested longest ago is dropped first


class Sample(NamedTuple):
    """One step of some sessions.

    Attributes:
        states: before the step, one per session.
        rows: records of inputs.
    """

    states: list[tuple[Any, ...]]
    rows: Records


class SessionRecorder:
    """A `worker.Recorder`: the last steps of sessions whose trace was requested, and samples of a batch.

    The worker calls it, never from two threads at the same time.

    Attributes:
        wanted: the largest number of sessions of the next sample; set it to take one.
        sample: the newest sample.
    """

    def __init__(self, pool: Sessions) -> None:
        self._pool, self._histories = pool, dict[int, History]()
        self.wanted = 0
        self.sample: Sample | None = None

    def before(self, sessions: NDArray[np.int64]) -> tuple[list[tuple[int, Any]], list[Any]]:
        """Return the positions of recorded sessions, with their state if a block of steps begins; sampled states."""
        recorded = np.flatnonzero(np.isin(sessions, list(self._histories))).tolist() if self._histories else []
        begun = [(n, self._state(sessions[n], self._histories[int(sessions[n])].wants_state)) for n in recorded]
        return begun, [self._state(number) for number in sessions[: self.wanted]]

    def after(
        self, sessions: NDArray[np.int64], rows: Records, before: tuple[list[tuple[int, Any]], list[Any]]
    ) -> None:
        """Record a step."""
        begun, states = before
        for n, state in begun:
            self._histories[int(sessions[n])].add(state, arrays_of(rows[n : n + 1]), chunk=False)
        if states:
            self.sample, self.wanted = Sample(states, rows[: len(states)].copy()), 0

    def closed(self, session: int) -> None:
        """Forget a session."""
        self._histories.pop(session, None)

    def request(self, session: int, steps: int) -> History:
        """Return the recorded steps of a session, and record at least its last `steps` steps from now on."""
        history = self._histories.pop(session, None) or History(steps)
        history.most = max(history.most, steps)
        self._histories[session] = history  # the last of the dict
        if len(self._histories) > MOST_SESSIONS:
            del self._histories[next(iter(self._histories))]
        return history

    def _state(self, session: Any, wanted: bool = True) -> Any:
        return self._pool.state(int(session)) if wanted else None


def recorder_of(model: Model) -> SessionRecorder:
    """Return the recorder of a model with sessions; the first call starts it. Called on the event loop's thread."""
    recorder = model.worker.recorder
    if recorder is None:
        recorder = model.worker.recorder = SessionRecorder(model.pool)
    assert isinstance(recorder, SessionRecorder)
    return recorder


def arrays_of(rows: Records) -> tuple[NDArray[Any], ...]:
    """Return records of inputs as one array per input."""
    return tuple(rows[name] for name in rows.dtype.names or ())


def why_not_traced(network: Network) -> str | None:
    """Return why steps of a network's sessions can't be traced, or None."""
    try:
        network.stream().remember(1)
    except ValueError as error:
        return str(error).removeprefix("Stream: ")
    return None


async def trace_page(model: Model, session: Session, steps: int = 100) -> str:
    """Return the trace page of at most the last `steps` steps of a session, as HTML.

    The first request starts recording the session's inputs. The recorded steps are run again from a copy of the state
    before them, so that the session itself isn't affected. Refused frames aren't steps.

    Raises:
        ServeError: a number of steps outside 1 to 1000 (400); nothing has been recorded yet (202); the network can't be
            run from an intermediate state (501).
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ServeError(400, f"steps: expected a number from 1 to {MOST_STEPS}, got {steps}")
    if why := why_not_traced(model.network):
        raise ServeError(501, f"sessions of {model.name} can't be traced: {why}")

    recorder = recorder_of(model)

    def read() -> tuple[int, Any]:
        return session.processed, recorder.request(session.number, steps).kept()

    frame, kept = await model.call(read)
    if kept is None:
        why = f"the steps of this session are recorded from frame {frame + 1} on"
        raise ServeError(202, f"{why}: request the trace again after some frames")
    return await asyncio.to_thread(_page, model, frame, kept, steps)


def _page(model: Model, frame: int, kept: tuple[Any, list[Any]], steps: int) -> str:
    t = last_steps(model.network, kept, steps)
    count = len(t.steps)
    title = f"{model.name}, version {model.version}: the last {count} step{'s' * (count != 1)}, until frame {frame}"
    return b"".join(html.page(t, None, None, title, None)).decode()


def last_steps(network: Network, kept: tuple[Any, list[Any]], steps: int) -> NetworkTrace:
    """Return the trace of the last of recorded steps, see `History.kept`."""
    state, arrays = kept
    whole = network.trace(dict(zip(network.inputs, arrays, strict=True)), state)
    return whole.select(steps=slice(max(0, len(whole.steps) - steps), None))
