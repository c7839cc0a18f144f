"""Checks of arguments and data, and the error that they raise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.nodes.checks import MOST


class UsageError(ValueError):
    """Arguments, settings or data that can't be used as given; the message says how to fix it."""


class OptionError(UsageError):
    """A value that an option of training can't have: `option` is its name, which the message has after "expected"."""

    def __init__(self, option: str, text: str) -> None:
        super().__init__(f"expected {option} {text}")
        self.option = option


class TooFewRowsError(UsageError):
    """A series has fewer rows than a forecast needs; the message says how many it needs."""


def refuse_existing(checkpoint: str | os.PathLike[str]) -> None:
    """Raise `UsageError` if a checkpoint exists that a training without `resume` or `overwrite` would replace."""
    if os.path.exists(checkpoint):
        raise UsageError(
            f"{os.fspath(checkpoint)}: the checkpoint already exists: `resume=True` continues from it, "
            "`overwrite=True` starts again"
        )


def is_count(value: object) -> bool:
    """Return whether `value` is an integer from 1 to `MOST`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def unmasked(array: Any) -> Any:
    """Replace the masked values of a masked array by NaN; return anything else unchanged.

    Raises:
        UsageError: masked values that aren't real numbers.
    """
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return array
    if array.dtype.kind not in "biuf":
        raise UsageError(f"expected real numbers in a masked array, got {array.dtype}")
    dtype = array.dtype if array.dtype.kind == "f" else np.float64
    return np.ma.filled(array.astype(dtype), np.nan)


def collected(value: Any) -> Any:
    """Return the frame that a lazy frame of polars computes; return anything else unchanged."""
    return value.collect() if type(value).__name__ == "LazyFrame" else value


def refuse_masked(name: str, values: Any) -> None:
    """Raise `UsageError` where an array, or an array in a list, has masked values."""
    parts = values if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part) for part in parts):
        raise UsageError(f"{name}: masked values aren't supported: leave out their sequences")


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
