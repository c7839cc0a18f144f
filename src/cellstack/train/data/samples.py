"""The input of any network from a file of numbers. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cellstack.formats.lines import Lines, picked
from cellstack.network import Network
from cellstack.train.checks import UsageError


def read_sample(net: Network, path: str, columns: Sequence[str] | None = None) -> Any:
    """Read input data for a network from a file, as `Network.run` takes it.

    Args:
        net: the network.
        path: `.npy`, an array `[B, T, I]`, or `[T, I]` of one row; `.npz`, such an array for each input, by name (y and
            weight, which a file to train on has, aren't used unless they are inputs); `.csv`, the steps of one row, a
            line each, with or without a header; `.jsonl`, the same as JSON; `-`, either of these on standard input.
        columns: the columns of the lines to use, by name or by number from 1; None = all.

    Raises:
        UsageError: another suffix, or arrays that don't fit the network.
        FormatError: a line that isn't a step.
        OSError: the file can't be read.
    """
    suffix = Path(path).suffix.lower()
    as_lines = path == "-" or suffix in (".csv", ".jsonl")
    if suffix not in (".npy", ".npz") and not as_lines:
        raise UsageError(f"expected a .npy, .npz, .csv or .jsonl file, or - for standard input, got {path!r}")
    if columns is not None and not as_lines:
        raise UsageError(f"{path}: `columns=…` applies only to .csv, .jsonl and standard input")
    if as_lines:
        if len(net.inputs) > 1:
            raise UsageError(
                f"{path}: expected a .npz file with the inputs {', '.join(net.inputs)}: lines can hold one input only"
            )
        width = 1 if net.graph.ids else net.input_size
        if width is None:
            raise UsageError(f"{path}: expected .npy or .npz, because the network doesn't fix the width of its input")
        source = "standard input" if path == "-" else path
        lines = Lines(source, width, "csv" if suffix == ".csv" else None)
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            rows = file if columns is None else picked(file, columns, source)
            frames = [frame for frame in map(lines.frame, rows) if frame is not None]
        array = np.array(frames, np.float64).reshape(len(frames), width)
        given: dict[str, Any] = {next(iter(net.inputs)): array.ravel() if net.graph.ids else array}
    else:
        try:
            with open(path, "rb") as file:
                read: Any = np.load(file, allow_pickle=False)
                if isinstance(read, np.ndarray) != (suffix == ".npy"):  # np.load ignores the suffix
                    raise ValueError(f"the content isn't {suffix}")
                if suffix == ".npy":
                    given = {net.inputs[0]: read}
                else:  # a file to train on may contain y and weight too
                    used = (name for name in read.files if name in net.inputs or name not in ("y", "weight"))
                    given = {name: read[name] for name in used}
        except (ValueError, EOFError, AttributeError, BadZipFile) as error:
            raise UsageError(f"{path}: expected numeric arrays written by NumPy: {str(error)[:200]}") from None
    if not all(array.size for array in given.values()):
        raise UsageError(f"{path}: the file contains no numbers")
    for name in given.keys() & set(net.inputs):
        if net.graph.timed(name) and given[name].ndim == len(net.shapes[name]):  # one row
            given[name] = np.expand_dims(given[name], 0)
    try:
        flows = net.as_inputs("sample", given)
        net.run(flows)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    return flows
