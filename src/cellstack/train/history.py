"""A training's history as a file, as a plot, and as a log during training: CSV, JSON, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellstack.formats.files import check_replaceable, replacing
from cellstack.train.checks import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Callable[[Any], None]  # draws on a matplotlib Axes
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#9b6bc4", "#8a8984")  # blue, orange, green, violet, grey
NO_MATPLOTLIB = "a plot needs matplotlib: pip install 'cellstack[torch]'"
FILES, PICTURES = (".csv", ".json"), (".png", ".svg", ".pdf")
METRICS = ("accuracy", "rmse", "mase", "bits_per_character")  # all are measured on the validation part
ABBREVIATED = ("mae", "rmse", "mase")
APART = ("epoch", "lr")  # entries that aren't plotted
STEPS = (1, *(part * 10**n for n in range(7) for part in (5, 10, 20)))  # between ticks
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # first characters of a spreadsheet's formula; the last four are full-width
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def check(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str) -> None:
    """Check before a training that a file can be written after it.

    Raises:
        UsageError: an unsupported suffix, or matplotlib isn't installed, for a picture.
        OSError: the file can't be written.
    """
    if suffixes is PICTURES and find_spec("matplotlib") is None:
        raise UsageError(NO_MATPLOTLIB)
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


def named(entry: str) -> str:
    """Return the name of a history's entry for readers, with the part that it was measured on.

    >>> named("loss"), named("validation_loss"), named("mase")
    ('training loss', 'validation loss', 'validation MASE')
    """
    part = "training " if entry == "loss" else "validation " if entry in METRICS else ""
    return part + in_words(entry)


def in_words(entry: str) -> str:
    """Return the name of a history's entry or of a score in words."""
    return entry.upper() if entry in ABBREVIATED else entry.replace("_", " ")


def draw(
    path: str | os.PathLike[str],
    history: Sequence[dict[str, Any]],
    best: dict[str, Any] | None = None,
    more: Sequence[Panel] = (),
) -> None:
    """Write a plot of the losses and of each metric over the epochs, with the kept epoch marked.

    Args:
        path: the file, with a suffix of `PICTURES`.
        history: an entry per epoch. Networks that were trained one after the other have separate curves.
        best: the entry of the kept epoch; of several networks, each keeps the one with the lowest validation loss.
        more: functions that draw further panels, each on a matplotlib Axes.

    Raises:
        TypeError: the arguments are swapped.
        UsageError: matplotlib isn't installed.
        OSError: the file can't be written.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"draw: expected a path, then the history: draw(path, history), got {type(path).__name__}")
    save(path, panels([*curves(history, best), *more]))


def save(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a matplotlib figure to a file with a suffix of `PICTURES`.

    Raises:
        OSError: the file can't be written; the previous file is intact.
    """
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=120)


def panels(drawn: Sequence[Panel], columns: int = 1) -> Figure:
    """Return a figure with a panel for each function, which draws on its Axes.

    Raises:
        UsageError: matplotlib isn't installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise UsageError(NO_MATPLOTLIB) from None
    rows = -(-len(drawn) // columns)
    size = (7.5 if columns == 1 else 5.5 * columns, 3.0 * rows)
    figure, grid = pyplot.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis, draws in zip(grid.flat, drawn, strict=False):
        draws(axis)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid.flat[len(drawn) :]:
        axis.set_axis_off()
    pyplot.close(figure)  # otherwise a notebook draws it twice
    return figure


def curves(history: Sequence[dict[str, Any]], best: dict[str, Any] | None = None) -> list[Panel]:
    """Return functions that draw the losses and each metric over the epochs, see `draw`."""
    numbers = [name for name in history[0] if name not in APART and isinstance(history[0][name], float)]
    losses = [name for name in numbers if name in ("loss", "validation_loss")]
    rows = [losses, *([name] for name in numbers if name not in losses)]
    if "member" in history[0]:
        return [partial(_of_members, history=history, names=names) for names in rows]
    return [partial(_of_one, history=history, names=names, best=best) for names in rows]


def _of_one(axis: Any, history: Sequence[dict[str, Any]], names: list[str], best: dict[str, Any] | None) -> None:
    epochs = [entry["epoch"] for entry in history]
    for name, color in zip(names, COLORS, strict=False):
        values = [entry.get(name) for entry in history]
        axis.plot(epochs, values, color=color, label=named(name), marker="." * (len(epochs) < 30))
    if best is not None:
        axis.axvline(best["epoch"], color="0.6", linestyle=":", label=f"kept, epoch {best['epoch']}")
    axis.legend(frameon=False)
    _label(axis, names)


def _of_members(axis: Any, history: Sequence[dict[str, Any]], names: list[str]) -> None:
    """Draw the curves of each network: of its training, and of its training with the validation part."""
    from matplotlib.lines import Line2D

    styles: dict[str, dict[str, Any]] = {}
    colors = {}
    for member, whole in dict.fromkeys((entry["member"], entry["whole"]) for entry in history):
        entries = [entry for entry in history if (entry["member"], entry["whole"]) == (member, whole)]
        colors[f"network {member}"] = color = COLORS[(member - 1) % len(COLORS)]
        for name in names:
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if not points:
                continue
            said = f"{named(name)}{', with the validation part' * whole}"
            styles[said] = {"linestyle": ":" if whole else "--" if name.startswith("validation_") else "-"}
            axis.plot(*zip(*points, strict=True), color=color, marker="." * (len(points) < 30), **styles[said])
            if name == "validation_loss":
                styles["kept epoch"] = {"linestyle": "", "marker": "o", "markersize": 5}
                axis.plot(*min(points, key=lambda point: point[1]), color=color, **styles["kept epoch"])
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items() if len(colors) > 1]
    handles += [Line2D([], [], color="0.3", label=name, **style) for name, style in styles.items()]
    axis.legend(handles=handles, frameon=False, fontsize=8, ncols=2)
    _label(axis, names)


def _label(axis: Any, names: list[str]) -> None:
    """Name the axes of a panel, and set its ticks: epochs count from 1."""
    axis.set_ylabel("loss" if "loss" in names else named(names[0]))
    axis.set_xlabel("epoch")
    last = int(axis.dataLim.x1)
    step = next(step for step in STEPS if last <= 10 * step or step == STEPS[-1])
    axis.set_xticks(sorted({1, *range(step, last + 1, step)}))


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
