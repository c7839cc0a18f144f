"""Functions that the verbs share, and the verbs that take any network's file: `info`, `convert` and `run`."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from cellstack import FormatError, Network
from cellstack.cli.arguments import names
from cellstack.formats import extract, listed, load_network, writers
from cellstack.formats.files import NATIVE, existing_file
from cellstack.nodes.cell_arrays import STORED_WEIGHTS
from cellstack.train.checks import UsageError
from cellstack.train.data.samples import read_sample
from cellstack.train.history import cell
from cellstack.train.predict import outputs

T = TypeVar("T")

LOAD_OPTIONS = ("order", "constants", "frames", "context")  # arguments of `cellstack.load` that are options here


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cellstack.load` to a verb's parser."""
    group = parser.add_argument_group("model files", "what the model's file doesn't define; see docs/onnx.md")
    text = (
        "PyTorch weights: the modules in the order in which they run, with 'final' (final states), 'last' (last step), "
        "'mean' or 'max' (over all steps), 'relu' and so on between"
    )
    group.add_argument("--order", type=names, metavar="A,B", help=text)
    text = "ONNX: inputs to replace by constants, such as sr=16000"
    group.add_argument("--constants", type=_by_name(_number), metavar="A=V,B=V", help=text)
    text = "ONNX: samples per frame of an input, such as input=512"
    group.add_argument("--frames", type=_by_name(int), metavar="A=N,B=N", help=text)
    text = "ONNX: samples at the end of each frame that are repeated before the next frame, such as input=64"
    group.add_argument("--context", type=_by_name(int), metavar="A=N,B=N", help=text)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_load_options` that were given, as keyword arguments of `cellstack.load`."""
    return {name: value for name in LOAD_OPTIONS if (value := getattr(args, name)) is not None}


def _by_name(number: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    """Return a parser of `name=number`, one or more, separated by commas."""

    def read(text: str) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.rpartition("="))
            if not name or name in numbers:
                raise argparse.ArgumentTypeError(f"expected NAME=NUMBER with distinct names, got {text!r}")
            try:
                numbers[name] = number(value)
            except ValueError:
                kind = "a whole number" if number is int else "a number, true or false"
                raise argparse.ArgumentTypeError(f"expected {kind} for {name!r}, got {value!r}") from None
        return numbers

    return read


def _number(text: str) -> float | int | bool:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return float(text)


def with_weights(net: Network, weights: str | None) -> Network:
    """Return a network whose matrices have the dtype of --weights; `net` itself where that isn't given."""
    if weights is None:
        return net
    try:
        return net.with_weights(weights)
    except TypeError as error:
        raise UsageError(f"--weights {weights}: {error}") from None


def load_model(name: str, options: Mapping[str, Any] | None = None) -> tuple[Network, str]:
    """Load a network; return it and the path of its file. The native suffix may be omitted.

    Args:
        name: the file's name.
        options: keyword arguments of `cellstack.load`, see `load_options`.

    Raises:
        FormatError: the file doesn't contain a network that can be loaded.
        UsageError: options that the file's format doesn't have, or a format whose reader isn't installed.
        OSError: the file can't be read.
    """
    path, chosen = existing_file(name), options or {}
    return loaded(path, chosen, lambda: load_network(path, **chosen)), path


def loaded(path: str, options: Mapping[str, Any], read: Callable[[], T]) -> T:
    """Return what `read` returns, which loads the file at `path` with these options; for errors see `load_model`."""
    try:
        return read()
    except ModuleNotFoundError as error:  # the reader of the format isn't installed; the message names the extra
        raise UsageError(f"{path}: {error}") from None
    except TypeError as error:
        if not options:
            raise
        flags = ", ".join(f"--{name}" for name in options)
        raise UsageError(f"{flags}: {str(error).removeprefix('load: ')}") from None


def with_suffix(name: str) -> Path:
    """Return a name with the native suffix."""
    path = Path(name)
    if not path.name:
        raise UsageError(f"expected a file name, got {name!r}")
    return path if path.suffix == NATIVE else path.with_name(path.name + NATIVE)


def needs_torch(args: argparse.Namespace, threads: int | None = None) -> None:
    """Import torch, and set its number of threads: --threads, else `threads`, else all."""
    try:
        import torch
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{args.verb} needs {error.name}: pip install 'cellstack[torch]'") from None
    threads = args.threads or threads
    if threads is not None:
        torch.set_num_threads(threads)


def show(args: argparse.Namespace, report: dict[str, Any], text: list[str]) -> None:
    """Print the result: as one JSON object with --json, else as lines of text."""
    if args.json:
        print(json.dumps(plain(report), allow_nan=False))
    elif text:
        print("\n".join(text))


def write_csv(file: IO[str], columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as CSV: numbers with six digits, empty where missing, dates in ISO form.

    Numbers from 10,000 on have ten digits, so that the quantiles of large ones differ. Text that a spreadsheet would
    run as a formula is escaped, see `history.cell`.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(cell, columns))
    writer.writerows(zip(*map(_cells, columns.values()), strict=True))


def _cells(values: Any) -> list[Any]:
    """Return a column's cells."""
    if isinstance(values, np.ndarray):
        values = (np.datetime_as_string(values) if values.dtype.kind == "M" else values).tolist()
    return [_shown(value) if isinstance(value, float) else cell(value) for value in values]


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.{6 if abs(value) < 1e4 else 10}g}"


def plain(value: Any) -> Any:
    """Convert `value` to JSON types: arrays to lists, NaN and infinities to null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ── info ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def info(args: argparse.Namespace) -> int:
    """Describe a file's network; if it can't be run as a whole, its recurrent parts and the reason."""
    path = existing_file(args.model)
    size = os.path.getsize(path)
    head = f"{path}: {size:,} bytes"
    options = load_options(args)
    try:
        net = loaded(path, options, lambda: load_network(path, **options))
    except FormatError as error:
        if options:  # they ask for the whole network
            raise
        try:
            parts = extract(path)
        except FormatError:
            raise error from None
        report = {"model": path, "bytes": size, "error": str(error)}
        report["parts"] = {name: _described(part) for name, part in parts.items()}
        text = [head, f"can't be run as a whole: {error}", "recurrent parts"]
        text += [f"  {line}" for name, part in parts.items() for line in (f"{name}:", *_indented(part))]
        show(args, report, text)
        return 0
    plan, text = net.plan(), [head]
    net.summary(print_fn=text.append)
    report = {"model": path, "bytes": size, **_described(net), "stream": text[-1].splitlines()[-1]}
    report |= {"plan": list(plan), "metadata": dict(net.metadata)}
    text += ["plan", *("  " + line for line in plan)]
    text += [f"{key}: {json.dumps(value)}" for key, value in net.metadata.items()]
    show(args, report, text)
    return 0


def _described(net: Network) -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "kind": type(node).__name__,
            "summary": node.summary,
            "output": net.graph.shown(name),
            "parameters": node.parameters,
            "multiplications": node.multiplications,
            "bytes_read": node.bytes_read,
        }
        for name, node in zip(net.names, net.nodes, strict=True)
    ]
    totals = {key: sum(layer[key] for layer in layers) for key in ("parameters", "multiplications", "bytes_read")}
    ends = {what: {name: net.graph.shown(name) for name in getattr(net, what)} for what in ("inputs", "outputs")}
    return {"dtype": str(net.dtype), "input_size": net.input_size, **ends, **totals, "layers": layers}


def _indented(net: Network) -> list[str]:
    return [f"  {line}" for line in repr(net).splitlines()]


# ── convert ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert(args: argparse.Namespace) -> int:
    """Write a network in another format, and compare the outputs of both files.

    Returns:
        0; 1 if the outputs differ by more than --tolerance.
    """
    from cellstack.formats.c import sizes as c_sizes  # imported here because only C needs it
    from cellstack.formats.verify import TOLERANCE, verify  # slow to import, and only needed here

    if args.tolerance is not None and not 0.0 <= args.tolerance < math.inf:
        raise UsageError(f"expected --tolerance >= 0 and finite, got {args.tolerance}")
    net, source = load_model(args.source, load_options(args))
    x = None if args.sample is None else read_sample(net, args.sample)
    target = Path(args.target)
    suffixes = {suffix for adapter in writers() for suffix in adapter.SUFFIXES}
    named = target.suffix.lower() in {".c", *suffixes}  # the suffix names a format, even if a folder has that name
    to_folder = args.target.endswith(os.sep) or (target.is_dir() and args.target != "" and not named)
    if not args.target or not (to_folder or named):
        raise UsageError(
            f"expected a target with the suffix of a format ({listed(writers())}, C (.c)), or a folder for C, ending "
            f"in {os.sep}, got {args.target!r}"
        )
    if target.exists() and target.samefile(source):
        raise UsageError(f"{args.target}: the target is the source file, which would be overwritten")
    as_c = to_folder or target.suffix.lower() == ".c"
    if args.weights not in (None, *STORED_WEIGHTS) and not as_c:
        raise UsageError(f"--weights {args.weights}: only a target in C can have such weights, got {args.target}")
    read = net
    sizes = None
    if as_c:
        in_c = not to_folder
        stem = target.stem if in_c else re.sub(r"[^A-Za-z0-9]+", "_", Path(source).stem).strip("_")
        folder = target.parent if in_c else target
        name = stem if in_c or stem[:1].isalpha() else f"model_{stem}".strip("_")
        try:
            header, written = net.export_c(folder, name, args.weights)
            sizes = c_sizes(net, args.weights)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{args.target}: {str(error).removeprefix('export_c: ')}") from None
        files = [str(header), str(written)]
    else:
        net = with_weights(net, args.weights)
        try:
            net.save(target)
        except (TypeError, ValueError) as error:  # a node that the format can't represent
            raise UsageError(f"{args.target}: {str(error).removeprefix('save: ')}") from None
        files = [str(target)]
    widened = net.weights == "bfloat16" and not as_c and Path(files[-1]).suffix != NATIVE
    stored = net.with_weights("float32") if widened else net  # the network that was written
    # No other runtime reads the native format.
    paths = [files[-1]] if Path(source).suffix == NATIVE else [source, files[-1]]
    reports = {path: verify(read if path == source else stored, path, x, streams=path == paths[-1]) for path in paths}
    allowed = {path: one.tolerance if path == source else TOLERANCE for path, one in reports.items()}
    if args.tolerance is not None:
        allowed = dict.fromkeys(reports, args.tolerance)
    verdicts = {one.verdict(allowed[path]).partition(":")[0] for path, one in reports.items()}
    verdict = next(word for word in ("fail", "not verified", "pass") if word in verdicts)
    written = f"{source} -> {', '.join(files)}"
    reasons = [f"{path}: {one.note}" for path, one in reports.items() if one.runtime is None]
    ending = "; ".join(reasons) if verdict == "not verified" else written
    said = ["bfloat16 matrices are written as float32: the values are the same, but x and h are no longer rounded"]
    said *= widened
    shown = {path: one for path, one in reports.items() if verdict == "fail" or one.runtime or one.streams}
    compared = [one.text(allowed[path]) for path, one in shown.items()]
    if sizes is not None:
        said.append(
            f"flash: {sizes.constants:,} bytes of constants, and the code; "
            f"RAM: {sizes.ram:,} bytes, of which the state is {sizes.state:,} and scratch {sizes.scratch:,}"
        )
    text = [written, *said, *compared, _answered(net), f"{verdict}: {ending}"]
    weights = args.weights or net.weights if as_c else net.weights
    report = {"source": source, "files": files, "sample": args.sample, "verdict": verdict, "weights": weights}
    report |= {} if sizes is None else {"sizes": sizes._asdict()}
    report |= {"not_verified": reasons, "shapes": _answered(net)}
    report["parity"] = {path: one.to_json() for path, one in reports.items()}
    show(args, report, text)
    return 1 if verdict == "fail" else 0


def _answered(net: Network) -> str:
    """Return the shapes of inputs and outputs, and whether the output has a time axis: a wrong order shows here."""
    inputs, outputs = ([net.graph.shown(name) for name in names] for names in (net.inputs, net.outputs))
    said = ""
    if len(outputs) == 1 and any(map(net.graph.timed, net.inputs)):
        said = f": an output {'at every step' if len(net.shapes[net.outputs[0]]) == 2 else 'for the whole sequence'}"
    return f"{', '.join(inputs)} -> {', '.join(outputs)}{said}"


def run_any(args: argparse.Namespace, net: Network) -> int:
    """Run any network over a file of numbers and print its outputs: with --json all of them, by name.

    Otherwise as CSV: a line for each row of the batch, and for each step if the output is a sequence.

    Raises:
        UsageError: numbers of the wrong shape; several outputs, or more than three axes, without --json.
    """
    y = outputs(net, args.file, args.threads, args.columns)
    answers = dict(zip(net.outputs, y if isinstance(y, tuple) else (y,), strict=True))
    if args.json:
        show(args, answers, [])
        return 0
    (name, rows), *others = answers.items()
    axes = len(net.graph.shapes[name])  # without the batch
    if others or axes > 2:
        shapes = ", ".join(f"{name} {net.graph.shown(name)}" for name in answers)
        raise UsageError(f"{args.model}: CSV can't represent the outputs {shapes}: use --json")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*("row", "step")[:axes], *(f"y_{n}" for n in range(rows[0].shape[-1]))])
    for n, row in enumerate(rows):
        writer.writerows([n, *at, *row[at].tolist()] for at in np.ndindex(row.shape[:-1]))
    return 0
