"""`Predictions`: what a network predicts for sequences, as a sequence, a table and text. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cellstack.train.data.frames import as_frame, distinct

Floats = NDArray[np.float64]
SHOWN, SHOWN_HTML, STEPS = 5, 10, 6  # rows of the text and of the HTML form; steps of a row


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Sequence[Any]):
    """What a network predicts for sequences: a class or numbers for each sequence or for each of its steps.

    It is a sequence with an entry per sequence of the data: a label, a number or a list of numbers; or an array with
    one of these for each step. `np.asarray` converts it to an array.

    Args:
        outputs: class probabilities, or numbers in the targets' units, `[N, O]`; a list of `[T, O]` if there is one
            output per step.
        labels: the classes, in the order of the outputs; () if numbers are predicted.
        ids: of the sequences; () if the data has none.
        id: name of the column of ids.
        scores: `accuracy` and `confusion`, or `rmse` and `mae`; {} if the data doesn't have the true values.
            `confusion` `[K, K]` has counts, with a row for each true class and a column for each predicted one, in the
            order of `labels`.
        polars: whether `to_frame` returns a polars frame.

    >>> found = Predictions(np.array([[0.25, 0.75], [0.9, 0.1]]), ("busy", "calm"), ids=("a", "b"), id="machine")
    >>> list(found), found.columns()["machine"]
    (['calm', 'busy'], ['a', 'b'])
    >>> found
    Predictions of 2 sequences, classes busy, calm
      a: calm (0.75)
      b: busy (0.9)
    """

    outputs: Floats | list[Floats]
    labels: tuple[Any, ...]
    ids: tuple[Any, ...] = ()
    id: str = "sequence"
    scores: dict[str, Any] = field(default_factory=dict)
    polars: bool = False

    @property
    def per_step(self) -> bool:
        """Whether there is a prediction for each step."""
        return isinstance(self.outputs, list)

    @property
    def probabilities(self) -> Floats | list[Floats] | None:
        """Probabilities of the classes, `[N, K]` or a list of `[T, K]`, in the order of `labels`; None for numbers."""
        return self.outputs if self.labels else None

    @cached_property
    def predicted(self) -> list[Any]:
        """The entries as a list."""
        if isinstance(self.outputs, list):
            return [np.array(self._of(part)) for part in self.outputs]
        return self._of(self.outputs)

    def _of(self, outputs: Floats) -> list[Any]:
        """Return what is predicted for each row of `outputs` `[N, O]`."""
        if self.labels:
            return [self.labels[n] for n in outputs.argmax(axis=1)]
        return (outputs[:, 0] if outputs.shape[1] == 1 else outputs).tolist()

    def __len__(self) -> int:
        return len(self.outputs)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.predicted[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.predicted)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        entries = self.predicted
        if self.per_step and len({len(one) for one in entries}) > 1:  # an array of arrays of unequal length
            whole = np.empty(len(entries), object)
            whole[:] = entries
            return whole
        return np.array(entries, dtype)

    def columns(self) -> dict[str, Any]:
        """Return a table's columns by name, as lists or arrays of equal length.

        They are the ids (or `sequence`, the position), `step` if there is a prediction for each, `predicted` (or
        `predicted_1`, `predicted_2` …, if there are several numbers), and `p_` and the class for each probability.
        """
        ids, whole = list(self.ids) or list(range(len(self))), self.outputs
        pairs: list[tuple[str, Any]] = [(self.id, ids)]
        if isinstance(whole, list):
            lengths = [len(part) for part in whole]
            steps = np.concatenate([np.arange(length) for length in lengths])
            ids = [one for one, length in zip(ids, lengths, strict=True) for _ in range(length)]
            pairs, whole = [(self.id, ids), ("step", steps)], np.concatenate(whole)
        if self.labels:
            pairs += [("predicted", self._of(whole))]
            pairs += [(f"p_{label}", whole[:, n]) for n, label in enumerate(self.labels)]
        elif whole.shape[1] == 1:
            pairs += [("predicted", whole[:, 0])]
        else:
            pairs += [(f"predicted_{n + 1}", column) for n, column in enumerate(whole.T)]
        return distinct(pairs)

    def to_frame(self) -> Any:
        """Return `columns` as a pandas frame; as a polars frame if the data was one.

        Raises:
            UsageError: pandas isn't installed.
        """
        return as_frame(self.columns(), self.polars)

    def __repr__(self) -> str:
        ids = self.ids or range(len(self))
        rows = [f"  {ids[n]}: {self._shown(n)}" for n in range(min(SHOWN, len(self)))]
        more = ["  …"] if len(self) > SHOWN else []
        return "\n".join([self._head(), *rows, *more])

    def _repr_html_(self) -> str:
        columns = self.columns()
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        rows = zip(*(values[:SHOWN_HTML] for values in columns.values()), strict=True)
        cells = ["".join(f"<td>{escape(_number(value))}</td>" for value in row) for row in rows]
        table = "".join(f"<tr>{row}</tr>" for row in (head, *cells))
        return f"<p>{escape(self._head())}</p><table>{table}</table>"

    def _head(self) -> str:
        many = f"{len(self):,} sequence{'s' * (len(self) != 1)}{', one per step' if self.per_step else ''}"
        names = ", ".join(map(str, self.labels[:SHOWN])) + ", …" * (len(self.labels) > SHOWN)
        what = f", classes {names}" if self.labels else ""
        scores = [f"{name} {self.scores[name]:.4g}" for name in ("accuracy", "mae", "rmse") if name in self.scores]
        return f"Predictions of {many}{what}" + "".join(f"; {score}" for score in scores)

    def _shown(self, n: int) -> str:
        """Return an entry as text, a class with its probability."""
        one = self.predicted[n]
        if self.per_step:
            return ", ".join(map(_number, one[:STEPS])) + (f", … ({len(one)} steps)" if len(one) > STEPS else "")
        if self.labels:
            return f"{one} ({self.outputs[n].max():.2g})"
        return ", ".join(map(_number, one)) if isinstance(one, list) else _number(one)


def _number(value: Any) -> str:
    """Return a value as text, a number with few digits."""
    if isinstance(value, np.ndarray):
        return ", ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
