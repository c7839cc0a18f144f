"""`cellstack score`: predictions for every row of many files, in one process or on Ray."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict

from cellstack.cli.arguments import as_flags, names
from cellstack.cli.files import add_load_options, load_options, show
from cellstack.cli.tables import only_one
from cellstack.train.checks import UsageError

FORMATS = "Parquet, CSV or TSV files"  # those of `scale.reading`, which imports pyarrow
MOST_SHOWN = 10  # files that failed


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    parser.add_argument("model", metavar="MODEL", help="a network in any supported format that can be streamed")
    text = f"{FORMATS}, patterns in quotation marks, or folders"
    parser.add_argument("files", metavar="FILES", nargs="+", help=text)
    text = "folder to write to: for each file, a Parquet file with the predictions; to resume, name the same folder"
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help=text)
    parser.add_argument("--ray", metavar="ADDRESS", help="score on Ray: auto, local, or the address of a cluster")
    group = parser.add_argument_group("columns", "default: as in training")
    group.add_argument("--id", type=names, metavar="COLUMN", help="column that identifies the sequence of a row")
    group.add_argument("--time", metavar="COLUMN", help="column that orders a sequence's rows ('' for none)")
    text = "columns of the input, in the network's order"
    group.add_argument("--columns", dest="features", type=names, metavar="A,B", help=text)
    text = "what to do with a row without a value: an error, or no prediction (default: %(default)s)"
    group.add_argument("--missing", choices=("refuse", "skip"), default="refuse", help=text)
    group = parser.add_argument_group("sequences")
    group.add_argument(
        "--across-files",
        choices=("refuse", "restart", "continue"),
        default="refuse",
        help="an id in several files: an error, a new sequence in each file, or a sequence that continues in the next "
        "file of the same folder, in the order of names (default: %(default)s)",
    )
    text = "rows in memory at a time; doesn't change the results (default: 65536)"
    group.add_argument("--batch-rows", type=int, default=65_536, metavar="N", help=text)
    add_load_options(parser)


def score(args: argparse.Namespace) -> int:
    """Score files.

    Returns:
        0; 1 if a file couldn't be scored.
    """
    try:
        from cellstack.scale import score_files

        start = time.perf_counter()
        report = score_files(
            args.model,
            args.files,
            args.output,
            id=only_one("id", args.id),
            time=args.time,
            features=args.features,
            missing=args.missing,
            across_files=args.across_files,
            ray=args.ray,
            threads=args.threads or 1,
            batch_rows=args.batch_rows,
            options=load_options(args),
        )
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from None
    report.failed = {path: as_flags(why, args) for path, why in report.failed.items()}
    seconds = time.perf_counter() - start
    earlier = f"; {report.earlier} files were complete before" if report.earlier else ""
    text = f"{report.files} files, {report.rows:,} rows, {report.rows / seconds:,.0f} per second{earlier}"
    show(args, {**asdict(report), "seconds": seconds}, [text])
    for path, why in list(report.failed.items())[:MOST_SHOWN]:
        print(f"cellstack score: error: {path}: {' '.join(why.split())}", file=sys.stderr)
    if len(report.failed) > MOST_SHOWN:
        print(f"cellstack score: error: and {len(report.failed) - MOST_SHOWN} more files", file=sys.stderr)
    if report.waiting:
        said = f"{len(report.waiting)} files weren't scored, because they follow one of these"
        print(f"cellstack score: error: {said}", file=sys.stderr)
    return 1 if report.failed else 0
