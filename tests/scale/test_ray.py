"""Scoring on a local Ray with two workers: the same files as in one process, also if a worker is killed."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import COLUMNS, expected, make_net, make_rows, outputs, same, write

from cellstack.scale import Scorer, score_files
from cellstack.scale.folder import Folder, InputFile
from cellstack.scale.job import Job
from cellstack.scale.on_ray import run_on_ray
from cellstack.train import UsageError

pytestmark = [
    pytest.mark.clusters,
    *map(
        pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
    ),
]  # of Ray's own code


@pytest.fixture(scope="module")
def ray():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def contents(top):
    return {path.name: pq.read_table(path) for path in sorted(top.rglob("*.parquet"))}


@pytest.fixture
def model(tmp_path):
    make_net().save(tmp_path / "model.safetensors")
    return tmp_path / "model"


def days(top, sites="ab"):
    """Write two files per site; return the number of rows."""
    rows = 0
    for site in sites:
        for day in range(2):
            table, _ = make_rows(ord(site) + day, (30, 7, 12), 100 * day, f"{site}-{{}}")
            write(top / site / f"{site}-{day}.parquet", table, 8)
            rows += len(table)
    return rows


@pytest.mark.parametrize("across_files", ["restart", "continue"])
def test_the_same_files_as_in_one_process(ray, model, tmp_path, across_files):
    rows = days(tmp_path / "data")
    how = {"across_files": across_files, "batch_rows": 5, **COLUMNS}
    alone = score_files(model, tmp_path / "data", tmp_path / "alone", **how)
    found = score_files(model, tmp_path / "data", tmp_path / "ray", ray="local", **how)
    assert (found.files, found.rows, found.failed) == (4, rows, {})
    assert found == alone
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")


def test_files_that_can_not_be_read_and_ids_that_reappear(ray, model, tmp_path):
    for n in range(3):
        write(tmp_path / f"data/{n}.parquet", make_rows(n, names=f"meter-{n}-{{}}")[0])
    table, _ = make_rows(0, (3, 3), names="late-{}")
    write(tmp_path / "data/1.parquet", pa.concat_tables([table, table[:1]]))
    report = score_files(model, tmp_path / "data", tmp_path / "out", ray="local", **COLUMNS)
    assert report.files == 2
    assert "meter 'late-0' at hour 0 comes after 2" in report.failed[str(tmp_path / "data/1.parquet")]
    table = pa.concat_tables([table, make_rows(0, (1,), 50, "meter-0-{}")[0]])
    write(tmp_path / "data/1.parquet", table)
    with pytest.raises(UsageError, match=r"the id 'meter-0-0' occurs in 0.parquet and in 1.parquet"):
        score_files(model, tmp_path / "data", tmp_path / "out", ray="local", **COLUMNS)


def killed(folder, times):
    """Return a scorer of the network that kills its process at the third batch of a file, so many times."""

    class Killed(Scorer):
        def advance(self, table, known, first=0):
            if first >= 10:
                for n in range(times):
                    try:
                        os.close(os.open(folder / f"killed-{n}", os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        continue
                    os.kill(os.getpid(), 9)
            return super().advance(table, known, first)

    return Killed(make_net(), **COLUMNS)


def job_of(scorer, tmp_path):
    sources = [(path, path.name) for path in sorted((tmp_path / "data").rglob("*.parquet"))]
    sources = [InputFile(path, f"{name[0]}/{name}") for path, name in sources]
    chains = [tuple(source for source in sources if source.output.startswith(site)) for site in "ab"]
    (tmp_path / "out").mkdir()
    return Job(scorer, Folder(tmp_path / "out"), True, 5), chains


def test_a_killed_worker_loses_and_duplicates_nothing(ray, tmp_path):
    days(tmp_path / "data")
    job, chains = job_of(killed(tmp_path, 2), tmp_path)
    found = list(run_on_ray(job, chains, "local"))
    assert len(list(tmp_path.glob("killed-*"))) == 2
    assert sorted(scored.source.output for scored in found) == [f"{s}/{s}-{n}.parquet" for s in "ab" for n in range(2)]
    assert not any(scored.error for scored in found)
    for site in "ab":
        wholes = [make_rows(ord(site) + day, (30, 7, 12), 100 * day, f"{site}-{{}}")[1] for day in range(2)]
        tables = [pq.read_table(tmp_path / f"out/{site}/{site}-{day}.parquet") for day in range(2)]
        both = {name: [*wholes[0][name], *wholes[1][name]] for name in wholes[0]}
        same(outputs(pa.concat_tables(tables)), expected(make_net(), {k: np.stack(v) for k, v in both.items()}))


def test_workers_that_are_killed_again_and_again_are_an_error_and_a_second_run_completes(ray, tmp_path):
    rows = days(tmp_path / "data")
    job, chains = job_of(killed(tmp_path, 1000), tmp_path)
    with pytest.raises(UsageError, match=r"Ray gave up: .* If workers are killed, they may need more memory"):
        list(run_on_ray(job, chains, "local"))
    job = replace(job, scorer=Scorer(make_net(), **COLUMNS))
    found = list(run_on_ray(job, chains, "local"))
    assert sum(scored.rows for scored in found) == rows


def test_workers_without_memory_are_an_error(model, tmp_path):
    """The monitor of Ray takes one percent of the memory for all of it, and kills every worker."""
    days(tmp_path / "data")
    code = "from cellstack.scale import score_files; "
    code += f"score_files('model', 'data', 'out', ray='local', across_files='continue', **{COLUMNS})"
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | limits, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "UsageError: Ray gave up: " in done.stderr
    assert "low on memory" in done.stderr


def test_no_cluster():
    import ray

    if ray.is_initialized():
        ray.shutdown()
    job = Job(Scorer(make_net(), **COLUMNS), Folder("out"), False, 5)
    with pytest.raises(UsageError, match=r"`ray='auto'`: no Ray cluster .*: use `ray='local'`"):
        list(run_on_ray(job, [()], "auto"))
