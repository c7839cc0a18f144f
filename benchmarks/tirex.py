"""Forecasts of a TiRex-2 of the published size with random weights: tirex-2's own, compiled, and cellstack's.

    python benchmarks/tirex.py [--batch B] [--threads N] [--horizon H] [--eager]

Needs tirex-2 with its dependencies and a C++ compiler. Compares the forecasts first. Then it times, in turn: a forecast
after a context of 2,048 observations by tirex-2, as `load_model(compile=True)` compiles it, and by cellstack; and a
stream's next patch with its forecast. Each result is the fastest of --rounds: processor time with one thread, else
elapsed time.
"""

import argparse
import time

import numpy as np
import torch

import cellstack as cs
from cellstack.train import TiRexForecaster
from cellstack_bench.turns import alternate

CONTEXT, PATCH = 2048, 32


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1, help="number of series")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=PATCH)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="don't compile the package's model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    from tirex2 import TimeseriesType

    model = package(not given.eager)
    forecaster = TiRexForecaster(cs.from_torch(model))
    series = np.random.default_rng(0).normal(size=(given.batch, CONTEXT + PATCH)).cumsum(axis=1).astype(np.float32)
    context, patch = series[:, :CONTEXT], series[:, CONTEXT:]
    own = [TimeseriesType(torch.from_numpy(row[None]), None, None) for row in context]
    stream = forecaster.stream(context, threads=given.threads)

    def theirs():
        return np.stack([one[0].numpy().T for one in model.predict(own, given.horizon)])

    def ours():
        return forecaster.forecast(context, given.horizon, threads=given.threads)

    def continued():
        stream.step(patch)
        return stream.forecast(given.horizon)

    expected, found = theirs(), ours()
    far = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"forecasts differ by {far:.1e} of the largest value")
    if not far < 1e-4:
        raise SystemExit("expected a difference below 1e-4")
    clock = time.process_time if given.threads == 1 else time.perf_counter
    runs = {"tirex-2": theirs, "cellstack": ours, "cellstack, next patch": continued}
    times = {name: low for name, (low, _) in alternate(runs, given.rounds, clock).items()}
    print(f"{given.batch} series, {given.threads} threads, horizon {given.horizon}")
    for name, low in times.items():
        print(f"{name:<24}{low:>9.1f} ms   {times['tirex-2'] / low:6.1f} times", flush=True)


if __name__ == "__main__":
    main()
