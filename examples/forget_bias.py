"""Train the same small LSTM with several initial biases of the forget gate, and inspect the resulting gate.

The task: a sequence begins with one of four symbols, followed by noise. At the end, the network has to name the symbol:
20 steps back, and 60. Gers, Schmidhuber and Cummins (2000) and Jozefowicz, Zaremba and Sutskever (2015) advise a high
initial bias of the forget gate. The figures show why: how much of the output's gradient reaches the relevant step
before training, how often the task is learned, and how long the trained units remember.

python examples/forget_bias.py [forget_bias.png]
"""

import sys

import numpy as np
import torch

import cellstack as cs
from cellstack import layers

BIASES, DELAYS, SEEDS = (-1.0, 0.0, 1.0, 3.0, 5.0), (20, 60), (0, 1, 2)
SYMBOLS, NOISE, UNITS, BATCH, STEPS, EVERY = 4, 4, 16, 32, 800, 100
LEARNED = 0.99  # share of correctly classified sequences


def draw(delay, generator):
    """Return sequences `[B, T, I]` with a symbol at the first step and noise after it, and the symbols `[B]`."""
    symbols = torch.randint(SYMBOLS, (BATCH,), generator=generator)
    x = torch.zeros(BATCH, delay + 1, SYMBOLS + NOISE)
    x[torch.arange(BATCH), 0, symbols] = 1.0
    x[:, 1:, SYMBOLS:] = torch.randn(BATCH, delay, NOISE, generator=generator)
    return x, symbols


def train(bias, delay, seed):
    """Train one network; return its measurements."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    lstm = layers.LSTM(UNITS, forget_bias=bias, input_size=SYMBOLS + NOISE)
    model = torch.nn.Sequential(lstm, torch.nn.Linear(UNITS, SYMBOLS))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with cs.inspect.TrainingMonitor(model, rows=BATCH) as monitor:
        for step in range(STEPS):
            x, symbols = draw(delay, generator)
            loss = torch.nn.functional.cross_entropy(model(x), symbols)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % EVERY == 0:
                monitor.epoch()
    with torch.no_grad():
        tests = [draw(delay, generator) for _ in range(16)]
        right = np.mean([(model(x).argmax(1) == symbols).float().mean() for x, symbols in tests])
    first, last = monitor.records[0].layers["0"], monitor.records[-1].layers["0"]
    return {
        "accuracy": float(right),
        "carried": float(first.lags["carried"][-1]),
        "gate before": first.figures["gates"]["f"],
        "gate": last.figures["gates"]["f"],
        "half-life before": first.figures["half-life"]["median"],
        "half-life": last.figures["half-life"]["median"],
    }


def spread(values, form):
    """Return the median over the seeds, with minimum and maximum."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def plot(results, path):
    """Plot the accuracy, and the half-life before and after training, against the initial bias."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    accuracy, lives = figure.subplots(1, 2)
    for delay, color in zip(DELAYS, ("#2a78d6", "#eb6834"), strict=True):
        for axis, what in ((accuracy, "accuracy"), (lives, "half-life")):
            every = np.array([[one[what] for one in results[bias, delay]] for bias in BIASES])
            axis.plot(BIASES, np.median(every, axis=1), color=color, label=f"{delay} steps")
            axis.plot(BIASES, every, "o", color=color, markersize=4, alpha=0.5)
        lives.axhline(delay, color=color, linewidth=0.8, linestyle=":")
    before = [
        np.median([one["half-life before"] for delay in DELAYS for one in results[bias, delay]]) for bias in BIASES
    ]
    lives.plot(BIASES, before, "--", color="#777777", label="before training")
    accuracy.axhline(1 / SYMBOLS, color="#777777", linewidth=0.8, linestyle=":")
    accuracy.set(xlabel="initial bias of the forget gate", ylabel="accuracy", ylim=(0, 1.05))
    lives.set(xlabel="initial bias of the forget gate", ylabel="half-life of the median unit, steps", yscale="log")
    accuracy.legend(loc="lower right", fontsize=8)
    lives.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=80)


def main():
    """Train all networks, print the table, draw the plot."""
    torch.set_num_threads(1)  # steps this small don't benefit from a second thread
    results = {(bias, delay): [train(bias, delay, seed) for seed in SEEDS] for delay in DELAYS for bias in BIASES}
    print(f"median over {len(SEEDS)} seeds (minimum to maximum); {UNITS} units, {STEPS} steps of {BATCH} sequences")
    for delay in DELAYS:
        print(f"\nthe symbol is {delay} steps back")
        head = ("bias", "accuracy", "gradient carried at first", "f before", "f after", "half-life before", "after")
        print("{:>5}  {:<20} {:<30} {:<9} {:<20} {:<17} {}".format(*head))
        for bias in BIASES:
            one = {name: [run[name] for run in results[bias, delay]] for name in results[bias, delay][0]}
            print(
                f"{bias:>5}  {spread(one['accuracy'], '.2f'):<20} {spread(one['carried'], '.0e'):<30} "
                f"{np.median(one['gate before']):<9.2f} {spread(one['gate'], '.2f'):<20} "
                f"{np.median(one['half-life before']):<17.1f} {spread(one['half-life'], '.1f')}"
            )
    learned = {bias: sum(one["accuracy"] >= LEARNED for d in DELAYS for one in results[bias, d]) for bias in BIASES}
    print(
        "\nlearned, of", len(DELAYS) * len(SEEDS), "runs:", ", ".join(f"{n} from {bias}" for bias, n in learned.items())
    )
    path = sys.argv[1] if len(sys.argv) > 1 else "forget_bias.png"
    plot(results, path)
    print("drawn:", path)


if __name__ == "__main__":
    main()
