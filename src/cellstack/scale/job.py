"""`Job`: scores files one after the other, in any process; what is complete is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats.files import replacing
from cellstack.scale.folder import KEY, Folder, InputFile
from cellstack.scale.reading import batches
from cellstack.scale.scorer import Scorer
from cellstack.scale.states import States
from cellstack.train.checks import UsageError

Chain = tuple[InputFile, ...]  # files that are scored one after the other


class Scored(NamedTuple):
    """What became of a file: its rows and its new ids, or why it couldn't be scored."""

    source: InputFile
    rows: int = 0
    ids: list[Any] = []  # noqa: RUF012 (never changed)
    error: str = ""


@dataclass(frozen=True)
class Job:
    """What a process needs to know to score files; it can be pickled.

    Args:
        scorer: the scorer.
        folder: the output folder.
        carries: whether sequences continue in the next file of a chain.
        batch: rows per batch.
    """

    scorer: Scorer
    folder: Folder
    carries: bool
    batch: int

    def run(self, chain: Chain, progress: Callable[[int], None] = lambda rows: None) -> Iterator[Scored]:
        """Score the files of a chain, and yield what became of each; the first one that fails ends the chain.

        If the process is killed, another one can do the same: what is complete by then is skipped.

        Args:
            chain: the files in order.
            progress: called with the number of rows of each batch.
        """
        states: States | None = None
        for source in chain:
            name = source.output
            try:
                if self.folder.output(name).exists():
                    yield Scored(source, self.folder.rows(name), self.folder.ids(name, self.scorer.id))
                    continue
                if states is None or not self.carries:
                    states = self._states_before(source)
                yield self._score(source, states, progress)
            except MemoryError:
                yield Scored(source, error="not enough memory: use smaller batches (`batch_rows=…`)")
                return
            except (FormatError, ShapeError, UsageError, OSError) as error:
                yield Scored(source, error=str(error))
                return

    def _states_before(self, source: InputFile) -> States:
        """Return the states with which a file begins."""
        states = States(self.scorer)
        last = self.folder.last_beside(source.output) if self.carries else None
        if last is not None:
            states.load(self.folder.state(last))
        return states

    def _score(self, source: InputFile, states: States, progress: Callable[[int], None]) -> Scored:
        """Write the output of a file, and the states after it if sequences continue."""
        path, count, known = self.folder.output(source.output), 0, len(states)
        metadata = {KEY: json.dumps(source.identity).encode()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file, ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for table in batches(source.path, self.scorer, self.batch):
                scored, after = self.scorer.advance(table, states.of, count)
                states.update(after)
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(file, scored.schema.with_metadata(metadata)))
                writer.write_table(scored.cast(writer.schema))
                count += len(scored)
                progress(len(scored))
            if self.carries:  # before the output gets its name: no output is then without states
                states.save(self.folder.state(source.output))
        if self.carries:
            self.folder.remove_states_but(source.output)
        return Scored(source, count, states.ids(known))
