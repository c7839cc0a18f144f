"""Two threads against one, cellstack against itself: batches share rows, stacks at batch 1 share layers, and two
streams go side by side, each on a thread of the caller's.

    python benchmarks/scaling.py [--rounds 15]

The bits must be the same; rounds alternate; the ratio is one thread's time over two threads', for two streams that of
both one after the other over that of both together. How near the two cores
are to each other shows in the stacks: where the machine shifts them, run it again.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import inference
import numpy as np
import peers

from cellstack.bench import engines
from cellstack.bench.turns import alternate


def streams(units, call):
    """Two streams of one network, each given 200 steps, one by one or as a whole: in turn, and on a thread each."""
    cells = engines.weights(units, units, 1)
    net = engines.network(cells)
    x = np.random.default_rng(1).standard_normal((200, 1, units)).astype(np.float32)
    two = net.stream(), net.stream()

    def go(stream):
        if call == "run":
            return stream.run(x[:, 0][None])
        return [stream.step(frame) for frame in x]

    pool = ThreadPoolExecutor(2)
    return {1: lambda: [go(stream) for stream in two], 2: lambda: list(pool.map(go, two))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for name in ("b1-h128x2", "b1-h256x2", "b32-h128", "b32-h256x2", "b256-h128", "b256-h256x2"):
        batch, steps, width, units, layers = inference.CASES[name]
        x = np.random.default_rng(1).standard_normal((batch, steps, width)).astype(np.float32)
        cells = engines.weights(width, units, layers)
        runs = {threads: peers.cellstack(x, cells, threads) for threads in (1, 2)}
        np.testing.assert_array_equal(runs[1](), runs[2]())
        one, two = alternate(runs, args.rounds).values()
        report(name, one, two)
    for call in ("run", "step"):
        for units in (128, 256):
            one, two = alternate(streams(units, call), args.rounds * 4).values()
            report(f"streams' {call} h{units}", one, two)


def report(name, one, two):
    print(f"{name:<20}{one[0]:>9.2f} {two[0]:>9.2f} ms   ratio {one[0] / two[0]:.2f} / {one[1] / two[1]:.2f}")


if __name__ == "__main__":
    main()
