"""Rows per second and memory of `cellstack score`: one process, two threads, and Ray with two workers.

    python benchmarks/scoring.py            writes data to a temporary folder, about 250 MB
    python benchmarks/scoring.py --files 3  less

Each measurement is a process of its own, so that the peak of its memory can be told apart.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellstack import Cell, CellSpec, Dense, Network, Recurrent
from cellstack.scale import score_files

INPUTS, UNITS, IDS, ROWS = 8, 64, 1000, 500_000  # of a file: 1,000 sequences of 500 rows, mixed
FEATURES = [f"x{n}" for n in range(INPUTS)]
COLUMNS = {"id": "id", "time": "time", "features": FEATURES}


def prepare(folder, files):
    rng = np.random.default_rng(0)
    spec = CellSpec(INPUTS, UNITS)
    cell = Cell(spec, **{name: rng.normal(0, 0.1, shape).astype("f4") for name, shape in spec.shapes.items()})
    net = Network([Recurrent((cell,)), Dense(rng.normal(size=(UNITS, 1)).astype("f4"))])
    net.save(folder / "model.safetensors")
    steps = ROWS // IDS
    for n in range(files):
        x = rng.normal(size=(ROWS, INPUTS)).astype("f4")
        columns = {
            "id": pa.array([f"{n}-{k}" for k in range(IDS)] * steps),
            "time": np.repeat(np.arange(steps), IDS),
            **{name: x[:, k] for k, name in enumerate(FEATURES)},
        }
        pq.write_table(pa.table(columns), folder / f"{n:03}.parquet", row_group_size=100_000)
    x = x.reshape(steps, IDS, INPUTS).transpose(1, 0, 2).copy()
    took = [_timed(lambda: net.run(x, threads=1)) for _ in range(3)]
    return min(took) / ROWS


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder, files, ray, threads):
    """Score in this process, and print the rows per second and the peak of its memory."""
    if ray:
        import ray as engine

        engine.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    sources = [folder / f"{n:03}.parquet" for n in range(files)]
    with tempfile.TemporaryDirectory() as out:
        how = {"ray": "local" if ray else None, "threads": threads, **COLUMNS}
        if ray:  # its first tasks start the workers
            score_files(folder / "model", sources[:2], Path(out) / "first", **how)
        start = time.perf_counter()
        report = score_files(folder / "model", sources, Path(out) / "out", **how)
        seconds = time.perf_counter() - start
    assert not report.failed
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"rows": report.rows, "seconds": seconds, "peak_mb": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, files, ray, threads = args.measure
        measure(Path(folder), int(files), ray == "ray", int(threads))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = prepare(Path(folder), args.files)
        print(f"the network alone, on arrays: {seconds * 1e9:.0f} ns per row")
        for files, engine, threads in (
            (1, "process", 1),
            (args.files, "process", 1),
            (args.files, "process", 2),
            (args.files, "ray", 1),
        ):
            words = [sys.executable, __file__, "--measure", folder, str(files), engine, str(threads)]
            found = json.loads(
                subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            each = found["seconds"] / found["rows"]
            print(
                f"{engine}, {threads} thread(s), {files} file(s), {found['rows']:,} rows: {found['seconds']:.1f} s, "
                f"{1 / each:,.0f} rows per second, {each * 1e9:.0f} ns per row, peak {found['peak_mb']:.0f} MB"
            )


if __name__ == "__main__":
    main()
