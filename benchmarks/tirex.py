"""Forecasts of a TiRex-2 of the published size with random weights: tirex-2's own, compiled, and cellstack's.

    python benchmarks/tirex.py [--series B …] [--threads N] [--horizon H] [--seconds S] [--eager]

Needs tirex-2 with its dependencies and a C++ compiler. For each number of series it compares the forecasts, and then
times in turn: a forecast after a context of 2,048 observations by tirex-2, as `load_model(compile=True)` compiles it,
and by cellstack; and a stream's next patch with its forecast, with weights in each number format. Each result is the
fastest of several rounds: processor time with one thread, else elapsed time. A patch of one series is mostly the time
of reading the weights once, which is measured too.
"""

import argparse
import time

import numpy as np
import torch

import cellstack as cs
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.train import TiRexForecaster
from cellstack_bench.turns import alternate

CONTEXT, PATCH = 2048, 32
MOST_ROUNDS = 15


def configuration():
    """Return the configuration of the published model, of 82.5 million weights."""

    def template(kind):
        mixer = {"embedding_dim": 512, "num_heads": 4}
        return {"time_mixer": {"model_type": kind, **mixer}, "variate_mixer": mixer, "dropout": 0.0, "eps": 1e-6}

    return {
        "stack_config": {"templates": {"s": template("bi-slstm"), "m": template("bi-mlstm")}, "recipe": ["s", "m"] * 6},
        "num_blocks": 12,
        "embedding_dim": 512,
        "input_patch_size": PATCH,
        "output_patch_size": PATCH,
        "quantiles": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "tokenizer_cfg": {"output_patch_size": PATCH, "input_patch_size": PATCH, "input_patch_stride": PATCH},
        "scaler_cfg": {"eps": 1e-8, "use_arcsinh": True, "binaryaware": True},
        "h_expand": 4.0,
        "context_len": CONTEXT,
        "future_len": 320,
        "input_ff_dim": 2048,
        "act_func": "torch.nn.SiLU",
        "dropout": 0.0,
        "stack_out_norm_config": {"eps": 1e-7},
    }


def package(compiled):
    """Return the package's model; sLSTM and mLSTM layers compiled as `load_model(compile=True)` does."""
    from tirex2.model import TiRex2
    from tirex2.model.component.flashrnn_slstm import _FlashRNNLayer
    from tirex2.model.component.mlstm_block import mLSTMLayer

    torch.manual_seed(0)
    model = TiRex2(**configuration(), device="cpu").eval()
    with torch.no_grad():  # recurrent weights begin with zeros
        for name, weight in model.named_parameters():
            if "recurrent_kernel" in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
    for module in model.modules() if compiled else ():
        if isinstance(module, (mLSTMLayer, _FlashRNNLayer)):
            module.compile()
    return model


def rounds_in(runs, seconds):
    """Return how many rounds, with two calls of each, fit into some seconds."""
    begin = time.perf_counter()
    for run in runs.values():
        run()
    return max(2, min(MOST_ROUNDS, int(seconds / 2 / (time.perf_counter() - begin))))


def reading(net, clock):
    """Print how long a sum over as many bytes as the weights have takes."""
    weights = torch.ones(sum(node.numbers_read for node in net.nodes))
    ((low, _),) = alternate({"read": weights.sum}, MOST_ROUNDS, clock).values()
    size = 4 * len(weights)
    print(f"{size / 1e6:.0f} MB of weights, read once in {low:.1f} ms: {size / low / 1e6:.1f} GB/s")


def compare(model, net, count, given, clock):
    """Print the differences and the times for some series."""
    series = np.random.default_rng(0).normal(size=(count, CONTEXT + PATCH)).cumsum(axis=1).astype(np.float32)
    context, patch = series[:, :CONTEXT], series[:, CONTEXT:]
    from tirex2 import TimeseriesType

    own = [TimeseriesType(torch.from_numpy(row[None]), None, None) for row in context]

    def theirs():
        return np.stack([one[0].numpy().T for one in model.predict(own, given.horizon)])

    runs, expected = {"tirex-2": theirs}, theirs()  # the first call compiles
    for weights in WEIGHTS:
        forecaster = TiRexForecaster(net, weights)
        found = forecaster.forecast(context, given.horizon, threads=given.threads)
        far = np.abs(found - expected).max() / np.abs(expected).max()
        print(f"{weights}: forecasts differ by {far:.1e} of the largest value")
        if weights == "float32" and not far < 1e-4:
            raise SystemExit("expected a difference below 1e-4")
        runs[f"forecast, {weights}"] = lambda f=forecaster: f.forecast(context, given.horizon, threads=given.threads)
        stream = forecaster.stream(context, threads=given.threads)

        def continued(stream=stream):
            stream.step(patch)
            return stream.forecast(given.horizon)

        runs[f"next patch, {weights}"] = continued
    times = {name: low for name, (low, _) in alternate(runs, rounds_in(runs, given.seconds), clock).items()}
    for name, low in times.items():
        print(f"  {name:<24}{low:>9.1f} ms   {times['tirex-2'] / low:6.1f} times", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--series", type=int, nargs="+", default=[1], help="numbers of series")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=PATCH)
    parser.add_argument("--seconds", type=float, default=30, help="about how long to measure each number of series")
    parser.add_argument("--eager", action="store_true", help="don't compile the package's model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = package(not given.eager)
    net = cs.load(model)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    reading(net, clock)
    for count in given.series:
        print(f"{count} series, {given.threads} threads, horizon {given.horizon}")
        compare(model, net, count, given, clock)


if __name__ == "__main__":
    main()
