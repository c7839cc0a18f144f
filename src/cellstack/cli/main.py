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

MOST_THREADS = 1024  # OpenMP ends the process if it can't start as many as requested

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
    """`--version`: looked up only when asked for, because that takes longer than the start of any verb."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        print(f"cellstack {cellstack.__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and suggest the option or choice closest to a misspelt one."""

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Parse, and refuse unknown arguments here, where the verb's own options are known for suggestions."""
        found, left = super().parse_known_args(*given, **named)
        if left:
            options = [word for word in left if word.startswith("-")]  # words after an unknown option are its values
            known = self._option_string_actions
            said = [f"unrecognized argument {word}{near(word.split('=')[0], known)}" for word in options or left]
            self.error("; ".join(said))
        return found, left

    def error(self, message: str) -> Any:
        """Print the error and exit with status 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += near(choice[1], re.findall(r"[^', ]+", choice[2]))
        self.exit(2, f"{self.prog}: error: {message}\n")


def near(word: str, known: Iterable[str]) -> str:
    """Return a suggestion of the closest known word, "" if none is close."""
    found = get_close_matches(word, list(known), 1)
    return f", did you mean {found[0]}?" if found else ""


def parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs."""
    top = Parser(
        prog="cellstack",
        description="Train, run and inspect recurrent networks.",
        epilog="example:\n  cellstack run vowels.safetensors Vowels_TEST.ts > predictions.csv\n\n"
        "cellstack VERB --help describes a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        answer = "write outputs as JSON lines" if name == "stream" else "write one JSON object to standard output"
        made.add_argument("--json", action="store_true", help=answer)
        if name not in ("stream", "generate", "convert", "bench"):
            usual = {"train": "the faster of one and all", "demo": "1"}.get(name, "all")
            made.add_argument("--threads", type=int, metavar="N", help=f"processor threads ({usual})")
        return made

    demo = verb("demo", "train, run and inspect two networks on recorded speech, in under a minute")
    demo.add_argument("-o", "--output", default="cellstack-demo", metavar="DIR", help="output folder (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (%(default)s)")
    demo.add_argument("--epochs", type=int, metavar="N", help="passes over the data for both models (60)")

    add_arguments(verb("train", "train on sequences, a time series or a text, and write the network"))
    runs = verb(
        "run", "classify sequences, predict numbers, forecast a series, or run any network on a file of numbers"
    )
    runs.add_argument("model", metavar="MODEL", help="a network in any supported format")
    runs.add_argument(
        "file",
        metavar="FILE",
        help="for a network trained by cellstack: data of the kind it was trained on; for any other: numbers as .npy, "
        ".npz, .csv or .jsonl; - reads standard input",
    )
    runs.add_argument("--columns", type=names, metavar="A,B", help="columns to use, by name or by number from 1 (all)")
    runs.add_argument("--time", metavar="COLUMN", help="table column that orders a sequence's rows (as trained)")
    runs.add_argument("--label", metavar="COLUMN", help="table column of the true values (as trained, if present)")
    runs.add_argument("--origin", metavar="DATE", help="forecast the steps after this row (the last one)")
    runs.add_argument("--picture", metavar="FILE", help="plot the forecast: to .png, .svg or .pdf")
    runs.add_argument("--weights", choices=HELD, help="dtype to round the cells' matrices to (unchanged)")
    add_load_options(runs)
    add_table_options(runs)
    steps = verb("stream", "read a step per line from standard input; write each output immediately to standard output")
    steps.add_argument("model", metavar="MODEL", help="a network in any supported format")
    steps.add_argument(
        "--format", choices=FORMS, help="of the input: numbers separated by commas, or JSON arrays (detected)"
    )
    steps.add_argument(
        "--state",
        metavar="FILE",
        help="start from the state in FILE, if it exists, and save the state to it at the end, also after Ctrl-C or "
        "SIGTERM",
    )
    text = "dtype of the cells' matrices: fewer bits are faster, and round the weights (unchanged)"
    steps.add_argument("--weights", choices=WEIGHTS, help=text)
    add_load_options(steps)
    add_generate_arguments(verb("generate", "write text with a text model, one character or byte at a time"))
    other = verb("convert", "write a network in another format, and compare the outputs of both files")
    other.add_argument("source", metavar="SOURCE", help="a network in any supported format")
    other.add_argument(
        "target", metavar="TARGET", help="file to write: its suffix selects the format; .c or a folder writes C99"
    )
    other.add_argument(
        "--sample",
        metavar="FILE",
        help="input for the comparison: .npy [B, T, I], .npz with an array per input, .csv or .jsonl (random numbers)",
    )
    other.add_argument(
        "--tolerance", type=float, metavar="X", help="largest relative difference that passes (1e-4; 2e-2 for bfloat16)"
    )
    text = "dtype of the cells' matrices: bfloat16 rounds them and makes the file about half as large (unchanged)"
    other.add_argument("--weights", choices=HELD, help=text)
    add_load_options(other)
    inside = verb(
        "inspect", "run a network over a file, and write a page on which to explore its gates, states and layers"
    )
    inside.add_argument("model", metavar="MODEL", help="a network in any supported format")
    inside.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="input of the run: numbers as .npy, .npz or .csv, data of the kind that the model was trained on, .txt "
        "or .wav; if omitted, random numbers",
    )
    inside.add_argument("-o", "--output", metavar="PAGE", help="file to write (the model's name with .html)")
    inside.add_argument("--open", action="store_true", help="open the page in the browser")
    inside.add_argument("--rows", type=int, default=8, metavar="N", help="most rows of FILE to use (%(default)s)")
    add_load_options(inside)
    looks = verb("info", "describe a network: layers, shapes, sizes, and which implementation runs each layer")
    looks.add_argument("model", metavar="MODEL", help="a network in any supported format")
    add_load_options(looks)
    add_bench_arguments(verb("bench", "measure speed on this machine, compared with other installed libraries"))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `cellstack`; None = those of this process.

    Returns:
        0; 1 if `convert` or `bench` found a difference, or a forecast has too few rows; 2 for bad input, with one
        line on standard error; 130 after Ctrl-C, 143 if SIGTERM stopped `stream`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in a file may have characters that the terminal can't show
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
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        said = error.strerror or str(error)
        return _fail(args.verb, f"{error.filename}: {said}" if error.filename else said)
    except MemoryError as error:
        return _fail(args.verb, f"not enough memory: {error}")
    except TooFewRowsError as error:
        return _fail(args.verb, str(error), 1)
    except (FormatError, ShapeError, UsageError) as error:  # any other error is a bug, and keeps its traceback
        return _fail(args.verb, str(error))


def _fail(verb: str, reason: str, status: int = 2) -> int:
    print(f"cellstack {verb}: error: {' '.join(reason.split())}", file=sys.stderr)
    return status


def _demo(args: argparse.Namespace) -> int:
    needs_torch(args, threads=1)  # steps this small aren't faster on a second thread
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
