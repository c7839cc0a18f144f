"""`cellstack train` on a text, to predict the next character, and `cellstack generate`, which writes text."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstack import Network
from cellstack.cli.files import load_model, show
from cellstack.cli.jobs import Job
from cellstack.train.checks import UsageError
from cellstack.train.options import Architecture, FitOptions
from cellstack.train.sizes import size_of
from cellstack.train.text.data import Streams, Text, TextParts, alphabet_of, bits_per_character, content, usual_batch
from cellstack.train.text.sampling import generate as characters_of

SUFFIXES = (".txt", ".md")


@dataclass
class TextJob(Job):
    """A text to train on."""

    text: Text
    parts: TextParts
    test: Text | None
    understood: list[str]
    described: dict[str, Any]
    given: dict[str, Any]

    def plan(self, architecture: Architecture, options: FitOptions) -> tuple[list[str], dict[str, Any]]:
        """Describe the training to come."""
        size = self.text.alphabet.size
        wide = architecture.embedding or size
        layers = size_of(architecture, wide)
        weights = architecture.embedding * size + layers.weights + (layers.width + 1) * size
        streams = Streams(self.text.ids, self.parts.training, options.batch, options.steps)
        spans = {name: (begin + 1, end) for name, (begin, end) in self.parts._asdict().items() if end > begin}
        verbs = {"training": "train", "validation": "validate", "test": "test"}
        parts = [f"{begin:,} to {end:,} to {verbs[name]} on" for name, (begin, end) in spans.items()]
        lines = [
            f"{self.text.alphabet.unit} {', '.join(parts)}",
            f"1 network: {layers.layers}, {weights:,} weights; at most {options.epochs} "
            f"epoch{'s' * (options.epochs != 1)} of {len(streams)} steps, batches of {streams.rows} streams, "
            f"{streams.steps} {self.text.alphabet.unit} each",
        ]
        return lines, spans | {
            "baselines": [],
            "networks": 1,
            "layers": layers.layers,
            "weights": weights,
            "epochs": options.epochs,
            "steps": len(streams),
            "batch": streams.rows,
        }

    @property
    def validates(self) -> bool:
        """See `Job`."""
        return self.parts.validation[1] > self.parts.validation[0]

    def fit(self, architecture: Architecture, options: FitOptions) -> Any:
        """Train on the text."""
        from cellstack.train.progress import above
        from cellstack.train.text.workflow import train_text

        say = None if options.progress is False else above
        return train_text(self.text, self.parts, architecture, options, self.test, say)

    def scores(self, result: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the bits per character of the held-out parts."""
        names = {"validation_bits_per_character": "validation", "bits_per_character": "test"}
        found = [f"{what} {result.scores[name]:.4f}" for name, what in names.items() if name in result.scores]
        return result.scores, [f"bits per character: {', '.join(found)}"] if found else []


def read(args: argparse.Namespace, given: dict[str, Any]) -> TextJob:
    """Read a text, and the test text if one is given.

    Raises:
        UsageError: a text is too short, or the test text has characters that the first one lacks.
        FormatError: a text isn't UTF-8.
    """
    text = Text.of(content(args.file, given["bytes"]), args.file)
    parts = text.parts(given["validation"], given["test"] if args.test_file is None else 0.0)
    lines, test = [f"{args.file}: {text.summary(parts)}"], None
    if args.test_file is not None:
        test = Text.of(content(args.test_file, given["bytes"]), args.test_file, text.alphabet)
        lines.append(f"{args.test_file}: {len(test.ids):,} {test.alphabet.unit} to test on")
    if given["batch"] is None:
        given["batch"] = usual_batch(parts.training[1], given["steps"])
    streams = Streams(text.ids, parts.training, given["batch"], given["steps"])
    described = {
        "file": args.file,
        "unit": text.alphabet.unit,
        "length": len(text.ids),
        "different": int(np.count_nonzero(text.counts)),
        **{name: end - begin for name, (begin, end) in parts._asdict().items()},
        "streams": streams.rows,
        "steps_an_epoch": len(streams),
    }
    return TextJob(text, parts, test, lines, described, given)


def measure(args: argparse.Namespace, net: Network, path: str) -> int:
    """Report the bits per character of a text model on a file."""
    alphabet = alphabet_of(net, path)
    ids = alphabet.encode(content(args.file, alphabet.characters is None), args.file)
    if len(ids) < 2:
        raise UsageError(f"{args.file}: expected at least two {alphabet.unit}, found {len(ids)}")
    bits = bits_per_character(net, ids, threads=args.threads)
    report = {"characters": len(ids), "bits_per_character": bits}
    show(args, report, [f"{len(ids):,} {alphabet.unit}, {bits:.4f} bits per {alphabet.unit[:-1]}"])
    return 0


def add_generate_arguments(generate: argparse.ArgumentParser) -> None:
    """Add the options of `generate` to its parser."""
    generate.add_argument(
        "model", metavar="MODEL", help="a text model, such as one trained by cellstack train BOOK.txt"
    )
    generate.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue (default: the start of a line)"
    )
    generate.add_argument(
        "--length",
        type=int,
        default=1000,
        metavar="N",
        help="characters to write, or bytes if the model has bytes (default: %(default)s)",
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: more varied; below 1: more predictable; 0: always the most likely (default: %(default)s)",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="sample only from the K most likely characters")
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample only from the smallest set of characters with this total probability",
    )
    generate.add_argument("--seed", type=int, metavar="N", help="random seed (default: a new one each time)")
    generate.add_argument("--stop", metavar="TEXT", help="stop after writing this text")


def generate(args: argparse.Namespace) -> int:
    """Continue a text with a text model, and write each character immediately."""
    net, path = load_model(args.model)
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if args.seed is None else args.seed
    started = time.perf_counter()
    characters = characters_of(
        net,
        args.prompt,
        length=args.length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
        stop=args.stop,
        name=path,
    )
    if args.json:
        text = "".join(characters)
        took = time.perf_counter() - started
        figures = {"characters": len(text), "seconds": took}
        show(args, {"model": path, "prompt": args.prompt, "text": text, "seed": seed, **figures}, [])
        return 0
    sys.stdout.write(args.prompt)
    for character in characters:
        sys.stdout.write(character)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0
