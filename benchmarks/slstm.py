"""The sLSTM compared with the loop of the package xlstm ("vanilla") and an LSTM, on one thread.

    python benchmarks/slstm.py [--units 256] [--heads 4] [--inputs 1] [--rounds 15]

Outputs and gradients are compared first. Then rounds go through all of them in turn; the results are the fastest
round's microseconds per step, and ratios. T = 200 at batch 1 and 50 at batch 32, float32. Training is the forward pass
and the gradients of all weights. With one input, the product with x, one matrix product in each of them, takes hardly
any time.
"""

import argparse

import torch
from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

from cellstack import layers, native
from cellstack_bench.turns import alternate


def vanilla(layer, heads):
    """Return the layer as a function of x that runs xlstm's loop."""
    kernel, recurrent_kernel, bias = layer.parameters()

    def run(x):
        matrices = recurrent_kernel.reshape(heads, -1, recurrent_kernel.shape[-1]).transpose(1, 2)
        states = x.new_zeros(4, len(x), layer.units)
        pointwise = slstm_pointwise_function_registry["slstm"]
        return slstm_forward((x @ kernel).transpose(0, 1), states, matrices, bias, pointwise)[0][0, 1:].transpose(0, 1)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"heads": args.heads, "return_sequences": True, "input_size": args.inputs}
    slstm, lstm = layers.SLSTM(args.units, **options), layers.LSTM(args.units, **options)
    runs = {"sLSTM": (slstm, slstm), "LSTM": (lstm, lstm), "xlstm's loop": (vanilla(slstm, args.heads), slstm)}
    print(f"I = {args.inputs}, H = {args.units}, {args.heads} heads, one thread, {native.isa()}")
    print("µs per step, and ratio to the sLSTM")
    for batch, steps in ((1, 200), (32, 50)):
        x = torch.randn(batch, steps, args.inputs)

        def forward(run, x=x):
            with torch.no_grad():
                return run(x)

        def train(run, layer, x=x):
            return torch.autograd.grad(run(x).sum(), list(layer.parameters()))

        expected = train(*runs["xlstm's loop"])
        torch.testing.assert_close(forward(slstm), forward(runs["xlstm's loop"][0]), rtol=0, atol=1e-5)
        for ours, other in zip(train(*runs["sLSTM"]), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-4 * float(other.abs().max()))
        for what in ("forward", "training"):
            calls = {
                name: (lambda pair=pair, what=what: forward(pair[0]) if what == "forward" else train(*pair))
                for name, pair in runs.items()
            }
            times = {name: least / 1e3 for name, (least, _) in alternate(calls, args.rounds).items()}
            figures = (
                f"{name} {1e6 * seconds / steps:.1f} ({seconds / times['sLSTM']:.2f})"
                for name, seconds in times.items()
            )
            print(f"B = {batch:<3} {what:9} " + "   ".join(figures), flush=True)


if __name__ == "__main__":
    main()
