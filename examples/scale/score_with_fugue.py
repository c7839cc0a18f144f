"""Score sequences that are spread over a data set, on pandas, Dask, Ray or Spark, through Fugue.

Fugue brings the rows of each id together, sorted by time, and calls a function with them. Needs
`pip install 'fugue[dask]'`, `'fugue[ray]'` or `'fugue[spark]'`.
"""

from typing import Any

import fugue.api as fa
import pandas as pd

from cellstack.scale import Scorer


def score(rows: pd.DataFrame, scorer: Scorer) -> pd.DataFrame:
    """Score one whole sequence."""
    return scorer.score(rows)[0]


def score_all(frame: Any, scorer: Scorer, schema: str, engine: Any = None) -> Any:
    """Score all sequences of a frame.

    Args:
        frame: of pandas, Dask, Ray Data or Spark, or the path of Parquet files.
        scorer: with the columns of id and time.
        schema: Fugue's schema of the result: `"meter:str,at:datetime,predicted:float"`.
        engine: where it runs: None for pandas, `"dask"`, `"ray"`, or a Spark session.

    Returns:
        A frame of the engine, with the columns of id and time and the predictions.
    """
    partition = {"by": scorer.id, "presort": scorer.time}
    return fa.transform(frame, score, schema=schema, partition=partition, params={"scorer": scorer}, engine=engine)
