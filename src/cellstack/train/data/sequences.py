"""`Sequences`, the internal form of data to classify or regress, and the conversion of data in memory to it.

Needs neither torch nor the libraries of the supported frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.checks import UsageError, collected, unmasked
from cellstack.train.data import frames, lazy
from cellstack.train.data.targets import FLOAT, as_targets, as_weights


@dataclass(frozen=True)
class Sequences:
    """Sequences with classes, with targets, or with neither, for each sequence or for each step.

    Args:
        x: one `[T, I]` float32 array per sequence, in the data's units; NaN where missing. A list, or `Lazy`.
        y: `[N]` int64 indices into `labels`, or float32 targets `[N]` or `[N, O]` if `labels` is empty; a list of
            `[T]` or `[T, O]` arrays of these if there is one per step; None for data with neither.
        labels: the classes: strings, integers or bools.
        name: of the data, for messages.
        columns: names of the channels; () for none.
        ids: of the sequences; () for none.
        weight: `[N]` float32, the weights in the loss; None = all 1.
        ignored: unused columns, and why.
        table: the columns `id`, `time` and `label` of a table, `resample`, and the options of reading its file, see
            `read_sequences`; {} for data that isn't a table.
        notes: assumptions made in reading, a sentence each.
        rates: a sentence if the sequences are sampled at different rates, by the column of times; else "".
    """

    x: Sequence[NDArray[np.float32]]
    y: NDArray | list[NDArray] | None
    labels: tuple[Any, ...]
    name: str
    columns: tuple[str, ...] = ()
    ids: tuple[Any, ...] = ()
    weight: NDArray[np.float32] | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rates: str = ""

    @property
    def channels(self) -> int:
        """Width I of a step."""
        return self.x[0].shape[1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps T of each sequence, `[N]`."""
        return lengths_of(self.x)

    @property
    def per_step(self) -> bool:
        """Whether there is a class or target at every step."""
        return isinstance(self.y, list)

    def channel(self, number: int) -> str:
        """Return a channel's name for messages."""
        return f"column {self.columns[number]!r}" if self.columns else f"channel {number}"


def as_sequences(
    x: Any,
    y: Any = None,
    *,
    task: str | None = None,
    labels: tuple[Any, ...] | None = None,
    id: str | None = None,
    time: str | None = None,
    features: Sequence[str] | None = None,
    weight: Any = None,
    per_step: bool | None = None,
    resample: float | None = None,
    name: str = "x",
) -> Sequences:
    """Return data in memory as `Sequences`.

    Args:
        x: an array `[N, T, I]`; a list or an object array of arrays `[T, I]`, whose T may differ; a pandas or polars
            frame in long form, with a row per step; a map-style dataset, such as torch's, of `(sequence, target)`,
            which is read once now and again when batches need it; or `Sequences`, which are returned unchanged,
            without `y` and `weight`. NaN, or a masked value of a masked array, is missing.
        y: a class or number per sequence, `[N]`; numbers `[N, O]`; an array or a list of arrays with one, or O, per
            step; None for none. With a frame also: the name of a column, or a mapping, Series or frame by id.
        task: `"classify"` or `"regress"`; None = determined by `y`: text, bools and integers are classes.
        labels: the classes of a trained model, in its order; None = those of `y`, sorted.
        id: the frame's column that identifies the sequence of a row.
        time: the frame's column by which to sort a sequence's rows; None = row order.
        features: the frame's input columns, None = all other numeric ones; of other data, the names of its channels.
        weight: `[N]`, the sequences' weights in the loss; with a frame also a column's name or a mapping.
        per_step: whether `y` has one entry per step; None = determined by its shape.
        resample: time between the steps to which a frame's sequences are interpolated linearly, in the unit of `time`,
            for dates in seconds; an entry of `y` per step is that of the nearest row. None = the rows as they are.
        name: of the data, for messages.

    Raises:
        UsageError: data in another form; the message says which is expected, and how to convert to it.
    """
    if isinstance(x, Sequences):
        if y is not None or weight is not None:
            raise UsageError(f"{x.name}: y and weights aren't supported with Sequences, which contain them")
        return x
    x, y = collected(x), collected(y)
    ids: tuple[Any, ...] = ()
    columns: tuple[str, ...] = ()
    ignored: dict[str, str] = {}
    table: dict[str, Any] = {}
    rates = ""
    width = 0
    order: list[str] = []  # of the columns, if each sequence is a frame

    def one(array: Any, n: int) -> NDArray[np.float32]:
        nonlocal width, order
        if frames.is_frame(array):
            own = [str(column) for column in array.columns]
            order = order or list(features or own)
            if own != order:
                raise UsageError(f"{name}[{n}]: expected the columns {', '.join(order)}, got {', '.join(own)}")
        found = checked(array, n, name, columns)
        width = width or found.shape[1]
        if found.shape[1] != width:
            raise UsageError(f"{name}[{n}]: expected {width} channels, as {name}[0] has, got {found.shape[1]}")
        return found

    if frames.is_frame(x):
        how = {"id": id, "time": time, "features": features, "weight": weight, "per_step": per_step}
        found = frames.grouped(x, y, **how, resample=resample, name=name)
        arrays, y, weight = found.x, found.y, found.weight
        ids, columns, ignored, rates = found.ids, found.columns, found.ignored, found.rates
        table = {"id": id, "time": time, "label": found.label}
        table |= {} if resample is None else {"resample": float(resample)}
    else:
        for what, given in (("id", id), ("time", time), ("resample", resample)):
            if given is not None:
                raise UsageError(f"{what} applies only to frames, not to {_kind(x)}")
        if lazy.is_dataset(x):
            arrays, own, weights = lazy.read(x, one, name)
            y, weight = own if y is None else y, weights if weight is None else weight
        else:
            arrays = _arrays(x, name)
    rows: Any = arrays if isinstance(arrays, lazy.Lazy) else [one(array, n) for n, array in enumerate(arrays)]
    columns = columns or named(order or None if features is None else features, rows[0].shape[1], name)
    lengths = lengths_of(rows)
    targets, labels = as_targets(y, lengths, task, labels, per_step)
    weights = as_weights(weight, len(rows))
    return Sequences(rows, targets, labels, name, columns, ids, weights, ignored, table, rates=rates)


def named(features: Sequence[str] | None, channels: int, name: str) -> tuple[str, ...]:
    """Return the names of the channels of data that isn't a frame; () for none.

    Raises:
        UsageError: another number of names than of channels, or a name that occurs twice.
    """
    if features is None:
        return ()
    if isinstance(features, str) or len(set(features)) != len(features) or len(features) != channels:
        raise UsageError(f"{name}: expected features as a list of {channels} names, one per channel, got {features!r}")
    return tuple(features)


def _kind(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return f"an array {tuple(shape)}" if shape is not None else type(x).__name__


def _arrays(x: Any, name: str) -> list[Any]:
    """Split an array or a list into one array per sequence."""
    if hasattr(x, "detach"):  # a torch tensor
        x = x.detach().cpu().numpy()
    if isinstance(x, np.ndarray) and x.dtype == object and x.ndim == 1:
        x = list(x)
    if hasattr(x, "shape") or not isinstance(x, (list, tuple)):
        shape = getattr(x, "shape", None)
        if shape is None:
            raise UsageError(
                f"{name}: expected an array [N, T, C], a list of arrays [T, C] or a frame with id=, got {_kind(x)}"
            )
        if len(shape) == 2:
            raise UsageError(
                f"{name}: expected an array [N, T, C], got {tuple(shape)}: add an axis, {name}[..., None] for "
                f"{shape[0]} sequences of one channel, or {name}[None] for one sequence"
            )
        if len(shape) != 3:
            raise UsageError(f"{name}: expected an array [N, T, C], got {tuple(shape)}")
        x = list(np.asarray(unmasked(x)))
    if not len(x):
        raise UsageError(f"{name}: expected at least one sequence, got none")
    return list(x)


def checked(array: Any, n: int, name: str, columns: tuple[str, ...] = ()) -> NDArray[np.float32]:
    """Return one sequence as `[T, I]` float32."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    if isinstance(array, tuple) and len(array) == 2 and hasattr(array[0], "shape"):
        raise UsageError(
            f"{name}[{n}]: expected numbers [T, C], got a pair: pass the sequences as x, the labels or numbers as y"
        )
    try:
        array = np.asarray(unmasked(array))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}[{n}]: expected numbers [T, C]: {error}") from None
    if array.dtype.kind not in "biuf":
        what = "text" if array.dtype.kind in "SU" else f"an array of {array.dtype}"
        raise UsageError(f"{name}[{n}]: expected numbers [T, C], got {what}")
    if array.ndim == 1:
        raise UsageError(
            f"{name}[{n}]: expected [T, C], got {array.shape}: add an axis to sequences of one channel, "
            f"[s[:, None] for s in {name}]"
        )
    if array.ndim != 2:
        pair = ": a pair (x, y) is passed as two arguments, or as a tuple for validation and test" * (array.ndim == 3)
        raise UsageError(f"{name}[{n}]: expected [T, C], got {array.shape}{pair}")
    if not array.size:
        what = "step" if not len(array) else "channel"
        raise UsageError(f"{name}[{n}]: expected at least one {what}, got {array.shape}")
    too_large = np.abs(array) > np.float64(FLOAT) if array.dtype.kind == "f" else np.zeros(1, bool)
    if too_large.any():
        step, channel = map(int, np.argwhere(too_large)[0])
        where = f"column {columns[channel]!r}" if columns else f"channel {channel}"
        raise UsageError(
            f"{name}[{n}]: expected finite numbers in float32's range, or NaN where missing, got "
            f"{array[step, channel]} at step {step}, {where}"
        )
    return np.array(array, np.float32, order="C")


def lengths_of(x: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """Return the steps of each sequence, `[N]`."""
    return x.lengths if isinstance(x, lazy.Lazy) else np.array([len(row) for row in x], np.int64)


def taken(whole: Sequences, indices: NDArray[np.int64]) -> Sequences:
    """Return some of the sequences."""
    y = whole.y
    return replace(
        whole,
        x=whole.x.take(indices) if isinstance(whole.x, lazy.Lazy) else [whole.x[n] for n in indices],
        y=[y[n] for n in indices] if isinstance(y, list) else None if y is None else y[indices],
        ids=tuple(whole.ids[n] for n in indices) if whole.ids else (),
        weight=None if whole.weight is None else whole.weight[indices],
    )


def joined(first: Sequences, second: Sequences) -> Sequences:
    """Concatenate two sets of sequences, whose classes or targets have the same form."""
    weight = None
    if first.weight is not None or second.weight is not None:
        each = [np.ones(len(one.x), np.float32) if one.weight is None else one.weight for one in (first, second)]
        weight = np.concatenate(each)
    y = [*first.y, *second.y] if isinstance(first.y, list) else np.concatenate([first.y, second.y])  # type: ignore[misc]
    if isinstance(first.x, lazy.Lazy) or isinstance(second.x, lazy.Lazy):
        both, count = (first.x, second.x), len(first.x)
        fetch = lambda n: both[n >= count][n - count * (n >= count)]  # noqa: E731
        x: Sequence[NDArray[np.float32]] = lazy.Lazy(fetch, np.concatenate([first.lengths, second.lengths]))
    else:
        x = [*first.x, *second.x]
    return replace(first, x=x, y=y, ids=first.ids + second.ids, weight=weight)
