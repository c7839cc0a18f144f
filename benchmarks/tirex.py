"""Forecasts of a TiRex-2 of the published size with random weights: tirex-2's own, compiled, and cellstack's.

    python benchmarks/tirex.py [--cases G,V,P,K …] [--weights W …] [--threads N] [--horizon H] [--rounds N] [--eager]

Needs tirex-2 with its dependencies and a C++ compiler. A case is G groups of V variates with P past and K known
covariates. For each it compares the forecasts, and then times in turn: a forecast after a context of 2,048 observations
by tirex-2, as `load_model(compile=True)` compiles it, and by cellstack; and a stream's next patch with its forecast,
where the known covariates are past ones. Each ratio is the median of those of the rounds, each time that of the fastest
round: processor time with one thread, else elapsed time. A patch of one series is mostly the time of reading the
weights once, which is measured too.
"""

import argparse
import time

import numpy as np
import torch

import cellstack as cs
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.train import TiRexForecaster
from cellstack_bench.turns import alternate, timed

CONTEXT, PATCH = 2048, 32
CASES = ("1,1,0,0", "1,12,0,0", "1,4,4,4", "64,1,0,0", "8,4,4,4", "8,12,0,0")


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


def reading(net, clock):
    """Print how long a sum over as many bytes as the weights have takes."""
    weights = torch.ones(sum(node.numbers_read for node in net.nodes))
    ((low, _),) = alternate({"read": weights.sum}, 5, clock).values()
    size = 4 * len(weights)
    print(f"{size / 1e6:.0f} MB of weights, read once in {low:.1f} ms: {size / low / 1e6:.1f} GB/s")


def compare(model, net, case, given, clock):
    """Print the differences and the times of a case."""
    from tirex2 import TimeseriesType

    groups, variates, past, known = map(int, case.split(","))
    rng, steps = np.random.default_rng(0), CONTEXT + max(given.horizon, PATCH)
    x = rng.normal(size=(groups, variates + past + known, steps)).cumsum(axis=2).astype(np.float32)
    parts = [variates, variates + past]
    targets, earlier, ahead = np.split(x, parts, axis=1)
    covariates = {"past": earlier[..., :CONTEXT], "known": ahead[..., : CONTEXT + given.horizon]}
    own = [
        TimeseriesType(
            torch.from_numpy(group[:, :CONTEXT]),
            *(torch.from_numpy(part[n]) if part.shape[1] else None for part in covariates.values()),
        )
        for n, group in enumerate(targets)
    ]

    def theirs():
        return np.stack([one.numpy().swapaxes(1, 2) for one in model.predict(own, given.horizon)])

    runs, expected = {"tirex-2": theirs}, theirs()  # the first call compiles
    for weights in given.weights:
        forecaster = TiRexForecaster(net, weights)

        def whole(forecaster=forecaster):
            return forecaster.forecast(targets[..., :CONTEXT], given.horizon, **covariates, threads=given.threads)

        far = np.abs(whole() - expected).max() / np.abs(expected).max()
        print(f"{weights}: forecasts differ by {far:.1e} of the largest value")
        if weights == "float32" and not far < 1e-4:
            raise SystemExit("expected a difference below 1e-4")
        runs[f"forecast, {weights}"] = whole
        others = {"past": x[:, variates:, :CONTEXT]}
        stream = forecaster.stream(targets[..., :CONTEXT], **others, threads=given.threads)

        def continued(stream=stream):
            stream.step(targets[..., CONTEXT:][..., :PATCH], past=x[:, variates:, CONTEXT:][..., :PATCH])
            return stream.forecast(given.horizon)

        continued()
        runs[f"next patch, {weights}"] = continued
    turns = [{name: timed(run, 1, clock) for name, run in runs.items()} for _ in range(given.rounds)]
    for name in runs:
        low = 1000 * min(turn[name] for turn in turns)
        ratio = np.median([turn[name] / turn["tirex-2"] for turn in turns])
        print(f"  {name:<24}{low:>9.1f} ms   {ratio:6.3f} of tirex-2", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="G,V,P,K")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=PATCH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="don't compile the package's model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = package(not given.eager)
    net = cs.load(model)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    reading(net, clock)
    for case in given.cases:
        print(f"G,V,P,K = {case}: {given.threads} threads, horizon {given.horizon}")
        compare(model, net, case, given, clock)


if __name__ == "__main__":
    main()
