"""The error of random LSTMs relative to float64: cellstack compared with PyTorch and ONNX Runtime.

    python benchmarks/accuracy.py [--networks 80]

Widths are drawn from 4 to 315, batches from 1 to 8, steps from 5 to 59; weights are initialised as in PyTorch, inputs
are normal. An error is the root mean square of an output's difference from PyTorch's in float64; the output is ours
divided by each peer's, and by the better peer's: the median and the 0.9 quantile over all networks.
"""

import argparse

import numpy as np
import torch

from cellstack_bench import engines


def errors(number):
    """Return each engine's error for the random network with this number."""
    rng = np.random.default_rng(number)
    width, units = (int(2 ** rng.uniform(2.0, 8.3)) for _ in range(2))
    batch, steps = int(rng.integers(1, 9)), int(rng.integers(5, 60))
    cells = engines.weights(width, units, 1, seed=number)
    x = rng.normal(size=(batch, steps, width)).astype(np.float32)
    exact = engines.torch_lstm(cells, width).double()
    with torch.no_grad():
        expected = exact(torch.from_numpy(x).double())[0].numpy()
    ready = {name: engines.SURFACES["inference"][name](x, cells, 1) for name in ("cellstack", "torch", "onnxruntime")}
    outputs = {name: np.asarray(engine.run()).reshape(expected.shape) for name, engine in ready.items()}
    return {name: float(np.sqrt(np.mean((y - expected) ** 2))) for name, y in outputs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=80)
    torch.set_num_threads(1)
    found = [errors(number) for number in range(parser.parse_args().networks)]
    for peers in (("torch",), ("onnxruntime",), ("torch", "onnxruntime")):
        ratios = [error["cellstack"] / min(error[peer] for peer in peers) for error in found]
        name = peers[0] if len(peers) == 1 else "the better"
        print(f"relative to {name:<12}{np.median(ratios):6.3f} median{np.quantile(ratios, 0.9):6.3f} 0.9 quantile")


if __name__ == "__main__":
    main()
