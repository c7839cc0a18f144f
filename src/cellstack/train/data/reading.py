"""Sequences from files: `.ts`, `.npz`, and tables in long form, CSV or Parquet. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, is_zipfile

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.train.checks import UsageError
from cellstack.train.data.sequences import Sequences, as_sequences, named
from cellstack.train.data.ts import read_ts
from cellstack.train.tables import dates
from cellstack.train.tables.columns import are_decimals, convert, decimal_sign
from cellstack.train.tables.rows import series_of
from cellstack.train.tables.source import Frame, read_source

SUFFIXES = (".ts", ".npz", ".csv", ".tsv", ".parquet")
TABLES = (".csv", ".tsv", ".parquet")
TABLES_ONLY = ("day_first", "date_format", "decimal", "encoding")  # options of reading a table of sequences
SEQUENCES = ("task", "id", "time", "features", "per_step", "resample", *TABLES_ONLY)  # options of reading them
ARRAYS = ("x", "y", "lengths", "weight")


class Read(NamedTuple):
    """A table as a frame.

    `ignored` has the unused columns with the reasons, `notes` the assumptions; `reading` has the arguments with which
    `read_frame` reads another file of its kind in the same way.
    """

    frame: Frame
    ignored: dict[str, str]
    notes: tuple[str, ...]
    reading: dict[str, str | None]


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
    resample: float | None = None,
    optional: bool = False,
    **reading: Any,
) -> Sequences:
    """Read sequences from a file; its suffix determines the format.

    Args:
        path: `.ts`; `.npz` with `x [N, T, C]` and optionally `y`, `lengths [N]` of sequences that are padded at the
            end, and `weight [N]`; `.csv`, `.tsv` or `.parquet`, a table with a row per step.
        y: a table's column of classes or targets; None for none, and for other files.
        task, labels, id, time, features, weight, per_step, resample: see `as_sequences`.
        optional: accept a table without the column y, as data without classes or targets.
        reading: `day_first`, `date_format`, `decimal` and `encoding` of a table, see `read_table`.

    Raises:
        FormatError: the content doesn't match the suffix.
        UsageError: an unsupported suffix, or an error of `as_sequences`.
        OSError: the file can't be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a file with one of the suffixes {', '.join(SUFFIXES)}")
    if suffix in (".ts", ".npz"):
        own = {"y": y, "id": id, "time": time, "sample_weight": weight, "resample": resample, **reading}
        for name, given in own.items():
            if given is not None:
                raise UsageError(f"{path}: {name} applies only to tables, not to {suffix}, got {given!r}")
    try:
        if suffix == ".ts":
            data = _ts(path, task, labels)
            return replace(data, columns=named(features, data.channels, path.stem))
        if suffix == ".npz":
            arrays = _npz(path, per_step)
            own = {"task": task, "labels": labels, "per_step": per_step, "name": str(path)}
            own |= {"weight": arrays.get("weight"), "features": features}
            return replace(as_sequences(arrays["x"], arrays.get("y"), **own), name=path.stem)
        read = read_frame(path, y, task, id=id, time=time, features=features, weight=weight, **reading)
        if optional and y not in read.frame:
            y = per_step = None
        data = as_sequences(
            read.frame,
            y,
            task=task,
            labels=labels,
            id=id,
            time=time,
            features=features,
            weight=weight,
            per_step=per_step,
            resample=resample,
            name=str(path),
        )
        return replace(
            data, name=path.stem, ignored=read.ignored | data.ignored, notes=read.notes, table=data.table | read.reading
        )
    except UsageError as error:
        said = str(error)
        raise UsageError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def merged(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of reading a table: those that are given, else those with which one was read before."""
    unknown = {"date_format"} if {"time", "day_first"} & given.keys() else set()  # it belonged to the old options
    return {name: value for name, value in before.items() if name not in unknown} | {**given}


def read_frame(
    path: Path,
    label: str | None,
    task: str | None,
    *,
    id: str | None,
    time: str | None,
    features: Sequence[str] | None,
    weight: str | None,
    day_first: bool | None = None,
    date_format: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
) -> Read:
    """Return a table as a pandas frame, with numeric columns parsed regardless of how the numbers are written.

    Args:
        path: a file that `read_source` reads.
        label: its column of classes or numbers; classes aren't parsed.
        task, id, time, features, weight: see `as_sequences`; times that are text are parsed as dates.
        day_first, date_format, decimal, encoding: see `read_table`.

    Raises:
        FormatError: it can't be read as a table, or is ambiguous.
        UsageError: the reader isn't installed, or an argument is out of range.
    """
    if time is None and (day_first is not None or date_format is not None):
        raise UsageError("`day_first=…` and `date_format=…` need `time=…`, the column of dates")
    source = read_source(path, encoding, () if id is None else (id,))
    if not len(source.frame):
        raise FormatError(f"{path}: expected rows below the header, found none")
    frame, notes, ignored = source.frame, source.notes, dict[str, str]()
    named = (id, time, label, weight)
    if features is None:
        ignored = {name: "numbers the rows" for name in frame if name not in named and source.numbers_rows(name)}
        features = [name for name in frame if name not in named and name not in ignored]
    numbers = [*features, weight, *([] if task == "classify" else [label])]
    numbers = [name for name in numbers if name is not None and name in frame]
    sign = decimal_sign(source, numbers, decimal)
    if task is None and label in numbers and not are_decimals(frame[label], sign):  # classes may be anything
        numbers.remove(label)
    for name in numbers:
        values, said = convert(source, name, sign, False)
        notes += [f"`{name}`: {said}"] if said else []
        if isinstance(values, np.ndarray):
            frame[name] = values
    notes += ["decimal commas"] if sign == "," else []
    if time is not None and time in frame and (date_format is not None or frame[time].dtype.kind not in "iuf"):
        series, _ = series_of(source, (id,) if id is not None and id in frame else ())
        found = dates.read(source, time, series, day_first, date_format)
        notes += [f"`{time}`: {found.note}"] if found.note else []
        frame[time], date_format = found.times, found.form
    elif day_first is not None:
        raise UsageError(f"`day_first=…` has no effect: column {time!r} contains numbers, not dates")
    reading = {"date_format": date_format or None, "decimal": "," if sign == "," else decimal, "encoding": encoding}
    return Read(frame.drop(columns=list(ignored)), ignored, tuple(notes), reading)


def _ts(path: Path, task: str | None, labels: tuple[Any, ...] | None) -> Sequences:
    data = read_ts(path, labels)
    if task is not None and data.y is not None and (task == "classify") != bool(data.labels):
        kinds = ("numbers", "classes")
        raise UsageError(f"expected {kinds[task == 'classify']}, found {kinds[bool(data.labels)]}")
    return data


def _npz(path: Path, per_step: bool | None) -> dict[str, Any]:
    """Return a file's arrays, x as a list of sequences without their padding."""
    with path.open("rb") as file:
        if not is_zipfile(file):  # np.load would take it for a pickle
            raise FormatError(f"{path}: expected named arrays written by np.savez, found another kind of file")
    try:
        with np.load(path, allow_pickle=False) as read:
            arrays = {name: read[name] for name in read.files}
    except (ValueError, EOFError, BadZipFile) as error:
        if "pickle" in str(error):
            raise FormatError(
                f"{path}: arrays of objects aren't supported, because pickles aren't read: save x padded to one "
                "length, and the array lengths"
            ) from None
        raise FormatError(f"{path}: expected arrays written by np.savez: {str(error)[:120]}") from None
    unknown = [name for name in arrays if name not in ARRAYS]
    if unknown or "x" not in arrays:
        found = ", ".join(arrays) or "none"
        raise UsageError(f"expected an array named x and optionally y, lengths and weight, found {found}")
    lengths = arrays.pop("lengths", None)
    if lengths is not None:
        x = arrays["x"]
        if lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu" or x.ndim != 3:
            raise UsageError(
                f"expected x [N, T, C] and integers lengths [N], got {x.shape} and {lengths.shape} {lengths.dtype}"
            )
        wrong = (lengths < 1) | (lengths > x.shape[1])
        if wrong.any():
            raise UsageError(f"expected lengths from 1 to T = {x.shape[1]}, got {lengths[np.argmax(wrong)]}")
        arrays["x"] = [row[:length] for row, length in zip(x, lengths, strict=True)]
        # One per step, with the same padding.
        if per_step is not False and "y" in arrays and arrays["y"].shape[:2] == x.shape[:2]:
            arrays["y"] = [row[:length] for row, length in zip(arrays["y"], lengths, strict=True)]
    return arrays
