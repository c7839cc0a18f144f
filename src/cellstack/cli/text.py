"""`cellstack train book.txt` and `cellstack generate`: a model of text trained, and what it writes."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from cellstack.cli.files import load_model, show
from cellstack.train.text.sampling import generate as characters_of

SUFFIXES = (".txt", ".md")


def add_generate_arguments(generate: argparse.ArgumentParser) -> None:
    """Add the options of `generate` to its parser."""
    generate.add_argument("model", metavar="MODEL", help="a network of text, as cellstack train BOOK.txt makes one")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="what it goes on from (default: a line's begin)")
    generate.add_argument(
        "--length", type=int, default=1000, metavar="N", help="characters to write, bytes of a model of bytes (1000)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 bolder, below 1 safer; 0: the likeliest (1)",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the likeliest K characters alone")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="from the fewest that have this probability together"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="fixes the draws (default: others each time)")
    generate.add_argument("--stop", metavar="TEXT", help="end once this has been written")


def generate(args: argparse.Namespace) -> int:
    """Write what a network of text goes on with, each character as it comes."""
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
