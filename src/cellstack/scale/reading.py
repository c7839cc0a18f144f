"""Reads Parquet and CSV files in batches of rows, with the columns that a `Scorer` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from cellstack.cells.errors import FormatError
from cellstack.scale.scorer import Scorer
from cellstack.train.checks import UsageError
from cellstack.train.tables.source import MISSING

TEXT = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".parquet", *TEXT)
BLOCK = 1 << 20  # bytes of text in a batch; some of them are read ahead
BUFFER = 1 << 20  # bytes of a column of Parquet that are read at a time


def check_file(path: Path, scorer: Scorer) -> int | None:
    """Check that a file can be opened and has the columns, without reading all of it.

    Returns:
        The number of rows; None if that isn't known without reading the file.

    Raises:
        FormatError, UsageError, OSError: see `batches`.
    """
    with readable(path):
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                _check_columns(file.schema_arrow.names, scorer)
                scorer.advance(file.schema_arrow.empty_table(), lambda ids: None)  # checks the types
                return file.metadata.num_rows
        next(batches(path, scorer, 1))
    return None


def batches(path: Path, scorer: Scorer, rows: int) -> Iterator[pa.Table]:
    """Yield a file's rows in order, at least one table, with the scorer's columns.

    Args:
        path: `.parquet`; `.csv` or `.tsv` with names in the first line, decimal points and ISO 8601 dates, whose ids
            are text.
        scorer: it names the columns.
        rows: of a table, at most; text is read in blocks of 1 MB instead.

    Raises:
        FormatError: another content than the suffix says, or damaged.
        UsageError: a missing column, values of another type.
        OSError: the file can't be read.
    """
    with readable(path):
        yield from (_parquet if path.suffix.lower() == ".parquet" else _text)(path, scorer, rows)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise errors of Arrow about a file's content as `FormatError` with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise
    except pa.ArrowMemoryError as error:
        raise MemoryError(str(error)) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "CSV"
        raise FormatError(f"{path}: expected a complete {kind} file: {' '.join(str(error).split())[:200]}") from None


def _check_columns(found: list[str], scorer: Scorer) -> None:
    for name in scorer.columns:
        if found.count(name) != 1:
            raise UsageError(f"expected the column {name!r} once, found the columns {', '.join(found)}")


def _parquet(path: Path, scorer: Scorer, rows: int) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:  # pre_buffer would keep the whole file
        _check_columns(file.schema_arrow.names, scorer)
        found = False
        for batch in file.iter_batches(rows, columns=list(scorer.columns)):
            found = True
            yield pa.Table.from_batches([batch])
        if not found:
            yield file.schema_arrow.empty_table().select(scorer.columns)


def _text(path: Path, scorer: Scorer, rows: int) -> Iterator[pa.Table]:
    if not path.stat().st_size:
        raise FormatError("expected names in the first line, found an empty file")
    numbers = pa.int64() if scorer.takes_ids else pa.float64()
    convert = csv.ConvertOptions(
        column_types={scorer.id: pa.string(), **dict.fromkeys(scorer.features, numbers)},
        null_values=list(MISSING),
        strings_can_be_null=True,
    )
    how = {
        "read_options": csv.ReadOptions(block_size=BLOCK),
        "parse_options": csv.ParseOptions(delimiter=TEXT[path.suffix.lower()]),
        "convert_options": convert,
    }
    with csv.open_csv(path, **how) as file:
        _check_columns(file.schema.names, scorer)
        found = False
        for batch in file:
            found = True
            yield pa.Table.from_batches([batch]).select(scorer.columns)
        if not found:
            yield file.schema.empty_table().select(scorer.columns)
