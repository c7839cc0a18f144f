"""The command line. Only `train` and `demo` import torch, and only once their arguments are read."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import cellstack
from cellstack.cli.bench import add_bench_arguments, bench
from cellstack.cli.files import add_load_options, convert, info, needs_torch, show
from cellstack.cli.inspect import inspect
from cellstack.cli.run import run
from cellstack.cli.stream import stream
from cellstack.cli.tables import add_table_options, names
from cellstack.cli.text import add_generate_arguments, generate
from cellstack.cli.train import add_arguments, train
from cellstack.formats.lines import FORMS
from cellstack.nodes.recurrent import HELD, WEIGHTS
from cellstack.spec import FormatError, ShapeError
from cellstack.train.checks import TooFewRowsError, UsageError

MOST_THREADS = 1024  # OpenMP starts as many as it is told to, and ends the process where it can't

EXAMPLES = {
    "demo": "cellstack demo -o cellstack-demo",
    "train": "cellstack train co2.csv --target co2 --horizon 52 -o co2.safetensors\n"
    "  cellstack train book.txt -o book\n"
    "  cellstack train Vowels_TRAIN.ts Vowels_TEST.ts --units 48,48 --bidirectional --noise 0.6 -o vowels.safetensors\n"
    "  torchrun --nproc-per-node 2 -m cellstack train Vowels_TRAIN.ts -o vowels.safetensors\n"
    "  cellstack train Vowels_TRAIN.ts --inspect -o vowels.safetensors\n"
    "  cellstack train machines.parquet --id machine --time hour --label state --dry-run",
    "run": "cellstack run vowels.safetensors Vowels_TEST.ts > predictions.csv\n"
    "  cellstack run model.keras frames.npy > answers.csv\n"
    "  cut -d, -f2- log.csv | cellstack run model.onnx - --columns speed,3\n"
    "  cellstack run weights.pt frames.csv --order rnn,last,head",
    "stream": "cellstack stream model --state model.state < frames.csv > answers.csv\n"
    "  cellstack stream silero_vad.onnx --constants sr=16000 --frames input=512 --context input=64 < frames.csv",
    "generate": "cellstack generate book --prompt 'Alice was' --temperature 0.8 --length 500\n"
    "  cellstack generate book --seed 1 --stop '.'",
    "convert": "cellstack convert model.onnx model.safetensors\n"
    "  cellstack convert model.safetensors firmware/model.c\n"
    "  cellstack convert model.keras small.safetensors --weights bfloat16\n"
    "  cellstack convert model.safetensors model.onnx --sample frames.csv",
    "info": "cellstack info vowels.safetensors",
    "inspect": "cellstack inspect vowels.safetensors Vowels_TEST.ts --open\n"
    "  cellstack inspect model.keras frames.npy -o frames.html\n"
    "  cellstack inspect model.safetensors",
    "bench": "cellstack bench -o figures\n"
    "  cellstack bench --what inference --units 32,256 --batch 1,64 --threads 2\n"
    "  cellstack bench --quick --json > bench.json",
}


class Version(argparse.Action):
    """`--version`: looked up when it is asked for, which takes longer than the other verbs' start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it and leave."""
        print(f"cellstack {cellstack.__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the option or choice that a misspelt one is near to."""

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Return as argparse does, with nothing left over: each verb refuses that itself, as it knows its options."""
        found, left = super().parse_known_args(*given, **named)
        if left:
            options = [word for word in left if word.startswith("-")]  # what follows one belongs to it
            known = self._option_string_actions
            said = [f"unrecognized argument {word}{near(word.split('=')[0], known)}" for word in options or left]
            self.error("; ".join(said))
        return found, left

    def error(self, message: str) -> Any:
        """Leave with status 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += near(choice[1], re.findall(r"[^', ]+", choice[2]))
        self.exit(2, f"{self.prog}: error: {message}\n")


def near(word: str, known: Iterable[str]) -> str:
    """Return a question after what is likely to be meant, "" where nothing is near."""
    found = get_close_matches(word, list(known), 1)
    return f", did you mean {found[0]}?" if found else ""


def parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    top = Parser(prog="cellstack", description="Train, run and look into recurrent networks.")
    top.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        answer = "answers as JSON lines" if name == "stream" else "answer with one JSON object on standard output"
        made.add_argument("--json", action="store_true", help=answer)
        if name not in ("stream", "generate", "convert", "bench"):
            made.add_argument(
                "--threads",
                type=int,
                metavar="N",
                help="processor threads (default: all; a training measures how many pay)",
            )
        return made

    demo = verb("demo", "the whole story on real speech, in under a minute")
    demo.add_argument("-o", "--output", default="cellstack-demo", metavar="DIR", help="where to (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="fixes every draw (default: %(default)s)")
    demo.add_argument("--epochs", type=int, help="passes over the data for both models (default: as tuned)")

    add_arguments(verb("train", "train on sequences, a time series or a text, and write the network"))
    runs = verb("run", "predict: a class or number for each sequence, what comes next in a series; or run any network")
    runs.add_argument("model", metavar="MODEL")
    runs.add_argument(
        "file",
        metavar="FILE",
        help="of the kind that the model was trained on; for others .npy, .npz, .csv or .jsonl of numbers; - for lines "
        "on standard input",
    )
    runs.add_argument("--columns", type=names, metavar="A,B", help="of the lines: by name, or by number from 1 (all)")
    runs.add_argument("--time", metavar="COLUMN", help="of a table: puts the rows of a sequence in order (as trained)")
    runs.add_argument("--label", metavar="COLUMN", help="of a table: holds the truth (as trained, where it is there)")
    runs.add_argument("--origin", metavar="DATE", help="forecast what comes after this row, not after the last one")
    runs.add_argument("--weights", choices=HELD, help="round the cells' matrices first (as they are)")
    add_load_options(runs)
    add_table_options(runs)
    steps = verb("stream", "frames on standard input, a line each; answers on standard output, each at once")
    steps.add_argument("model", metavar="MODEL")
    steps.add_argument(
        "--format", choices=FORMS, help="of the frames: numbers between commas, or JSON arrays (told by the first line)"
    )
    steps.add_argument(
        "--state",
        metavar="FILE",
        help="go on from the state in it, where it is there, and write it at the end, on Ctrl-C and SIGTERM too",
    )
    text = "what the cells' matrices are held in: fewer bits make a step faster, and round (as the model has them)"
    steps.add_argument("--weights", choices=WEIGHTS, help=text)
    add_load_options(steps)
    add_generate_arguments(verb("generate", "text from a network of characters or bytes, each as it comes"))
    other = verb("convert", "write a network in another format, and compare what was read and written")
    other.add_argument("source", metavar="A", help="a file that holds a network")
    other.add_argument("target", metavar="B", help="where to, the suffix picks the format; .c or a folder: C99")
    other.add_argument(
        "--sample", metavar="FILE", help="data to compare on: .npy [B, T, I], .npz by input, .csv (drawn at random)"
    )
    other.add_argument(
        "--tolerance", type=float, metavar="X", help="greatest relative difference that passes (1e-4, bfloat16 2e-2)"
    )
    text = "hold the cells' matrices in so many bits: bfloat16 rounds them and halves the file (as they are)"
    other.add_argument("--weights", choices=HELD, help=text)
    add_load_options(other)
    inside = verb("inspect", "write a page that looks into a run: what every gate, cell and layer did, and what if")
    inside.add_argument("model", metavar="MODEL", help="of any format that can be read")
    inside.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="what it is run over: .npy, .npz or .csv of numbers, a file or table of what the model was trained on, "
        ".txt of characters, .wav; without it, a few numbers drawn at random",
    )
    inside.add_argument("-o", "--output", metavar="PAGE", help="where to (default: the model's name, .html)")
    inside.add_argument("--open", action="store_true", help="show it in the browser")
    inside.add_argument("--rows", type=int, default=8, metavar="N", help="rows of FILE, at most (%(default)s)")
    add_load_options(inside)
    looks = verb("info", "layers, shapes, sizes, and what runs them; the recurrent parts of what can't be run whole")
    looks.add_argument("model", metavar="MODEL", help="of any format that can be read")
    add_load_options(looks)
    add_bench_arguments(
        verb("bench", "how fast it is here, beside the peers that are installed and the machine's limits")
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `cellstack`; those of this process where None.

    Returns:
        0; 1 where `convert` or `bench` found a difference, or rows are too few for a forecast; 2 for bad input, with
        one line on standard error; 130 where Ctrl-C ended it, 143 where SIGTERM ended `stream`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in a file may have letters that a terminal can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    try:
        threads = getattr(args, "threads", None)
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"expected --threads from 1 to {MOST_THREADS}, got {threads}")
        return VERBS[args.verb](args)
    except KeyboardInterrupt:
        print("cellstack: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        said = error.strerror or str(error)
        return _fail(args.verb, f"{error.filename}: {said}" if error.filename else said)
    except MemoryError as error:
        return _fail(args.verb, f"not enough memory: {error}")
    except TooFewRowsError as error:
        return _fail(args.verb, str(error), 1)
    except (FormatError, ShapeError, UsageError) as error:  # any other is a bug of ours, and shows where it is
        return _fail(args.verb, str(error))


def _fail(verb: str, reason: str, status: int = 2) -> int:
    print(f"cellstack {verb}: error: {' '.join(reason.split())}", file=sys.stderr)
    return status


def _demo(args: argparse.Namespace) -> int:
    needs_torch(args, threads=1)  # steps this small don't gain from a second thread
    try:
        from cellstack.train import demo
    except ModuleNotFoundError as error:
        raise UsageError(f"demo needs {error.name}: install cellstack[torch]") from None
    if not args.output:
        raise UsageError("expected --output to name a folder, got ''")
    say = (lambda line="": print(line, file=sys.stderr)) if args.json else print
    report = demo.run(Path(args.output), args.seed, args.epochs, say)
    show(args, report, [])
    return 0


VERBS = {
    "demo": _demo,
    "train": train,
    "run": run,
    "stream": stream,
    "generate": generate,
    "convert": convert,
    "info": info,
    "inspect": inspect,
    "bench": bench,
}
