"""From a text to a trained network of it, and what it scores: `train.fit_text`, and what the command line does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cellstack.train.fitting import Result, as_network, check_memory, fitted
from cellstack.train.loop import Epoch
from cellstack.train.settings import Architecture as Recurrent
from cellstack.train.settings import Own, RunOptions, Settings
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
    """Return what makes Adam of parameters: torch's fused one, which takes one pass over the weights."""
    return partial(torch.optim.Adam, lr=lr, fused=True)


def train_text(
    text: Text,
    parts: Parts,
    architecture: Architecture,
    steps: int,
    settings: Settings,
    options: RunOptions = RunOptions(),
    own: Own = Own(),
    test: Text | None = None,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Train on a part of a text, and measure on the parts that follow it.

    Args:
        text: the text.
        parts: which of it is trained, validated and measured on.
        architecture: how the model is built.
        steps: characters of a step of each stream: how far gradients reach back.
        settings: how it is fitted; `batch` is at most so many streams through the text.
        options: how the training is run.
        own: what takes the place of the optimiser and the scheduler, and further callbacks.
        test: a text of the same alphabet to measure on, in place of the test part.
        say: is given a line after every epoch: bits per character, and a sample.

    Returns:
        The network and what was measured: `scores` has `bits_per_character` of the test part and
        `validation_bits_per_character`, of those that there are. The history has a `sample` of every epoch.

    Raises:
        UsageError: see `learn`.
    """
    size, alphabet = text.alphabet.size, text.alphabet
    metadata = {**alphabet.metadata(), "data": os.path.basename(text.name)}
    check_memory(Recurrent(architecture.units, cell=architecture.cell), architecture.embedding or size, size)
    # A text without line ends and blanks, such as DNA or Chinese, is sampled after its own first character.
    prompt = beginning(alphabet) or alphabet.decoder()(int(text.ids[0]), True)

    def sample(epoch: Epoch) -> None:
        seed = settings.seed + int(epoch.entry["epoch"])
        net = as_network(epoch.model, metadata)
        written = generate(net, prompt, length=SAMPLE, temperature=SAMPLE_TEMPERATURE, seed=seed)
        epoch.entry["sample"] = "".join(written)
        if say is not None:
            say(_line(epoch.entry))

    data = Chunks(text, parts, settings.batch, steps)
    model, fit, rank = fitted(
        lambda: TextModel(size, architecture),
        data,
        settings,
        options,
        replace(own, optimizer=own.optimizer or adam(settings.lr), callbacks=(sample, *own.callbacks)),
    )
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
    return Result(net, model, fit, scores, rank, parts.validation[1] - parts.validation[0])


def _line(entry: dict[str, Any]) -> str:
    """Return what is said after an epoch."""
    figures = f"{entry['bits_per_character']:.3f} bits per character" if "bits_per_character" in entry else ""
    return f"epoch {entry['epoch']}  {figures}  {one_line(entry['sample'])}"


def fit_text(
    text: str | bytes | Path,
    *,
    validation: float = 0.05,
    test: float = 0.05,
    units: int | Sequence[int] = (256, 256),
    cell: str = "lstm",
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
    progress: bool = False,
    threads: int | None = None,
    device: str = "auto",
    inspect: bool = False,
) -> Result:
    """Train a network to tell the next character of a text, by truncated backpropagation over stateful batches.

    The text's first part is read by `batch` streams side by side, each from its begin to its end, `steps` characters at
    a time: the state goes on from step to step, gradients reach back to the step's begin. An epoch starts from zeros.

    Args:
        text: a text, whose characters the network then knows; bytes, for one of all 256; or the `Path` of a file that
            holds UTF-8.
        validation, test: shares of the text, at its end, that are never trained on. The epoch that does best on the
            first is kept; 0: the last one is. On the second the network is measured.
        units: width of each layer, bottom first.
        cell, embedding, dropout: see `Architecture`.
        steps: how far gradients reach back.
        batch: at most so many streams, fewer in a text in which each would be shorter than `steps`; by the length of
            the text where None, 8 to 32, see `usual_batch`.
        epochs, lr, clip, patience, seed: see `Settings`.
        optimizer, scheduler, callbacks: see `Own`.
        checkpoint, resume, overwrite, threads, inspect: see `learn`.
        log: where each epoch's figures go as it ends: a file that ends in .csv or .json, or a folder for TensorBoard.
        progress: show a bar, and above it a line an epoch with a sample, on standard error.
        device: see `processes`.

    Returns:
        The `Result`: `.network` takes ids `[B, T]` (one-hot `[B, T, V]` without an embedding) and gives the next
        character's probabilities `[B, T, V]`; it streams, and `generate` writes with it. `.scores` has
        `bits_per_character` of the test part and `validation_bits_per_character`; `.history` a line an epoch, with a
        `sample`.

    Raises:
        UsageError: a text that is too short, or settings that can't be used; the message names the mend.
        FormatError: a file that isn't UTF-8.
        OSError: a file that can't be read or written.

    >>> from cellstack.train import generate
    >>> result = fit_text("a rose is " * 200, units=16, epochs=8, batch=4, steps=32, threads=1)
    >>> "".join(generate(result.network, "a ro", length=26, temperature=0))
    'se is a rose is a rose is '
    """
    whole = Text.of(content(str(text)), str(text)) if isinstance(text, Path) else Text.of(text)
    widths = (units,) if isinstance(units, int) else tuple(units)
    options = RunOptions(
        checkpoint=checkpoint,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        device=device,
        inspect=inspect,
        threads=threads,
        log=log,
    )
    parts = whole.parts(validation, test)
    batch = usual_batch(parts.training[1], steps) if batch is None else batch
    return train_text(
        whole,
        parts,
        Architecture(widths, cell, embedding, dropout),
        steps,
        Settings(epochs, batch, lr, clip, patience, seed=seed),
        options,
        Own(optimizer=optimizer, scheduler=scheduler, callbacks=tuple(callbacks)),
        say=above_the_bar if progress else None,
    )


def above_the_bar(line: str) -> None:
    """Print a line on standard error, above the bar where there is one."""
    tqdm.write(line, file=sys.stderr)
