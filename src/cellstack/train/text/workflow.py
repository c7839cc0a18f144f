"""Train a text model and measure its bits per character, for `train.fit_text` and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cellstack.train.fitting import Result, as_network, fitted
from cellstack.train.loop import Epoch
from cellstack.train.progress import above, is_shown
from cellstack.train.settings import Architecture as Recurrent
from cellstack.train.settings import FitOptions, record_of, widths_of
from cellstack.train.sizes import check_memory
from cellstack.train.text.data import (
    Architecture,
    Parts,
    Text,
    beginning,
    bits_per_character,
    content,
    one_line,
    usual_batch,
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
    parts: Parts,
    architecture: Architecture,
    steps: int,
    options: FitOptions,
    test: Text | None = None,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Train on a part of a text, and measure the scores on the following parts.

    Args:
        text: the text.
        parts: its training, validation and test parts.
        architecture: how the model is built.
        steps: characters of each stream in a training step, over which gradients are backpropagated.
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
    built = Recurrent(architecture.units, cell=architecture.cell, heads=architecture.heads)
    check_memory(built, architecture.embedding or size, size)
    # For a text without line ends and spaces, such as DNA or Chinese, the prompt is its first character.
    prompt = beginning(alphabet) or alphabet.decoder()(int(text.ids[0]), True)

    def sample(epoch: Epoch) -> None:
        seed = options.seed + int(epoch.entry["epoch"])
        net = as_network(epoch.model, metadata)
        written = generate(net, prompt, length=SAMPLE, temperature=SAMPLE_TEMPERATURE, seed=seed)
        epoch.entry["sample"] = "".join(written)
        if say is not None:
            say(_line(epoch.entry))

    data = Chunks(text, parts, options.batch, steps)
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


def fit_text(
    text: str | bytes | Path,
    *,
    validation: float = 0.05,
    test: float = 0.05,
    units: int | Sequence[int] = (256, 256),
    cell: str = "lstm",
    heads: int | None = None,
    embedding: int = 64,
    dropout: float = 0.3,
    steps: int = 128,
    batch: int | None = None,
    epochs: int = 30,
    lr: float = 5e-3,
    clip: float = 1.0,
    patience: int = 5,
    seed: int = 0,
    optimizer: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | str = "cosine",
    callbacks: Sequence[Callable[[Any], Any]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    threads: int | None = None,
    device: str = "auto",
    inspect: bool = False,
) -> Result:
    """Train a network to predict the next character of a text, by truncated backpropagation over stateful batches.

    The training part is divided into `batch` parallel streams, which are read `steps` characters at a time. The state
    is carried from one training step to the next, while gradients are truncated at its start. Each epoch starts with
    zero states.

    Args:
        text: a text, whose characters become the model's; bytes, for a model of all 256 bytes; or the `Path` of a UTF-8
            file.
        validation, test: shares of the text, at its end, to validate and test on. The best epoch on the validation part
            is kept; without one, the last.
        units: units of each layer, first layer first.
        cell, heads, embedding, dropout: see `Architecture`.
        steps: characters over which gradients are backpropagated.
        batch: maximum number of streams, fewer if each would be shorter than `steps`; None = 8 to 32, depending on the
            length of the text, see `usual_batch`.
        epochs, lr, clip, patience, seed: see `Settings`.
        optimizer, scheduler, callbacks: see `FitOptions`.
        checkpoint, resume, overwrite, threads, inspect: see `learn`.
        log: where to write each epoch's metrics as it ends: a .csv or .json file, or a folder for TensorBoard.
        progress: show a bar, and above it a line with a sample for each epoch, on standard error; None = if that is a
            terminal, and in notebooks.
        device: see `processes`.

    Returns:
        The `Result`: `.network` maps ids `[B, T]` (one-hot `[B, T, V]` without an embedding) to the next character's
        probabilities `[B, T, V]`; it supports streaming and `generate`. `.scores` has `bits_per_character` of the test
        part and `validation_bits_per_character`; `.history` has an entry per epoch, with a `sample`.

    Raises:
        UsageError: a text that is too short, or settings that can't be used; the message says how to fix it.
        FormatError: a file that isn't UTF-8.
        OSError: a file that can't be read or written.

    >>> from cellstack.train import generate
    >>> result = fit_text("a rose is " * 200, units=16, epochs=8, batch=4, steps=32, threads=1)
    >>> "".join(generate(result.network, "a ro", length=26, temperature=0))
    'se is a rose is a rose is '
    """
    given = locals()
    whole = Text.of(content(str(text)), str(text)) if isinstance(text, Path) else Text.of(text)
    parts = whole.parts(validation, test)
    batch = usual_batch(parts.training[1], steps) if batch is None else batch
    architecture = record_of(Architecture, given, units=widths_of(units))
    options = record_of(FitOptions, given, batch=batch)
    return train_text(whole, parts, architecture, steps, options, say=above if is_shown(progress) else None)
