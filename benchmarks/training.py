"""A training step (forward and backward): cellstack's layers compared with torch.nn.LSTM.

    python benchmarks/training.py [--threads 1] [--rounds 15]

Once with only the gradients of the weights, as when x is data, and once also with that of x, as within a network.
Outputs and gradients are compared first; rounds alternate; the ratio is torch's time over cellstack's.
"""

import argparse

from inference import CASES, row

from cellstack_bench.surface import measure
from cellstack_bench.turns import kept_on


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with kept_on(args.threads):
        for name in ("b32-h128", "b32-h256x2", "b256-h128"):
            for x_gradient in (False, True):
                record = measure("training", CASES[name], ["torch"], args.threads, args.rounds, x_gradient=x_gradient)
                print(row(f"{name}, {'weights and x' if x_gradient else 'weights'}", record), flush=True)


if __name__ == "__main__":
    main()
