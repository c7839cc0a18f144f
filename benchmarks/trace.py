"""The cost of inspection: `net.trace(x)` and patches compared with `net.run(x)`, and with a hand-written loop.

    python benchmarks/trace.py [--rounds 30]

The trace's y and states are compared with the run's, bit for bit, and its gates with those of the loop. The loop
computes the gates of each step by hand, T times, as `torch.nn.LSTM` doesn't return them. `patched` is a run with one
unit's forget gate fixed at open, `frozen` one with every gate and state of all units frozen from the middle on. Rounds
go through all in turn on one thread; the results are the fastest round's milliseconds, and their ratios to the run's.
"""

import argparse
import time

import numpy as np
import torch

import cellstack as cs
from cellstack_bench import engines

SHAPES = [(1, 100, 64), (1, 1000, 64), (1, 1000, 128), (1, 1000, 256), (32, 100, 64), (32, 100, 128), (256, 50, 128)]


def by_hand(cell, x):
    """Gates, c and h of every step, `[B, T, H]` each, with two products per step in torch."""
    kernel, recurrent, bias = (torch.from_numpy(array) for array in cell)
    h = c = torch.zeros(len(x), recurrent.shape[0])
    steps = []
    with torch.no_grad():
        for frame in torch.from_numpy(x).unbind(1):
            i, f, g, o = (frame @ kernel + h @ recurrent + bias).chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            steps.append((i, f, g, o, c, h))
        return [torch.stack(one, dim=1).numpy() for one in zip(*steps, strict=True)]


def measured(batch, steps, units, rounds):
    """Return the fastest milliseconds of a run, a trace and the loop, after comparing their results."""
    rng = np.random.default_rng(0)
    (cell,) = engines.weights(units, units, 1)
    net = cs.Network([cs.nodes.Recurrent((cs.nodes.Cell(cs.CellSpec(units, units), *cell),))])
    x = rng.standard_normal((batch, steps, units)).astype(np.float32)
    t, (y, state) = net.trace(x, threads=1), net.run(x, threads=1)
    np.testing.assert_array_equal(t.y, y)
    np.testing.assert_array_equal(t.state[0].c, state[0].c)
    for field, expected in zip(t["layer_0"].cells[0].fields, by_hand(cell, x), strict=True):
        np.testing.assert_allclose(field, expected, atol=1e-4)
    patched = net.edit(cs.Patch("layer_0", "f", units=0, value=1.0))
    frozen = net.edit([cs.Patch("layer_0", gate, steps=slice(steps // 2, None), how="freeze") for gate in "ifgoch"])
    seen = frozen.trace(x, threads=1)["layer_0"]
    assert (patched.trace(x, threads=1)["layer_0"].f[..., 0] == 1).all()
    assert all((array[:, steps // 2 :] == array[:, steps // 2 - 1, None]).all() for array in seen.cells[0].fields)
    nets = [lambda own=own: own.run(x, threads=1) for own in (net, patched, frozen)]
    calls = [*nets, lambda: net.trace(x, threads=1), lambda: by_hand(cell, x)]
    best = [np.inf] * len(calls)
    for number in range(rounds):
        for place, call in enumerate(calls if number % 10 == 0 else calls[:-1]):
            start = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - start)
    return [seconds * 1e3 for seconds in best]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = f"{'B, T, H':>16}{'run':>10}{'patched':>8}{'frozen':>8}{'trace':>10}{'ratio':>8}"
    print(f"{head}{'by hand':>10}{'to trace':>10}")
    for batch, steps, units in SHAPES:
        run, patched, frozen, trace, loop = measured(batch, steps, units, args.rounds)
        shape = f"{batch}, {steps}, {units}"
        ratios = f"{patched / run:>8.2f}{frozen / run:>8.2f}"
        print(f"{shape:>16}{run:>10.3f}{ratios}{trace:>10.3f}{trace / run:>8.2f}{loop:>10.2f}{loop / trace:>10.1f}")


if __name__ == "__main__":
    main()
