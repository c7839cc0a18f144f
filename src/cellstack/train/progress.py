"""The progress bar of a training: one bar over all of its fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
WIDTH = len(" 100%|=| 00:00<00:00, ")  # of what is neither the description nor the figures; the bar takes the rest


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def is_shown(progress: bool | None) -> bool:
    """Return whether to show a bar: as given; None = where standard error is a terminal, and in notebooks."""
    return (sys.stderr.isatty() or in_notebook()) if progress is None else progress


def above(line: str) -> None:
    """Print a line on standard error, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Bar:
    """A progress bar over the steps of one fit, or of several in turn.

    It is text, also in a notebook, where a widget would be lost when the notebook is saved.

    Args:
        shown: whether to show it.
        expected: the epochs of each fit to come, at most; () = one fit, of `FitOptions.epochs`. May be replaced between
            two fits.
    """

    def __init__(self, shown: bool, expected: Sequence[int] = ()):
        self.shown, self.expected = shown, list(expected)
        self.bar: Any = None
        self.measured: list[str] = []
        self.label, self.epochs, self.completed = "", 0, False

    def begin(self, label: str, epochs: int, steps: int, done: int) -> None:
        """Start a fit.

        Args:
            label: its name, if there are several; "" for none.
            epochs: of the fit, at most, if not given by `expected`.
            steps: of each epoch.
            done: steps that a checkpoint contained.
        """
        if not self.shown:
            return
        self.label, self.epochs = label, self.expected.pop(0) if self.expected else epochs
        self.measured, self.completed = [], False
        if self.bar is None:
            file = sys.stdout if in_notebook() else sys.stderr  # a notebook shows standard error in red
            look = {"bar_format": FORMAT, "dynamic_ncols": True, "smoothing": 0.1, "file": file}
            self.bar = tqdm(desc=self._described(1), total=steps * (self.epochs + sum(self.expected)), **look)
        bar = self.bar
        bar.total = bar.n + steps * (self.epochs + sum(self.expected))
        bar.n, bar.initial, bar.last_print_n = bar.n + done, bar.initial + done, bar.n + done
        bar.set_description_str(self._described(1 + done // steps), refresh=False)
        bar.set_postfix_str("")

    def step(self, epoch: int, loss: float) -> None:
        """Count a step of an epoch, which counts from 1; `loss` is the mean of the epoch so far."""
        if self.bar is not None:
            self.bar.set_description_str(self._described(epoch), refresh=False)
            self.bar.set_postfix_str(self._figures(loss), refresh=False)
            self.bar.update()

    def validated(self, figures: Mapping[str, float]) -> None:
        """Show an epoch's loss and metrics on the validation part from now on."""
        self.measured = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items()]

    def end(self, completed: bool) -> None:
        """End a fit; `completed`: it wasn't interrupted, so it needs no further steps."""
        self.completed = completed
        if self.bar is not None:
            self.bar.refresh()  # tqdm may have skipped the last steps

    def close(self) -> None:
        """Close the bar, at 100 % if the last fit was completed, also after fewer steps than expected."""
        if self.bar is not None:
            if self.completed:
                self.bar.total = self.bar.n
                self.bar.refresh()
            self.bar.close()

    def _figures(self, loss: float) -> str:
        """Return the loss and as many of the validation part's figures as the terminal's width allows."""
        figures = [f"loss {loss:.3g}"]
        width = self.bar.ncols - len(self.bar.desc) - WIDTH if self.bar.ncols else float("inf")
        for figure in self.measured:
            if len(", ".join([*figures, figure])) > width:
                break
            figures.append(figure)
        return "; ".join(filter(None, [figures[0], ", ".join(figures[1:])]))

    def _described(self, epoch: int) -> str:
        label = f"{self.label}, " if self.label else ""
        return f"{label}epoch {min(epoch, self.epochs)}/{self.epochs}"


@contextmanager
def opened(progress: bool | Bar | None, hidden: bool = False) -> Iterator[Bar]:
    """Make a bar for one fit, and close it afterwards; yield a `Bar`, which several fits share, unchanged."""
    if isinstance(progress, Bar):
        yield progress
        return
    bar = Bar(is_shown(progress) and not hidden)
    try:
        yield bar
    finally:
        bar.close()
