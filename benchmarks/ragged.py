"""Training on sequences of many lengths: `train.fit` compared with two loops in plain torch.

    python benchmarks/ragged.py [--threads 1] [--rounds 3] [--seeds 5]

600 sequences of 20 to 200 steps and 6 channels, whose class is a frequency in noise. Every engine trains the same
model, nn.LSTM's or cellstack's layers, the mean of the states and a dense layer, with the same batch size, Adam,
clipping and dropout, for as many epochs. The torch loops shuffle the sequences and pad each batch; one of them packs
it. The figures are processor seconds of an epoch, the least of several rounds in turn. With `--seeds N`, also the
accuracies on 600 other sequences after `--fitted` epochs, of N seeds.
"""

import argparse
import itertools
import math
import time

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from cellstack import train
from cellstack_bench.turns import kept_on

CLASSES, CHANNELS, BATCH, LR, DROPOUT = 4, 6, 16, 5e-3, 0.2


def sequences(count, seed):
    """Return sequences `[T, C]` and their classes."""
    rng = np.random.default_rng(seed)
    x, y = [], rng.integers(0, CLASSES, count)
    for label in y:
        t = np.arange(rng.integers(20, 201))[:, None]
        phase = rng.uniform(0, 2 * np.pi, CHANNELS)
        wave = np.sin((0.30 + 0.06 * label) * t + phase) * rng.uniform(0.2, 1.0, CHANNELS)
        x.append((wave + rng.normal(size=wave.shape)).astype(np.float32))
    return x, y


class Plain(nn.Module):
    def __init__(self, units, layers, bidirectional, packs):
        super().__init__()
        between = DROPOUT if layers > 1 else 0.0
        how = {"num_layers": layers, "bidirectional": bidirectional, "dropout": between, "batch_first": True}
        self.lstm, self.packs = nn.LSTM(CHANNELS, units, **how), packs
        self.dropout, self.head = nn.Dropout(DROPOUT), nn.Linear(units * (1 + bidirectional), CLASSES)

    def forward(self, x, lengths):
        if self.packs:
            y, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            y, _ = pad_packed_sequence(y, batch_first=True)
        else:
            y, _ = self.lstm(x)
        used = (torch.arange(y.shape[1]) < lengths[:, None])[..., None]
        return self.head((self.dropout(y) * used).sum(1) / lengths[:, None])


def plain(x, y, epochs, seed, *shape, packs):
    """Fit in plain torch; return the model and its scaling."""
    torch.manual_seed(seed)
    model = Plain(*shape, packs)
    whole = torch.from_numpy(np.concatenate(x))
    scaling = whole.mean(0), whole.std(0)
    rows, labels = [(torch.from_numpy(row) - scaling[0]) / scaling[1] for row in x], torch.from_numpy(y)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, LR / 100)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(BATCH):
            chosen = [rows[n] for n in batch]
            out = model(pad_sequence(chosen, batch_first=True), torch.tensor([len(row) for row in chosen]))
            loss = nn.functional.cross_entropy(out, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    return model, scaling


@torch.no_grad()
def accuracy(fitted, x, y):
    if isinstance(fitted, train.Result):
        return float(np.mean(np.asarray(fitted.network.predict(x)) == y))
    model, (mean, scale) = fitted
    model.eval()
    lengths = torch.tensor([len(row) for row in x])
    out = model(pad_sequence([(torch.from_numpy(row) - mean) / scale for row in x], batch_first=True), lengths)
    return float((out.argmax(1).numpy() == y).mean())


def fused(x, y, epochs, seed, units, layers, bidirectional):
    how = {"units": (units,) * layers, "bidirectional": bidirectional, "dropout": DROPOUT, "batch": BATCH, "lr": LR}
    threads = torch.get_num_threads()
    return train.fit(x, y, epochs=epochs, seed=seed, validation=0, threads=threads, task="classify", **how)


ENGINES = {
    "cellstack": fused,
    "torch, padded": lambda *case: plain(*case, packs=False),
    "torch, packed": lambda *case: plain(*case, packs=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"threads": 1, "rounds": 3, "epochs": 2, "units": 48, "seeds": 0, "fitted": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (x, y), test = sequences(600, 0), sequences(600, 1)
    with kept_on(args.threads):
        for layers, bidirectional in itertools.product((1, 2), (False, True)):
            shape, took = (args.units, layers, bidirectional), dict.fromkeys(ENGINES, math.inf)
            for _, (name, fit) in itertools.product(range(args.rounds), ENGINES.items()):
                start = time.process_time()
                fit(x, y, args.epochs, 0, *shape)
                took[name] = min(took[name], (time.process_time() - start) / args.epochs)
            ours, *theirs = took.values()
            figures = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in took.items())
            what = f"{layers} layer(s), {'bidirectional' if bidirectional else 'forward'}"
            print(f"{what}: {figures}; {min(theirs) / ours:.2f} times as fast as the faster one of torch", flush=True)
            for name in ("cellstack", "torch, padded") if args.seeds else ():
                fitted = (ENGINES[name](x, y, args.fitted, seed, *shape) for seed in range(args.seeds))
                found = [accuracy(one, *test) for one in fitted]
                figures = " ".join(f"{one:.3f}" for one in found)
                print(f"    accuracy of {name}: {figures}, median {np.median(found):.3f}", flush=True)


if __name__ == "__main__":
    main()
