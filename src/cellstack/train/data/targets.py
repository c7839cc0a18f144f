"""Targets of sequences: classes of several types, or numbers, for each sequence or each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError, refuse_masked

TASKS = ("classify", "regress")
WORDS = {str: "text", bool: "bools", int: "integers", float: "numbers"}
FEW = 20  # up to so many distinct integers are taken as classes
FLOAT, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
SHARE = 5  # more distinct integers are classes only with so many examples per class on average


def as_targets(
    y: Any,
    lengths: NDArray[np.int64],
    task: str | None,
    labels: tuple[Any, ...] | None = None,
    per_step: bool | None = None,
) -> tuple[NDArray | list[NDArray] | None, tuple[Any, ...]]:
    """Return targets in the form of `Sequences.y`, and the classes.

    Args:
        y: see `as_sequences`.
        lengths: steps of each sequence, `[N]`.
        task: `"classify"`, `"regress"`, or None = determined by y.
        labels: the known classes; None = those of y.
        per_step: whether y has one entry per step; None = determined by its shape.

    Raises:
        UsageError: the wrong number of entries, missing ones, an unsupported type, a class that isn't in `labels`, or
            integers that may be classes or targets.
    """
    if task not in (None, *TASKS):
        raise UsageError(f"expected task to be one of {', '.join(TASKS)}, got {task!r}")
    if y is None:
        return None, labels or ()
    refuse_masked("y", y)
    if isinstance(y, Mapping):
        raise UsageError("y: expected one entry per sequence, got a mapping: mappings by id apply only to frames")
    parts = [_array(part) for part in y] if _nested(y) else None
    if parts is None:
        flat = _array(y)
        if flat.ndim == 0:
            raise UsageError(f"y: expected one entry per sequence, got {y!r:.60}")
        if len(flat) != len(lengths):
            swapped = "; x is [N, T, C], and its second axis has as many entries: pass x.swapaxes(0, 1)?"
            more = swapped if len(lengths) and (lengths == len(flat)).all() else ""
            raise UsageError(f"y: expected one entry per sequence, {len(lengths)}, got {len(flat)}{more}")
        if flat.ndim == 1:
            if per_step:
                raise UsageError("y: expected one entry per step with per_step, got one per sequence")
            return _values(flat, task, labels)
        parts = list(flat)
    if len(parts) != len(lengths):
        raise UsageError(f"y: expected one entry per sequence, {len(lengths)}, got {len(parts)}")
    if per_step is None:
        per_step = _is_per_step(parts, lengths, task)
    if not per_step:
        for n, part in enumerate(parts):
            if part.shape != parts[0].shape:
                raise UsageError(f"y[{n}]: expected {parts[0].shape} targets, as y[0] has, got {part.shape}")
        return _values(np.stack(parts), task, labels)
    for n, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if len(part) != length:
            raise UsageError(f"y[{n}]: expected one entry per step, {length}, got {len(part)}")
    values, labels = _values(np.concatenate(parts), task, labels)
    return np.split(values, np.cumsum(lengths)[:-1]), labels


def _nested(y: Any) -> bool:
    """Return whether y is a list or an object array of arrays or lists."""
    if isinstance(y, (list, tuple)) or (isinstance(y, np.ndarray) and y.dtype == object and y.ndim == 1):
        return bool(len(y)) and all(
            isinstance(part, (list, tuple)) or (hasattr(part, "shape") and len(part.shape)) for part in y
        )
    return False


def _is_per_step(parts: list[NDArray], lengths: NDArray[np.int64], task: str | None) -> bool:
    """Return whether there is one entry per step, according to the shapes."""
    counts = np.array([len(part) for part in parts])
    fits, even = bool((counts == lengths).all()), len(set(counts.tolist())) == 1
    if not fits and not even:
        n = int(np.argmax(counts != lengths))
        raise UsageError(
            f"y[{n}]: expected one entry per step, {lengths[n]}, or the same number in all sequences, got {counts[n]}"
        )
    if not fits:
        return False
    numbers = parts[0].dtype.kind == "f" or task == "regress"
    if even and parts[0].ndim == 1 and numbers:
        raise UsageError(
            f"y: the shape is ambiguous, because there are {counts[0]} targets and {counts[0]} steps: pass "
            f"per_step=True for one target per step, or per_step=False for {counts[0]} targets per sequence"
        )
    return True


def _array(y: Any) -> NDArray:
    """Return y as an array of numbers or of plain objects; lists of several types aren't converted to text."""
    if hasattr(y, "detach"):
        y = y.detach().cpu()
    if hasattr(y, "dtype") or hasattr(y, "shape"):
        y = y.to_numpy() if hasattr(y, "to_numpy") else np.asarray(y)
        return y if y.dtype.kind in "biufSUO" else y.astype(object)
    if not isinstance(y, Iterable) or isinstance(y, (str, bytes)):
        raise UsageError(f"y: expected one entry per sequence, got {y!r:.60}")
    items = list(y)
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _values(flat: NDArray, task: str | None, labels: tuple[Any, ...] | None) -> tuple[NDArray, tuple[Any, ...]]:
    """Return `[N]` or `[N, O]` values as class indices and the classes, or as float32 and ()."""
    values = np.array([_plain(value) for value in flat.ravel()], object) if flat.dtype.kind in "SUO" else flat.ravel()
    if values.dtype == object:
        _refuse_missing(values, [value is None or value != value for value in values])
        kinds = {type(value) for value in values}
        unknown = kinds - WORDS.keys()
        if unknown:
            raise UsageError(f"y: expected text, numbers or bools, got {unknown.pop().__name__}")
        kinds -= {int} if kinds == {int, float} else set()
        if len(kinds) > 1:
            raise UsageError(
                f"y: expected entries of one type, got {' and '.join(sorted(WORDS[kind] for kind in kinds))}"
            )
        kind = kinds.pop() if kinds else float
        try:
            values = values.astype(kind)
        except OverflowError:
            raise UsageError("y: expected integers below 2^63, got a larger one") from None
    else:
        kind = {"b": bool, "i": int, "u": int, "f": float}[values.dtype.kind]
    if labels is not None or task == "classify" or (task is None and kind is not float):
        if kind is float and labels is None and task is None:
            raise UsageError("y: expected classes, got numbers")
        if flat.ndim > 1:
            why = "multiple labels aren't supported"
            if flat.shape[-1] == 1 or _is_one_hot(flat):
                why = "pass y[:, 0]" if flat.shape[-1] == 1 else "pass the classes of one-hot rows, y.argmax(axis=1)"
            raise UsageError(f"y: expected one class per entry, got {flat.shape}: {why}")
        return _classes(values, kind, labels, task is None)
    if kind in (str, bool) and task == "regress":
        raise UsageError(f"y: expected numbers with task regress, got {WORDS[kind]}")
    numbers = values.astype(np.float64)
    _refuse_missing(numbers, np.isnan(numbers))
    if task is None and _is_one_hot(flat):
        raise UsageError(
            f"y: the rows of {flat.shape} look like one-hot classes: pass the classes, y.argmax(axis=1), or "
            "task='regress' for numbers"
        )
    if task is None and flat.ndim == 1 and set(np.unique(numbers)) == {0.0, 1.0}:
        raise UsageError(
            "y: the numbers 0.0 and 1.0 may be classes or targets: pass task='classify' or task='regress', or integers "
            "for classes"
        )
    return in_float32(numbers).reshape(flat.shape), ()


def _is_one_hot(rows: NDArray) -> bool:
    """Return whether each of at least two rows `[N, K]` has one 1, and 0 elsewhere."""
    if rows.ndim != 2 or min(rows.shape) < 2 or rows.dtype.kind not in "biuf":
        return False
    return bool(((rows == 0) | (rows == 1)).all() and (rows.sum(axis=1) == 1).all())


def in_float32(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return targets in float32.

    Raises:
        UsageError: a target that isn't finite, or is too large for float32; or all are too small for it.
    """
    sizes = np.abs(numbers).ravel()
    for bad, what in (
        (~np.isfinite(sizes), "expected finite numbers"),
        (
            sizes > FLOAT,
            f"the targets overflow float32, whose largest number is {FLOAT:.2g}: divide them by a constant",
        ),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            raise UsageError(f"y: {what}, got {numbers.ravel()[at]} at position {at}")
    if 0 < sizes.max(initial=0.0) < TINY:
        raise UsageError(
            f"y: the targets underflow float32, whose smallest normal number is {TINY:.2g}: multiply them by a "
            f"constant, got {sizes.max()} at most"
        )
    return numbers.astype(np.float32)


def _plain(value: Any) -> Any:
    """Return a value as a plain Python object."""
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else None if type(value).__name__ == "NAType" else value


def _refuse_missing(values: NDArray, missing: Any) -> None:
    where = np.flatnonzero(np.asarray(missing))
    if len(where):
        raise UsageError(
            f"y: missing values aren't supported, got {values[where[0]]} at position {where[0]} ({len(where)} of "
            f"{len(values)} are missing): leave them out"
        )


def _classes(
    values: NDArray, kind: type, labels: tuple[Any, ...] | None, inferred: bool
) -> tuple[NDArray[np.int64], tuple[Any, ...]]:
    """Return the values' class indices, and the classes; `inferred` is whether the task was determined by y."""
    if kind is float:
        numbers = values.astype(np.float64)
        _refuse_missing(numbers, np.isnan(numbers))
        broken = numbers != np.round(numbers)
        if broken.any() or not np.isfinite(numbers).all():
            at = int(np.argmax(broken | ~np.isfinite(numbers)))
            raise UsageError(
                f"y: expected classes as text, integers or bools, got {numbers[at]} at position {at}: use "
                "task='regress' for numbers"
            )
        values, kind = numbers.astype(np.int64), int
    found, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    own = tuple(found.tolist())
    if labels is None:
        if inferred and kind is int and len(own) > max(FEW, len(values) // SHARE):
            raise UsageError(
                f"y: {len(own)} distinct integers among {len(values)} may be classes or numbers: pass task='classify' "
                "or task='regress'"
            )
        return codes.astype(np.int64), own
    places = {(type(label), label): n for n, label in enumerate(labels)}  # True isn't 1
    for n, label in enumerate(own):
        if (type(label), label) not in places:
            known = ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
            raise UsageError(
                f"expected the classes {known}, as in training, got {label!r} ({counts[n]} of {len(values)})"
            )
    order = np.array([places[type(label), label] for label in own], np.int64)
    return order[codes], labels


def as_weights(weight: Any, count: int) -> NDArray[np.float32] | None:
    """Return the weight of each sequence, `[N]`; None if none are given.

    Raises:
        UsageError: the wrong number of weights, or one that isn't finite or is below 0.
    """
    if weight is None:
        return None
    if isinstance(weight, Mapping):
        raise UsageError(
            "sample_weight: expected one number per sequence, got a mapping: mappings by id apply only to frames"
        )
    refuse_masked("sample_weight", weight)
    try:
        array = np.asarray(weight, np.float64)
    except (TypeError, ValueError):
        raise UsageError("sample_weight: expected one number per sequence, got something else") from None
    if array.shape != (count,):
        raise UsageError(f"sample_weight: expected one number per sequence, [{count}], got {array.shape}")
    bad = ~(np.isfinite(array) & (array >= 0) & (array <= FLOAT))
    if bad.any():
        at = int(np.argmax(bad))
        raise UsageError(f"sample_weight: expected finite numbers >= 0, got {array[at]} at {at}")
    if not array.any():
        raise UsageError("sample_weight: all weights are 0")
    return array.astype(np.float32)


def class_weights(given: Any, codes: NDArray[np.int64], labels: tuple[Any, ...]) -> NDArray[np.float32]:
    """Return the weight of each class, `[K]`.

    Args:
        given: `"balanced"`, N / (K · count) as in scikit-learn, or weights by class, 1 for classes without one.
        codes: class indices of the training part.
        labels: the classes.

    Raises:
        UsageError: another string, an unknown class, or a weight below 0.
    """
    counts = np.bincount(codes.ravel(), minlength=len(labels))
    if isinstance(given, str):
        if given != "balanced":
            raise UsageError(f"expected class_weight to be 'balanced' or weights by class, got {given!r}")
        return (counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))).astype(np.float32)
    if not isinstance(given, Mapping):
        raise UsageError(f"expected class_weight to be 'balanced' or weights by class, got {type(given).__name__}")
    plain = {_plain(label): value for label, value in given.items()}
    unknown = [label for label in plain if label not in labels]
    if unknown:
        raise UsageError(f"class_weight: expected classes among {', '.join(map(repr, labels))}, got {unknown[0]!r}")
    weights = np.array([plain.get(label, 1.0) for label in labels], np.float32)
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights[codes.ravel()].any():
        raise UsageError(f"class_weight: expected finite weights >= 0, at least one above 0, got {dict(plain)}")
    return weights


def counted(codes: NDArray[np.int64], labels: tuple[Any, ...]) -> dict[Any, int]:
    """Return the number of entries of each class."""
    counts = Counter(codes.ravel().tolist())
    return {label: counts.get(n, 0) for n, label in enumerate(labels)}
