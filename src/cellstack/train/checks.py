"""What is read and asked for, checked: the error for what can't be done as given, and the text of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cellstack.nodes.base import MOST
from cellstack.spec import FormatError


class UsageError(ValueError):
    """What was asked for can't be done as given, settings or data: one line says what was expected and what came."""


class TooFewRowsError(UsageError):
    """A series has fewer rows than a forecast takes: the message says how many it takes."""


def is_count(value: object) -> bool:
    """Return whether `value` is a whole number from 1 to `MOST`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def unmasked(array: Any) -> Any:
    """Return an array with NaN for masked values; what isn't a masked array as it is.

    Raises:
        UsageError: masked values that aren't real numbers.
    """
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return array
    if array.dtype.kind not in "biuf":
        raise UsageError(f"expected real numbers in a masked array, got {array.dtype}")
    dtype = array.dtype if array.dtype.kind == "f" else np.float64
    return np.ma.filled(array.astype(dtype), np.nan)


def refuse_masked(name: str, values: Any) -> None:
    """Raise `UsageError` where an array, or an array in a list, has masked values."""
    parts = values if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part) for part in parts):
        raise UsageError(f"{name}: masked values aren't supported: leave out the sequences that they belong to")


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
