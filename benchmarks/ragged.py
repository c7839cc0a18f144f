"""Training on sequences of many lengths: `train.fit` compared with two loops in plain torch.

    python benchmarks/ragged.py [--threads 1] [--rounds 3] [--epochs 5] [--seeds 0]

600 sequences of 20 to 200 steps and 6 channels, whose class is a frequency in noise. Every engine trains the same
model, nn.LSTM's or cellstack's layers, the mean of the states and a dense layer, with the same batch size, Adam,
clipping and dropout, for as many epochs. The torch loops shuffle the sequences and pad each batch; one of them packs
it. The figures are processor seconds of an epoch, the least of several rounds in turn. With `--seeds N`, also the
accuracies of N seeds on other sequences, after `--epochs`.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from cellstack import train
from cellstack.bench.turns import alternate, kept_on

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
        return float(np.mean(train.run(fitted.network, x)["predicted"] == y))
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
    for name, default in {"threads": 1, "rounds": 3, "epochs": 5, "seeds": 0, "units": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, y = sequences(600, 0)
    test = sequences(600, 1)
    with kept_on(args.threads):
        for layers in (1, 2):
            for bidirectional in (False, True):
                shape = args.units, layers, bidirectional

                def run(fit, epochs=args.epochs, seed=0, shape=shape):
                    return fit(x, y, epochs, seed, *shape)

                runs = {name: lambda fit=fit: run(fit) for name, fit in ENGINES.items()}
                took = {
                    name: ms / 1e3 / args.epochs
                    for name, (ms, _) in alternate(runs, args.rounds, time.process_time).items()
                }
                least = min(seconds for name, seconds in took.items() if name != "cellstack")
                print(
                    f"{layers} layer(s), {'bidirectional' if bidirectional else 'forward'}: "
                    + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in took.items())
                    + f"; {least / took['cellstack']:.2f} times as fast as the faster of torch",
                    flush=True,
                )
                for name, fit in ENGINES.items():
                    found = [accuracy(run(fit, seed=seed), *test) for seed in range(args.seeds)]
                    if found:
                        print(f"    {name}: {' '.join(f'{one:.3f}' for one in found)}, median {np.median(found):.3f}")


if __name__ == "__main__":
    main()
