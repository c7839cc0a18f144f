"""Options of reading a table, which several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cellstack.cli.options import add_flags
from cellstack.train.checks import UsageError
from cellstack.train.options import declared
from cellstack.train.tables.table import READING


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading a table to the parser of a verb that reads it as in training."""
    group = parser.add_argument_group("tables", "how to read a table; see docs/tables.md (default: as in training)")
    add_flags(group, {name: declared()[name] for name in READING})


def only_one(name: str, columns: Sequence[str] | None) -> str | None:
    """Return the one column that an option of sequences names.

    Raises:
        UsageError: more than one column, or none.
    """
    if columns is not None and len(columns) != 1:
        raise UsageError(f"expected `{name}=…` to name one column for sequences, got {', '.join(columns) or 'none'}")
    return columns[0] if columns else None


def given_options(args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """Return the options of `add_table_options` that were given, as keyword arguments of `read_table`."""
    return {name: value for name in options if (value := getattr(args, name)) is not None}
