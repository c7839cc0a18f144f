"""`cellstack stream`: read steps from standard input, and write each output immediately to standard output."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.cli.files import load_model, load_options
from cellstack.formats.files import check_replaceable
from cellstack.formats.lines import Lines
from cellstack.formats.state import load_state, save_state
from cellstack.train.checks import UsageError

if TYPE_CHECKING:
    from types import FrameType

    from cellstack import Stream

GRACE = 1.0  # seconds that the reader has, after a signal, to read the last output
DIGITS = {"float32": 9, "float64": 17}  # enough to distinguish all numbers of a dtype


class Stopped(BaseException):
    """A signal asked the process to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """A context in which SIGINT and SIGTERM raise `Stopped`: immediately while waiting for input, else between steps.

    So a signal never interrupts a step, and the step's output is written; but the process waits no longer than `GRACE`
    seconds for the reader of its output. A signal that is ignored, as SIGINT is in a shell's background, stays ignored.
    """

    def __init__(self) -> None:
        self.waiting, self.stepping = True, False
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number, handler in (
            (signal.SIGINT, self._catch),
            (signal.SIGTERM, self._catch),
            (signal.SIGALRM, self._give_up),
        ):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal arrived during a step."""
        if self.caught is not None:
            raise Stopped(self.caught)

    def _catch(self, number: int, _: FrameType | None) -> None:
        self.caught = number
        if self.waiting:
            raise Stopped(number)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _give_up(self, _: int, __: FrameType | None) -> None:
        if self.stepping:
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        elif self.caught is not None:
            raise Stopped(self.caught)


def stream(args: argparse.Namespace) -> int:
    """Run the steps until the input ends or a signal arrives; then save the state if --state is given.

    Returns:
        0; or 128 plus the number of the signal that stopped it.
    """
    if sys.stdin is None:  # closed by the shell
        raise UsageError("expected standard input to be open")
    net, path = load_model(args.model, load_options(args))
    try:
        running = net.stream(weights=args.weights)
    except TypeError as error:
        raise UsageError(f"--weights {args.weights}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if (len(net.inputs), len(net.outputs)) != (1, 1):
        found = f"the inputs {', '.join(net.inputs)} and the outputs {', '.join(net.outputs)}"
        raise UsageError(f"{path}: expected one input and one output, found {found}")
    width = 1 if net.inputs[0] in net.graph.ids else net.input_size
    if width is None:
        raise UsageError(f"{path}: networks that don't fix the width of their input aren't supported by stream")
    if args.state is not None:
        if not args.state:
            raise UsageError("expected --state to name a file, got ''")
        check_replaceable(args.state)  # before the first step
        if os.path.exists(args.state):
            running.state = load_state(args.state, running)
    frames = _Frames(running, Lines("standard input", width, args.format, DIGITS[net.dtype.name], args.json))
    status = 0
    with Signals() as signals, np.errstate(over="ignore"):  # a number beyond float32 becomes inf, as elsewhere
        try:
            frames.answer(sys.stdin.buffer.readline, sys.stdout.fileno(), signals)
        except Stopped as stopped:
            status = 128 + stopped.number
        except BrokenPipeError:  # the reader, such as head, has closed the pipe
            status = 0
        finally:
            signals.waiting, signals.stepping = False, True  # no signal may interrupt saving
            if args.state is not None:
                save_state(args.state, running)
    finite = all(np.isfinite(array).all() for state in running.state for array in state)
    if status or args.state is not None or not finite:
        ended = f", stopped by {signal.Signals(status - 128).name}" if status else ""
        saved = f", state in {args.state}" if args.state is not None else ""
        said = "" if finite else "; the state is no longer finite: a step contained nan or inf"
        print(f"{frames.count} steps{ended}{saved}{said}", file=sys.stderr)
    elif not frames.count:
        print("0 steps: standard input was empty, or had only a header line", file=sys.stderr)
    return status


class _Frames:
    """Reads steps and writes outputs, line by line, and counts the steps."""

    def __init__(self, running: Stream, lines: Lines) -> None:
        self.running, self.lines = running, lines
        self.count = 0

    def answer(self, readline: Callable[[int], bytes], out: int, signals: Signals) -> None:
        """Read, step and write, a line at a time, until the input ends.

        Args:
            readline: returns the next line, or the next part of it, of at most the given number of bytes.
            out: the descriptor to write to, unbuffered.
            signals: raises `Stopped` to end the loop.
        """
        net, lines = self.running.network, self.lines
        step, parse, text, longest = self.running.step, lines.frame, lines.text, lines.longest + 1
        frame = np.empty((1,) if net.inputs[0] in net.graph.ids else (1, lines.width), net.dtype)
        while line := readline(longest):
            signals.waiting = False
            values = parse(line)
            if values is not None:
                frame[...] = values
                signals.stepping = True
                try:
                    answer = step(frame)
                except ValueError as error:  # such as an id out of range
                    raise lines.error(str(error)) from None
                self.count += 1
                signals.stepping = False
                _write(out, text(answer[0].tolist()))
            signals.waiting = True
            signals.check()


def _write(out: int, data: bytes) -> None:
    """Write all of `data`."""
    while data:
        data = data[_write_some(out, data) :]


def _write_some(out: int, data: bytes) -> int:
    """Write as much as the pipe takes, and return the number of bytes."""
    try:
        return os.write(out, data)
    except BlockingIOError:  # the other end has made the pipe non-blocking
        select.select([], [out], [])
        return 0
