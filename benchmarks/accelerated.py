"""A program's own recurrent layers, before and after one line: PyTorch's modules under `accelerate`.

    python benchmarks/accelerated.py [--threads 1] [--rounds 9] [names]

Outputs, and in training gradients, are compared first. Rounds alternate, each of many calls; the output is the minimum
processor time per call of each, and their ratio. Names select cases by prefix, such as `LSTM`.
"""

import argparse
import copy
import itertools
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import cellstack as cs

# kind, input, units, batch, steps (0: a cell), and mode: inference, training, or frozen weights
SHAPES = [
    *itertools.product((nn.LSTM, nn.GRU, nn.RNN), (4, 32, 128, 256), (1, 32), (1, 4, 10, 100)),
    *itertools.product((nn.LSTMCell, nn.GRUCell, nn.RNNCell), (4, 32, 128, 256), (1, 8, 32), (0,)),
]


def cases():
    """Yield `(name, module, input, state, how)`."""
    for kind, units, batch, steps in SHAPES:
        torch.manual_seed(0)
        module = kind(units, units)
        x = torch.randn(*((steps,) if steps else ()), batch, units)
        for how in ("inference", "frozen", "training"):
            yield f"{kind.__name__} H={units} B={batch}{f' T={steps}' if steps else ''} {how}", module, x, how
    lengths = torch.arange(10, 101).repeat(2)[::6][:32].sort(descending=True).values
    for kind, options in (
        (nn.LSTM, {"num_layers": 2}),
        (nn.GRU, {"num_layers": 2}),
        (nn.LSTM, {"bidirectional": True}),
    ):
        torch.manual_seed(0)
        module = kind(128, 128, **options)
        x = torch.randn(100, len(lengths), 128)
        said = " ".join(f"{name}={value}" for name, value in options.items())
        for how in ("inference", "training"):
            yield f"{kind.__name__} H=128 {said} B={len(lengths)} T=100 {how}", module, x, how
            packed = pack_padded_sequence(x, lengths)
            yield f"{kind.__name__} H=128 {said} packed 10..100 {how}", module, packed, how


def output(value):
    """Return the first tensor in a module's output."""
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value


def call(module, x, how):
    """Return the timed function: a call, with the backward pass in training; it returns the values to compare."""

    def infer():
        with torch.no_grad():
            return [output(module(x))]

    def train():
        module.zero_grad()
        y = output(module(x))
        y.backward(torch.ones_like(y))
        return [y.detach(), module.weight_hh.grad if isinstance(module, nn.RNNCellBase) else module.weight_hh_l0.grad]

    return train if how == "training" else infer


def alternate(calls, rounds, budget=0.2):
    """Return the minimum processor time per call of each, over alternating rounds."""
    counts = []
    for run in calls:
        start = time.perf_counter()
        run()
        counts.append(max(1, int(budget / rounds / max(time.perf_counter() - start, 1e-6))))
    least = [float("inf")] * len(calls)
    for _ in range(rounds):
        for n, (run, count) in enumerate(zip(calls, counts, strict=True)):
            start = time.process_time()
            for _ in range(count):
                run()
            least[n] = min(least[n], (time.process_time() - start) / count)
    return least


def measure(module, x, how, rounds):
    """Return PyTorch's time and ours, in seconds, after checking that results agree."""
    ours = cs.accelerate(copy.deepcopy(module))
    with cs.packed_weights(ours) if how == "frozen" else nullcontext():
        calls = [call(module, x, how), call(ours, x, how)]
        for theirs, mine in zip(calls[0](), calls[1](), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), rtol=1e-4)
        return alternate(calls, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = []
    for name, *case in cases():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        theirs, ours = measure(*case, args.rounds)
        ratios.append(theirs / ours)
        print(f"{name:<48}{theirs * 1e6:>12.1f} µs{ours * 1e6:>12.1f} µs   {ratios[-1]:.2f}", flush=True)
    below = sum(ratio < 0.97 for ratio in ratios)
    print(f"{len(ratios)} cases: smallest {min(ratios):.2f}, {below} below 0.97")


if __name__ == "__main__":
    main()
