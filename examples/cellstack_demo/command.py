"""`cellstack demo`: its options, and the call of the demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cellstack.cli.files import needs_torch, show
from cellstack.train.checks import UsageError


def add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    """Add the options of `demo` to its parser."""
    text = "output folder (default: %(default)s)"
    demo.add_argument("-o", "--output", default="cellstack-demo", metavar="DIR", help=text)
    demo.add_argument("--epochs", type=int, metavar="N", help="passes over the data for both models (default: 60)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")


def demo(args: argparse.Namespace) -> int:
    """Run the demo; `cellstack_demo.demo` imports torch."""
    needs_torch(args, threads=1)  # steps this small aren't faster on a second thread
    try:
        from cellstack_demo.demo import run
    except ModuleNotFoundError as error:
        raise UsageError(f"demo needs {error.name}: pip install 'cellstack[torch]'") from None
    if not args.output:
        raise UsageError("expected --output to name a folder, got ''")
    say = (lambda line="": print(line, file=sys.stderr)) if args.json else print
    show(args, run(Path(args.output), args.seed, args.epochs, say), [])
    return 0
