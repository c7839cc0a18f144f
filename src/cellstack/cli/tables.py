"""The options by which every verb reads a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from cellstack.train.checks import UsageError
from cellstack.train.tables.table import Table, read_table

SEQUENCES = ("day_first", "date_format", "decimal", "encoding")  # options by which sequences in tables are read too
TABLE = ("date", "zone", "id", "freq", "category", *SEQUENCES)


def names(text: str) -> tuple[str, ...]:
    """Return the names that stand in a text with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading a table to a verb's parser."""
    group = parser.add_argument_group("tables", "what the file doesn't tell; see docs/tables.md")
    group.add_argument("--date", metavar="A", help="column of dates, or day,hour for two ('' for none)")
    order = group.add_mutually_exclusive_group()
    order.add_argument("--day-first", dest="day_first", action="store_true", default=None, help="01/02 is 1 February")
    order.add_argument("--month-first", dest="day_first", action="store_false", default=None, help="01/02 is 2 January")
    group.add_argument(
        "--date-format", metavar="F", help="such as %%d.%%m.%%Y; s, ms, us, ns for Unix times; excel for its numbers"
    )
    group.add_argument("--zone", metavar="Z", help="time zone of the dates, such as Europe/Berlin")
    group.add_argument("--id", type=names, metavar="A,B", help="columns that tell several series apart")
    group.add_argument("--freq", metavar="F", help="spacing of the rows: h, 30min, D, B for weekdays, MS for months")
    group.add_argument("--category", type=names, metavar="A,B", help="columns to take as names, not as numbers")
    group.add_argument("--decimal", choices=(".", ","), help="sign before decimals")
    group.add_argument("--encoding", metavar="E", help="of the text, such as latin-1 (utf-8)")


def only_one(columns: tuple[str, ...] | None) -> str | None:
    """Return the column that tells sequences apart, which is one.

    Raises:
        UsageError: several.
    """
    if columns is not None and len(columns) != 1:
        raise UsageError(f"expected --id to name one column for sequences, got {', '.join(columns) or 'none'}")
    return columns[0] if columns else None


def table_from(args: argparse.Namespace, path: str, reading: Mapping[str, Any] | None = None) -> Table:
    """Read a table as the options of `add_table_options` say.

    Args:
        args: what they were parsed into.
        path: the file.
        reading: how a table of this kind was read before (`Table.reading`); options that are given go before it.

    Raises:
        FormatError, UsageError, OSError: see `read_table`.
    """
    return read_table(path, **merged(reading or {}, given(args, TABLE)))


def given(args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """Return those of the options of `add_table_options` that are given, as `read_table` calls them."""
    names = {"id": "ids", "category": "categories"}
    return {names.get(name, name): value for name in options if (value := getattr(args, name)) is not None}


def merged(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a table is to be read, as asked for, else as one of its kind was read before."""
    unknown = {"date_format"} if {"date", "day_first"} & given.keys() else set()  # not known any more
    return {name: value for name, value in before.items() if name not in unknown} | {**given}
