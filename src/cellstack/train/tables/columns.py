"""Convert the cells of a column to numbers or categories. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.tables.source import Series, TableCells

LARGEST = float(np.finfo(np.float32).max)
MOST_LABELS = 1000
SIGN, POWER, BLANKS = r"[+-]?", r"(?:[eE][+-]?\d+)?", "'\u00a0\u202f "
FIRST = r"[1-9]\d{0,2}"  # 1,234 may have a thousands separator, 0,234 can't
POINT = rf"{SIGN}(?:\d+|{FIRST}(?:[,{BLANKS}]\d{{3}})+)?(?:\.\d*)?{POWER}"
COMMA = rf"{SIGN}(?:\d+|{FIRST}(?:[.{BLANKS}]\d{{3}})+)?(?:,\d*)?{POWER}"
GROUPED = rf"{SIGN}{FIRST}(?:,\d{{3}})+(?:\.\d*)?"
WITH_UNIT = re.compile(r"(?P<before>\D*?\s)?[+-]?\d(?:[\d.,]*\d)?(?P<after>\D*)")
MONEY = re.compile(r"[-+]?\s?(?:[$€£¥]\s?[\d.,]+|[\d.,]+\s?[%$€£¥])")


@dataclass(frozen=True)
class CategoryColumn:
    """A column of text with few distinct values.

    Args:
        codes: int64 `[N]`, indices into `labels`; -1 where missing.
        labels: the distinct values, sorted.
    """

    codes: NDArray[np.int64]
    labels: tuple[str, ...]


def decimal_sign(source: TableCells, names: Sequence[str], asked: str | None) -> str:
    """Return the decimal separator: as requested, else as detected in the cells.

    Raises:
        FormatError: the cells are ambiguous.
    """
    if asked is not None:
        if asked not in (".", ","):
            raise UsageError(f"expected . or , as the decimal separator, got {asked!r}")
        return asked
    either = pointed = comma = None
    for name in names:
        cells = source.frame[name].dropna()
        if not _is_text(cells):
            continue
        if (
            not cells.iloc[:100].str.fullmatch(rf"{POINT}|{COMMA}").all()
            or not cells.str.contains(",", regex=False).any()
        ):
            continue
        cells = cells[cells.str.contains(",", regex=False)]
        ways = (cells.str.fullmatch(GROUPED), cells.str.fullmatch(COMMA))
        for row, point, whole in zip(cells.index, *ways, strict=True):
            if whole and not point:
                comma = comma or (row, name)
            elif point and not whole:
                pointed = pointed or (row, name)
            elif point:
                either = either or (row, name)
    if comma and pointed:
        raise FormatError(
            f"{source.at(comma[0])}: expected one decimal separator, found {source.quote(*comma)} in column {comma[1]} "
            f"and {source.quote(*pointed)} in column {pointed[1]}"
        )
    if comma and source.separator == ",":
        raise FormatError(
            f"{source.at(comma[0])}: expected a decimal point in column {comma[1]}, found {source.quote(*comma)}: use "
            f"`decimal=','` if these are decimal commas"
        )
    if either and not comma and not pointed:
        raise FormatError(
            f"{source.at(either[0])}: {source.quote(*either)} in column {either[1]} is ambiguous: use `decimal=','` "
            f"for decimal commas, or `decimal='.'` if the comma separates thousands"
        )
    return "," if comma else "."


def _is_text(cells: Series) -> bool:
    return len(cells) > 0 and isinstance(cells.iloc[0], str)


def are_decimals(cells: Series, decimal: str) -> bool:
    """Return whether all cells that aren't missing are floats, or text that is a number with this decimal separator."""
    present = cells.dropna()
    if not _is_text(present):
        return present.dtype.kind == "f"
    form = COMMA if decimal == "," else POINT
    return bool((present.str.fullmatch(form) & present.str.contains(r"\d")).all())


def convert(
    source: TableCells, name: str, decimal: str, as_text: bool
) -> tuple[NDArray[np.float64] | CategoryColumn | str, str]:
    """Return a column as float64 numbers `[N]`, as a category, or why it can't be used; and a note on assumptions.

    Args:
        source: the table.
        name: of the column.
        decimal: the decimal separator.
        as_text: convert it to a category regardless of its content.

    Raises:
        FormatError: a cell of a numeric column that isn't a number, or is out of float32's range.
    """
    import pandas as pd

    cells = source.frame[name]
    kind = cells.dtype
    if as_text:
        return _category(name, cells if _is_text(cells.dropna()) else source.text(name), True), ""
    if isinstance(kind, pd.CategoricalDtype):
        return _category(name, cells.astype(object), True), ""
    if pd.api.types.is_bool_dtype(kind) and not pd.api.types.is_object_dtype(kind):
        return _checked(
            source, name, cells.astype("Float64").to_numpy(np.float64, na_value=np.nan)
        ), "0 and 1 for false and true"
    if pd.api.types.is_datetime64_any_dtype(kind) or isinstance(kind, pd.PeriodDtype):
        return "dates in addition to those of the rows", ""
    if pd.api.types.is_timedelta64_dtype(kind):
        return "durations: convert them to numbers, for example with .dt.total_seconds()", ""
    if pd.api.types.is_complex_dtype(kind):
        return "complex numbers", ""
    present = cells.dropna()
    if decimal == "," and source.lines is not None and pd.api.types.is_float_dtype(kind) and len(present):
        cells = source.text(name)  # a point may have been a thousands separator
        present = cells.dropna()
    if pd.api.types.is_numeric_dtype(cells.dtype) or not len(present):
        return _checked(source, name, cells.astype("Float64").to_numpy(np.float64, na_value=np.nan)), ""
    if not _is_text(present):
        if present.map(lambda cell: isinstance(cell, (bool, np.bool_))).all():
            return cells.astype("boolean").astype("Float64").to_numpy(
                np.float64, na_value=np.nan
            ), "0 and 1 for false and true"
        try:
            return _checked(source, name, cells.astype(np.float64).to_numpy()), ""
        except (TypeError, ValueError, OverflowError):
            return f"objects of {type(present.iloc[0]).__name__}", ""
    return _of_text(source, name, cells, decimal)


def _of_text(
    source: TableCells, name: str, cells: Series, decimal: str
) -> tuple[NDArray[np.float64] | CategoryColumn | str, str]:
    present = cells.dropna()
    form, groups = (COMMA, f".{BLANKS}") if decimal == "," else (POINT, f",{BLANKS}")
    some = present.iloc[:1000]
    fit = some.str.fullmatch(form) & some.str.contains(r"\d")
    if 2 * int(fit.sum()) < len(some):
        other = some.str.fullmatch(POINT if decimal == "," else COMMA) & some.str.contains(r"\d")
        if 2 * int(other.sum()) >= len(some):
            row = int(some.index[int(np.argmax(other.to_numpy(bool)))])
            raise FormatError(
                f"{source.at(row)}: expected the decimal separator {decimal!r} in all columns, found "
                f"{source.quote(row, name)} in column {name!r}: use the same one everywhere, or add the column to "
                "`categories=…` if its cells are names"
            )
        if 2 * int(some.str.fullmatch(MONEY).sum()) >= len(some):
            row = int(present.index[0])
            raise FormatError(
                f"{source.at(row)}: expected plain numbers in column {name!r}, found {source.quote(row, name)}: remove "
                f"currency and percent signs"
            )
        return _category(name, cells, False), ""
    fit = present.str.fullmatch(form) & present.str.contains(r"\d")
    if not fit.all():
        row = int(present.index[int(np.argmin(fit.to_numpy(bool)))])
        found = source.quote(row, name)
        if re.fullmatch(r"(?i)[+-]?(inf|infinity)", present[row]):
            raise FormatError(f"{source.at(row)}: expected finite numbers in column {name!r}, found {found}")
        raise FormatError(
            f"{source.at(row)}: expected a number in column {name!r}, found {found}: leave the column out, or, for a "
            f"forecast, add it to `categories=…` if its cells are names"
        )
    parted = present.str.contains(f"[{groups}]", regex=True)
    plain = cells.str.replace(f"[{groups}]", "", regex=True) if parted.any() else cells
    values = (plain.str.replace(",", ".", regex=False) if decimal == "," else plain).astype(np.float64).to_numpy()
    said = f"thousands separators, as in {present[parted].iloc[0]!r}" if parted.any() else ""
    return _checked(source, name, values), said


def _checked(source: TableCells, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    beyond = np.abs(values) > LARGEST
    if beyond.any():
        row = int(np.argmax(beyond))
        found = source.quote(row, name)
        what = "finite numbers" if np.isinf(values[row]) and "inf" in found.lower() else "a number in float32's range"
        raise FormatError(f"{source.at(row)}: expected {what} in column {name!r}, found {found}")
    return values


def such_as(name: str, cells: Sequence[str]) -> str:
    """Return one of a column's texts and, if most are numbers with the same unit, how pandas removes it.

    >>> such_as("price", ["76.5 EUR", "80 EUR"])
    ", such as '76.5 EUR'; to use its numbers, in pandas df['price'].str.removesuffix(' EUR')"
    """
    found = Counter(unit.group("before", "after") for cell in cells if (unit := WITH_UNIT.fullmatch(cell)))
    said = f", such as {cells[0]!r:.60}"
    (before, after), count = found.most_common(1)[0] if found else (("", ""), 0)
    if 2 * count < len(cells) or not (before or after):
        return said
    how = f".str.removeprefix({before!r})" * bool(before) + f".str.removesuffix({after!r})" * bool(after)
    return f"{said}; to use its numbers, in pandas df[{name!r}]{how}"


def _category(name: str, cells: Series, always: bool) -> CategoryColumn | str:
    import pandas as pd

    cells = cells.astype(str).where(cells.notna())
    codes, labels = pd.factorize(cells, sort=True)
    present = int((codes >= 0).sum())
    if not always and (2 * len(labels) > present or len(labels) > MOST_LABELS):
        example = such_as(name, cells.dropna().iloc[:1000].tolist())
        return f"text with {len(labels):,} distinct values in {present:,} rows{example}"
    return CategoryColumn(codes.astype(np.int64), tuple(str(label) for label in labels))
