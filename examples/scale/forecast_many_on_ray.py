"""Train a forecast for each of many series on Ray, resumable: a task per series, and a file when it is done.

Needs `pip install 'cellstack[torch,ray]'`.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import ray
import ray.data

from cellstack import train


def forecast_one(row: dict[str, Any], table: str, folder: str, id: str, target: str, how: dict[str, Any]) -> dict:
    """Train on one series; write its network, and its forecast when the network is complete."""
    name, number = row["series"], row["number"]
    path = Path(folder) / f"{number:06}.parquet"
    rows = pd.read_parquet(table, filters=[(id, "=", name)]).drop(columns=id)
    try:
        done = train.fit_forecast(rows, target, threads=1, progress=False, **how)
    except train.UsageError as error:  # such as too few rows: the other series go on
        return {"series": name, "error": str(error)}
    done.network.save(path.with_suffix(".safetensors"))
    draft = path.with_suffix(".draft")
    done.predict(rows).to_frame().assign(**{id: name}).to_parquet(draft)
    os.replace(draft, path)
    return {"series": name, "error": ""}


def forecast_many(table: str, folder: str, id: str, target: str, **how: Any) -> dict[str, str]:
    """Forecast every series of a table that has no file yet.

    Args:
        table: Parquet files, with the columns of id, time and target.
        folder: the folder to write to, with the same path on all machines.
        id, target: columns.
        how: options of `train.fit_forecast`.

    Returns:
        Why series couldn't be forecast, by name.
    """
    names = sorted(pq.read_table(table, columns=[id])[id].unique().to_pylist())
    os.makedirs(folder, exist_ok=True)
    left = [
        {"series": name, "number": number}
        for number, name in enumerate(names)
        if not (Path(folder) / f"{number:06}.parquet").exists()
    ]
    if not left:
        return {}
    one = partial(forecast_one, table=table, folder=folder, id=id, target=target, how=how)
    tasks = ray.data.from_items(left, override_num_blocks=min(len(left), 1000)).map(one, num_cpus=1)
    return {row["series"]: row["error"] for row in tasks.iter_rows() if row["error"]}
