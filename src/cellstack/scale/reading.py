"""Reads Parquet, CSV and `.npz` files in batches of rows, with the columns that a `Scorer` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from cellstack.cells.errors import FormatError
from cellstack.scale.scorer import Scorer
from cellstack.train.checks import UsageError
from cellstack.train.tables.source import MISSING

TEXT = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".parquet", *TEXT, ".npz")
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
            are text; `.npz` with `x [N, T, C]` of N sequences, and optionally `lengths [N]`, `id [N]` (otherwise the
            number of the sequence) and `time [N, T]` (otherwise the number of the step).
        scorer: it names the columns. Those of an `.npz` file get the scorer's names.
        rows: of a table, at most; text is read in blocks of 1 MB instead.

    Raises:
        FormatError: another content than the suffix says, or damaged.
        UsageError: a missing column, values of another type.
        OSError: the file can't be read.
    """
    with readable(path):
        suffix = path.suffix.lower()
        yield from (_parquet if suffix == ".parquet" else _npz if suffix == ".npz" else _text)(path, scorer, rows)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise errors of Arrow and of NumPy about a file's content as `FormatError` with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise
    except pa.ArrowMemoryError as error:
        raise MemoryError(str(error)) from None
    except (pa.ArrowException, OSError, BadZipFile, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        kind = {".parquet": "Parquet", ".npz": "NumPy's .npz"}.get(path.suffix.lower(), "CSV")
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


def _npz(path: Path, scorer: Scorer, rows: int) -> Iterator[pa.Table]:
    with path.open("rb") as opened:
        try:
            read: Any = np.load(opened, allow_pickle=False)
            arrays = {name: read[name] for name in getattr(read, "files", ()) if name in ("x", "lengths", "id", "time")}
        except ValueError as error:  # such as pickled objects
            raise FormatError(f"expected arrays written by np.savez: {error}") from None
    x = arrays.get("x")
    if x is None or x.ndim != 3 or x.shape[2] != len(scorer.features):
        found = "none" if x is None else str(x.shape)
        raise FormatError(f"expected an array x [N, T, {len(scorer.features)}], found {found}")
    count, steps = x.shape[:2]
    lengths = arrays.get("lengths", np.full(count, steps))
    ids = arrays.get("id", np.arange(count))
    times = arrays.get("time", np.broadcast_to(np.arange(steps), (count, steps)))
    for name, array, shape in (("lengths", lengths, (count,)), ("id", ids, (count,)), ("time", times, (count, steps))):
        if array.shape != shape:
            raise FormatError(f"expected {name} {list(shape)}, found {list(array.shape)}")
    if lengths.dtype.kind not in "iu" or (count and not 0 <= lengths.min() <= lengths.max() <= steps):
        raise FormatError(f"expected lengths to be integers from 0 to T={steps}")
    used = np.arange(steps) < lengths[:, None]
    columns: dict[str, Any] = {scorer.id: np.repeat(ids, lengths)}
    if scorer.time:
        columns[scorer.time] = times[used]
    columns |= {name: x[..., n][used] for n, name in enumerate(scorer.features)}
    table = pa.table(columns)
    yield from (table.slice(first, rows) for first in range(0, max(1, table.num_rows), rows))
