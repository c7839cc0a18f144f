"""A step of a thousand sessions out of ten thousand, compared with the batched matrix product that it requires.

    python benchmarks/pool.py [--sessions 10000] [--stepped 1000] [--units 128] [--rounds 40]

Each round draws the sessions that take a step. Outputs are first compared with a stream's. The product is that of
[x, h] with the weights, on one thread of NumPy's BLAS with contiguous rows; us, the fastest round of each.
"""

import argparse
import os
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is loaded

import numpy as np

import cellstack as cs
from cellstack_bench import engines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--stepped", type=int, default=1_000)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    (cell,) = engines.weights(args.units, args.units, 1)
    net = cs.Network([cs.nodes.Recurrent((cs.nodes.Cell(cs.CellSpec(args.units, args.units), *cell),))])
    x = rng.standard_normal((args.stepped, args.units)).astype(np.float32)
    rows = rng.standard_normal((args.stepped, 2 * args.units)).astype(np.float32)
    weights, out = np.concatenate(cell[:2]), np.empty((args.stepped, 4 * args.units), np.float32)
    best = {"matrix product": np.inf}
    pools = {f"pool, {threads} thread(s)": net.pool(args.sessions, threads) for threads in (1, 2)}
    numbers = {name: np.array([pool.open() for _ in range(args.sessions)]) for name, pool in pools.items()}
    for name, pool in pools.items():
        np.testing.assert_array_equal(pool.step(numbers[name][: args.stepped], x), net.stream(args.stepped).step(x))
        best[name] = np.inf
    for _ in range(args.rounds):
        start = time.perf_counter()
        np.matmul(rows, weights, out=out)
        best["matrix product"] = min(best["matrix product"], time.perf_counter() - start)
        for name, pool in pools.items():
            now = rng.choice(numbers[name], args.stepped, replace=False)
            start = time.perf_counter()
            pool.step(now, x)
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name:20}{seconds * 1e6:>10.0f} us   {seconds / best['matrix product']:.2f} of the product")


if __name__ == "__main__":
    main()
