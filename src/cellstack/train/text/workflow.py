"""Train a text model and measure its bits per character, for `train.fit_text` and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cellstack.train.fitting import Result, as_network, fitted
from cellstack.train.loop import Epoch
from cellstack.train.options import Architecture, FitOptions
from cellstack.train.sizes import check_memory
from cellstack.train.text.data import (
    Text,
    TextParts,
    beginning,
    bits_per_character,
    one_line,
)
from cellstack.train.text.model import Chunks, TextModel
from cellstack.train.text.sampling import generate

SAMPLE = 80  # characters of the sample that follows each epoch
SAMPLE_TEMPERATURE = 0.8


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Return a function from parameters to torch's fused Adam, which makes only one pass over the weights."""
    return partial(torch.optim.Adam, lr=lr, fused=True)


def train_text(
    text: Text,
    parts: TextParts,
    architecture: Architecture,
    options: FitOptions,
    test: Text | None = None,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Train on a part of a text, and measure the scores on the following parts.

    Args:
        text: the text.
        parts: its training, validation and test parts.
        architecture: how the model is built.
        options: how it is fitted; `batch` is the maximum number of streams.
        test: a test text with the same alphabet, instead of the test part.
        say: called with a line after every epoch: bits per character, and a sample.

    Returns:
        The network and its scores: `bits_per_character` of the test part and `validation_bits_per_character`, of the
        parts that exist. The history has a `sample` for every epoch.

    Raises:
        UsageError: see `learn`.
    """
    size, alphabet = text.alphabet.size, text.alphabet
    metadata = {**alphabet.metadata(), "data": os.path.basename(text.name)}
    check_memory(architecture, architecture.embedding or size, size)
    # For a text without line ends and spaces, such as DNA or Chinese, the prompt is its first character.
    prompt = beginning(alphabet) or alphabet.decoder()(int(text.ids[0]), True)

    def sample(epoch: Epoch) -> None:
        seed = options.seed + int(epoch.entry["epoch"])
        net = as_network(epoch.model, metadata)
        written = generate(net, prompt, length=SAMPLE, temperature=SAMPLE_TEMPERATURE, seed=seed)
        epoch.entry["sample"] = "".join(written)
        if say is not None:
            say(_line(epoch.entry))

    data = Chunks(text, parts, options.batch, options.steps)
    optimizer, callbacks = options.optimizer or adam(options.lr), (sample, *options.callbacks)
    options = replace(options, optimizer=optimizer, callbacks=callbacks)
    model, fit, rank = fitted(lambda: TextModel(size, architecture), data, options)
    net = as_network(model, metadata)
    measured = {
        "validation_bits_per_character": (text, parts.validation),
        "bits_per_character": (text, parts.test) if test is None else (test, (0, len(test.ids))),
    }
    scores = {
        name: bits_per_character(net, whole.ids, part, fit.threads)
        for name, (whole, part) in measured.items()
        if part[1] > part[0]
    }
    validated = parts.validation[1] - parts.validation[0]
    return Result(net, model, fit, scores, rank, validated, understood=[text.summary(parts)])


def _line(entry: dict[str, Any]) -> str:
    """Return the line about an epoch."""
    figures = f"{entry['bits_per_character']:.3f} bits per character" if "bits_per_character" in entry else ""
    return f"epoch {entry['epoch']}  {figures}  {one_line(entry['sample'])}"
