"""Sequences out of files: `.ts`, `.npz`, and tables in long form, CSV or Parquet. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np

from cellstack.spec import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.data.sequences import Sequences, as_sequences
from cellstack.train.data.ts import read_ts
from cellstack.train.tables.columns import convert, decimal_sign
from cellstack.train.tables.source import read_source

SUFFIXES = (".ts", ".npz", ".csv", ".tsv", ".parquet")
TABLES = (".csv", ".tsv", ".parquet")
HELD = ("x", "y", "lengths", "weight")


def read_sequences(
    path: str | os.PathLike[str],
    y: str | None = None,
    *,
    task: str | None = None,
    labels: tuple[Any, ...] | None = None,
    id: str | None = None,
    time: str | None = None,
    features: Sequence[str] | None = None,
    weight: str | None = None,
    per_step: bool | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
) -> Sequences:
    """Read sequences from a file, told by its suffix.

    Args:
        path: `.ts`; `.npz` with `x [N, T, C]` and, where there are such, `y`, `lengths [N]` of the sequences where they
            are padded at their ends, and `weight [N]`; `.csv`, `.tsv` or `.parquet`, a table with a row a step.
        y: the column of a table that holds the classes or targets; None for none, and for other files.
        task, labels, id, time, features, weight, per_step: see `as_sequences`.
        decimal, encoding: of a table that is text; told by the file where None.

    Raises:
        FormatError: the file can't be read as what its suffix says.
        UsageError: another suffix, or what `as_sequences` refuses.
        OSError: it can't be read at all.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a file that ends in one of {', '.join(SUFFIXES)}")
    if suffix in (".ts", ".npz"):
        of_tables = {"y": y, "id": id, "time": time, "features": features, "weight": weight}
        for name, given in (of_tables | {"decimal": decimal, "encoding": encoding}).items():
            if given is not None:
                raise UsageError(f"{path}: expected {name} with a table alone, as {suffix} has its own, got {given!r}")
    try:
        if suffix == ".ts":
            return _ts(path, task, labels)
        if suffix == ".npz":
            arrays = _npz(path, per_step)
            told = {"task": task, "labels": labels, "per_step": per_step, "name": path.stem}
            return as_sequences(arrays["x"], arrays.get("y"), weight=arrays.get("weight"), **told)
        return as_sequences(
            read_frame(path, decimal, encoding),
            y,
            task=task,
            labels=labels,
            id=id,
            time=time,
            features=features,
            weight=weight,
            per_step=per_step,
            name=path.stem,
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_frame(path: Path, decimal: str | None = None, encoding: str | None = None) -> Any:
    """Return a table as a pandas frame, its columns numbers where they hold such.

    Args:
        path: a text file, whose separator is told by its lines, or Parquet.
        decimal, encoding: of the text; told by the file where None.

    Raises:
        FormatError: it can't be read as a table.
        UsageError: what reads it isn't installed.
    """
    source = read_source(path, encoding)
    frame = source.frame.copy()
    if source.lines is not None and decimal_sign(source, list(frame), decimal) == ",":
        for name in frame:
            value, _ = convert(source, name, ",", False)
            if isinstance(value, np.ndarray):
                frame[name] = value
    return frame


def _ts(path: Path, task: str | None, labels: tuple[Any, ...] | None) -> Sequences:
    data = read_ts(path, labels)
    if task is not None and data.y is not None and (task == "classify") != bool(data.labels):
        kinds = ("numbers", "classes")
        raise UsageError(f"expected {kinds[task == 'classify']}, found {kinds[bool(data.labels)]}")
    return data


def _npz(path: Path, per_step: bool | None) -> dict[str, Any]:
    """Return a file's arrays, x as a list of sequences without their padding."""
    with path.open("rb") as file:
        if not is_zipfile(file):  # np.load goes by content, and would take it for a pickle
            raise FormatError(f"{path}: expected arrays by name as np.savez writes them, found another file")
    try:
        with np.load(path, allow_pickle=False) as read:
            arrays = {name: read[name] for name in read.files}
    except (ValueError, EOFError, BadZipFile) as error:
        if "pickle" in str(error):
            raise FormatError(
                f"{path}: expected arrays of numbers or text, found one of objects, which are never unpickled: write x "
                "padded to one length, and the lengths beside it"
            ) from None
        raise FormatError(f"{path}: expected arrays as np.savez writes them: {str(error)[:120]}") from None
    unknown = [name for name in arrays if name not in HELD]
    if unknown or "x" not in arrays:
        found = ", ".join(arrays) or "none"
        raise UsageError(f"expected arrays named x and, where there are such, y, lengths and weight, found {found}")
    lengths = arrays.pop("lengths", None)
    if lengths is not None:
        x = arrays["x"]
        if lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu" or x.ndim != 3:
            raise UsageError(
                f"expected x [N, T, C] and lengths [N] of whole numbers, got {x.shape}, {lengths.shape} {lengths.dtype}"
            )
        wrong = (lengths < 1) | (lengths > x.shape[1])
        if wrong.any():
            raise UsageError(f"expected lengths from 1 to T = {x.shape[1]}, got {lengths[np.argmax(wrong)]}")
        arrays["x"] = [row[:length] for row, length in zip(x, lengths, strict=True)]
        if per_step is not False and "y" in arrays and arrays["y"].shape[:2] == x.shape[:2]:  # one a step, padded alike
            arrays["y"] = [row[:length] for row, length in zip(arrays["y"], lengths, strict=True)]
    return arrays
