"""Two threads compared with one: batches split rows, stacks at batch 1 split layers, and two streams run in parallel,
each on a thread of the caller.

    python benchmarks/scaling.py [--rounds 15]

Results must be bit-identical; rounds alternate; the ratio is one thread's time divided by two threads', for two streams
that of both in sequence divided by both in parallel. The stacks show the communication latency between the two cores:
if the machine moves them, run it again.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import inference
import numpy as np
import peers

from cellstack_bench import engines
from cellstack_bench.turns import alternate


def streams(units, call):
    """Two streams of one network, each with 200 steps, singly or at once: in sequence, and on one thread each."""
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
