"""One step at batch 1 from Python: a stream and a layer's cell beside torch.nn.LSTMCell and ONNX Runtime.

    python benchmarks/step.py [--rounds 20]

States are compared after 50 steps first. Rounds go through all engines in turn; the figure is the fastest round's mean
over its steps, in microseconds. One thread. `bytes` is the time that the weights take at the bandwidth that a plain sum
over as many bytes reaches in the same run.
"""

import argparse
import time

import numpy as np
import peers
import torch

import cellstack as cs
from cellstack import layers


def stream(cell, x):
    spec = cs.CellSpec(cell[0].shape[0], cell[1].shape[0])
    s = cs.Network([cs.Recurrent((cs.Cell(spec, *cell),))]).stream()
    return lambda: s.step(x)


def our_cell(cell, x):
    module = layers.LSTMCell(cell[1].shape[0], input_size=cell[0].shape[0])
    module.set_weights(list(cell))
    state = [torch.zeros(1, cell[1].shape[0])] * 2
    x = torch.from_numpy(x)

    def step():
        nonlocal state
        with torch.no_grad():
            y, state = module(x, state)
        return y.numpy()

    return step


def torch_cell(cell, x):
    kernel, recurrent, bias = (torch.from_numpy(a) for a in cell)
    module = torch.nn.LSTMCell(kernel.shape[0], recurrent.shape[0])
    with torch.no_grad():
        module.weight_ih.copy_(kernel.T)
        module.weight_hh.copy_(recurrent.T)
        module.bias_ih.copy_(bias)
        module.bias_hh.zero_()
    state = None
    x = torch.from_numpy(x)

    def step():
        nonlocal state
        with torch.no_grad():
            state = module(x, state)
        return state[0].numpy()

    return step


ENGINES = {"stream": stream, "LSTMCell": our_cell, "torch.nn.LSTMCell": torch_cell}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'I=H':>5}{'bytes':>10}" + "".join(f"{name:>20}" for name in ENGINES) + "   (us)   torch over stream, cell")
    for units in (16, 32, 64, 128, 256):
        (cell,) = peers.weights(units, units, 1)
        x = np.random.default_rng(0).standard_normal((1, units)).astype(np.float32)
        ready = {name: make(cell, x) for name, make in ENGINES.items()}
        ends = {name: [step() for _ in range(50)][-1] for name, step in ready.items()}
        for name, end in ends.items():
            np.testing.assert_allclose(end, ends["torch.nn.LSTMCell"], atol=1e-5, err_msg=name)
        flat = np.concatenate([a.ravel() for a in cell])
        ready["bytes"] = lambda flat=flat: flat.sum()
        best = dict.fromkeys(ready, np.inf)
        for _ in range(args.rounds):
            for name, step in ready.items():
                start = time.perf_counter()
                for _ in range(200):
                    step()
                best[name] = min(best[name], (time.perf_counter() - start) / 200 * 1e6)
        figures = "".join(f"{best[name]:>20.2f}" for name in ENGINES)
        ratios = [best["torch.nn.LSTMCell"] / best[name] for name in ("stream", "LSTMCell")]
        print(f"{units:>5}{best['bytes']:>10.2f}{figures}   {ratios[0]:>12.1f} {ratios[1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
