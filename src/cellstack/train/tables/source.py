"""The source of a table, a CSV or Parquet file or a pandas or polars frame, as a pandas frame. Needs no torch."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError, collected

# pandas's types: Any, because its stubs leave most return types open, and it is imported only to read a table.
Series: TypeAlias = Any
Frame: TypeAlias = Any

WORDS = "? NA Na na N/A n/a #N/A NaN nan NAN -nan NULL Null null None none"
MISSING = ("", *WORDS.split(" "))
MARKS = (  # byte order marks
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SEPARATORS = "\t|;,"  # in order of preference: commas also occur in numbers and names
SHOWN = 8  # most names to list in a sentence
BINARY = {b"PK\x03\x04": "a zip or Excel file", b"\xd0\xcf\x11\xe0": "an old Excel file", b"\x1f\x8b": "a gzip file"}


@dataclass
class TableCells:
    """The cells of a table as given, before they are interpreted.

    Args:
        path: the file, or "a data frame".
        frame: columns by name, rows numbered from 0; numbers if every cell is one, else stripped text; missing cells
            are NaN.
        lines: number of each row's last line; None for a data frame.
        index: columns from the frame's index, or the first column of a file if it has no name.
        notes: assumptions, a sentence each.
        separator, encoding: of a CSV file.
        places: original indices of the rows, if some were removed.
        written: cache of a file's columns as written.
    """

    path: str
    frame: Frame
    lines: NDArray[np.int64] | None = None
    index: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    separator: str = ""
    encoding: str = ""
    places: NDArray[np.int64] | None = None
    written: dict[str, Series] = field(default_factory=dict)

    def at(self, row: int) -> str:
        """Return the file and the line of a row, the start of a message."""
        return f"{self.path}: " + (f"row {self._place(row)}" if self.lines is None else f"line {self.lines[row]}")

    def quote(self, row: int, name: str) -> str:
        """Return a cell as written in the file, in quotation marks, shortened."""
        value = self.frame[name].iloc[row] if self.lines is None else self._written(name).iloc[self._place(row)]
        return repr(str(value)[:40])

    def text(self, name: str) -> Series:
        """Return a column as text, as written in the file; NaN where missing."""
        if self.lines is None:
            return self.frame[name].astype(str).str.removesuffix(".0").where(self.frame[name].notna())
        cells = self._written(name)
        cells = cells if self.places is None else cells.iloc[self.places].reset_index(drop=True)
        return cells.where(~cells.isin(MISSING))

    def numbers_rows(self, name: str) -> bool:
        """Return whether a column is an index written by pandas, without a name or with pandas's name for it."""
        cells = self.frame[name]
        if name not in self.index and not re.fullmatch(r"Unnamed: \d+", name):
            return False
        return cells.dtype.kind == "i" and bool((np.diff(cells.to_numpy()) == 1).all())

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Remove all other rows."""
        self.places = np.flatnonzero(rows) if self.places is None else self.places[rows]
        self.frame = self.frame[rows].reset_index(drop=True)
        self.lines = None if self.lines is None else self.lines[rows]

    def _place(self, row: int) -> int:
        return row if self.places is None else int(self.places[row])

    def _written(self, name: str) -> Series:
        """Return a column of a file as written, with all its rows."""
        if name not in self.written:
            place = list(self.frame).index(name)
            with open(self.path, encoding=self.encoding, newline="") as file:
                _header(_rows(self.path, file, self.separator))
                cells = _body(file, self.separator, self.frame.shape[1], dtype=str, usecols=[place])
            self.written[name] = cells[place].str.strip()
        return self.written[name]


def read_source(source: Any, encoding: str | None = None, texts: tuple[str, ...] = ()) -> TableCells:
    """Return the cells of a file or a data frame.

    Args:
        source: path of a `.csv` (or otherwise named text) or `.parquet` file, or a pandas or polars frame.
        encoding: of a text file; None = UTF-8, or according to the byte order mark.
        texts: columns to keep as text even if they are numbers, such as ids.

    Raises:
        FormatError: it can't be read as a table; the message names the line, what was expected and what was found.
        UsageError: a required package isn't installed, or the object isn't a table.
        OSError: the file can't be read.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError:
        raise UsageError("reading tables needs pandas: pip install 'cellstack[table]'") from None
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".pq"):
            path.stat()  # raises FileNotFoundError
            return _of_frame(str(path), _parquet(path))
        if suffix in (".xlsx", ".xls", ".ods"):
            raise UsageError(f"{path}: expected CSV or Parquet, found a spreadsheet: save it as CSV")
        return _of_text(path, encoding, texts)
    source = collected(source)
    if isinstance(source, pd.Series):
        source = source.to_frame("y" if source.name is None else source.name)
    if not isinstance(source, pd.DataFrame):
        if not hasattr(source, "to_pandas"):
            raise UsageError(f"expected a path, or a pandas or polars frame, got {type(source).__name__}")
        try:
            source = source.to_pandas()
        except ModuleNotFoundError as error:
            raise UsageError(f"reading this frame needs {error.name}: pip install 'cellstack[parquet]'") from None
    return _of_frame("a data frame", source)


def _parquet(path: Path) -> Frame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: pip install 'cellstack[parquet]'") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: expected a Parquet file ({str(error).splitlines()[0]})") from None


def _of_frame(path: str, frame: Frame) -> TableCells:
    import pandas as pd

    if isinstance(frame.columns, pd.MultiIndex):
        first = tuple(frame.columns[0])
        raise FormatError(
            f"{path}: expected one name per column, found {first}: flatten them, df.columns = ['_'.join(c) for c in df]"
        )
    index = []
    if isinstance(frame.index, pd.MultiIndex) or frame.index.name is not None or not _counts(frame.index):
        names = [f"index{n or ''}" if name is None else str(name) for n, name in enumerate(frame.index.names)]
        twice = [name for name in names if name in map(str, frame.columns)]
        if twice:
            raise FormatError(f"{path}: expected distinct names, found {twice[0]!r} in the index and in the columns")
        frame = frame.reset_index(names=names)
        index = names
    frame = frame.rename(columns=str).reset_index(drop=True)
    _check_names(path, list(frame.columns))
    return TableCells(path, frame, index=tuple(index))


def _counts(index: Any) -> bool:
    """Return whether an index only numbers rows, which includes that of a part of a longer frame."""
    import pandas as pd

    return isinstance(index, pd.RangeIndex) or pd.api.types.is_integer_dtype(index.dtype)


def _of_text(path: Path, encoding: str | None, texts: tuple[str, ...]) -> TableCells:
    notes: list[str] = []
    with open(path, "rb") as file:
        head = file.read(4096)
    for mark, what in BINARY.items():
        if head.startswith(mark):
            raise FormatError(f"{path}: expected text, found {what}: save it as CSV")
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding is None:
        if marked is None and b"\0" in head:
            raise FormatError(f"{path}: expected UTF-8 text, found NUL bytes: use `encoding=…`, such as utf-16-le")
        encoding = marked or "utf-8"
        if encoding.startswith(("utf-16", "utf-32")):
            notes.append(f"{encoding.upper()} text, detected from its byte order mark")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise UsageError(f"expected an encoding such as utf-8, utf-16 or latin-1, got {encoding!r}") from None
    try:
        return _of_lines(path, encoding, texts, notes)
    except UnicodeError as error:
        raise FormatError(f"{path}: {_undecodable(path, encoding, error)}") from None


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> str:
    """Return a message with the line that isn't text in this encoding."""
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as whole:
        line, byte = data.count(b"\n", 0, whole.start) + 1, data[whole.start]
        said = f"line {line}: expected {encoding.upper().removesuffix('-SIG')} text, found byte {byte:#04x}"
        start = data.rfind(b"\n", 0, whole.start) + 1
        like = data[start : start + 60].split(b"\n")[0].decode("latin-1").strip()
        return said + (f": use `encoding=…`, such as latin-1, which gives {like!r}" if encoding != "latin-1" else "")
    return f"expected {encoding} text ({error})"


def _of_lines(path: Path, encoding: str, texts: tuple[str, ...], notes: list[str]) -> TableCells:
    separator = _separator(path, encoding)
    with open(path, encoding=encoding, newline="") as file:
        rows = _rows(path, file, separator)
        line, names = _header(rows)
        names, index = _names(path, line, names)
        lines = []
        for line, cells in rows:
            if len(cells) != len(names):
                if not cells and len(names) > 1:
                    continue
                if cells or len(names) > 1:
                    fix = ": remove lines above the header" if len(names) == 1 else ""
                    raise FormatError(f"{path}: line {line}: expected {len(names)} cells, found {len(cells)}{fix}")
            lines.append(line)
    with open(path, encoding=encoding, newline="") as file:
        _header(_rows(path, file, separator))
        as_text = {names.index(name): str for name in texts if name in names}
        frame = _body(file, separator, len(names), dtype=as_text, na_values=list(MISSING)).set_axis(names, axis=1)
    if len(frame) != len(lines):
        raise FormatError(
            f"{path}: expected {len(lines)} rows according to lines and quotation marks, found {len(frame)}"
        )
    for name in names:
        if frame[name].dtype == object or frame[name].dtype == "str":
            frame[name] = _stripped(frame[name])
    used = frame.notna().any(axis=1).to_numpy()
    if len(names) > 1 and len(used) and not used[-1]:
        last = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
        notes.append(f"{len(frame) - last} empty rows at the end dropped")
        frame, lines = frame.iloc[:last], lines[:last]
    return TableCells(str(path), frame, np.array(lines, np.int64), index, notes, separator, encoding)


def _stripped(cells: Series) -> Series:
    text = cells.dropna()
    if not len(text) or not isinstance(text.iloc[0], str):  # booleans, some of them missing
        return cells
    text = cells.str.strip()
    return text.where(~text.isin(MISSING))


def _rows(path: str | Path, file: IO[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's cells with the number of its last line; the file's position is after the last yielded row."""
    reader = csv.reader(iter(file.readline, ""), delimiter=separator, skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise FormatError(f"{path}: line {reader.line_num}: {error}") from None


def _header(rows: Iterator[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """Return the number of the first line that isn't blank, and its cells, with line breaks replaced by spaces."""
    return next(((line, [" ".join(cell.split()) for cell in cells]) for line, cells in rows if any(cells)), (1, []))


def _body(file: IO[str], separator: str, width: int, **how: Any) -> Frame:
    """Return the remaining rows of a file, with columns named by their index."""
    import pandas as pd

    try:
        return pd.read_csv(
            file,
            sep=separator,
            header=None,
            names=list(range(width)),
            index_col=False,
            keep_default_na=False,
            skipinitialspace=True,
            skip_blank_lines=width > 1,
            float_precision="round_trip",
            low_memory=False,
            **how,
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame({place: np.empty(0) for place in range(width)})


def _separator(path: Path, encoding: str) -> str:
    """Return the separator that splits most of the first lines into the same number of cells, else a comma.

    Raises:
        FormatError: the cells seem to be separated by spaces.
    """
    with open(path, encoding=encoding, newline="") as file:
        lines = [line for _, line in zip(range(100), file, strict=False) if line.strip()]
    best, cells = ",", 1
    for separator in SEPARATORS:
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
        except csv.Error:
            continue
        agree = widths.count(widths[0]) / len(widths) if widths else 0.0
        if widths and widths[0] > cells and (agree > 0.8 or separator == ","):
            best, cells = separator, widths[0]
    if cells == 1 and len(lines) > 1 and all(len(line.split()) > 1 for line in lines):
        raise FormatError(
            f"{path}: expected commas, semicolons, tabs or | between cells, found spaces in {lines[0].strip()[:60]!r}: "
            f"pandas reads such a file with pd.read_csv(file, sep=r'\\s+')"
        )
    return best


def _names(path: Path, line: int, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the columns' names, checked, and the name of the index column that pandas wrote without a name."""
    counted = [str(n) for n in range(len(names) - 1)]
    numbers = [name for name in names if _is_number(name)]
    which = f", in which {numbers[0]} is a number" if numbers and len(numbers) < len(names) else ""
    if not names or not any(names) or (numbers and names[1:] != counted):
        raise FormatError(f"{path}: line {line}: expected column names, found {','.join(names)[:60]!r}{which}")
    index = ()
    if not names[0]:
        names = ["index" if "index" not in names else "index_0", *names[1:]]
        index = (names[0],)
    if "" in names:
        raise FormatError(
            f"{path}: line {line}: expected a name for each column, found none for column {names.index('') + 1}"
        )
    _check_names(path, names, f"line {line}: ")
    return names, index


def _check_names(path: str | Path, names: list[str], line: str = "") -> None:
    for name, count in Counter(names).items():
        if count > 1:
            places = ", ".join(str(n) for n, other in enumerate(names, 1) if other == name)
            raise FormatError(f"{path}: {line}expected distinct names, found {name!r} {count} times (columns {places})")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def listed(names: Sequence[str]) -> str:
    """Return names separated by commas, at most `SHOWN`, and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
