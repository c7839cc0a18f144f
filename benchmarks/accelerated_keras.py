"""Keras's own layers, unchanged and under `cellstack.keras.patch`: a training step, and `predict`, of whole models.

    python benchmarks/accelerated_keras.py [--threads 1] [--rounds 15] [--batch 32] [--steps 100]
        [--width 64] [--units 128]

On the torch backend. Outputs are compared first, before and after a training step; then rounds alternate, timed by
processor time. A model is the layer followed by a Dense, trained with Adam; a step is `train_on_batch`, predict is
`predict_on_batch`.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch

import cellstack as cs

L = keras.layers


def models(width, units):
    """The models by name: each a function that returns a list of layers."""
    return {
        "LSTM": lambda: [L.LSTM(units)],
        "GRU": lambda: [L.GRU(units)],
        "SimpleRNN": lambda: [L.SimpleRNN(units)],
        "LSTM, masked": lambda: [L.Masking(), L.LSTM(units)],
        "GRU, masked": lambda: [L.Masking(), L.GRU(units)],
        "RNN of two LSTMCells": lambda: [L.RNN([L.LSTMCell(units), L.LSTMCell(units)])],
        "Bidirectional LSTM": lambda: [L.Bidirectional(L.LSTM(units))],
        "two LSTMs": lambda: [L.LSTM(units, return_sequences=True), L.LSTM(units)],
    }


def built(make, steps, width):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((steps, width)), *make(), L.Dense(10)])
    model.compile(optimizer="adam", loss="mse")
    return model


def alternate(runs, rounds):
    """Return the minimum processor time of each run in milliseconds, in alternating rounds."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], 1e3 * (time.process_time() - start))
    return least


def rows(batch=32, steps=100, width=64, units=128, rounds=15, names=None):
    """Measure; each row is `(model, what, Keras's milliseconds, ours)`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, steps, width)).astype("float32")
    for row, length in enumerate(rng.integers(1, steps + 1, batch)):
        x[row, length:] = 0.0  # masked by Masking
    y = rng.normal(size=(batch, 10)).astype("float32")
    found = []
    for name, make in models(width, units).items():
        if names is not None and name not in names:
            continue
        theirs, ours = built(make, steps, width), cs.keras.accelerate(built(make, steps, width))
        for _ in range(2):
            np.testing.assert_allclose(ours.predict_on_batch(x), theirs.predict_on_batch(x), atol=2e-5, rtol=1e-4)
            np.testing.assert_allclose(ours.train_on_batch(x, y), theirs.train_on_batch(x, y), rtol=1e-4)
        for what, run in (("fit", lambda m: m.train_on_batch(x, y)), ("predict", lambda m: m.predict_on_batch(x))):
            least = alternate({"keras": lambda: run(theirs), "ours": lambda: run(ours)}, rounds)  # noqa: B023
            found.append((name, what, least["keras"], least["ours"]))
            yield found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in {"threads": 1, "rounds": 15, "batch": 32, "steps": 100, "width": 64, "units": 128}.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    for name, what, keras_ms, our_ms in rows(**args):
        print(f"{name:<22}{what:<9}{keras_ms:>9.2f} -> {our_ms:>7.2f} ms   {keras_ms / our_ms:5.1f} times", flush=True)


if __name__ == "__main__":
    main()
