"""A training step (forward and backward): cellstack's layers beside torch.nn.LSTM.

    python benchmarks/training.py [--threads 1] [--rounds 15]

Once with the gradients of the weights alone, as where x is data, and once with that of x too, as within a network.
Outputs and gradients are compared first; rounds alternate; the ratio is torch's time over cellstack's.
"""

import argparse

import peers
import torch

from cellstack import layers

CASES = {"b32-h128": (32, 100, 128, 128, 1), "b32-h256x2": (32, 100, 256, 256, 2), "b256-h128": (256, 100, 128, 128, 1)}


def step(module, x, first_output):
    x.grad = None
    module.zero_grad()
    y = first_output(module(x))
    y.backward(torch.ones_like(y))
    return y


def measure(case, rounds, x_gradient):
    batch, steps, width, units, depth = case
    cells = peers.weights(width, units, depth)
    ours = layers.RNN([layers.LSTMCell(units) for _ in cells], return_sequences=True, input_size=width)
    ours.set_weights([array for cell in cells for array in cell])
    theirs = peers.torch_lstm(cells, width)
    x = torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(0))
    x_ours, x_theirs = (x.clone().requires_grad_(x_gradient) for _ in range(2))
    runs = {
        "cellstack": lambda: step(ours, x_ours, lambda y: y),
        "torch": lambda: step(theirs, x_theirs, lambda y: y[0]),
    }
    torch.testing.assert_close(runs["cellstack"](), runs["torch"](), atol=2e-5, rtol=0)
    if x_gradient:
        torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-3, rtol=1e-4)
    kernel = next(iter(ours.parameters()))
    torch.testing.assert_close(kernel.grad, theirs.weight_ih_l0.grad.T, atol=1e-2, rtol=1e-3)
    return peers.alternate(runs, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, case in CASES.items():
        for x_gradient in (False, True):
            figures = measure(case, args.rounds, x_gradient)
            cells = "".join(f"{k:>12} {low:>8.2f} / {mid:>7.2f} ms" for k, (low, mid) in figures.items())
            ratio = [figures["torch"][k] / figures["cellstack"][k] for k in (0, 1)]
            which = "weights and x" if x_gradient else "weights"
            print(f"{name:<12}{which:<14}{cells}   ratio {ratio[0]:.2f} / {ratio[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
