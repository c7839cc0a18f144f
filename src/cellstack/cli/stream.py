"""`cellstack stream`: frames in on standard input, answers out on standard output, each at once."""

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
from cellstack.nodes import GlobalPool
from cellstack.train.checks import UsageError

if TYPE_CHECKING:
    from types import FrameType

    from cellstack.streaming.stream import Stream

GRACE = 1.0  # seconds that the answer to the last frame may take to be read
DIGITS = {"float32": 9, "float64": 17}  # that tell all numbers of a dtype apart


class Stopped(BaseException):
    """A signal has asked for the end."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Within it SIGINT and SIGTERM raise `Stopped`: at once while a frame is waited for, else between two frames.

    So nothing cuts a step in two, and its answer is written; but a reader that doesn't read is waited for no longer
    than `GRACE` seconds. One that is ignored, as SIGINT is in the background of a shell, stays ignored.
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
        """Raise `Stopped` where a signal has come while it was held back."""
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
    """Answer frames until they end or a signal comes; then save the state where --state names a file.

    Returns:
        0; 128 and the signal's number where one ended it.
    """
    if sys.stdin is None or sys.stdout is None:  # as Python has it where the shell has closed them
        raise UsageError("expected standard input and standard output to be open")
    net, path = load_model(args.model, load_options(args))
    try:
        running = net.stream(weights=args.weights)
    except TypeError as error:
        raise UsageError(f"--weights {args.weights}: {error}") from None
    except ValueError as error:
        whole = any(isinstance(node, GlobalPool) and node.mode != "last" for node in net.nodes)
        mend = ": train with --pooling last for streams" if whole and net.metadata.get("task") else ""
        raise UsageError(f"{path}: {error}{mend}") from None
    if (len(net.inputs), len(net.outputs)) != (1, 1):
        found = f"the inputs {', '.join(net.inputs)} and the outputs {', '.join(net.outputs)}"
        raise UsageError(f"{path}: expected one input and one output, found {found}")
    width = 1 if net.inputs[0] in net.graph.ids else net.input_size
    if width is None:
        raise UsageError(f"{path}: expected a network that fixes the width of its input, found one that takes any")
    if args.state is not None:
        if not args.state:
            raise UsageError("expected --state to name a file, got ''")
        check_replaceable(args.state)  # now, not after all frames
        if os.path.exists(args.state):
            running.state = load_state(args.state, running)
    frames = _Frames(running, Lines("standard input", width, args.format, DIGITS[net.dtype.name], args.json))
    status = 0
    with Signals() as signals, np.errstate(over="ignore"):  # a number beyond float32 becomes inf, as elsewhere
        try:
            frames.answer(sys.stdin.buffer.readline, sys.stdout.fileno(), signals)
        except Stopped as stopped:
            status = 128 + stopped.number
        except BrokenPipeError:  # the reader, such as head, has seen enough
            status = 0
        finally:
            signals.waiting, signals.stepping = False, True  # the state is written whole, whatever comes
            if args.state is not None:
                save_state(args.state, running)
    if status or args.state is not None:
        ended = f", stopped by {signal.Signals(status - 128).name}" if status else ""
        saved = f", state in {args.state}" if args.state is not None else ""
        if saved and not all(np.isfinite(array).all() for state in running.state for array in state):
            saved += ", which is no number any more: a frame held nan or inf"
        print(f"{frames.count} frames{ended}{saved}", file=sys.stderr)
    return status


class _Frames:
    """Answers lines with lines, and counts the frames among them."""

    def __init__(self, running: Stream, lines: Lines) -> None:
        self.running, self.lines = running, lines
        self.count = 0

    def answer(self, readline: Callable[[int], bytes], out: int, signals: Signals) -> None:
        """Read, step and write, a line at a time, until there is no line any more.

        Args:
            readline: returns the next line, of at most so many bytes, or what is left of one.
            out: the descriptor to write to. Nothing is kept back in a buffer.
            signals: which may end it.
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
                except ValueError as error:  # such as an id beyond a table
                    raise lines.error(str(error)) from None
                self.count += 1
                signals.stepping = False
                _write(out, text(answer[0].tolist()))
            signals.waiting = True
            signals.check()


def _write(out: int, data: bytes) -> None:
    """Write all of it, at once where there is room."""
    while data:
        data = data[_write_some(out, data) :]


def _write_some(out: int, data: bytes) -> int:
    """Write what there is room for, and return how many bytes that was."""
    try:
        return os.write(out, data)
    except BlockingIOError:  # a pipe whose other end has set it not to block
        select.select([], [out], [])
        return 0
