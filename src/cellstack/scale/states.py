"""`States`: the latest state of every sequence of a run, in memory and in a Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellstack.formats.files import replacing
from cellstack.scale.reading import readable
from cellstack.scale.scorer import STATE, Scorer


class States:
    """The latest state of every sequence, of which each batch of rows reads and updates a part.

    Args:
        scorer: the scorer whose states these are.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._schema: pa.Schema | None = None  # of a state; None before the first one
        self._places: dict[Any, int] = {}  # by id
        self._numbers = np.empty((0, 0))
        self._times = np.empty(0, np.int64)  # in the bits of the schema's type

    def of(self, ids: pa.Array) -> pa.Table | None:
        """Return the states of those of these ids that have one, for `Scorer.advance`; None before the first state."""
        if not self._places:
            return None
        found = [(name, self._places[name]) for name in ids.to_pylist() if name in self._places]
        return self._table([name for name, _ in found], np.array([place for _, place in found], np.int64))

    def ids(self, first: int = 0) -> list[Any]:
        """Return the ids of all sequences but the `first` ones, in the order in which they began."""
        return list(self._places)[first:]

    def __len__(self) -> int:
        return len(self._places)

    def update(self, state: pa.Table) -> None:
        """Replace or add the states of some sequences."""
        names, places = state[self._scorer.id].to_pylist(), self._places
        at = np.array([places.setdefault(name, len(places)) for name in names], np.int64)
        width = state.schema.field(STATE).type.list_size
        numbers = state[STATE].combine_chunks().flatten().to_numpy().reshape(len(names), width)
        if not len(self._times):
            self._schema, self._numbers = state.schema, np.empty((0, width), numbers.dtype)
        if len(places) > len(self._times):  # twice as many, so that growing takes little time in all
            more = max(len(places), 2 * len(self._times)) - len(self._times)
            self._times = np.concatenate([self._times, np.zeros(more, np.int64)])
            self._numbers = np.concatenate([self._numbers, np.zeros((more, width), numbers.dtype)])
        self._numbers[at] = numbers
        if self._scorer.time:
            self._times[at] = state[self._scorer.time].combine_chunks().view(pa.int64()).to_numpy()

    def save(self, path: Path) -> None:
        """Write all states to a file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = self._table(list(self._places), np.arange(len(self._places)))
        with replacing(path) as file:
            pq.write_table(table, file)

    def load(self, path: Path) -> None:
        """Read states that `save` wrote.

        Raises:
            FormatError: the file is damaged.
            OSError: it can't be read.
        """
        with readable(path):
            self.update(pq.read_table(path))

    def _table(self, names: list[Any], places: Any) -> pa.Table:
        assert self._schema is not None
        numbers = self._numbers[places]
        columns: list[Any] = [pa.array(names, self._schema.field(self._scorer.id).type)]
        if self._scorer.time:
            times = self._schema.field(self._scorer.time).type
            columns.append(pa.array(self._times[places]).view(times))
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1]))
        return pa.table(columns, schema=self._schema)
