"""The thread that steps the sessions of a model: frames that arrive together share one step."""

from __future__ import annotations

import bisect
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import Sessions
from cellstack.serve.rows import Records, Rows

MOST_FRAMES = 4096  # per batch
WINDOW = 1e-3  # seconds: the longest wait for further frames
WORTH_WAITING = 32  # frames: a batch of this size uses most of what larger batches save
SHORT = (
    1e-3  # seconds: a batch that takes less is stepped on the event loop's thread, as a change of threads costs more
)
FRAME_SECONDS = 1e-4  # of a frame, before the first batch
FIXED = 8  # frames that take about as long as what every batch takes
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # bounds of latencies
SIZES = tuple(2**n for n in range(13))  # bounds of batch sizes


class StoppingError(RuntimeError):
    """The server is stopping, and takes no more frames."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


class Answers(NamedTuple):
    """The result of a group of frames, in its order.

    Attributes:
        rows: records of outputs, see `Rows`; zeros where a frame was refused.
        refused: the reason by position, for frames that were refused; these left the session's state unchanged.
    """

    rows: Records
    refused: dict[int, str]


Done = Callable[[Answers], Callable[[], None] | None]


class Frames:
    """A group of frames that arrived together: a queued item.

    Attributes:
        sessions: the number of each frame's session in the pool, `[n]`; a session may occur several times.
        rows: records of inputs, `[n]`.
        done: called with the `Answers`, through the worker's `deliver`; see `call_all`.
        arrived: `time.monotonic()` of its arrival.
    """

    __slots__ = ("arrived", "done", "rows", "sessions")

    def __init__(self, sessions: NDArray[np.int64], rows: Records, done: Done) -> None:
        self.sessions, self.rows, self.done, self.arrived = sessions, rows, done, time.monotonic()


class Worker:
    """Steps the sessions of one pool in its own thread.

    Frames of a session are stepped in the order in which they were submitted. While the thread steps a batch, further
    frames arrive and form the next one; only under load, when this gives small batches, it waits for more frames, at
    most `WINDOW` seconds. When it is idle, a batch that takes less than `SHORT` is stepped on the event loop's thread:
    its answers need no change of threads.

    Args:
        pool: the sessions. No other thread may use them.
        rows: the records of its network.
        deliver: called in the worker's thread with a list of `(done, answers)` after each batch; it calls each
            `done(answers)` where it belongs, such as on an event loop.
        kept: the answers of each session that are stored, for clients that reconnect.

    Attributes:
        soon: the event loop's `call_soon`; None: all frames are stepped in the thread.
        count: the number of frames of each slot of the pool that were processed, refused ones included.
        latencies, sizes: counts for histograms, by the bounds `SECONDS` and `SIZES`; the last count is of what is
            larger. `seconds` is the sum of all latencies, `frames` that of all sizes.
    """

    def __init__(
        self, pool: Sessions, rows: Rows, deliver: Callable[[Sequence[tuple[Any, Any]]], None], kept: int = 16
    ) -> None:
        self.pool, self.rows, self.kept = pool, rows, kept
        self.count = np.zeros(pool.capacity, np.int64)
        self._stored_from = np.zeros(pool.capacity, np.int64)
        # Sessions that step together have their newest answers next to each other in memory.
        stored = np.zeros((kept, pool.capacity), [("refused", "?"), ("row", rows.outputs)])
        self._answers, self._refused = stored.T, stored["refused"]
        self._rows = stored.view(np.uint8).reshape(*stored.shape, -1)[:, :, 1:]  # copies of bytes take the least time
        self._deliver = deliver
        self.soon: Callable[[Callable[[], None]], Any] | None = None
        self._new: list[Frames] = []  # submitted in this iteration of the event loop, or while the thread is busy
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of `Frames`, calls, and None for the end
        self._queued = self._handled = 0  # items; the thread is idle if they are equal
        self._lock = threading.RLock()  # of these; held while frames are stepped outside the thread
        self._frame_seconds = FRAME_SECONDS  # smoothed
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
        return self._queue.qsize() + len(self._new)

    def submit(self, frames: Frames) -> None:
        """Queue frames."""
        with self._lock:
            if self.soon is None or self._stopping:
                self._put(frames)
                return
            if not self._new:
                self.soon(self._flush)
            self._new.append(frames)

    def call(self, function: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queue a call between batches, after all frames submitted before. Any thread may call it.

        `done` receives the result, or the exception that it raised, through `deliver`.
        """
        self._put((function, done))

    def stop(self) -> None:
        """Process what is queued, and end the thread."""
        with self._lock:
            self._put(None)
            self._stopping = True
        self._thread.join()

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
        stored = self._answers[slot, number % self.kept]
        return stored["row"], bool(stored["refused"])

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
        most = answers.shape[1]
        for back in range(min(most, self.kept)):
            self._answers[slots, (counts - back) % self.kept] = answers[np.arange(len(slots)), (counts - back) % most]
        self.count[slots] = counts
        self._stored_from[slots] = np.maximum(stored_from, counts - min(most, self.kept))

    def opened(self, sessions: Sequence[int], frames: Sequence[int]) -> None:
        """Start counting the frames of sessions from `frames`. Only called by a function that `call` runs."""
        slots = np.array(sessions, np.int64) % self.pool.capacity
        self.count[slots] = self._stored_from[slots] = frames

    def _put(self, item: Any) -> None:
        with self._lock:
            if self._stopping:
                raise StoppingError
            new, self._new = [*self._new, item], []
            self._queued += len(new)
            for one in new:
                self._queue.put(one)

    def _flush(self) -> None:
        """Step what was submitted in this iteration of the event loop, or leave it to the thread."""
        with self._lock:
            if not self._new:
                return
            if not self._is_short(self._new):
                self._put(self._new.pop())
            elif self._handled == self._queued:
                new, self._new = self._new, []
                self._step(new, call_all)
            # otherwise the thread is busy with what was queued before; `_note_handled` calls this again

    def _is_short(self, items: list[Frames]) -> bool:
        return self._frame_seconds * (FIXED + sum(len(item.rows) for item in items)) < SHORT

    def _run(self) -> None:
        item = self._queue.get()
        while item is not None:
            self._wait_for_more()
            items: list[Frames] = []
            out: list[tuple[Callable[[Any], None], Any]] = []
            frames = handled = 0
            while item is not None:
                handled += 1
                if isinstance(item, Frames):
                    items.append(item)
                    frames += len(item.rows)
                else:
                    if items:
                        self._step(items, out.extend)
                        items, frames = [], 0
                    out.append(self._called(*item))
                if frames >= MOST_FRAMES or self._queue.empty():
                    break
                item = self._queue.get()
            if items:
                self._step(items, out.extend)
            self._deliver([*out, (self._note_handled, handled)])  # last: the answers before it were delivered
            if item is not None:
                item = self._queue.get()

    def _wait_for_more(self) -> None:
        """Under load, wait until a batch of a useful size is to be expected.

        A single client that waits for each answer makes batches of one frame, and never waits here.
        """
        if self._size > 1.5 and self._rate * WINDOW > 1 and not self._stopping:
            time.sleep(min(WINDOW, WORTH_WAITING / self._rate))

    def _note_handled(self, count: int) -> None:
        self._handled += count
        self._flush()

    def _called(self, function: Callable[[], Any], done: Callable[[Any], None]) -> tuple[Callable[[Any], None], Any]:
        try:
            return done, function()
        except Exception as error:  # any error of the function belongs to its caller
            return done, error

    def _step(self, items: list[Frames], deliver: Callable[[Sequence[tuple[Any, Any]]], None]) -> None:
        begun = time.monotonic()
        one = len(items) == 1
        sessions = items[0].sessions if one else np.concatenate([item.sessions for item in items])
        rows = items[0].rows if one else np.concatenate([item.rows for item in items])
        answers, refused = self.process(sessions, rows)
        now, at, done = time.monotonic(), 0, []
        for item in items:
            end = at + len(item.rows)
            reasons = {n - at: why for n, why in refused.items() if at <= n < end} if refused else {}
            done.append((item.done, Answers(answers[at:end], reasons)))
            seconds = now - item.arrived
            self.latencies[bisect.bisect_left(SECONDS, seconds)] += len(item.rows)
            self.seconds += seconds * len(item.rows)
            at = end
        deliver(done)
        self.sizes[bisect.bisect_left(SIZES, len(rows))] += 1
        self.batches += 1
        self.frames += len(rows)
        self.refused += len(refused)
        share = min(1.0, (now - self._before) / 0.05)  # of the newest rate in the smoothed one
        # As `_is_short` expects it; one batch that the system held up changes little.
        each = min((now - begun) / (FIXED + len(rows)), 2 * self._frame_seconds)
        self._frame_seconds += 0.2 * (each - self._frame_seconds)
        self._size += 0.1 * (len(rows) - self._size)
        self._rate += share * (len(rows) / max(now - self._before, 1e-6) - self._rate)
        self._before = now

    def process(self, sessions: NDArray[np.int64], rows: Records) -> tuple[Records, dict[int, str]]:
        """Step frames, and return the records of outputs and the reasons of refused frames by position."""
        parts = turns(sessions)
        if parts is None:
            answers, refused = self._step_finite(sessions, rows)
            self._count(sessions, answers, refused)
            return answers, refused
        answers, refused = np.zeros(len(rows), self.rows.outputs), {}
        for places in parts:
            part, why = self._step_finite(sessions[places], rows[places])
            self._count(sessions[places], part, why)
            answers[places] = part
            refused |= {int(places[n]): text for n, text in why.items()}
        return answers, refused

    def _count(self, sessions: NDArray[np.int64], answers: Records, refused: dict[int, str]) -> None:
        """Count a frame of each of some different sessions, and store the answers."""
        if len(sessions) == 1:  # the same as below, at a fraction of the time
            slot = int(sessions[0]) % self.pool.capacity
            self.count[slot] = count = int(self.count[slot]) + 1
            self._rows[count % self.kept, slot] = answers.view(np.uint8)
            self._refused[count % self.kept, slot] = bool(refused)
            return
        slots = sessions % self.pool.capacity
        self.count[slots] = counts = self.count[slots] + 1
        at = counts % self.kept, slots
        self._rows[at] = answers.view(np.uint8).reshape(len(answers), -1)
        self._refused[at] = False
        if refused:
            places = list(refused)
            self._refused[at[0][places], slots[places]] = True

    def _refused_all(self, why: str, sessions: NDArray[np.int64], rows: Any) -> tuple[Records, dict[int, str]]:
        return np.zeros(len(sessions), self.rows.outputs), dict.fromkeys(range(len(sessions)), why)

    def _step_finite(self, sessions: NDArray[np.int64], rows: Records) -> tuple[Records, dict[int, str]]:
        """Step different sessions once, except for those whose frame has NaN or infinity."""
        fine = self.rows.finite(rows)
        if fine is None:
            return self._step_once(sessions, rows)
        answers, refused = self._refused_all("the frame contains NaN or infinity", sessions, rows)
        places = np.flatnonzero(fine)
        for n in places.tolist():
            del refused[n]
        if len(places):
            answers[places], others = self._step_once(sessions[places], rows[places])
            refused |= {int(places[n]): why for n, why in others.items()}
        return answers, refused

    def _step_once(self, sessions: NDArray[np.int64], rows: Records) -> tuple[Records, dict[int, str]]:
        """Step different sessions once. If the network refuses the batch, each is stepped alone."""
        try:
            results = self.pool.step(sessions, self.rows.as_inputs(rows))
        except (ValueError, TypeError) as error:
            if len(sessions) == 1:
                return self._refused_all(str(error), sessions, rows)
            each = [self._step_once(sessions[n : n + 1], rows[n : n + 1]) for n in range(len(sessions))]
            refused = {n: why[0] for n, (_, why) in enumerate(each) if why}
            return np.concatenate([answers for answers, _ in each]), refused
        return self.rows.answers(results), {}


def call_all(done: Sequence[tuple[Callable[[Any], Any], Any]]) -> None:
    """Call each function with its result, then the functions that they returned, each once.

    So the answers of a batch to a connection are put together before they are sent.
    """
    for after in dict.fromkeys([function(result) for function, result in done]):
        if after is not None:
            after()


def occurrence(numbers: NDArray[Any]) -> NDArray[np.int64] | int:
    """Return how often each number occurs before its place, `[n]`; 0 if all are different."""
    if len(numbers) == 1 or (numbers[1:] > numbers[:-1]).all():  # as gateways send them
        return 0
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if len(starts) == len(numbers):
        return 0
    earlier = np.empty(len(numbers), np.int64)
    earlier[order] = np.arange(len(numbers)) - np.repeat(starts, np.diff(starts, append=len(numbers)))
    return earlier


def turns(sessions: NDArray[np.int64]) -> list[NDArray[np.int64]] | None:
    """Divide frames into steps in which each session occurs once: the first frame of each, then the second and so on.

    Returns:
        the positions of each step, ascending; None if one step takes all.
    """
    turn = occurrence(sessions)
    return None if isinstance(turn, int) else [np.flatnonzero(turn == n) for n in range(int(turn.max()) + 1)]
