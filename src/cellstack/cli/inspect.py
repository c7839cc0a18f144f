"""`cellstack inspect`: run a network over a file, and write a page that shows what happened inside."""

from __future__ import annotations

import argparse
import wave
import webbrowser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import Network
from cellstack.cli.files import load_model, load_options, show
from cellstack.formats.files import check_replaceable
from cellstack.train import predict
from cellstack.train.checks import UsageError
from cellstack.train.data.reading import TABLES
from cellstack.train.data.samples import read_sample
from cellstack.train.examples import Labelled
from cellstack.train.forecasting import predict as forecast
from cellstack.train.forecasting.windows import extended_times
from cellstack.train.tables.table import read_table
from cellstack.train.text.data import alphabet_of, as_input, content
from cellstack.train.trained import TASKS

RANDOM_STEPS = 24
SUFFIXES = (".csv", ".npy", ".npz", ".parquet", ".ts", ".tsv", ".txt", ".wav")


class Sample(NamedTuple):
    """The input of a run, and what the page shows with it: labels of the steps, sound, a line about the input, and
    `names`, `truth`, `rescale` and `ids` of `save_html`.
    """

    x: Any
    mask: NDArray[np.bool_] | None = None
    labels: Any = None
    audio: tuple[Any, float] | None = None
    text: str = ""
    meaning: dict[str, Any] = {}  # noqa: RUF012, never changed


def inspect(args: argparse.Namespace) -> int:
    """Trace a network over a file, or over a small random input, and write the page of the trace.

    Raises:
        UsageError: a file that doesn't fit the network, or more numbers than a page can hold.
    """
    if args.rows < 1:
        raise UsageError(f"expected --rows of at least 1, got {args.rows}")
    net, path = load_model(args.model, load_options(args))
    output = args.output if args.output is not None else f"{Path(path).stem}.html"
    if not output:
        raise UsageError("expected --output to name a file, got ''")
    check_replaceable(output)  # before the run
    sample = _random(net) if args.file is None else _read(net, path, args.file, args.rows)
    try:
        t = net.trace(sample.x, mask=sample.mask, threads=args.threads)
        title = f"{Path(path).name}, {'random input' if args.file is None else Path(args.file).name}"
        t.save_html(output, sample.labels, audio=sample.audio, title=title, **sample.meaning)
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
    from cellstack.formats.verify import drawn, usual_steps  # slow to import, and only needed here

    steps = usual_steps(net, RANDOM_STEPS)
    text = "random input, because no FILE was given: the page shows how the network computes, not how it performs"
    return Sample(drawn(net, 0, 1, steps), text=text)


def _read(net: Network, model: str, path: str, rows: int) -> Sample:
    """Read a file as the network's input, at most `rows` rows of it."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"expected a file with one of the suffixes {', '.join(SUFFIXES)}, got {path!r}")
    task = net.metadata.get("task")
    if suffix == ".ts" or (suffix in TABLES and task is not None) or (suffix == ".npz" and task in TASKS):
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
    """Return sequences, or the last window of a table, as `cellstack run` passes them to a network with a task."""
    forecasts = net.task == "forecast"
    if forecasts and Path(path).suffix.lower() not in TABLES:
        raise UsageError(f"{path}: expected a table ({', '.join(TABLES)}), because the model forecasts")
    labels, meaning = None, dict[str, Any]()
    if forecasts:
        recipe, inputs = forecast.trained(net, model)
        table = read_table(path, **forecast.reading(net, model))
        windows = forecast.checked_windows(recipe, table, forecast.last_origins(table, recipe), inputs, model)
        examples, count = windows, min(rows, len(windows.origins))
        series = f" of {count} of {len(windows.origins)} series" if table.id else ""
        text = f"the last window{series} of {path}: {recipe.window} past steps and {recipe.horizon} to forecast"
        some = np.arange(count)
        every = len(recipe.quantiles)  # the output has the quantiles of each target
        scale, offset = windows.units(some).unit[:, None].repeat(every, -1), windows.reference(some).repeat(every, -1)
        ids = [table.ids[series] for series in windows.series[some]]
        meaning = {"rescale": (scale, offset), "ids": ids}
        if table.times is not None and count == 1:
            times = extended_times(table, recipe.horizon)
            labels = times[np.maximum(windows.origins[0] + np.arange(1 - recipe.window, recipe.horizon + 1), 0)]
    else:
        task = predict.trained(net, model)
        data = predict.as_trained(net, path, name=model)
        if data.channels != len(task.inputs.mean):
            raise UsageError(f"{path}: expected {len(task.inputs.mean)} channels, found {data.channels}")
        examples, count, inputs = Labelled(data), min(rows, len(data.x)), task.inputs
        if data.y is not None:
            meaning["truth"] = [_true(data, number) for number in range(count)]
        if data.ids:
            meaning["ids"] = data.ids[:count]
        text = f"{count} of {len(data.x)} sequences of {path}"
    each = [inputs(examples.fetch(np.array([number])).x) for number in range(count)]
    steps = max(x.shape[1] for x, _ in each)
    whole = np.zeros((count, steps, each[0][0].shape[2]), np.float32)
    mask = np.zeros((count, steps), bool)
    for number, (x, used) in enumerate(each):
        whole[number, : x.shape[1]] = x[0]
        mask[number, : x.shape[1]] = True if used is None else used[0]
    return Sample(whole, None if mask.all() else mask, labels, text=text, meaning=meaning)


def _true(data: Any, number: int) -> Any:
    """Return the true class or value of a sequence, or the list of those of its steps."""
    values = np.asarray(data.y[number]).tolist()
    named = (lambda value: data.labels[value]) if data.labels else (lambda value: value)
    return [named(value) for value in values] if isinstance(values, list) else named(values)


def _one_input(net: Network, path: str) -> str:
    if len(net.inputs) != 1 or not net.graph.timed(net.inputs[0]):
        raise UsageError(
            f"{path}: expected a .npz file with the inputs {', '.join(net.inputs)}: the network's input "
            "isn't a single sequence"
        )
    return net.inputs[0]


def _text(net: Network, path: str) -> Sample:
    """Return a text's characters as a text model takes them: as ids, or one-hot."""
    alphabet = alphabet_of(net, path)
    text = content(path, alphabet.characters is None)
    ids = alphabet.encode(text, path)
    if not len(ids):
        raise UsageError(f"{path}: the text is empty")
    labels = list(text) if isinstance(text, str) else [chr(byte) if byte < 128 else f"{byte:02x}" for byte in text]
    x = as_input(net, ids)[None]
    return Sample({net.inputs[0]: x}, labels=labels, text=f"the {len(ids):,} {alphabet.unit} of {path}")


def _sound(net: Network, path: str) -> Sample:
    """Return a wave file's samples, from -1 to 1, in frames as wide as the network's input."""
    name = _one_input(net, path)
    if name in net.graph.ids or net.input_size is None:
        raise UsageError(f"{path}: expected .npy, because this network doesn't take frames of samples")
    try:
        with wave.open(path) as file:
            channels, size, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UsageError(f"{path}: expected a wave file of PCM samples: {error}") from None
    if len(data) % (size * channels):
        raise UsageError(f"{path}: the file is truncated: its last sample has fewer than {size * channels} bytes")
    if not rate:
        raise UsageError(f"{path}: expected a sample rate of at least 1 Hz, found 0")
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
        raise UsageError(f"{path}: expected at least {width} samples (one frame of this network), found {len(samples)}")
    x = samples[: steps * width].reshape(1, steps, width)
    times = np.round(np.arange(steps) * width / rate, 6)
    text = f"{steps:,} frames of {width} samples of {path}, at {rate:,} Hz"
    return Sample({name: x}, labels=times, audio=(samples[: steps * width], rate), text=text)
