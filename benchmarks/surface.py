"""The whole surface: a grid of shapes, compared with torch, ONNX Runtime and OpenVINO, outputs checked first.

    python benchmarks/surface.py [--what SURFACE …] [--threads 1] [--before torch] [-o FOLDER]

140 shapes of inference: batches of 1 to 128, 20 and 200 steps, 8 to 512 units, one and two layers, an input as wide as
a layer, up to 64; 48 of inference in bfloat16; 40 of layers without gradients; 59 of training; steps of a stream at
every width; 16 shapes of inference and 8 of training with bidirectional layers. It runs the code of `cellstack bench`
on more shapes, and takes correspondingly longer. After Ctrl-C, it reports the results so far.
"""

import argparse
import sys

from tqdm import tqdm

from cellstack_bench.command import write
from cellstack_bench.surface import BEFORE, Shape, lines, run, shapes, step_shapes

UNITS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (1, 4, 16, 32, 128)
BIDIRECTIONAL = [
    shape
    for layers, steps, units in ((1, 100, (64, 256)), (2, 30, (64, 128)))
    for shape in shapes((1, 2, 8, 32), (steps,), units, layers, directions=2)
]
WORK = {
    "inference": [shape for layers in (1, 2) for shape in shapes(BATCHES, (20, 200), UNITS, layers)] + BIDIRECTIONAL,
    "bfloat16": [shape for layers in (1, 2) for shape in shapes((1, 32, 128), (20, 200), (64, 128, 256, 512), layers)],
    "layers": [shape for layers in (1, 2) for shape in shapes((1, 8, 16, 32, 128), (20, 50), (256, 512), layers)],
    "training": shapes((1, 8, 32, 128), (20, 100), UNITS)
    + [Shape(32, 100, 64, units, 2) for units in (128, 256, 512)]
    + [shape for shape in BIDIRECTIONAL if shape.batch > 2],
    "step": step_shapes(UNITS),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", choices=WORK, default=list(WORK))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", choices=BEFORE, default="nothing", help="what precedes each timed call")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write bench.json and a plot of each surface")
    args = parser.parse_args()
    progress = lambda work: tqdm(work, unit="shape", file=sys.stderr, dynamic_ncols=True)  # noqa: E731
    report = run({what: WORK[what] for what in args.what}, args.threads, args.rounds, 0.01, progress, args.before)
    print("\n".join([*lines(report), *(write(report, args.output) if args.output else [])]))


if __name__ == "__main__":
    main()
