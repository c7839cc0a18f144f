"""`cellstack inspect`: a network run over a file, and the page that looks into the run."""

from __future__ import annotations

import argparse
import wave
import webbrowser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cli.files import load_model, load_options, read_sample, show
from cellstack.cli.run import read_as_trained
from cellstack.formats.files import check_replaceable
from cellstack.network import Network
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES
from cellstack.train.examples import Labelled
from cellstack.train.forecast import predict as forecast
from cellstack.train.forecast.windows import extended_times
from cellstack.train.tables.table import read_table
from cellstack.train.text.data import alphabet_of, as_input, content

RANDOM_STEPS = 24
SUFFIXES = (".csv", ".npy", ".npz", ".parquet", ".ts", ".tsv", ".txt", ".wav")


class Sample(NamedTuple):
    """What a network is run over, and what stands beside it in the page."""

    x: Any
    mask: NDArray[np.bool_] | None = None
    labels: Any = None
    audio: tuple[Any, float] | None = None
    text: str = ""


def inspect(args: argparse.Namespace) -> int:
    """Trace a network over a file, or over a small random input, and write the page of the trace.

    Raises:
        UsageError: a file that the network doesn't take, or more numbers than a page holds.
    """
    if args.rows < 1:
        raise UsageError(f"expected --rows of at least 1, got {args.rows}")
    net, path = load_model(args.model, load_options(args))
    output = args.output if args.output is not None else f"{Path(path).stem}.html"
    if not output:
        raise UsageError("expected --output to name a file, got ''")
    check_replaceable(output)  # now, not after the run
    sample = _random(net) if args.file is None else _read(net, path, args.file, args.rows)
    try:
        t = net.trace(sample.x, mask=sample.mask, threads=args.threads)
        title = f"{Path(path).name}, {'random input' if args.file is None else Path(args.file).name}"
        t.save_html(output, sample.labels, audio=sample.audio, title=title)
    except ValueError as error:
        raise UsageError(f"{args.file or path}: {str(error).removeprefix('save_html: ')}") from None
    size = Path(output).stat().st_size
    rows, steps = len(t.y[0] if isinstance(t.y, tuple) else t.y), len(t.steps)
    report = {"model": path, "file": args.file, "page": output, "bytes": size, "rows": rows, "steps": steps}
    text = [f"{path}: {sample.text}", f"{output}: {rows} row{'s' * (rows != 1)}, {steps} steps, {size:,} bytes"]
    show(args, report, text)
    if args.open:
        webbrowser.open(Path(output).resolve().as_uri())
    return 0


def _random(net: Network) -> Sample:
    from cellstack.formats.verify import drawn, usual_steps  # the other verbs start without what it needs

    steps = usual_steps(net, RANDOM_STEPS)
    text = "numbers drawn at random, as no FILE was given: the page shows how the network works, not what it is for"
    return Sample(drawn(net, 0, 1, steps), text=text)


def _read(net: Network, model: str, path: str, rows: int) -> Sample:
    """Return what a file holds, as the network takes it: at most so many rows."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"expected a file that ends in one of {', '.join(SUFFIXES)}, got {path!r}")
    if suffix == ".ts" or (suffix in TABLES and net.metadata.get("task") is not None):
        return _series(net, model, path, rows)
    if suffix == ".txt":
        return _text(net, path)
    if suffix == ".wav":
        return _sound(net, path)
    given = read_sample(net, path)
    some = {name: array[:rows] for name, array in given.items()}
    found = len(next(iter(given.values())))
    return Sample(some, text=f"{min(rows, found)} of {found} rows of {path}" if found > rows else f"all of {path}")


def _series(net: Network, model: str, path: str, rows: int) -> Sample:
    """Return sequences, or the last window of a table, as `cellstack run` gives them to a model that was trained."""
    forecasts = net.metadata["task"] == "forecast"
    if forecasts and Path(path).suffix.lower() not in TABLES:
        raise UsageError(f"{path}: expected a table, {', '.join(TABLES)}, as the model forecasts")
    labels = None
    if forecasts:
        recipe, inputs = forecast.trained(net, model)
        table = read_table(path, **forecast.reading(net, model))
        windows = forecast.checked_windows(recipe, table, forecast.last_origins(table, recipe), inputs, model)
        examples, count = windows, min(rows, len(windows.origins))
        series = f" of {count} of {len(windows.origins)} series" if table.id else ""
        text = (
            f"the last window{series} of {path}, {recipe.window} steps up to now and {recipe.horizon} that are forecast"
        )
        if table.times is not None and count == 1:
            times = extended_times(table, recipe.horizon)
            labels = times[np.maximum(windows.origins[0] + np.arange(1 - recipe.window, recipe.horizon + 1), 0)]
    else:
        task = predict.trained(net, model)
        data = read_as_trained(path, net, model, task)
        if data.channels != len(task.inputs.mean):
            raise UsageError(f"{path}: expected {len(task.inputs.mean)} channels, found {data.channels}")
        examples, count, inputs = Labelled(data), min(rows, len(data.x)), task.inputs
        text = f"{count} of {len(data.x)} sequences of {path}"
    each = [inputs(examples.fetch(np.array([number])).x) for number in range(count)]
    steps = max(x.shape[1] for x, _ in each)
    whole = np.zeros((count, steps, each[0][0].shape[2]), np.float32)
    mask = np.zeros((count, steps), bool)
    for number, (x, used) in enumerate(each):
        whole[number, : x.shape[1]] = x[0]
        mask[number, : x.shape[1]] = True if used is None else used[0]
    return Sample(whole, None if mask.all() else mask, labels, text=text)


def _one_input(net: Network, path: str) -> str:
    if len(net.inputs) != 1 or not net.graph.timed(net.inputs[0]):
        raise UsageError(
            f"{path}: expected a .npz of the inputs {', '.join(net.inputs)}, as the network doesn't take one sequence"
        )
    return net.inputs[0]


def _text(net: Network, path: str) -> Sample:
    """Return the characters of a text as a network of text takes them: as ids, or one of its features each."""
    alphabet = alphabet_of(net, path)
    text = content(path, alphabet.characters is None)
    ids = alphabet.encode(text, path)
    if not len(ids):
        raise UsageError(f"{path}: expected a text, found none")
    labels = list(text) if isinstance(text, str) else [chr(byte) if byte < 128 else f"{byte:02x}" for byte in text]
    x = as_input(net, ids)[None]
    return Sample({net.inputs[0]: x}, labels=labels, text=f"the {len(ids):,} {alphabet.unit} of {path}")


def _sound(net: Network, path: str) -> Sample:
    """Return a wave in frames of as many samples as the network takes at a step, from -1 to 1."""
    name = _one_input(net, path)
    if name in net.graph.ids or net.input_size is None:
        raise UsageError(f"{path}: expected .npy for this network, which doesn't take frames of samples")
    try:
        with wave.open(path) as file:
            channels, size, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UsageError(f"{path}: expected a wave of PCM samples, found another file: {error}") from None
    if len(data) % (size * channels):
        raise UsageError(f"{path}: expected whole samples of {size * channels} bytes, found a file that is cut off")
    if not rate:
        raise UsageError(f"{path}: expected a rate of at least 1 Hz, found 0")
    if size == 3:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = np.pad(triples, ((0, 0), (1, 0))).reshape(-1).view("<i4") / 2.0**31
    elif size == 1:
        samples = np.frombuffer(data, np.uint8) / 128.0 - 1.0
    else:
        samples = np.frombuffer(data, f"<i{size}") / 2.0 ** (8 * size - 1)
    samples = samples.reshape(-1, channels).mean(axis=1)
    width = net.input_size
    steps = len(samples) // width
    if not steps:
        raise UsageError(f"{path}: expected at least {width} samples, a frame of this network, found {len(samples)}")
    x = samples[: steps * width].reshape(1, steps, width)
    times = np.round(np.arange(steps) * width / rate, 6)
    text = f"{steps:,} frames of {width} samples of {path}, at {rate:,} Hz"
    return Sample({name: x}, labels=times, audio=(samples[: steps * width], rate), text=text)
