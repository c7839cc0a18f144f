"""Whole sequences: cellstack compared with torch, ONNX Runtime and OpenVINO, in one run, outputs checked first.

    python benchmarks/inference.py [--only b1-h64] [--rounds 15] [--threads 1]

Rounds go through all engines in turn, so that a drift of the machine's speed affects all of them; the result is the
fastest round, the ratio is the best peer's over cellstack's. `surface.py` measures many shapes.
"""

import argparse

from cellstack_bench.engines import installed
from cellstack_bench.surface import Shape, measure
from cellstack_bench.turns import kept_on

CASES = {
    "b1-h64": Shape(1, 1000, 64, 64, 1),
    "b1-h128": Shape(1, 1000, 128, 128, 1),
    "b1-h256x2": Shape(1, 1000, 256, 256, 2),
    "b1-h128x2": Shape(1, 1000, 128, 128, 2),
    "b32-h128": Shape(32, 100, 128, 128, 1),
    "b32-h256x2": Shape(32, 100, 256, 256, 2),
    "b256-h128": Shape(256, 100, 128, 128, 1),
    "b256-h256x2": Shape(256, 100, 256, 256, 2),
}


def row(name, record):
    """Return a measured shape as a line: each engine's minimum and median of rounds in ms, and the ratio by both."""
    if record["differs"]:
        raise SystemExit(f"{name}: outputs differ: {record['differs']}")
    text = "".join(
        f"{engine:>13}{time['least']:>9.2f} /{time['median']:>8.2f}" for engine, time in record["milliseconds"].items()
    )
    ratio = record["ratio"]
    return f"{name:<28}{text}" + (f"   ratio {ratio['least']:.2f} / {ratio['median']:.2f}" if ratio else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    peers, missing = installed()
    print("".join(f"without {name}: {reason}\n" for name, reason in missing.items()) + "ms: minimum / median")
    with kept_on(args.threads):
        for name in args.only:
            print(row(name, measure("inference", CASES[name], peers, args.threads, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
