"""The CfC compared with that of the package ncps, and with an LSTM of the same width; one thread.

    python benchmarks/cfc.py [--units 64] [--backbone 128] [--rounds 15]

`--backbone` is the number of units of a backbone; without it there is none.

Outputs and gradients are compared first. Then rounds go through all of them in turn; the results are the fastest
round's microseconds of processor time per step, and ratios to the CfC. T = 200 at batch 1 and 50 at batch 32, I = H,
float32. Training is the forward pass and the gradients of all weights. A single step is that of a stream, and of ncps's
cell.
"""

import argparse
import time

import torch
from ncps.torch import CfC

import cellstack as cs
from cellstack import layers, native
from cellstack_bench.turns import alternate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--backbone", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    units = args.units
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = {"backbone_units": args.backbone} if args.backbone else {"backbone_layers": 0}
    theirs = CfC(units, units, **backbone)
    given = {"return_sequences": True, "input_size": units}
    cfc, lstm = layers.CfC(units, backbone_units=args.backbone, **given), layers.LSTM(units, **given)
    (cell,) = cs.load(theirs).cells
    with torch.no_grad():
        for name, array in cell.arrays.items():
            getattr(cfc.cell, name).copy_(torch.tensor(array))
    runs = {"CfC": (cfc, cfc), "LSTM": (lstm, lstm), "ncps": (lambda x: theirs(x)[0], theirs)}
    print(f"I = H = {units}, U = {args.backbone}, one thread, {native.isa()}; µs per step, and ratio to the CfC")

    def report(head, calls, steps):
        times = {
            name: least / steps for name, (least, _) in alternate(calls, args.rounds, time.thread_time, 0.02).items()
        }
        figures = (f"{name} {1e3 * one:.2f} ({one / times['CfC']:.2f})" for name, one in times.items())
        print(f"{head:18} " + "   ".join(figures), flush=True)

    for batch, steps in ((1, 200), (32, 50)):
        x = torch.randn(batch, steps, units)

        def forward(run, x=x):
            with torch.no_grad():
                return run(x)

        def train(run, module, x=x):
            return torch.autograd.grad(run(x).sum(), list(module.parameters()))

        torch.testing.assert_close(forward(cfc), forward(runs["ncps"][0]), rtol=0, atol=1e-5)
        kernel, recurrent_kernel, bias, *of_gates = train(*runs["CfC"])
        given = train(*runs["ncps"])
        first, rest = (given[:2], given[2:]) if args.backbone else (given, [])
        pairs = [(torch.cat([kernel, recurrent_kernel]), first[::2]), (bias, first[1::2])]
        for ours, other in (*pairs, *zip(of_gates, (rest[::2], rest[1::2]), strict=False)):
            whole = torch.cat(other).t()
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
        report(f"B = {batch} forward", {name: lambda run=run: forward(run) for name, (run, _) in runs.items()}, steps)
        report(f"B = {batch} training", {name: lambda pair=pair: train(*pair) for name, pair in runs.items()}, steps)

        first, state = x[:, 0], torch.zeros(batch, units)
        streams = {name: cs.load(layer).stream(batch=batch) for name, layer in (("CfC", cfc), ("LSTM", lstm))}
        frame = first.numpy()

        def step(first=first, state=state):
            with torch.no_grad():
                return theirs.rnn_cell(first, state, 1.0)

        calls = {name: lambda stream=stream, frame=frame: stream.step(frame) for name, stream in streams.items()}
        report(f"B = {batch} step", {**calls, "ncps": step}, 1)


if __name__ == "__main__":
    main()
