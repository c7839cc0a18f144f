"""Ctrl-C in a training: the first one stops it after the current step, the second one immediately."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second one has its usual effect.

    If SIGINT is ignored, as in the background of a shell, it stays ignored.
    """
    event = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()  # only the main thread receives signals
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
