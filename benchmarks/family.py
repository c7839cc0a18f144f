"""Every flag compared with the plain LSTM: its cost, forward and in training, at batch 1 and 32.

    python benchmarks/family.py [--units 128] [--rounds 15]

Each member is first compared with the float64 reference. Then rounds go through all of them in turn on one thread; the
results are the fastest round's milliseconds, and their ratio to the plain LSTM. T = 200 at batch 1, 100 at batch 32;
I = H. Training is the forward pass that keeps what the backward pass needs, and the backward pass for all weights.
"""

import argparse

import numpy as np
import peers

from cellstack import CellSpec, native, reference
from cellstack_bench.turns import alternate


def members(units):
    """Name -> the cell's flags and the call's."""
    return {
        "plain LSTM": ({}, {}),
        "mask": ({}, {"mask"}),
        "reset": ({}, {"reset"}),
        "gates returned": ({}, {"gates"}),
        "recurrent dropout": ({}, {"dropout"}),
        "no bias": ({"use_bias": False}, {}),
        "learned initial state": ({"learn_initial_state": True}, {}),
        "peepholes": ({"peepholes": True}, {}),
        "coupled gates": ({"coupled": True}, {}),
        "clip": ({"clip": 3.0}, {}),
        "cell clip": ({"cell_clip": 3.0}, {}),
        "zoneout, as rates": ({"zoneout": 0.1, "zoneout_cell": 0.1}, {}),
        "zoneout, as masks": ({"zoneout": 0.1, "zoneout_cell": 0.1}, {"zoneout"}),
        "projection to H/2": ({"proj_size": units // 2}, {}),
        "4 heads": ({"heads": 4}, {}),
        "layer norm": ({"layer_norm": True}, {}),
        "layer norm, joint": ({"layer_norm": "joint"}, {}),
        "hard_sigmoid gates": ({"recurrent_activation": "hard_sigmoid"}, {}),
        "softsign, own o": ({"activation": "softsign", "gate_activations": {"o": "hard_sigmoid(0.2, 0.5)"}}, {}),
        "GRU": ({"kind": "gru"}, {}),
        "GRU, reset before": ({"kind": "gru", "reset_after": False}, {}),
        "GRU, layer norm": ({"kind": "gru", "layer_norm": True}, {}),
        "GRU, attention": ({"kind": "gru", "attention": True}, {}),
        "SimpleRNN": ({"kind": "rnn"}, {}),
        "minGRU": ({"kind": "mingru"}, {}),
        "minLSTM": ({"kind": "minlstm"}, {}),
        "LiGRU": ({"kind": "ligru"}, {}),
        "sLSTM": ({"kind": "slstm"}, {}),
        "CfC": ({"kind": "cfc"}, {}),
        "CfC, timespans": ({"kind": "cfc", "timespans": True}, {}),
    }


def prepare(flags, call, units, batch, steps, x):
    """Return two functions: forward, and forward with backward; the forward pass was checked."""
    rng = np.random.default_rng(0)
    spec = CellSpec(units, units, **flags)
    new = lambda shape: rng.uniform(-1, 1, shape).astype(np.float32) * units**-0.5  # noqa: E731
    # with random weights, gains of 1 give a chaotic system that amplifies rounding errors
    arrays = {name: new(shape) + 0.3 * name.endswith("_gain") for name, shape in spec.shapes.items()}
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    if spec.scalar:
        x = x.copy()
        x[..., -1] = rng.random((batch, steps))
    mask = rng.random((batch, steps)) < 0.8 if "mask" in call else None
    reset = rng.random((batch, steps)) < 0.05 if "reset" in call else None
    drawn = lambda keep, *shape: (rng.random(shape) < keep).astype(np.float32)  # noqa: E731
    dropout = drawn(0.8, batch, spec.output_size) / np.float32(0.8) if "dropout" in call else None
    zoneout = drawn(0.1, batch, steps, spec.output_size) if "zoneout" in call else None
    zoneout_cell = drawn(0.1, batch, steps, spec.units) if "zoneout" in call else None
    drops = {"recurrent_dropout": dropout, "zoneout": zoneout, "zoneout_cell": zoneout_cell}
    layer, out = peers.kernel_layer(spec, arrays, x, "gates" in call, **drops)
    layer_kept, kept = peers.kernel_layer(spec, arrays, x, True, **drops)
    every = {name: kept.get(name) for name in ("y", "gates", "states", "intermediate")}
    layer_back = native.Layer(native.weights(spec, arrays, copy=False), **every, **drops)
    gradients = {name: np.empty_like(array) for name, array in arrays.items()}
    wanted = native.Gradients(dy=np.ones_like(kept["y"]), arrays=native.in_order(gradients))
    sequences = native.sequences(x, mask, reset)

    def forward():
        native.forward(sequences, [layer], 1)

    def training():
        native.forward(sequences, [layer_kept], 1)
        native.backward(sequences, [layer_back], [wanted], 1)

    forward()
    training()
    call_flags = {"mask": mask, "reset": reset, **drops}
    expected = reference.forward(
        spec, {name: array.astype(np.float64) for name, array in arrays.items()}, x.astype(np.float64), **call_flags
    )
    for got in (out["y"], kept["y"]):
        np.testing.assert_allclose(got, expected.y, atol=5e-6 * max(1.0, np.abs(expected.y).max()), err_msg=spec.text)
    exact = reference.backward(spec, arrays, expected, dy=np.ones_like(expected.y)).arrays
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, exact[name], atol=1e-4 * max(1.0, np.abs(exact[name]).max()), err_msg=name)
    return forward, training


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    columns = {}
    for batch, steps in ((1, 200), (32, 100)):
        x = np.random.default_rng(1).standard_normal((batch, steps, args.units)).astype(np.float32)
        ready = {name: prepare(*m, args.units, batch, steps, x) for name, m in members(args.units).items()}
        for n, what in enumerate(("forward", "training")):
            times = alternate({name: both[n] for name, both in ready.items()}, args.rounds)
            columns[f"B={batch} {what}"] = {name: least for name, (least, _) in times.items()}
    print(f"I = H = {args.units}, one thread, {native.isa()}; ms, and ratio to the plain LSTM")
    print(f"{'':24}" + "".join(f"{head:>20}" for head in columns))
    for name in members(args.units):
        figures = (f"{times[name]:>12.3f} {times[name] / times['plain LSTM']:>7.2f}" for times in columns.values())
        print(f"{name:24}" + "".join(figures), flush=True)


if __name__ == "__main__":
    main()
