"""Sequence classification: `SequenceClassifier` compared with a tuned torch LSTM and aeon's ROCKET family.

    python benchmarks/classification.py [--problems BasicMotions,…] [--models cellstack,…] [--seeds 5]

The problems are those of the UCR and UEA archives that aeon's and sktime's packages contain, with the archives' split
into training and test part. Everything runs on one thread. For each model and problem: the test accuracy by seed, its
median, and the median duration of a fit in seconds.

- cellstack: `SequenceClassifier(random_state=seed)`, otherwise with defaults.
- torch LSTM: `nn.LSTM` and `nn.Linear` in plain torch on standardised inputs, Adam, 1500 steps or 100 epochs, whatever
  is more, stopped early after a quarter of them without improvement. It keeps the weights with the lowest loss on a
  fifth of the training part. That loss also selects, once per problem: units, rate, one direction or both, then the
  readout, the last state or the mean over the steps. The seconds exclude this selection.
- ROCKET family: aeon's classifiers with defaults. Those that need sequences of equal length get aeon's equal-length
  version of the problem.
"""

import argparse
import copy
import importlib.util
import itertools
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import cellstack as cs
from cellstack import train

PROBLEMS = (
    "BasicMotions",
    "JapaneseVowels",
    "ItalyPowerDemand",
    "UnitTest",
    "Covid3Month_disc",
    "GunPoint",
    "ArrowHead",
    "PickupGestureWiimoteZ",
    "OSULeaf",
    "ACSF1",
    "PLAID",
)
ROCKETS = ("RocketClassifier", "MiniRocketClassifier", "MultiRocketClassifier", "HydraClassifier")
MODELS = ("cellstack", "torch LSTM", *ROCKETS)


def load(name):
    """Return the training and the test part of a problem."""
    for package in ("aeon", "sktime"):
        found = importlib.util.find_spec(package)
        for folder in (name, name.removesuffix("_eq")):
            path = Path(found.submodule_search_locations[0], "datasets", "data", folder, f"{name}_TRAIN.ts")
            if path.exists():
                training = train.read_ts(path)
                return training, train.read_ts(path.with_name(f"{name}_TEST.ts"), training.labels)
    raise FileNotFoundError(f"{name}: neither in aeon's nor in sktime's package")


# ── the torch LSTM ────────────────────────────────────────────────────────────────────────────────────────────────────


class LSTM(nn.Module):
    def __init__(self, channels, classes, units, bidirectional, mean):
        super().__init__()
        self.lstm = nn.LSTM(channels, units, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(units * (1 + bidirectional), classes)
        self.mean = mean

    def forward(self, x):
        """Return logits for a list of sequences."""
        y, (h, _) = self.lstm(pack_sequence(x, enforce_sorted=False))
        if not self.mean:
            return self.head(h.transpose(0, 1).flatten(1))
        y, lengths = pad_packed_sequence(y, batch_first=True)
        return self.head(y.sum(1) / lengths[:, None])


def fit_torch(x, y, classes, seed, *, units, lr, bidirectional, mean):
    """Return a model and its lowest validation loss."""
    torch.manual_seed(seed)
    kept, validation = train.custom.split(y, 0.2, np.random.default_rng(seed))
    if not len(validation):
        kept = validation = np.arange(len(y))
    model = LSTM(x[0].shape[1], classes, units, bidirectional, mean)
    optimizer, labels = torch.optim.Adam(model.parameters(), lr), torch.from_numpy(y)
    best, stale = (np.inf, None), 0
    epochs = max(100, -(-1500 * 16 // len(kept)))  # a small training part has few steps per epoch
    for _ in range(epochs):
        model.train()
        for batch in torch.from_numpy(kept)[torch.randperm(len(kept))].split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model([x[n] for n in batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(model([x[n] for n in validation]), labels[validation]))
        stale += 1
        if loss < best[0]:
            best, stale = (loss, copy.deepcopy(model.state_dict())), 0
        if 4 * stale > epochs:
            break
    model.load_state_dict(best[1])
    return model.eval(), best[0]


def torch_lstm(training, test, seeds):
    """Yield accuracy and seconds by seed, of the settings that perform best on a validation part."""
    steps = np.concatenate(training.x)
    mean, scale = steps.mean(0), steps.std(0) + 1e-8
    x, x_test = ([torch.from_numpy((one - mean) / scale) for one in part.x] for part in (training, test))
    fit = lambda seed, **how: fit_torch(x, training.y, len(training.labels), seed, **how)  # noqa: E731
    tried = []
    for units, lr, bidirectional in itertools.product((32, 96), (1e-3, 5e-3), (False, True)):
        how = {"units": units, "lr": lr, "bidirectional": bidirectional, "mean": False}
        tried.append((fit(0, **how)[1], len(tried), how))
    how = min(tried)[2] | {"mean": True}
    tried.append((fit(0, **how)[1], len(tried), how))
    how = min(tried)[2]
    print(f"    torch LSTM: chose {how}", flush=True)
    for seed in seeds:
        started = time.perf_counter()
        model, _ = fit(seed, **how)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            chosen = model(x_test).argmax(1).numpy()
        yield float((chosen == test.y).mean()), seconds


# ── the others ────────────────────────────────────────────────────────────────────────────────────────────────────────


def cellstack(training, test, seeds):
    for seed in seeds:
        started = time.perf_counter()
        model = cs.sklearn.SequenceClassifier(random_state=seed).fit(training.x, training.y)
        seconds = time.perf_counter() - started
        yield model.score(test.x, test.y), seconds


def rocket(name, problem, training, test, seeds):
    from aeon.classification import convolution_based

    kind = getattr(convolution_based, name)
    if len({*training.lengths, *test.lengths}) > 1:
        if kind.get_class_tag("capability:unequal_length"):
            turned = [[one.T.astype(np.float64) for one in part.x] for part in (training, test)]
        else:
            training, test = load(f"{problem}_eq")
            turned = [np.stack(part.x).transpose(0, 2, 1).astype(np.float64) for part in (training, test)]
    else:
        turned = [np.stack(part.x).transpose(0, 2, 1).astype(np.float64) for part in (training, test)]
    kind(random_state=0).fit(turned[0][:20], np.arange(20) % 2)  # compiles
    for seed in seeds:
        started = time.perf_counter()
        model = kind(random_state=seed).fit(turned[0], training.y)
        seconds = time.perf_counter() - started
        yield float((model.predict(turned[1]) == test.y).mean()), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for problem in options.problems.split(","):
        training, test = load(problem)
        lengths = (
            f"{min(training.lengths)} to {max(training.lengths)}" if np.ptp(training.lengths) else training.lengths[0]
        )
        print(
            f"{problem}: {len(training.x)} and {len(test.x)} sequences, {lengths} steps, {training.channels} channels"
        )
        for name in options.models.split(","):
            runs = {"cellstack": cellstack, "torch LSTM": torch_lstm}.get(name)
            runs = runs or (lambda *parts, name=name, problem=problem: rocket(name, problem, *parts))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # from numba and aeon
                    results = list(runs(training, test, range(options.seeds)))
            except (FileNotFoundError, ValueError) as error:  # a baseline that doesn't support such sequences
                if name == "cellstack":
                    raise
                print(f"    {name}: not run: {error}", flush=True)
                continue
            right, seconds = zip(*results, strict=True)
            by_seed = " ".join(f"{100 * share:.1f}" for share in right)
            said = f"median {100 * statistics.median(right):.1f} %, {statistics.median(seconds):.1f} s"
            print(f"    {name}: {by_seed}; {said}", flush=True)


if __name__ == "__main__":
    main()
