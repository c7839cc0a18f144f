"""The examples for other engines: the bits of one process, on pandas, Dask, Ray and Spark."""

import os
import sys
from pathlib import Path

import numpy as np
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


# ── many models, and one on several workers ─────────────────────────────────────────────────────────────────────────


def test_a_forecast_for_each_of_many_series(ray, tmp_path):
    import forecast_many_on_ray

    months = pd.date_range("2010-01-01", periods=96, freq="MS")
    wave = 5 + np.sin(np.arange(96) * np.pi / 6)
    series = [pd.DataFrame({"shop": f"s{n}", "month": months, "sales": wave * (n + 1)}) for n in range(3)]
    pd.concat([*series, series[0][:3].assign(shop="short")]).to_parquet(tmp_path / "sales.parquet")
    how = {"horizon": 3, "units": 4, "members": 1, "epochs": 1}
    arguments = (str(tmp_path / "sales.parquet"), str(tmp_path / "out"), "shop", "sales")
    failed = forecast_many_on_ray.forecast_many(*arguments, **how)
    assert list(failed) == ["short"]
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert pd.concat(map(pd.read_parquet, files))["shop"].value_counts().to_dict() == {"s0": 3, "s1": 3, "s2": 3}
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert list(forecast_many_on_ray.forecast_many(*arguments, **how)) == ["short"]
    assert files[1].exists()
    assert files[0].stat().st_mtime_ns == before


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8, 2)).cumsum(axis=1)
    return x, np.where(x[:, -1, 0] > 0, "up", "down")


def test_a_search_of_hyper_parameters_that_is_continued(ray, tmp_path):
    from ray import tune
    from search_on_ray import search

    space = {"units": tune.grid_search([2, 4]), "lr": 0.01, "epochs": 2}
    found = search(*data(), space, str(tmp_path / "search"))
    assert sorted(result.config["units"] for result in found) == [2, 4]
    assert found.get_best_result("loss", "min").metrics["loss"] == min(result.metrics["loss"] for result in found)
    again = search(*data(), space, str(tmp_path / "search"))  # complete: nothing runs again
    assert {result.metrics["timestamp"] for result in again} == {result.metrics["timestamp"] for result in found}


def test_training_on_two_workers(ray, tmp_path):
    from train_on_ray import fit_on_workers

    import cellstack as cs

    (x, y), network = data(), str(tmp_path / "net.safetensors")
    fit_on_workers(2, network, str(tmp_path / "ray"), x=x, y=y, units=4, epochs=2, threads=1)
    alone = cs.train.fit(x, y, units=4, epochs=2, threads=1)
    found = cs.load(network)
    assert found.labels == alone.labels
    np.testing.assert_allclose(found.predict(x).probabilities, alone.predict(x).probabilities, atol=0.01)


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sessions_on_two_replicas(ray, tmp_path):
    import httpx
    from ray import serve
    from serve_on_ray import sessions

    net = make_net()
    net.save(tmp_path / "model.safetensors")
    serve.start(http_options={"port": 8321})
    serve.run(sessions(str(tmp_path / "model.safetensors"), 2), route_prefix="/")
    x = {f"session-{n:08}-token": np.random.default_rng(n).normal(size=(5, 3)).astype("f4") for n in range(8)}
    with httpx.Client(base_url="http://127.0.0.1:8321", timeout=30) as client:
        for token in x:
            assert (
                client.post(f"/models/model/sessions?token={token}", headers={"x-session-id": token}).status_code == 201
            )
        for step in range(5):
            for token, steps in x.items():
                answer = client.post(
                    f"/sessions/{token}/step", json={"x": steps[step].tolist()}, headers={"x-session-id": token}
                )
                wanted = net.run(steps[None, : step + 1])[0][0, -1]
                np.testing.assert_array_equal(np.array(answer.json()["y"], "f4"), wanted)
    serve.shutdown()
