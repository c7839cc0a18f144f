"""Whole sequences: cellstack beside torch, ONNX Runtime and OpenVINO, in one run, outputs checked first.

    python benchmarks/inference.py [--only b1-h64] [--rounds 15] [--threads 1]

Rounds go through all engines in turn, so that a drift of the machine's speed meets each of them; the figure is the
fastest round, the ratio is the best peer's over cellstack's.
"""

import argparse

import numpy as np
import peers

CASES = {
    "b1-h64": (1, 1000, 64, 64, 1),
    "b1-h128": (1, 1000, 128, 128, 1),
    "b1-h256x2": (1, 1000, 256, 256, 2),
    "b1-h128x2": (1, 1000, 128, 128, 2),
    "b32-h128": (32, 100, 128, 128, 1),
    "b32-h256x2": (32, 100, 256, 256, 2),
    "b256-h128": (256, 100, 128, 128, 1),
    "b256-h256x2": (256, 100, 256, 256, 2),
}


def measure(case, engines, threads, rounds):
    batch, steps, input_size, units, layers = case
    x = np.random.default_rng(1).standard_normal((batch, steps, input_size)).astype(np.float32)
    cells = peers.weights(input_size, units, layers)
    ready = {name: peers.ENGINES[name](x, cells, threads) for name in engines}
    expected = peers.ENGINES["torch"](x, cells, threads)()
    for name, run in ready.items():
        np.testing.assert_allclose(run(), expected, atol=2e-5, err_msg=name)
    return peers.alternate(ready, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="*", choices=peers.ENGINES, default=list(peers.ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{'case':<14}" + "".join(f"{name:>22}" for name in args.engines) + f"{'ratio':>14}  (ms: least / median)")
    for name in args.only:
        figures = measure(CASES[name], args.engines, args.threads, args.rounds)
        row = f"{name:<14}" + "".join(f"{low:>13.2f} /{mid:>7.2f}" for low, mid in figures.values())
        others = [v for k, v in figures.items() if k != "cellstack"]
        if others:
            ours = figures["cellstack"]
            row += f"{min(v[0] for v in others) / ours[0]:>8.2f} /{min(v[1] for v in others) / ours[1]:>4.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
