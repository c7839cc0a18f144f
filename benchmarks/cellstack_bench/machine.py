"""The machine's limits, as far as NumPy reaches them: products, and reading of arrays that fit a cache.

    python -m cellstack_bench.machine product

answers each line on its standard input with the best figures so far, as a line of JSON. A separate process has a BLAS
with its own number of threads, and doesn't disturb other measurements while it waits.

- `product`: float32 matrix products `[N, N] · [N, N]` in NumPy's BLAS, the best of `SIZES`. This is a practical peak:
  a loop of fused multiply-adds alone would be somewhat faster.
- `reading`: the fastest of NumPy's ways to read a whole array of float32 on one core, minus the time of the same call
  for one number. A kernel can reach more from a first-level cache.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack_bench.turns import rest, timed

SIZES = (256, 384, 512, 1024)
TURN = 0.002  # seconds for one figure in one round
LARGEST = 256 << 20  # bytes of an array; memory isn't measured if twice the last cache is larger
THREADS_OF = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
MISTUNED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # make a BLAS use another processor's routines


def processor() -> str:
    """Return the processor's name, as reported by the system."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Return the sizes of the cache levels in bytes, as reported by Linux; empty elsewhere."""
    found = {}
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (place.joinpath(name).read_text().strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified"):
            found[f"L{level}"] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
    return found


def arrays(levels: dict[str, int]) -> dict[str, int]:
    """Return the array size that measures each level: half of it, less of a shared last level; twice that for memory.

    >>> arrays({"L1": 32768, "L2": 1048576, "L3": 33554432})
    {'L1': 16384, 'L2': 524288, 'L3': 4194304, 'memory': 67108864}
    """
    sizes, below = {}, 0
    for name, size in levels.items():
        sizes[name] = min(size // 2, 4 * below) if below and name != "L2" else size // 2
        below = size
    if 2 * below <= LARGEST:
        sizes["memory"] = max(2 * below, 64 << 20)
    return sizes


def product(best: dict[str, float]) -> None:
    """A round of products, in GFLOP/s."""
    rng = np.random.default_rng(0)
    for size in SIZES:
        a, b = (rng.standard_normal((size, size)).astype(np.float32) for _ in "ab")
        out = np.empty_like(a)
        run = lambda: np.matmul(a, b, out=out)  # noqa: B023, E731
        run()
        once = timed(run, 1)
        seconds = timed(run, max(1, int(TURN / once)))
        best["gflops"] = max(best.get("gflops", 0.0), 2e-9 * size**3 / seconds)


def readers(flat: NDArray[np.float32]) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return NumPy's ways to read a whole array, each with the same call for one number.

    Args:
        flat: `[N]`, contiguous, of at least 64 numbers.
    """
    words, matrix = flat.view(np.int32), flat[: len(flat) // 64 * 64].reshape(64, -1)
    ones, out = np.ones(64, np.float32), np.empty(matrix.shape[1], np.float32)
    number, word, small = flat[:1], words[:1], (ones[:1], matrix[:1, :1], out[:1])
    return {
        "max": (flat.max, number.max),
        "or": (lambda: np.bitwise_or.reduce(words), lambda: np.bitwise_or.reduce(word)),
        "product": (lambda: np.matmul(ones, matrix, out), lambda: np.matmul(*small)),
    }


def reading(best: dict[str, float], levels: dict[str, NDArray[np.float32]], seconds: dict[Any, float]) -> None:
    """A round of reading, in GB/s, by level. `seconds` keeps the minimum of each call."""
    for level, flat in levels.items():
        for way, calls in readers(flat).items():
            for which, run in zip(("all", "one"), calls, strict=True):
                once = timed(run, 1)
                key = level, way, which
                seconds[key] = min(seconds.get(key, np.inf), timed(run, max(1, min(2000, int(TURN / once)))))
            whole, one = seconds[level, way, "all"], seconds[level, way, "one"]
            if whole > 1.1 * one:  # otherwise the overhead of the call dominates
                best[level] = max(best.get(level, 0.0), flat.nbytes / (whole - one) * 1e-9)


def answer(what: str) -> None:
    """Answer the lines of standard input until it ends."""
    best: dict[str, float] = {}
    seconds: dict[Any, float] = {}
    levels = (
        {name: np.ones(size // 4, np.float32) for name, size in arrays(caches()).items()} if what == "reading" else {}
    )
    for _ in sys.stdin:
        if what == "product":
            product(best)
        else:
            reading(best, levels, seconds)
        rest()
        print(json.dumps(best), flush=True)


class Machine:
    """Measures the processor in rounds, in processes that wait between them.

    Args:
        threads: the threads of a second product, in addition to the one on a single core.

    Raises:
        RuntimeError: from `round`, if such a process has ended.
    """

    def __init__(self, threads: int) -> None:
        asked = {"core": ("product", 1), "reading": ("reading", 1)}
        asked |= {"threads": ("product", threads)} if threads > 1 else {}
        self.processes = {name: self._started(*words) for name, words in asked.items()}
        self.best: dict[str, dict[str, float]] = {name: {} for name in asked}
        self.threads = threads

    @staticmethod
    def _started(what: str, threads: int) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if name not in MISTUNED}
        env |= dict.fromkeys(THREADS_OF, str(threads))
        return subprocess.Popen(
            [sys.executable, "-m", "cellstack_bench.machine", what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,  # Ctrl-C must not reach it
        )

    def round(self) -> None:
        """Measure everything once more."""
        for name, process in self.processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the process that measures the machine ended with status {process.wait()}")
            self.best[name] = json.loads(line)

    def limits(self) -> dict[str, Any]:
        """Return the best of all rounds: GFLOP/s of one core and of the threads, and GB/s read by one core.

        Figures that couldn't be measured are None.
        """
        core, levels = self.best["core"].get("gflops"), caches()
        sizes = {**dict.fromkeys((*levels, "memory")), **arrays(levels)}
        return {
            "gflops_core": core,
            "gflops_threads": self.best["threads"].get("gflops") if "threads" in self.best else core,
            "threads": self.threads,
            "reading": [
                {"level": name, "bytes": size, "gb_per_s": self.best["reading"].get(name)}
                for name, size in sizes.items()
            ],
            "caches": levels,
            "how": {
                "gflops": f"float32 matrix products of NumPy's BLAS, N = {', '.join(map(str, SIZES))}: the best",
                "reading": "one core: the fastest of NumPy's max, bitwise or and vector-matrix product over an array, "
                "minus the same call for one number",
                "barrier": "not measured: Python's own steps take longer than a barrier between two threads",
            },
        }

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *raised: Any) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


if __name__ == "__main__":
    answer(sys.argv[1])
