"""Runs a `Job` on Ray: a task of Ray Data for each chain of files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from cellstack.cells.errors import check_installed
from cellstack.scale.job import Chain, Job, Scored
from cellstack.train.checks import UsageError

RETRIES = 3  # of a task whose worker is killed, and as many again if it was for lack of memory


def run_on_ray(job: Job, chains: Sequence[Chain], address: str, processors: int = 1) -> Iterator[Scored]:
    """Score files on Ray, and yield what became of each as soon as it is known.

    Ray starts a task again if its worker is killed, also for lack of memory; what it had completed is skipped.

    Args:
        job: the job; its folder and all files must have the same paths on every machine.
        chains: the files; chains run in parallel.
        address: of the cluster: `"auto"`, `"local"` to start Ray on this machine, or as `ray.init` takes it. A process
            that is connected to Ray already uses that connection.
        processors: of a task.

    Raises:
        UsageError: Ray can't be reached, or workers were killed again and again.
    """
    check_installed("scoring on Ray", "ray", "ray")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # read at the import of Ray, whose default is no limit
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(f"Ray needs {name}, which isn't installed: pip install {name}", name=name) from None

    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            why: Any = error
            if address == "auto" and isinstance(error, ConnectionError):
                why = "no Ray cluster is running on this machine: use `ray='local'` to start Ray here"
            raise UsageError(f"`ray={address!r}`: {why}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        numbers = [{"chain": n} for n in range(len(chains))]
        tasks = ray.data.from_items(numbers, override_num_blocks=len(chains))
        score: Any = partial(_score, job=job, chains=chains)
        found = tasks.map_batches(score, batch_size=1, num_cpus=processors, max_retries=RETRIES)
        for row in found.iter_rows():
            yield row["scored"]
    except RayError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"Ray gave up: {why}. If workers are killed, they may need more memory than the machine has: use more "
            "`threads=…` for each task, so that fewer tasks run at a time, or smaller `batch_rows=…`, and start again: "
            "complete files are kept"
        ) from None
    finally:
        if own:
            ray.shutdown()


def _score(batch: Any, job: Job, chains: Sequence[Chain]) -> Iterator[Any]:
    """Score a chain in a task, and yield what became of each file."""
    for number in batch["chain"]:
        for scored in job.run(chains[number]):
            row = np.empty(1, object)
            row[0] = scored
            yield {"scored": row}
