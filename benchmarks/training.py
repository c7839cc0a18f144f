"""A training step (forward and backward): cellstack's layers compared with torch.nn.LSTM, and minGRU with our LSTM.

    python benchmarks/training.py [--threads 1] [--rounds 15]

Once with only the gradients of the weights, as when x is data, and once also with that of x, as within a network.
Outputs and gradients are compared first; rounds alternate; the ratio is torch's time over cellstack's. Then layers of
kinds without a recurrent product: the ratio is the time of our LSTM of the same width over theirs.
"""

import argparse

import numpy as np
import torch
from inference import CASES, row

from cellstack import layers, reference
from cellstack_bench.surface import measure
from cellstack_bench.turns import alternate, kept_on

MINIMAL = {"b1-t1000-h256": (1, 1000, 256), "b32-t100-h128": (32, 100, 128)}


def training_step(layer, x):
    """Return a function that runs a training step of a layer, whose output and gradients are those of the reference."""

    def run():
        layer.zero_grad()
        y = layer(x)
        y.sum().backward()
        return y

    y = run().detach().numpy()
    arrays = {name: parameter.detach().double().numpy() for name, parameter in layer.cell.named_parameters()}
    expected = reference.forward(layer.spec, arrays, x.double().numpy())
    np.testing.assert_allclose(y, expected.y, atol=5e-6 * max(1.0, np.abs(expected.y).max()))
    wanted = reference.backward(layer.spec, arrays, expected, dy=np.ones_like(expected.y)).arrays
    for name, parameter in layer.cell.named_parameters():
        # As norms: where rounding carries a pre-activation across the kink of `positive`, the slope differs.
        off = np.linalg.norm(parameter.grad.numpy() - wanted[name]) / np.linalg.norm(wanted[name])
        if not off < 1e-2:
            raise SystemExit(f"{type(layer).__name__}: the gradient of {name} differs by {off:.1%}")
    return run


def compare_minimal(name, rounds):
    """Print the milliseconds of a training step of each kind, and the ratios to the LSTM's."""
    batch, steps, units = MINIMAL[name]
    x = torch.randn(batch, steps, units)
    kinds = (layers.LSTM, layers.MinGRU, layers.MinLSTM)
    runs = {kind.__name__: training_step(kind(units, input_size=units, return_sequences=True), x) for kind in kinds}
    times = alternate(runs, rounds)
    text = "".join(f"{kind:>13}{least:>9.2f} /{median:>8.2f}" for kind, (least, median) in times.items())
    ratios = [f"{times['LSTM'][0] / times[kind][0]:.2f} / {times['LSTM'][1] / times[kind][1]:.2f}" for kind in runs]
    print(f"{name:<28}{text}   ratios {', '.join(ratios[1:])}", flush=True)


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
        torch.set_num_threads(args.threads)
        for name in MINIMAL:
            compare_minimal(name, args.rounds)


if __name__ == "__main__":
    main()
