"""How sequences were read, in words and as plain values. Needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellstack.train.data.lazy import Lazy
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.targets import counted

SHOWN = 12  # most classes, or channels of a kind, to list


def understood(data: Sequences, path: str) -> tuple[list[str], dict[str, Any]]:
    """Describe how data was read, as lines and as plain values.

    Missing values and constant channels aren't reported for data that isn't in memory.
    """
    lengths, count = data.lengths, len(data.lengths)
    x = data.x if isinstance(data, Sequences) and not isinstance(data.x, Lazy) else []
    missing = np.sum([np.isnan(one).sum(axis=0) for one in x], axis=0)
    low, high = (reduce([reduce(one) for one in x] or [[]]) for reduce in (np.fmin.reduce, np.fmax.reduce))  # but NaN
    names = list(data.columns) or [f"channel {n}" for n in range(data.channels)]
    constant = [name for name, a, b in zip(names, low, high, strict=False) if a == b]
    empty = [name for name, a in zip(names, low, strict=False) if np.isnan(a)]
    span = f"{lengths.min()}" if lengths.min() == lengths.max() else f"{lengths.min()} to {lengths.max()}"
    channels = f"{data.channels} channel{'s' * (data.channels != 1)}"
    channels += f" ({', '.join(data.columns)})" if data.columns else ""
    lines = [f"{path}: {count:,} sequence{'s' * (count != 1)} of {span} steps, {channels}"]
    lines += [f"  {line}" for line in (*_learned(data), *data.notes, *_rates(data))]
    share = float(missing.sum()) / float(lengths.sum() * data.channels)
    if share:
        lines.append(
            f"  missing: {int(missing.sum()):,} values, {share:.2%}, handled by a mask or by indicator channels"
        )
    lines += [
        f"  {what}: {', '.join(found)}" for what, found in (("constant", constant), ("without values", empty)) if found
    ]
    lines += [f"  ignored: {column}, because it {why}" for column, why in data.ignored.items()]
    described: dict[str, Any] = {
        "file": path,
        "sequences": count,
        "steps": [int(lengths.min()), int(lengths.max())],
        "channels": names,
        "classes": None if not data.labels or data.y is None else {str(k): n for k, n in _counts(data).items()},
        "per_step": data.per_step,
        "missing": int(missing.sum()),
        "constant": constant,
        "ignored": data.ignored,
    }
    return lines, described


def _rates(data: Sequences) -> list[str]:
    if step := data.table.get("resample"):
        return [f"interpolated at intervals of {step:g}, by {data.table['time']!r}"]
    return [data.rates] if data.rates else []


def _counts(data: Sequences) -> dict[Any, int]:
    assert data.y is not None
    return counted(np.concatenate(data.y) if isinstance(data.y, list) else data.y, data.labels)


def _learned(data: Sequences) -> list[str]:
    """Describe what is to be learned."""
    each = "step" if data.per_step else "sequence"
    if data.y is None:
        return ["no classes or numbers to learn"]
    if not data.labels:
        y = np.concatenate(data.y) if isinstance(data.y, list) else data.y
        many = "a number" if y.ndim == 1 else f"{y.shape[1]} numbers"
        return [f"regression: {many} per {each}, from {y.min():.6g} to {y.max():.6g}"]
    counts = _counts(data)
    shown = ", ".join(f"{label} ({n:,})" for label, n in list(counts.items())[:SHOWN])
    more = f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    lines = [f"classification: {len(counts)} classes, one per {each}: {shown}{more}"]
    single = [str(label) for label, n in counts.items() if n == 1]
    if single:
        lines.append(f"  with a single example, so either without training or without validation: {', '.join(single)}")
    return lines
