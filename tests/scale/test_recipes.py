"""The examples for other engines: the bits of one process, on pandas, Dask, Ray and Spark."""

import os
import sys
from pathlib import Path

import pandas as pd
import pytest
from data import COLUMNS, expected, make_net, make_rows, same, write

from cellstack.scale import Scorer

pytestmark = [
    pytest.mark.clusters,
    *map(
        pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
    ),
]  # of these engines' own code
EXAMPLES = Path(__file__).parents[2] / "examples" / "scale"
LENGTHS = (30, 20, 40)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    """Put the examples on the path of this process and of the engines' workers."""
    before = os.environ.get("PYTHONPATH")
    sys.path.insert(0, str(EXAMPLES))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), *([before] if before else [])])
    os.environ["PYSPARK_PYTHON"] = sys.executable
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def ray():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def spark():
    from pyspark.sql import SparkSession

    store = "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
    settings = {
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.streaming.stateStore.providerClass": store,
        "spark.ui.enabled": "false",
    }
    session = SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    yield session
    session.stop()


def check(found):
    """Compare scored rows in any order with runs of the whole sequences."""
    found = found.sort_values(["meter", "hour"])
    assert len(found) == sum(LENGTHS)
    by_id = {name: rows[["predicted_1", "predicted_2"]].to_numpy() for name, rows in found.groupby("meter")}
    same(by_id, expected(make_net(), make_rows(0, LENGTHS)[1]))


def scored(frame=None, engine=None):
    from score_with_fugue import score_all

    frame = make_rows(0, LENGTHS)[0].to_pandas().sample(frac=1, random_state=0) if frame is None else frame
    schema = "meter:str,hour:long,predicted_1:float,predicted_2:float"
    return score_all(frame, Scorer(make_net(), **COLUMNS), schema, engine)


def test_fugue_on_pandas():
    check(scored())


def test_fugue_on_dask():
    from dask.distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        check(scored(engine=client).compute())


def test_fugue_on_ray(ray):
    check(scored(engine="ray").to_pandas())


def test_fugue_on_spark(spark):
    frame = spark.createDataFrame(make_rows(0, LENGTHS)[0].to_pandas().sample(frac=1, random_state=0))
    check(scored(frame, spark).toPandas())


def test_spark_keeps_the_states_between_triggers_and_runs(spark, tmp_path):
    from score_stream_on_spark import scored_stream

    rows = make_rows(0, LENGTHS)[0]
    parts = [rows.slice(first, 30) for first in range(0, len(rows), 30)]
    write(tmp_path / "in/0.parquet", parts[0])
    schema = spark.read.parquet(str(tmp_path / "in")).schema

    def run():
        stream = spark.readStream.schema(schema).option("maxFilesPerTrigger", 1).parquet(str(tmp_path / "in"))
        found = scored_stream(
            stream, Scorer(make_net(), **COLUMNS), "meter string, hour long, predicted_1 float, predicted_2 float"
        )
        writer = found.writeStream.format("parquet").option("checkpointLocation", str(tmp_path / "checkpoint"))
        writer.option("path", str(tmp_path / "out")).trigger(availableNow=True).start().awaitTermination()

    run()
    for n in (1, 2):
        write(tmp_path / f"in/{n}.parquet", parts[n])
    run()
    check(pd.read_parquet(tmp_path / "out"))
