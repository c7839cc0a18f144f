"""What is read and asked for, checked: the error for what can't be done as given, and the text of a file."""

from __future__ import annotations

from pathlib import Path

from cellstack.nodes.base import MOST
from cellstack.spec import FormatError


class UsageError(ValueError):
    """What was asked for can't be done as given, settings or data: one line says what was expected and what came."""


class TooFewRowsError(UsageError):
    """A series has fewer rows than a forecast takes: the message says how many it takes."""


def is_count(value: object) -> bool:
    """Return whether `value` is a whole number from 1 to `MOST`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        FormatError: the file isn't UTF-8.
        OSError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
