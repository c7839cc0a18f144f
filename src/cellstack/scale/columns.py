"""Columns of an Arrow table as ids, times and numbers, with their checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds
from numpy.typing import NDArray

from cellstack.train.checks import UsageError


def refuse_row(row: int, why: str) -> UsageError:
    """Return the error for a row, which counts from 0."""
    return UsageError(f"row {row}: {why}")


def as_ids(table: pa.Table, name: str, first: int) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the distinct ids in order of appearance, as int64 or text, and the index of each row's id.

    Raises:
        UsageError: ids of another type, or a row without one.
    """
    column = table[name]
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kinds.is_integer(column.type):
        column = _cast(column, pa.int64(), name)
    elif kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        column = column.cast(pa.string())
    elif not kinds.is_null(column.type):
        raise UsageError(f"expected integers or text in column {name!r}, got {column.type}")
    _check_complete(column, name, first)
    if kinds.is_null(column.type):  # without rows
        return pa.array([], pa.string()), np.empty(0, np.int64)
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def as_times(
    table: pa.Table, name: str | None, state: pa.Table | None, first: int
) -> tuple[NDArray[Any] | None, pa.ChunkedArray | None]:
    """Return times as numbers that can be compared, and as a column of 64 bits; None, None without a column of times.

    Args:
        table: the rows.
        name: the column; None: none.
        state: of the sequences before these rows; the times get its type, so that they can be compared.
        first: the number of the first row, for messages.

    Raises:
        UsageError: values that aren't numbers, dates or timestamps, or not of the state's type; a row without a time.
    """
    if name is None:
        return None, None
    column = table[name]
    if state is not None and name in state.column_names:
        wanted = state.schema.field(name).type
        zones = [getattr(kind, "tz", None) for kind in (column.type, wanted)]
        if kinds.is_temporal(column.type) != kinds.is_temporal(wanted) or zones[0] != zones[1]:
            raise UsageError(f"expected column {name!r} to be {wanted}, as before, got {column.type}")
        column = _cast(column, wanted, name)
    kind = column.type
    if kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_null(kind):
        column = _cast(column, pa.float64() if kinds.is_floating(kind) else pa.int64(), name)
    elif kinds.is_date(kind):
        column = column.cast(pa.timestamp("ms"))
    elif not kinds.is_timestamp(kind):
        raise UsageError(f"expected numbers, dates or timestamps in column {name!r}, got {kind}")
    _check_complete(column, name, first)
    ticks = (column.cast(pa.int64()) if kinds.is_temporal(kind) else column).to_numpy()
    if kinds.is_floating(kind) and np.isnan(ticks).any():
        raise refuse_row(first + int(np.argmax(np.isnan(ticks))), f"column {name!r} has no value")
    return ticks, column


def as_numbers(table: pa.Table, name: str, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return a column as numbers, NaN (0 for integers) where missing, and which rows are missing.

    Raises:
        UsageError: values of another type; for an integer dtype, numbers that aren't integers.
    """
    column = table[name]
    kind = column.type
    if kinds.is_null(kind):  # a column without any value
        column = column.cast(pa.from_numpy_dtype(dtype))
    elif not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind) or kinds.is_decimal(kind)):
        raise UsageError(f"expected numbers in column {name!r}, got {kind}")
    whole = dtype.kind in "iu"
    if whole and not (kinds.is_integer(kind) or kinds.is_null(kind)):
        raise UsageError(f"expected integers in column {name!r}, which the network looks up, got {kind}")
    column = _cast(column, pa.from_numpy_dtype(dtype), name, safe=whole)
    missing = column.is_null(nan_is_null=True).to_numpy()
    return (column.fill_null(0) if whole else column).to_numpy(), missing


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str, safe: bool = True) -> pa.ChunkedArray:
    try:
        return column.cast(kind, safe=safe)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"expected column {name!r} as {kind}, got {column.type}: {error}") from None


def _check_complete(column: pa.ChunkedArray, name: str, first: int) -> None:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise refuse_row(first + row, f"column {name!r} has no value")
