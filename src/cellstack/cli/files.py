"""What the verbs of the command line share, and those on files of any network: `info`, `convert`, `run`."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cellstack.cli.tables import names
from cellstack.formats import adapters, extract, load, supported
from cellstack.formats.lines import Lines, picked
from cellstack.network import Network
from cellstack.spec import FormatError
from cellstack.train.checks import UsageError

SUFFIX = ".safetensors"
LOAD_OPTIONS = ("order", "constants", "frames", "context")  # of `cellstack.load`, that a command line can give


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cellstack.load` to a verb's parser."""
    group = parser.add_argument_group("models", "what the model's file leaves open; see docs/onnx.md")
    text = "PyTorch's weights: which modules run, in which order; 'last' for the last step, 'relu' and the like"
    group.add_argument("--order", type=names, metavar="A,B", help=text)
    text = "ONNX: values of inputs that the network fixes, such as sr=16000"
    group.add_argument("--constants", type=_by_name(_number), metavar="A=V,B=V", help=text)
    text = "ONNX: how many numbers a frame of an input has, such as input=512"
    group.add_argument("--frames", type=_by_name(int), metavar="A=N,B=N", help=text)
    text = "ONNX: how many of a frame's last numbers the file takes again ahead of the next one, such as input=64"
    group.add_argument("--context", type=_by_name(int), metavar="A=N,B=N", help=text)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those of the options of `add_load_options` that are given, as `cellstack.load` takes them."""
    return {name: value for name in LOAD_OPTIONS if (value := getattr(args, name)) is not None}


def _by_name(number: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    """Return what reads `name=number`, several with commas between."""

    def read(text: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.rpartition("="))
            if not name or name in found:
                raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, each name once, got {text!r}")
            try:
                found[name] = number(value)
            except ValueError:
                kind = "a whole number" if number is int else "a number, true or false"
                raise argparse.ArgumentTypeError(f"expected {kind} for {name!r}, got {value!r}") from None
        return found

    return read


def _number(text: str) -> float | int | bool:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return float(text)


def held_in(net: Network, weights: str | None) -> Network:
    """Return a network with its cells' matrices held as --weights says, or as they are where it says nothing."""
    if weights is None:
        return net
    try:
        return net.with_weights(weights)
    except TypeError as error:
        raise UsageError(f"--weights {weights}: {error}") from None


def load_model(name: str, options: Mapping[str, Any] | None = None) -> tuple[Network, str]:
    """Return the network of a file, and the file's name; the native suffix may be left out.

    Args:
        name: of the file.
        options: those of `cellstack.load`, as `load_options` has them.

    Raises:
        FormatError: it can't be read as a network.
        UsageError: options that the file's format doesn't have, or a format whose reader isn't installed.
        OSError: it can't be read at all.
    """
    path = found(name)
    return _loaded(path, options or {}), path


def _loaded(path: str, options: Mapping[str, Any]) -> Network:
    try:
        return load(path, **options)
    except ModuleNotFoundError as error:  # what reads the format isn't installed; the message says what to install
        raise UsageError(f"{path}: {error}") from None
    except TypeError as error:
        if not options:
            raise
        given = ", ".join(f"--{name}" for name in options)
        raise UsageError(f"{given}: {str(error).removeprefix('load: ')}") from None


def found(name: str) -> str:
    """Return the name of a file that is there: as given, or with the native suffix."""
    path = name if os.path.exists(name) else str(with_suffix(name))
    if not os.path.exists(path):
        raise FileNotFoundError(2, "no such file", name)
    return path


def with_suffix(name: str) -> Path:
    """Return a name with the native suffix."""
    path = Path(name)
    if not path.name:
        raise UsageError(f"expected the name of a file, got {name!r}")
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def needs_torch(args: argparse.Namespace, threads: int | None = None) -> None:
    """Import torch, and set how many threads it may use: as given, else `threads`, else all."""
    try:
        import torch
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{args.verb} needs {error.name}: install cellstack[torch]") from None
    threads = args.threads or threads
    if threads is not None:
        torch.set_num_threads(threads)


def show(args: argparse.Namespace, report: dict[str, Any], text: list[str]) -> None:
    """Print an answer: as one JSON object where --json asks for it, else as lines."""
    if args.json:
        print(json.dumps(plain(report), allow_nan=False))
    elif text:
        print("\n".join(text))


def plain(value: Any) -> Any:
    """Return `value` in what JSON has: lists for arrays, null for NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ── info ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def info(args: argparse.Namespace) -> int:
    """Say what is in a file: its network, or where it can't be run whole its recurrent parts and why."""
    path = found(args.model)
    size = os.path.getsize(path)
    head = f"{path}: {size:,} bytes"
    options = load_options(args)
    try:
        net = _loaded(path, options)
    except FormatError as error:
        if options:  # what was asked for is the whole
            raise
        try:
            parts = extract(path)
        except FormatError:
            raise error from None
        report = {"model": path, "bytes": size, "error": str(error)}
        report["parts"] = {name: _described(part) for name, part in parts.items()}
        text = [head, f"can't be run whole: {error}", "recurrent parts"]
        text += [f"  {line}" for name, part in parts.items() for line in (f"{name}:", *_indented(part))]
        show(args, report, text)
        return 0
    plan = net.plan()
    report = {"model": path, "bytes": size, **_described(net), "plan": list(plan), "metadata": dict(net.metadata)}
    text = [head, repr(net), "plan", *("  " + line for line in plan)]
    text += [f"{key}: {json.dumps(value)}" for key, value in net.metadata.items()]
    show(args, report, text)
    return 0


def _described(net: Network) -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "kind": type(node).__name__,
            "summary": node.summary,
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
    """Write a network in another format, and say how far what was read and written answer alike.

    Returns:
        0; 1 where the answers lie further apart than --tolerance.
    """
    from cellstack.formats.verify import TOLERANCE, verify  # the other verbs start without what it needs

    if args.tolerance is not None and not 0.0 <= args.tolerance < math.inf:
        raise UsageError(f"expected --tolerance >= 0 and finite, got {args.tolerance}")
    net, source = load_model(args.source, load_options(args))
    x = None if args.sample is None else read_sample(net, args.sample)
    read, net = net, held_in(net, args.weights)
    target = Path(args.target)
    suffixes = {suffix for adapter in adapters() for suffix in adapter.SUFFIXES}
    named = target.suffix.lower() in {".c", *suffixes}  # a format, whatever is there
    to_folder = args.target.endswith(os.sep) or (target.is_dir() and args.target != "" and not named)
    if not args.target or not (to_folder or named):
        raise UsageError(
            f"expected a target with the suffix of a format, {supported()}, C (.c), or a folder for C, which ends in "
            f"{os.sep}; got {args.target!r}"
        )
    if target.exists() and target.samefile(source):
        raise UsageError(f"{args.target}: expected another file than the one that is read, which would be lost")
    if to_folder or target.suffix.lower() == ".c":
        in_c = not to_folder
        stem = target.stem if in_c else re.sub(r"[^A-Za-z0-9]+", "_", Path(source).stem).strip("_")
        folder = target.parent if in_c else target
        try:
            header, written = net.export_c(folder, stem if in_c or stem[:1].isalpha() else f"model_{stem}".strip("_"))
        except ValueError as error:
            raise UsageError(f"{args.target}: {str(error).removeprefix('export_c: ')}") from None
        files = [str(header), str(written)]
    else:
        try:
            net.save(target)
        except (TypeError, ValueError) as error:  # a node that the format can't hold
            raise UsageError(
                f"{args.target}: {str(error).removeprefix('save: ')}; {SUFFIX} holds every network"
            ) from None
        files = [str(target)]
    widened = net.weights == "bfloat16" and Path(files[-1]).suffix != SUFFIX
    there = net.with_weights("float32") if widened else net  # the network that was written
    paths = [files[-1]] if Path(source).suffix == SUFFIX else [source, files[-1]]  # ours has no runtime but us
    reports = {path: verify(read if path == source else there, path, x, streams=path == paths[-1]) for path in paths}
    allowed = {path: one.tolerance if path == source else TOLERANCE for path, one in reports.items()}
    if args.tolerance is not None:
        allowed = dict.fromkeys(reports, args.tolerance)
    verdicts = {one.verdict(allowed[path]).partition(":")[0] for path, one in reports.items()}
    verdict = next(word for word in ("fail", "not verified", "pass") if word in verdicts)
    written = f"{source} -> {', '.join(files)}"
    said = ["matrices held in bfloat16 are written as float32, which has the same numbers and doesn't round x and h"]
    said *= widened
    text = [written, *said, *(one.text(allowed[path]) for path, one in reports.items()), f"{verdict}: {written}"]
    report = {"source": source, "files": files, "sample": args.sample, "verdict": verdict, "weights": net.weights}
    report["parity"] = {path: one.to_json() for path, one in reports.items()}
    show(args, report, text)
    return 1 if verdict == "fail" else 0


def run_any(args: argparse.Namespace, net: Network) -> int:
    """Print what a network answers to a file of numbers, whoever made it: with --json every output, by name.

    Else, as CSV, a line for each row of the batch, and for each step where the answer has such.

    Raises:
        UsageError: numbers that don't fit; several outputs, or more axes, without --json.
    """
    y, _ = net.run(read_sample(net, args.file, args.columns), threads=args.threads)
    answers = dict(zip(net.outputs, y if isinstance(y, tuple) else (y,), strict=True))
    if args.json:
        show(args, answers, [])
        return 0
    if len(answers) > 1 or next(iter(answers.values())).ndim > 3:
        shapes = ", ".join(f"{name} {net.graph.shown(name)}" for name in answers)
        raise UsageError(f"{args.model}: expected --json for the outputs {shapes}")
    (array,) = answers.values()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*("row", "step")[: array.ndim - 1], *(f"y_{n}" for n in range(array.shape[-1]))])
    for at in np.ndindex(array.shape[:-1]):
        writer.writerow([*at, *array[at].tolist()])
    return 0


def read_sample(net: Network, path: str, columns: Sequence[str] | None = None) -> Any:
    """Return a sample of a network's data out of a file, as `Network.run` takes it.

    Args:
        net: what it is for.
        path: `.npy`, an array `[B, T, I]`, or `[T, I]` of one row; `.npz`, such an array for each input, by name;
            `.csv`, the frames of one row, a line each, with or without the names of the columns; `.jsonl`, the same
            as JSON; `-`, either of them on standard input.
        columns: those of the lines that are frames, by name or by number from 1; None = all.

    Raises:
        UsageError: another suffix, or no such arrays.
        FormatError: lines that aren't frames.
        OSError: the file can't be read.
    """
    suffix = Path(path).suffix.lower()
    as_lines = path == "-" or suffix in (".csv", ".jsonl")
    if suffix not in (".npy", ".npz") and not as_lines:
        raise UsageError(f"expected a sample that ends in .npy, .npz, .csv or .jsonl, or - for lines, got {path!r}")
    if columns is not None and not as_lines:
        raise UsageError(f"{path}: --columns does nothing here: it is for .csv, .jsonl and standard input")
    if as_lines:
        if len(net.inputs) > 1:
            raise UsageError(
                f"{path}: expected a .npz of the inputs {', '.join(net.inputs)}, got lines, which hold one"
            )
        width = 1 if net.graph.ids else net.input_size
        if width is None:
            raise UsageError(f"{path}: expected .npy or .npz for a network that takes any width")
        source = "standard input" if path == "-" else path
        lines = Lines(source, width, "csv" if suffix == ".csv" else None)
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            rows = file if columns is None else picked(file, columns, source)
            frames = [frame for frame in map(lines.frame, rows) if frame is not None]
        array = np.array(frames, np.float64).reshape(len(frames), width)
        given: dict[str, Any] = {next(iter(net.inputs)): array.ravel() if net.graph.ids else array}
    else:
        try:
            with open(path, "rb") as file:
                read: Any = np.load(file, allow_pickle=False)
                if isinstance(read, np.ndarray) != (suffix == ".npy"):  # np.load goes by content
                    raise ValueError(f"it doesn't hold what {suffix} says")
                given = {net.inputs[0]: read} if suffix == ".npy" else {name: read[name] for name in read.files}
        except (ValueError, EOFError, AttributeError, BadZipFile) as error:
            raise UsageError(f"{path}: expected arrays of numbers as NumPy writes them: {str(error)[:200]}") from None
    if not all(array.size for array in given.values()):
        raise UsageError(f"{path}: expected numbers, found none")
    for name in given.keys() & set(net.inputs):
        if net.graph.timed(name) and given[name].ndim == len(net.shapes[name]):  # one row
            given[name] = np.expand_dims(given[name], 0)
    try:
        flows = net.as_inputs("sample", given)
        net.run(flows)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    return flows
