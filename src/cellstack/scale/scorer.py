"""`Scorer`: scores rows of many sequences, and continues each sequence from a state that the caller keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.scale.columns import as_ids, as_numbers, as_times, refuse_row
from cellstack.streaming.engine import Engine
from cellstack.train.checks import UsageError
from cellstack.train.data.frames import distinct
from cellstack.train.trained import TASKS, trained

STATE = "network_state"  # the column of a state's numbers
compute: Any = pyarrow.compute  # which makes its functions when it is imported: type checkers don't know them


class Scorer:
    """Scores tables with a row per step: many sequences, which an id column tells apart, mixed in any way.

    It holds no state: `score` takes the state of the sequences and returns the new one, so it can run in any process.
    It can be pickled.

    Args:
        network: a network with one input and one output that can be streamed: see `Stream`. If `cellstack.train`
            trained it, it classifies or predicts numbers.
        id: the column that identifies the sequence of a row: integers or text. None: as in training.
        time: the column that orders a sequence's rows: numbers, dates or timestamps, which must increase. None: as in
            training; without a column the rows are in order.
        features: the columns of the input, in the network's order; one column of ids for an `Embedding`. None: as in
            training.
        missing: what happens to a row without a value in a feature. `"refuse"`: an error. `"skip"`: it gets no
            prediction, and the sequence continues after it. A network trained by `cellstack.train` treats missing
            values as in training, and skips rows without any value.
        threads: the number of threads that the kernel may use.

    Raises:
        ValueError: a network that can't be streamed (the message names the node); threads that aren't a number from 1
            to 2^31 - 1.
        UsageError: a network with several inputs or outputs, with patches, or trained for another task; columns that
            don't fit the network; unknown `missing`.

    >>> import pandas as pd
    >>> from cellstack import CellSpec, Network
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8), "f4"), np.ones((2, 8), "f4"))
    >>> scorer = Scorer(Network([Recurrent((cell,))]), id="meter", time="hour", features=["load"])
    >>> rows = pd.DataFrame({"meter": ["a", "b", "a"], "hour": [0, 0, 1], "load": [0.1, 0.2, 0.3]})
    >>> whole, _ = scorer.score(rows)
    >>> first, state = scorer.score(rows[:2])
    >>> second, state = scorer.score(rows[2:], state)
    >>> bool((pd.concat([first, second], ignore_index=True) == whole).all(axis=None))
    True
    >>> whole.columns.to_list()
    ['meter', 'hour', 'predicted_1', 'predicted_2']
    """

    def __init__(
        self,
        network: Network,
        id: str | None = None,
        time: str | None = None,
        features: Sequence[str] | None = None,
        *,
        missing: str = "refuse",
        threads: int = 1,
    ) -> None:
        self.network, self.missing = network, missing
        self.threads = threads
        if (len(network.inputs), len(network.outputs)) != (1, 1):
            named = f"the inputs {', '.join(network.inputs)} and the outputs {', '.join(network.outputs)}"
            raise UsageError(f"expected a network with one input and one output, found {named}")
        if network.patches:
            raise UsageError("networks with patches aren't supported: use network.unedited")
        task = network.metadata.get("task")
        if task is not None and task not in TASKS:
            raise UsageError(f"expected a network for the task {' or '.join(TASKS)}, found {task!r}")
        self._task = None if task is None else trained(network, "the network")
        if missing not in ("refuse", "skip"):
            raise UsageError(f"expected missing to be refuse or skip, got {missing!r}")
        if self._task and missing == "skip":
            raise UsageError("missing has no effect: the network treats missing values as in training")
        table = network.metadata.get("table") or {}
        id, time = table.get("id") if id is None else id, table.get("time") if time is None else time
        features = network.metadata.get("columns") if features is None else features
        if id is None:
            raise UsageError("expected `id=…`, the column that identifies the sequence of a row")
        if not features or isinstance(features, str):
            raise UsageError(
                "the network doesn't name its columns: give a list with `features=…`, the columns of the input "
                "in the network's order"
            )
        self.id, self.time, self.features = id, time or None, tuple(features)
        if len({*self.columns}) != len(self.columns):
            raise UsageError(f"expected different columns for id, time and features, got {', '.join(self.columns)}")
        self.takes_ids = network.inputs[0] in network.graph.ids
        width = 1 if self.takes_ids else network.input_size
        width = len(self._task.inputs.mean) if self._task else width
        if width not in (None, len(self.features)):
            names = ", ".join(self.features)
            raise UsageError(f"expected {width} features, as the network has, got {len(self.features)}: {names}")
        # The state of one new sequence: a template of its entries, and all of its numbers.
        self._entries = self._engine(1).as_state(None, 1)
        self._start = np.concatenate([array.ravel() for entry in self._entries for array in entry] or [np.empty(0)])
        self._start = self._start.astype(network.dtype)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads: the id, the time if there is one, and the features."""
        return (self.id, *([self.time] if self.time else []), *self.features)

    def score(self, frame: Any, state: pa.Table | None = None) -> tuple[Any, pa.Table]:
        """Score rows. Nothing is changed: the same arguments give the same results, bit for bit.

        However the rows of a sequence are divided among calls, its predictions have the bits of a `Stream` of the
        whole sequence, as long as each call gets the state that the call before returned. Those are the bits of
        `Network.run`, unless the network has an `MLSTM`.

        Args:
            frame: a pandas frame or a pyarrow table with at least `columns`, in which the rows of each sequence are in
                the order of time.
            state: of sequences that continue, as returned by an earlier call; others start anew. None: all start anew.

        Returns:
            `(scored, state)`: `scored` is of the type of `frame` and has its rows in their order, with the columns of
            id and time, and the predictions: `predicted`, or `predicted_1`, `predicted_2` … if there are several
            numbers; for classes `predicted` and a probability for each, `p_` and its name. `state` is a table with a
            row per sequence: its id, its last time, and its numbers.

        Raises:
            UsageError: a missing column, values of another type, no value; times that don't increase; a state of
                another network.
        """
        table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame, preserve_index=False)
        scored, after = self.advance(table, lambda ids: state)
        if state is not None:
            others = compute.invert(compute.is_in(state[self.id], value_set=after[self.id].combine_chunks()))
            after = pa.concat_tables([state.filter(others), after])
        return (scored if table is frame else scored.to_pandas()), after

    def advance(
        self, table: pa.Table, known: Callable[[pa.Array], pa.Table | None], first: int = 0
    ) -> tuple[pa.Table, pa.Table]:
        """Score rows like `score`, and return only the state of their sequences.

        Args:
            table: the rows.
            known: returns the state of those of the given ids that continue, in any order; it may have others.
            first: the number of the first row, for messages.
        """
        missing = [name for name in self.columns if table.column_names.count(name) != 1]
        if missing:
            there = ", ".join(table.column_names)
            raise UsageError(f"expected the column {missing[0]!r} once, found the columns {there}")
        ids, codes = as_ids(table, self.id, first)
        state = known(ids)
        ticks, times = as_times(table, self.time, state, first)
        order = np.argsort(codes, kind="stable")
        x, used = self._inputs(table, first)
        count, numbers, last = self._known(ids, ticks, state)
        self._check_order(table, ids, codes, order, ticks, last, first)
        y, numbers = self._run(x, used, codes, order, numbers, count)
        columns = {name: table[name] for name in self.columns[: 2 if self.time else 1]}
        scored = pa.table(distinct([*columns.items(), *self._predictions(y, used)]))
        ends = np.zeros(count, np.int64)
        ends[codes] = np.arange(len(codes))  # the last row of each sequence
        after: dict[str, Any] = {self.id: ids}
        if times is not None:
            after[str(self.time)] = times.take(ends)
        flat = pa.array(numbers.ravel())
        after[STATE] = pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])
        return scored, pa.table(after)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _engine(self, rows: int) -> Engine:
        return Engine("Scorer", self.network, ("rows", rows), self.threads, None, shared=True)

    def _inputs(self, table: pa.Table, first: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the network's input `[rows, I]` (ids are `[rows]`), and which rows are used."""
        if self.takes_ids:
            values, absent = as_numbers(table, self.features[0], np.dtype(np.int64))
            x, missing = values, absent[:, None]
        else:
            dtype = self.network.dtype
            x = np.empty((table.num_rows, len(self.features)), dtype)
            for place, name in enumerate(self.features):
                x[:, place] = as_numbers(table, name, dtype)[0]
            missing = np.isnan(x)
        if self._task is not None:
            filled, _ = self._task.inputs(x[None])  # all steps with a value are used
            return filled[0], np.asarray(~missing.all(axis=1))
        absent = missing.any(axis=1)
        if self.missing == "refuse" and absent.any():
            row = int(np.argmax(absent))
            name = self.features[int(np.argmax(missing[row]))]
            fix = "`missing='skip'` leaves out such rows"
            raise refuse_row(first + row, f"column {name!r} has no value: {fix}")
        return x, np.asarray(~absent)

    def _known(
        self, ids: pa.Array, ticks: NDArray[Any] | None, state: pa.Table | None
    ) -> tuple[int, NDArray[Any], NDArray[Any] | None]:
        """Return the number of sequences, their numbers before the first row `[count, S]`, and their last ticks.

        A sequence that starts anew has a masked tick.
        """
        count = len(ids)
        numbers = np.repeat(self._start[None], count, axis=0)
        last: Any = None if ticks is None else np.ma.masked_all(count, ticks.dtype)
        if state is None or not state.num_rows:
            return count, numbers, last
        expected = pa.list_(pa.from_numpy_dtype(self.network.dtype), len(self._start))
        names = [self.id, *([self.time] if self.time else []), STATE]
        if state.column_names != names or state.schema.field(STATE).type != expected:
            found = ", ".join(f"{field.name} {field.type}" for field in state.schema)
            raise UsageError(f"expected a state of this network, with {', '.join(names)} {expected}, found {found}")
        if state.schema.field(self.id).type != ids.type:
            kinds = f"{state.schema.field(self.id).type}, as before, got {ids.type}"
            raise UsageError(f"expected column {self.id!r} to be {kinds}")
        places = compute.index_in(ids, value_set=state[self.id].combine_chunks())
        known = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        found = state.take(places.drop_null())
        numbers[known] = found[STATE].combine_chunks().flatten().to_numpy().reshape(len(known), numbers.shape[1])
        if last is not None:
            last[known] = as_times(found, self.time, state, 0)[0]
        return count, numbers, last

    def _check_order(
        self,
        table: pa.Table,
        ids: pa.Array,
        codes: NDArray[Any],
        order: NDArray[Any],
        ticks: NDArray[Any] | None,
        last: Any,
        first: int,
    ) -> None:
        """Raise `UsageError` unless the times of each sequence increase, also from its last time before these rows."""
        if ticks is None or last is None or not len(codes):
            return
        assert self.time is not None
        sorted_codes, sorted_ticks = codes[order], ticks[order]
        same = np.diff(sorted_codes) == 0
        late = np.flatnonzero(same & ~(sorted_ticks[1:] > sorted_ticks[:-1])) + 1
        begins = np.flatnonzero(np.concatenate([[True], ~same]))
        again = begins[(last[sorted_codes[begins]] >= sorted_ticks[begins]).filled(False)]
        if not late.size and not again.size:
            return
        row = int(order[late[0] if late.size else again[0]])
        said = f"{self.id} {ids[int(codes[row])].as_py()!r} at {self.time} {table[self.time][row].as_py()}"
        if late.size:
            before = table[self.time][int(order[late[0] - 1])].as_py()
            raise refuse_row(
                first + row, f"{said} comes after {before}: sort the rows by {self.time}, without duplicates"
            )
        raise refuse_row(
            first + row, f"{said} isn't after the last row of this {self.id} before: sort the rows by {self.time}"
        )

    def _run(
        self,
        x: NDArray[Any],
        used: NDArray[np.bool_],
        codes: NDArray[Any],
        order: NDArray[Any],
        numbers: NDArray[Any],
        count: int,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the outputs `[rows, W]` and the states after them, `[count, S]`.

        The sequences are sorted by their number of rows. Chunks of steps are then rectangles without padding: the first
        one has all sequences and as many steps as the shortest, the next one the remaining ones, and so on.
        """
        order = order[used[order]]
        steps = np.bincount(codes[order], minlength=count)
        longest = np.argsort(-steps, kind="stable")  # sequence `longest[k]` is row k of the engine
        starts = (np.cumsum(steps) - steps)[longest]
        steps = steps[longest]
        y = np.full((len(x), self.network.shapes[self.network.outputs[0]][-1] or 0), np.nan, self.network.dtype)
        if not len(order):
            return y, numbers
        engine = self._engine(count)
        engine.write(self._as_entries(numbers[longest]), np.arange(count))
        done = 0
        for length in np.unique(steps[steps > 0]).tolist():
            rows = np.arange(np.searchsorted(-steps, -length, side="right"))
            chosen = order[starts[rows, None] + np.arange(done, length)]  # [rows, T]
            try:
                y[chosen] = engine.run(engine.checked_inputs(x[chosen], "B, T", len(rows)), rows)
            except ValueError as error:  # such as an id out of range
                raise UsageError(str(error)) from None
            done = length
        after = np.empty_like(numbers)
        parts = [array.reshape(count, -1) for entry in engine.read(np.arange(count)) for array in entry]
        after[longest] = np.concatenate(parts, axis=1) if parts else numbers
        return y, after

    def _as_entries(self, numbers: NDArray[Any]) -> list[Any]:
        """Return states `[n, S]` as the entries that an engine takes."""
        entries, at = [], 0
        for entry in self._entries:
            arrays = []
            for array in entry:
                arrays.append(numbers[:, at : at + array.size].reshape(len(numbers), *array.shape[1:]))
                at += array.size
            entries.append(type(entry)(*arrays))
        return entries

    def _predictions(self, y: NDArray[Any], used: NDArray[np.bool_]) -> list[tuple[str, pa.Array]]:
        """Return the columns of predictions, null in rows that weren't used."""
        empty = ~used
        numbers = [pa.array(np.ascontiguousarray(column), mask=empty) for column in y.T]
        labels = self._task.labels if self._task else ()
        if labels:
            best = pa.array(np.nan_to_num(y).argmax(axis=1), mask=empty)
            names = [f"p_{label}" for label in labels]
            return [("predicted", pa.array(labels).take(best)), *zip(names, numbers, strict=True)]
        if len(numbers) == 1:
            return [("predicted", numbers[0])]
        return [(f"predicted_{n + 1}", column) for n, column in enumerate(numbers)]
