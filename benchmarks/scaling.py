"""Two threads against one, cellstack against itself: batches share rows, stacks at batch 1 share layers.

    python benchmarks/scaling.py [--rounds 15]

The bits must be the same; rounds alternate; the ratio is one thread's time over two threads'. How near the two cores
are to each other shows in the stacks: where the machine shifts them, run it again.
"""

import argparse

import inference
import numpy as np
import peers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for name in ("b1-h128x2", "b1-h256x2", "b32-h128", "b32-h256x2", "b256-h128", "b256-h256x2"):
        batch, steps, width, units, layers = inference.CASES[name]
        x = np.random.default_rng(1).standard_normal((batch, steps, width)).astype(np.float32)
        cells = peers.weights(width, units, layers)
        runs = {threads: peers.cellstack(x, cells, threads) for threads in (1, 2)}
        np.testing.assert_array_equal(runs[1](), runs[2]())
        one, two = peers.alternate(runs, args.rounds).values()
        print(f"{name:<14}{one[0]:>9.2f} {two[0]:>9.2f} ms   ratio {one[0] / two[0]:.2f} / {one[1] / two[1]:.2f}")


if __name__ == "__main__":
    main()
