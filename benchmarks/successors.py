"""What the LSTM's successors learn in the same training, and what they cost.

    python benchmarks/successors.py --out results            trains everything that is missing, seed by seed
    python benchmarks/successors.py --out results --table    the tables of the results, as Markdown
    python benchmarks/successors.py --cost                   the times of a step and of training, as Markdown

Only the cell differs, and nothing was tuned for one. All cells have the same units, but in the text the same number of
weights, as closely as multiples of 4 units allow. Scores are those of the test parts:

    speaker    the demo's two tasks: who is speaking? In both directions, and frame by frame; accuracy
    adding     the sum of the two marked of 500 numbers, one in each half; mean squared error, where 0.167 is the
               variance of the sum
    text       the next character of Alice's Adventures in Wonderland; bits per character
    series     forecasts of five series by the networks that `cellstack train` adds to exponential smoothing; MASE

A JSON file stores each result at once, so a run can be stopped and continued. `--quick` trains each cell for a moment
only, to see that the program works. `--cost` compares at an equal width instead: 128 units and inputs, one thread,
processor time of the thread, the fastest of rounds that alternate between the cells. If the package flashrnn is
installed, its loop in PyTorch, which is what it has for processors, is measured too, after its outputs were compared.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch

from cellstack import load, native, train
from cellstack.train.cell_names import MLSTM
from cellstack.train.data.ts import read_ts
from cellstack.train.options import Architecture
from cellstack.train.recurrent import recurrent_layers
from cellstack.train.sizes import size_of
from cellstack.train.workflow import train_sequences
from cellstack_bench.turns import alternate
from cellstack_demo.demo import DROPOUT, OPTIONS, UNITS

CELLS = {  # the name in the tables -> the cell and its number of heads
    "LSTM": ("lstm", None),
    "GRU": ("gru", None),
    "sLSTM, 1 head": ("slstm", 1),
    "sLSTM, 4 heads": ("slstm", 4),
    "mLSTM, 4 heads": ("mlstm", 4),
    "minLSTM": ("minlstm", None),
    "minGRU": ("mingru", None),
    "CfC": ("cfc", None),
}
SERIES = ("retail", "gasoline", "sunspots", "peyton", "departures")
ADDING = {"steps": 500, "training": 1000, "test": 300}
SHOWN = {"speaker, both directions": 2, "speaker, frame by frame": 2, "adding": 4}  # digits after the point
WIDTH, ROWS, STEPS, ROUNDS = 128, 16, 100, 15  # of the costs


def matched(cell: str, heads: int | None, width: int, units: tuple[int, ...]) -> tuple[int, ...]:
    """Return equal units for each layer with which a cell has about as many weights as an LSTM with `units`."""
    wanted = size_of(Architecture(units), width).weights
    return min(
        ((size,) * len(units) for size in range(4, 20 * max(units), 4)),
        key=lambda sizes: abs(size_of(Architecture(sizes, cell=cell, heads=heads), width).weights - wanted),
    )


def speaker(both: bool, cell: str, heads: int | None, seed: int, quick: bool) -> train.Result:
    """Train one of the demo's two models."""
    with as_file(files("cellstack_demo") / "data") as data:
        training = read_ts(data / "JapaneseVowels_TRAIN.ts")
        test = read_ts(data / "JapaneseVowels_TEST.ts", training.labels)
    built = Architecture(UNITS, cell, heads, both, dropout=DROPOUT, every_step=not both)
    epochs = 1 if quick else 20
    return train_sequences(training, test, built, replace(OPTIONS, seed=seed, epochs=epochs, threads=1))


def adding(cell: str, heads: int | None, seed: int, quick: bool) -> train.Result:
    """Train on the adding problem, with the output after the last step."""
    rng = np.random.default_rng(seed)
    steps = ADDING["steps"]

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.zeros((count, steps, 2), np.float32)
        x[..., 0] = rng.uniform(size=(count, steps))
        rows, half = np.arange(count), steps // 2
        marked = rng.integers(0, half, count), rng.integers(half, steps, count)
        for step in marked:
            x[rows, step, 1] = 1
        return x, x[rows, marked[0], 0] + x[rows, marked[1], 0]

    return train.fit(
        *drawn(64 if quick else ADDING["training"]),
        validation=drawn(ADDING["test"]),
        test=drawn(ADDING["test"]),
        task="regress",
        units=32,
        cell=cell,
        heads=heads,
        pooling="last",
        dropout=0.0,
        epochs=1 if quick else 12,
        batch=16,
        patience=0,
        seed=seed,
        threads=1,
        progress=False,
        device="cpu",
    )


def text(cell: str, heads: int | None, seed: int, quick: bool) -> train.Result:
    """Train a character model of two layers."""
    book = (files("cellstack_demo") / "data" / "alice.txt").read_text()
    return train.fit_text(
        book[:5000] if quick else book,
        units=matched(cell, heads, 32, (64, 64)),
        cell=cell,
        heads=heads,
        embedding=32,
        dropout=0.0,
        epochs=1 if quick else 2,
        patience=0,
        batch=8,
        steps=64,
        seed=seed,
        threads=1,
        progress=False,
        device="cpu",
    )


def forecast(name: str, cell: str, heads: int | None, seed: int, quick: bool) -> train.Result:
    """Train one network, where the command averages three, to forecast a series."""
    from series import SERIES as TABLES

    entry = TABLES[name]
    return train.fit_forecast(
        entry.make(),
        entry.target,
        entry.horizon,
        id=entry.id,
        known=entry.known,
        units=32,
        cell=cell,
        heads=heads,
        members=1,
        epochs=1 if quick else 4,
        seed=seed,
        threads=1,
        progress=False,
        device="cpu",
    ).result


Training = Callable[[str, int | None, int, bool], train.Result]


def measured(score: str) -> Callable[[train.Result], float]:
    return lambda result: float(result.scores[score])


TASKS: dict[str, tuple[Training, Callable[[train.Result], float]]] = {
    "speaker, both directions": (lambda *how: speaker(True, *how), measured("accuracy")),
    "speaker, frame by frame": (lambda *how: speaker(False, *how), measured("accuracy")),
    "adding": (adding, lambda result: float(result.scores["rmse"]) ** 2),
    "text": (text, measured("bits_per_character")),
    **{
        f"series {name}": (
            lambda *how, name=name: forecast(name, *how),
            lambda result: float(next(iter(result.scores["targets"].values()))["model"]["mase"]),
        )
        for name in SERIES
    },
}


def applies(task: str, cell: str) -> bool:
    return cell != MLSTM or task != "speaker, both directions"  # an mLSTM runs forward only


def run(path: Path, names: list[str], seeds: int, quick: bool) -> None:
    """Train whatever isn't among the results, and add it to them."""
    results = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(1)
    for seed in range(seeds):
        for task in names:
            training, score = TASKS[task]
            for name, (cell, heads) in CELLS.items():
                key = f"{task}/{name}/{seed}"
                if key in results or not applies(task, cell):
                    continue
                started = time.thread_time()
                result = training(cell, heads, seed, quick)
                took = time.thread_time() - started
                weights = sum(parameter.numel() for parameter in result.model.parameters())
                results[key] = {"score": score(result), "weights": weights, "steps": result.fit.steps, "seconds": took}
                path.with_suffix(".part").write_text(json.dumps(results, indent=1))
                path.with_suffix(".part").replace(path)
                print(f"{key:45} {results[key]['score']:8.4f} {weights:8,} weights {took:6.1f} s", flush=True)


def grid(results: dict[str, dict], tasks: list[str], text: Callable[[str, list[dict]], str]) -> list[str]:
    """Return the lines of a table with a row for each cell and a column for each task."""
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for name in CELLS:
        runs = [[run for key, run in results.items() if key.startswith(f"{task}/{name}/")] for task in tasks]
        row = [text(task, each) if each else "" for task, each in zip(tasks, runs, strict=True)]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def score_of(task: str, runs: list[dict]) -> str:
    """Return the mean, the standard deviation if there are several runs, and the number of runs unless it is five."""
    percent = task.startswith("speaker")
    scores, digits = np.array([run["score"] for run in runs]) * (100 if percent else 1), SHOWN.get(task, 3)
    spread = f" ± {scores.std(ddof=1):.{digits}f}" if len(scores) > 1 else ""
    return f"{scores.mean():.{digits}f}{spread}" + (f" ({len(scores)})" if len(scores) != 5 else "")


def table(path: Path) -> str:
    """Return the tables of the scores, and of the weights, steps and seconds of the trainings."""
    results = json.loads(path.read_text())
    first, series = ([task for task in TASKS if task.startswith("series") == which] for which in (False, True))
    lines = [*grid(results, first, score_of), "", *grid(results, series, score_of)]

    def size(task: str, runs: list[dict]) -> str:
        return f"{runs[0]['weights']:,}, {np.median([run['seconds'] for run in runs]):.0f} s"

    steps = {task: {run["steps"] for key, run in results.items() if key.startswith(f"{task}/")} for task in first}
    shown = [f"{task}: {', '.join(map(str, sorted(counts)))} steps" for task, counts in steps.items()]
    return "\n".join(
        [*lines, "", "Weights, and processor time of a training; " + "; ".join(shown), "", *grid(results, first, size)]
    )


FLASHRNN = {"LSTM": "lstm", "sLSTM, 1 head": "slstm", "sLSTM, 4 heads": "slstm"}


def flashrnn_of(function: str, layer: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return FlashRNN with a layer's weights, as a function of x `[B, T, I]` and the states `[S, B, 1, heads, D]`.

    It returns h `[B, T, H]` and the states after the last step. Its gates are i f z o, as ours, and its recurrent
    weights `[4, heads, D, P]`, for the gates of D units from the h of P units.
    """
    from flashrnn import flashrnn

    kernel, recurrent, bias = (getattr(layer.cell, name) for name in ("kernel", "recurrent_kernel", "bias"))
    blocks = recurrent.view(-1, *recurrent.shape[-2:])  # [heads, P, 4·D]
    heads, size, _ = blocks.shape
    gates = blocks.view(heads, size, 4, size).permute(2, 0, 3, 1).contiguous()

    def run(x: torch.Tensor, states: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        sums = (x @ kernel).view(*x.shape[:2], 4, heads, size)
        biases, form = bias.view(4, heads, size), {"backend": "vanilla", "dtype": "float32"}
        h, after = flashrnn(sums, gates, biases, states, function, **form)
        return h[0].reshape(*x.shape[:2], -1), after

    return run


def cost() -> None:
    """Print the time of a step of a stream, and of a training step, relative to the LSTM."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, one = torch.randn(ROWS, STEPS, WIDTH), np.random.default_rng(0).normal(size=(1, WIDTH)).astype("f4")
    steps, trainings, weights = {}, {}, {}
    for name, (cell, heads) in CELLS.items():
        (layer,) = recurrent_layers(Architecture((WIDTH,), cell, heads), WIDTH)
        stream = load(layer).stream(batch=1)
        weights[name] = sum(parameter.numel() for parameter in layer.parameters())

        def step(stream=stream):
            for _ in range(1000):
                stream.step(one)

        def training(layer=layer):
            torch.autograd.grad(layer(x).sum(), list(layer.parameters()))

        steps[name], trainings[name] = step, training
        if name in FLASHRNN and importlib.util.find_spec("flashrnn"):
            peer = f"{name}, FlashRNN"
            run = flashrnn_of(FLASHRNN[name], layer)
            torch.testing.assert_close(run(x)[0], layer(x), rtol=1e-4, atol=1e-5)
            weights[peer] = weights[name]

            def peer_step(run=run):
                with torch.no_grad():
                    states = None
                    for _ in range(1000):
                        states = run(torch.from_numpy(one)[:, None], states)[1]

            def peer_training(run=run, layer=layer):
                torch.autograd.grad(run(x)[0].sum(), list(layer.parameters()))

            steps[peer], trainings[peer] = peer_step, peer_training
    found = [alternate(runs, ROUNDS, time.thread_time) for runs in (steps, trainings)]
    print(f"{WIDTH} inputs and units, one thread, {native.isa()}, torch {torch.__version__}\n")
    print(f"| | weights | a step of a stream, µs | | forward and backward, {ROWS} x {STEPS} steps, ms | |")
    print("|---|---|---|---|---|---|")
    for name in steps:
        step, training = (times[name][0] for times in found)
        first = [times["LSTM"][0] for times in found]
        print(
            f"| {name} | {weights[name]:,} | {step:.2f} | {step / first[0]:.2f} | {training:.2f} | "
            f"{training / first[1]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", choices=TASKS, action="append", help="what to train on; can be repeated")
    parser.add_argument("--seeds", type=int, default=5, help="number of trainings of each cell (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; results are meaningless")
    parser.add_argument("--table", action="store_true", help="print the tables of existing results without training")
    parser.add_argument("--cost", action="store_true", help="measure times only")
    args = parser.parse_args()
    if args.cost:
        cost()
        return
    if args.out is None:
        parser.error("expected --out FOLDER or --cost")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("quick.json" if args.quick else "successors.json")
    if not args.table:
        run(path, args.only or list(TASKS), 1 if args.quick else args.seeds, args.quick)
    print(table(path))


if __name__ == "__main__":
    main()
