"""The thread that steps the sessions of a model: frames that arrive together share one step."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellstack.serve.rows import Records, Rows
from cellstack.streaming.sessions import Sessions

MOST_FRAMES = 4096  # per batch
WINDOW = 1e-3  # seconds: the longest wait for further frames
WORTH_WAITING = 32  # frames: a batch of this size uses most of what larger batches save
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # bounds of latencies
SIZES = tuple(2**n for n in range(13))  # bounds of batch sizes


class Answers(NamedTuple):
    """The result of a group of frames, in its order.

    Attributes:
        rows: records of outputs, see `Rows`; zeros where a frame was refused.
        refused: the reason by position, for frames that were refused; these left the session's state unchanged.
    """

    rows: Records
    refused: dict[int, str]


class Journal(Protocol):
    """Stores frames before they are stepped, so that sessions survive the process; see `durable.py`."""

    def opened(self, session: int, token: str) -> None:
        """Store that a session of the pool was opened, with its state and its count of frames."""

    def closed(self, session: int) -> None:
        """Store that a session was closed."""

    def append(self, sessions: NDArray[np.int64], rows: Records) -> None:
        """Store frames; if it raises OSError they are refused, and count as such."""

    def after_batch(self) -> None:
        """Do what is due between two batches, such as a snapshot."""

    def close(self) -> None:
        """Store all sessions for the next process. Called after the worker has stopped."""


class Frames:
    """A group of frames that arrived together: a queued item.

    Attributes:
        sessions: the number of each frame's session in the pool, `[n]`; a session may occur several times.
        rows: records of inputs, `[n]`.
        done: called with the `Answers`, through the worker's `deliver`.
        arrived: `time.monotonic()` of its arrival.
    """

    __slots__ = ("arrived", "done", "rows", "sessions")

    def __init__(self, sessions: NDArray[np.int64], rows: Records, done: Callable[[Answers], None]) -> None:
        self.sessions, self.rows, self.done, self.arrived = sessions, rows, done, time.monotonic()


class Worker:
    """Steps the sessions of one pool in its own thread.

    Frames of a session are stepped in the order in which they were submitted. While the thread steps a batch, further
    frames arrive and form the next one; only under load, when this gives small batches, it waits for more frames, at
    most `WINDOW` seconds.

    Args:
        pool: the sessions. No other thread may use them.
        rows: the records of its network.
        deliver: called in the worker's thread with a list of `(done, answers)` after each batch; it calls each
            `done(answers)` where it belongs, such as on an event loop.
        kept: the answers of each session that are stored, for clients that reconnect.

    Attributes:
        count: the number of frames of each slot of the pool that were processed, refused ones included.
        latencies, sizes: counts for histograms, by the bounds `SECONDS` and `SIZES`; the last count is of what is
            larger. `seconds` is the sum of all latencies, `frames` that of all sizes.
    """

    def __init__(
        self, pool: Sessions, rows: Rows, deliver: Callable[[Sequence[tuple[Any, Any]]], None], kept: int = 16
    ) -> None:
        self.pool, self.rows, self.kept = pool, rows, kept
        self.journal: Journal | None = None
        self.count = np.zeros(pool.capacity, np.int64)
        self._stored_from = np.zeros(pool.capacity, np.int64)
        self._answers = np.zeros((pool.capacity, kept), [("refused", "?"), ("row", rows.outputs)])
        self._deliver = deliver
        self._queue: deque[Frames | tuple[Callable[[], Any], Callable[[Any], None]]] = deque()
        self._queued = threading.Condition()
        self._stopping = False
        self._rate, self._size = 0.0, 1.0  # frames per second and per batch, smoothed
        self._before = time.monotonic()
        self.latencies, self.sizes = [0] * (len(SECONDS) + 1), [0] * (len(SIZES) + 1)
        self.frames, self.batches, self.refused, self.seconds = 0, 0, 0, 0.0
        self._thread = threading.Thread(target=self._run, name="cellstack-steps", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of queued items."""
        return len(self._queue)

    def submit(self, frames: Frames) -> None:
        """Queue frames."""
        self._put(frames)

    def call(self, function: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queue a call between batches, after all frames submitted before.

        `done` receives the result, or the exception that it raised, through `deliver`.
        """
        self._put((function, done))

    def stop(self) -> None:
        """Process what is queued, end the thread, and close the journal."""
        with self._queued:
            self._stopping = True
            self._queued.notify()
        self._thread.join()
        journal, self.journal = self.journal, None
        if journal is not None:
            journal.close()

    def stored_from(self, slot: int) -> int:
        """Return the number of the last frame of a session whose answer is no longer stored."""
        return int(self.all_stored_from(slot))

    def all_stored_from(self, slots: Any) -> Any:
        """Return `stored_from` of several sessions."""
        return np.maximum(self._stored_from[slots], self.count[slots] - self.kept)

    def answer(self, slot: int, number: int) -> tuple[Records, bool]:
        """Return the record of outputs of a session's frame, and whether it was refused.

        Args:
            slot: the session's place in the pool.
            number: the frame's number, from 1. Only called by a function that `call` runs.

        Raises:
            KeyError: it is no longer stored.
        """
        if not self.stored_from(slot) < number <= self.count[slot]:
            raise KeyError(f"the answer to frame {number} is no longer stored")
        found = self._answers[slot, number % self.kept]
        return found["row"], bool(found["refused"])

    def stored_answers(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], Records]:
        """Return copies of the counts of some sessions and of their stored answers, `[n, kept]`, frame k at `k % kept`.

        In another thread than the worker's, answers of frames that are being processed may be incomplete: of a frame
        `k` such that `k + kept` is at most the count.
        """
        answers = self._answers[slots]
        return self.count[slots], answers  # counted before they are written, so the counts include all copied answers

    def restored(
        self, slots: NDArray[np.int64], counts: NDArray[np.int64], stored_from: NDArray[np.int64], answers: Records
    ) -> None:
        """Continue from counts and stored answers of another worker, which may have stored more or fewer."""
        kept = answers.shape[1]
        for back in range(min(kept, self.kept)):
            self._answers[slots, (counts - back) % self.kept] = answers[np.arange(len(slots)), (counts - back) % kept]
        self.count[slots] = counts
        self._stored_from[slots] = np.maximum(stored_from, counts - min(kept, self.kept))

    def opened(self, session: int, token: str, frames: int) -> None:
        """Start counting a session's frames from `frames`. Only called by a function that `call` runs."""
        slot = session % self.pool.capacity
        self.count[slot] = frames
        self._stored_from[slot] = frames
        if self.journal is not None:
            self.journal.opened(session, token)

    def closed(self, session: int) -> None:
        """Note that a session was closed. Only called by a function that `call` runs."""
        if self.journal is not None:
            self.journal.closed(session)

    def _put(self, item: Any) -> None:
        with self._queued:
            if self._stopping:
                raise RuntimeError("the server is stopping")
            self._queue.append(item)
            if len(self._queue) == 1:
                self._queued.notify()

    def _run(self) -> None:
        while True:
            with self._queued:
                while not self._queue and not self._stopping:
                    self._queued.wait()
                if not self._queue:
                    return
            self._wait_for_more()
            items: list[Frames] = []
            frames = 0
            while self._queue and frames < MOST_FRAMES:
                item = self._queue.popleft()
                if isinstance(item, Frames):
                    items.append(item)
                    frames += len(item.rows)
                    continue
                if items:
                    self._step(items)
                    items, frames = [], 0
                self._call(*item)
            if items:
                self._step(items)
            if self.journal is not None:
                self.journal.after_batch()

    def _wait_for_more(self) -> None:
        """Under load, wait until a batch of a useful size is to be expected.

        A single client that waits for each answer makes batches of one frame, and never waits here.
        """
        if self._size > 1.5 and self._rate * WINDOW > 1 and not self._stopping:
            time.sleep(min(WINDOW, WORTH_WAITING / self._rate))

    def _call(self, function: Callable[[], Any], done: Callable[[Any], None]) -> None:
        try:
            result = function()
        except Exception as error:  # any error of the function belongs to its caller
            result = error
        self._deliver([(done, result)])

    def _step(self, items: list[Frames]) -> None:
        one = len(items) == 1
        sessions = items[0].sessions if one else np.concatenate([item.sessions for item in items])
        rows = items[0].rows if one else np.concatenate([item.rows for item in items])
        answers, refused = self.process(sessions, rows)
        now, at, done = time.monotonic(), 0, []
        for item in items:
            end = at + len(item.rows)
            own = {n - at: why for n, why in refused.items() if at <= n < end} if refused else {}
            done.append((item.done, Answers(answers[at:end], own)))
            seconds = now - item.arrived
            self.latencies[bisect.bisect_left(SECONDS, seconds)] += len(item.rows)
            self.seconds += seconds * len(item.rows)
            at = end
        self._deliver(done)
        self.sizes[bisect.bisect_left(SIZES, len(rows))] += 1
        self.batches += 1
        self.frames += len(rows)
        self.refused += len(refused)
        share = min(1.0, (now - self._before) / 0.05)  # of the newest rate in the smoothed one
        self._size += 0.1 * (len(rows) - self._size)
        self._rate += share * (len(rows) / max(now - self._before, 1e-6) - self._rate)
        self._before = now

    def process(self, sessions: NDArray[np.int64], rows: Records) -> tuple[Records, dict[int, str]]:
        """Step frames, and return the records of outputs and the reasons of refused frames by position.

        The worker's thread calls it; and, before any frame is submitted, a journal that restores sessions.
        """
        answers: Records = np.zeros(len(rows), self.rows.outputs)
        refused: dict[int, str] = {}
        if self.journal is not None:
            try:
                self.journal.append(sessions, rows)
            except OSError as error:
                why = f"the frame can't be stored: {error.strerror or error}"
                refused = dict.fromkeys(range(len(rows)), why)
        unstored = bool(refused)
        for places in turns(sessions):
            some, given = (sessions, rows) if places is None else (sessions[places], rows[places])
            at = np.arange(len(rows)) if places is None else places
            if not unstored:
                fine = self.rows.finite(given)
                if not fine.all():
                    refused |= dict.fromkeys(at[~fine].tolist(), "the frame contains NaN or infinity")
                self._step_once(some[fine], given[fine], at[fine], answers, refused)
            self._count(some, answers[at], [n in refused for n in at.tolist()] if refused else False)
        return answers, refused

    def refuse(self, sessions: NDArray[np.int64]) -> None:
        """Count a refused frame of each of some different sessions: as `process` does, for a journal that restores."""
        self._count(sessions, np.zeros(len(sessions), self.rows.outputs), True)

    def _count(self, sessions: NDArray[np.int64], answers: Records, refused: Any) -> None:
        slots = sessions % self.pool.capacity
        self.count[slots] += 1
        stored = np.empty(len(sessions), self._answers.dtype)
        stored["row"], stored["refused"] = answers, refused
        self._answers[slots, self.count[slots] % self.kept] = stored

    def _step_once(
        self, sessions: NDArray[np.int64], rows: Records, at: NDArray[Any], answers: Records, refused: dict[int, str]
    ) -> None:
        """Step different sessions once. If the network refuses the batch, each is stepped alone."""
        if not len(sessions):
            return
        try:
            results = self.pool.step(sessions, self.rows.given(rows))
        except (ValueError, TypeError) as error:
            if len(sessions) == 1:
                refused[int(at[0])] = str(error)
                return
            for n in range(len(sessions)):
                one = slice(n, n + 1)
                self._step_once(sessions[one], rows[one], at[one], answers, refused)
            return
        own = np.zeros(len(sessions), self.rows.outputs)
        self.rows.answers(results, own)
        answers[at] = own


def turns(sessions: NDArray[np.int64]) -> list[NDArray[np.int64] | None]:
    """Divide frames into steps in which each session occurs once: the first frame of each, then the second and so on.

    Args:
        sessions: `[n]`, in the order of arrival.

    Returns:
        the positions of each step, ascending; `[None]` if one step takes all.
    """
    order = np.argsort(sessions, kind="stable")
    ordered = sessions[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if len(starts) == len(sessions):
        return [None]
    counts = np.diff(np.r_[starts, len(sessions)])
    turn = np.empty(len(sessions), np.int64)
    turn[order] = np.arange(len(sessions)) - np.repeat(starts, counts)
    return [np.flatnonzero(turn == n) for n in range(int(counts.max()))]
