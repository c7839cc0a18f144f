"""The command line. Only `train` and `demo` import torch, and only once their arguments are read."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cellstack
from cellstack import FormatError, ShapeError
from cellstack.cli.arguments import Parser, as_flags, names
from cellstack.cli.completion import add_completion_arguments, completion
from cellstack.cli.files import add_load_options, convert, info
from cellstack.cli.inspect import inspect
from cellstack.cli.run import run
from cellstack.cli.score import FORMATS, add_score_arguments, score
from cellstack.cli.serve import add_serve_arguments, serve
from cellstack.cli.stream import stream
from cellstack.cli.tables import add_table_options
from cellstack.cli.text import add_generate_arguments, generate
from cellstack.cli.train import add_arguments, add_help, train
from cellstack.formats.lines import FORMS
from cellstack.nodes.cell_arrays import STORED_WEIGHTS, WEIGHTS
from cellstack.train.checks import OptionError, TooFewRowsError, UsageError
from cellstack_bench.command import add_bench_arguments, bench
from cellstack_demo.command import add_demo_arguments, demo

MOST_THREADS = 1024  # OpenMP ends the process if it can't start as many as requested


class Verb(NamedTuple):
    """The help of a verb: what it does, its arguments in short, and examples."""

    summary: str
    usage: str
    examples: str
    threads: str | None = "all"  # the default of --threads; None: the verb doesn't have this option
    json: str | None = "write one JSON object to standard output"  # None: the verb doesn't have --json


HELP = {
    "demo": Verb(
        "train, run and inspect two networks on speech, in a minute",
        "[options]",
        "cellstack demo -o cellstack-demo",
        threads="1",
    ),
    "train": Verb(
        "train on sequences, a time series or a text",
        "FILE [TEST] -o MODEL [options]",
        """cellstack train co2.csv --target co2 --horizon 52 -o co2.safetensors
  cellstack train book.txt -o book
  cellstack train Vowels_TRAIN.ts Vowels_TEST.ts --bidirectional -o vowels
  cellstack train machines.parquet --id machine --label state --dry-run
  cellstack train Vowels_TRAIN.ts --inspect -o vowels
  torchrun --nproc-per-node 2 -m cellstack train Vowels_TRAIN.ts -o vowels""",
        threads="the faster of 1 and all",
    ),
    "run": Verb(
        "predict or forecast with a trained network; run any network on a file of numbers",
        "MODEL FILE [options]",
        """cellstack run vowels Vowels_TEST.ts > predictions.csv
  cellstack run model.keras steps.npy > answers.csv
  cut -d, -f2- log.csv | cellstack run model.onnx - --columns speed,3
  cellstack run weights.pt steps.csv --order rnn,last,head""",
    ),
    "score": Verb(
        f"predict every row of many {FORMATS}",
        "MODEL FILES [FILES ...] -o DIR [options]",
        """cellstack score state 'machines/*.parquet' -o scores
  cellstack score model.onnx 'meters/*.parquet' -o scores --id meter --time at \\
    --columns load,heat --across-files continue
  cellstack score state machines -o scores --ray auto""",
        threads="1",
    ),
    "stream": Verb(
        "read a step per line, and write each output immediately",
        "MODEL [options]",
        """cellstack stream model --state model.state < steps.csv > answers.csv
  cellstack stream silero_vad.onnx --constants sr=16000 --frames input=512 \\
    --context input=64 < frames.csv""",
        threads=None,
        json="write outputs as JSON lines",
    ),
    "serve": Verb(
        "serve models to many clients over HTTP and WebSocket",
        "MODEL [MODEL ...] [options]",
        """cellstack serve model.safetensors
  cellstack serve model.onnx --port 9000 --durable sessions
  cellstack serve silero_vad.onnx --constants sr=16000 --frames input=512 \\
    --context input=64
  CELLSTACK_TOKEN=secret cellstack serve model --host 0.0.0.0 \\
    --tls-cert cert.pem --tls-key key.pem""",
        threads="1",
        json="when it listens, write one JSON object to standard output",
    ),
    "generate": Verb(
        "continue a text with a text model",
        "MODEL [options]",
        """cellstack generate book --prompt 'Alice was' --temperature 0.8 --length 500
  cellstack generate book --seed 1 --stop '.'""",
        threads=None,
    ),
    "convert": Verb(
        "write a network in another format, and compare the outputs of both files",
        "SOURCE TARGET [options]",
        """cellstack convert model.onnx model.safetensors
  cellstack convert model.safetensors firmware/model.c --weights int8
  cellstack convert model.keras small.safetensors --weights bfloat16
  cellstack convert model.safetensors model.onnx --sample steps.csv""",
        threads=None,
    ),
    "inspect": Verb(
        "write an interactive page of the gates and states of a network",
        "MODEL [FILE] [options]",
        """cellstack inspect vowels Vowels_TEST.ts --open
  cellstack inspect model.keras steps.npy -o steps.html
  cellstack inspect model.safetensors""",
    ),
    "info": Verb(
        "describe layers, shapes and sizes, and what runs each layer",
        "MODEL [options]",
        "cellstack info vowels",
    ),
    "bench": Verb(
        "measure speed, compared with other installed libraries",
        "[options]",
        """cellstack bench -o figures
  cellstack bench --what inference --units 32,256 --batch 1,64 --threads 2
  cellstack bench --quick --json > bench.json""",
        threads=None,
    ),
    "completion": Verb(
        "print a script for tab completion in a shell",
        "SHELL",
        """echo 'source <(cellstack completion bash)' >> ~/.bashrc
  cellstack completion zsh > ~/.zsh/completions/_cellstack
  cellstack completion fish > ~/.config/fish/completions/cellstack.fish""",
        threads=None,
        json=None,
    ),
    "help": Verb("show the help of a verb", "[VERB]", "cellstack help train", threads=None, json=None),
}

EPILOG = """example:
  cellstack run vowels Vowels_TEST.ts > predictions.csv

exit codes:
  0    success; serve was stopped by SIGTERM
  1    convert or bench found a difference; score couldn't score a file; a
       table has too few rows to forecast
  2    an invalid argument or file; standard error has one line with the reason
  130  stopped by Ctrl-C
  143  stream was stopped by SIGTERM

`cellstack help VERB` describes a verb."""


class Version(argparse.Action):
    """`--version`: looked up only when asked for, because that takes longer than the start of any verb."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        try:
            print(f"cellstack {cellstack.__version__}", flush=True)
        except OSError as error:
            _discard_unwritable()
            parser.error(error.strerror or str(error))
        parser.exit()


def parser() -> Parser:
    """Return the parser with all verbs."""
    description = "Train, run and inspect recurrent networks."
    top = Parser(prog="cellstack", usage="%(prog)s VERB ...", description=description, epilog=EPILOG, add_help=False)
    verbs = top.add_subparsers(title="verbs", prog="cellstack", dest="verb", required=True, metavar="VERB")
    general = top.add_argument_group("options")
    general.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    for name, verb in HELP.items():
        subparser = verbs.add_parser(
            name,
            usage=f"cellstack {name} {verb.usage}",
            help=verb.summary,
            description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
            epilog=f"example{'s' * (len(verb.examples.splitlines()) > 1)}:\n  {verb.examples}",
            add_help=False,
        )
        subparser.set_defaults(parsers=verbs.choices)
        ARGUMENTS[name](subparser)
        general = subparser.add_argument_group("general")
        if verb.json is not None:
            general.add_argument("--json", action="store_true", help=verb.json)
        if verb.threads is not None:
            text = f"number of processor threads (default: {verb.threads})"
            general.add_argument("--threads", type=int, metavar="N", help=text)
        if name == "train":
            add_help(general)
        else:
            general.add_argument("-h", "--help", action="help", help="show this help and exit")
    return top


def _add_run(runs: Parser) -> None:
    runs.add_argument("model", metavar="MODEL", help="a network in any supported format")
    runs.add_argument(
        "file",
        metavar="FILE",
        help="for a network trained by cellstack: data of the kind it was trained on; for any other: numbers as .npy, "
        ".npz, .csv or .jsonl; - reads standard input",
    )
    text = "columns to use, by name or by number from 1 (default: all)"
    runs.add_argument("--columns", type=names, metavar="A,B", help=text)
    text = "table column of the true values (default: as in training, if the table has it)"
    runs.add_argument("--label", dest="y", metavar="COLUMN", help=text)
    runs.add_argument("--origin", metavar="DATE", help="forecast the steps after this row (default: the last row)")
    runs.add_argument("--picture", metavar="FILE", help="plot the forecast: to .png, .svg or .pdf")
    for name, what in (("target", "columns to forecast"), ("inputs", "covariates"), ("known", "those known ahead")):
        runs.add_argument(f"--{name}", type=names, metavar="A,B", help=f"of TiRex: {what}")
    runs.add_argument("--horizon", type=int, metavar="STEPS", help="of TiRex: the number of steps to forecast")
    text = "round the matrices to this dtype (default: as in the file)"
    runs.add_argument("--weights", choices=STORED_WEIGHTS, help=text)
    add_load_options(runs)
    add_table_options(runs)


def _add_stream(steps: Parser) -> None:
    steps.add_argument("model", metavar="MODEL", help="a network in any supported format")
    text = "form of the input: numbers separated by commas, or JSON arrays (default: detected)"
    steps.add_argument("--format", choices=FORMS, help=text)
    steps.add_argument(
        "--state",
        metavar="FILE",
        help="start from the state in FILE, if it exists, and save the state to it at the end, also after Ctrl-C or "
        "SIGTERM",
    )
    text = "round the matrices to this dtype; fewer bits are faster (default: as in the file)"
    steps.add_argument("--weights", choices=WEIGHTS, help=text)
    add_load_options(steps)


def _add_convert(other: Parser) -> None:
    other.add_argument("source", metavar="SOURCE", help="a network in any supported format")
    other.add_argument(
        "target", metavar="TARGET", help="file to write: its suffix selects the format; .c or a folder writes C99"
    )
    other.add_argument(
        "--sample",
        metavar="FILE",
        help="input for the comparison: .npy [B, T, I], .npz with an array per input, .csv or .jsonl (default: random "
        "numbers)",
    )
    text = "largest relative difference that passes (default: 1e-4; for bfloat16 2e-2)"
    other.add_argument("--tolerance", type=float, metavar="X", help=text)
    text = (
        "round the matrices to this dtype; with bfloat16 the file is about half as large; int8 is for C only "
        "(default: as in SOURCE)"
    )
    other.add_argument("--weights", choices=WEIGHTS, help=text)
    add_load_options(other)


def _add_inspect(inside: Parser) -> None:
    inside.add_argument("model", metavar="MODEL", help="a network in any supported format")
    inside.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="input of the run: numbers as .npy, .npz or .csv, data of the kind that the model was trained on, .txt "
        "or .wav (default: random numbers)",
    )
    text = "file to write (default: the model's name with .html)"
    inside.add_argument("-o", "--output", metavar="PAGE", help=text)
    inside.add_argument("--open", action="store_true", help="open the page in the browser")
    text = "use at most this many rows of FILE (default: %(default)s)"
    inside.add_argument("--rows", type=int, default=8, metavar="N", help=text)
    add_load_options(inside)


def _add_info(looks: Parser) -> None:
    looks.add_argument("model", metavar="MODEL", help="a network in any supported format")
    add_load_options(looks)


def _add_help(helps: Parser) -> None:
    helps.add_argument("topic", nargs="?", choices=tuple(HELP), metavar="VERB", help="the verb (default: an overview)")


ARGUMENTS: dict[str, Callable[[Any], None]] = {
    "demo": add_demo_arguments,
    "train": add_arguments,
    "run": _add_run,
    "score": add_score_arguments,
    "stream": _add_stream,
    "serve": add_serve_arguments,
    "generate": add_generate_arguments,
    "convert": _add_convert,
    "inspect": _add_inspect,
    "info": _add_info,
    "bench": add_bench_arguments,
    "completion": add_completion_arguments,
    "help": _add_help,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `cellstack`; None = those of this process.

    Returns:
        The exit code: see `EPILOG`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in a file may have characters that the terminal can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else list(argv)
    top = parser()
    if sys.stdout is None:  # closed by the shell: the first file that is opened would get what libraries write to it
        top.error("expected standard output to be open: > /dev/null discards it")
    args = top.parse_args(arguments or ["help"])
    try:
        threads = getattr(args, "threads", None)
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"expected --threads from 1 to {MOST_THREADS}, got {threads}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(args, "warning", str(message))
            status = VERBS[args.verb](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("cellstack: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        _discard_unwritable()
        return 0
    except OSError as error:
        _discard_unwritable()
        said = error.strerror or str(error)
        return _fail(args, f"{error.filename}: {said}" if error.filename else said)
    except MemoryError as error:
        return _fail(args, f"not enough memory: {error}")
    except TooFewRowsError as error:
        return _fail(args, str(error), 1)
    except OptionError as error:
        return _fail(args, str(error).replace(error.option, f"`{error.option}=…`", 1))
    except (FormatError, ShapeError, UsageError) as error:  # any other error is a bug, and keeps its traceback
        return _fail(args, str(error))


def _discard_unwritable() -> None:
    """Discard what standard output can't take, such as on a full disk: Python would try to write it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(args: argparse.Namespace, reason: str, status: int = 2) -> int:
    _say(args, "error", reason)
    return status


def _say(args: argparse.Namespace, what: str, text: str) -> None:
    """Print an error or a warning in one line, without its place in the code."""
    print(f"cellstack {args.verb}: {what}: {as_flags(' '.join(text.split()), args)}", file=sys.stderr)


def _help(args: argparse.Namespace) -> int:
    parser().parse_args([*([] if args.topic is None else [args.topic]), "--help"])  # prints it and exits
    return 0


def _completion(args: argparse.Namespace) -> int:
    return completion(parser(), args)


VERBS = {
    "demo": demo,
    "train": train,
    "run": run,
    "score": score,
    "stream": stream,
    "serve": serve,
    "generate": generate,
    "convert": convert,
    "inspect": inspect,
    "info": info,
    "bench": bench,
    "completion": _completion,
    "help": _help,
}
