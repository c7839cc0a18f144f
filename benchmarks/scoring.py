"""Rows per second and memory of `cellstack score`: one process, two threads, and Ray with two workers.

    python benchmarks/scoring.py            writes data to a temporary folder, about 250 MB
    python benchmarks/scoring.py --files 3  less

Each measurement runs in its own process, so that its peak memory can be measured.
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

from cellstack import CellSpec, Network
from cellstack.nodes import Cell, Dense, Recurrent
from cellstack.scale import score_files

INPUTS, UNITS = 8, 64
LARGE, SMALL = (500_000, 1000), (1000, 10)  # rows and sequences of a file
FEATURES = [f"x{n}" for n in range(INPUTS)]
COLUMNS = {"id": "id", "time": "time", "features": FEATURES}


def prepare(folder):
    """Write the network, and return its processor time per row on arrays."""
    rng = np.random.default_rng(0)
    spec = CellSpec(INPUTS, UNITS)
    cell = Cell(spec, **{name: rng.normal(0, 0.1, shape).astype("f4") for name, shape in spec.shapes.items()})
    net = Network([Recurrent((cell,)), Dense(rng.normal(size=(UNITS, 1)).astype("f4"))])
    net.save(folder / "model.safetensors")
    x = rng.normal(size=(LARGE[1], LARGE[0] // LARGE[1], INPUTS)).astype("f4")
    return min(_timed(lambda: net.run(x, threads=1)) for _ in range(5)) / LARGE[0]


def write(folder, files, rows, ids):
    """Write files of sequences that are mixed: all first steps, all second steps and so on."""
    rng, steps = np.random.default_rng(0), rows // ids
    folder.mkdir()
    for n in range(files):
        columns = {
            "id": pa.array([f"{n}-{k}" for k in range(ids)] * steps),
            "time": np.repeat(np.arange(steps), ids),
            **{name: rng.normal(size=rows).astype("f4") for name in FEATURES},
        }
        pq.write_table(pa.table(columns), folder / f"{n:03}.parquet", row_group_size=100_000)


def _timed(call):
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(folder, kind, files, ray, threads):
    """Score in this process, and print the rows per second and the peak of its memory."""
    if ray:
        import ray as engine

        engine.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    sources = [folder / kind / f"{n:03}.parquet" for n in range(files)]
    with tempfile.TemporaryDirectory() as out:
        how = {"ray": "local" if ray else None, "threads": threads, **COLUMNS}
        # Starts the workers, and reads what is read once.
        score_files(folder / "model", sources[:2] if ray else sources[:1], Path(out) / "first", **how)
        start, begun = time.perf_counter(), time.process_time()
        report = score_files(folder / "model", sources, Path(out) / "out", **how)
        seconds = time.perf_counter() - start
        processor = time.process_time() - begun
    assert not report.failed
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"rows": report.rows, "seconds": seconds, "processor": processor, "peak": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, kind, files, ray, threads = args.measure
        measure(Path(folder), kind, int(files), ray == "ray", int(threads))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = prepare(Path(folder))
        write(Path(folder) / "large", args.files, *LARGE)
        write(Path(folder) / "small", 200, *SMALL)
        print(f"the network alone, on arrays: {seconds * 1e9:.0f} ns of processor time per row")
        for kind, files, engine, threads in (
            ("large", 1, "process", 1),
            ("large", args.files, "process", 1),
            ("large", args.files, "process", 2),
            ("large", args.files, "ray", 1),
            ("small", 200, "process", 1),
            ("small", 200, "ray", 1),
        ):
            words = [sys.executable, __file__, "--measure", folder, kind, str(files), engine, str(threads)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows, seconds = found["rows"], found["seconds"]
            print(
                f"{files} {kind} file(s), {rows:,} rows, {engine}, {threads} thread(s): {seconds:.1f} s, "
                f"{rows / seconds:,.0f} rows per second, {seconds / files * 1e3:.1f} ms per file, processor time "
                f"of this process {found['processor'] / rows * 1e9:.0f} ns per row, peak {found['peak']:.0f} MB"
            )


if __name__ == "__main__":
    main()
