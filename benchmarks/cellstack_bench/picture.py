"""A plot of a surface: the ratio over H and B, and every engine with the machine's roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellstack_bench.surface import gflops


def draw(what: str, records: Sequence[Mapping[str, Any]], report: Mapping[str, Any], path: Path) -> None:
    """Write the plot of a surface.

    Args:
        what: the name of the surface.
        records: results of `surface.measure`, at least one.
        report: the report of their run.
        path: the path of the file; its suffix sets the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        panels.setdefault((record["directions"], record["steps"], record["layers"]), []).append(record)
    figure = Figure(figsize=(4.2 * len(panels) + 6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1, squeeze=False, width_ratios=[4.2] * len(panels) + [6])[0]
    for axis, ((directions, steps, layers), some) in zip(axes[:-1], panels.items(), strict=True):
        _heat_map(axis, some)
        axis.set_title(
            f"T = {steps}" + (f", {layers} layers" if layers > 1 else "") + (", both directions" * (directions - 1))
        )
    _roofline(axes[-1], records, report["limits"])
    said = f"{what}, threads: {report['threads']}, {report['processor']}"
    figure.suptitle(f"{said}\nleft: the fastest peer's time over ours, least of {report['rounds']} rounds", fontsize=10)
    figure.savefig(path, dpi=120)


def _heat_map(axis: Any, records: Sequence[Mapping[str, Any]]) -> None:
    units, batches = (sorted({record[key] for record in records}) for key in ("units", "batch"))
    grid = np.full((len(batches), len(units)), np.nan)
    for record in records:
        if record["ratio"]:
            grid[batches.index(record["batch"]), units.index(record["units"])] = record["ratio"]["least"]
    axis.imshow(np.log2(grid), cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(grid):
        text = "no peer" if np.isnan(value) else f"{value:.2f}"
        color = "white" if abs(np.log2(value)) > 0.7 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(units)), units)
    axis.set_yticks(range(len(batches)), batches)
    axis.set_xlabel("H")
    axis.set_ylabel("B")


def _roofline(axis: Any, records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> None:
    intensity = [record["flop"] / record["bytes"] for record in records]
    x = np.geomspace(min(intensity) / 2, max(intensity) * 2, 200)
    for level in limits["reading"]:
        if level["gb_per_s"] and limits["gflops_core"]:
            roof = np.minimum(x * level["gb_per_s"], limits["gflops_core"])  # of one core, like the reading
            axis.plot(x, roof, color="grey", lw=1)
            axis.annotate(level["level"], (x[0], roof[0]), fontsize=8, color="grey")
    for key, text in {
        "gflops_core": "peak of a core",
        "gflops_threads": f"peak of {limits['threads']} threads",
    }.items():
        if limits[key] and (key == "gflops_core" or limits["threads"] > 1):
            axis.axhline(limits[key], color="black", lw=1, ls="-" if key == "gflops_core" else "--")
            axis.annotate(text, (x[-1], limits[key]), ha="right", va="bottom", fontsize=8)
    for name in dict.fromkeys(name for record in records for name in record["milliseconds"]):
        points = [(at, gflops(record, name)) for at, record in zip(intensity, records, strict=True)]
        there = [(at, speed) for at, speed in points if speed is not None]
        ours = name == "cellstack"
        look = {"s": 28, "marker": "o", "zorder": 3} if ours else {"s": 18, "marker": "x", "zorder": 2}
        axis.scatter(*zip(*there, strict=True), label=name, **look)
    speeds = [gflops(record, name) for record in records for name in record["milliseconds"]]
    heights = [height for height in (*speeds, limits["gflops_core"], limits["gflops_threads"]) if height]
    if heights:
        axis.set_ylim(min(heights) / 2, max(heights) * 2)
    if any(speeds):
        axis.legend(fontsize=8)
    axis.set_xlim(x[0], x[-1])
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of weights, x and y", ylabel="GFLOP/s")
    axis.set_title("roofline of one core, by level of memory")
