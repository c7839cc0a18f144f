"""The steps of a stream as lines of text, CSV or JSON: one input step a line, one answer a line."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cellstack.cells.errors import FormatError

FORMS = ("csv", "json")
LONGEST_NUMBER = 64  # bytes of a line that a number may take, with the blanks around it


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which isn't JSON")


class Lines:
    """Parses lines to steps and formats answers as lines; counts the lines, so that errors name theirs.

    A CSV line is numbers separated by commas; the first line may hold the columns' names instead. A JSON line is an
    array of numbers, or a number where a step has one feature. Blank lines are skipped.

    Args:
        source: where the lines come from, for messages.
        width: the number of features of a step.
        form: "csv" or "json"; None = detected from the first line.
        digits: the significant digits of answers: 9 are exact for float32, 17 for float64.
        as_json: whether to write answers as JSON even if the input is CSV.

    >>> lines = Lines("standard input", 2)
    >>> lines.frame(b"x,y"), lines.frame(b"1, 2.5")
    (None, [1.0, 2.5])
    >>> lines.text([0.1, float("nan")])
    b'0.1,nan\\n'
    >>> lines.frame(b"1,2,3")
    Traceback (most recent call last):
    cellstack.cells.errors.FormatError: standard input, line 3: expected 2 numbers, found 3
    """

    def __init__(
        self, source: str, width: int, form: str | None = None, digits: int = 9, as_json: bool = False
    ) -> None:
        self.source, self.width, self.form, self.as_json = source, width, form, as_json
        self.longest = LONGEST_NUMBER * width + 1024
        self.number = 0  # the last line read, from 1
        self._one = f"%.{digits}g"
        self._json = json.JSONDecoder(parse_constant=_no_constant)
        self._texts: dict[int, str] = {}  # a format string for an answer of each width

    def frame(self, line: bytes) -> list[float] | None:
        """Return the numbers of a line, with or without its end; None if it is blank or names the columns.

        Raises:
            FormatError: it isn't a step; the message gives the line, what was expected and what was found.
        """
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            return None
        if len(line) > self.longest:
            raise self.error(f"the line is longer than {self.longest} bytes")
        if self.form is None:
            self.form = "json" if line.lstrip()[:1] in (b"[", b"{") else "csv"
        try:
            values = self._from_json(line) if self.form == "json" else self._from_csv(line)
        except FormatError:
            raise
        except (ValueError, OverflowError, RecursionError) as error:
            raise self.error(f"expected numbers, found {str(error)[:120]}") from None
        if values is not None and len(values) != self.width:
            raise self.error(f"expected {self.width} numbers, found {len(values)}")
        return values

    def text(self, values: list[float]) -> bytes:
        """Return an answer as a line; JSON has no NaN and no infinity, which become null."""
        template = self._texts.get(len(values))
        if template is None:
            template = self._texts[len(values)] = ",".join([self._one] * len(values))
        text = template % tuple(values)
        if self.form == "json" or self.as_json:
            if "n" in text:  # nan and inf
                text = ",".join("null" if "n" in number else number for number in text.split(","))
            text = f"[{text}]"
        return f"{text}\n".encode("ascii")

    def _from_csv(self, line: bytes) -> list[float] | None:
        parts = line.split(b",")
        try:
            if b"_" in line:  # Python's float accepts 1_000, which isn't CSV
                raise ValueError
            return [float(part) for part in parts]
        except ValueError:
            if self.number == 1 and not any(map(_holds_number, parts)):  # the columns' names
                if len(parts) == self.width:
                    return None
                raise self.error(f"expected {self.width} numbers, or {self.width} names, found {len(parts)}") from None
            at = next(part for part in parts if not _is_number(part))
            raise ValueError(repr(at.strip().decode("utf-8", "replace")[:60])) from None

    def _from_json(self, line: bytes) -> list[float]:
        value = self._json.decode(line.decode("utf-8"))
        values = value if isinstance(value, list) else [value]
        for entry in values:
            if type(entry) is not float and type(entry) is not int:
                raise ValueError(json.dumps(entry)[:60])
        return [float(entry) for entry in values]

    def error(self, text: str) -> FormatError:
        """Return an error about the last line read."""
        return FormatError(f"{self.source}, line {self.number}: {text}")


def picked(lines: Iterable[bytes], columns: Sequence[str], source: str) -> Iterator[bytes]:
    """Yield lines reduced to some of their columns, in the given order.

    Args:
        lines: CSV, whose first line may name the columns; or JSON, an array or an object a line.
        columns: names, or numbers from 1.
        source: where the lines come from, for messages.

    Raises:
        FormatError: a column is missing; the message gives the line, what was expected and what was found.

    >>> list(picked([b"a,b,c", b"1,2,3"], ["c", "1"], "a file"))
    [b'c,a', b'3,1']
    """
    places: list[int] | None = None
    as_json = None
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8", "replace").strip()
        if not text:
            yield b""
            continue
        where = f"{source}, line {number}"
        as_json = text[0] in "[{" if as_json is None else as_json
        if as_json:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{where}: expected JSON, found {str(error)[:120]}") from None
            if isinstance(value, dict):
                _all_there(where, [name for name in columns if name not in value], list(value))
                parts = [value[name] for name in columns]
            else:
                value = value if isinstance(value, list) else [value]
                parts = [value[at] for at in _places(where, columns, [], len(value))]
            yield json.dumps(parts).encode()
            continue
        parts = next(csv.reader([text]))
        if places is None:
            named = not any(_holds_number(part.encode()) for part in parts)
            places = _places(where, columns, [part.strip() for part in parts] if named else [], len(parts))
        if max(places) >= len(parts):
            raise FormatError(f"{where}: expected at least {max(places) + 1} columns, found {len(parts)}")
        yield ",".join(parts[at] for at in places).encode()


def _places(where: str, columns: Sequence[str], names: list[str], count: int) -> list[int]:
    """Return the indices of columns that are given by name or by number."""
    found = {
        name: names.index(name) if name in names else int(name) - 1 if name.isdecimal() else -1 for name in columns
    }
    _all_there(where, [name for name, at in found.items() if not 0 <= at < count], names or [f"{count} without names"])
    return [found[name] for name in columns]


def _all_there(where: str, missing: list[str], there: list[str]) -> None:
    if missing:
        shown = ", ".join(name[:60] for name in there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise FormatError(f"{where}: expected a column {missing[0]!r:.80}, by name or by number from 1, found {shown}")


def _holds_number(part: bytes) -> bool:
    """Return whether a cell holds numbers in another notation: quoted, or separated by other characters."""
    words = part.replace(b"_", b"").replace(b";", b" ").replace(b'"', b" ").replace(b"'", b" ").split()
    return bool(words) and all(map(_is_number, words))


def _is_number(part: bytes) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return b"_" not in part
