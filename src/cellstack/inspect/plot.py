"""Plots of a trace, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.inspect.values import as_tuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.inspect.trace import NetworkTrace

NAME_LENGTH = 80  # characters of a cell's name in a line


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    return pyplot


def plot(t: NetworkTrace, nodes: str | Iterable[str] | None, fields: Iterable[str] | None, row: int) -> Figure:
    """Return a figure of one row of a trace: see `NetworkTrace.plot`."""
    pyplot = _pyplot()
    from matplotlib.ticker import MaxNLocator  # once pyplot has said what is missing

    count = len(as_tuple(t.y)[0])
    if not isinstance(row, (int, np.integer)) or isinstance(row, bool) or not -count <= row < count:
        raise IndexError(f"plot: expected row as a number below {count}, got {row!r:.80}")
    names = list(t) if nodes is None else [nodes] if isinstance(nodes, str) else list(nodes)
    wanted = None if fields is None else list(fields)
    panels = [
        (
            name if len(t[name].cells) == 1 else f"{name}.cells[{number}]",
            field,
            field in multipliers,
            cell.flat(field)[row],
        )
        for name in names
        for number, cell in enumerate(t[name].cells)
        for multipliers in [cell.cell.spec.of_kind.multipliers]
        for field in cell
        if wanted is None or field in wanted
    ]
    if not panels:
        raise ValueError(f"plot: no cells with {', '.join(wanted or ['fields'])} in {', '.join(names)}")
    if not all(values.size for *_, values in panels):
        raise ValueError("plot: expected at least one step and one unit")
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(8, 0.6 + 1.3 * len(panels)), layout="constrained"
    )
    steps, above = t.steps, None
    for axis, (name, field, scales, values) in zip(axes[:, 0], panels, strict=True):
        most = 1.0 if scales else max(float(abs(values).max(initial=0.0)), 1e-9)
        image = axis.imshow(
            values.T,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap="cividis" if scales else "PuOr",
            vmin=0.0 if scales else -most,  # states and candidates are centred on 0
            vmax=most,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, values.shape[1] - 0.5) if len(steps) else None,
        )
        axis.set_ylabel(f"{field}, unit")
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        if name != above:  # once per cell: a long name at each of its fields would overlap
            axis.set_title("\n".join(wrap(name, NAME_LENGTH)), loc="left", fontsize="medium", fontweight="bold")
        above = name
        figure.colorbar(image, ax=axis, ticks=MaxNLocator(4))
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    pyplot.close(figure)  # otherwise a notebook draws it twice
    return figure


def bars(labels: Sequence[str], values: Sequence[float], what: str) -> Figure:
    """Return a bar chart of labelled numbers, from the top down; `what` is the axis label."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 0.8 + 0.25 * len(labels)), layout="constrained")
    axis.barh(range(len(labels)), values, color="#30618f")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(0.0, color="0.4", linewidth=0.8)
    axis.set_xlabel(what)
    pyplot.close(figure)
    return figure
