"""A demo on recorded speech: the tutorial's shapes, two trained stacks, a replay without torch, and a report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellstack import layers
from cellstack.inspect import html
from cellstack.train import predict, workflow
from cellstack.train.data.sequences import Sequences
from cellstack.train.data.ts import read_ts
from cellstack.train.fitting import Result
from cellstack.train.options import NOISE, OFFSET_SHARE, Architecture, FitOptions
from cellstack_demo.report import report

# Found by threefold cross-validation within the training utterances (blocks of each speaker's, in the order in which
# they were recorded); the test utterances weren't used.
OPTIONS = FitOptions(epochs=60, patience=0, validation=0.1, device="cpu")
UNITS, DROPOUT = (48, 48), 0.3
Say = Callable[..., None]


def run(folder: Path, seed: int = 0, epochs: int | None = None, say: Say = print) -> dict[str, Any]:
    """Run the demo and write two networks and `report.html` to `folder`.

    Args:
        folder: the output folder; created if it doesn't exist.
        seed: of all random numbers.
        epochs: passes over the data, for both models; None = 60.
        say: called with each line of output.

    Returns:
        The results, as plain values and arrays.

    Raises:
        OSError: the folder can't be written to.
        ChildProcessError: the replay failed.
        UsageError: a seed or a number of epochs out of range.
    """
    started = time.perf_counter()
    options = replace(OPTIONS, seed=seed, epochs=OPTIONS.epochs if epochs is None else epochs)
    folder.mkdir(parents=True, exist_ok=True)
    tutorial = walk_tutorial(say)
    with as_file(files("cellstack_demo") / "data") as data:
        training = read_ts(data / "JapaneseVowels_TRAIN.ts")
        test = read_ts(data / "JapaneseVowels_TEST.ts", training.labels)
        say(
            f"Japanese vowels: who is speaking? {len(training.labels)} speakers, {len(training.x)} utterances to train "
            f"on, {len(test.x)} to test on, {training.channels} coefficients per frame"
        )
        whole = _train("bidirectional", training, test, options, folder, say)
        causal = _train("forward", training, test, options, folder, say)
        confusion = whole.scores["confusion"]
        say("\nconfusion of the bidirectional stack, true speaker by row:")
        say("      " + " ".join(f"{label:>4}" for label in training.labels))
        for label, row in zip(training.labels, confusion, strict=True):
            say(f"{label:>6}" + " ".join(f"{count:>4}" if count else "   ." for count in row))
        answers = np.asarray(predict.sequences(causal.network, test, test.name).outputs)
        index, why = _utterance_to_replay(answers, test)
        frames = _replay(folder / "forward.safetensors", data / "JapaneseVowels_TEST.ts", index)
    _say_replay(frames, index, why, say)
    gates = _gates(causal.model, test.x[index])
    result = {
        "seed": seed,
        "tutorial": tutorial,
        "bidirectional": _scores(whole, folder / "bidirectional.safetensors"),
        "forward": _scores(causal, folder / "forward.safetensors"),
        "replay": {"utterance": index, "why": why, **frames},
        "report": str(folder / "report.html"),
    }
    t = causal.network.trace(test.x[index][None])
    inside = b"".join(html.page(t, None, None, f"Test utterance {index}: step 0 is frame 1", None)).decode()
    page = report(result, whole.fit.history, causal.fit.history, confusion, gates, inside)
    (folder / "report.html").write_text(page, encoding="utf-8")
    result["seconds"] = round(time.perf_counter() - started, 2)
    say(f"\nreport: {result['report']}   ({result['seconds']:.0f} s in all)")
    return result


def walk_tutorial(say: Say) -> dict[str, list[int]]:
    """Run the tutorial: a tiny LSTM, then a stack of two; return the shapes that it prints."""
    say("A tiny LSTM: 4 units, on one sequence of one step with six features")
    lstm = layers.LSTM(4, return_sequences=True, return_state=True)
    lstm.states = (torch.zeros(1, 4), torch.zeros(1, 4))
    y, h, c = lstm(np.array([[[3, 2, 2, 2, 2, 2]]], np.float32))
    shapes = {"lstm_output": list(y.shape), "lstm_memory": list(h.shape), "lstm_carry": list(c.shape)}
    _say_shapes(say, {"Output": y, "Memory": h, "Carry state": c})
    say("A stack of two layers with 4 and 5 units, on two sequences of three steps")
    stack = layers.RNN(
        layers.StackedRNNCells([layers.LSTMCell(4), layers.LSTMCell(5)]), return_sequences=True, return_state=True
    )
    x = [
        [[1, 2, 3, 4, 3, 2], [1, 2, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2]],
        [[1, 2, 3, 4, 3, 2], [3, 2, 2, 1, 1, 2], [0, 0, 0, 0, 3, 2]],
    ]
    y, first, second = stack(np.array(x, np.float32))
    stacked = {"stack_output": list(y.shape), "stack_state_1": list(first.shape), "stack_state_2": list(second.shape)}
    _say_shapes(say, {"Output": y, "State 1": first, "State 2": second})
    say()
    return shapes | stacked


def _say_shapes(say: Say, results: dict[str, Any]) -> None:
    for name, value in results.items():
        say(f"  {name:<12}: [{' '.join(map(str, value.shape))}]")


def _train(name: str, training: Sequences, test: Sequences, options: FitOptions, folder: Path, say: Say) -> Result:
    both = name == "bidirectional"
    say(
        f"\n{name}: a stack of {' and '.join(map(str, UNITS))} units, "
        + ("in both directions" if both else "frame by frame")
    )
    architecture = Architecture(
        UNITS,
        bidirectional=both,
        dropout=DROPOUT,
        every_step=not both,
        changes=False,
        noise=NOISE,
        offset=OFFSET_SHARE * NOISE,
    )
    outcome = workflow.train_sequences(training, test, architecture, options)
    outcome.network.save(folder / f"{name}.safetensors")
    say(f"  {outcome.fit.steps} steps in {outcome.fit.seconds:.1f} s, test accuracy {outcome.scores['accuracy']:.2%}")
    return outcome


def _utterance_to_replay(answers: np.ndarray, test: Sequences) -> tuple[int, str]:
    """Choose an utterance for the replay; return its index and the reason for the choice."""
    assert test.y is not None
    longer, right = test.lengths >= np.median(test.lengths), answers.argmax(axis=1) == test.y
    chosen, why = longer & right, "the least certain of the correctly classified utterances of at least median length"
    if not chosen.any():
        chosen, why = longer, "the least certain of the utterances of at least median length: none was correct"
    return int(np.argmin(np.where(chosen, answers.max(axis=1), 2.0))), why


def _replay(network: Path, file: Path, index: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "cellstack_demo.replay", str(network), str(file), str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ChildProcessError(f"the replay failed: {reason[-1]}")
    frames = json.loads(done.stdout)
    if frames["torch"]:
        raise ChildProcessError("the replay imported torch, but must run without it")
    return frames


def _say_replay(frames: dict[str, Any], index: int, why: str, say: Say) -> None:
    truth, labels = frames["truth"], frames["labels"]
    say(f"\nThe forward stack, in a new process without torch, processes test utterance {index} (speaker {truth}),")
    say(f"{why}:")
    say("  frame   µs  speaker so far")
    for t, (so_far, took) in enumerate(zip(frames["so_far"], frames["microseconds"], strict=True), 1):
        best = int(np.argmax(so_far))
        say(f"  {t:>5} {took:>4.0f}  {labels[best]} {so_far[best]:6.1%} {'█' * round(so_far[best] * 30)}")
    say(f"  median {np.median(frames['microseconds']):.0f} µs per frame")


def _gates(model: Any, x: np.ndarray) -> list[tuple[str, layers.Trace]]:
    """Return each layer's gates over one utterance, as NumPy `[T, H]`."""
    traces = []
    with torch.no_grad():
        y = model.standardise(torch.from_numpy(x[None]))
        for number, layer in enumerate(model.recurrent, 1):
            y, trace = layer(y, return_gates=True)
            traces.append((f"layer {number}", layers.Trace(*(part[0].numpy() for part in trace))))
    return traces


def _scores(outcome: Result, path: Path) -> dict[str, Any]:
    fit = outcome.fit
    return {
        "model": str(path),
        "accuracy": outcome.scores["accuracy"],
        "confusion": outcome.scores["confusion"],
        "epochs": len(fit.history),
        "steps": fit.steps,
        "train_seconds": round(fit.seconds, 2),
    }
