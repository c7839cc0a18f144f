"""A training's history as a file, as a plot, and as a log during training: CSV, JSON, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellstack.formats.files import check_replaceable, replacing
from cellstack.train.checks import UsageError

FILES, PICTURES = (".csv", ".json"), (".png", ".svg", ".pdf")
APART = ("epoch", "lr")  # entries that aren't plotted
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # first characters of a spreadsheet's formula; the last four are full-width
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def check(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str) -> None:
    """Check before a training that a file can be written after it.

    Raises:
        UsageError: an unsupported suffix.
        OSError: the file can't be written.
    """
    if Path(path).suffix.lower() not in suffixes:
        raise UsageError(f"expected {what} to end in one of {', '.join(suffixes)}, got {os.fspath(path)!r}")
    check_replaceable(path)


def write(path: str | os.PathLike[str], history: Sequence[dict[str, Any]]) -> None:
    """Write a history: `.csv`, a line per epoch, or `.json`, a list of objects.

    Raises:
        OSError: the file can't be written; the previous file is intact.
    """
    if Path(path).suffix.lower() == ".json":
        text = json.dumps(list(history), indent=1) + "\n"
    else:
        names = list(dict.fromkeys(name for entry in history for name in entry))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in entry.items()} for entry in history)
        text = buffer.getvalue()
    with replacing(path) as file:
        file.write(text.encode())


def cell(value: Any) -> Any:
    """Return a value as a CSV cell: text that a spreadsheet would run as a formula is prefixed with `'`.

    Ref: OWASP, "CSV injection".

    >>> [cell(value) for value in ("=1+1", "-2.5", "shop-1", -1)]
    ["'=1+1", '-2.5', 'shop-1', -1]
    """
    if isinstance(value, str) and value.startswith(FORMULA) and not NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def draw(path: str | os.PathLike[str], history: Sequence[dict[str, Any]], best: dict[str, Any] | None = None) -> None:
    """Plot the losses over the epochs, and each metric below them, with the kept epoch marked.

    Raises:
        UsageError: matplotlib isn't installed.
        OSError: the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UsageError(f"a plot needs {error.name}: pip install 'cellstack[torch]'") from None
    numbers = [name for name in history[0] if name not in APART and isinstance(history[0][name], float)]
    losses = [name for name in numbers if name in ("loss", "validation_loss")]
    rows = [losses, *([name] for name in numbers if name not in losses)]
    figure = Figure(figsize=(7, 2.4 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    epochs = [entry["epoch"] for entry in history]
    for axes, names in zip(all_axes, rows, strict=True):
        for name in names:
            axes.plot(
                epochs,
                [entry.get(name) for entry in history],
                label=name.replace("_", " "),
                marker="." * (len(epochs) < 30),
            )
        if best is not None:
            axes.axvline(best["epoch"], color="0.6", linestyle=":", label=f"kept, epoch {best['epoch']}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("epoch")
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=120)


def event_writer(folder: str | os.PathLike[str] | None) -> Any:
    """Return a TensorBoard writer to a folder (None = torch's default); None if TensorBoard isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None
    return SummaryWriter(None if folder is None else os.fspath(folder))


class Log:
    """A callback that writes each epoch's metrics as it ends: to a file, rewritten each time, or to TensorBoard.

    If the file can't be written, there is one warning, and the training continues.

    Args:
        path: a .csv or .json file, else a folder.

    Raises:
        UsageError: a folder, and TensorBoard isn't installed.
        OSError: the file can't be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.writer, self.failed = path, None, False
        if Path(path).suffix.lower() in FILES:
            check_replaceable(path)
            return
        self.writer = event_writer(path)
        if self.writer is None:
            raise UsageError(
                f"expected a log with the suffix {' or '.join(FILES)}, got {os.fspath(path)!r}: for events, "
                "pip install tensorboard"
            )

    def __call__(self, epoch: Any) -> None:
        """Write an `Epoch`."""
        if self.writer is not None:
            for name, value in epoch.entry.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, epoch.entry["epoch"])
            self.writer.flush()
            return
        try:
            write(self.path, epoch.fit.history)
        except OSError as error:
            if not self.failed:
                self.failed = True
                said = f"the log could not be written, training continues: {self.path}: {error.strerror}"
                warnings.warn(said, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Close the TensorBoard writer, if there is one."""
        if self.writer is not None:
            self.writer.close()
