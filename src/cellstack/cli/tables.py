"""Options of reading a table, which several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES_ONLY
from cellstack.train.tables.table import Table, read_table

SEQUENCES = TABLES_ONLY  # options that apply to sequences too
TABLE = ("date", "zone", "id", "freq", "categories", *SEQUENCES)


def names(text: str) -> tuple[str, ...]:
    """Parse names, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def decimal(text: str) -> str:
    """Parse a decimal separator, by name or as the character itself."""
    found = {"point": ".", "comma": ",", ".": ".", ",": ","}.get(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected point or comma, got {text!r}")
    return found


def add_table_options(parser: argparse.ArgumentParser, default: str = "detected") -> None:
    """Add the options of reading a table to a verb's parser."""
    group = parser.add_argument_group("tables", f"how to read a table; see docs/tables.md (default: {default})")
    group.add_argument("--date", metavar="COLUMN", help="date column, or two: day,hour ('' for none)")
    group.add_argument("--id", type=names, metavar="A,B", help="columns that identify the series or sequence of a row")
    text = "columns to treat as categories, not as numbers"
    group.add_argument("--category", dest="categories", type=names, metavar="A,B", help=text)
    order = group.add_mutually_exclusive_group()
    order.add_argument("--day-first", dest="day_first", action="store_true", default=None, help="01/02 is 1 February")
    order.add_argument("--month-first", dest="day_first", action="store_false", default=None, help="01/02 is 2 January")
    group.add_argument(
        "--date-format",
        metavar="F",
        help="format of the dates: such as %%d.%%m.%%Y; s, ms, us or ns for Unix times; excel for Excel's day numbers",
    )
    group.add_argument("--zone", metavar="Z", help="time zone of the dates, such as Europe/Berlin")
    group.add_argument("--freq", metavar="F", help="spacing of the rows: h, 30min, D, B (weekdays), MS (months)")
    group.add_argument("--decimal", type=decimal, metavar="{point,comma}", help="decimal separator")
    group.add_argument("--encoding", metavar="E", help="text encoding, such as latin-1")


def only_one(columns: tuple[str, ...] | None) -> str | None:
    """Return the one column that identifies sequences.

    Raises:
        UsageError: more than one column.
    """
    if columns is not None and len(columns) != 1:
        raise UsageError(f"expected --id to name one column for sequences, got {', '.join(columns) or 'none'}")
    return columns[0] if columns else None


def table_from(args: argparse.Namespace, path: str) -> Table:
    """Read a table with the options of `add_table_options`.

    Args:
        args: the parsed options.
        path: the file.

    Raises:
        FormatError, UsageError, OSError: see `read_table`.
    """
    return read_table(path, **given(args, TABLE))


def given(args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """Return the options of `add_table_options` that were given, as keyword arguments of `read_table`."""
    return {name: value for name in options if (value := getattr(args, name)) is not None}
