"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cellstack.layers import Trace
from cellstack_demo.pages import FAINT, INK, SERIES, curves, figure_svg, page, section, theme

GATE_MAP = LinearSegmentedColormap.from_list("gate", ["#0d2b52", "#2a78d6", "#9cc6f5", "#f3f7fc"])  # 0 to 1
SIGNED_MAP = LinearSegmentedColormap.from_list("signed", ["#1c5cab", "#8fbdf0", "#f2f2f0", "#f3a98c", "#b8401f"])  # ±
COUNT_MAP = LinearSegmentedColormap.from_list("count", ["#2a78d622", "#2a78d6"])


def report(
    result: dict[str, Any],
    whole: Sequence[dict[str, float]],
    causal: Sequence[dict[str, float]],
    confusion: NDArray[np.int64],
    gates: Sequence[tuple[str, Trace]],
    inside: str,
) -> str:
    """Return the demo's page.

    Args:
        result: the demo's results.
        whole, causal: the history of each fit, see `Fit`.
        confusion: `[true, predicted]` counts.
        gates: name and trace `[T, H]` of each layer over the replayed utterance.
        inside: the page of `save_html`, as HTML, of the forward stack's run over that utterance.
    """
    replay, labels = result["replay"], result["replay"]["labels"]
    took = float(np.median(replay["microseconds"]))
    tiles = [
        (f"{result['bidirectional']['accuracy']:.1%}", "of test utterances correct, bidirectional stack"),
        (f"{result['forward']['accuracy']:.1%}", "forward stack, frame by frame"),
        (f"{took:.0f} µs", "per frame, in a process without torch"),
        (f"{result['bidirectional']['train_seconds'] + result['forward']['train_seconds']:.0f} s", "to train both"),
    ]
    total = int(confusion.sum())
    sections = [
        section(
            "Training",
            "Mean loss per utterance (nats) in each epoch, on the training part and on the validation part. Noise and "
            "dropout apply only in training, so the training loss may be the higher one.",
            curves({"bidirectional": whole, "forward": causal}),
        ),
        section(
            "Confusion matrix",
            f"The {total} test utterances, bidirectional stack: {int(np.trace(confusion))} are on the diagonal.",
            _confusion(confusion, labels),
        ),
        section(
            f"Frame by frame: test utterance {replay['utterance']}, speaker {replay['truth']}",
            f"The forward stack's probabilities after each frame: the mean of its outputs so far. The utterance is "
            f"{replay['why']}. The stack was loaded from its file in a separate process, which never imported torch.",
            _probabilities(replay) + _frame_table(replay),
        ),
        section(
            "Inside: the gates of the same utterance",
            "Each row is a unit, each column a frame. Input, forget and output gates range from closed (dark) to open "
            "(light); candidate, cell and output are signed. Units are sorted by the mean of their forget gate.",
            "".join(_gates(name, trace) for name, trace in gates),
        ),
        section(
            "Live: explore the same run",
            "The page contains the forward stack's weights and runs it. Click a layer to open its cell, point at a "
            "number to see how it is computed, or change an input or fix a gate under What if to see the effect.",
            f'<iframe class="live" title="The forward stack\'s run, live" srcdoc="{html.escape(inside)}"></iframe>',
        ),
    ]
    text = (
        "Nine speakers say two Japanese vowels. Two stacks of LSTMs learn to identify the speaker from 12 cepstrum "
        "coefficients per frame."
    )
    source = "Japanese Vowels, Kudo, Toyama and Shimbo 1999, UCI Machine Learning Repository, CC BY 4.0"
    footer = f"<footer>Data: {source}. Seed {result['seed']}.</footer>"
    return page("who is speaking?", "Who is speaking?", text, tiles, sections, footer)


def _confusion(confusion: NDArray[np.int64], labels: Sequence[str]) -> str:
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    with theme({"axes.grid": False}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.pcolormesh(share[::-1], cmap=COUNT_MAP, vmin=0, vmax=1, edgecolors=FAINT, linewidth=0.15)
        count = len(labels)
        for row, column in np.ndindex(*confusion.shape):
            if confusion[row, column]:
                color = "white" if share[row, column] > 0.5 else INK
                place = (column + 0.5, count - row - 0.5)
                axis.text(*place, str(confusion[row, column]), ha="center", va="center", color=color)
        ticks = np.arange(count) + 0.5
        axis.set_xticks(ticks, labels)
        axis.set_yticks(ticks, list(labels)[::-1])
        axis.set(xlabel="predicted speaker", ylabel="true speaker")
        axis.tick_params(length=0)
    return figure_svg(figure, "confusion matrix")


def _probabilities(replay: dict[str, Any]) -> str:
    so_far = np.array(replay["so_far"])
    steps = np.arange(1, len(so_far) + 1)
    truth = replay["labels"].index(replay["truth"])
    baselines = [n for n in np.argsort(-so_far.max(axis=0)) if n != truth][:2]
    with theme():
        figure = Figure(figsize=(9, 2.7), layout="constrained")
        axis = figure.subplots()
        for n, color in zip([truth, *baselines], SERIES, strict=True):
            label = f"speaker {replay['labels'][n]}" + (" (true)" if n == truth else "")
            axis.plot(steps, so_far[:, n], color=color, label=label, marker="o", markersize=3)
        others = [n for n in range(so_far.shape[1]) if n not in (truth, *baselines)]
        for n in others:
            label = "other speakers" if n == others[0] else None
            axis.plot(steps, so_far[:, n], color=FAINT, linewidth=0.9, alpha=0.5, zorder=1, label=label)
        axis.set(xlabel="frame", ylabel="probability so far", ylim=(-0.03, 1.03))
        figure.legend(loc="outside right upper")
    return figure_svg(figure, "probability after each frame")


def _frame_table(replay: dict[str, Any]) -> str:
    rows = []
    for t, (so_far, took) in enumerate(zip(replay["so_far"], replay["microseconds"], strict=True), 1):
        best = int(np.argmax(so_far))
        name = html.escape(replay["labels"][best])
        bar = f'<td class="bar"><i style="width:{so_far[best]:.1%}"></i></td>'
        rows.append(f"<tr><td>{t}</td><td>{name}</td><td>{so_far[best]:.1%}</td>{bar}<td>{took:.1f}</td></tr>")
    head = "<tr><th>frame</th><th>speaker</th><th>probability</th><th></th><th>µs</th></tr>"
    return f"<details><summary>all frames as a table</summary><table>{head}{''.join(rows)}</table></details>"


def _gates(name: str, trace: Trace) -> str:
    order = np.argsort(-trace.f.mean(axis=0))
    panels = [
        ("input gate i", trace.i, True),
        ("forget gate f", trace.f, True),
        ("output gate o", trace.o, True),
        ("candidate g", trace.g, False),
        ("cell c", trace.c, False),
        ("output h", trace.h, False),
    ]
    with theme({"axes.grid": False, "axes.titlesize": 9}):
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        figure.suptitle(name, x=0.01, ha="left", fontsize=10, fontweight="bold")
        axes = figure.subplots(2, 3, sharex=True, sharey=True)
        for axis, (title, values, is_gate) in zip(axes.flat, panels, strict=True):
            limit = 1.0 if is_gate else max(float(np.abs(values).max()), 1e-6)
            scale = (
                {"cmap": GATE_MAP, "vmin": 0, "vmax": 1}
                if is_gate
                else {"cmap": SIGNED_MAP, "vmin": -limit, "vmax": limit}
            )
            extent = (0.5, len(values) + 0.5, values.shape[1] + 0.5, 0.5)
            image = axis.imshow(values[:, order].T, aspect="auto", interpolation="nearest", extent=extent, **scale)
            axis.set_title(title)
            bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7, length=2)
        for axis in axes[1]:
            axis.set_xlabel("frame")
        for axis in axes[:, 0]:
            axis.set_ylabel("unit")
    return figure_svg(figure, f"gates of {name}")
