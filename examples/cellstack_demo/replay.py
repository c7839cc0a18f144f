"""Replay one utterance frame by frame, in a process without torch: `python -m cellstack_demo.replay`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from cellstack import Network, load
from cellstack.train import predict
from cellstack.train.data.ts import read_ts


def replay(path: str, file: str, index: int) -> dict[str, Any]:
    """Load a network with an output at every step, and step it through one sequence of a `.ts` file.

    Args:
        path: the network's file; its last node pools the outputs.
        file: the sequences.
        index: index of the sequence.

    Returns:
        `truth`; `labels`; `frame` and `so_far` `[T, O]`, the probabilities at each frame, and their mean up to it;
        `microseconds` `[T]`, the duration of each step; `whole` `[O]`, the output of one pass over the sequence;
        `torch`, whether this process has imported torch.
    """
    net = load(path)
    task = predict.trained(net, path)
    data = read_ts(file, task.labels)
    frames, mask = task.inputs(data.x[index][None])
    if mask is not None:
        raise ValueError(f"{file}: sequence {index} has frames without values")
    stepper = Network(net.nodes[:-1], net.names[:-1])  # the pooling is done here, frame by frame
    stepper.stream().run(frames)  # packs the weights and warms the caches
    stream = stepper.stream()
    answers, took = [], []
    for t in range(frames.shape[1]):
        start = time.perf_counter_ns()
        answers.append(stream.step(frames[:, t])[0])
        took.append((time.perf_counter_ns() - start) / 1000)
    each = np.array(answers)
    so_far = each.cumsum(axis=0) / np.arange(1, len(each) + 1)[:, None]
    return {
        "truth": None if data.y is None else task.labels[data.y[index]],
        "labels": list(task.labels),
        "frame": each.tolist(),
        "so_far": so_far.tolist(),
        "microseconds": took,
        "whole": net(frames)[0].tolist(),
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":
    print(json.dumps(replay(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
