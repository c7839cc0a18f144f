"""One step at batch 1 from Python: a stream, with weights of 32, 16 and 8 bits, and a layer's cell, with their peers.

    python benchmarks/step.py [--rounds 20]

LiteRT runs its fused operator, ONNX Runtime its LSTM with the states bound to its own memory; everything uses one
thread. Outputs are compared after 50 steps first. Rounds go through all engines in turn; the result is the fastest
round's mean over its steps, in microseconds. `bytes` is the time to read the float32 weights, with the fastest of
NumPy's ways to read them all in the same run, minus that of reading one number.
"""

import argparse
import time
from functools import partial

import litert
import numpy as np
import torch

from cellstack import layers
from cellstack_bench import engines
from cellstack_bench.machine import readers

ATOL = {"bfloat16": 0.02, "int8": 0.05}  # tolerances of reduced precision after 50 steps with these weights


def our_cell(x, cells, threads):
    (cell,) = cells
    module = layers.LSTMCell(cell[1].shape[0], input_size=cell[0].shape[0])
    module.set_weights(list(cell))
    state = [torch.zeros(1, cell[1].shape[0])] * 2
    x = torch.from_numpy(x[:, 0])

    def step():
        nonlocal state
        with torch.no_grad():
            y, state = module(x, state)
        return y.numpy()

    return engines.stepping(step)


def lite(x, cells, threads):
    return engines.stepping(litert.step(*cells, x[:, 0]))


PEERS = engines.SURFACES["step"]
ENGINES = {
    "stream": engines.stream,
    "bfloat16": partial(engines.stream, element="bfloat16"),
    "int8": partial(engines.stream, element="int8"),
    "LSTMCell": our_cell,
    "torch.nn.LSTMCell": PEERS["torch"],
    "LiteRT": lite,
    "ONNX Runtime": PEERS["onnxruntime"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'I=H':>5}{'bytes':>8}" + "".join(f"{name:>{len(name) + 3}}" for name in ENGINES) + "   (us)")
    for units in (16, 32, 64, 128, 256):
        cells = engines.weights(units, units, 1)
        x = np.random.default_rng(0).standard_normal((1, 1, units)).astype(np.float32)
        made = {name: make(x, cells, 1) for name, make in ENGINES.items()}
        ends = {name: engine.outputs()["h"] for name, engine in made.items()}
        ready = {name: engine.run for name, engine in made.items()}
        for name, end in ends.items():
            np.testing.assert_allclose(end, ends["torch.nn.LSTMCell"], atol=ATOL.get(name, 1e-5), err_msg=name)
        ways = readers(np.concatenate([array.ravel() for array in cells[0]]))
        for name, (all_of_it, one) in ways.items():
            ready[name, "all"], ready[name, "one"] = all_of_it, one
        best = dict.fromkeys(ready, np.inf)
        for _ in range(args.rounds):
            for name, step in ready.items():
                start = time.perf_counter()
                for _ in range(200):
                    step()
                best[name] = min(best[name], (time.perf_counter() - start) / 200 * 1e6)
        least = min(best[name, "all"] - best[name, "one"] for name in ways)
        print(f"{units:>5}{least:>8.2f}" + "".join(f"{best[name]:>{len(name) + 3}.2f}" for name in ENGINES))
        over = {name: best[name] / best["stream"] for name in ENGINES if name != "stream"}
        print("over the stream's " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items()), flush=True)


if __name__ == "__main__":
    main()
