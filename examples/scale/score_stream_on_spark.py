"""Score a stream of rows on Spark 4: Spark keeps the state of each sequence between triggers.

Needs `pip install pyspark` and Java 17. The rows of an id have to arrive in the order of time.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.streaming import StatefulProcessor, StatefulProcessorHandle

from cellstack.scale import Scorer


class ScoreStream(StatefulProcessor):
    """Scores the new rows of one id, from the state after the rows before.

    Args:
        scorer: with the columns of id and time.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def init(self, handle: StatefulProcessorHandle) -> None:
        """Declare the state: a table of one row, as Arrow writes it."""
        self.state = handle.getValueState("state", "state binary")

    def handleInputRows(self, key: Any, rows: Iterator[pd.DataFrame], timerValues: Any) -> Iterator[pd.DataFrame]:  # noqa: N802
        """Score the new rows of an id."""
        table = pa.Table.from_pandas(pd.concat(list(rows)).sort_values(self.scorer.time), preserve_index=False)
        before = pa.ipc.open_stream(self.state.get()[0]).read_all() if self.state.exists() else None
        scored, after = self.scorer.score(table, before)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, after.schema) as writer:
            writer.write_table(after)
        self.state.update((sink.getvalue().to_pybytes(),))
        yield scored.to_pandas()

    def close(self) -> None:
        """Nothing is open."""


def scored_stream(rows: DataFrame, scorer: Scorer, schema: str) -> DataFrame:
    """Return a stream of scored rows.

    Args:
        rows: a streaming frame.
        scorer: with the columns of id and time.
        schema: Spark's schema of the result: `"meter string, at timestamp, predicted float"`. The session needs
            `spark.sql.streaming.stateStore.providerClass` to be Spark's `RocksDBStateStoreProvider`.
    """
    return rows.groupBy(scorer.id).transformWithStateInPandas(
        statefulProcessor=ScoreStream(scorer), outputStructType=schema, outputMode="Append", timeMode="None"
    )
