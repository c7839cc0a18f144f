"""Read sequences in the `.ts` format of the UCR and UEA archives. Needs no torch.

Ref: Bagnall et al. 2018, "The UEA multivariate time series classification archive", section 2.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import read_text
from cellstack.train.data.sequences import Sequences

MISSING = {"?", "nan", ""}


def read_ts(path: str | os.PathLike[str], labels: tuple[Any, ...] | None = None) -> Sequences:
    """Read a `.ts` file: univariate or multivariate, of equal or unequal length, with classes, targets or neither.

    Args:
        path: the file.
        labels: the classes of a trained model, in its order, matched as text; None = as the file declares them.

    Raises:
        FormatError: the file isn't valid `.ts`; the message names the line, what was expected and what was found.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    header: dict[str, list[str]] = {}
    rows: list[tuple[int, str]] = []
    lines = read_text(path).splitlines()
    in_data = False
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith(("#", "%")):
            continue
        if in_data:
            rows.append((number, line))
        elif line.startswith("@"):
            key, *values = line[1:].split() or [""]
            if not key:
                raise _error(path, number, "a word after @", "none")
            in_data = key.lower() == "data"
            header[key.lower()] = values
        else:
            raise _error(path, number, "a header line that starts with @, or @data before the first sequence", line)
    if not in_data:
        raise FormatError(f"{path}: expected a line @data, found none in {len(lines)} lines")
    if not rows:
        raise FormatError(f"{path}: expected at least one sequence after @data, found none")
    if _flag(path, header, "timestamps"):
        raise FormatError(f"{path}: @timeStamps true isn't supported: steps must be evenly spaced")
    reader = _Rows(path, header, labels)
    x, y = zip(*(reader.sequence(number, line) for number, line in rows), strict=True)
    name = " ".join(header.get("problemname", [])) or path.stem
    return Sequences(list(x), reader.column(y), reader.labels, name)


class _Rows:
    """Reads lines after @data, and checks each against the header and the previous lines."""

    def __init__(self, path: Path, header: dict[str, list[str]], labels: tuple[Any, ...] | None):
        self.path = path
        self.classes = _flag(path, header, "classlabel")
        self.targets = not self.classes and _flag(path, header, "targetlabel")
        declared = tuple(header.get("classlabel", [])[1:]) if self.classes else ()
        if self.classes and not declared:
            raise FormatError(f"{path}: expected the classes' names after @classLabel true, found none")
        for label, count in Counter(declared).items():
            if count > 1:
                raise FormatError(f"{path}: expected each class once after @classLabel, found {label!r} {count} times")
        self.labels: tuple[Any, ...] = declared if labels is None or not self.classes else labels
        self.codes = {str(label): code for code, label in enumerate(self.labels)}
        univariate = _flag(path, header, "univariate")
        self.channels = _count(path, header, "dimensions") or _count(path, header, "dimension") or int(univariate)
        self.equal = _flag(path, header, "equallength")
        self.length = _count(path, header, "serieslength") if self.equal else 0
        self.missing = "missing" not in header or _flag(path, header, "missing")

    def sequence(self, number: int, line: str) -> tuple[NDArray[np.float32], str]:
        """Return the line's `[T, I]` values, and its class or target as text."""
        parts = line.split(":")
        label = parts.pop().strip() if self.classes or self.targets else ""
        self.channels = self.channels or len(parts)
        if len(parts) != self.channels:
            raise _error(self.path, number, f"{self.channels} channel(s) separated by ':'", str(len(parts)))
        values = [self._channel(number, part) for part in parts]
        lengths = {len(channel) for channel in values}
        if len(lengths) > 1:
            raise _error(self.path, number, "channels of equal length", f"lengths {sorted(lengths)}")
        if self.equal:
            self.length = self.length or len(values[0])
            if len(values[0]) != self.length:
                raise _error(self.path, number, f"{self.length} steps (@equalLength true)", str(len(values[0])))
        if self.classes and label not in self.codes:
            raise _error(self.path, number, f"one of the classes {', '.join(self.codes)}", repr(label))
        if self.targets:
            _number(self.path, number, label)
        return np.array(values, np.float32).T.copy(), label

    def column(self, texts: tuple[str, ...]) -> NDArray | None:
        """Return classes as indices, or targets as numbers."""
        if self.classes:
            return np.array([self.codes[text] for text in texts], np.int64)
        return np.array([float(text) for text in texts], np.float32) if self.targets else None

    def _channel(self, number: int, text: str) -> list[float]:
        if not text.strip():
            raise _error(self.path, number, "at least one value per channel", "none")
        values = []
        for item in map(str.strip, text.split(",")):
            if item.lower() not in MISSING:
                values.append(_number(self.path, number, item))
            elif self.missing:
                values.append(np.nan)
            else:
                raise _error(self.path, number, "a number (the header says @missing false)", repr(item))
        return values


def _number(path: Path, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _error(path, number, "a number", repr(text)) from None
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise _error(path, number, "a finite number in float32's range", repr(text))
    return value


def _flag(path: Path, header: dict[str, list[str]], key: str) -> bool:
    value = (header.get(key) or ["false"])[0].lower()
    if value not in ("true", "false"):
        raise FormatError(f"{path}: expected true or false after @{key}, found {value!r}")
    return value == "true"


def _count(path: Path, header: dict[str, list[str]], key: str) -> int:
    text = (header.get(key) or ["0"])[0]
    if not text.isdecimal() or len(text) > 18:
        raise FormatError(f"{path}: expected an integer after @{key}, found {text!r}")
    return int(text)


def _error(path: Path, number: int, expected: str, found: str) -> FormatError:
    found = found if len(found) <= 60 else found[:57] + "..."
    return FormatError(f"{path}: line {number}: expected {expected}, found {found}")
